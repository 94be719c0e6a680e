"""Latent attention: kernels against the reference and fp64, the reference against the perceiver's own attention."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from still.config import StillConfig
from still.kernels import dispatch, latent_attention_plan
from still.kernels.latent_attention import latent_attention, turn, unturn_model
from still.perceiver import LayerPerceiver, attend, resampled, rms
from still.together import Together

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


@dataclass
class Case:
    tokens: int = 111
    head_dim: int = 64
    latents: int | tuple[int, ...] = 20
    heads: int = 2
    batch: int = 1
    rotary: int | None = None
    width: int | None = None
    lengths: tuple[int, ...] | None = None
    padding: str = "left"
    strip: bool = True
    own_latents: bool = False
    """Latents of each row of the batch, as in later blocks, instead of the same for all."""


@dataclass
class Problem:
    """One problem in fp64: what requires gradients, the tables, options, and the gradient of the output."""

    inputs: dict[str, torch.Tensor]
    tables: dict
    options: dict
    grad: torch.Tensor

    def run(self, dtype: torch.dtype, attend=latent_attention) -> dict[str, torch.Tensor]:
        """Output and gradients with keys and values in `dtype`, parameters in fp32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        inputs = {
            name: x.to(dtype if name in ("keys", "values") else wide).detach().clone().requires_grad_()
            for name, x in self.inputs.items()
        }
        out = attend(**inputs, **self.tables, **self.options)
        out.backward(self.grad.to(out))
        return {"out": out.detach(), **{name: x.grad for name, x in inputs.items()}}


