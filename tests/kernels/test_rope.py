"""Rotary embeddings stripped and restored: the reference against complex numbers in fp64, the kernel against both."""

from __future__ import annotations

import importlib.util
import itertools
import warnings

import pytest
import torch

from still.kernels import dispatch
from still.kernels.rope import angles, restore_rope, strip_rope

PROVIDERS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")),
]
HALF = [torch.float16, torch.bfloat16]
full = pytest.mark.full


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def setting(rotary_dim, base=1e6):
    return base ** -(torch.arange(0, rotary_dim, 2).float() / rotary_dim)


def full_tables(positions, frequencies, scaling=1.0):
    """As transformers makes them: each frequency in both halves."""
    return [torch.cat((x, x), dim=-1) for x in angles(positions, frequencies, scaling)]


def exact(x, positions, frequencies, scaling, strip):
    """Pairs as complex numbers in fp64, turned by the angle in fp32 that a model computes."""
    half = len(frequencies)
    angle = (positions.float()[..., None] * frequencies).double()
    turn = torch.polar(torch.full_like(angle, scaling), angle).unsqueeze(1)
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    pairs = pairs / turn if strip else pairs * turn
    return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :].double()), dim=-1)


def close(got, wanted):
    """Within two roundings of the dtype; fp32 tables bring a few of their own."""
    assert got.isfinite().all()
    slack = {torch.float32: 6e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[got.dtype]
    error = (got.double() - wanted).abs().max().item() if got.numel() else 0.0
    assert error <= slack * max(wanted.abs().max().item(), 1.0) if got.numel() else True, error


GRID = [(64, 64), (80, 80), (128, 32), (128, 128)]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("function", [strip_rope, restore_rope])
@pytest.mark.parametrize("given", ["tables", "positions"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("tokens", "dims"),
    [(63, (80, 80)), (1, (128, 32)), *(pytest.param(*x, marks=full) for x in itertools.product((1, 63, 111, 1000),
    (*GRID, (96, 96), (256, 64), (256, 256), (16, 2))))],
)  # fmt: skip
def test_turns_as_complex_numbers_do(device, provider, function, given, dtype, tokens, dims, poisoned):
    dim, rotary = dims
    x, frequencies = draw(2, 3, tokens, dim, dtype=dtype), setting(rotary)
    start = torch.tensor([[0], [120_000]])
    positions = start + torch.arange(tokens)
    wanted = exact(x, positions, frequencies, 1.3, function is strip_rope)
    x, positions, frequencies = x.to(device), positions.to(device), frequencies.to(device)
    tables = {"positions": positions, "frequencies": frequencies, "scaling": 1.3}
    if given == "tables":
        tables = dict(zip(("cos", "sin"), full_tables(positions, frequencies, 1.3), strict=True))
    with dispatch.use(provider), poisoned:
        got = function(x, **tables)
        assert got.dtype == dtype
        assert got is not x
        close(got.cpu(), wanted)
        changed = x.clone()
        assert function(changed, **tables, out=changed) is changed
        assert torch.equal(changed, got)
        room = torch.full((2, 3, tokens, dim + 5), 7.0, device=device)  # a part of something wider, and in fp32
        part = room[..., 2:-3]
        assert function(x, **tables, out=part) is part
        close(part.cpu(), wanted)
        assert (room[..., :2] == 7).all()
        assert (room[..., -3:] == 7).all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_one_row_or_one_token_of_tables_serves_all_and_views_are_turned(device, provider):
    frequencies, positions = setting(64).to(device), torch.arange(40, device=device) * 0.25
    cos, sin = full_tables(positions[None], frequencies)
    whole = draw(2, 50, 3, 64).to(device)
    view = whole.transpose(1, 2)[:, :, 5:45]  # [batch, heads, tokens, dim] of a cache that keeps tokens first
    wanted = exact(view.cpu(), positions.cpu()[None], frequencies.cpu(), 1.0, True)
    where = positions.cpu()[None, 7:8].expand(1, 40)
    with dispatch.use(provider):
        close(strip_rope(view, cos, sin).cpu(), wanted)
        close(strip_rope(view, positions=positions, frequencies=frequencies).cpu(), wanted)
        close(strip_rope(view, cos[:, 7:8], sin[:, 7:8]).cpu(), exact(view.cpu(), where, frequencies.cpu(), 1.0, True))
        outside = whole[:, :5].clone()
        strip_rope(view, cos, sin, out=view)
        close(view.cpu(), wanted)
        assert torch.equal(whole[:, :5], outside)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("function", [strip_rope, restore_rope])
def test_gradients(device, provider, inplace, function):
    frequencies, positions = setting(32).to(device), torch.arange(9, device=device)[None]
    tables = full_tables(positions, frequencies, 1.2)
    x, weight = (draw(1, 2, 9, 48, seed=seed).to(device) for seed in (0, 1))
    x.requires_grad_()
    with dispatch.use(provider):
        keys = x * 1.0
        (function(keys, *tables, out=keys if inplace else None) * weight).sum().backward()
        spread = torch.zeros_like(x, requires_grad=True)
        function(spread, *tables).sum().backward()  # its gradient arrives as one expanded number
    same = x.detach().cpu().double().requires_grad_()
    exact(same, positions.cpu(), frequencies.cpu(), 1.2, function is strip_rope).mul(weight.cpu()).sum().backward()
    close(x.grad.cpu(), same.grad)
    same.grad = None
    exact(same, positions.cpu(), frequencies.cpu(), 1.2, function is strip_rope).sum().backward()
    close(spread.grad.cpu(), same.grad)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_strip_undoes_restore(device, provider):
    x, frequencies = draw(1, 2, 111, 128).to(device), setting(128, 1e4).to(device)
    positions = torch.rand(1, 111, device=device) * 1e5 - 5e4
    with dispatch.use(provider):
        turned = restore_rope(x, positions=positions, frequencies=frequencies, scaling=1.1)
        back = strip_rope(turned, positions=positions, frequencies=frequencies, scaling=1.1)
    assert (turned - x).abs().max() > 0.5
    torch.testing.assert_close(back, x, atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (1, 0, 5, 16), (1, 2, 0, 16)])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_to_turn(device, provider, shape):
    x = torch.zeros(shape, device=device)
    with dispatch.use(provider):
        positions = torch.arange(shape[2], device=device)
        assert strip_rope(x, positions=positions, frequencies=setting(16).to(device)).shape == shape


def test_what_does_not_fit_is_refused_with_shapes():
    x, positions, frequencies = draw(2, 3, 5, 16), torch.arange(5), setting(16)
    cos, sin = full_tables(positions[None], frequencies)
    far = {"positions": positions + 2**24 - 4, "frequencies": frequencies}
    cases = [
        ("give cos and sin, or positions", x, (cos,), {}),
        ("give cos and sin, or positions", x, (cos, sin), {"positions": positions}),
        (r"not torch.int64; keys \[2, 3, 5, 16\]", x.long(), (cos, sin), {}),
        (r"5 tokens; keys \[2, 3, 5, 16\], cos \[1, 4, 16\]", x, (cos[:, :4], sin[:, :4]), {}),
        ("one row for all or for each of 2", x, (cos.expand(3, 5, 16), sin.expand(3, 5, 16)), {}),
        ("16 rotated dims do not fit into a head dim of 8", x[..., :8], (cos, sin), {}),
        ("share an even width and a dtype", x, (cos, sin.half()), {}),
        ("position of 16777216 is out of range", x, (), far),
        ("position of nan is out of range", x, (), {"positions": positions / 0 * 0, "frequencies": frequencies}),
        ("one device, not cpu, meta", x.to("meta"), (cos, sin), {}),
        ("strides that alias", x, (cos, sin), {"out": x[:, :1].expand(2, 3, 5, 16)}),
        ("strides that alias", x, (cos, sin), {"out": x.as_strided((2, 3, 5, 16), (240, 80, 8, 1))}),
        (r"out must be floats like keys, not torch.float32 \[2, 3, 5, 8\]", x, (cos, sin), {"out": x[..., :8]}),
        ("out must be floats like keys, not torch.int64", x, (cos, sin), {"out": x.long()}),
        ("out shares the keys' memory", x, (cos, sin), {"out": x[:]}),
        ("no gradient flows through out", x.clone().requires_grad_(), (cos, sin), {"out": x.clone()}),
    ]  # fmt: skip
    for reason, keys, tables, more in cases:
        with pytest.raises(ValueError, match=reason):
            strip_rope(keys, *tables, **more)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_the_kernel_makes_nan_of_positions_it_cannot_count(device):
    """On a GPU positions are not read back: a number that would be wrong is none."""
    from still.kernels.rope_triton import Turn

    x, positions = torch.ones(1, 1, 3, 16, device=device), torch.tensor([[1.0, 2.0**24, torch.inf]], device=device)
    with dispatch.use("triton"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's NumPy, on the way to NaN
        out = Turn.apply(x, positions, setting(16).to(device), 1.0, True, False, False, None)
    assert out.isnan().all(-1).tolist() == [[[False, True, True]]]


def test_odd_strides_take_the_reference(device):
    x, positions = draw(1, 2, 16, 5).mT.to(device), torch.arange(5, device=device)
    wanted = exact(x.cpu(), positions.cpu()[None], setting(16), 1.0, True)
    close(strip_rope(x, positions=positions, frequencies=setting(16).to(device)).cpu(), wanted)
    if importlib.util.find_spec("triton"):
        with dispatch.use("triton"), pytest.raises(ValueError, match="last dim of keys must be contiguous"):
            strip_rope(x, positions=positions, frequencies=setting(16).to(device))
