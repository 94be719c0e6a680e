"""Policy, compactor and losses as one module with one forward, so that wrappers (DDP, FSDP) see all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ...calling import logits_of, passing
from ...distill.objective import top_k_kl
from ...methods.base import Method
from ..backends.slots import check_attention
from ..windows import IGNORE, KINDS, WindowRow
from .attention import Packed, can_pack, packs_itself
from .losses import policy_loss, sft_loss, token_weights
from .openings import can_share, read_opening, shared
from .prefix import (
    check_method,
    check_replay,
    let_checkpoint_read,
    made_by_compactor,
    note_exact,
    read_only,
    rebuild,
    to_slots_alone,
)

COMPACTOR_MODES = ("frozen", "distill", "rl", "joint")


@dataclass
class Share:
    """A row of an optimizer step.

    Attributes:
        row: what is trained on.
        scale: what its summed token losses are multiplied by; 0 for a row that only fills a place.
        advantage: of the row, or of each of its trained tokens; None for supervised training.
        reference: log-probabilities of its trained tokens under a reference, or None.
    """

    row: WindowRow
    scale: float
    advantage: float | Sequence[float] | None = None
    reference: torch.Tensor | None = None


@dataclass
class Outcome:
    """What a micro-batch gave.

    Attributes:
        loss: to go backward from, normalised over the whole step.
        sums: what a step logs, summed over tokens: nll, tokens, gap, ratio, clipped, truncated, kl, distill.
    """

    loss: torch.Tensor
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        """Add to the sums."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


