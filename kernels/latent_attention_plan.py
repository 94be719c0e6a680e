"""Which kernels `latent_attention` runs, with which blocks: arithmetic on shapes alone, no GPU and no Triton needed."""

from __future__ import annotations

from dataclasses import dataclass, field

WIDEST = {16: (128, 256), 32: (64, 128)}
"""The largest head dim and latent width by bits of a key: wider ones spill registers or overrun shared memory."""

NARROWEST = 33
"""The smallest head dim: blocks are padded to 64, and smaller ones spill on sm_100."""

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
        arch: compute capability of the device, as 80, 90 or 100; 0 in the interpreter.
    """

    head_dim: int
    rotary_dim: int
    width: int
    rotated: bool = True
    bits: int = 16
    arch: int = 90

    @property
    def wide(self) -> bool:
        """Whether blocks are padded to head dims over 64 or latents over 128."""
        return block(self.head_dim) > 64 or block(self.width // 2) > 64

    @property
    def family(self) -> str:
        """GPUs that share a plan; "small" has 99 KiB of shared memory a block, as sm_86, sm_89 and sm_120 have."""
        return {0: "hopper", 9: "hopper", 10: "blackwell"}.get(self.arch // 10, "small")

    def constants(self) -> dict[str, int | bool | str]:
        """Compile-time constants of the kernels; block sizes are powers of two."""
        return {
            "D": self.head_dim, "R": self.rotary_dim, "W": self.width, "ROTATED": self.rotated,
            "BD": block(self.head_dim), "BH": block(self.width // 2), "BW": block(self.width),
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


def unsupported(head_dim: int, width: int, bits: int = 16, arch: int = 90) -> str:
    """Why no kernel takes these widths; empty where they do. `arch` 0 is the interpreter, which has no registers."""
    widest = WIDEST.get(bits if arch else 16, WIDEST[16])
    if head_dim > widest[0] or width > widest[1] or (arch and head_dim < NARROWEST):
        return (
            f"head dim {head_dim} with latents {width} wide: with {bits}-bit keys the kernels take head dims from "
            f"{NARROWEST} to {widest[0]} and widths to {widest[1]}"
        )
    return ""


def one_pass(latents: int, shape: Shape) -> bool:
    """Whether a layer whose largest head has `latents` latents runs in one pass.

    W_k stays on the chip there: 128 KiB at head dim 128 in half precision, which needs a data-centre Hopper or
    Blackwell; fp32 has no room for it anywhere.
    """
    fits = shape.bits == 16 and (not shape.wide or shape.family in ("hopper", "blackwell"))
    return latents <= FEW_LATENTS and (fits or not shape.arch)


def config(kernel: str, shape: Shape, SOURCE: bool = False) -> Config:
    """The blocks of one kernel on one shape; `SOURCE` where its gradients go on to keys and values."""
    name = f"{kernel}, source" if SOURCE else kernel
    wide = "wide" if shape.wide else "narrow"
    names = (shape.family, shape.bits, wide), (shape.bits, wide)
    return next(CONFIGS[each][name] for each in (*names, ()) if name in CONFIGS.get(each, {}))


CONFIGS: dict[tuple, dict[str, Config]] = {
    # Chosen on sm_90; what holds elsewhere too is not repeated. The largest blocks that do not spill come first.
    (): {
        "project_kernel": Config({"BT": 64, "BK": 32}),
        "attend_kernel": Config({"BQ": 128, "BT": 64}),
        "one_pass_kernel": Config({"BQ": FEW_LATENTS, "BT": 32}, stages=1),
        "query_grad_kernel": Config({"BQ": 64, "BT": 64}),
        "key_grad_kernel": Config({"BQ": 64, "BT": 64}),
        "key_grad_kernel, source": Config({"BQ": 64, "BT": 64}),
        "weight_grad_kernel": Config({"BM": 64, "BT": 64}, warps=4, stages=3),
    },
    (16, "wide"): {"key_grad_kernel, source": Config({"BQ": 32, "BT": 32})},
    (32, "narrow"): {
        "project_kernel": Config({"BT": 64, "BK": 16}),
        "attend_kernel": Config({"BQ": 32, "BT": 32}),
        "query_grad_kernel": Config({"BQ": 32, "BT": 32}),
        "key_grad_kernel": Config({"BQ": 32, "BT": 32}),
        "key_grad_kernel, source": Config({"BQ": 16, "BT": 32}, stages=1),
        "weight_grad_kernel": Config({"BM": 64, "BT": 64}),
    },
    ("small", 16, "wide"): {
        "project_kernel": Config({"BT": 64, "BK": 16}),
        "attend_kernel": Config({"BQ": 64, "BT": 32}),
        "query_grad_kernel": Config({"BQ": 64, "BT": 32}, stages=1),
        "key_grad_kernel": Config({"BQ": 16, "BT": 64}),
        "key_grad_kernel, source": Config({"BQ": 16, "BT": 64}),
    },
    ("small", 16, "narrow"): {
        "key_grad_kernel": Config({"BQ": 32, "BT": 64}),
        "key_grad_kernel, source": Config({"BQ": 16, "BT": 64}),
    },
    ("blackwell", 16, "wide"): {
        "key_grad_kernel": Config({"BQ": 64, "BT": 64}, stages=1),
        "key_grad_kernel, source": Config({"BQ": 32, "BT": 64}),
    },
    ("blackwell", 32, "narrow"): {
        "project_kernel": Config({"BT": 64, "BK": 32}),
        "query_grad_kernel": Config({"BQ": 32, "BT": 16}, stages=1),
        "key_grad_kernel": Config({"BQ": 16, "BT": 16}, stages=1),
        "key_grad_kernel, source": Config({"BQ": 16, "BT": 16}, stages=1),
    },
}


def parts(tokens: int, programs: int, processors: int, least: int) -> int:
    """How many parts of the tokens, `least` tokens or more each, fill a chip twice with `programs` programs a part."""
    return max(1, min(-(-2 * processors // programs), tokens // least))


def chunk(tokens: int) -> int:
    """Tokens that the backward pass takes at a time: an eighth, where that still fills a chip."""
    return min(tokens, max(2048, -(-tokens // 8 // 128) * 128))
