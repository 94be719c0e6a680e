"""Context dropout: in training, some KV heads do not see some tokens of the matter when they answer.

A model of a few layers recalls every fact through all of its upper heads together: where one loses a token, the others
do not make up for it. Larger models have many redundant retrieval heads and lack this bottleneck. Hiding random tokens
from random heads teaches each upper head to recall alone what it sees, and to keep still about what it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "pocket-context-dropout"
HIDDEN = -1e4  # of a score; far below any other, and finite in bfloat16
EXTRA = 16  # further dims of queries and keys; one carries the mask, and sixteen keep the kernels aligned


@dataclass
class ContextDropout:
    """Which heads see which tokens in the current batch.

    Attributes:
        lower: layers that need no token of the matter to answer: each of their heads sees all of it, or nothing.
        rates: shares of the tokens that an upper head sees; drawn per row and head.
    """

    lower: int = 2
    rates: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0)
    turns: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def draw(
        self, generator: torch.Generator, contexts: Sequence[int], length: int, dropped: Sequence[bool], layers: int,
        kv_heads: int,
    ) -> None:  # fmt: skip
        """Draw what is hidden in a batch. Every token of a matter stays visible to one upper head or more.

        Args:
            generator: of the draws.
            contexts: tokens of each row's matter, which come first.
            length: tokens of the longest row.
            dropped: rows in which anything is hidden at all.
            layers: of the model.
            kv_heads: of each layer.
        """
        batch, upper = len(contexts), layers - self.lower
        at = torch.arange(length)
        inside = at < torch.tensor(contexts)[:, None]  # [batch, length]
        rates = torch.tensor(self.rates)[torch.randint(len(self.rates), (batch, upper, kv_heads), generator=generator)]
        seen = torch.rand(batch, upper, kv_heads, length, generator=generator) < rates[..., None]
        keeper = torch.randint(upper * kv_heads, (batch, length), generator=generator)
        seen |= F.one_hot(keeper, upper * kv_heads).bool().mT.unflatten(1, (upper, kv_heads))
        blind = torch.rand(batch, self.lower, kv_heads, 1, generator=generator) < 0.5
        hidden = torch.cat((blind.expand(-1, -1, -1, length), ~seen), dim=1)
        hidden &= inside[:, None, None] & torch.tensor(dropped)[:, None, None, None]
        self.hidden = hidden * HIDDEN
        self.turns = (~inside).float()

    def attend(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Causal attention as transformers calls it; queries after the matter do not see its hidden tokens."""
        groups = query.shape[1] // key.shape[1]
        hidden = self.hidden[:, module.layer_idx].to(key.dtype)[..., None]
        turns = self.turns.to(query.dtype)[:, None, :, None].expand(-1, query.shape[1], -1, -1)
        query = F.pad(torch.cat((query, turns), dim=-1), (0, EXTRA - 1))
        key = F.pad(torch.cat((key, hidden), dim=-1), (0, EXTRA - 1))
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, F.pad(value, (0, EXTRA))))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out[..., :-EXTRA].transpose(1, 2).contiguous(), None

    def attach(self, model) -> None:
        """Make the model attend through this object. No mask is made for it: rows are padded on the right."""
        AttentionInterface.register(NAME, self.attend)
        model.set_attn_implementation(NAME)
