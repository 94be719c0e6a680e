"""Where the kernels are used: compaction, training and the attention "still" run in them, and find the same."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from cache_cases import compact
from tiny_models import random_ids, tiny_model

import still.attention
from still import StillCompactor, read
from still.distill.objective import IGNORE, Distiller
from still.kernels import dispatch

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    names, launch = [], dispatch.launch

    def record(kernel, *args, **options):
        names.append(kernel.__name__)
        return launch(kernel, *args, **options)

    monkeypatch.setattr(dispatch, "launch", record)
    return names


def trained(model, **options):
    """A compactor whose every weight does something."""
    torch.manual_seed(1)
    compactor = StillCompactor.for_model(model, slots=7, chunk=60, **options)
    with torch.no_grad():
        for name, weight in compactor.named_parameters():
            if not name.endswith("log_scale"):
                weight.add_(0.05 * torch.randn_like(weight))
    return compactor


def both(call, launched):
    """What `call` gives by the reference and by the kernels, and the kernels that ran."""
    with dispatch.use("reference"):
        wanted = call()
    assert not launched
    with dispatch.use("triton"):
        return wanted, call()


@needs_triton
@pytest.mark.parametrize("kind", ["qwen3", *(pytest.param(k, marks=pytest.mark.full) for k in ("yarn", "qwen3_next"))])
def test_compaction_runs_in_the_kernels(device, launched, kind):
    model = tiny_model(kind).to(device)
    compactor = trained(model, learned_scale=True, beta=True)
    reading = read(model, random_ids(2, 60).to(device))

    def call():
        compactor.zero_grad()
        layers = compactor.compact_rows(reading.cache, [60, 41], slots=7)
        sum(part.square().sum() for layer in layers.values() for part in layer if part is not None).backward()
        found = {f"{i} {name}": x for i, layer in layers.items() for name, x in layer._asdict().items()}
        found |= {name: p.grad.clone() for name, p in compactor.named_parameters() if p.grad is not None}
        return {name: x.detach() for name, x in found.items() if x is not None}

    wanted, got = both(call, launched)
    # Two layers, two lengths, two blocks, each once over the tokens and once among the latents; and RoPE.
    assert sum(name in ("one_pass_kernel", "attend_kernel") for name in launched) == 16
    assert launched.count("key_grad_kernel") == 16
    assert "turn" in launched
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        slack = 1e-3 if "log_scale" in name or "bias" in name else 1e-4  # sums that nearly cancel
        torch.testing.assert_close(got[name], x, rtol=slack, atol=slack * x.abs().max().item(), msg=name)


@needs_triton
def test_half_precision_keys_are_read_as_they_are(device, launched):
    """Slots from fp16 are as near to PyTorch's in fp32 as rounding leaves them. (The interpreter has no bf16.)"""
    model = tiny_model().to(device)
    compactor, reading = trained(model), read(model, random_ids(1, 60).to(device))
    keys, values = (getattr(reading.cache.layers[0], name).half() for name in ("keys", "values"))

    def call():
        with torch.no_grad():
            return compactor.compact_layer(0, keys, values, torch.arange(60, device=device), 7)

    wanted, got = both(call, launched)
    assert launched
    for x, exact in zip(got[:2], wanted[:2], strict=True):
        assert x.dtype == torch.float16
        assert (x - exact).float().norm() <= 5e-3 * exact.float().norm()


@needs_triton
def test_training_runs_in_the_kernels(device, launched):
    model = tiny_model().to(device)
    distiller = Distiller(model, trained(model))
    context, turns = random_ids(1, 24).to(device), random_ids(1, 6, seed=1).to(device)
    labels = turns.clone()
    labels[:, :3] = IGNORE

    def call():
        distiller.zero_grad()
        out = distiller(context, turns, labels, slots=5)
        out.loss.backward()
        return out.kl, {name: p.grad.clone() for name, p in distiller.compactor.named_parameters() if p.requires_grad}

    (kl, grads), (ours, got) = both(call, launched)
    assert {"one_pass_kernel", "query_grad_kernel", "key_grad_kernel", "weight_grad_kernel"} <= set(launched)
    torch.testing.assert_close(ours, kl, rtol=1e-3, atol=0)
    for name in ("layers.0.bank", "layers.0.blocks.0.cross.value.weight", "layers.1.key_head.weight"):
        torch.testing.assert_close(got[name], grads[name], rtol=1e-2, atol=1e-3 * grads[name].abs().max().item())


@needs_triton
def test_attention_over_slots_with_beta_runs_in_the_kernels(device, launched):
    still.attention.register()
    model = tiny_model(attention="still").to(device)
    context, question = random_ids(1, 40).to(device), random_ids(1, 5, seed=1).to(device)
    beta = torch.randn(1, 2, 10, generator=torch.Generator().manual_seed(0)).to(device)

    def call():
        with torch.no_grad():
            return model(question, past_key_values=compact(model, context, 10, beta=beta)).logits

    wanted, got = both(call, launched)
    assert launched.count("attend") == 4  # prefix and tail of two layers
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_a_cpu_runs_the_reference_unless_asked_otherwise(launched):
    model = tiny_model()
    StillCompactor.for_model(model, slots=7, chunk=60).compact(read(model, random_ids(1, 60)), slots=7)
    assert not launched
