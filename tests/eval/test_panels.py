"""Ensembles, cascades and repeats: how several verdicts become one, and who is asked about what."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace

import pytest
from judge_server import ids_in, make_task

from still.eval.cascade import Cascade
from still.eval.ensemble import Ensemble, joint_label
from still.eval.grade import GradeConfig, grade, leaves
from still.eval.judges import ScriptedJudge
from still.eval.prices import Price, Prices
from still.eval.verdicts import Tokens

MEMO = {"memo.md": "The memo."}


class Says(ScriptedJudge):
    """A judge that passes everything but the criteria named; `asked` are the ids it was asked about, in order."""

    def __init__(self, name: str, fails=(), silent=()):
        self.fails, self.silent, self.asked = set(fails), set(silent), []
        super().__init__(self._say, name)

    def _say(self, chat) -> str:
        ids = ids_in(chat[-1]["content"])
        self.asked += ids
        said = [
            {"id": each, "reason": f"{self.name} says so", "verdict": "fail" if each in self.fails else "pass"}
            for each in ids
            if each not in self.silent
        ]
        return json.dumps({"verdicts": said})


def names(count: int) -> list[str]:
    return [f"C-{number:05d}" for number in range(count)]


def run(judge, count: int = 10, task=None, **more):
    return asyncio.run(grade(task or make_task(count), MEMO, judge, GradeConfig(reasks=0), **more))


@pytest.mark.parametrize(
    ("rule", "labels", "joint"),
    [
        ("strict", "pp", "pass"), ("strict", "pf", "fail"), ("strict", "pu", "unscored"), ("strict", "fu", "fail"),
        ("mean", "pp", "pass"), ("mean", "pf", "fail"), ("mean", "pu", "unscored"),
        ("majority", "ppf", "pass"), ("majority", "pff", "fail"), ("majority", "pf", "fail"),
        ("majority", "ppu", "pass"), ("majority", "pfu", "unscored"), ("majority", "ffu", "fail"),
        ("majority", "puu", "unscored"), ("majority", "ppff", "fail"), ("majority", "p", "pass"),
    ],
)  # fmt: skip
def test_rules(rule, labels, joint):
    words = {"p": "pass", "f": "fail", "u": "unscored"}
    for order in itertools.permutations(labels):
        assert joint_label([words[each] for each in order], rule) == joint


def test_an_unscored_vote_matters_only_where_it_could_tip_the_verdict():
    """Whatever label an unscored vote gets, a scored joint label stays."""
    for rule, size in itertools.product(("strict", "mean", "majority"), (1, 2, 3, 4)):
        for labels in itertools.product(("pass", "fail", "unscored"), repeat=size):
            free = [index for index, label in enumerate(labels) if label == "unscored"]
            outcomes = set()
            for chosen in itertools.product(("pass", "fail"), repeat=len(free)):
                filled = list(labels)
                for index, label in zip(free, chosen, strict=True):
                    filled[index] = label
                outcomes.add(joint_label(filled, rule))
            joint = joint_label(labels, rule)
            assert joint == (outcomes.pop() if len(outcomes) == 1 else "unscored"), (rule, labels)


def test_an_ensemble_keeps_every_vote_and_its_cost():
    prices = Prices({f"scripted:{name}": Price(1.0, 1.0) for name in "abc"})
    judges = [Says("a"), Says("b", names(3)), Says("c", names(2))]
    for judge in judges:
        answer = judge._answer
        judge._answer = lambda chat, answer=answer: replace_reply(answer(chat))
    grading = run(Ensemble(tuple(judges), "majority"), prices=prices)
    assert [each.label for each in grading.verdicts[:4]] == ["fail", "fail", "pass", "pass"]
    first = grading.verdicts[0]
    assert [(vote.judge, vote.label) for vote in first.votes] == [("a", "pass"), ("b", "fail"), ("c", "fail")]
    assert first.judge == "majority(a, b, c)"
    assert first.reason == "b says so [a pass, b fail, c fail]"
    assert first.tokens == Tokens(30, 0, 0, 6, 0, 3)
    assert first.cost == pytest.approx(36e-6)
    assert grading.cost == pytest.approx(360e-6)


def replace_reply(text: str):
    from still.eval.judges import Reply

    return Reply(text, Tokens(10, 0, 0, 2, 0, 1))


def test_all_pass_ends_where_the_cheap_judge_fails_too_many():
    cheap, strong = Says("cheap", names(4)), Says("strong")
    grading = run(Cascade(cheap, strong, most_fails=3, audit=0))
    assert strong.asked == []
    assert grading.all_pass is False
    assert {each.role for each in grading.verdicts} == {"cheap"}


def test_all_pass_takes_the_fails_and_then_only_if_all_fall_the_passes():
    cheap, strong = Says("cheap", names(3)), Says("strong", names(1))
    grading = run(Cascade(cheap, strong, most_fails=3, audit=0))
    assert strong.asked == names(3)
    assert [each.label for each in grading.verdicts[:4]] == ["fail", "pass", "pass", "pass"]
    assert [each.role for each in grading.verdicts[:4]] == ["strong", "strong", "strong", "cheap"]

    cheap, strong = Says("cheap", names(3)), Says("strong", ["C-00007"])
    grading = run(Cascade(cheap, strong, most_fails=3, audit=0))
    assert sorted(strong.asked) == names(10)
    assert [each.id for each in grading.verdicts if each.label == "fail"] == ["C-00007"]
    overturned = grading.verdicts[0]
    assert [(vote.judge, vote.role, vote.label) for vote in overturned.votes] == [
        ("cheap", "cheap", "fail"), ("strong", "strong", "pass"),
    ]  # fmt: skip


def test_every_criterion_of_an_all_pass_was_checked_by_the_strong_judge_whatever_the_audit_drew():
    def drawn(seed: int) -> set[str]:
        return Cascade(Says("cheap"), Says("strong"), seed=seed)._sample(make_task(30).criteria)

    seed = next(seed for seed in range(100) if len(drawn(seed)) == 1)
    (audited,) = drawn(seed)
    other = next(name for name in names(30) if name != audited)
    for most_fails in (0, 3):  # the cheap judge's only fail is audited and overturned; its false pass is elsewhere
        strong = Says("strong", [other])
        grading = run(Cascade(Says("cheap", [audited]), strong, most_fails=most_fails, seed=seed), 30)
        assert (grading.all_pass, sorted(strong.asked)) == (False, names(30))
    strong = Says("strong", [audited])  # the audit finds a false pass: the task is lost, and the rest is not asked
    grading = run(Cascade(Says("cheap"), strong, seed=seed), 30)
    assert (grading.all_pass, strong.asked) == (False, [audited])


def test_what_the_cheap_judge_leaves_unscored_goes_to_the_strong_one():
    for policy in ("all-pass", "rates"):
        cheap, strong = Says("cheap", silent=["C-00002"]), Says("strong", ["C-00002"])
        grading = run(Cascade(cheap, strong, policy, audit=0))
        assert strong.asked == ["C-00002"]
        assert grading.verdicts[2].label == "fail"


def test_rates_escalate_the_kinds_that_cheap_judges_misread():
    task = make_task(6)
    titles = ["States the fee", "DISTRACTOR_001: red herring", "Does not disclose the fee letter",
              "Identifies at least 8 of the 12 issues", "Dates it", "Names the buyer"]  # fmt: skip
    task = replace(task, criteria=tuple(replace(c, title=t) for c, t in zip(task.criteria, titles, strict=True)))
    strong = Says("strong", ["C-00001"])
    grading = run(Cascade(Says("cheap", ["C-00000"]), strong, "rates", audit=0), task=task)
    assert strong.asked == ["C-00001", "C-00002", "C-00003"]
    assert [each.label for each in grading.verdicts] == ["fail", "fail", "pass", "pass", "pass", "pass"]


def test_rates_escalate_what_cheap_judges_disagree_on():
    strong = Says("strong")
    pair = Ensemble((Says("a", ["C-00004"]), Says("b")), "strict")
    grading = run(Cascade(pair, strong, "rates", kinds=(), audit=0))
    assert strong.asked == ["C-00004"]
    assert grading.verdicts[4].label == "pass"
    assert [each.name for each in leaves(grading.judge)] == ["a", "b", "strong"]


def test_the_audit_sample_is_random_seeded_and_of_the_size_asked_for():
    asked = []
    for seed in (0, 0, 1):
        strong = Says("strong")
        grading = run(Cascade(Says("cheap"), strong, "rates", kinds=(), audit=0.1, seed=seed), 1000)
        asked.append(strong.asked)
        assert [each.id for each in grading.verdicts if each.role == "audit"] == strong.asked
    assert asked[0] == asked[1] != asked[2]
    assert 70 <= len(asked[0]) <= 130
    strong = Says("strong")
    run(Cascade(Says("cheap", names(500)), strong, "all-pass", audit=0.1), 1000)
    assert strong.asked == asked[0], "a task that is lost is audited too, and a criterion is drawn by itself"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ensemble((Says("a"),)), "two or more"),
        (lambda: Ensemble((Says("a"), Says("a"))), "different names"),
        (lambda: Ensemble((Says("a"), Says("b")), "best"), "strict"),
        (lambda: Cascade(Says("a"), Says("a")), "two different"),
        (lambda: Cascade(Says("a"), Says("b"), "some"), "all-pass and rates"),
        (lambda: Cascade(Says("a"), Says("b"), audit=2), "share from 0 to 1"),
        (lambda: Cascade(Says("a"), Says("b"), kinds=("odd",)), "odd"),
    ],
)
def test_panels_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
