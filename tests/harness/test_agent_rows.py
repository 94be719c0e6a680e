"""Rows of the agent's curriculum have the shapes that a run has."""

from __future__ import annotations

from itertools import islice

import pytest
from transformers import AutoTokenizer

from still.harness.episodes import KINDS
from still.harness.pocket.agent_compactor import EpisodeSteps
from still.harness.pocket.agent_rows import AGENT_STAGES, AgentRows, agent_rows
from still.harness.trainers.config import TrainSettings
from still.models import find


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(find("pocket").path)


@pytest.mark.parametrize("number", [0, 1, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 3))])
def test_rows_of_a_stage(tokenizer, number):
    stage = AGENT_STAGES[number]
    rows = list(islice(agent_rows(stage, tokenizer, seed=0), 6))
    end, opening = tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    for row in rows:
        assert row.base < len(row.input_ids) <= stage.window
        assert len(row.input_ids) == len(row.trained) == len(row.kinds) == len(row.labels)
        assert any(row.trained)
        assert not any(row.trained[: row.base])
        starts = [n for n in range(1, len(row.trained)) if row.trained[n] and not row.trained[n - 1]]
        assert all(row.input_ids[n - 1] == opening for n in starts)
        assert row.input_ids[max(n for n, trained in enumerate(row.trained) if trained)] == end
        last = row.backend in ("full", "kv", "hybrid") or row.window == row.windows - 1
        assert (KINDS["final"] in row.kinds) == last
        assert (KINDS["memo"] in row.kinds) == (row.backend == "memo" and not last) or row.backend == "hybrid"
        assert len(row.cuts) == (row.windows - 1 if row.backend in ("kv", "hybrid") else 0)


def test_the_same_seed_gives_the_same_rows(tokenizer):
    first, again, other = (AgentRows(AGENT_STAGES[1], tokenizer, seed).episode() for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_placement_is_fitted_to_windows_and_to_what_follows_them(tokenizer):
    source = EpisodeSteps(tokenizer, TrainSettings(), seed=3)
    texts = list(source.texts(3))
    assert texts == list(source.texts(3))
    for text in texts:
        first, end = text.context
        assert 0 < first < end < min(text.asked)
        assert tokenizer.convert_tokens_to_ids("<|end|>") in {text.ids[place + 1] for place in text.asked}
