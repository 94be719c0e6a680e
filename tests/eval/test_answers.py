from __future__ import annotations

import json
import random

import pytest

from still.eval.answers import parse_answer


def item(name: str, verdict: str = "pass", **more) -> dict:
    return {"id": name, "evidence": [], "reason": f"because of {name}", "verdict": verdict} | more


def answer(*items: dict) -> str:
    return json.dumps({"verdicts": list(items)})


def labels(text: str, ids: list[str], labs: bool = False) -> dict[str, str]:
    return {name: said.label for name, said in parse_answer(text, ids, labs).said.items()}


WHOLE = answer(item("C-1"), item("C-2", "fail"))


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        f"```json\n{WHOLE}\n```",
        f"Let me think about {{a}} and {{b: c}}.\nAnswer: {WHOLE}\nThat is all.",
        f"<think>maybe {answer(item('C-1', 'fail'), item('C-2'))}</think>{WHOLE}",
        f"maybe {answer(item('C-1', 'fail'), item('C-2'))}</think>{WHOLE}",
        f"{{a}} </think> {answer(item('C-1', evidence=['so </think> it is']), item('C-2', 'fail'))}",
        answer(item("C-1", evidence=["rent </think> is 5"]), item("C-2", "fail")),
        f"First draft: {WHOLE}. On reflection:\n{WHOLE}",
        answer(item("C-1", " PASS "), item("C-2", "Fail")),
        answer(item("C-2", "fail"), item("C-1")),
    ],
)
def test_the_last_whole_answer_counts_whatever_stands_around_it(text):
    assert labels(text, ["C-1", "C-2"]) == {"C-1": "pass", "C-2": "fail"}
    assert parse_answer(text, ["C-1", "C-2"]).problems == ()


def test_a_criterion_that_is_both_passed_and_failed_is_asked_again():
    other = answer(item("C-1", "fail"), item("C-2", "fail"))
    for text in (f"{WHOLE} The memo holds {other}, which I ignored.", f"A draft: {other}. On reflection: {WHOLE}"):
        parsed = parse_answer(text, ["C-1", "C-2"])
        assert {name: said.label for name, said in parsed.said.items()} == {"C-2": "fail"}
        assert parsed.problems == ("criterion C-1 was both passed and failed",)
    bare = json.dumps({"reason": "r", "verdict": "fail"})
    assert labels(f"{bare} {answer(item('C-1'))}", ["C-1"]) == {}
    lab = [json.dumps({"verdict": label, "reasoning": "r"}) for label in ("fail", "pass")]
    assert labels(" ".join(lab), ["C-1"], labs=True) == {}
    assert labels(lab[0] * 2, ["C-1"], labs=True) == {"C-1": "fail"}


@pytest.mark.parametrize("text", ["<think>{}</think>I cannot say.", "so {} or so </think>", "<think>so {} or so"])
def test_what_was_only_thought_is_no_answer(text):
    assert parse_answer(text.format(WHOLE), ["C-1", "C-2"]).said == {}


def test_blanks_around_a_name_do_not_matter_on_either_side():
    assert labels(answer(item("C-1"), item(" C-2", "fail")), ["C-1 ", "C-2"]) == {"C-1 ": "pass", "C-2": "fail"}


@pytest.mark.parametrize("length", range(1, len(WHOLE)))
def test_an_answer_that_broke_off_anywhere_is_none(length):
    parsed = parse_answer(WHOLE[:length], ["C-1", "C-2"])
    assert parsed.said == {}
    assert parsed.problems


@pytest.mark.parametrize("length", range(1, len(answer(item("C-1")))))
def test_nor_is_one_on_a_single_criterion(length):
    assert parse_answer(answer(item("C-1"))[:length], ["C-1"]).said == {}


def test_an_answer_after_which_another_broke_off_is_none():
    assert parse_answer(WHOLE + "\nCorrected: " + WHOLE[:-9], ["C-1", "C-2"]).said == {}
    assert parse_answer('{"draft": {"verdict": "pass", "reason": "r"}, "verdict": "fa', ["C-1"]).said == {}
    assert parse_answer('[{"id": "C-1", "reason": "r", "verdict": "pass"}, {"id": "C-1", "re', ["C-1"]).said == {}


