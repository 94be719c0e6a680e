"""What no kernel can beat on a chip, from its data sheet: the floors that measurements are held against."""

from __future__ import annotations

from collections.abc import Iterator

from . import arithmetic
from .arithmetic import CHIPS, QWEN3_4B, Work

TOKENS, RATIOS, CHUNK = (8192, 32768, 131072), (8, 50), 8192
SLOTS = (128, 1024, 4096, 16384)
BF16 = 2


def works(tokens: tuple[int, ...] = TOKENS) -> Iterator[tuple[str, str, str, Work]]:
    """Kernel, mode, shape and work of what `still bench` measures on a GPU: 8 KV heads of 128 dims, bf16."""
    heads, dim = QWEN3_4B.kv_heads, QWEN3_4B.head_dim
    for length in tokens:
        yield "strip_rope", "forward", f"T={length}", arithmetic.strip_rope(1, heads, length, dim, BF16)
        for latents in dict.fromkeys((164, 1024, length // 8)):
            for mode in ("forward", "backward"):
                work = arithmetic.latent_attention(mode, 1, heads, length, latents, dim, BF16)
                yield "latent_attention", mode, f"T={length} t={latents}", work
    for slots in SLOTS:
        for mode, batch, queries in (("decode", 1, 1), ("decode", 32, 1), ("question", 1, 512)):
            work = arithmetic.prefix_attention(batch, 4 * heads, queries, slots * heads, heads, dim, BF16)
            yield "prefix_attention", mode, f"t={slots} batch={batch}", work


def compactions(tokens: tuple[int, ...] = TOKENS) -> Iterator[tuple[int, int, bool, float, float]]:
    """Tokens, ratio, whether in chunks of 8,192, operations of compaction and of the prefill, of Qwen3-4B's cache."""
    for length in tokens:
        prefill = QWEN3_4B.prefill(length)
        for ratio in RATIOS:
            pieces = [CHUNK] * (length // CHUNK) + [length % CHUNK] * (length % CHUNK > 0)
            yield length, ratio, True, sum(QWEN3_4B.compaction(n, max(n // ratio, 1)) for n in pieces), prefill
            if length > CHUNK:
                yield length, ratio, False, QWEN3_4B.compaction(length, length // ratio), prefill


def table(chip: str, tokens: tuple[int, ...] = TOKENS) -> str:
    """Both tables as text.

    Raises:
        ValueError: an unknown chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"there are no figures for a chip {chip!r}; there are {', '.join(CHIPS)}")
    roof = CHIPS[chip]
    lines = [
        f"{chip}, by its data sheet: {roof.bandwidth / 1e12:.2f} TB/s, {roof.rate / 1e12:.0f} TFLOP/s in bf16; ridge "
        f"at {roof.rate / roof.bandwidth:.0f} operations a byte. Nothing here is measured.",
        "",
        f"{'kernel':18}{'mode':10}{'shape':20}{'MB':>9}{'GFLOP':>10}{'op/byte':>9}{'floor, us':>11}  bound by",
    ]
    for kernel, mode, shape, work in works(tokens):
        floor, memory = roof.floor(work), work.bytes / roof.bandwidth
        lines.append(
            f"{kernel:18}{mode:10}{shape:20}{work.bytes / 1e6:9.1f}{work.operations / 1e9:10.2f}"
            f"{work.operations / work.bytes:9.1f}{floor * 1e6:11.1f}  {'memory' if floor == memory else 'arithmetic'}"
        )
    lines += ["", "compaction of a Qwen3-4B-shaped cache, all layers:",
              f"{'T':>8}{'ratio':>7}  {'how':16}{'TFLOP':>8}{'prefill':>9}{'share':>8}{'floor, ms':>11}"]  # fmt: skip
    for length, ratio, chunked, work, prefill in compactions(tokens):
        lines.append(
            f"{length:8d}{ratio:6d}x  {'chunks of 8192' if chunked else 'one pass':16}{work / 1e12:8.2f}"
            f"{prefill / 1e12:9.1f}{work / prefill:8.1%}{work / roof.rate * 1e3:11.2f}"
        )
    return "\n".join(lines)
