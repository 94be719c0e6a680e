from __future__ import annotations

import re

import pytest

from still.eval.judge import exact_judge
from still.eval.questions import QuestionSet
from still.eval.ruler import NOISE, TASKS, generate, recall


def words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [300, 1000, 4096])
def test_context_fills_the_length_and_never_passes_it(task, tokens):
    sample = generate(task, tokens, 1, words)
    assert words(sample.text) == sample.source["counted_tokens"]
    assert tokens - 45 <= words(sample.text) <= tokens


def test_length_goes_by_the_counter_that_is_handed_in():
    by_characters = generate("niah_single_2", 3000, 1, len)
    assert 2800 < len(by_characters.text) <= 3000


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_made_again_equal_and_differ_by_seed(task):
    sample = generate(task, 600, 3, words)
    assert sample == generate(task, 600, 3, words)
    assert sample.questions[0].answers != generate(task, 600, 4, words).questions[0].answers
    assert QuestionSet.from_json(sample.to_json()) == sample


@pytest.mark.parametrize("task", TASKS)
def test_a_longer_context_asks_the_same(task):
    short, long = generate(task, 500, 5, words), generate(task, 2000, 5, words)
    assert (short.questions[0].text, short.questions[0].answers) == (long.questions[0].text, long.questions[0].answers)


@pytest.mark.parametrize("task", TASKS)
def test_every_asked_value_stands_in_the_context_once_under_its_key(task):
    sample = generate(task, 2000, 2, words)
    (question,) = sample.questions
    spec = TASKS[task]
    assert len(question.answers) == (spec.hops + 1 if spec.hops else spec.values * spec.queries)
    assert len(set(question.answers)) == len(question.answers)
    for value in question.answers:
        if spec.hops:
            assert f"VAR {value} = " in sample.text
            continue
        key = re.search(rf"for (\S+) is: {re.escape(value)}\.", sample.text).group(1)
        assert key in question.text
        assert sample.text.count(value) == 1


@pytest.mark.parametrize("task", TASKS)
def test_depth_tags_are_where_the_needles_are(task):
    sample = generate(task, 2000, 7, words)
    (question,) = sample.questions
    assert question.tags["depth"] == min(question.tags["depths"])
    for value, depth in zip(question.answers, question.tags["depths"], strict=True):
        place = round(depth * len(sample.text))
        needle = sample.text[max(0, place - 1) : place + 160]
        assert value in needle


def test_depths_are_spread_over_the_context():
    depths = [generate("niah_single_1", 800, seed, words).questions[0].tags["depth"] for seed in range(60)]
    assert min(depths) < 0.1
    assert max(depths) > 0.9
    assert 0.4 < sum(depths) / len(depths) < 0.6


def test_keys_of_a_multikey_haystack_are_all_different_however_long():
    text = generate("niah_multikey_2", 60000, 0, words).text
    keys = re.findall(r"numbers for (\S+) is: (\d{7})\.", text)
    assert len(keys) > 3000
    assert len({key for key, _ in keys}) == len(keys)
    assert len({value for _, value in keys}) == len(keys)


def test_haystacks_are_what_they_are_called():
    noise = generate("niah_single_1", 500, 0, words)
    assert noise.documents[0].text.count(NOISE[0]) > 5
    essay = generate("niah_single_2", 500, 0, words)
    assert NOISE[0] not in essay.text
    assert "generated" in essay.source["haystack"]
    rest = essay.documents[0].text.replace(essay.questions[0].answer, "")
    assert not re.search(r"\d", rest)
    assert len(re.findall("One of the special magic numbers", generate("niah_multikey_1", 900, 0, words).text)) == 4


def test_a_variable_is_assigned_before_it_is_copied():
    for seed in range(20):
        sample = generate("vt", 300, seed, words)
        places = [sample.text.index(f"VAR {name} = ") for name in sample.questions[0].answers]
        assert places == sorted(places)
        first, *rest = sample.questions[0].answers
        for before, name in zip([first, *rest], rest, strict=False):
            assert f"VAR {name} = VAR {before}." in sample.text


@pytest.mark.parametrize("task", TASKS)
def test_scores_of_right_partial_and_wrong_answers(task):
    question = generate(task, 500, 9, words).questions[0]
    other = generate(task, 500, 10, words).questions[0]
    assert recall(question.answer, question) == 1
    assert exact_judge(question.answer, question).passed
    assert recall(other.answer, question) == 0
    assert exact_judge(other.answer, question).passed is False
    both = exact_judge(f"{question.answer}, {other.answer}", question)
    assert (both.passed, both.recall) == (False, 1.0)
    if len(question.answers) > 1:
        part = ", ".join(question.answers[:-1])
        assert recall(part, question) == pytest.approx(1 - 1 / len(question.answers))
        assert exact_judge(part, question).passed is False


def test_a_context_copied_as_the_answer_fails():
    sample = generate("niah_multikey_2", 500, 0, words)
    assert recall(sample.text, sample.questions[0]) == 1
    assert exact_judge(sample.text, sample.questions[0]).passed is False


def test_bad_input_is_named():
    with pytest.raises(KeyError, match="niah_triple"):
        generate("niah_triple", 100, 0, words)
    with pytest.raises(ValueError, match="more than the 5"):
        generate("niah_single_1", 5, 0, words)
    with pytest.raises(ValueError, match="count_tokens"):
        generate("niah_single_1", 50, 0, lambda text: 1)
