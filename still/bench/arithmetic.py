"""The fewest bytes and operations that each kernel's work takes, whoever does it, and how long chips need for them.

Arithmetic on shapes alone. An operation is half of a multiplication with its addition; matrix products alone are
counted but for `strip_rope`, which has none. Every input is read once and every output written once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What has to be done.

    Attributes:
        bytes: to and from memory.
        operations: of arithmetic.
    """

    bytes: float
    operations: float


@dataclass(frozen=True)
class Roof:
    """What a device can do.

    Attributes:
        bandwidth: read and written bytes a second.
        rate: operations a second in a matrix product.
    """

    bandwidth: float
    rate: float

    def floor(self, work: Work) -> float:
        """Seconds below which the work cannot be done: the larger of its memory's and its arithmetic's."""
        return max(work.bytes / self.bandwidth, work.operations / self.rate)


CHIPS = {"h100": Roof(3.35e12, 989e12), "h200": Roof(4.8e12, 989e12)}
"""Data sheets of the SXM modules: memory bandwidth, and dense bf16 with fp32 accumulation. Copies reach about 90 % of
the one and large matrix products 60 to 75 % of the other, so `still bench` measures both before it speaks of shares."""


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder with grouped-query attention and a gated feed-forward part."""

    hidden: int
    intermediate: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    def prefill(self, tokens: int, start: int = 0) -> float:
        """Operations of reading `tokens` tokens after `start` others, without logits; attention's causal half alone.

        Per layer `2 n (2 h a + 2 h k + 3 h m)` and `4 a (n s + n^2 / 2)`: h hidden, a = query heads x d, k = KV heads
        x d, m intermediate.
        """
        a, k = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        linear = 2 * tokens * self.hidden * (2 * a + 2 * k + 3 * self.intermediate)
        return self.layers * (linear + 4 * a * (tokens * start + tokens**2 / 2))

    def compaction(self, tokens: int, slots: int, blocks: int = 2) -> float:
        """Operations of compacting all layers of one row in one pass, canonical latents of width w = 2 d.

        Per layer, KV head and block: keys `2 T w^2`; scores and weighted sum `4 t T w`; query, value and output
        `6 t w^2`; self-attention `8 t w^2 + 4 t^2 w`. Per layer and KV head: the two heads `4 t w d`.
        """
        w = 2 * self.head_dim
        block = 2 * tokens * w**2 + 4 * slots * tokens * w + 14 * slots * w**2 + 4 * slots**2 * w
        return self.layers * self.kv_heads * (blocks * block + 2 * slots * w**2)

    def cache_bytes(self, tokens: int, size: int = 2) -> int:
        """Bytes of the keys and values of one row, numbers of `size` bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * size


QWEN3_4B = Decoder(hidden=2560, intermediate=9728, layers=36, query_heads=32, kv_heads=8, head_dim=128)


def strip_rope(batch: int, heads: int, tokens: int, head_dim: int, size: int) -> Work:
    """Keys in and out; three multiplications and additions a number, the angles not counted."""
    numbers = batch * heads * tokens * head_dim
    return Work(2 * numbers * size, 3 * numbers)


def latent_attention(
    mode: str, batch: int, heads: int, tokens: int, latents: int, head_dim: int, size: int, width: int | None = None
) -> Work:
    """One cross-attention of one layer, `W_v` left out, as the kernels leave it.

    Forward: keys `2 T w 2d`, scores `2 t T w`, weighted sum `2 t T 2d`. Backward: scores, their slopes, and the
    gradients of queries, keys and `W_k`. The scores are made again, as every flash attention does; keys could be kept.
    """
    width = width or 2 * head_dim
    project = 2 * batch * heads * tokens * width * 2 * head_dim
    scores, mixed = (2 * batch * heads * tokens * latents * n for n in (width, 2 * head_dim))
    source = 2 * batch * heads * tokens * head_dim * size
    outputs = batch * heads * latents * (width + 2 * head_dim) * size
    if mode == "forward":
        return Work(source + outputs, project + scores + mixed)
    return Work(source + 2 * outputs, project + 3 * scores + mixed)


def prefix_attention(
    batch: int, query_heads: int, queries: int, slots: int, kv_heads: int, head_dim: int, size: int, bias: bool = False
) -> Work:
    """`slots` of all KV heads together are read once, whatever the query heads; each of those has its own products."""
    numbers = batch * slots * (2 * head_dim + bias) + 2 * batch * query_heads * queries * head_dim
    lse = 4 * batch * query_heads * queries
    return Work(numbers * size + lse, 4 * batch * slots * (query_heads // kv_heads) * queries * head_dim)
