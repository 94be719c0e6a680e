"""Strip rotary position embeddings from keys, and restore them, by split halves as transformers' models rotate.

A model gives its tables (cos and sin, which know its base, scaling, attention factor and partial rotary); or positions
and inverse frequencies are given, and the kernel computes the angles itself and reads no tables at all.
"""

from __future__ import annotations

import torch

from . import dispatch

FARTHEST = 2**24
"""Positions are exact in fp32 below this. On a CPU others are refused; on a GPU keys there become NaN."""


def strip_rope(
    keys: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    positions: torch.Tensor | None = None,
    frequencies: torch.Tensor | None = None,
    scaling: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Undo the rotation of `restore_rope`. Tables scaled by an attention factor `s` are divided by `s**2`.

    Args:
        keys: `[batch, heads, tokens, head_dim]`, bf16, fp16 or fp32; the arithmetic is in fp32.
        cos: `[batch or 1, tokens or 1, rotary_dim]` as the model's rotary module makes it, each frequency in both
            halves (the first half is read); dims from `rotary_dim` on are left alone.
        sin: like `cos`.
        positions: in the place of `cos` and `sin`: `[tokens]` or `[batch or 1, tokens]`, integers or fractions.
        frequencies: with `positions`: inverse frequencies `[rotary_dim / 2]`, a rotary module's `inv_freq`.
        scaling: with `positions`: the attention factor, a rotary module's `attention_scaling`.
        out: write into this and return it: `keys` themselves, or floats of their shape that share no memory with them
            (fp32 from half precision loses nothing).

    Returns:
        The keys before rotation, in the dtype of `keys` unless `out` has another. Gradients reach `keys`, not the
        tables.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or positions lie beyond 2**24 (on a GPU, where
            nothing is read back, keys at such positions become NaN instead); `out` is no place for them, or is other
            memory than `keys` where a gradient is wanted.
    """
    return _turn("strip_rope", keys, cos, sin, positions, frequencies, scaling, out)


def restore_rope(
    keys: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    positions: torch.Tensor | None = None,
    frequencies: torch.Tensor | None = None,
    scaling: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate keys as the model does; arguments as `strip_rope` has them."""
    return _turn("restore_rope", keys, cos, sin, positions, frequencies, scaling, out)


def turn_reference(keys, cos, sin, inverse: bool, divide: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rotate by half tables `[batch or 1, tokens, rotary_dim / 2]`; backwards if `inverse`, over `s**2` if `divide`."""
    half, wide = cos.shape[-1], torch.promote_types(keys.dtype, torch.float32)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    if divide:
        square = cos.square() + sin.square()
        cos, sin = cos / square, sin / square
    if inverse:
        sin = -sin
    x = keys.to(wide)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if out is None or out.dtype != wide:
        turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        whole = torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1)
        return whole.to(keys.dtype) if out is None else out.copy_(whole)
    # Passes over memory are what this costs: none for a copy of the whole.
    to_first, to_second = out[..., :half], out[..., half : 2 * half]
    if out is keys:
        first = first.clone()
        to_first.mul_(cos).addcmul_(second, sin, value=-1)
        to_second.mul_(cos).addcmul_(first, sin)
        return out
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    if rest.shape[-1]:
        out[..., 2 * half :].copy_(rest)
    return out


def angles(positions: torch.Tensor, frequencies: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Half tables `[batch or 1, tokens, rotary_dim / 2]`, as a model's rotary module computes them in fp32."""
    where = positions.float()
    where = where.masked_fill(~(where.abs() < FARTHEST), torch.nan)  # on a GPU positions are not read back
    angle = where.unsqueeze(-1) * frequencies.float()
    return angle.cos() * scaling, angle.sin() * scaling


def _turn(operation, keys, cos, sin, positions, frequencies, scaling, out) -> torch.Tensor:
    if positions is not None and positions.ndim == 1:
        positions = positions[None]
    _check(operation, keys, cos, sin, positions, frequencies, out)
    strip = operation == "strip_rope"
    tables = (cos, sin) if positions is None else (positions, frequencies)
    if dispatch.runs_triton(operation, [keys, *tables], lambda: _obstacle(keys, tables, out)):
        from .rope_triton import Turn

        turned = Turn.apply(keys, *(x.detach() for x in tables), scaling, positions is not None, strip, strip, out)
        return turned if out is None or out is keys else out  # autograd hands on an alias of what it was handed
    if positions is not None:
        cos, sin = angles(positions, frequencies, scaling)
    else:
        cos, sin = (x.detach()[..., : x.shape[-1] // 2] for x in (cos, sin))
    return turn_reference(keys, cos, sin, inverse=strip, divide=strip, out=out)


def _obstacle(keys, tables, out) -> str:
    written = keys if out is None else out
    named = ("keys", keys), ("out", written), ("cos or positions", tables[0]), ("sin or frequencies", tables[1])
    for name, x in named:
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"the last dim of {name} must be contiguous (its strides are {list(x.stride())})"
        if sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31:
            return f"a row of {name} spans 2**31 elements or more"
    if keys.shape[-1] > 512:
        return f"it takes head dims up to 512, not {keys.shape[-1]}"
    return f"it takes batches up to 65535, not {keys.shape[0]}" if keys.shape[0] > 65535 else ""


def _check(operation, keys, cos, sin, positions, frequencies, out) -> None:
    given = {"keys": keys, "cos": cos, "sin": sin, "positions": positions, "frequencies": frequencies}
    given = {name: x for name, x in given.items() if x is not None}

    def refuse(reason: str) -> None:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in given.items())
        raise ValueError(f"{operation}: {reason}; {shapes}")

    if set(given) not in ({"keys", "cos", "sin"}, {"keys", "positions", "frequencies"}):
        refuse(f"give cos and sin, or positions and frequencies, not {', '.join(given)}")
    if keys.ndim != 4 or not keys.is_floating_point():
        refuse(f"keys must be floats [batch, heads, tokens, head_dim], not {keys.dtype}")
    batch, _, tokens, head_dim = keys.shape
    table = positions if cos is None else cos
    if table.ndim != (2 if cos is None else 3) or table.shape[0] not in (1, batch) or table.shape[1] not in (1, tokens):
        refuse(f"tables and positions need one row for all or for each of {batch}, and 1 or {tokens} tokens")
    if cos is not None and (cos.shape != sin.shape or cos.dtype != sin.dtype or cos.shape[-1] % 2):
        refuse(f"cos and sin must share an even width and a dtype (got {cos.dtype} and {sin.dtype})")
    if frequencies is not None and frequencies.ndim != 1:
        refuse("frequencies must be [rotary_dim / 2]")
    rotary_dim = cos.shape[-1] if cos is not None else 2 * len(frequencies)
    if not 0 < rotary_dim <= head_dim:
        refuse(f"{rotary_dim} rotated dims do not fit into a head dim of {head_dim}")
    if any(x.device != keys.device for x in given.values()):
        refuse(f"all must be on one device, not {', '.join(sorted({str(x.device) for x in given.values()}))}")
    if positions is not None and positions.device.type == "cpu" and positions.numel():
        farthest = positions.abs().max().item()
        if not farthest < FARTHEST:
            refuse(f"a position of {farthest} is out of range: fp32 counts exactly up to 2**24")
    if out is None:
        return
    if out.shape != keys.shape or out.device != keys.device or not out.is_floating_point():
        refuse(f"out must be floats like keys, not {out.dtype} {list(out.shape)} on {out.device}")
    if _aliases(out):
        refuse(f"out has strides that alias ({list(out.stride())}) and cannot be written to; clone it")
    if out is not keys and out.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr():
        refuse("out shares the keys' memory; give the keys themselves, or memory of its own")
    if out is not keys and torch.is_grad_enabled() and (keys.requires_grad or out.requires_grad):
        refuse("no gradient flows through out; leave it out, or give the keys themselves")


def _aliases(x: torch.Tensor) -> bool:
    """Whether two elements may share memory: some dim steps no farther than the smaller ones reach."""
    reach = 0
    for stride, size in sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
