"""Layers that are compacted together give what each gives alone, over weights that lie side by side."""

from __future__ import annotations

import copy

import pytest
import torch
from test_compactor import stirred
from test_perceiver import OPTIONS
from tiny_models import random_ids, tiny_model
from torch import nn

from still import StillCompactor, attention, read
from still import compactor as compactor_module
from still import perceiver as perceiver_module
from still.together import Together, side_by_side, stacked

PLACED = {"placed": {"placement": 8, "gain": True}, "scouted": {"placement": 8, "scout": 1}}


@pytest.fixture
def two_linears():
    parts = [nn.Linear(3, 5), nn.Linear(3, 5)]
    side_by_side(parts)
    return parts


@torch.no_grad()
def test_weights_side_by_side_are_read_where_they_lie(two_linears):
    whole = Together(two_linears)
    view = whole.weight
    assert view.data_ptr() == two_linears[0].weight.data_ptr()
    assert view.shape == (2, 5, 3)
    assert whole.weight is view
    two_linears[1].weight.data.fill_(7.0)  # what is written into a weight is seen at once
    assert (whole.weight[1] == 7.0).all()
    two_linears[1].weight.data = torch.full((5, 3), 8.0)  # and so is another tensor in its place
    assert (whole.weight[1] == 8.0).all()
    two_linears[0].weight = nn.Parameter(torch.full((5, 3), 9.0))
    assert (whole.weight == torch.tensor([9.0, 8.0])[:, None, None]).all()
    side_by_side(two_linears)
    assert whole.weight.data_ptr() == two_linears[0].weight.data_ptr()


def test_gradients_flow_where_they_are_wanted(two_linears):
    whole = Together(two_linears)
    (whole.weight * torch.tensor([1.0, 2.0])[:, None, None]).sum().backward()
    assert [part.weight.grad.mean().item() for part in two_linears] == [1.0, 2.0]
    two_linears[0].requires_grad_(False)
    two_linears[1].requires_grad_(False)
    assert whole.bias.data_ptr() == two_linears[0].bias.data_ptr()


@torch.no_grad()
def test_neighbours_of_another_shape_or_order_are_copied():
    memory = torch.arange(12.0)
    a, b, gap = memory[:4], memory[4:8], memory[8:]
    assert stacked([a, b]).data_ptr() == memory.data_ptr()
    for others in ([b, a], [a, gap], [a, memory[4:8].view(2, 2).T.reshape(4)]):
        found = stacked(others)
        assert found.data_ptr() != others[0].data_ptr()
        assert torch.equal(found, torch.stack(others))


def lies_together(compactor) -> bool:
    whole = Together(list(compactor.layers.values()))
    first = next(iter(compactor.layers.values()))
    with torch.no_grad():
        pairs = (
            (whole.bank, first.bank),
            (whole.blocks[1].cross.key.weight, first.blocks[1].cross.key.weight),
            (whole.value_head.weight, first.value_head.weight),
        )
        return all(stack.data_ptr() == weight.data_ptr() for stack, weight in pairs)


def test_a_compactor_keeps_its_weights_together(tmp_path):
    model = tiny_model("qwen3")
    compactor = stirred(StillCompactor.for_model(model, slots=8, chunk=64))
    assert lies_together(compactor)
    assert lies_together(copy.deepcopy(compactor).to(torch.float64))
    compactor.save_pretrained(tmp_path)
    loaded = StillCompactor.from_pretrained(tmp_path, model=model)
    assert lies_together(loaded)
    for name, weight in compactor.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name


@torch.no_grad()
def test_a_copy_reads_its_own_weights():
    model = tiny_model("qwen3")
    compactor, reading = stirred(StillCompactor.for_model(model, slots=8, chunk=64)), read(model, random_ids(1, 40))
    before = compactor.compact(reading, ratio=4).layers[1].values.clone()
    other = copy.deepcopy(compactor)
    for part in other.layers.values():
        part.value_head.weight.zero_()
    assert not other.compact(reading, ratio=4).layers[1].values.any()
    assert torch.equal(compactor.compact(reading, ratio=4).layers[1].values, before)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value: scales of 128 make fp32 differ in the fourth digit."""
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize("options", {**OPTIONS, **PLACED}.values(), ids={**OPTIONS, **PLACED}.keys())
@pytest.mark.parametrize("slots", [5, [7, 3]], ids=["alike", "rows of their own"])
def test_together_is_one_by_one(options, slots, monkeypatch):
    attention.register()
    model = tiny_model("qwen3", attention="still", layers=3)
    compactor = stirred(StillCompactor.for_model(model, slots=8, chunk=64, **options), 0.1)
    ids = random_ids(2, 30)
    rows = [30, 30] if isinstance(slots, int) else [30, 21]

    def run(most, piece):
        monkeypatch.setitem(compactor_module.LATENTS, "cpu", most)
        monkeypatch.setattr(perceiver_module, "PIECE", piece)
        compactor.zero_grad()
        with torch.no_grad():
            plain = compactor.compact_rows(read(model, ids).cache, rows, slots)
        states = compactor.compact_rows(read(model, ids).cache, rows, slots)
        sum((x.keys.square().sum() + x.values.sum()) for x in states.values()).backward()
        for layer, own in plain.items():
            assert apart(states[layer].values, own.values) < 1e-4
        return plain, {name: p.grad for name, p in compactor.named_parameters() if p.grad is not None}

    width = compactor.layers["0"].bank.shape[-1]
    (ours, our_grads), (theirs, their_grads) = run(2**30, 2**23), run(0, 4 * 7 * 2 * compactor.kv_heads * width)
    assert our_grads.keys() == their_grads.keys()
    assert len(our_grads) > 20
    for layer, own in theirs.items():
        for one, other in zip(ours[layer][:3], own[:3], strict=True):
            assert (one is None) == (other is None)
            assert one is None or apart(one, other) < 1e-4
    for name, grad in their_grads.items():
        assert apart(our_grads[name], grad) < 1e-3, name
