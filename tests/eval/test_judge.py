from __future__ import annotations

import random

import pytest

from still.eval.judge import exact_criterion, exact_judge
from still.eval.matters import generate_matter, question_set
from still.eval.questions import Question
from still.eval.tasks import Criterion

SUM = Question("1", "What is the fee due to Ashbourne Coal?", "$482,913", ("$100,222",), {"kind": "sum"})
PERSON = Question("2", "Who is the counsel of Ashbourne Coal?", "Ada Hartley", ("Clara Fairfield",), {"kind": "person"})
DATE = Question("3", "When is Ashbourne Coal free?", "12 March 1987", ("1 May 1950",), {"kind": "date"})
REFERENCE = Question("4", "What is the account number of Ashbourne Coal?", "123/456", (), {"kind": "reference"})
SEVERAL = Question("5", "Name the numbers for big-cat.", "1234567, 7654321", (), {}, ("1234567", "7654321"))
KEYED = Question("7", "What is the number for 77-abc?", "1234567", (), {"kind": "number"})
CHAIN = Question("6", "Which variables are 12345?", "ABCDE, FGHIJ", (), {"kind": "variable"}, ("ABCDE", "FGHIJ"))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (SUM, "$482,913"),
        (SUM, "  $482,913.\n"),
        (SUM, "**$482,913**"),
        (SUM, '"$482,913"'),
        (SUM, "The fee due to Ashbourne Coal is\n$482,913."),
        (SUM, "The fee is now $482,913, as 04-amendment-4.txt says (clause 4)."),
        (SUM, "Claims on it may not exceed $482,913."),
        (SUM, "It was reset to $482,913 and stays $482,913."),
        (PERSON, "Ada Hartley"),
        (PERSON, "The counsel of Ashbourne Coal is Ada Hartley."),
        (PERSON, "Ashbourne Coal is advised by Ada Hartley, its counsel. Ms Hartley acts for it."),
        (PERSON, "Counsel: Ada Hartley"),
        (PERSON, "It is the Counsel Ada Hartley"),
        (PERSON, "Ada Hartley's firm"),
        (DATE, "12  March\n1987"),
        (DATE, "Ashbourne Coal is free after 12 March 1987."),
        (REFERENCE, "It is account number 123/456."),
        (SEVERAL, "They are 7654321 and 1234567."),
        (KEYED, "The number for 77-abc is 1234567."),
        (CHAIN, "ABCDE, FGHIJ are assigned 12345."),
    ],
)
def test_one_right_value_passes(question, answer):
    verdict = exact_judge(answer, question)
    assert verdict.label == "pass", verdict
    assert (verdict.passed, verdict.stale, verdict.recall) == (True, False, 1.0)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (SUM, ""),
        (SUM, " \n"),
        (SUM, "I do not know."),
        # a part of a longer value
        (SUM, "$1,482,913"),
        (SUM, "$482,9135"),
        (SUM, "$482,913,000"),
        (SUM, "$482,913.50"),
        (SUM, "-$482,913"),
        (SUM, "US$482,913"),
        (SUM, "$482,913 million"),
        (SUM, "$482,913k"),
        (SUM, "482,913"),
        (DATE, "112 March 1987"),
        (DATE, "12 March 19871"),
        (DATE, "11-12 March 1987"),
        (REFERENCE, "0123/456"),
        (REFERENCE, "123/4567"),
        (REFERENCE, "123/456/7"),
        (REFERENCE, "9-123/456"),
        (REFERENCE, "123/456-A"),
        (REFERENCE, "1.123/456"),
        (PERSON, "Ada Hartleyson"),
        (PERSON, "Ada Hartley-Croft"),
        (PERSON, "Mary Ada Hartley"),
        (PERSON, "Ada Hartley Croft"),
        (PERSON, "Ada Hartley Ashbourne"),
        (PERSON, "ada hartley"),
        # several values
        (SUM, "$482,913, $482,914"),
        (SUM, "$482,913 or $500,000"),
        (SUM, "$482,913 and 500000"),
        (SUM, "$482,913 ٣٤٥"),
        (SUM, "1. $482,913\n2. $777,000\n3. $123,456"),
        (DATE, "12 March 1987 or 1988"),
        (DATE, "12/13 March 1987"),
        (DATE, "12 March 1987, April"),
        (REFERENCE, "123/456 999/111"),
        (PERSON, "Ada Hartley and John Smith"),
        (PERSON, "Ada Hartley or clara"),
        (PERSON, "Ada Hartley. Zed."),
        (PERSON, "Ada Hartley, Ada Ashbourne"),
        (SEVERAL, "1234567, 7654321, 9999999"),
        (SEVERAL, "1234567"),
        (CHAIN, "ABCDE, FGHIJ, KLMNO"),
        # taken back
        (SUM, "The fee is not $482,913."),
        (SUM, "It isn't $482,913."),
        (SUM, "$482,913 is wrong."),
        (SUM, "The fee is $482,913. No, it is not $482,913."),
        (SUM, "It was previously $482,913."),
        (SUM, "It is no longer $482,913"),
        (PERSON, "It is either Ada Hartley"),
        (SUM, "It is the old rent or $482,913"),
    ],
)
def test_anything_else_fails(question, answer):
    verdict = exact_judge(answer, question)
    assert verdict.label == "fail", verdict
    assert verdict.reason


