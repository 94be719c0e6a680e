"""Ask many questions of a cache, or of several: greedy answers, cross-entropy and KL from one batched forward.

The forward is teacher-forced on the right answers. Where the model's own choice follows the right answer to its
end, that is its greedy answer; where it departs, decoding goes on from there. The tokens are those of
`model.generate` (a test compares them), for a fraction of its calls.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..attention import attending
from ..behind import Context, contexts, rows_behind
from ..calling import passing
from ..decoding import feed, go_on
from ..methods.quantised import QuantisedLayer
from ..rope import pads_freely

CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 4 << 30}
"""Bytes of keys, values and logits that one batch of questions may have; more only moves memory around."""


@dataclass(frozen=True)
class Prompt:
    """Questions and their right answers as token ids.

    Attributes:
        questions: ids from the context's end up to where the answer begins.
        answers: ids of each right answer, the token that ends it included.
        stop_ids: ids that end an answer.
    """

    questions: list[list[int]]
    answers: list[list[int]]
    stop_ids: tuple[int, ...]


@dataclass
class Asked:
    """What one cache answers.

    Attributes:
        outputs: greedy answers as token ids, without the token that ends them.
        cross_entropy: for each question, minus the log-probability of the right answer, in nats.
        kl: for each question, KL(teacher || this cache) summed over the answer's tokens, in nats; empty without one.
        distributions: for each question, log-probabilities `[answer tokens, vocabulary]`, when they were asked for.
    """

    outputs: list[list[int]]
    cross_entropy: list[float]
    kl: list[float]
    distributions: list[torch.Tensor]


def ask(
    model,
    cache: Cache,
    prompt: Prompt,
    *,
    max_new_tokens: int = 24,
    teacher: Sequence[torch.Tensor] | None = None,
    keep_distributions: bool = False,
) -> Asked:
    """Answer every question from a copy of `cache`, which is left as it was.

    Args:
        model: a Hugging Face causal language model.
        cache: the context's cache, full or compact, one row, not moved on.
        prompt: questions and right answers.
        max_new_tokens: longest answer, the token that ends it included.
        teacher: the full cache's `distributions`, to measure KL against.
        keep_distributions: return the distributions over each right answer's tokens.

    Raises:
        ValueError: there is no question, a question or an answer is empty, or an answer has no end.
    """
    options = {"max_new_tokens": max_new_tokens, "teacher": teacher, "keep_distributions": keep_distributions}
    return ask_each(model, [cache], prompt, **options)[0]


@torch.inference_mode()
def ask_each(
    model,
    caches: Sequence[Cache],
    prompt: Prompt,
    *,
    max_new_tokens: int = 24,
    teacher: Sequence[torch.Tensor] | None = None,
    keep_distributions: bool = False,
) -> list[Asked]:
    """Ask the same of several caches: in one batch where rows need not copy them, otherwise of one after the other.

    For the arguments see `ask`.

    Returns:
        What each cache answers.
    """
    _check(prompt)
    if not caches:
        return []
    room = max(map(len, prompt.questions)) + max(max_new_tokens, *map(len, prompt.answers))
    sources = []
    for cache in caches:
        plain = _unpacked(cache, room)
        sources.append(_Source(plain, contexts(model, plain, room)))
    options = {"max_new_tokens": max_new_tokens, "teacher": teacher, "keep_distributions": keep_distributions}
    if len(sources) > 1 and not all(source.held for source in sources):
        return [ask_each(model, [source.cache], prompt, **options)[0] for source in sources]
    padded = pads_freely(model.config)
    size = _rows_at_once(model, sources[0], max(map(len, prompt.answers))) if padded else 1
    found = [Asked([], [], [], []) for _ in sources]
    rows = [(number, place) for number in range(len(sources)) for place in range(len(prompt.questions))]
    with attending(model) if sources[0].held else nullcontext():
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            batch = _Batch(
                model, [sources[number] for number, _ in some], [prompt.questions[place] for _, place in some],
                [prompt.answers[place] for _, place in some],
            )  # fmt: skip
            logits = batch.forward()
            outputs = batch.greedy(logits, prompt.stop_ids, max_new_tokens, refeed=not padded)
            log_probs = logits.log_softmax(-1)
            for (number, place), output, own in zip(some, outputs, log_probs, strict=True):
                asked, answer = found[number], prompt.answers[place]
                own = own[: len(answer)]
                gold = torch.tensor(answer, device=own.device)
                asked.outputs.append(output)
                asked.cross_entropy.append(-own.gather(-1, gold[:, None]).sum().item())
                if teacher is not None:
                    full = teacher[place]
                    asked.kl.append(max(0.0, (full.exp() * (full - own)).sum().item()))
                if keep_distributions:
                    asked.distributions.append(own.clone())
    return found


@dataclass(frozen=True, eq=False)
class _Source:
    """A cache, and each layer of it as a context for rows; None where rows copy it."""

    cache: Cache
    held: list[Context] | None


class _Batch:
    """Questions on the left, right answers on the right, padding on both ends, each row behind its source.

    Rows that copy theirs all have the same one.
    """

    def __init__(
        self, model, sources: list[_Source], questions: list[list[int]], answers: list[list[int]]
    ) -> None:
        self.model, self.sources, self.questions, self.answers = model, sources, questions, answers
        self.starts = [source.cache.get_seq_length() for source in sources]  # logical position of each first token
        self.past = 0 if sources[0].held else self.starts[0]  # columns before it in each row
        self.width = max(map(len, questions))
        self.tail = max(map(len, answers))
        pad = self.width + self.tail
        ids = torch.zeros(len(questions), pad, dtype=torch.long)
        mask = torch.zeros(len(questions), self.past + pad, dtype=torch.long)
        mask[:, : self.past] = 1
        for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            left, right = self.width - len(question), self.width + len(answer)
            ids[row, left:right] = torch.tensor([*question, *answer])
            mask[row, self.past + left : self.past + right] = 1
        lengths = torch.tensor([len(question) for question in questions])
        positions = torch.arange(pad)[None] - (self.width - lengths)[:, None]
        device = model.device
        self.ids, self.mask = ids.to(device), mask.to(device)
        self.positions = (positions.clamp(min=0) + torch.tensor(self.starts)[:, None]).to(device)

    def forward(self) -> torch.Tensor:
        """Logits `[rows, tail, vocabulary]` that predict each token of the right answers."""
        if self.sources[0].held:
            behind = [(source, len(list(rows))) for source, rows in groupby(self.sources)]
            self.cache = rows_behind(*((source.held, rows) for source, rows in behind))
        else:
            self.cache = repeated(self.sources[0].cache, len(self.sources))
        out = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            **passing(self.model, self.cache),
            use_cache=True,
            logits_to_keep=self.tail + 1,
        )
        return out.logits[:, :-1].float()

    def greedy(self, logits: torch.Tensor, stop_ids: tuple[int, ...], limit: int, refeed: bool) -> list[list[int]]:
        """Greedy answers, going on from where the model's own choices leave the right answers."""
        choices = logits.argmax(-1).tolist()
        outputs: list[list[int]] = []
        for row, answer in enumerate(self.answers):
            same = 0
            while same < len(answer) and choices[row][same] == answer[same]:
                same += 1
            output = answer[:same] if same == len(answer) else [*answer[:same], choices[row][same]]
            outputs.append(output[:limit])

        def ended(row: int) -> bool:
            return outputs[row][-1] in stop_ids or len(outputs[row]) >= limit

        if not all(map(ended, range(len(outputs)))):
            if refeed:  # a state that has taken in the right answer cannot give it back
                self._feed_again(outputs[0][:-1])
            else:
                kept = torch.tensor([len(output) - 1 for output in outputs], device=self.mask.device)
                columns = torch.arange(self.tail, device=self.mask.device)
                self.mask[:, self.past + self.width :] = columns[None] < kept[:, None]
            starts = [start + len(question) for start, question in zip(self.starts, self.questions, strict=True)]
            go_on(self.model, self.cache, self.mask, starts, lambda each, _: each.argmax(-1).tolist(), ended, outputs)
        return [output[:-1] if output[-1] in stop_ids else output for output in outputs]

    def _feed_again(self, answer: list[int]) -> None:
        """Read the only question and the beginning of its answer into a fresh copy of the cache."""
        self.cache = repeated(self.sources[0].cache, 1)
        ids = torch.tensor([[*self.questions[0], *answer]], device=self.mask.device)
        self.mask = self.mask.new_ones(1, self.past + ids.shape[1])
        positions = torch.arange(self.past, self.past + ids.shape[1], device=self.mask.device)[None]
        feed(self.model, self.cache, ids, self.mask, positions)


