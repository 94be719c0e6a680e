"""Episodes that are decoded in one batch are those of episodes played alone."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch
from agent_cases import Reader, SteeredPolicy, episode, make_task, of, texts, tiny_agent
from trainer_cases import attentive

from still import methods
from still.budgets import Split
from still.compactor import StillCompactor
from still.harness.agent import drive, drive_many
from still.harness.policies import batch, drafts
from still.harness.policies.local import LocalPolicy
from still.harness.runs import read_run
from still.harness.sampling import InParallel, Request, sampler
from still.harness.types import Limit, Message

SETTINGS = {
    "full": {}, "memo": {"budget": "100t"}, "kv": {"budget": "90t"}, "memo_kv": {"budget": "200t"},
    "hybrid": {"budget": "200t"}, "kv uneven": {"budget": "90t"}, "kv biased": {"budget": "90t"},
    "kv uneven, biased": {"budget": "90t"},
}  # fmt: skip


class Writer(Reader):
    """Lets the model write memos and drafts of lengths that differ from episode to episode."""

    def __init__(self, size: int):
        super().__init__(memo=lambda names: f"{len(names)} read: " + "~" * size)
        self.size = size

    def __call__(self, seen, limit):
        message = super().__call__(seen, limit)
        return message if message.content != "Done." else type(message)("assistant", "Done: " + "~" * 3 * self.size)


class Watched(batch.Batch):
    """Notes whose turns are open at each step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def _step(self):
        self.steps.append([row.request for row in self._open])
        return super()._step()


def all_of(asked, count: int) -> list:
    """As many answers."""
    found = []
    while len(found) < count:
        found += asked.answered()
    return found


def by_position(case: str, model):
    """A method that chooses by position: one that chooses by scores breaks ties between equal tokens by rounding."""
    kinds = set(case.replace(",", "").split()[1:])
    if not kinds:
        return methods.get("streaming_llm")
    torch.manual_seed(0)
    compactor = StillCompactor.for_model(model, bank=8, chunk=256, beta="biased" in kinds)
    for layer in compactor.layers.values():
        if layer.beta_head is not None:
            torch.nn.init.normal_(layer.beta_head.weight)
    heads = compactor.kv_heads
    weights = {int(name): tuple(1.0 + (int(name) + head) % 3 for head in range(heads)) for name in compactor.layers}
    return methods.get("still", compactor=compactor, split=Split(weights) if "uneven" in kinds else None)


def four(root, case: str, loaded):
    """Four episodes whose documents differ in number and length."""
    backend, made = case.split()[0], []
    for number in range(4):
        task = make_task(root / str(number), texts(3 + number, 40 + 30 * number))
        policy = SteeredPolicy(loaded.tokenizer, lambda n=number: Writer(5 + 7 * n), 6000, loaded)
        made.append(episode(root / str(number), task, None, policy=policy, backend=backend, window=6000,
                            method=by_position(case, loaded.model), **SETTINGS[case]))  # fmt: skip
    for each in made[1:]:
        each.session.policy = made[0].session.policy
    return made


@pytest.mark.parametrize("case", SETTINGS)
def test_together_as_alone(tmp_path, monkeypatch, case):
    loaded = tiny_agent()
    if " " in case:
        attentive(loaded)
    before = loaded.model.config._attn_implementation
    alone = [drive(each) and read_run(each.folder.root) for each in four(tmp_path / "alone", case, loaded)]
    monkeypatch.setattr(batch, "ROOM", 10)
    episodes = four(tmp_path / "together", case, loaded)
    shared = Watched()
    ends = dict(drive_many(episodes, 3, shared))
    assert [end["status"] for end in ends.values()] == ["done"] * 4
    assert {2, 3} <= {len(rows) for rows in shared.steps}
    assert any(set(rows) & set(later) and set(later) - set(rows) for rows, later in pairwise(shared.steps))  # it joins
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
    assert loaded.model.config._attn_implementation == before


