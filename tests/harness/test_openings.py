"""What rows begin with is computed once, and their log-probabilities and gradients are those of rows one by one."""

from __future__ import annotations

import pytest
import torch
from agent_cases import tiny_agent
from tiny_models import tiny_model
from trainer_cases import assert_close, gradients, plain_row, rollout

from still.harness.trainers import model
from still.harness.trainers.attention import NAME, Packed, attending_rows, can_pack, row_attention
from still.harness.trainers.model import RowModel, Share
from still.harness.trainers.openings import LEAST, shared
from still.harness.trainers.steps import own_batches, shares_of

OPENING = 90


def rows(size: int, opening: int = OPENING):
    """Four rows behind one opening, and one that begins otherwise."""
    draw = torch.Generator().manual_seed(5)

    def ids(n: int) -> list[int]:
        return torch.randint(7, size, (n,), generator=draw).tolist()

    begin = ids(opening)
    alike = [
        plain_row(begin + ids(n), range(first, opening + n), name, window)
        for name, window, n, first in (
            ("a", 0, 40, opening + 3), ("a", 1, 25, opening + 20), ("b", 0, 70, opening + 1), ("b", 1, 1, opening),
        )
    ]  # fmt: skip
    return [*alike, plain_row(ids(60), range(30, 50), "c")]


class Counting:
    """How many tokens a model's layers have gone through."""

    def __init__(self, model):
        self.tokens = 0
        self.hook = model.get_input_embeddings().register_forward_hook(self.count)

    def count(self, module, inputs, output):
        """Add a forward's."""
        self.tokens += output.shape[0] * output.shape[1]


def backward(module: RowModel, batches) -> dict[str, torch.Tensor]:
    module.zero_grad()
    with attending_rows(module.policy):
        for batch in batches:
            module([Share(row, 1.0 + number) for number, row in batch]).loss.backward()
    return gradients(module)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "yarn", "gemma3"])
def test_gradients_are_those_of_rows_one_by_one(kind, checkpointing, attention):
    loaded = tiny_agent(kind)
    loaded.model.set_attn_implementation(attention)
    module = RowModel(loaded.model.requires_grad_(True)).train()
    numbered = list(enumerate(rows(260)))
    reference = backward(module, [[each] for each in numbered])
    if checkpointing:
        module.checkpoint_activations()
    counting = Counting(loaded.model)
    for batches in ([numbered], [numbered[:4], numbered[4:]], [numbered[1:3], numbered[:1], numbered[3:]]):
        assert_close(reference, backward(module, batches))
    counting.tokens = 0
    backward(module, [numbered[:4]])
    padded = 4 * (OPENING + 70) if kind == "gemma3" else OPENING + 4 * 70
    packed = kind != "gemma3" and attention == "sdpa"
    assert counting.tokens == (OPENING + 40 + 25 + 70 + 1 if packed else padded)
    counting.tokens = 0
    backward(module, [numbered[:1]])
    assert counting.tokens == OPENING + 40


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_packed_rows_have_the_gradients_of_rows_one_by_one(kind, attention, monkeypatch):
    """Here transformers keeps rows apart by a mask; flash attention does so by the same positions."""
    loaded = tiny_agent(kind)
    loaded.model.set_attn_implementation(attention)
    module = RowModel(loaded.model.requires_grad_(True)).train()
    numbered = list(enumerate(rows(260)))
    reference = backward(module, [[each] for each in numbered])
    counting = Counting(loaded.model)
    monkeypatch.setattr(model, "can_pack", lambda policy, opening: not opening)
    monkeypatch.setattr(model, "packs_itself", lambda policy: False)
    assert_close(reference, backward(module, [numbered[:2], numbered[2:]]))  # in the second not all begin alike
    packed = sum(len(row.input_ids) for _, row in numbered[2:])
    first = 2 * OPENING + 40 + 25 if kind == "gemma3" else OPENING + 2 * 40
    assert counting.tokens == packed + first


@pytest.mark.parametrize(
    ("attention", "kind", "opening", "packs"),
    [
        ("flash_attention_2", "gemma3", 0, True),
        ("flash_attention_2", "qwen3", OPENING, False),
        ("flash_attention_2", "qwen3_next", 0, False),
        ("sdpa", "qwen3", 0, False),
        (NAME, "qwen3", OPENING, True),
        (NAME, "gemma3", 0, False),
        (NAME, "qwen3_next", 0, False),
    ],
)
def test_rows_are_packed_where_something_keeps_them_apart(attention, kind, opening, packs):
    policy = tiny_model(kind)
    policy.config._attn_implementation = attention
    assert can_pack(policy, opening) == packs
    policy.config.attention_dropout = 0.1
    assert can_pack(policy, opening) == (packs and attention != NAME)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("opening", [0, 40])