def repeated(cache: Cache, rows: int) -> Cache:
    """A copy of a one-row cache for `rows` questions; the original is left as it was."""
    copied = cache.clone() if hasattr(cache, "clone") else copy.deepcopy(cache)
    if rows > 1:
        copied.batch_repeat_interleave(rows)
    return copied


def _unpacked(cache: Cache, room: int) -> Cache:
    """A quantised cache as plain keys and values, unpacked once and not at every step.

    It answers alike as long as the packed cache would keep the next `room` tokens raw; past that it is left packed.
    """
    if not any(isinstance(layer, QuantisedLayer) and room < layer.residual for layer in cache.layers):
        return cache
    layers = []
    for layer in cache.layers:
        plain = layer
        if isinstance(layer, QuantisedLayer):
            plain, none = DynamicLayer(), layer.keys[:, :, :0]
            plain.update(*copy.copy(layer).update(none, none))
        layers.append(plain)
    return Cache(layers=layers)


def _rows_at_once(model, source: _Source, tail: int) -> int:
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    columns = 0 if source.held else getattr(source.cache, "physical_length", None) or source.cache.get_seq_length()
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * (columns + 48) * model.dtype.itemsize
    row += 2 * 4 * (tail + 1) * config.vocab_size  # logits and log-probabilities in fp32
    return max(1, CHUNK_BYTES.get(model.device.type, CHUNK_BYTES["cuda"]) // row)


def _check(prompt: Prompt) -> None:
    if not prompt.questions:
        raise ValueError("there is no question to ask")
    for number, (question, answer) in enumerate(zip(prompt.questions, prompt.answers, strict=True)):
        if not question or not answer:
            raise ValueError(f"question {number} or its answer has no tokens")
        if answer[-1] not in prompt.stop_ids:
            raise ValueError(f"the answer to question {number} does not end in one of the stop ids {prompt.stop_ids}")