def test_caches_after_a_batch_are_those_of_sampling_alone(tmp_path):
    loaded = tiny_agent()
    alone = four(tmp_path / "alone", "full", loaded)
    shared = four(tmp_path / "shared", "full", loaded)
    for each in (*alone, *shared):
        next(each.play())
    requests = [(each.session, each.limit(0, False)) for each in shared]
    together = batch.Batch()
    for request in requests:
        together.ask(Request(*request))
    assert sorted(id(answer[0].session) for answer in all_of(together, 4)) == sorted(id(each[0]) for each in requests)
    for each, (session, limit) in zip(alone, requests, strict=True):
        each.session.sample(limit)
        mine, theirs = each.session._cache, session._cache
        assert mine.logical_length == theirs.logical_length
        for one, other in zip(mine.layers, theirs.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_drafts_save_forwards_and_change_no_token(attention, temperature):
    loaded = tiny_agent()
    loaded.model.set_attn_implementation(attention)
    policy = LocalPolicy(loaded, 4000)

    def asked() -> list[Request]:
        requests = []
        for number in range(3):
            session = policy.session([])
            session.start([Message("system", "Copy."), Message("user", "la " * (20 + number))])
            requests.append(Request(session, Limit(80 - 20 * number, temperature, seed=number)))
        return requests

    alone = [each.session.sample(each.limit) for each in asked()]
    forwards = []
    for _ in range(2):  # the second time all of it was written before
        together, requests = Watched(), asked()
        for request in requests:
            together.ask(request)
        found = dict(all_of(together, 3))
        assert [found[request].output_ids for request in requests] == [each.output_ids for each in alone]
        for request, one in zip(requests, alone, strict=True):
            assert found[request].logprobs == pytest.approx(one.logprobs, abs=1e-4)
        forwards.append(len(together.steps))
    assert forwards[0] < 0.8 * (max(len(each.output_ids) for each in alone) - 1)
    assert forwards[1] < 0.75 * forwards[0]
    assert loaded.model.config._attn_implementation == attention


def draft_behind(read: list[int], most: int, written: drafts.Written | None = None) -> list[int]:
    return drafts.Drafts(read, written or drafts.Written()).draft(most)


def test_a_draft_is_what_followed_the_same_tokens_the_last_time():
    assert draft_behind([1, 2, 3, 9, 1, 2, 3], 4) == [9, 1, 2, 3]
    assert draft_behind([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert draft_behind([5, 1, 7, 8, 6, 1], 3) == [7, 8, 6]  # never behind 6 before
    assert draft_behind([2, 1, 7, 3, 1, 8, 2, 1], 1) == [7]  # longer likeness before a later one
    assert draft_behind([1, 7, 1, 8, 1], 1) == [8]
    assert draft_behind([1, 2, 3], 4) == []
    assert draft_behind([1, 2, 1], -1) == []
    assert draft_behind([], 4) == []


def test_what_any_episode_wrote_is_looked_for_before_what_this_one_read():
    written = drafts.Written()
    other = drafts.Drafts([4, 1], written)
    for token in (2, 6, 7, 1):
        other.add(token)
    assert draft_behind([1, 2, 9, 5, 1, 2], 3, written) == [6, 7, 1]  # as like: what was written
    assert draft_behind([3, 1, 2, 9, 3, 1, 2], 2, written) == [9, 3]  # what was read is more like
    assert draft_behind([8, 4, 1], 2, written) == [2, 6]  # its prompt's end counts
    assert draft_behind([8, 9, 4], 2, written) == []  # the prompt itself was not written
    other.add(2)
    assert other.draft(3) == [6, 7, 1]  # its own


def test_what_was_written_long_ago_is_forgotten(monkeypatch):
    monkeypatch.setattr(drafts, "KEPT", 4)
    written = drafts.Written()
    for number in range(7):
        written.put((number,), ([10 + number], 0))
    assert [written.get((number,)) is not None for number in (0, 3, 4, 6)] == [True] * 4
    for number in range(7, 9):
        written.put((number,), ([10 + number], 0))
    assert [written.get((number,)) is not None for number in range(9)] == [False] * 4 + [True] * 5
    assert written.get((4,)) == ([14], 0)


def test_what_cannot_share_is_sampled_alone(tmp_path):
    sliding = four(tmp_path, "full", tiny_agent("gemma3"))
    assert not any(batch.can_share(each.session) for each in sliding)
    ends = dict(drive_many(sliding, 4, sampler(sliding[0].policy, 4)))
    assert [end["status"] for end in ends.values()] == ["done"] * 4


def test_a_request_that_breaks_leaves_the_others(tmp_path, monkeypatch):
    episodes = four(tmp_path, "full", tiny_agent())
    broken = episodes[1]

    def begin(limit):
        raise RuntimeError("no prompt")

    monkeypatch.setattr(broken.session, "begin", begin)
    ends = dict(drive_many(episodes, 4, sampler(broken.policy, 4)))
    assert str(ends.pop(broken)) == "no prompt"
    assert [end["status"] for end in ends.values()] == ["done"] * 3


def test_an_error_while_decoding_ends_the_open_episodes_and_no_others(tmp_path, monkeypatch):
    episodes = four(tmp_path, "full", tiny_agent())
    forward, calls = batch.Batch._step, []

    def once(self):
        calls.append(len(self._open))
        if len(calls) == 3:
            raise MemoryError("no room")
        return forward(self)

    monkeypatch.setattr(batch.Batch, "_step", once)
    ends = dict(drive_many(episodes, 2, sampler(episodes[0].policy, 2)))
    assert [isinstance(end, MemoryError) for end in ends.values()] == [True, True, False, False]
    assert [end["status"] for end in list(ends.values())[2:]] == ["done"] * 2


def test_a_server_is_asked_again_as_soon_as_one_answer_is_there():
    released = threading.Event()

    class Slow:
        def sample(self, limit):
            assert limit == "quick" or released.wait(30)
            return limit

    requests = {name: Request(Slow(), name) for name in ("slow", "quick")}
    asked = InParallel(2)
    for request in requests.values():
        asked.ask(request)
    assert asked.answered() == [(requests["quick"], "quick")]
    asked.ask(requests["quick"])
    assert asked.answered() == [(requests["quick"], "quick")]
    released.set()
    assert asked.answered() == [(requests["slow"], "slow")]
