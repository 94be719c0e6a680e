"""Turns of several episodes sampled together: prompts are read alone, as ever, and tokens are decoded in one batch.

Each episode keeps its own cache. For the decoding their columns stand side by side, padded on the left, each row at
its own logical positions; what was decoded goes back into each cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..types import Limit, Sampled, Session
from .local import LocalSession, Turn

SHRINK = 0.75
"""Share of open rows below which finished ones are dropped, which copies the cache."""
ROOM = 256
"""Columns that are free when a cache is copied: as many tokens are decoded before the next copy."""


class RoomyLayer(DynamicLayer):
    """Keys and values at the front of larger tensors: a token is written behind them, and nothing is copied for it."""

    _buffers: tuple[torch.Tensor, ...] = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Put columns behind those that are there; see `DynamicLayer.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used, new = self.get_seq_length(), (key_states, value_states)
        end = used + key_states.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            self._buffers = tuple(x.new_empty(*x.shape[:-2], end + ROOM, x.shape[-1]) for x in new)
            if used:
                for buffer, stored in zip(self._buffers, (self.keys, self.values), strict=True):
                    buffer[..., :used, :] = stored
        for buffer, columns in zip(self._buffers, new, strict=True):
            buffer[..., used:end, :] = columns
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows; they are copied into tensors of their own."""
        super().batch_select_indices(indices)
        self._buffers = ()


@torch.no_grad()
def sample_together(requests: Sequence[tuple[Session, Limit]]) -> list[Sampled]:
    """One turn for each session; those that cannot share a batch are sampled one by one.

    Greedy tokens are those of sampling alone, but where the two best logits differ by less than rounding: the turn's
    `margin` says so.
    """
    together = [place for place, (session, _) in enumerate(requests) if can_share(session)]
    turns = {place: requests[place][0].begin(requests[place][1]) for place in together}
    rows = [(requests[place][0], turn) for place, turn in turns.items() if not turn.done]
    if len(rows) > 1 and len({id(session.policy) for session, _ in rows}) == 1:
        _decode(rows)
    else:
        for session, turn in rows:
            while not turn.done:
                session.choose(turn, session._forward(turn.output[-1:]))
    return [
        session.finish(turns[place]) if place in turns else session.sample(limit)
        for place, (session, limit) in enumerate(requests)
    ]


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


def _decode(rows: list[tuple[LocalSession, Turn]]) -> None:
    """Decode to the end of every turn, then give each cache its own new columns."""
    model = rows[0][0].policy.model
    caches = [session._cache for session, _ in rows]
    width = max(cache.physical_length for cache in caches)
    shared = Cache(layer_class_to_replicate=RoomyLayer)
    for index in range(len(rows[0][0].layers)):
        layers = [cache.layers[index] for cache in caches]
        keys, values = ([pad(x, (0, 0, width - x.shape[2], 0)) for x in stored] for stored in (
            [layer.keys for layer in layers], [layer.values for layer in layers],
        ))  # fmt: skip
        shared.update(torch.cat(keys), torch.cat(values), index)
    lengths = torch.tensor([cache.physical_length for cache in caches])
    mask = (torch.arange(width) >= width - lengths[:, None]).long().to(model.device)
    positions = torch.tensor([[cache.logical_length] for cache in caches], device=model.device)
    alive, step = list(range(len(rows))), 0
    while alive:
        open_rows = [row for row in alive if not rows[row][1].done]
        if len(open_rows) <= SHRINK * len(alive):
            for place, row in enumerate(alive):
                if row not in open_rows:
                    _give_back(rows[row], shared, place, width)
            keep = torch.tensor([alive.index(row) for row in open_rows], device=model.device, dtype=torch.long)
            if not open_rows:
                return
            shared.batch_select_indices(keep)
            mask, positions, alive = mask[keep], positions[keep], open_rows
        mask = pad(mask, (0, 1), value=1)
        last = torch.tensor([[rows[row][1].output[-1]] for row in alive], device=model.device)
        logits = model(
            input_ids=last, attention_mask=mask, position_ids=positions + step, past_key_values=shared, use_cache=True
        ).logits[:, -1].float().cpu()  # fmt: skip
        step += 1
        for place, row in enumerate(alive):
            if not rows[row][1].done:
                session, turn = rows[row]
                session.choose(turn, logits[place])


def _give_back(row: tuple[LocalSession, Turn], shared: Cache, place: int, width: int) -> None:
    """Put a row's decoded columns behind its own cache; the last token that was sampled is not read yet."""
    session, turn = row
    new = slice(width, width + len(turn.output) - 1)
    if turn.output[1:]:
        for index, layer in enumerate(shared.layers):
            keys, values = (x[place : place + 1, :, new].clone() for x in (layer.keys, layer.values))
            session._cache.update(keys, values, index)
