"""Rows behind slots: training sees the rollout's own log-probabilities, and gradients reach what they should."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from agent_cases import tiny_agent
from trainer_cases import assert_close, attentive, gradients, kept_bytes, log_of, rollout

from still import methods
from still.budgets import Split
from still.compactor import StillCompactor
from still.harness.backends.slots import exact_cache, fingerprint
from still.harness.trainers import prefix
from still.harness.trainers.attention import NAME, attending_rows, row_attention
from still.harness.trainers.config import TrainSettings
from still.harness.trainers.loop import RowTrainer
from still.harness.trainers.losses import Counted, row_scales
from still.harness.trainers.model import RowModel, Share
from still.harness.trainers.prefix import let_checkpoint_read, rebuild
from still.harness.trainers.steps import RowSource, own_batches, shares_of
from still.harness.trainers.weights import digest
from still.harness.windows import IGNORE, check_rows


def still(model, seed: int = 0, uneven: bool = False):
    """A fresh compactor, shaken so that it is no strided copy; `uneven`: its heads get unequal numbers of slots."""
    compactor = StillCompactor.for_model(model, ratio=4, chunk=512)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in compactor.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    weights = {layer: (1.0, 3.0 + layer) for layer in map(int, compactor.layers)}
    return methods.get("still", compactor=compactor.eval(), split=Split(weights) if uneven else None)


def sampled_of(row) -> torch.Tensor:
    return torch.tensor([x for x, label in zip(row.logprobs, row.labels, strict=True) if label != IGNORE])


def setting(root, backend="kv", method="still", kind="qwen3", documents=4, **settings):
    loaded, uneven = tiny_agent(kind), method == "still-uneven"
    made = None
    if uneven:
        attentive(loaded)
    if backend in ("kv", "hybrid"):
        made = still(loaded.model, uneven=uneven) if method.startswith("still") else methods.get(method)
    if backend in ("kv", "hybrid") and not settings:
        settings = {"ratio": 4.0}
    rows = rollout(root, loaded, documents=documents, backend=backend, method=made, **settings)
    return loaded, made, rows


full = pytest.mark.full
CASES = [
    ("memo", "", "qwen3", {"budget": "80t"}), ("kv", "still", "qwen3", {"ratio": 4.0}),
    pytest.param("kv", "still", "qwen3", {"budget": "60t", "mode": "recompact"}, marks=full),
    ("kv", "still-uneven", "qwen3", {"ratio": 4.0}),
    pytest.param("hybrid", "still", "qwen3", {"ratio": 4.0}, marks=full),
    pytest.param("hybrid", "still-uneven", "gemma3", {"ratio": 4.0}, marks=full),
    pytest.param("memo_kv", "", "qwen3", {"budget": "150t"}, marks=full),
    pytest.param("kv", "streaming_llm", "qwen3", {"budget": "60t"}, marks=full),
    pytest.param("kv", "still", "gemma3", {"ratio": 4.0}, marks=full),
    pytest.param("kv", "still", "qwen3_next", {"ratio": 4.0}, marks=full),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "method", "kind", "settings"), CASES)
def test_training_recomputes_the_rollouts_log_probabilities(tmp_path, backend, method, kind, settings):
    loaded, made, rows = setting(tmp_path, backend, method, kind, documents=6, **settings)
    assert len(rows) == 3
    module = RowModel(loaded.model, made)
    with torch.no_grad():
        worst = max(float((module.logprobs(row) - sampled_of(row)).abs().max()) for row in rows)
    assert worst < 1e-4, worst
    if rows[2].prefix_plan:  # and the prefix matters: behind less of it the numbers are others
        nothing = replace(rows[2], prefix_plan=rows[2].prefix_plan[:2], prefix_ids=rows[2].prefix_ids[
            : rows[2].prefix_plan[1]["end"]])  # fmt: skip
        with torch.no_grad():
            assert (module.logprobs(nothing) - sampled_of(rows[2])).abs().max() > 1e-3


def step(module, rows, advantages=None, together=True):
    """Gradients of one step over these rows."""
    module.zero_grad()
    module.train()
    scales = row_scales([Counted(row.trajectory_id, row.trained) for row in rows])
    shares = [Share(r, s, (advantages or {}).get(r.trajectory_id)) for r, s in zip(rows, scales, strict=True)]
    for batch in [shares] if together else [[share] for share in shares]:
        module(batch).loss.backward()
    return gradients(module)


@pytest.mark.parametrize(
    ("mode", "method"),
    [("rl", "still"), ("rl", "still-uneven"), pytest.param("joint", "still", marks=full),
     pytest.param("joint", "still-uneven", marks=full)],
)  # fmt: skip
def test_gradients_are_the_same_with_checkpointing_and_however_the_step_is_cut(tmp_path, mode, method):
    loaded, made, rows = setting(tmp_path, method=method)
    loaded.model.requires_grad_(True)
    plain = RowModel(loaded.model, made, compactor=mode)
    reference = step(plain, rows)
    assert any(name.startswith("compactor") for name in reference)
    assert any(name.startswith("policy") for name in reference)
    assert_close(reference, step(plain, rows, together=False), 2e-5)
    other = RowModel(copy.deepcopy(loaded.model), made, compactor=mode)
    other.checkpoint_activations()
    assert_close(reference, step(other, rows), 2e-5)
    assert other.policy.training  # otherwise nothing is checkpointed
    assert max(float((other.logprobs(row) - sampled_of(row)).detach().abs().max()) for row in rows) < 1e-4


def test_slots_that_rollouts_of_a_group_have_in_common_are_made_once(tmp_path, monkeypatch):
    loaded, made, rows = setting(tmp_path, documents=6)
    loaded.model.requires_grad_(True)
    module = RowModel(loaded.model, made, compactor="rl")
    twins = [*rows, *(replace(row, trajectory_id="its twin") for row in rows)]
    reference = step(module, twins, together=False)
    crossed, cross = [], prefix._cross
    monkeypatch.setattr(prefix, "_cross", lambda *args: crossed.append(args) or cross(*args))
    module.zero_grad()
    for rank in (0, 1):
        batches = own_batches(shares_of(twins, "token", 0, 1.0), rank, 2, 100_000, sharing=True)
        for batch in batches:
            module(batch).loss.backward()
        assert {share.row.trajectory_id for batch in batches for share in batch} == {row.trajectory_id for row in twins}
    assert_close(reference, gradients(module), 2e-5)
    # Each process makes what its rows stand behind: a prefix of one window, and one of two.
    assert [len(row.prefix_plan) for row in rows] == [0, 2, 3]
    assert len(crossed) == 3


def test_a_teacher_reads_once_what_one_window_goes_on_from_another(tmp_path):
    loaded, made, rows = setting(tmp_path, documents=6)
    module = RowModel(loaded.model, made, compactor="distill")
    behind = rows[1:]
    shorter = replace(rows[2], input_ids=[*rows[2].input_ids[:-3], 9], labels=[*rows[2].labels[:-3], 9])
    given, read = [*behind, shorter, replace(behind[0], trajectory_id="its twin")], []
    hook = loaded.model.get_input_embeddings().register_forward_hook(lambda _, ids, out: read.append(out.shape[1]))
    known: dict = {}
    taught = module._taught(given, known)
    hook.remove()
    base = rows[2].prefix_ids[: rows[2].prefix_plan[0]["end"]]
    exact = exact_cache(loaded.model, base)
    (begun,) = known.values()  # S and U, which slots stand behind, were read with it
    assert begun.logical_length == exact.logical_length == begun.slots
    for mine, theirs in zip(begun.layers, exact.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=1e-5)
    for row in behind:
        (again,) = rebuild(loaded.model, made, row.prefix_ids, row.prefix_plan, True, known).row_slots()
        assert again == row.prefix_plan[0]["end"] + sum(step["slots"] for step in row.prefix_plan[1:])
    assert [key[0] for key in known].count(tuple(base)) == 1
    assert sorted(read) == sorted(len(row.prefix_ids + row.input_ids) for row in (rows[2], shorter))
    for row, states in zip(given, taught, strict=True):
        text = row.prefix_ids + row.input_ids
        with torch.no_grad():
            alone = loaded.model.model(torch.tensor([text])).last_hidden_state[0]
        trained = [len(row.prefix_ids) + place - 1 for place, label in enumerate(row.labels) if label != IGNORE]
        assert torch.allclose(states, alone[trained], atol=1e-5)


@pytest.mark.parametrize("method", ["still", "still-uneven"])
@pytest.mark.parametrize("mode", ["distill", "rl", "joint"])
def test_with_a_frozen_base_the_compactor_alone_receives_gradient(tmp_path, mode, method):
    loaded, made, rows = setting(tmp_path, method=method)
    kind = {"loss": "policy"} if mode == "rl" else {}
    module = RowModel(loaded.model, made, compactor=mode, **kind)
    advantages = {rows[0].trajectory_id: 0.5} if mode == "rl" else None
    found = step(module, rows, advantages)
    assert found
    assert all(name.startswith(("compactor", "method")) for name in found)
    assert max(float(g.abs().max()) for g in found.values()) > 0
    assert all(p.grad is None for p in loaded.model.parameters())


def test_distillation_leaves_the_policys_gradient_as_it_was(tmp_path):
    loaded, made, rows = setting(tmp_path)
    loaded.model.requires_grad_(True)
    frozen = {k: g for k, g in step(RowModel(loaded.model, made), rows).items() if k.startswith("policy")}
    both = step(RowModel(loaded.model, made, compactor="distill"), rows)
    assert_close(frozen, {k: g for k, g in both.items() if k.startswith("policy")})
    assert max(float(g.abs().max()) for k, g in both.items() if k.startswith("compactor")) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["still", "still-uneven"])
def test_joint_training_adds_the_distillations_gradient_to_the_rows_own(tmp_path, method, checkpointing):
    loaded, made, rows = setting(tmp_path, method=method)
    loaded.model.requires_grad_(True)

    def found(mode):
        module = RowModel(loaded.model, made, compactor=mode)
        if checkpointing:
            module.checkpoint_activations()
        return step(module, rows)

    rl, distilled, joint = found("rl"), found("distill"), found("joint")
    reached = {name: own for name, own in distilled.items() if name.startswith("compactor")}
    assert min(float(max(own.abs().max() for own in part.values())) for part in (rl, reached)) > 0
    assert_close(joint, {name: own + reached.get(name, 0) for name, own in rl.items()})


def test_a_frozen_compactor_receives_nothing(tmp_path):
    loaded, made, rows = setting(tmp_path)
    loaded.model.requires_grad_(True)
    assert all(name.startswith("policy") for name in step(RowModel(loaded.model, made), rows))


def test_the_compactors_gradient_is_that_of_a_finite_difference(tmp_path):
    loaded, made, rows = setting(tmp_path)
    module = RowModel(loaded.model, made, compactor="rl")
    found = step(module, rows)
    name, parameter = next((n, p) for n, p in module.compactor.named_parameters() if "value" in n or p.ndim == 2)
    place = int(found[f"compactor.{name}"].abs().argmax())

    def loss(shift: float) -> float:
        with torch.no_grad():
            parameter.view(-1)[place] += shift
            scales = row_scales([Counted(row.trajectory_id, row.trained) for row in rows])
            value = module([Share(row, scale) for row, scale in zip(rows, scales, strict=True)])
            total = float(value.sums["nll"]) * scales[0]
            parameter.view(-1)[place] -= shift
        return total

    # raw keys and values are constants for the gradient and not for the difference: the last window's slots decide
    slope = (loss(5e-3) - loss(-5e-3)) / 1e-2
    exact = float(found[f"compactor.{name}"].view(-1)[place])
    assert slope == pytest.approx(exact, rel=0.2)


def test_what_cannot_be_trained_is_refused(tmp_path):
    loaded, made, rows = setting(tmp_path)
    with pytest.raises(ValueError, match="compactor='rl', but the method knorm has no compactor"):
        RowModel(loaded.model, methods.get("knorm"), compactor="rl")
    with pytest.raises(ValueError, match="slots of still, and none was given"):
        RowModel(loaded.model).logprobs(rows[1])
    with pytest.raises(ValueError, match="slots of still, and still-uneven was given"):
        RowModel(attentive(loaded), still(loaded.model, uneven=True)).logprobs(rows[1])
    with pytest.raises(ValueError, match="are divided unevenly: load the model with attn_implementation='still'"):
        RowModel(tiny_agent().model, still(loaded.model, uneven=True))
    check_rows(rows, compactor=fingerprint(made))
    other = fingerprint(still(loaded.model, seed=1))
    with pytest.raises(ValueError, match=f"behind slots of compactor {fingerprint(made)}, and {other} is the one"):
        check_rows(rows, compactor=other)
    with pytest.raises(ValueError, match="does not cover"):
        rebuild(loaded.model, made, rows[1].prefix_ids[:-1], rows[1].prefix_plan)
    with pytest.raises(ValueError, match="the first token of a row is trained"):
        RowModel(loaded.model).logprobs(replace(rows[0], labels=list(rows[0].input_ids)))
    with pytest.raises(ValueError, match="sliding_attention layers keep a state"):
        let_checkpoint_read(tiny_agent("gemma3").model)
    loaded, made, rows = setting(tmp_path / "sliding", kind="gemma3", ratio=4.0)
    module = RowModel(loaded.model, made)
    module.checkpoint_activations()  # text rows of such a model train with it
    with pytest.raises(ValueError, match="sliding_attention layers keep a state"):
        module([Share(rows[1], 1.0)])


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("gemma3", marks=full), pytest.param("qwen3_next", marks=full)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_without_a_mask_gives_the_same_gradients(tmp_path, kind, checkpointing):
    if checkpointing and kind != "qwen3":
        pytest.skip("layers with a state of their own are not replayed")
    loaded, method, rows = setting(tmp_path, kind=kind)
    module = RowModel(loaded.model.requires_grad_(True), method, compactor="joint")
    if checkpointing:
        module.checkpoint_activations()
    shares = [Share(row, 1.0 / row.trained) for row in rows]
    module.train()
    module(shares).loss.backward()
    stock = gradients(module)
    module.zero_grad()
    with attending_rows(loaded.model):
        assert loaded.model.config._attn_implementation == NAME
        module(shares).loss.backward()
    assert loaded.model.config._attn_implementation == "sdpa"
    assert any(row.prefix_plan for row in rows)
    assert_close(gradients(module), stock)


@pytest.mark.parametrize(("queries", "before"), [(1, 9), (7, 3), (7, 7), (7, 8), (7, 0)])
def test_row_attention_is_the_end_of_a_causal_square(queries, before):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=draw)
        for heads, length in ((4, queries), (2, before + queries), (2, before + queries))
    )
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)
    out, _ = row_attention(module, query, key, value, None)
    mask = torch.ones(queries, before + queries, dtype=torch.bool).tril(before)
    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    wanted = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value.repeat_interleave(2, 1)
    assert_close({"out": out.transpose(1, 2)}, {"out": wanted})


def test_a_row_behind_slots_keeps_no_more_for_a_further_token(tmp_path):
    loaded, method, rows = setting(tmp_path)
    row = next(row for row in rows if row.prefix_plan)
    module = RowModel(loaded.model.requires_grad_(True), method, compactor="frozen").train()
    sizes = []
    for times in (1, 2, 3):
        longer = replace(row, input_ids=row.input_ids * times, labels=row.labels * times,
                         token_kind=row.token_kind * times, logprobs=row.logprobs * times)  # fmt: skip
        sizes.append(kept_bytes(module, longer))
    assert sizes[2] - sizes[1] < 1.02 * (sizes[1] - sizes[0])


def test_a_compactor_learns_at_a_rate_of_its_own(tmp_path):
    loaded, method, rows = setting(tmp_path)
    module = RowModel(loaded.model.requires_grad_(True), method, compactor="joint")
    start = copy.deepcopy(module.state_dict())

    def trainer(folder, steps, **settings):
        module.load_state_dict(start)
        settings = TrainSettings(lr=1e-3, micro_tokens=4000, save_every=1, compactor_mode="joint", **settings)
        return RowTrainer(module, settings, tmp_path / folder, RowSource(rows, 1, settings, 0), steps)

    def farthest(part):
        """That a weight has gone; Adam's first step is the rate, but for gradients near nothing."""
        own = ((name, p.detach()) for name, p in module.named_parameters() if name.startswith(part))
        return max(float((p - start[name]).abs().max()) for name, p in own)

    trainer("first", 1, compactor_lr=6e-3).fit()
    assert 0.9e-3 < farthest("policy.") < 1.1e-3
    assert 5.4e-3 < farthest("compactor.") < 6.6e-3
    trainer("same", 1).fit()
    assert 0.9e-3 < farthest("compactor.") < 1.1e-3
    falling = {"compactor_lr": 6e-3, "schedule": "linear"}
    trainer("whole", 3, **falling).fit()
    whole = digest(module)
    assert [line["compactor_learning_rate"] for line in log_of(tmp_path / "whole")] == pytest.approx([6e-3, 4e-3, 2e-3])
    cut = trainer("cut", 3, **falling)
    cut.source.step = interrupted_at(2, cut.source.step)
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    trainer("cut", 3, **falling).fit()
    assert digest(module) == whole


def interrupted_at(number, step):
    """Steps of a source, up to an interrupt."""

    def up_to(asked):
        if asked == number:
            raise KeyboardInterrupt
        return step(asked)

    return up_to


@pytest.mark.parametrize("alone", [{"compactor_mode": "frozen"}, {"compactor_mode": "rl", "train_policy": "frozen"}])
def test_a_rate_of_its_own_needs_two_that_train(alone):
    with pytest.raises(ValueError, match=r"compactor_lr is 0\.001, but .* leave compactor_lr out"):
        TrainSettings(compactor_lr=1e-3, **alone)
    with pytest.raises(ValueError, match="compactor_lr is 0; it must be above 0"):
        TrainSettings(compactor_lr=0, compactor_mode="joint")
