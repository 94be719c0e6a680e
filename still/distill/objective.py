"""What a compactor is trained to do: give answers the distribution that the full cache gives them.

Forward KL from the frozen model with its full cache to the same model with the compact cache, on the answer's
tokens only, over the teacher's most likely tokens plus the gold one (STILL, arXiv 2606.07878).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..budgets import Split
from ..cache import StillCache
from ..calling import logits_of, passing
from ..compactor import StillCompactor
from .crowd import crowded

IGNORE = -100
"""Label of the tokens that are not supervised."""


@dataclass
class DistillOutput:
    """Loss of one batch and what it was made of.

    Attributes:
        loss: summed (or, without `num_items_in_batch`, mean) KL per answer token, with gradients.
        kl: mean KL per answer token, nats.
        cross_entropy: mean student cross-entropy of the gold tokens, nats.
        teacher_cross_entropy: the same for the full cache.
        right: bool `[answer tokens]`: the student's most likely token is the gold one.
        tokens: answer tokens in the batch.
        teacher_right: bool `[answer tokens]`: the same as `right` for the full cache.
        hidden: mean relative squared error of the hidden states, summed over layers; 0 where it has no weight.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    cross_entropy: torch.Tensor
    teacher_cross_entropy: torch.Tensor
    right: torch.Tensor
    tokens: int
    teacher_right: torch.Tensor
    hidden: torch.Tensor


def top_k_kl(teacher: torch.Tensor, student: torch.Tensor, gold: torch.Tensor, k: int = 200) -> torch.Tensor:
    """Forward KL over the teacher's top `k` tokens and the gold one, both renormalised there.

    Args:
        teacher: logits `[n, vocab]`.
        student: logits `[n, vocab]`.
        gold: token ids `[n]`; a gold token inside the top `k` counts once.

    Returns:
        KL `[n]` in nats.
    """
    top = teacher.topk(min(k, teacher.shape[-1]), dim=-1).indices
    double = (top == gold[:, None]).any(-1)
    support = torch.cat((top, gold[:, None]), dim=-1)
    taught = teacher.gather(-1, support).float()
    learnt = student.gather(-1, support).float()
    drop = torch.zeros_like(support, dtype=torch.bool)
    drop[:, -1] = double
    taught = taught.masked_fill(drop, -torch.inf).log_softmax(-1)
    learnt = learnt.masked_fill(drop, -torch.inf).log_softmax(-1)
    gap = (taught - learnt).masked_fill(drop, 0.0)
    return (taught.exp() * gap).sum(-1)


