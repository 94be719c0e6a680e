"""Compact slots that are unequal in number from head to head and row to row, packed: no column is padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch

from .kernels.prefix_attention import prefix_attention
from .types import CompactKV


@dataclass(frozen=True)
class RaggedSlots:
    """The slots of one layer, row after row, and within a row KV head after KV head.

    Attributes:
        keys: `[slots, head_dim]` of all rows and heads, rotated.
        values: `[slots, head_dim]`.
        positions: logical positions at which the slots are rotated, `[slots]`.
        beta: additive pre-softmax bias `[slots]`, or None.
        counts: slots of each row and KV head `[batch, kv_heads]`, on the CPU.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    beta: torch.Tensor | None
    counts: torch.Tensor

    @classmethod
    def of(
        cls,
        record: CompactKV,
        spread: Callable[[int, int], torch.Tensor] | None = None,
        rows: torch.Tensor | None = None,
    ) -> RaggedSlots:
        """The slots of a record, without its dead columns.

        Args:
            record: ragged or uniform.
            spread: gives positions `[n]` for `n` slots of a row, as `spread(row, n)`, where the record has none.
            rows: live slots `[batch, kv_heads]`; the record's `row_counts` or all unless given.
        """
        record = as_ragged(record)
        widths = torch.tensor(record.counts).expand(len(record.keys), -1)
        if rows is None:
            rows = widths if record.row_counts is None else torch.tensor(record.row_counts)
        where = None if record.positions is None else record.positions.expand(len(widths), -1)
        flat = [None if x is None else x.flatten(0, 1) for x in (record.keys, record.values, where, record.beta)]
        if not torch.equal(rows, widths):
            index = _spans(widths.flatten().cumsum(0) - rows.flatten(), rows.flatten()).to(record.keys.device)
            flat = [None if x is None else x[index] for x in flat]
        keys, values, where, beta = flat
        if where is None:
            where = torch.cat([spread(row, count) for row, counts in enumerate(rows.tolist()) for count in counts])
        return cls(keys, values, _small(where).to(keys.device), beta, rows.clone())

    @classmethod
    def join(cls, rows: Sequence[RaggedSlots]) -> RaggedSlots:
        """Rows below rows."""
        return cls(
            torch.cat([x.keys for x in rows]),
            torch.cat([x.values for x in rows]),
            torch.cat([x.positions for x in rows]),
            _join_beta(rows),
            torch.cat([x.counts for x in rows]),
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.counts.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and beta."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.beta) if x is not None)

    @cached_property
    def even(self) -> bool:
        """Whether all rows have the same split."""
        return bool((self.counts == self.counts[:1]).all())

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where the slots of each row's each head start, and the end: `batch * kv_heads + 1` numbers."""
        return (0, *self.counts.flatten().cumsum(0).tolist())

    def attend(self, query: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of queries `[batch, query_heads, queries, head_dim]`: output and log-sum-exp.

        Rows with one split are a batch; otherwise all rows are one row, to the kernel, with the heads of all of them.
        """
        batch, heads, queries, _ = query.shape
        if self.even:
            keys, values = (x.unflatten(0, (batch, -1)) for x in (self.keys, self.values))
            bias = None if self.beta is None else self.beta.unflatten(0, (batch, -1))
            return prefix_attention(query, keys, values, bias, scale, self.offsets[: self.counts.shape[1] + 1])
        bias = None if self.beta is None else self.beta[None]
        folded = query.reshape(1, batch * heads, queries, -1)
        out, lse = prefix_attention(folded, self.keys[None], self.values[None], bias, scale, self.offsets)
        return out.view(batch, heads, queries, -1), lse.view(batch, heads, queries)

    def rows(self, indices: torch.Tensor) -> RaggedSlots:
        """These rows `[n]` in this order, or a row of its own for each head of each new row, `[n, kv_heads]`."""
        indices = indices.cpu()
        indices = indices[:, None].expand(-1, self.counts.shape[1]) if indices.ndim == 1 else indices
        starts = torch.tensor(self.offsets[:-1]).view_as(self.counts)
        return self._take(starts.gather(0, indices), self.counts.gather(0, indices))

    def then(self, new: RaggedSlots) -> RaggedSlots:
        """In every row and head the slots of `new` after the own ones."""
        both = RaggedSlots.join([self, replace(new, keys=new.keys.to(self.keys), values=new.values.to(self.values))])
        starts = torch.tensor(both.offsets[:-1]).view(2, *self.counts.shape)
        taken = both._take(starts.movedim(0, -1), torch.stack((self.counts, new.counts), dim=-1))
        return replace(taken, counts=self.counts + new.counts)

    def heads(self, row: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Keys, values `[n, head_dim]` and positions `[n]` of each head of a row."""
        kv_heads = self.counts.shape[1]
        bounds = self.offsets[row * kv_heads : (row + 1) * kv_heads + 1]
        return [(self.keys[a:b], self.values[a:b], self.positions[a:b]) for a, b in pairwise(bounds)]

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[batch, kv_heads, longest, head_dim]`, each head's slots on the right after zeros."""
        longest = int(self.counts.max())
        ends = torch.arange(1, self.counts.numel() + 1) * longest
        index = _spans(ends - self.counts.flatten(), self.counts.flatten()).to(self.keys.device)
        shape = (*self.counts.shape, longest, -1)
        wide = (x.new_zeros(self.counts.numel() * longest, x.shape[1]) for x in (self.keys, self.values))
        keys, values = (w.index_copy(0, index, x) for w, x in zip(wide, (self.keys, self.values), strict=True))
        return keys.view(shape), values.view(shape)

    def live(self) -> torch.Tensor:
        """Which of the columns of `padded` are slots, `[batch, kv_heads, longest]`, on the CPU."""
        longest = int(self.counts.max())
        return torch.arange(longest) >= longest - self.counts[..., None]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> RaggedSlots:
        """The same slots with every stored tensor changed: moved, cloned, or given a storage of its own."""
        keys, values, positions = (change(x) for x in (self.keys, self.values, self.positions))
        return RaggedSlots(keys, values, positions, None if self.beta is None else change(self.beta), self.counts)

    def _take(self, starts: torch.Tensor, counts: torch.Tensor) -> RaggedSlots:
        index = _spans(starts.flatten(), counts.flatten()).to(self.keys.device)
        return RaggedSlots(
            self.keys[index],
            self.values[index],
            self.positions[index],
            None if self.beta is None else self.beta[index],
            counts,
        )


def as_ragged(record: CompactKV) -> CompactKV:
    """A uniform record as a ragged one whose heads have equal counts; a ragged one as it is."""
    if record.counts is not None:
        return record
    heads, slots = record.keys.shape[1:3]
    return CompactKV(
        record.keys.flatten(1, 2),
        record.values.flatten(1, 2),
        None if record.beta is None else record.beta.flatten(1, 2),
        (slots,) * heads,
        None if record.positions is None else record.positions.repeat(1, heads),
    )


def even_positions(positions: torch.Tensor, slots: int) -> torch.Tensor:
    """Positions `[batch or 1, slots]` spread evenly over the span of `positions` and rounded."""
    positions = positions[None] if positions.ndim == 1 else positions
    steps = torch.linspace(0, 1, slots, device=positions.device, dtype=torch.float64)
    first, last = positions[:, :1].double(), positions[:, -1:].double()
    return (first + (last - first) * steps).round().long()


def check_record(layer: int, record: CompactKV, kv_heads: int, head_dim: int, tokens: int, floor: int = 1) -> None:
    """Refuse a ragged record that does not fit the model, its own counts, or the tokens that it stands for.

    Raises:
        ValueError: it names the layer, the head where there is one, and the number.
    """
    counts, batch = record.counts, len(record.keys)
    if len(counts) != kv_heads:
        raise ValueError(
            f"layer {layer} has counts for {len(counts)} KV heads and the model has {kv_heads}: "
            f"the split was made for another model"
        )
    wanted = (batch, sum(counts))
    for name, tensor in (("keys", record.keys), ("values", record.values), ("beta", record.beta)):
        if tensor is not None and (tensor.shape[:2] != wanted or tensor.ndim != (2 if name == "beta" else 3)):
            raise ValueError(
                f"layer {layer} has {name} {list(tensor.shape)}; its counts {list(counts)} sum up to {wanted[1]} "
                f"packed slots, so it must be {[*wanted, *([head_dim] if name != 'beta' else [])]}"
            )
    if record.keys.shape[2] != head_dim:
        raise ValueError(f"layer {layer} has keys of head_dim {record.keys.shape[2]}; the model's is {head_dim}")
    where = record.positions
    if where is not None and (where.ndim != 2 or len(where) not in (1, batch) or where.shape[1] != wanted[1]):
        raise ValueError(f"layer {layer} has positions {list(where.shape)}; they must be [1 or {batch}, {wanted[1]}]")
    for head, count in enumerate(counts):
        if count < floor:
            raise ValueError(f"layer {layer}, KV head {head} has {count} slots; every head needs {floor} or more")
        if count > tokens:
            raise ValueError(
                f"layer {layer}, KV head {head} has {count} slots for {tokens} tokens: "
                f"a compact cache has no more slots than tokens"
            )
    rows = record.row_counts
    if rows is None:
        return
    if len(rows) != batch or any(len(row) != kv_heads for row in rows):
        shape = [len(row) for row in rows]
        raise ValueError(f"layer {layer} has row_counts of {shape} heads; they must be {batch} rows of {kv_heads}")
    for index, row in enumerate(rows):
        for head, (own, count) in enumerate(zip(row, counts, strict=True)):
            if not (floor <= own or not any(row)) or own > count:
                raise ValueError(
                    f"layer {layer}, row {index}, KV head {head} has {own} slots in row_counts; "
                    f"it must have {floor} to {count}"
                )


def _spans(starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Indices `starts[i] .. starts[i] + counts[i]` of every span, one span after the other."""
    first = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + (starts - first).repeat_interleave(counts)


def _small(positions: torch.Tensor) -> torch.Tensor:
    """Whole positions as 32-bit integers, fractional ones in fp32: they are stored beside the slots."""
    return positions.float() if positions.is_floating_point() else positions.int()


def _join_beta(rows: Sequence[RaggedSlots]) -> torch.Tensor | None:
    given = next((x.beta for x in rows if x.beta is not None), None)
    if given is None:
        return None
    return torch.cat([given.new_zeros(len(x.keys)) if x.beta is None else x.beta.to(given) for x in rows])
