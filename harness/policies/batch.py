"""Turns of several episodes decoded together: prompts are read alone, as ever, and tokens are decoded in one batch.

Each episode keeps its own cache. For the decoding its columns are copied to a place of its own in larger tensors, each
row at its own logical positions; what was decoded goes back into its cache. Slots that are unequal from head to head
are padded to the widest head there, and what they want beside keys and values is a bias. A turn joins while others are
under way, and leaves as it ends (*continuous batching*: Orca, Yu et al., OSDI 2022), so that none waits for a longer
one.

A step reads several tokens of a row: the last one, and a draft of what may follow (`drafts`; speculative decoding:
Leviathan et al., arXiv 2211.17192). Each token is sampled from the model's logits as it would be without a draft, by
the same random number, and the draft holds as long as it says the same: what is sampled does not change, only how many
forwards it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ...attention import NAME as STILL
from ...attention import Prefix, instead_of_sdpa, take_prefix, with_prefix
from ...cache import StillCache
from ...cache_layer import CompactLayer
from ...calling import passing
from ..sampling import Answer, Request, tried
from ..types import Session
from .drafts import DRAFT, Drafts
from .local import LocalSession, Turn

NAME = "still_batch"
SHRINK = 0.75
"""Share of places in use below which the others are given up, which copies the rest."""
ROOM = 256
"""Columns that are free when places are laid out: as many tokens are decoded before all are copied again."""


class Columns(NamedTuple):
    """What one row keeps in one layer.

    Attributes:
        keys: `[heads, columns, head_dim]`.
        values: `[heads, columns, head_dim]`.
        bias: additive pre-softmax bias `[heads, columns]`; None where all columns are alike.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, layer: CompactLayer, columns: int) -> Columns:
        """The one row of a cache's layer, so many columns in all: each head's packed slots stand before the others."""
        keys, values, prefix = layer.keys[0], layer.values[0], layer.prefix
        if prefix is None:
            return cls(keys, values)
        bias = keys.new_zeros(keys.shape[:2])
        if prefix.bias is not None:
            bias[:, : prefix.length] = prefix.bias[0]
        if (packed := prefix.slots) is not None:
            live = packed.live()[0].to(keys.device)
            slots = Columns(*(x[0] for x in packed.padded()), keys.new_full(live.shape, -torch.inf))
            slots.bias[live] = 0 if packed.beta is None else packed.beta.to(keys.dtype)
            keys, values = (torch.cat(both, dim=1) for both in ((slots.keys, keys), (slots.values, values)))
            bias = torch.cat((slots.bias, bias), dim=1)
        before = columns - keys.shape[1]  # of layers whose widest head is not the widest of all
        return cls(*(F.pad(x, (0, 0, before, 0)) for x in (keys, values)), F.pad(bias, (before, 0), value=-torch.inf))


def columns_of(cache: StillCache) -> int:
    """Columns that a one-row cache takes in a place: slots of the widest head of all layers, and what is dense."""
    widest = (int(layer.ragged.counts.max()) for layer in cache.compact_layers if layer.ragged is not None)
    return cache.compact_layers[0].physical + max(widest, default=0)


@dataclass
class Ahead:
    """Where a step's tokens go, alike in all layers.

    Attributes:
        columns: `[places, width]`; what a row does not need is written over by its next step.
        end: columns that are read.
    """

    columns: torch.Tensor
    end: int


