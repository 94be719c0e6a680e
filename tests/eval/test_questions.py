from __future__ import annotations

import pytest

from still.eval.matters import generate_matter, question_set
from still.eval.questions import Document, Question, QuestionSet


@pytest.fixture(scope="module")
def standard():
    return [(matter, question_set(matter)) for matter in (generate_matter(seed, "standard") for seed in range(3))]


def test_every_fact_is_a_question_answered_by_its_value(standard):
    for matter, questions in standard:
        assert [(each.id, each.text, each.answer) for each in questions.questions] == [
            (fact.id, fact.question, fact.value) for fact in matter.facts
        ]
        assert questions.text == matter.text


def test_depth_is_where_the_right_statement_starts(standard):
    for matter, questions in standard:
        for fact, question in zip(matter.facts, questions.questions, strict=True):
            place = round(question.tags["depth"] * len(questions.text))
            window = questions.text[max(0, place - 2) : place + len(fact.statement) + 2]
            assert fact.statement in window


def test_amended_facts_carry_the_superseded_value_as_wrong(standard):
    for matter, questions in standard:
        amended = [each for each in questions.questions if each.tags["amended"]]
        assert len(amended) == round(matter.difficulty.amended * matter.difficulty.facts)
        for question in amended:
            (old,) = question.wrong
            right = question.tags["depth"] * len(questions.text)
            assert old != question.answer
            assert questions.text.index(old) < right
        assert all(not each.wrong for each in questions.questions if not each.tags["amended"])


def test_tags_say_kind_attribute_and_template():
    questions = question_set(generate_matter(5, "easy", unseen_templates=True))
    assert {each.tags["kind"] for each in questions.questions} == {"sum", "date", "person", "reference"}
    assert all(each.tags["unseen_template"] for each in questions.questions)
    assert "unseen" in questions.id
    assert not any(each.tags["unseen_template"] for each in question_set(generate_matter(5, "easy")).questions)


def test_source_names_difficulty_and_its_digest():
    matter = generate_matter(2, "tiny", "train")
    source = question_set(matter).source
    assert source["digest"] == matter.difficulty.digest
    assert (source["seed"], source["split"], source["difficulty"]["facts"]) == (2, "train", 8)


def test_json_round_trip_on_disk(tmp_path):
    questions = question_set(generate_matter(1, "tiny"))
    questions.save(tmp_path / "deep" / "set.json")
    assert QuestionSet.load(tmp_path / "deep" / "set.json") == questions
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set.json"]


def test_several_answers_survive_the_round_trip():
    question = Question("Q", "Which?", "a, b", answers=("a", "b"))
    assert Question("Q", "Which?", "a").answers == ("a",)
    questions = QuestionSet("set", (Document("d", "text"),), (question,))
    assert QuestionSet.from_json(questions.to_json()) == questions


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Question("Q-7", "Which?", " "), "Q-7"),
        (lambda: Question("Q-7", "Which?", "a", ("a",)), "both right and wrong"),
        (lambda: QuestionSet("s", (), (Question("Q", "?", "a"), Question("Q", "?", "b"))), "'Q'"),
        (lambda: QuestionSet.from_json({"id": "s", "documents": []}), "questions"),
        (lambda: QuestionSet.from_json({"id": "s", "documents": [{"nom": 1}], "questions": []}), "nom"),
    ],
)
def test_bad_questions_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
