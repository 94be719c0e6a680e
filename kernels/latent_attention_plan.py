"""Which kernels `latent_attention` runs, with which blocks: arithmetic on shapes alone, no GPU and no Triton needed."""

from __future__ import annotations

from dataclasses import dataclass, field

FEW_LATENTS = 64
"""Up to so many latents a head, one pass beats a buffer of keys.

Per token and head, with latents of width W = 2 D: making a key costs 2 W^2 operations, attending to it 4 W per latent.
One block of latents makes each key once, as the buffer does, and saves writing and reading 3 D numbers per token; a
second block would make every key twice.
"""


@dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for.

    Attributes:
        head_dim: of keys and values.
        rotary_dim: leading dims that the model rotates.
        width: of latents and projected keys.
        rotated: whether the keys still carry the model's RoPE.
        bits: of a key's number: 16 or 32.
        arch: compute capability of the device, as 80, 90 or 100.
    """

    head_dim: int
    rotary_dim: int
    width: int
    rotated: bool = True
    bits: int = 16
    arch: int = 90

    def constants(self) -> dict[str, int | bool | str]:
        """Compile-time constants of the kernels; block sizes are powers of two."""
        rest = self.head_dim - self.rotary_dim
        return {
            "D": self.head_dim, "R": self.rotary_dim, "W": self.width, "ROTATED": self.rotated,
            "BR": block(self.rotary_dim // 2), "BE": block(rest), "BD": block(self.head_dim),
            "BH": block(self.width // 2), "BW": block(self.width),
            "PRECISION": "tf32x3" if self.bits == 32 else "ieee",
        }  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One compiled kernel: its block sizes beside `Shape.constants`, warps, and stages of the software pipeline."""

    blocks: dict[str, int] = field(default_factory=dict)
    warps: int = 8
    stages: int = 2


def block(size: int) -> int:
    """The power of two that holds `size`; the matrix units need 16."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


def unsupported(head_dim: int, width: int) -> str | None:
    """Why no kernel takes these widths, or None."""
    if head_dim > 128 or width > 256:
        return f"head dim {head_dim} with latents {width} wide: the kernels take head dims to 128 and widths to 256"
    return None


def one_pass(latents: int, shape: Shape) -> bool:
    """Whether a layer whose largest head has `latents` latents runs in one pass."""
    return latents <= FEW_LATENTS and shape.width <= 256


def config(kernel: str, shape: Shape, SOURCE: bool = False) -> Config:
    """The blocks of one kernel on one shape."""
    return {
        "project_kernel": Config({"BT": 64, "BK": 32}),
        "attend_kernel": Config({"BQ": 128, "BT": 64}),
        "one_pass_kernel": Config({"BQ": 64, "BT": 32}, stages=1),
        "query_grad_kernel": Config({"BQ": 64, "BT": 64}),
        "key_grad_kernel": Config({"BQ": 64, "BT": 64}),
        "weight_grad_kernel": Config({"BM": 64, "BT": 64}, warps=4, stages=3),
    }[kernel]


def parts(tokens: int, programs: int, processors: int, least: int) -> int:
    """How many parts of the tokens, `least` tokens or more each, fill a chip twice with `programs` programs a part."""
    return max(1, min(-(-2 * processors // programs), tokens // least))


def chunk(tokens: int) -> int:
    """Tokens that the backward pass takes at a time: an eighth, where that still fills a chip."""
    return min(tokens, max(2048, -(-tokens // 8 // 128) * 128))