class Places(DynamicLayer):
    """Keys and values of one layer: a row for each turn, from the first column on.

    Args:
        keys: `[places, heads, columns, head_dim]`, finite everywhere.
        values: likewise.
        ahead: of all layers, set anew for each step.

    Attributes:
        bias: additive pre-softmax bias `[places, heads, columns]` of columns that are not alike to all heads; None
            until a row has some.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, ahead: Ahead):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.ahead, self.bias = keys, values, ahead, None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Put the tokens of each row behind its others; see `DynamicLayer.update`."""
        columns, end = self.ahead.columns, self.ahead.end
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = value_states.transpose(1, 2)
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        if self.bias is None:
            return keys, values
        return with_prefix(keys, values, Prefix(end, self.bias[:, :, :end]))

    def get_seq_length(self) -> int:
        """Columns before a step's own."""
        return self.ahead.end - self.ahead.columns.shape[1]

    def put(self, place: int, own: Columns) -> None:
        """Columns of a row, from the first one on."""
        columns = own.keys.shape[1]
        self.keys[place, :, :columns], self.values[place, :, :columns] = own.keys, own.values
        if self.bias is None and own.bias is None:
            return
        if self.bias is None:
            self.bias = self.keys.new_zeros(self.keys.shape[:3])
        self.bias[place] = 0  # of the turn that had the place before
        if own.bias is not None:
            self.bias[place, :, :columns] = own.bias

    def taken(self, place: int, part: slice) -> Columns:
        """Columns of a row, views."""
        bias = None if self.bias is None else self.bias[place, :, part]
        return Columns(self.keys[place, :, part], self.values[place, :, part], bias)