class Distiller(nn.Module):
    """Teacher, compaction and student as one module with one forward, so that wrappers (DDP, FSDP) see all of it.

    Args:
        model: the frozen base; its parameters get no gradient.
        compactor: the fp32 compactor that trains.
        top_k: teacher tokens that the KL runs over.
    """

    def __init__(self, model, compactor: StillCompactor, top_k: int = 200):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.compactor = compactor
        self.top_k = top_k

    def train(self, mode: bool = True) -> Distiller:
        """Switch the compactor; the frozen base stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        context_ids: torch.Tensor,
        turn_ids: torch.Tensor,
        labels: torch.Tensor,
        slots: int,
        context_mask: torch.Tensor | None = None,
        turn_mask: torch.Tensor | None = None,
        num_items_in_batch: int | None = None,
        match: float = 0.0,
        split: Split | None = None,
        crowd: bool = False,
    ) -> DistillOutput:
        """Loss of one batch.

        Args:
            context_ids: `[batch, T]`, shorter rows padded on the left.
            turn_ids: questions and answers after the context, `[batch, L]`, padded on the right.
            labels: `[batch, L]`, the token itself where it is supervised, `IGNORE` elsewhere.
            slots: slots per KV head; every row must have at least as many tokens.
            context_mask: `[batch, T]`, zeros at padding; None where no row is padded.
            turn_mask: `[batch, L]`, likewise.
            num_items_in_batch: divide the summed KL by this instead of by this batch's answer tokens.
            match: weight of the hidden states' relative squared error on answer tokens, summed over layers. It reaches
                every layer's compactor directly, where the KL has to pass through all layers above.
            split: how the slots are divided over the heads; the model must run `attn_implementation="still"` then.
            crowd: the student answers with the slots of the batch's other contexts around its own; see `crowd`.

        Raises:
            ValueError: no answer token is supervised, or a row has fewer tokens than slots.
        """
        tokens = context_ids.shape[1]
        if context_mask is None:
            context_mask = torch.ones_like(context_ids)
        if turn_mask is None:
            turn_mask = torch.ones_like(turn_ids)
        mask = torch.cat((context_mask, turn_mask), dim=1)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        wanted = labels[:, 1:] != IGNORE
        if not wanted.any():
            raise ValueError("no answer token is supervised in this batch: every label is IGNORE")
        gold = labels[:, 1:][wanted]
        rows = context_mask.long().sum(-1).tolist()
        if not 1 <= slots <= min(rows):
            raise ValueError(f"slots is {slots}; it must lie between 1 and the {min(rows)} tokens of the shortest row")

        with torch.no_grad():
            full, hidden = self._teach(context_ids, turn_ids, mask, positions, bool(match))
            taught = [states[:, :-1][wanted] for states in hidden]
            teacher = logits_of(self.model, taught[-1])

        compactor = self.compactor if split is None else self.compactor.with_split(split)
        # While it trains, every layer looks for itself, which is worse than a scout: slots that stand in worse places
        # leave more to be mixed in, and what is learnt of that serves the better places too.
        layers = compactor.compact_rows(full, rows, slots=slots, scouted=not self.training)
        if crowd:
            layers = crowded(compactor, layers, rows)
        small = StillCache.from_layers(
            self.model.config, layers, tokens, source=full, token_ids=context_ids, attention_mask=context_mask,
            floor=1 if split is None else split.floor,
        )  # fmt: skip
        learnt = [x[:, :-1][wanted] for x in self._hidden(turn_ids, mask, positions[:, tokens:], small, bool(match))]
        student = logits_of(self.model, learnt[-1])

        per_token = top_k_kl(teacher, student, gold, self.top_k)
        with torch.no_grad():
            student_ce = F.cross_entropy(student.float(), gold)
            teacher_ce = F.cross_entropy(teacher.float(), gold)
            right, teacher_right = student.argmax(-1) == gold, teacher.argmax(-1) == gold
        apart = torch.zeros_like(per_token)
        if match:
            for one, other in zip(learnt, taught, strict=True):
                gap = (one.float() - other.float()).square().sum(-1)
                apart = apart + gap / other.float().square().sum(-1).clamp_min(1e-12)
        total = (per_token + match * apart).sum()
        loss = total / (num_items_in_batch if num_items_in_batch is not None else per_token.numel())
        means = per_token.mean().detach(), apart.mean().detach()
        return DistillOutput(loss, means[0], student_ce, teacher_ce, right, per_token.numel(), teacher_right, means[1])

    def _teach(self, context_ids, turn_ids, mask, positions, every) -> tuple[DynamicCache, list[torch.Tensor]]:
        """The full cache of the context alone, and the teacher's hidden states of the turns; see `_hidden`."""
        tokens = context_ids.shape[1]
        full = DynamicCache(config=self.model.config)
        if all(type(layer) is DynamicLayer for layer in full.layers):
            # Causality makes one forward enough: the context's keys and values do not see the turns.
            ids = torch.cat((context_ids, turn_ids), dim=1)
            hidden = [states[:, tokens:] for states in self._hidden(ids, mask, positions, full, every)]
            for layer in full.layers:
                layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
            return full, hidden
        # Sliding windows and recurrent states cannot be cut back.
        self._hidden(context_ids, mask[:, :tokens], positions[:, :tokens], full, False)
        return full, self._hidden(turn_ids, mask, positions[:, tokens:], copy.deepcopy(full), every)

    def _hidden(self, ids, mask, positions, cache, every: bool) -> list[torch.Tensor]:
        """Hidden states `[batch, L, width]` after the last layer, or with `every` after each."""
        out = self.model.get_decoder()(
            input_ids=ids, attention_mask=mask, position_ids=positions, **passing(self.model, cache), use_cache=True,
            output_hidden_states=every,
        )  # fmt: skip
        return list(out.hidden_states[1:]) if every else [out.last_hidden_state]