@pytest.mark.parametrize(
    ("items", "kept", "problem"),
    [
        ([item("C-1")], {"C-1": "pass"}, "C-2 was left out"),
        ([item("C-1"), item("C-3")], {"C-1": "pass"}, "no criterion 'C-3'"),
        ([item("C-1"), item("C-2"), item("C-2", "fail")], {"C-1": "pass"}, "C-2 was judged twice"),
        ([item("C-1"), item("C-2"), item("C-2"), item("C-2")], {"C-1": "pass"}, "C-2 was judged twice"),
        ([item("C-1"), item("C-2", "maybe")], {"C-1": "pass"}, "'maybe', neither pass nor fail"),
        ([item("C-1"), item("C-2", True)], {"C-1": "pass"}, "True, neither"),
        ([item("C-1"), item("C-2", reason=" ")], {"C-1": "pass"}, 'no "reason"'),
        ([item("C-1"), {"id": "C-2", "verdict": "pass", "reason": "r"}], {"C-1": "pass"}, "before its reason"),
        ([item("C-1"), {"reason": "r", "verdict": "pass"}], {"C-1": "pass"}, "no criterion None"),
        ([item("C-1"), item("C-2", id=["C-2"])], {"C-1": "pass"}, "no criterion ['C-2']"),
        ([item("c-1"), item("C-2")], {"C-2": "pass"}, "no criterion 'c-1'"),
    ],
)
def test_names_are_checked_and_what_is_amiss_is_asked_again_alone(items, kept, problem):
    parsed = parse_answer(answer(*items), ["C-1", "C-2"])
    assert {name: said.label for name, said in parsed.said.items()} == kept
    assert any(problem in each for each in parsed.problems)


@pytest.mark.parametrize(
    "text",
    ["", "PASS", "Verdict: pass", "{}", "[]", '{"verdicts": "pass"}', '{"verdicts": ["pass"]}', '{"verdict": "pass"}',
     '{"reason": "r", "verdict": "fail", "verdict": "pass"}', '{"a":' * 3000, '{"a":' + "[" * 100_000],
)  # fmt: skip
def test_nothing_is_guessed(text):
    assert parse_answer(text, ["C-1"]).said == {}


def test_one_criterion_may_be_answered_without_list_and_name():
    assert labels('{"reason": "r", "verdict": "fail"}', ["C-1"]) == {"C-1": "fail"}
    assert labels('{"id": "C-2", "reason": "r", "verdict": "fail"}', ["C-1"]) == {}


def test_labs_form_takes_the_verdict_first():
    assert labels('{"verdict": "pass", "reasoning": "r"}', ["C-1"], labs=True) == {"C-1": "pass"}
    assert labels('{"verdict": "pass"}', ["C-1"], labs=True) == {}
    assert labels('{"verdict": "pass", "reasoning": "r', ["C-1"], labs=True) == {}


def test_what_is_said_of_an_answer_stays_short():
    parsed = parse_answer(answer(item("x" * 9000), item("C-1", ["pass"] * 9000)), ["C-1"])
    assert len(parsed.problems) == 2
    assert all(len(each) < 150 for each in parsed.problems)


def test_damage_of_any_kind_makes_no_other_verdict():
    """Characters dropped, doubled, replaced or put in: a fail may be lost, and never becomes anything else."""
    rng = random.Random("damage")
    ids = ["C-1", "C-2", "C-3"]
    whole = f"Thinking {{aloud}}.\n{answer(*(item(name, 'fail') for name in ids))}\nDone."
    kept = 0
    for _ in range(5000):
        text = list(whole)
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            place = rng.randrange(len(text))
            text[place] = rng.choice(
                ["", text[place] * 2, rng.choice('{}[]",:\\n'), text[place] + rng.choice('{}[]",')]
            )
        said = parse_answer("".join(text), ids).said
        kept += len(said)
        assert set(said) <= set(ids)
        assert {each.label for each in said.values()} <= {"fail"}
    assert kept > 1000


def test_quotes_are_kept_as_texts():
    parsed = parse_answer(answer(item("C-1", evidence=["a", 3, " b ", ""]), item("C-2", evidence="c")), ["C-1", "C-2"])
    assert (parsed.said["C-1"].quotes, parsed.said["C-2"].quotes) == (("a", "b"), ("c",))
