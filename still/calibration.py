"""Calibration rows, and what their answers lose behind a context whose heads are compacted unevenly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from .budgets import Split, slots_for
from .cache import StillCache
from .calling import logits_of, passing
from .methods.base import Method, attention_scale
from .reading import read
from .rope import Rotary, full_attention_layers, rotate, unrotate
from .types import CompactKV, Reading


class CalibrationRow(Protocol):
    """A context and what is asked of it; `still.distill.data.Row` is one.

    Attributes:
        context_ids: token ids.
        turns: token ids of questions and of their answers.
        opening: of the questions where they come first; like `raw_ids` of `distill.data.Row` it may be left out.
    """

    context_ids: Sequence[int]
    turns: Sequence[tuple[Sequence[int], Sequence[int]]]


def as_asked(row: CalibrationRow, order: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Token ids of questions and of their answers, asked in this order; the first goes on where the context ends."""
    turns = [(list(asked), list(answer)) for asked, answer in (row.turns[index] for index in order)]
    first = row.opening[order[0]] if getattr(row, "opening", ()) else turns[0][0]
    turns[0] = [*getattr(row, "raw_ids", ()), *first], turns[0][1]
    return turns


class Trial:
    """The calibration rows, the model, and the method that compacts.

    Args:
        model: the frozen model, in the attention "still".
        rows: contexts with questions and answers.
        method: any of `still.methods.SPLIT_NAMES`.
        questions: questions asked of each row; 0 asks all.
        seed: of their choice.

    Attributes:
        layers: the full-attention layers.
        answer_tokens: over all rows.
        forwards: forwards over questions and answers so far.

    Raises:
        ValueError: there is no row, or one without a question.
    """

    def __init__(self, model, rows: Sequence[CalibrationRow], method: Method, questions: int, seed: int):
        if not rows:
            raise ValueError("calibration needs one row or more: a context with questions and answers")
        self.model, self.method = model, method.even()
        self.layers = full_attention_layers(model.config)
        self.kv_heads = model.config.get_text_config(decoder=True).num_key_value_heads
        self.rotary = Rotary.for_model(model)
        self.rows, self.forwards, self._lone = [], 0, None
        for row in rows:
            if not row.turns:
                raise ValueError(f"calibration row {len(self.rows)} has no question with an answer")
            rng = random.Random(f"{seed}:{len(self.rows)}")
            order = rng.sample(range(len(row.turns)), min(questions or len(row.turns), len(row.turns)))
            self.rows.append((list(row.context_ids), as_asked(row, order)))
        self.answer_tokens = sum(len(answer) for _, turns in self.rows for _, answer in turns)

    def sittings(self) -> Iterator[Sitting]:
        """Each row, read. A lone one is kept: its reading costs as much as many forwards."""
        for context, turns in self.rows:
            sitting = self._lone or Sitting(self, context, turns)
            if len(self.rows) == 1:
                self._lone = sitting
            yield sitting

    def losses(self, splits: Sequence[Split], ratio: float, bar) -> list[float]:
        """KL in nats per answer token of whole splits; `bar` counts the forwards."""
        sums = [0.0] * len(splits)
        for sitting in self.sittings():
            slots = slots_for(sitting.tokens, ratio)
            for index, split in enumerate(splits):
                sums[index] += sitting.kl(sitting.divided(split.counts(sitting.tokens, slots)))
                bar.update()
        return [total / self.answer_tokens for total in sums]


