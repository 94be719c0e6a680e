"""KV backends on tiny random models: an identity compactor changes nothing, budgets hold, artifacts come back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from agent_cases import Reader, SteeredPolicy, SteeredSession, episode, make_task, of, texts, tiny_agent

from still import Split, attention, methods
from still.cache import StillCache
from still.compactor import StillCompactor
from still.harness import backends
from still.harness.agent import drive
from still.harness.run_config import RunConfig
from still.harness.runs import read_run


class Talkative(Reader):
    """Lets the model write a part of every memo and draft, and think aloud before it reads."""

    def __init__(self):
        super().__init__(memo=lambda names: f"{len(names)} read: ~~~~~~~~~~~~")

    def __call__(self, seen, limit):
        message = super().__call__(seen, limit)
        if not message.calls or message.calls[0].name == "write":
            return message
        return type(message)("assistant", "now ~~~~", message.calls)


@pytest.fixture
def watched(monkeypatch):
    """The logits of every sampled token, in order."""
    seen = []
    choose = SteeredSession.choose

    def watch(self, turn, logits):
        seen.append(logits)
        choose(self, turn, logits)

    monkeypatch.setattr(SteeredSession, "choose", watch)
    return seen


def run_steered(root, boundaries: int, kind: str = "qwen3", method=None, attention: str = "sdpa", **settings):
    """Play documents that make so many boundaries; the episode and its events."""
    loaded = tiny_agent(kind, attention=attention)
    task = make_task(root, texts(2 * boundaries + 2, 80))
    policy = SteeredPolicy(loaded.tokenizer, Talkative, 12_000, loaded)
    method = method(loaded.model) if callable(method) else method
    run = episode(root, task, None, policy=policy, method=method, window=12_000, reserve=400, **settings)
    end = drive(run)
    assert end["status"] == "done"
    events = read_run(run.folder.root)
    assert len(of(events, "compact")) == boundaries
    return run, events


def stream_of(events):
    """Ids of the whole episode, the places at which tokens were sampled, and the columns that each boundary keeps."""
    ids, places, kept, last = list(events[0]["base_ids"]), [], [], None
    for event in events:
        if event["event"] == "turn":
            ids += event["append_ids"]
            places += range(len(ids) - 1, len(ids) - 1 + len(event["output_ids"]))
            last = (len(ids), len(ids) + len(event["output_ids"]))
            ids += event["output_ids"]
        if event["event"] == "compact":
            ids += event["pending_ids"]
            kept.append((len(ids), *last))
    return ids, places, kept


def assert_same_logits(watched, logits, places):
    assert len(watched) == len(places)
    difference = (torch.stack(watched) - logits[0, places]).abs().max()
    assert difference < 2e-4 * logits.abs().max(), difference


@pytest.mark.parametrize("boundaries", [1, 3])
@pytest.mark.parametrize(("backend", "mode"), [("kv", "append"), ("kv", "recompact"), ("hybrid", "append")])
@pytest.mark.parametrize("kind", [
    "qwen3", *(pytest.param(k, marks=pytest.mark.full) for k in ("llama3", "yarn", "gemma3", "qwen3_next")),
])  # fmt: skip
def test_an_identity_compactor_gives_the_uncompacted_logits(tmp_path, watched, kind, backend, mode, boundaries):
    run, events = run_steered(tmp_path, boundaries, kind, backend=backend, mode=mode, method=methods.get("full"))
    ids, places, _ = stream_of(events)
    with torch.no_grad():
        logits = run.policy.model(torch.tensor([ids]), use_cache=False).logits.float()
    assert_same_logits(watched, logits, places)


def uneven(model):
    """STILL whose first head gets three times the slots of the others."""
    compactor = StillCompactor.for_model(model, bank=8, chunk=256)
    weights = {int(name): (3.0, *(1.0 for _ in range(compactor.kv_heads - 1))) for name in compactor.layers}
    return methods.get("still", compactor=compactor, split=Split(weights))


def test_unequal_slots_cross_boundaries_within_their_bytes(tmp_path, watched):
    """With a slot for every token nothing changes; with fewer the budget in bytes holds, and heads differ."""
    attention.register()
    run, events = run_steered(tmp_path / "all", 2, backend="kv", ratio=1, method=uneven, attention="still")
    ids, places, _ = stream_of(events)
    with torch.no_grad():
        logits = run.policy.model(torch.tensor([ids]), use_cache=False).logits.float()
    assert_same_logits(watched, logits, places)
    run, events = run_steered(tmp_path / "few", 3, backend="kv", budget="60t", method=uneven, attention="still")
    for event in of(events, "compact"):
        assert 0 < event["artifact"]["nbytes"] <= 60 * run.policy.bytes_per_token
    held = StillCache.load(run.folder.root / of(events, "compact")[-1]["artifact"]["path"], run.policy.model)
    first, *others = held.head_slots()[0]
    assert all(first > other for other in others)


def test_unequal_slots_are_refused_where_they_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="attn_implementation='still'"):
        run_steered(tmp_path, 1, backend="kv", budget="60t", method=uneven)
    attention.register()
    with pytest.raises(ValueError, match="mode='append'"):
        run_steered(tmp_path, 1, backend="kv", budget="60t", mode="recompact", method=uneven, attention="still")


@pytest.mark.parametrize("boundaries", [1, 3])
def test_memo_kv_is_the_uncompacted_run_with_all_but_the_memo_hidden(tmp_path, watched, boundaries):
    run, events = run_steered(tmp_path, boundaries, backend="memo_kv", budget="400t")
    ids, places, kept = stream_of(events)
    base = len(events[0]["base_ids"])
    visible = torch.ones(len(ids), len(ids)).tril().bool()
    for end, first, last in kept:
        visible[end:, base:first] = False
        visible[end:, last:end] = False
    mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(~visible, -torch.inf)
    with torch.no_grad():
        logits = run.policy.model(torch.tensor([ids]), attention_mask=mask, use_cache=False).logits.float()
        plain = run.policy.model(torch.tensor([ids]), use_cache=False).logits.float()
    assert_same_logits(watched, logits, places)
    assert (torch.stack(watched) - plain[0, places]).abs().max() > 0.01  # hiding does change something


@pytest.mark.parametrize(("backend", "mode", "method"), [
    ("kv", "append", "knorm"), ("kv", "recompact", "knorm"), ("kv", "append", "snapkv"), ("kv", "append", "h2o"),
    ("kv", "append", "expected_attention"), ("memo_kv", "append", "still"), ("hybrid", "append", "knorm"),
])  # fmt: skip
def test_one_budget_in_bytes_holds_at_every_boundary(tmp_path, backend, mode, method):
    run, events = run_steered(tmp_path, 3, backend=backend, mode=mode, budget="120t",
                              method=methods.get(method) if method != "still" else None)  # fmt: skip
    each = run.policy.bytes_per_token
    held = [event["after"]["compacted"] for event in of(events, "compact")]
    assert [event["after"]["compacted_bytes"] for event in of(events, "compact")] == [n * each for n in held]
    assert max(held) <= 120
    if backend == "kv":
        assert held == ([40, 80, 120] if mode == "append" else [120] * 3)
        for event in of(events, "compact"):
            cache = StillCache.load(run.folder.root / event["artifact"]["path"], run.policy.model, verify=True)
            assert cache.slots == event["before"]["base"] + event["after"]["compacted"] == cache.physical_length
    assert all(event["seconds"] > 0 and event["prefill_tokens"] > 0 for event in of(events, "compact"))


def test_still_appends_at_a_ratio(tmp_path):
    def still(model):
        compactor = StillCompactor.for_model(model, ratio=8, chunk=256).eval().requires_grad_(False)
        return methods.get("still", compactor=compactor)

    _, events = run_steered(tmp_path, 3, backend="kv", method=still, ratio=8.0)
    held = 0
    for event in of(events, "compact"):
        tokens = event["artifact"]["details"]["window_tokens"]
        assert tokens == event["before"]["raw"] + (event["before"]["compacted"] - held)
        held += tokens // 8
        assert event["after"]["compacted"] == held
    assert held > 100


def test_a_budget_that_is_used_up_is_compacted_again_and_flagged(tmp_path):
    run, _ = run_steered(tmp_path / "a", 3, backend="kv", method=methods.get("knorm"), budget="120t")
    backend = run.backend
    backend.share = lambda window, held, boundary: 0 if boundary.window == 2 else 60
    again = episode(tmp_path / "b", make_task(tmp_path / "b", texts(8, 80)), None, method=methods.get("knorm"),
                    policy=run.policy, window=12_000, backend="kv", budget="120t")  # fmt: skip
    again.backend = backend
    drive(again)
    events = of(read_run(again.folder.root), "compact")
    assert [event["degraded"] for event in events] == ["", "", "budget used up"]
    assert [event["after"]["compacted"] for event in events] == [60, 120, 120]


def test_a_damaged_artifact_is_refused(tmp_path):
    run, events = run_steered(tmp_path, 1, backend="kv", method=methods.get("knorm"), budget="120t")
    log = run.folder.events
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-3]))
    path = run.folder.root / of(events, "compact")[0]["artifact"]["path"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    task = make_task(tmp_path, texts(4, 80))
    again = episode(tmp_path, task, None, policy=run.policy, method=methods.get("knorm"), window=12_000, backend="kv",
                    budget="120t")  # fmt: skip
    with pytest.raises(ValueError, match="missing or damaged"):
        drive(again)


@pytest.mark.parametrize(("settings", "method", "complaint"), [
    ({"backend": "kv", "method": "int8"}, None, "whole contexts"),
    ({"backend": "kv", "method": "cartridge"}, None, "whole contexts"),
    ({"backend": "kv", "method": "snapkv", "mode": "recompact"}, None, "mode='append'"),
    ({"backend": "kv", "method": "attention_matching"}, None, "attn_implementation='still'"),
    ({"backend": "kv", "method": "nonsense"}, None, "no method 'nonsense'"),
    ({"backend": "kv", "method": "knorm", "budget": "10"}, None, "less than the"),
])  # fmt: skip
def test_what_cannot_work_is_refused_at_construction(settings, method, complaint):
    loaded = tiny_agent()
    policy = SteeredPolicy(loaded.tokenizer, Talkative, 1000, loaded)
    with pytest.raises(ValueError, match=complaint):
        backends.make(RunConfig(**settings), policy, method)


@pytest.mark.parametrize("backend", backends.NEEDS_SLOTS)
def test_a_policy_without_a_cache_serves_text_backends_alone(backend):
    closed = SimpleNamespace(name="closed", capabilities=frozenset(), window=1000, bytes_per_token=None)
    with pytest.raises(ValueError, match="take a local model"):
        backends.make(RunConfig(backend=backend, budget="10t"), closed)
    with pytest.raises(ValueError, match="bytes a token are not known"):
        backends.make(RunConfig(backend="memo", budget="64KiB"), closed)
    assert backends.make(RunConfig(backend="memo", budget="64t"), closed).memo_tokens == 64