def test_a_superseded_value_fails_and_is_counted_as_stale():
    for answer in ("$100,222", "It was $100,222 and is now $482,913.", "$482,913 ($100,222 before)"):
        verdict = exact_judge(answer, SUM)
        assert (verdict.label, verdict.stale) == ("fail", True), answer
    assert exact_judge("clara fairfield", PERSON).stale
    assert exact_judge("Ada Hartley after clara fairfield", PERSON).passed is False
    assert not exact_judge("$1,100,222", SUM).stale
    assert not exact_judge("$999,999", SUM).stale


def test_a_superseded_value_inside_the_right_one_is_not_stale():
    question = Question("1", "Who?", "Ada Hartley Croft", ("Ada Hartley",), {"kind": "person"})
    assert exact_judge("Ada Hartley Croft", question).label == "pass"


def test_no_answer_is_unscored_and_never_a_fail():
    verdict = exact_judge(None, SUM)
    assert (verdict.label, verdict.passed) == ("unscored", None)


def test_recall_counts_whole_values_whatever_the_label():
    assert exact_judge("1234567, 9999999", SEVERAL).recall == 0.5
    assert exact_judge("$482,913 or $1", SUM).recall == 1.0
    assert exact_judge("$1,482,913", SUM).recall == 0.0
    assert exact_judge("1.123/456", REFERENCE).recall == 0.0


def test_on_matters_right_answers_pass_and_everything_else_in_them_fails():
    rng = random.Random("judge")
    for seed in range(4):
        questions = question_set(generate_matter(seed, "easy"))
        answers = [question.answer for question in questions.questions]
        for question in questions.questions:
            assert exact_judge(question.answer, question).passed
            assert exact_judge(f"The answer is {question.answer}.", question).passed
            other = rng.choice([value for value in answers if value != question.answer])
            assert exact_judge(other, question).passed is False
            assert exact_judge(questions.text, question).passed is False
            assert exact_judge("; ".join(answers), question).passed is False
            for old in question.wrong:
                assert exact_judge(f"{old} {question.answer}", question).stale
            same = [e.answer for e in questions.questions if e.tags["kind"] == question.tags["kind"] and e != question]
            for value in same[:3]:
                for text in (f"{question.answer} {value}", f"{value}, {question.answer}"):
                    assert exact_judge(text, question).passed is False, text


def criterion(**expect) -> Criterion:
    expect = {"value": "$482,913", "superseded": ["$100,222"], "kind": "sum", "question": "What is the fee?"} | expect
    return Criterion("C-001", "Fee", "PASS if ...", expect={"party": "Ashbourne Coal", **expect})


def test_a_memo_is_judged_by_the_lines_that_name_the_party():
    memo = "# Memo\n- Ashbourne Coal: $482,913\n- Hartley Bank: $777,000\nThe rest is quiet."
    assert exact_criterion(memo, criterion()).passed
    assert exact_criterion("- Hartley Bank: $482,913\n- Ashbourne Coal: none", criterion()).passed is False
    assert exact_criterion("- Ashbourne Coals: $482,913", criterion()).passed is False
    assert exact_criterion(memo + "\nAshbourne Coal owes $1.", criterion()).passed is False
    stale = exact_criterion(memo + " Ashbourne Coal once had $100,222.", criterion())
    assert (stale.label, stale.stale) == ("fail", True)


@pytest.mark.parametrize(
    "memo",
    [
        "P: $482,913. This figure is wrong; the fee is $1.",
        "P: $482,913.\nThat was incorrect.",
        "P: $482,913. Correction: it is nine hundred thousand.",
        "P: $482,913, no wait, nine hundred thousand",
        "P: EUR $482,913",
        "P: \u20ac $482,913",
        "P: $482,913\n- **P**: not found",
        "| P | $482,913 |\n| P | unknown |",
        "| P | $482,913 |\n| Hartley Bank | $777,000 |\n| **P** | nine hundred thousand |",
    ],
)
def test_a_value_that_is_taken_back_further_on_fails(memo):
    assert exact_criterion(memo.replace("P", "Ashbourne Coal"), criterion()).label == "fail"


@pytest.mark.parametrize(
    "memo",
    [
        "P: USD $482,913",
        "P: $482,913. It has not been paid. This memo is not final.",
        "P: $482,913\nHartley Bank: not found",
        "P: $482,913\nAmendments to P: none",
        "| P | $482,913 |\n| P | $482,913 |",
        "| P | $482,913 |\n\nOf people:\n\n| P | Ada Hartley |",
        "| P | fee | $482,913 |\n| P | counsel | Ada Hartley |",
    ],
)
def test_what_stands_around_a_value_and_does_not_touch_it_leaves_it(memo):
    assert exact_criterion(memo.replace("P:", "P :").replace("P ", "Ashbourne Coal "), criterion()).passed


def test_a_distractor_passes_only_when_the_value_is_not_given_and_something_is():
    absent = criterion(absent=True, value="$5,000", superseded=[])
    assert exact_criterion("Ashbourne Coal: $482,913", absent).passed
    assert exact_criterion("Stamps cost $5,000.", absent).passed is False
    assert exact_criterion("A sum of $15,000.", absent).passed
    assert exact_criterion(" \n", absent).passed is False
    assert exact_criterion(None, absent).label == "unscored"


def test_a_criterion_without_expectation_needs_a_judge_that_reads():
    with pytest.raises(ValueError, match="C-009"):
        exact_criterion("text", Criterion("C-009", "Tone", "PASS if the tone is right."))
