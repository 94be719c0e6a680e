"""What the base model answers to a question, with the full context and without any."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache

from ..calling import passing
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
        """Answers from the full context, which is read once.

        Args:
            context_ids: the context.
            questions: texts.
            temperature: of sampling over the whole vocabulary; 0 is greedy.
        """
        ids = torch.tensor([list(context_ids)], device=self.model.device)
        full = DynamicCache(config=self.model.config)
        self.model.get_decoder()(input_ids=ids, **passing(self.model, full), use_cache=True)
        answers = []
        for question in questions:
            asked = torch.cat((ids, self._tensor(self.renderer.opening(question))), dim=1)
            answers.append(self._generate(asked, copy.deepcopy(full), temperature))
        return answers

    @torch.no_grad()
    def without_context(self, questions: Sequence[str]) -> list[Answer]:
        """Greedy answers to questions that nothing stands before."""
        asked = (self._tensor(self.renderer.alone(question)) for question in questions)
        return [self._generate(ids, None, 0) for ids in asked]

    def _generate(self, ids: torch.Tensor, cache: DynamicCache | None, temperature: float) -> Answer:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        digest = hashlib.sha256(f"{self.seed}:{ids.tolist()}".encode()).digest()
        if self.renderer.form.style == "plain":  # a line's end may be one token with the mark before it
            sampling |= {"stop_strings": ["\n"], "tokenizer": self.renderer.tokenizer}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(digest[:7]))
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=self.limit,
                eos_token_id=self.renderer.stop_ids or None,
                pad_token_id=self.renderer.pad_id,
                **({"do_sample": False} | sampling),
            )[0, ids.shape[1] :].tolist()
        ended = bool(made) and made[-1] in self.renderer.stop_ids
        if self.renderer.form.style == "plain":
            ended = ended or "\n" in self.renderer.tokenizer.decode(made).strip(" ")
        return Answer(self.renderer.text(made), ended)

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.model.device)