@dataclass(eq=False)
class Row:
    """A turn that is being decoded.

    Attributes:
        request: that it answers.
        turn: so far.
        columns: physical columns of its cache and of what was decoded.
        position: logical position of its next token.
        drafts: of what it goes on with.
    """

    request: Request
    turn: Turn
    columns: int
    position: int
    drafts: Drafts = field(repr=False)

    @property
    def session(self) -> LocalSession:
        """That samples it."""
        return self.request.session

    def next(self) -> list[int]:
        """The token to read, and a draft of those behind it."""
        return [self.turn.output[-1], *self.drafts.draft(min(DRAFT, self.turn.most - len(self.turn.output) - 1))]

    def take(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Choose a token behind each that was read, `logits` `[tokens or more, vocabulary]`, while the draft holds."""
        for place in range(len(tokens)):
            self.session.choose(self.turn, logits[place].float().cpu())
            chosen = self.turn.output[-1]
            self.drafts.add(chosen)
            self.columns, self.position = self.columns + 1, self.position + 1
            if self.turn.done or [chosen] != tokens[place + 1 : place + 2]:
                return


class Batch:
    """Answers the requests of local sessions; see `harness.sampling.Sampler`.

    Greedy tokens are those of sampling alone, but where the two best logits differ by less than rounding: the turn's
    `margin` says so. Sessions that cannot share a batch are sampled one by one.
    """

    def __init__(self):
        self._asked: list[Request] = []
        self._rows: list[Row | None] = []
        self._layers: list[Places] = []
        self._ahead = Ahead(torch.zeros(0, 1, dtype=torch.long), 0)

    def ask(self, request: Request) -> None:
        """Take one more request; its prompt is read when an answer is waited for."""
        self._asked.append(request)

    @torch.no_grad()
    def answered(self) -> list[Answer]:
        """Decode until a turn has ended. An error while decoding answers all turns that were open."""
        ended = self._begin()
        try:
            if not ended:
                with instead_of_sdpa(self._open[0].session.policy.model, NAME, grouped_attention, still=True):
                    while not any(row.turn.done for row in self._open):
                        self._step()
                ended = self._end()
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
            drafts = Drafts([*session.window_ids(), *turn.append_ids], session.policy.written)
            for token in turn.output:
                drafts.add(token)
            joining.append(Row(request, turn, columns_of(cache), cache.logical_length, drafts))
        if joining:
            self._join(joining)
        return ended

    def _join(self, joining: Sequence[Row]) -> None:
        """Give turns places: free ones, or all are laid out anew."""
        free = [place for place, row in enumerate(self._rows) if row is None]
        if len(joining) > len(free) or max(row.columns for row in joining) >= self._columns:
            self._lay_out([*self._open, *joining])
            return
        for place, row in zip(free, joining, strict=False):
            self._rows[place] = row
            self._copy_own(place)

    def _copy_own(self, place: int) -> None:
        """A row's own cache into its place."""
        row = self._rows[place]
        for layer, stored in zip(self._layers, row.session._cache.layers, strict=True):
            layer.put(place, Columns.of(stored, row.columns))

    @property
    def _columns(self) -> int:
        """That there are."""
        return self._layers[0].keys.shape[2] if self._layers else 0

    def _lay_out(self, rows: Sequence[Row]) -> None:
        """Places for these rows alone, with room behind them; those that had a place take their columns along."""
        before, layers = {row: place for place, row in enumerate(self._rows) if row is not None}, self._layers
        self._rows, self._layers = list(rows), []
        columns = max(row.columns for row in rows) + DRAFT + ROOM
        for stored in rows[0].session._cache.layers:
            heads, _, head_dim = stored.keys.shape[1:]
            shape = (len(rows), heads, columns, head_dim)
            # Zeros: what no row has is masked, but even no share of a NaN is one.
            self._layers.append(Places(stored.keys.new_zeros(shape), stored.values.new_zeros(shape), self._ahead))
        for place, row in enumerate(rows):
            if row not in before:
                self._copy_own(place)
                continue
            for old, new in zip(layers, self._layers, strict=True):
                new.put(place, old.taken(before[row], slice(row.columns)))

    def _step(self) -> None:
        """Decode a token of every open turn, or several."""
        rows = self._open
        if max(row.columns for row in rows) + DRAFT >= self._columns or len(rows) <= SHRINK * len(self._rows):
            self._lay_out(rows)
        model = rows[0].session.policy.model
        reading = [[0] if row is None else row.next() for row in self._rows]
        width = max(map(len, reading))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in reading], device=model.device)
        start, positions = (
            torch.tensor([0 if row is None else of(row) for row in self._rows], device=model.device)[:, None]
            + torch.arange(width, device=model.device)
            for of in (lambda row: row.columns, lambda row: row.position)
        )
        ahead = self._ahead
        ahead.columns, ahead.end = start, max(row.columns for row in rows) + width
        seen = torch.arange(ahead.end, device=model.device) <= start[:, None, :, None]
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
        mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, **passing(model, Cache(layers=self._layers)),
            use_cache=True,
        ).logits  # fmt: skip
        for place, row in enumerate(self._rows):
            if row is not None:
                row.take(reading[place], logits[place])

    def _end(self) -> list[Answer]:
        """Let the turns go that are done, and answer them."""
        ended = []
        for place, row in enumerate(self._rows):
            if row is not None and row.turn.done:
                self._give_back(place)
                self._rows[place] = None
                ended.append((row.request, row.session.finish(row.turn)))
        return ended

    def _give_back(self, place: int) -> None:
        """Put a row's decoded columns behind its own cache; the last token that was sampled is not read yet."""
        row = self._rows[place]
        cache = row.session._cache
        store = cache.store if isinstance(cache, StillCache) else cache.update
        decoded = slice(row.columns - len(row.turn.output) + 1, row.columns)
        for index, layer in enumerate(self._layers):
            keys, values = (x[None].clone() for x in layer.taken(place, decoded)[:2])
            store(keys, values, index)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it: sdpa of few queries, whose keys no head copies.

    Heads that share keys stand one behind the other as queries of one; transformers repeats the keys for more than one
    query.

    Args:
        module: the attention layer.
        query: `[batch, query_heads, queries, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`; a bias that it carries is of all keys.
        value: `[batch, kv_heads, keys, head_dim]`.
        attention_mask: added to the scores, `[batch, 1, queries, keys]`.
        scaling: of the scores.
        **kwargs: what sdpa does not do either.

    Returns:
        The output `[batch, queries, query_heads, head_dim]`, and None for the weights.
    """
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    together = query.reshape(batch, key.shape[1], group * queries, -1)
    mask, prefix = attention_mask.repeat(1, 1, group, 1), take_prefix(key, value)
    if prefix is not None:
        mask = mask + prefix.bias[:, :, None]
    out = F.scaled_dot_product_attention(together, key, value, mask, scale=scaling)
    return out.reshape(batch, heads, queries, -1).transpose(1, 2), None


def can_share(session: Session) -> bool:
    """Whether a session's columns can stand beside others': a local model of full attention, and no queries kept."""
    if not isinstance(session, LocalSession) or not session.decodes_here:
        return False
    config = session.policy.model.config.get_text_config(decoder=True)
    return (
        len(session.layers) == config.num_hidden_layers
        and not session.keep_queries
        and session.policy.model.config._attn_implementation in ("sdpa", "eager", STILL)
    )
