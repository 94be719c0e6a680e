"""Episodes that are decoded in one batch are those of episodes played alone."""

from __future__ import annotations

import pytest
import torch
from agent_cases import Reader, SteeredPolicy, episode, make_task, of, texts, tiny_agent
from transformers.cache_utils import DynamicLayer

from still import methods
from still.harness.agent import drive, drive_many
from still.harness.play import sampler
from still.harness.policies import batch
from still.harness.runs import read_run

SETTINGS = {
    "full": {}, "memo": {"budget": "100t"}, "kv": {"budget": "90t"}, "memo_kv": {"budget": "200t"},
    "hybrid": {"budget": "200t"},
}  # fmt: skip


class Writer(Reader):
    """Lets the model write memos and drafts of lengths that differ from episode to episode."""

    def __init__(self, size: int):
        super().__init__(memo=lambda names: f"{len(names)} read: " + "~" * size)
        self.size = size

    def __call__(self, seen, limit):
        message = super().__call__(seen, limit)
        return message if message.content != "Done." else type(message)("assistant", "Done: " + "~" * 3 * self.size)


def four(root, backend: str, loaded):
    """Four episodes whose documents differ in number and length.

    The method chooses by position: one that chooses by scores breaks ties between equal tokens by rounding.
    """
    made = []
    for number in range(4):
        task = make_task(root / str(number), texts(3 + number, 40 + 30 * number))
        policy = SteeredPolicy(loaded.tokenizer, lambda n=number: Writer(5 + 7 * n), 6000, loaded)
        made.append(episode(root / str(number), task, None, policy=policy, backend=backend, window=6000,
                            method=methods.get("streaming_llm"), **SETTINGS[backend]))  # fmt: skip
    for each in made[1:]:
        each.session.policy = made[0].session.policy
    return made


@pytest.mark.parametrize("backend", SETTINGS)
def test_together_as_alone(tmp_path, monkeypatch, backend):
    loaded, widths = tiny_agent(), []
    alone = [drive(each) and read_run(each.folder.root) for each in four(tmp_path / "alone", backend, loaded)]
    decode = batch._decode
    monkeypatch.setattr(batch, "_decode", lambda rows: widths.append(len(rows)) or decode(rows))
    episodes = four(tmp_path / "together", backend, loaded)
    ends = dict(drive_many(episodes, 3, sampler(episodes[0].policy, 3)))
    assert [end["status"] for end in ends.values()] == ["done"] * 4
    assert {2, 3} <= set(widths)
    close = 0
    for each, other in zip(episodes, alone, strict=True):
        mine = read_run(each.folder.root)
        for turn, theirs in zip(of(mine, "turn"), of(other, "turn"), strict=True):
            if turn["output_ids"] != theirs["output_ids"]:
                close += 1
                assert min(turn["margin"], theirs["margin"]) < 1e-3
                break
            assert turn["append_ids"] == theirs["append_ids"]
            if turn["margin"] is not None:
                assert turn["margin"] == pytest.approx(theirs["margin"], abs=1e-3)
    assert close == 0


def test_caches_after_a_batch_are_those_of_sampling_alone(tmp_path):
    loaded = tiny_agent()
    alone = four(tmp_path / "alone", "full", loaded)
    shared = four(tmp_path / "shared", "full", loaded)
    for each in (*alone, *shared):
        next(each.play())
    requests = [(each.session, each.limit(0, False)) for each in shared]
    batch.sample_together(requests)
    for each, (session, limit) in zip(alone, requests, strict=True):
        each.session.sample(limit)
        mine, theirs = each.session._cache, session._cache
        assert mine.logical_length == theirs.logical_length
        for one, other in zip(mine.layers, theirs.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)


def test_what_cannot_share_is_sampled_alone(tmp_path):
    sliding = four(tmp_path, "full", tiny_agent("gemma3"))
    assert not any(batch.can_share(each.session) for each in sliding)
    ends = dict(drive_many(sliding, 4, sampler(sliding[0].policy, 4)))
    assert [end["status"] for end in ends.values()] == ["done"] * 4


def test_a_layer_with_room_holds_what_one_that_copies_holds(monkeypatch):
    monkeypatch.setattr(batch, "ROOM", 3)
    roomy, plain = batch.RoomyLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    for step, columns in enumerate((5, 1, 1, 1, 1, 2, 1, 9, 1)):
        new = torch.randn(2, 4 if step < 5 else 2, 2, columns, 8, generator=generator)
        for ours, theirs in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        if step == 4:
            for layer in (roomy, plain):
                layer.batch_select_indices(torch.tensor([3, 1]))
    assert roomy.get_seq_length() == plain.get_seq_length() == 22