class Sitting:
    """One calibration row: its full cache, the teacher's answers, and forwards from reduced caches."""

    def __init__(self, trial: Trial, context: list[int], turns: list[tuple[list[int], list[int]]]):
        self.trial, self.tokens = trial, len(context)
        device = trial.model.device
        ids = torch.tensor([context], device=device)
        self.reading: Reading = read(trial.model, ids, queries=trial.method.needs_queries)
        self.turn_ids = torch.tensor([[x for asked, answer in turns for x in (*asked, *answer)]], device=device)
        wanted = [flag for asked, answer in turns for flag in (*[False] * len(asked), *[True] * len(answer))]
        self.wanted = torch.tensor(wanted[1:], device=device)
        heads = range(trial.kv_heads)
        self.full = {layer: self._record([self._head(layer, head) for head in heads]) for layer in trial.layers}
        self.teacher = self._log_probs(self.full)

    def reduced(
        self, heads: Sequence[tuple[int, int]], levels: Sequence[float], bar
    ) -> Iterator[tuple[tuple[int, int], int, float, float]]:
        """For each head and level: (layer, head), the place of the level, the share of tokens kept, the summed KL."""
        for layer, head in heads:
            sizes = [slots_for(self.tokens, level) for level in levels]
            parts = (self._average(layer, head), *(self._compacted(layer, head, slots) for slots in sizes))
            for place, part in enumerate(parts):
                own = [part if index == head else self._head(layer, index) for index in range(self.trial.kv_heads)]
                kl = self.kl({**self.full, layer: self._record(own)})
                yield (layer, head), place, part.keys.shape[2] / self.tokens, kl
                bar.update()

    def divided(self, counts: dict[int, tuple[int, ...]]) -> dict[int, CompactKV]:
        """Every layer compacted to its heads' counts."""
        compact, where, rotary = self.trial.method.compact_heads, self._positions, self.trial.rotary
        return {
            layer: compact(layer, *self._states(layer), where, own, self._queries(layer), rotary)
            for layer, own in counts.items()
        }

    def kl(self, layers: dict[int, CompactKV]) -> float:
        """Summed KL(full || these layers) over the answers' tokens, nats."""
        student = self._log_probs(layers)
        return (self.teacher.exp() * (self.teacher - student)).sum().item()

    def _log_probs(self, layers: dict[int, CompactKV]) -> torch.Tensor:
        """Log-probabilities `[answer tokens, vocabulary]` of the answers' tokens behind a compact context."""
        trial, source = self.trial, self.reading
        trial.forwards += 1
        cache = StillCache.from_layers(
            trial.model.config, layers, self.tokens, source=source.cache, token_ids=source.input_ids, floor=0
        )
        inputs = cache.continuation(self.turn_ids)
        hidden = trial.model.get_decoder()(**inputs, **passing(trial.model, cache), use_cache=True).last_hidden_state
        return logits_of(trial.model, hidden[0, :-1][self.wanted]).float().log_softmax(-1)

    def _states(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.reading.cache.layers[layer]
        return states.keys, states.values

    @property
    def _positions(self) -> torch.Tensor:
        return torch.arange(self.tokens, device=self.turn_ids.device)

    def _queries(self, layer: int) -> torch.Tensor | None:
        if not self.trial.method.needs_queries:
            return None
        return self.reading.queries[layer].float() * attention_scale(self.trial.model, layer)

    def _head(self, layer: int, head: int) -> CompactKV:
        """One head as it is, `[1, 1, tokens, head_dim]`."""
        return CompactKV(*(x[:, head : head + 1] for x in self._states(layer)))

    def _compacted(self, layer: int, head: int, slots: int) -> CompactKV:
        """One head compacted by the method, `[1, 1, slots, head_dim]`."""
        trial, one, queries = self.trial, self._head(layer, head), self._queries(layer)
        if queries is not None:
            queries = queries.unflatten(1, (trial.kv_heads, -1))[:, head]
        return trial.method.compact_layer(
            layer, one.keys, one.values, self._positions, slots, queries, trial.rotary, [head]
        )

    def _average(self, layer: int, head: int) -> CompactKV:
        """One slot: the mean of the head's un-rotated keys, rotated at the middle, and of its values."""
        one, where = self._head(layer, head), self._positions[None]
        plain = unrotate(one.keys.float(), *self.trial.rotary.cos_sin(layer, where)).mean(dim=2, keepdim=True)
        mean = rotate(plain, *self.trial.rotary.cos_sin(layer, where[:, self.tokens // 2, None]))
        return CompactKV(mean.to(one.keys.dtype), one.values.float().mean(dim=2, keepdim=True).to(one.values.dtype))

    def _record(self, heads: Sequence[CompactKV]) -> CompactKV:
        """One ragged record of single heads; with a bias wherever the method has one."""
        keys, values = (torch.cat([getattr(x, name)[:, 0] for x in heads], dim=1) for name in ("keys", "values"))
        beta = None
        if self.trial.method.uses_beta:
            zero = [x.keys.new_zeros(x.keys.shape[:3]) if x.beta is None else x.beta for x in heads]
            beta = torch.cat([x[:, 0] for x in zero], dim=1)
        return CompactKV(keys, values, beta, counts=tuple(x.keys.shape[2] for x in heads))
