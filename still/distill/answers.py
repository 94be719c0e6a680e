"""What the base model answers to a question, with the full context and without any."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicCache

from ..attention import attending
from ..behind import contexts, rows_behind
from ..calling import passing
from ..decoding import decode, draw
from ..rope import pads_freely
from .rendering import Renderer


@dataclass(frozen=True)
class Answer:
    """An answer and whether the model ended it by itself.

    Attributes:
        text: without special tokens, stripped.
        ended: the model wrote the end token within the limit.
    """

    text: str
    ended: bool


class Answerer:
    """Asks the frozen base model.

    Args:
        model: a causal language model.
        renderer: for its tokenizer.
        limit: longest answer in tokens.
        seed: with the question it decides every draw, so that a resumed run draws the same answers.
    """

    def __init__(self, model, renderer: Renderer, limit: int, seed: int = 0):
        self.model, self.renderer, self.limit, self.seed = model, renderer, limit, seed

    @torch.no_grad()
    def with_context(self, context_ids: Sequence[int], questions: Sequence[str], temperature: float) -> list[Answer]:
        """Answers from the full context, which is read once; questions are answered side by side where that can be.

        Args:
            context_ids: the context.
            questions: texts.
            temperature: of sampling over the whole vocabulary; 0 is greedy.
        """
        ids = torch.tensor([list(context_ids)], device=self.model.device)
        full = DynamicCache(config=self.model.config)
        self.model.get_decoder()(input_ids=ids, **passing(self.model, full), use_cache=True)
        asked = [self.renderer.opening(question) for question in questions]
        held = contexts(self.model, full, max(map(len, asked), default=0) + self.limit)
        if held is None:
            return [self._generate([*context_ids, *each], copy.deepcopy(full), temperature) for each in asked]
        with attending(self.model):
            return self._decode(rows_behind((held, len(asked))), context_ids, asked, temperature)

    @torch.no_grad()
    def without_context(self, questions: Sequence[str]) -> list[Answer]:
        """Greedy answers to questions that nothing stands before."""
        asked = [self.renderer.alone(question) for question in questions]
        if pads_freely(self.model.config):
            return self._decode(DynamicCache(config=self.model.config), [], asked, 0)
        return [self._generate(each, None, 0) for each in asked]

    def _decode(
        self, cache: Cache, context_ids: Sequence[int], asked: Sequence[Sequence[int]], temperature: float
    ) -> list[Answer]:
        """Answers of all rows side by side, each by random numbers of its own."""
        if not asked:
            return []
        outputs: list[list[int]] = [[] for _ in asked]
        numbers = [torch.Generator().manual_seed(self._seed([*context_ids, *each])) for each in asked]

        def choose(logits: torch.Tensor, rows: list[int]) -> list[int]:
            return draw(logits, temperature, [numbers[row] for row in rows])

        def ended(row: int) -> bool:
            return len(outputs[row]) >= self.limit or self._ended(outputs[row])

        decode(self.model, cache, len(context_ids), asked, choose, ended, outputs)
        return [self._answer(output) for output in outputs]

    def _generate(self, asked: list[int], cache: DynamicCache | None, temperature: float) -> Answer:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        if self.renderer.form.style == "plain":
            sampling |= {"stop_strings": ["\n"], "tokenizer": self.renderer.tokenizer}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        ids = torch.tensor([asked], device=self.model.device)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed(asked))
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **passing(self.model, cache),
                max_new_tokens=self.limit,
                eos_token_id=self.renderer.stop_ids or None,
                pad_token_id=self.renderer.pad_id,
                **({"do_sample": False} | sampling),
            )
        return self._answer(made[0, ids.shape[1] :].tolist())

    def _answer(self, output: list[int]) -> Answer:
        return Answer(self.renderer.text(output), bool(output) and self._ended(output))

    def _ended(self, output: list[int]) -> bool:
        """Whether the model ended its answer; in plain style by a line's end, which may share a token with a mark."""
        if output[-1] in self.renderer.stop_ids:
            return True
        return self.renderer.form.style == "plain" and "\n" in self.renderer.tokenizer.decode(output).strip(" ")

    def _seed(self, ids: list[int]) -> int:
        """Of the draws after these ids."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{[ids]}".encode()).digest()[:7])
