"""Cartridge: gradient descent on the slots of one context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.nn.functional import kl_div
from transformers.cache_utils import Cache

from ..calling import passing
from ..config import fingerprint
from ..rope import full_attention_layers
from ..types import CompactKV, Reading
from .base import Method
from .full import Full


@dataclass
class Cartridge(Method):
    """Trains the slots themselves so that the model with them predicts as with the full cache (arXiv 2506.06266).

    Each step feeds a few texts behind the slots and behind the full cache and descends on KL(full || slots), averaged
    over the texts' tokens. The texts are spans of the context, each continued by tokens sampled from the model with
    the full cache, or the ones given: question-agnostic unless they are the questions that are asked later. One
    context without padding at a time. A checkpoint makes training resumable in pieces: the same file, more `steps`.

    Attributes:
        steps: optimizer steps in total, those in the checkpoint included.
        learning_rate: of Adam.
        batch: texts per step.
        texts: token ids `[tokens]` of two or more each, or None for self-made ones.
        spans: self-made texts; `span` tokens of context in each, and `sampled` tokens after it.
        start: where slots come from: `"first"` tokens of the context (the paper's), or `"spread"` evenly over it.
        frozen: first slots that are not trained (attention sinks).
        seed: of the spans, the sampling and the order of the texts.
        checkpoint: file to resume from and to write at the end, `.safetensors`.
    """

    steps: int = 100
    learning_rate: float = 0.01
    batch: int = 4
    texts: list[torch.Tensor] | None = field(default=None, repr=False)
    spans: int = 32
    span: int = 32
    sampled: int = 16
    start: str = "spread"
    frozen: int = 1
    seed: int = 0
    checkpoint: str | Path | None = None

    name: ClassVar[str] = "cartridge"
    synthesis: ClassVar[bool] = True
    takes_split: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.start not in ("first", "spread"):
            raise ValueError(f"start is {self.start!r}; choose 'first' or 'spread'")
        if short := [len(text) for text in self.texts or [] if len(text) < 2]:
            raise ValueError(f"a text has {short[0]} tokens; give 2 or more, so that there is one to predict")

    def compact(self, model, reading: Reading, slots: int | None = None, ratio: float | None = None) -> Cache:
        """As every method; minutes rather than seconds."""
        tokens = reading.input_ids.shape[-1]
        if reading.input_ids.shape[0] != 1 or (reading.attention_mask is not None and not reading.attention_mask.all()):
            raise ValueError(
                f"a cartridge is trained for one context at a time; this reading has {reading.input_ids.shape[0]} rows"
                " or padding: read and compact each row alone"
            )
        (count,) = self.budgets([tokens], slots, ratio)
        full = Full().compact(model, reading)
        texts = self.texts if self.texts is not None else self.study(model, reading, full)
        state = self.first_state(model, reading, count)
        layers = full_attention_layers(model.config)

        def build() -> Cache:
            pairs = zip(layers, state["slots"][::2], state["slots"][1::2], strict=True)
            dtype = reading.cache.layers[layers[0]].keys.dtype
            return self.build(model, reading, {i: CompactKV(k.to(dtype), v.to(dtype)) for i, k, v in pairs}, [count])

        self.train(model, full, build, [text.to(reading.input_ids.device) for text in texts], state)
        if self.checkpoint is not None:
            self.write(state)
        state["slots"] = [slot.detach() for slot in state["slots"]]
        return build()

    def train(self, model, full: Cache, build: Callable[[], Cache], texts: list[torch.Tensor], state: dict) -> None:
        """Descend from the state's step to `steps`; the texts of a step depend on its number alone."""
        slots: list[torch.Tensor] = state["slots"]
        for step in range(state["step"], self.steps):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            chosen = torch.randint(len(texts), (self.batch,), generator=generator).tolist()
            grads = [torch.zeros_like(slot) for slot in slots]
            for index in chosen:
                text = texts[index].reshape(1, -1)
                with torch.no_grad():
                    wanted = self.log_probs(model, full.clone(), text)
                with torch.enable_grad(), allow_mutation_on_saved_tensors():  # recurrent states are updated in place
                    loss = kl_div(self.log_probs(model, build(), text), wanted, log_target=True, reduction="sum")
                    parts = torch.autograd.grad(loss / text.shape[-1] / self.batch, slots)
                grads = [total + part for total, part in zip(grads, parts, strict=True)]
            self.adam(slots, grads, state, step + 1)
        state["step"] = max(state["step"], self.steps)

    @torch.no_grad()
    def adam(self, slots: list[torch.Tensor], grads: list[torch.Tensor], state: dict, step: int) -> None:
        """One step of Adam (betas 0.9 and 0.999) on all slots but the frozen ones."""
        for slot, grad, first, second in zip(slots, grads, state["first"], state["second"], strict=True):
            grad[:, :, : self.frozen] = 0
            first.lerp_(grad, 0.1)
            second.lerp_(grad.square(), 0.001)
            scale = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
            slot -= self.learning_rate / (1 - 0.9**step) * first / scale

    @staticmethod
    def log_probs(model, cache: Cache, text: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[tokens, vocabulary]` after each token of a text `[1, tokens]` that follows the cache."""
        return model(input_ids=text, **passing(model, cache), use_cache=True).logits[0].float().log_softmax(-1)

    @torch.no_grad()
    def study(self, model, reading: Reading, full: Cache) -> list[torch.Tensor]:
        """Spans of the context, each continued by tokens sampled from the model with the full cache."""
        generator = torch.Generator().manual_seed(self.seed)
        context, device = reading.input_ids[0], reading.input_ids.device
        width = min(self.span, len(context))
        texts = []
        for _ in range(self.spans):
            start = torch.randint(len(context) - width + 1, (1,), generator=generator).item()
            text, cache, new = context[start : start + width], full.clone(), context[start : start + width]
            for _ in range(self.sampled):
                chances = self.log_probs(model, cache, new[None])[-1].exp().cpu()
                new = torch.multinomial(chances, 1, generator=generator).to(device)
                text = torch.cat([text, new])
            texts.append(text)
        return texts

    def first_state(self, model, reading: Reading, count: int) -> dict:
        """Slots copied from the context, or everything in the checkpoint."""
        tokens, of = reading.input_ids.shape[-1], made_of(model, reading)
        if self.checkpoint is not None and Path(self.checkpoint).is_file():
            return self.load(count, reading, of)
        at = torch.arange(count) if self.start == "first" else torch.linspace(0, tokens - 1, count).round().long()
        at = at.to(reading.input_ids.device)
        layers = [reading.cache.layers[index] for index in full_attention_layers(model.config)]
        slots = [x[:, :, at].float().requires_grad_() for layer in layers for x in (layer.keys, layer.values)]
        zeros = [[torch.zeros_like(slot) for slot in slots] for _ in range(2)]
        return {"slots": slots, "first": zeros[0], "second": zeros[1], "step": 0, "of": of}

    def load(self, count: int, reading: Reading, of: str) -> dict:
        """The state in the checkpoint.

        Raises:
            ValueError: it is of another model, context or budget, or further on than `steps`.
        """
        with safe_open(str(self.checkpoint), "pt", device=str(reading.input_ids.device)) as file:
            meta = {name: json.loads(value) for name, value in file.metadata().items()}
            if meta["slots"] != count or meta["step"] > self.steps:
                raise ValueError(
                    f"{self.checkpoint} holds {meta['slots']} slots at step {meta['step']}; asked were {count} up to "
                    f"step {self.steps}: use another file"
                )
            if meta.get("of") != of:
                raise ValueError(f"{self.checkpoint} is of another context or model: use another file")
            state = {
                part: [file.get_tensor(f"{part}.{index}") for index in range(len(file.keys()) // 3)]
                for part in ("slots", "first", "second")
            }
        state["slots"] = [slot.requires_grad_() for slot in state["slots"]]
        return {**state, "step": meta["step"], "of": of}

    def write(self, state: dict) -> None:
        """Write the checkpoint whole or not at all."""
        path = Path(self.checkpoint)
        meta = {"step": state["step"], "of": state["of"], "slots": state["slots"][0].shape[2]}
        tensors = {
            f"{part}.{index}": x.detach().contiguous().cpu()
            for part in ("slots", "first", "second")
            for index, x in enumerate(state[part])
        }
        partial = path.with_name(path.name + ".tmp")
        save_file(tensors, partial, metadata={name: json.dumps(value) for name, value in meta.items()})
        partial.replace(path)


def made_of(model, reading: Reading) -> str:
    """A digest of a context's tokens and of the model that read them, by its config."""
    ids = reading.input_ids.cpu().numpy().tobytes()
    return f"{fingerprint(model)} {hashlib.sha256(ids).hexdigest()[:16]}"
