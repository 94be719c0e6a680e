"""Caches that are not compact slots, with the surface of `StillCache` that the sweep uses."""

from __future__ import annotations

import copy

import torch
from transformers.cache_utils import Cache

from .record import cache_nbytes


class PlainCache(Cache):
    """A cache that holds an entry for every token of the context, or none of a context that is forgotten.

    Attributes:
        token_ids: `[batch, tokens]` of what the cache holds.
        attention_mask: `[batch, tokens]`, zeros on the left of shorter rows.
    """

    def __init__(self, layers: list, token_ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
        super().__init__(layers=layers)
        self.token_ids = token_ids
        self.attention_mask = torch.ones_like(token_ids) if attention_mask is None else attention_mask

    @property
    def slots(self) -> int:
        """Entries per KV head of the longest row."""
        return self.token_ids.shape[-1]

    logical_length = physical_length = slots

    @property
    def nbytes(self) -> int:
        """Bytes of all states, measured."""
        return cache_nbytes(self)

    def row_slots(self) -> list[int]:
        """Entries per KV head of each row."""
        return self.attention_mask.long().sum(-1).tolist()

    def clone(self) -> PlainCache:
        """An independent copy, so that one cache answers many questions."""
        return copy.deepcopy(self)

    def prompt(self, question_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Inputs for `model.generate(**cache.prompt(question_ids), past_key_values=cache)`.

        Args:
            question_ids: `[tokens]` or `[batch, tokens]`; n questions may follow a context of one row.
            attention_mask: of the questions where they are padded (on the left).
        """
        ids, mask = self._new_tokens(question_ids, attention_mask)
        return {"input_ids": torch.cat([self.token_ids, ids], dim=-1), "attention_mask": mask}

    def continuation(
        self, new_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Inputs for a plain forward, `model(**cache.continuation(new_ids), past_key_values=cache)`."""
        ids, mask = self._new_tokens(new_ids, attention_mask)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[-1] :]
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def _new_tokens(self, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.atleast_2d(ids).to(self.token_ids.device)
        rows = self.token_ids.shape[0]
        if ids.shape[0] > rows:
            self._widen(ids.shape[0])
        elif ids.shape[0] == 1:
            ids = ids.expand(rows, -1)
        elif ids.shape[0] != rows:
            raise ValueError(f"{len(ids)} questions cannot follow a cache of {rows} rows; give 1 or a multiple")
        new = torch.ones_like(ids) if mask is None else torch.atleast_2d(mask).to(ids)
        return ids, torch.cat([self.attention_mask.to(ids), new.expand(*ids.shape)], dim=-1)

    def _widen(self, batch: int) -> None:
        rows = self.token_ids.shape[0]
        if batch % rows:
            raise ValueError(f"{batch} questions cannot follow a cache of {rows} rows; give a multiple of {rows}")
        index = torch.arange(rows, device=self.token_ids.device).repeat_interleave(batch // rows)
        for layer in self.layers:
            layer.reorder_cache(index)
        self.token_ids, self.attention_mask = self.token_ids[index], self.attention_mask[index]
