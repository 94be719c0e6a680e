"""The compactor's cross-attention, against the best that PyTorch's own kernels make of it.

The baseline is as good as it can be written: strip, projection, normalisation and rotation under `torch.compile`,
buffers in the keys' dtype, then each of PyTorch's attention kernels on them. `W_v` follows the weighted sum in every
way, outside of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from ..kernels import dispatch
from ..kernels.latent_attention import latent_attention
from . import arithmetic
from .measure import Case, runs
from .prefix_attention import BACKENDS

HEADS, DIM = 8, 128
CHECKED = 16384
"""Tokens up to which every result is held against fp64, which takes a minute of a GPU at 128k."""


def cases(device: torch.device, dtype: torch.dtype, tokens: tuple[int, ...]) -> Iterator[Case]:
    """Ratios of 50 and 8 at 8,192 tokens (164 and 1,024 latents), and 8 at any length; both passes."""
    for length in tokens:
        sizes = (164, 1024, length // 8) if device.type == "cuda" else (min(164, length), length // 8)
        for latents in dict.fromkeys(max(size, 1) for size in sizes):
            problem = Problem(device, dtype, length, latents)
            yield problem.case("forward")
            yield problem.case("backward")


class Problem:
    """One layer of keys and values, one block's parameters, and the tables of both."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tokens: int, latents: int):
        width, half, make = 2 * DIM, DIM // 2, {"device": device}
        self.device, self.dtype, self.tokens, self.latents = device, dtype, tokens, latents
        self.keys = 3 * torch.randn(1, HEADS, tokens, DIM, **make).to(dtype)
        self.values = torch.randn(1, HEADS, tokens, DIM, **make).to(dtype)
        query = F.normalize(torch.randn(1, HEADS, latents, width, **make), dim=-1)
        weight, bias = torch.randn(width, width, **make) / width, torch.full((width,), width**-0.5, **make)
        self.wanted = tuple(x.requires_grad_() for x in (query, weight, bias))
        at = torch.arange(tokens, **make).float()[:, None]
        angle = (at * 1e6 ** -(torch.arange(half, **make) / half)).repeat(1, 2)[None]
        self.strip = angle.cos(), angle.sin()
        own = at * 10.0 ** -(torch.arange(DIM, **make) / DIM)
        places = torch.linspace(0, tokens - 1, latents, **make).round().long()
        self.turns = tuple(torch.polar(torch.ones_like(x), x)[None, None] for x in (own[places], own))
        self.scale = float(width)
        self.grad = torch.randn(1, HEADS, latents, width, **make)

    def case(self, mode: str) -> Case:
        """One pass; the memory of the backward pass is that of both."""
        gpu, forwards = self.device.type == "cuda", self.ways()
        both = {name: lambda way=way: self.both(way) for name, way in forwards.items()}
        providers = forwards
        if mode == "backward":
            providers = {name: self.backward(way) for name, way in forwards.items()}
        return Case(
            "latent_attention", mode, self.tokens,
            arithmetic.latent_attention(mode, 1, HEADS, self.tokens, self.latents, DIM, self.keys.element_size()),
            providers=providers,
            config={"latents": self.latents, "batch": 1, "kv_heads": HEADS, "head_dim": DIM},
            exact=(lambda: self.exact(mode)) if self.tokens <= CHECKED else None,
            ours="triton" if gpu else "reference",
            whole=both if mode == "backward" else {},
        )  # fmt: skip

    def ways(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Forward passes by provider."""
        if self.device.type != "cuda":
            return {"reference": self.ours, "eager": lambda: self.eager(*self.prepared(prepare))}
        found: dict[str, Any] = {"triton": self.ours}
        compiled = torch.compile(prepare, dynamic=False)
        for name, backend in BACKENDS.items():

            def way(backend=backend):
                query, key, source = self.prepared(compiled)
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(query, key, source, scale=1.0)

            if runs(lambda way=way: self.both(way)):
                found[f"compiled, {name}"] = way
        return found

    def ours(self) -> torch.Tensor:
        """The public function."""
        query, weight, bias = self.wanted
        return latent_attention(
            query, self.keys, self.values, weight, bias, self.turns, strip=self.strip, scale=self.scale
        )

    def prepared(self, how: Callable) -> tuple[torch.Tensor, ...]:
        """Queries, keys and source as an attention kernel takes them."""
        query, weight, bias = self.wanted
        cos_sin = tuple((x.real, x.imag) for x in self.turns)
        return how(query, self.keys, self.values, weight, bias, cos_sin, self.strip, self.scale)

    def eager(self, query, key, source) -> torch.Tensor:
        """Attention with its scores in memory."""
        return (query @ key.mT).softmax(-1) @ source

    def gradients(self, out: torch.Tensor, retain: bool = False) -> tuple[torch.Tensor, ...]:
        """Of latents, projection and bias."""
        return torch.autograd.grad(out, self.wanted, self.grad.to(out), retain_graph=retain)

    def both(self, way: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """A forward pass and its backward pass."""
        with torch.enable_grad():
            return self.gradients(way())

    def backward(self, way: Callable[[], torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The backward pass of a forward pass that is made once."""
        graph: list[torch.Tensor] = []

        def call():
            if not graph:
                with torch.enable_grad():
                    graph.append(way())
            return self.gradients(graph[0], retain=True)

        return call

    def exact(self, mode: str):
        """The same in fp64, by the reference."""
        query, weight, bias = (x.detach().double().requires_grad_() for x in self.wanted)
        with torch.enable_grad(), dispatch.use("reference"):
            out = latent_attention(
                query, self.keys.double(), self.values.double(), weight, bias, self.turns, strip=self.strip,
                scale=self.scale,
            )  # fmt: skip
        if mode == "forward":
            return out.detach()
        return torch.autograd.grad(out, (query, weight, bias), self.grad.double())


def prepare(query, keys, values, weight, bias, cos_sin, strip, scale):
    """Everything before the attention kernel: fp32 inside fused loops, buffers in the dtype of the keys."""
    dtype, (cos, sin) = keys.dtype, (x[:, None, :, : x.shape[-1] // 2] for x in strip)
    source = torch.cat((_turned(keys.float(), cos, -sin).to(dtype), values), -1)
    key = F.linear(source, weight.to(dtype), bias.to(dtype)).float()
    key = _turned(key / key.norm(dim=-1, keepdim=True).clamp_min(1e-12), *cos_sin[1]).to(dtype)
    return (_turned(query, *cos_sin[0]) * scale).to(dtype), key, source


def _turned(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