def problem(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    draw = torch.Generator().manual_seed(case.tokens * 7919 + case.head_dim)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).to(device)

    def angles(*shape):
        return (torch.rand(*shape, generator=draw, dtype=torch.float64) * 6).to(device)

    batch, heads, tokens, head_dim = case.batch, case.heads, case.tokens, case.head_dim
    width, rotary = case.width or 2 * head_dim, case.rotary or head_dim
    packed = isinstance(case.latents, tuple)
    places = (sum(case.latents),) if packed else (heads, case.latents)
    rows = batch if case.own_latents else 1
    keys, values = (normal(batch, heads, tokens, head_dim, scale=s).to(dtype).double() for s in (3.0, 1.0))
    for row, length in enumerate(case.lengths or ()):
        pads = slice(0, tokens - length) if case.padding == "left" else slice(length, tokens)
        keys[row, :, pads], values[row, :, pads] = torch.nan, torch.nan
    angle = angles(rows, tokens, rotary // 2).repeat(1, 1, 2)
    turns = [angles(rows, *(() if packed else (1,)), places[-1], width // 2), angles(rows, 1, tokens, width // 2)]
    return Problem(
        {
            "query": F.normalize(normal(rows, *places, width), dim=-1), "keys": keys, "values": values,
            "weight": normal(width, 2 * head_dim, scale=0.1), "bias": normal(width, scale=0.2),
        },
        {
            "turns": tuple(torch.polar(torch.ones_like(x), x) for x in turns),
            "strip": (angle.cos() * 1.2, angle.sin() * 1.2) if case.strip else None,
        },
        {
            "scale": width / 4, "counts": case.latents if packed else None, "lengths": case.lengths,
            "padding": case.padding,
        },
        normal(batch, *places, 2 * head_dim),
    )  # fmt: skip


def materialised(query, keys, values, weight, bias, turns, strip, scale, counts, lengths, padding):
    """The plain PyTorch of it, every step in the dtype of the keys."""
    dtype, tokens = keys.dtype, keys.shape[2]
    if strip is not None:
        keys = unturn_model(keys.float(), *(table.float() for table in strip)).to(dtype)
    source = torch.cat((keys, values), -1)
    at = torch.arange(tokens, device=keys.device)
    spans = [(tokens - n, tokens) if padding == "left" else (0, n) for n in lengths or [tokens] * len(keys)]
    pads = torch.stack([(at < first) | (at >= stop) for first, stop in spans])[:, None]
    source = source.masked_fill(pads[..., None], 0.0)
    key = turn(F.normalize(F.linear(source, weight.to(dtype), bias.to(dtype)), dim=-1), turns[1])
    query = (turn(query, turns[0]) * scale).to(dtype)
    if counts is None:
        scores = (query @ key.transpose(-1, -2)).masked_fill(pads[:, :, None], -torch.inf)
        return scores.softmax(-1) @ source
    parts = []
    for each, k, x in zip(query.split(counts, 1), key.unbind(1), source.unbind(1), strict=True):
        parts.append((each @ k.transpose(-1, -2)).masked_fill(pads, -torch.inf).softmax(-1) @ x)
    return torch.cat(parts, 1)


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """Kernel errors against fp64 are at most twice those of plain PyTorch in the same dtype (root mean square)."""
    given = problem(case, device, dtype)
    with dispatch.use("reference"):
        exact = given.run(torch.float64)
    with dispatch.use("triton"):
        ours = given.run(dtype)
    plain = given.run(dtype, materialised)
    scale = {name: x.abs().max().item() for name, x in exact.items()}
    # The weight of a lone token cannot move: softmax's gradient is the difference of two equal numbers of this size.
    lone = (given.grad.norm(dim=-1) * exact["out"].norm(dim=-1)).max().item()
    for name, x in exact.items():
        mine, theirs = ((run[name].double() - x).square().mean().sqrt().item() for run in (ours, plain))
        floor = (1e-6 if dtype == torch.float32 else 1e-4) * scale[name]
        if 1 in (case.tokens, *(case.lengths or ())) and name != "out":
            floor += torch.finfo(dtype).eps * lone
        assert mine <= 2 * theirs + floor, (
            f"{name}: error {mine:.2e}, PyTorch's {theirs:.2e}, largest {scale[name]:.2e}"
        )


SAMPLE = [
    Case(),
    Case(latents=70, tokens=63, head_dim=80, rotary=40, heads=1),
    Case(tokens=1, head_dim=128),
    Case(lengths=(50, 111), batch=2, own_latents=True, latents=66),
    Case(latents=(5, 0, 66), heads=3, batch=2, lengths=(20, 63), tokens=63, padding="right"),
    Case(tokens=63, latents=3, strip=False, width=200),
]
GRID = [
    Case(tokens=tokens, head_dim=head_dim, latents=latents, heads=heads, batch=batch)
    for tokens, latents, heads, batch in (
        (1, 1, 1, 1), (1, 130, 2, 1), (63, 1, 8, 1), (63, 70, 2, 2), (111, 64, 1, 2), (111, 65, 8, 1),
        (1000, 20, 2, 1), (1000, 130, 1, 1),
    )
    for head_dim in (64, 80, 96, 128)
] + [
    Case(tokens=1000, latents=(1, 0, 130, 17), heads=4, batch=2, lengths=(1000, 1)),
    Case(tokens=1000, latents=(33, 0), batch=2, lengths=(300, 999), padding="right", head_dim=96, rotary=32),
    Case(tokens=111, head_dim=128, rotary=32, latents=20),
    Case(tokens=111, head_dim=128, rotary=96, latents=100),
    Case(tokens=300, head_dim=64, width=256, latents=100, own_latents=True, batch=3),
]  # fmt: skip


def name(case: Case) -> str:
    return "-".join(f"{field}={value}" for field, value in vars(case).items() if value != getattr(Case(), field)) or "-"


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", SAMPLE, ids=name)
def test_kernels_are_as_exact_as_pytorch(case, dtype, device):
    check(case, device, dtype)


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", GRID, ids=name)
def test_kernels_are_as_exact_as_pytorch_on_odd_shapes(case, dtype, device):
    check(case, device, dtype)


@needs_triton
@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_both_equal_the_perceivers_own_attention(mode, device):
    torch.manual_seed(0)
    layer = LayerPerceiver(64, 2, StillConfig(bank=20, learned_scale=True)).to(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    cross = layer.blocks[0].cross
    source = torch.randn(1, 2, 111, 128, device=device)
    positions = torch.arange(5, 116, device=device)[None]
    where = layer.latent_positions(positions, 20)
    turns = layer.turns(where, positions[:, :1]), layer.turns(positions, positions[:, :1])
    grad = torch.randn(1, 2, 20, 128, device=device)

    def run(way):
        layer.zero_grad()
        latents = rms(resampled(layer.bank, 20)[None], layer.blocks[0].eps)
        out = way(latents)
        out.backward(grad)
        return {"out": out.detach(), **{n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}}

    def through_the_kernel(latents):
        mixed = latent_attention(
            F.normalize(cross.query(latents), dim=-1), source[..., :64], source[..., 64:], cross.key.weight,
            cross.key.bias, turns, scale=(10.0 * cross.log_scale).exp(),
        )  # fmt: skip
        return cross.output(cross.value(mixed))

    own = tuple(table[None] for table in turns)
    theirs = run(lambda latents: attend(Together([cross]), latents[None], [source], own)[0])
    with dispatch.use(mode):
        ours = run(through_the_kernel)
    assert ours.keys() == theirs.keys()
    for each, wanted in theirs.items():
        # The scale's one number is a sum that nearly cancels: the perceiver's own is 1.6e-5 off fp64.
        slack = 1e-4 if "log_scale" in each else 1e-5
        torch.testing.assert_close(ours[each], wanted, rtol=slack, atol=slack * wanted.abs().max().item())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_latents_of_each_head_may_stand_elsewhere(dtype, device):
    """A whole layer with a placement: packed latents in the kernel give what PyTorch gives."""
    torch.manual_seed(0)
    layer = LayerPerceiver(64, 2, StillConfig(bank=20, learned_scale=True, placement=8)).to(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    keys, values = (torch.randn(2, 2, 111, 64, device=device, dtype=dtype) for _ in range(2))
    positions = torch.arange(5, 116, device=device)[None]
    where = layer.latent_positions(positions, 20)
    turns = layer.turns(where, positions[:, :1]), layer.turns(positions, positions[:, :1])
    phase = torch.tensor([0.25, 0.75], device=device)
    found = {}
    for mode in ("reference", "triton"):
        with dispatch.use(mode):
            found[mode] = layer(keys, values, 20, turns, phase=phase)[:2]
    slack = 1e-5 if dtype == torch.float32 else 2e-3
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=slack, atol=slack * theirs.abs().max().item())


@needs_triton
@pytest.mark.parametrize("latents", [20, 66])
def test_a_row_and_a_head_alone_give_what_they_give_together(latents, device):
    case = Case(latents=latents, batch=2, heads=3, tokens=63, lengths=(63, 40), own_latents=True)
    given = problem(case, device, torch.float32)
    inputs = {key: x.float() for key, x in given.inputs.items()}
    (at_latents, at_tokens), (cos, sin) = given.tables["turns"], given.tables["strip"]
    with dispatch.use("triton"):
        together = latent_attention(**inputs, **given.tables, **given.options)
        alone = latent_attention(
            inputs["query"][1:, 2:], inputs["keys"][1:, 2:, 23:], inputs["values"][1:, 2:, 23:], inputs["weight"],
            inputs["bias"], (at_latents[1:], at_tokens[1:, :, 23:]), strip=(cos[1:, 23:], sin[1:, 23:]),
            scale=given.options["scale"],
        )  # fmt: skip
    torch.testing.assert_close(together[1:, 2:], alone, rtol=1e-5, atol=1e-5)


@needs_triton
def test_the_backward_pass_may_take_any_chunks(device, monkeypatch):
    given = problem(Case(tokens=150, lengths=(70, 150), batch=2, latents=(30, 5)), device, torch.float32)
    with dispatch.use("triton"):
        whole = given.run(torch.float32)
        monkeypatch.setattr(latent_attention_plan, "chunk", lambda tokens: 40)
        chunked = given.run(torch.float32)
    for each, wanted in whole.items():
        torch.testing.assert_close(chunked[each], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any PyTorch operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.nbytes)
        return out


@needs_triton
@pytest.mark.parametrize("latents", [64, 140])
def test_scores_are_never_in_memory(latents, device):
    given = problem(Case(tokens=400, latents=latents, heads=1, head_dim=16), device, torch.float32)
    inputs = {key: x.float() for key, x in given.inputs.items()}
    tables = {"turns": tuple(x.to(torch.complex64) for x in given.tables["turns"])}
    tables["strip"] = tuple(x.float() for x in given.tables["strip"])
    for key in ("query", "weight", "bias"):
        inputs[key].requires_grad_()
    with dispatch.use("triton"), Largest() as largest:
        out = latent_attention(**inputs, **tables, **given.options)
        out.backward(torch.ones_like(out))
    # No more than X, one layer's projected keys, or the outputs of three parts of the tokens.
    assert largest.bytes <= max(400, 3 * latents) * 32 * 4 < 400 * latents * 4


@needs_triton
def test_keys_and_values_get_gradients_only_where_asked(device):
    given = problem(Case(), device, torch.float32)
    inputs = {key: x.float() for key, x in given.inputs.items()}
    inputs["values"].requires_grad_()
    with dispatch.use("triton"):
        latent_attention(**inputs, **given.tables, **given.options).sum().backward()
    assert inputs["values"].grad.abs().sum() > 0
    assert inputs["keys"].grad is None


def test_wide_heads_take_the_reference_and_say_so(caplog, device):
    given = problem(Case(head_dim=256, tokens=9, latents=3), device, torch.float32)
    dispatch._say.cache_clear()
    with caplog.at_level(logging.INFO):
        given.run(torch.float32)
    assert sum("latent_attention" in record.message for record in caplog.records) == 1
    if importlib.util.find_spec("triton"):
        with dispatch.use("triton"), pytest.raises(ValueError, match="head dim 256"):
            given.run(torch.float32)


WRONG = {
    "keys and values must be alike": lambda g: g["inputs"].update(values=g["inputs"]["values"][:, :, 1:]),
    "float dtype": lambda g: g["inputs"].update(values=g["inputs"]["values"].half()),
    "several devices": lambda g: g["inputs"].update(bias=g["inputs"]["bias"].to("meta")),
    "weight must be": lambda g: g["inputs"].update(weight=g["inputs"]["weight"][:, 1:]),
    "bias must be": lambda g: g["inputs"].update(bias=g["inputs"]["bias"][1:]),
    "query must be": lambda g: g["inputs"].update(query=g["inputs"]["query"][:, :1]),
    "for 2 rows": lambda g: g["inputs"].update(query=g["inputs"]["query"].expand(3, -1, -1, -1)),
    r"turns\[0\] must be": lambda g: g["tables"].update(turns=g["tables"]["turns"][::-1]),
    r"turns\[1\] must be": lambda g: g["tables"].update(turns=(g["tables"]["turns"][0],) * 2),
    "strip must be": lambda g: g["tables"].update(strip=tuple(x[:, 1:] for x in g["tables"]["strip"])),
    "one number": lambda g: g["options"].update(scale=torch.ones(2)),
    "lengths are": lambda g: g["options"].update(lengths=(0, 9)),
    "padding is 'middle'": lambda g: g["options"].update(padding="middle"),
    "with counts": lambda g: g["options"].update(counts=(20, 20)),
}


@pytest.mark.parametrize("text", WRONG)
def test_bad_input_is_refused_with_its_shapes(text):
    given = problem(Case(batch=2, tokens=9), torch.device("cpu"), torch.float32)
    parts = {"inputs": given.inputs, "tables": given.tables, "options": given.options}
    WRONG[text](parts)
    with pytest.raises(ValueError, match=text) as caught:
        latent_attention(**given.inputs, **given.tables, **given.options)
    assert any(word in str(caught.value) for word in ("[", "'middle'", "devices", "dtype"))


@pytest.mark.parametrize("counts", [(5,), (5, 16), (-1, 21), (20,)])
def test_counts_must_sum_to_the_latents(counts):
    given = problem(Case(latents=(5, 15), tokens=9), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="counts are"):
        latent_attention(**given.inputs, **given.tables, **{**given.options, "counts": counts})
