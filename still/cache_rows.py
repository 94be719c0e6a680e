"""Rows of a batch that differ: which columns are real, and how rows are taken apart and packed again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention import Receipt
from .cache_compaction import Packed
from .cache_ragged import RaggedSlots


@dataclass
class Columns:
    """What is known of the attention mask over a cache's logical columns; the layers of a cache share one.

    Attributes:
        mask: `[batch, known]` on the CPU, True at real tokens; columns beyond are real. None: no row is padded.
        prompted: logical length at which inputs were last made for these rows, None where they never were.
        padded: logical length at which a mask over padded slots was last made, None where none was.
        warned: whether the user has been told that compaction waits.
        handed: of what a layer last gave its attention beyond the stored columns, until the next layer looks at it.
    """

    mask: torch.Tensor | None = None
    prompted: int | None = None
    padded: int | None = None
    warned: bool = False
    handed: Receipt | None = None

    def read(self, start: int, count: int, batch: int) -> torch.Tensor | None:
        """The mask `[batch, count]` of columns from `start` on, or None where all of them are real."""
        if self.mask is None or start >= self.mask.shape[1]:
            return None
        part = self.mask[:, start : start + count]
        if part.all():
            return None
        part = torch.nn.functional.pad(part, (0, count - part.shape[1]), value=True)
        return widen(part, batch)

    def whole(self, length: int, batch: int) -> torch.Tensor:
        """The mask `[batch, length]` of all columns."""
        part = self.read(0, length, batch)
        return torch.ones(batch, length, dtype=torch.bool) if part is None else part


def widen(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat the rows of a table, each next to its copies, up to `batch` rows.

    Raises:
        ValueError: `batch` is no multiple of the rows.
    """
    if batch % len(rows):
        raise ValueError(f"a cache of {len(rows)} rows cannot serve a batch of {batch}; give a multiple of its rows")
    return rows if batch == len(rows) else rows.repeat_interleave(batch // len(rows), dim=0)


def right_padded(mask: torch.Tensor) -> int | None:
    """The first row of a mask `[batch, tokens]` that is padded right of a token, None where none is."""
    ends = mask[:, :-1] & ~mask[:, 1:]
    return int(ends.any(-1).int().argmax()) if ends.any() else None


def left_padded_lengths(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Real tokens `[batch]` of each row of a left-padded mask `[batch, tokens]`.

    Raises:
        ValueError: the mask has another length, an empty row, or padding right of a token.
    """
    if mask.ndim != 2 or mask.shape[1] != tokens:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; it must be [batch, {tokens}]")
    mask = mask.bool()
    lengths = mask.sum(-1)
    if not lengths.all():
        raise ValueError(f"row {int(lengths.argmin())} of attention_mask has no token; leave empty rows out")
    if (row := right_padded(mask)) is not None:
        raise ValueError(f"row {row} of attention_mask is padded right of a token; pad on the left")
    return lengths


def take_apart(
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_positions: torch.Tensor,
    beta: torch.Tensor | None,
    live: torch.Tensor | None,
    lengths: torch.Tensor,
    ragged: RaggedSlots | None = None,
) -> list[Packed]:
    """The dense rows, one by one, of a layer whose slots and tokens stand among dead columns.

    Args:
        keys: `[batch, kv_heads, physical, head_dim]`; in each row the live slots come before the live tokens.
        values: `[batch, kv_heads, physical, head_dim]`.
        slot_positions: `[batch or 1, slots]`, -1 at dead slots, which stand on the left.
        beta: `[batch, kv_heads, slots]`, or None.
        live: `[batch, physical]`, or None where all columns are.
        lengths: real tokens that each row stands for.
        ragged: packed slots, which stand before the columns.
    """
    rows = []
    for row in range(len(keys)):
        which = slice(None) if live is None else live[row]
        where = slot_positions[row if len(slot_positions) > 1 else 0]
        alive = where >= 0
        rows.append(
            Packed(
                keys[row : row + 1, :, which],
                values[row : row + 1, :, which],
                where[alive][None],
                None if beta is None else beta[row : row + 1, :, alive],
                int(lengths[row]),
                None if ragged is None else ragged.rows(torch.tensor([row])),
            )
        )
    return rows


def pack(rows: list[Packed]) -> tuple[Packed, torch.Tensor | None]:
    """Right-align dense rows of unequal widths, slots before tokens. If the slots of one are packed, all are.

    Returns:
        One `Packed` whose slots have position -1 where they are dead (its `logical` is the longest row's), and the live
        columns `[batch, physical]`, None where all are.
    """
    if any(row.ragged is not None for row in rows):
        rows = [row.as_ragged() for row in rows]
    width, slots = max(row.keys.shape[2] for row in rows), max(row.slots for row in rows)
    pad = torch.nn.functional.pad

    def left(x: torch.Tensor, size: int, value: float = 0) -> torch.Tensor:
        return pad(x, (0, 0) * (x.ndim == 4) + (size - x.shape[2 if x.ndim > 2 else 1], 0), value=value)

    live = torch.stack([torch.arange(width, device=row.keys.device) >= width - row.keys.shape[2] for row in rows])
    betas = [row.beta for row in rows]
    if any(beta is not None for beta in betas):
        betas = [
            row.keys.new_zeros(*row.keys.shape[:2], row.slots) if row.beta is None else row.beta for row in rows
        ]
    packed = Packed(
        torch.cat([left(row.keys, width) for row in rows]),
        torch.cat([left(row.values, width) for row in rows]),
        torch.cat([left(row.slot_positions, slots, -1) for row in rows]),
        None if betas[0] is None else torch.cat([left(beta, slots) for beta in betas]),
        max(row.logical for row in rows),
        None if rows[0].ragged is None else RaggedSlots.join([row.ragged for row in rows]),
    )
    return packed, None if live.all() else live


def prefix_bias(
    width: int, slot_positions: torch.Tensor, beta: torch.Tensor | None, live: torch.Tensor
) -> torch.Tensor:
    """Additive bias `[batch, kv_heads or 1, width]` of a row's old columns: beta at its slots, -inf at dead ones."""
    dead = torch.zeros(live.shape, device=live.device).masked_fill(~live, -torch.inf)[:, None]
    if beta is None:
        return dead
    bias = dead.expand(-1, beta.shape[1], -1).clone()
    alive = (slot_positions >= 0).expand(len(live), -1)
    for row in range(len(live)):
        columns = live[row].nonzero()[: int(alive[row].sum()), 0]
        bias[row, :, columns] = beta[row, :, alive[row]].float()
    return bias[:, :, :width]