class RowModel(nn.Module):
    """The policy on rows.

    Args:
        policy: a causal language model; its parameters are trained where they require gradients.
        method: that made the slots of KV rows; a compactor inside trains as `compactor` says.
        compactor: "frozen"; "distill" (KL from the full cache on the tokens that the policy sampled behind slots);
            "rl" (the rows' own loss flows through the slots); "joint" (both).
        loss: "sft" or "policy".
        memo_weight: of memo tokens.
        distill_weight: of the distillation beside the rows' loss.
        options: of `policy_loss`: low, high, cap, kl.

    Raises:
        ValueError: there is no such mode, or no compactor to train.
    """

    def __init__(
        self, policy, method: Method | None = None, *, compactor: str = "frozen", loss: str = "sft",
        memo_weight: float = 1.0, distill_weight: float = 1.0, options: dict[str, float] | None = None,
    ):  # fmt: skip
        super().__init__()
        if compactor not in COMPACTOR_MODES:
            raise ValueError(f"compactor is {compactor!r}; it is one of {', '.join(COMPACTOR_MODES)}")
        self.policy, self.method, self.mode, self.kind = policy, method, compactor, loss
        self.memo_weight, self.distill_weight, self.options = memo_weight, distill_weight, options or {}
        self.checkpoints = False
        own = getattr(method, "compactor", None)
        if compactor != "frozen" and own is None:
            name = "no method" if method is None else f"the method {method.name}"
            raise ValueError(f"compactor={compactor!r}, but {name} has no compactor that could train")
        if method is not None:
            check_attention(method, policy)
        if own is not None:
            own.trains(compactor != "frozen")
        if compactor == "frozen":  # no submodule: wrappers would shard and broadcast it
            object.__setattr__(self, "compactor", own)
        else:
            self.compactor = own

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the layers' classes, by which accelerate shards."""
        return list(self.policy._no_split_modules or ())

    @property
    def trains_policy(self) -> bool:
        """Whether the policy has anything to train."""
        return any(parameter.requires_grad for parameter in self.policy.parameters())

    def train(self, mode: bool = True) -> RowModel:
        """Switch; a frozen policy stays in evaluation mode."""
        super().train(mode)
        self.policy.train(mode and self.trains_policy)
        return self

    def checkpoint_activations(self) -> None:
        """Turn gradient checkpointing on; of a model whose rows share no opening, for text rows alone."""
        self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.checkpoints = True
        if can_share(self.policy):
            let_checkpoint_read(self.policy)

    def forward(self, shares: Sequence[Share]) -> Outcome:
        """Loss of a micro-batch: its text rows in one batch, its KV rows one by one.

        Args:
            shares: rows of the step; slots that several stand behind are made once.
        """
        device = self.policy.get_input_embeddings().weight.device
        out = Outcome(torch.zeros((), device=device))
        for parameter in self.parameters():  # every process has a gradient for every parameter
            if parameter.requires_grad:
                out.loss = out.loss + 0.0 * parameter.flatten()[0].float()
        text = [share for share in shares if not share.row.prefix_plan]
        for share, logprobs in zip(text, self.logprobs_of_text([share.row for share in text]), strict=True):
            self._count(out, share, logprobs)
        behind = [share for share in shares if share.row.prefix_plan]
        distils, known = self.mode in ("distill", "joint"), {}
        taught = self._taught([share.row for share in behind], known) if distils else [None] * len(behind)
        for share, states in zip(behind, taught, strict=True):
            self._behind_slots(out, share, known, states)
        return out

    def method_of(self, row: WindowRow) -> Method | None:
        """The method that makes a row's slots again."""
        return self.method

    def logprobs(self, row: WindowRow, policy=None) -> torch.Tensor:
        """Log-probabilities of a row's trained tokens `[trained]`, at the temperature of the row.

        Args:
            row: behind text or slots.
            policy: another model behind the same slots: a reference.
        """
        check_method(row, self.method_of(row))
        cache = self._prefix(row, {}, False) if row.prefix_plan else None
        return self._picked(self._logits(row, policy or self.policy, cache), row)

    def logprobs_of_text(self, rows: Sequence[WindowRow]) -> list[torch.Tensor]:
        """The same of several text rows: what all begin with once, and what follows in one forward."""
        if not rows:
            return []
        start = shared([row.input_ids for row in rows]) if can_share(self.policy) else 0
        opening, every = (self._hidden_packed if can_pack(self.policy, start) else self._hidden_padded)(rows, start)
        found = []
        for own, row in zip(every, rows, strict=True):
            places = _places(row)
            inside = [place for place in places if place < start]
            hidden = own[[place - start for place in places[len(inside) :]]]
            hidden = torch.cat((opening[inside], hidden)) if inside else hidden
            found.append(self._picked(logits_of(self.policy, hidden), row))
        return found

    def _hidden_padded(self, rows: Sequence[WindowRow], start: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Last hidden states of the `start` tokens that all rows begin with `[start, width]` (None where there are
        none), and of what follows `[rows, longest, width]`."""
        device = self.policy.get_input_embeddings().weight.device
        ids = torch.zeros(len(rows), max(len(row.input_ids) for row in rows) - start, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row.input_ids) - start] = torch.tensor(row.input_ids[start:])
        # No mask: what fills a row up stands behind it, where no token of a causal model looks.
        inputs, opening = {"input_ids": ids.to(device), "use_cache": False}, None
        if start:
            first = torch.tensor([rows[0].input_ids[:start]], device=device)
            opening, cache = read_opening(self.policy, first, len(rows))
            inputs |= passing(self.policy, cache) | {"use_cache": True}
            inputs["position_ids"] = torch.arange(start, start + ids.shape[1], device=device)[None]
        return opening, self.policy.get_decoder()(**inputs).last_hidden_state

    def _hidden_packed(self, rows: Sequence[WindowRow], start: int) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The same, each row's `[tokens, width]`, where all stand one behind the other without padding."""
        device = self.policy.get_input_embeddings().weight.device
        packed = Packed(start, [len(row.input_ids) - start for row in rows])
        ids = rows[0].input_ids[:start] + [token for row in rows for token in row.input_ids[start:]]
        opening = torch.arange(start, device=device)
        positions = torch.cat([opening, *(torch.arange(start, start + n, device=device) for n in packed.lengths)])
        inputs = {"input_ids": torch.tensor([ids], device=device), "position_ids": positions[None], "use_cache": False}
        if packs_itself(self.policy):
            inputs["attention_mask"] = packed.mask(device)
        hidden = self.policy.get_decoder()(**inputs).last_hidden_state[0]
        return hidden[:start], hidden[start:].split(packed.lengths)

    def _behind_slots(self, out: Outcome, share: Share, known: dict, taught: torch.Tensor | None) -> None:
        row = share.row
        check_method(row, self.method_of(row))
        if self.checkpoints:
            check_replay(self.policy)
        flows, distils = self.mode in ("rl", "joint"), taught is not None
        learns = self.trains_policy or flows
        # One forward serves both losses: the row's own, and the distillation, which goes backward to the slots alone.
        cache, slots = self._prefix(row, known, flows or distils), []
        if distils:
            cache, slots = made_by_compactor(cache, apart=not flows)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (learns or distils)):
            logits = self._logits(row, self.policy, cache)
        if distils:
            divergence = to_slots_alone(self._divergence(row, logits, taught), slots, again=learns)
            out.loss = out.loss + self.distill_weight * abs(share.scale) * divergence
            out.add(distill=float(divergence.detach()) if share.scale else 0.0)
        self._count(out, share, self._picked(logits if learns else logits.detach(), row))

    def _prefix(self, row: WindowRow, known: dict, gradients: bool):
        with self._policy_at_rest():
            return rebuild(self.policy, self.method_of(row), row.prefix_ids, row.prefix_plan, gradients, known)

    @contextmanager
    def _policy_at_rest(self) -> Iterator[None]:
        """The policy in evaluation mode, as it is where it makes slots and teaches."""
        training = self.policy.training
        self.policy.eval()
        try:
            yield
        finally:
            self.policy.train(training)

    def _logits(self, row: WindowRow, policy, cache) -> torch.Tensor:
        """Logits that precede the trained tokens `[trained, vocabulary]`."""
        device = self.policy.get_input_embeddings().weight.device
        ids = torch.tensor([row.input_ids], device=device)
        if cache is None:
            hidden = policy.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        else:
            start = len(row.prefix_ids)
            positions = torch.arange(start, start + len(row.input_ids), device=device)[None]
            hidden = policy.get_decoder()(
                input_ids=ids, position_ids=positions, **passing(policy, read_only(cache)), use_cache=True
            ).last_hidden_state
        return logits_of(policy, hidden[0, _places(row)])

    def _picked(self, logits: torch.Tensor, row: WindowRow) -> torch.Tensor:
        gold = torch.tensor([token for token in row.labels if token != IGNORE], device=logits.device)
        return (logits.float() / row.temperature).log_softmax(-1).gather(-1, gold[:, None])[:, 0]

    def _count(self, out: Outcome, share: Share, logprobs: torch.Tensor) -> None:
        row = share.row
        places = [place for place, label in enumerate(row.labels) if label != IGNORE]
        kinds = torch.tensor([row.token_kind[place] for place in places], device=logprobs.device)
        weights = row.weight * token_weights(kinds, self.memo_weight, KINDS["memo"])
        sampled = torch.tensor([row.logprobs[place] for place in places], device=logprobs.device)
        if share.advantage is None:
            losses = sft_loss(logprobs)
        else:
            made = policy_loss(logprobs, sampled, share.advantage, reference=share.reference, **self.options)
            losses, n = made.loss, len(places) if share.scale else 0
            out.add(clipped=made.clipped * bool(n), truncated=made.truncated * bool(n), gap=made.gap * n,
                    ratio=made.ratio * n, kl=made.kl * n)  # fmt: skip
        if share.scale:
            out.add(nll=-float(logprobs.detach().sum()), tokens=len(places))
        if losses.requires_grad:
            out.loss = out.loss + share.scale * (weights * losses).sum()

    @torch.no_grad()
    def _taught(self, rows: Sequence[WindowRow], known: dict) -> list[torch.Tensor]:
        """Last hidden states before the trained tokens of each row `[trained, width]`, behind its whole prefix.

        What one window read is the beginning of what the next one's row is: it is read once, with the longest. So are S
        and U, which their slots stand behind: they go into `known`, of `rebuild`.
        """
        device, found = self.policy.get_input_embeddings().weight.device, {}
        texts = sorted((row.prefix_ids + row.input_ids, place) for place, row in enumerate(rows))
        longest: list[int] = []
        with self._policy_at_rest():
            for text, place in reversed(texts):  # those that go on from a text stand right behind it
                if longest[: len(text)] != text:
                    ids, longest = torch.tensor([text], device=device), text
                    cache = DynamicCache(config=self.policy.config) if can_share(self.policy) else None
                    read = self.policy.get_decoder()(
                        input_ids=ids, **passing(self.policy, cache), use_cache=cache is not None
                    )
                    hidden = read.last_hidden_state[0]
                    if cache is not None:
                        note_exact(known, self.policy, rows[place], cache)
                before = len(rows[place].prefix_ids)
                found[place] = hidden[[before + at for at in _places(rows[place])]]
        return [found[place] for place in range(len(rows))]

    def _divergence(self, row: WindowRow, logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """KL from the full cache to the slots, summed over trained tokens."""
        with torch.no_grad():
            full = logits_of(self.policy, taught)
        gold = torch.tensor([token for token in row.labels if token != IGNORE], device=full.device)
        return top_k_kl(full, logits, gold).sum()


def _places(row: Any) -> list[int]:
    """Where the trained tokens are predicted.

    Raises:
        ValueError: the first token of a row is trained, and nothing predicts it.
    """
    places = [place - 1 for place, label in enumerate(row.labels) if label != IGNORE]
    if places and places[0] < 0:
        raise ValueError("the first token of a row is trained, but nothing stands before it; build the row again")
    return places