def test_packed_rows_see_the_opening_and_their_own_part(dtype, bound, opening):
    packed, draw = Packed(opening, [13, 1, 30]), torch.Generator().manual_seed(0)
    tokens = opening + 44
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for part in packed.parts():
        seen[part, part] = True
    seen[opening:, :opening] = True
    heads = {"query": 4, "key": 2, "value": 2}
    given = {name: torch.randn(1, n, tokens, 32, generator=draw).to(dtype) for name, n in heads.items()}
    exact = {name: x.double().requires_grad_() for name, x in given.items()}
    found = {name: x.requires_grad_() for name, x in given.items()}
    group = [exact[name].repeat_interleave(4 // n, dim=1) for name, n in heads.items()]
    scores = (group[0] @ group[1].mT * 0.2).masked_fill(~seen.tril(), -torch.inf)
    expected = (scores.softmax(-1) @ group[2]).transpose(1, 2)
    out, _ = row_attention(None, *found.values(), packed.mask(torch.device("cpu")), scaling=0.2)
    change = torch.randn(expected.shape, generator=draw)
    expected.backward(change.double())
    out.backward(change.to(dtype))
    assert (out - expected).abs().max() < bound
    for name, each in found.items():
        assert (each.grad - exact[name].grad).abs().max() < bound * exact[name].grad.abs().max()


def test_log_probabilities_are_those_of_rows_one_by_one():
    loaded = tiny_agent()
    module = RowModel(loaded.model)
    every = rows(260)
    with torch.no_grad():
        for found, row in zip(module.logprobs_of_text(every[:4]), every, strict=False):
            assert torch.allclose(found, module.logprobs(row), atol=1e-5)


def test_log_probabilities_are_those_of_a_model_that_scales_its_logits(monkeypatch):
    loaded = tiny_agent()
    monkeypatch.setattr(loaded.model.config, "logits_scaling", 4.0, raising=False)  # as Granite's forward divides them
    module, row = RowModel(loaded.model), rows(260)[0]
    with torch.no_grad():
        whole = (loaded.model(torch.tensor([row.input_ids])).logits[0] / 4).log_softmax(-1)
        trained = [(place - 1, label) for place, label in enumerate(row.labels) if label >= 0]
        expected = torch.stack([whole[place, label] for place, label in trained])
        assert torch.allclose(module.logprobs(row), expected, atol=1e-5)
        assert torch.allclose(module.logprobs_of_text([row])[0], expected, atol=1e-5)


def test_an_opening_ends_before_the_last_token_and_few_tokens_are_none():
    first = list(range(100))
    other = [*range(50), *range(200, 250)]
    assert shared([first, other]) == shared([first, other, first]) == 50
    assert shared([first]) == 0
    assert shared([first] * 2) == 99  # something goes on behind it
    assert shared([first, first[: LEAST + 1]]) == LEAST
    assert shared([first, first[:LEAST]]) == 0
    assert shared([first, [7, *first]]) == 0


def test_micro_batches_hold_rows_that_begin_alike_and_as_many_tokens_as_are_computed():
    every = rows(260)
    shares = shares_of([every[0], every[4], every[2], every[1], every[3]], "token", 0, 1.0)
    computed = OPENING + 40 + 25 + 70 + 1
    assert sorted(len(batch) for batch in own_batches(shares, 0, 1, computed, sharing=True)) == [1, 4]
    assert max(len(batch) for batch in own_batches(shares, 0, 1, computed - 1, sharing=True)) < 4
    assert {len(b) for b in own_batches(shares, 0, 1, computed)} == {1, 2}
    padded = OPENING + 4 * 70
    assert sorted(len(b) for b in own_batches(shares, 0, 1, padded, sharing=True, packing=False)) == [1, 4]
    assert max(len(b) for b in own_batches(shares, 0, 1, padded - 1, sharing=True, packing=False)) < 4


def test_a_trained_token_may_stand_in_what_rows_begin_with():
    begin = list(range(40, 140))
    every = [
        plain_row([*begin, 7, 8, 9, 10], [50, 51, 99, 100, 103], "a"),
        plain_row([*begin, 11, 12], [50, 101], "b"),
        plain_row([*begin, 7, 8, 9, 10], [50, 51, 99, 100, 103], "c"),  # what "a" did
        plain_row(begin, [1, 60, 99], "d"),
    ]
    for attention in ("sdpa", "eager"):
        loaded = tiny_agent()
        loaded.model.set_attn_implementation(attention)
        module = RowModel(loaded.model.requires_grad_(True)).train()
        numbered = list(enumerate(every))
        reference = backward(module, [[each] for each in numbered])
        counting = Counting(loaded.model)
        assert_close(reference, backward(module, [numbered]))
        assert counting.tokens == 99 + (5 + 3 + 5 + 1 if attention == "sdpa" else 4 * 5)


def test_windows_of_a_rollout_share_its_system_prompt_and_assignment(tmp_path):
    played = rollout(tmp_path, backend="memo", budget="400t", reads=1, reads_force=2)
    assert len(played) > 2
    assert shared([row.input_ids for row in played]) > 200
