"""Turns of several episodes decoded together: prompts are read alone, as ever, and tokens are decoded in one batch.

Each episode keeps its own cache. For the decoding its columns are copied to a place of its own in larger tensors, the
last ones at one edge for all, each row at its own logical positions; what was decoded goes back into its cache. A turn
joins while others are under way, and leaves as it ends (*continuous batching*: Orca, Yu et al., OSDI 2022), so that
none waits for a longer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ...calling import passing
from ..sampling import Answer, Request, tried
from ..types import Session
from .local import LocalSession, Turn

SHRINK = 0.75
"""Share of places in use below which the others are given up, which copies the rest."""
ROOM = 256
"""Columns that are free when places are laid out: as many tokens are decoded before all are copied again."""


@dataclass
class Span:
    """The columns that any row has, `[start, end)`, of all that there are."""

    start: int
    end: int
    columns: int


class Places(DynamicLayer):
    """Keys and values of one layer: a row for each turn, right-aligned at the span's end, where a step's tokens go.

    Args:
        keys: `[places, heads, columns, head_dim]`, finite everywhere.
        values: likewise.
        span: of all layers.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, span: Span):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.span = keys, values, span

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Put a token of each row behind the span; see `DynamicLayer.update`."""
        start, end = self.span.start, self.span.end
        self.keys[:, :, end], self.values[:, :, end] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys[:, :, start : end + 1], self.values[:, :, start : end + 1]

    def get_seq_length(self) -> int:
        """Columns before a step's own."""
        return self.span.end - self.span.start

    def put(self, place: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Columns `[heads, columns, head_dim]` of a row."""
        first, end = self.span.end - keys.shape[1], self.span.end
        self.keys[place, :, first:end], self.values[place, :, first:end] = keys, values

    def last(self, place: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last columns of a row, views."""
        part = slice(self.span.end - columns, self.span.end)
        return self.keys[place, :, part], self.values[place, :, part]


@dataclass(eq=False)
class Row:
    """A turn that is being decoded.

    Attributes:
        request: that it answers.
        turn: so far.
        columns: physical columns of its cache and of what was decoded.
        position: logical position of its next token.
    """

    request: Request
    turn: Turn
    columns: int
    position: int

    @property
    def session(self) -> LocalSession:
        """That samples it."""
        return self.request.session


class Batch:
    """Answers the requests of local sessions; see `harness.sampling.Sampler`.

    Greedy tokens are those of sampling alone, but where the two best logits differ by less than rounding: the turn's
    `margin` says so. Sessions that cannot share a batch are sampled one by one.
    """

    def __init__(self):
        self._asked: list[Request] = []
        self._rows: list[Row | None] = []
        self._layers: list[Places] = []
        self._span = Span(0, 0, 0)

    def ask(self, request: Request) -> None:
        """Take one more request; its prompt is read when an answer is waited for."""
        self._asked.append(request)

    @torch.no_grad()
    def answered(self) -> list[Answer]:
        """Decode until a turn has ended. An error while decoding answers all turns that were open."""
        ended = self._begin()
        try:
            while not ended:
                ended = self._step()
        except Exception as problem:
            if not self._open:
                raise
            ended = [(row.request, problem) for row in self._open]
            self._rows, self._layers = [], []
        return ended

    @property
    def _open(self) -> list[Row]:
        return [row for row in self._rows if row is not None]

    def _begin(self) -> list[Answer]:
        """Read the prompts of what was asked for; those turns join that are not answered by it."""
        ended, joining, asked = [], [], self._asked
        self._asked = []
        for request in asked:
            session, others = request.session, [*self._open, *joining]
            if not can_share(session) or (others and others[0].session.policy is not session.policy):
                ended.append(tried(request))
                continue
            try:
                turn = session.begin(request.limit)
                if turn.done:
                    ended.append((request, session.finish(turn)))
                    continue
            except Exception as problem:
                ended.append((request, problem))
                continue
            cache = session._cache
            joining.append(Row(request, turn, cache.physical_length, cache.logical_length))
        if joining:
            self._join(joining)
        return ended

    def _join(self, joining: Sequence[Row]) -> None:
        """Give turns places: free ones, or all are laid out anew."""
        free = [place for place, row in enumerate(self._rows) if row is None]
        if len(joining) > len(free) or max(row.columns for row in joining) > self._span.end:
            self._lay_out([*self._open, *joining])
            return
        for place, row in zip(free, joining, strict=False):
            self._rows[place] = row
            self._copy_own(place)

    def _copy_own(self, place: int) -> None:
        """A row's own cache into its place."""
        own = self._rows[place].session._cache
        for layer, stored in zip(self._layers, own.layers, strict=True):
            layer.put(place, stored.keys[0], stored.values[0])

    def _lay_out(self, rows: Sequence[Row]) -> None:
        """Places for these rows alone, with room behind them; those that had a place take its columns along."""
        before, layers = {row: place for place, row in enumerate(self._rows) if row is not None}, self._layers
        end = max(row.columns for row in rows)
        self._span, self._rows = Span(0, end, end + ROOM), list(rows)
        self._layers = []
        for stored in rows[0].session._cache.layers:
            heads, _, head_dim = stored.keys.shape[1:]
            shape = (len(rows), heads, self._span.columns, head_dim)
            # Zeros: what no row has is masked, but even no share of a NaN is one.
            self._layers.append(Places(stored.keys.new_zeros(shape), stored.values.new_zeros(shape), self._span))
        for place, row in enumerate(rows):
            if row not in before:
                self._copy_own(place)
                continue
            for old, new in zip(layers, self._layers, strict=True):
                new.put(place, *old.last(before[row], row.columns))

    def _step(self) -> list[Answer]:
        """Decode a token of every open turn; answers those that end."""
        rows = self._open
        if self._span.end == self._span.columns or len(rows) <= SHRINK * len(self._rows):
            self._lay_out(rows)
        model, span = rows[0].session.policy.model, self._span
        widest = max(row.columns for row in rows)
        span.start = span.end - widest
        columns, positions, last = (
            torch.tensor([0 if row is None else of(row) for row in self._rows], device=model.device)[:, None]
            for of in (lambda row: row.columns, lambda row: row.position, lambda row: row.turn.output[-1])
        )
        mask = (torch.arange(widest + 1, device=model.device) >= widest - columns).long()
        logits = model(
            input_ids=last, attention_mask=mask, position_ids=positions, **passing(model, Cache(layers=self._layers)),
            use_cache=True,
        ).logits[:, -1].float().cpu()  # fmt: skip
        span.end += 1
        ended = []
        for place, row in enumerate(self._rows):
            if row is None:
                continue
            row.columns, row.position = row.columns + 1, row.position + 1
            row.session.choose(row.turn, logits[place])
            if row.turn.done:
                self._give_back(place)
                self._rows[place] = None
                ended.append((row.request, row.session.finish(row.turn)))
        return ended

    def _give_back(self, place: int) -> None:
        """Put a row's decoded columns behind its own cache; the last token that was sampled is not read yet."""
        row = self._rows[place]
        for index, layer in enumerate(self._layers):
            keys, values = (x[None].clone() for x in layer.last(place, len(row.turn.output) - 1))
            row.session._cache.update(keys, values, index)


def can_share(session: Session) -> bool:
    """Whether a session's columns can stand beside others': a local model of full attention, no queries, no beta."""
    if not isinstance(session, LocalSession) or not session.decodes_here:
        return False
    config = session.policy.model.config.get_text_config(decoder=True)
    return (
        len(session.layers) == config.num_hidden_layers
        and not session.keep_queries
        and session.policy.model.config._attn_implementation in ("sdpa", "eager")
    )
