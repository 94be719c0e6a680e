"""The recipe of the pocket's compactors: `still train`'s loop on matters that are made as it goes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from ...distill.batches import Draw, Draws
from ...distill.config import TrainConfig
from ...distill.data import Row
from ...distill.rendering import Renderer
from ...distill.train import train
from ...eval.matters import Difficulty, Matter, generate_matter
from ...models import LoadedModel
from .dialogue import answer_text

LENGTHS = {288: 16, 576: 32, 1152: 64}
"""Facts of the matters that fit a length in tokens."""

OFTEN = (8.0, 16.0)
"""Ratios that are drawn twice as often as the others."""

OPTIONS = {"bank": 128, "chunk": max(LENGTHS), "learned_scale": True}


def recipe(seed: int, steps: int = 420) -> TrainConfig:
    """How a compactor of the pocket is trained; only the seed differs between the three that ship."""
    return TrainConfig(
        ratios=[2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
        lengths=list(LENGTHS),
        steps=steps,
        lr=1e-3,
        schedule="cosine",
        warmup=20,
        batch=4,
        micro_batch=4,
        questions=32,
        eval_contexts=8,
        eval_every=0,
        save_every=50,
        log_every=10,
        seed=seed,
    )


class MatterRows:
    """A `RowSource` of synthetic matters: every step's rows are a function of the seed and the step alone."""

    def __init__(self, tokenizer, config: TrainConfig):
        self.renderer = Renderer(tokenizer)
        ratios = [*config.ratios, *OFTEN]
        self.draws = Draws(config.seed, config.lengths, ratios, weights=[1, 1, 4])

    def rows(self, draw: Draw, count: int, part: range) -> Sequence[Row]:
        """Matters as long as the draw says, from the training split."""
        rng = random.Random(f"pocket compactor {self.draws.seed}:{draw.step}")
        size = Difficulty("training", LENGTHS[draw.length])
        rows = [self.row(generate_matter(rng.randrange(1 << 40), size, "train")) for _ in range(count)]
        rows.sort(key=lambda row: row.tokens)
        return [rows[index] for index in part]

    def row(self, matter: Matter, held_out: bool = False) -> Row:
        """A matter with every question that can be asked of it."""
        turns = [
            (self.renderer.later(fact.question), self.renderer.answer(fact.question, answer_text(fact)))
            for fact in matter.facts
        ]
        context = self.renderer.context([(doc.name, doc.text) for doc in matter.documents])
        kinds = [fact.kind for fact in matter.facts]
        return Row(f"{matter.split}-{matter.seed}", context, turns, kinds=kinds, held_out=held_out)


def train_compactor(base: LoadedModel, output: Path, config: TrainConfig, progress: bool = True) -> dict[str, float]:
    """Train, or go on training, one compactor of the pocket; returns its scores on held-out matters."""
    source = MatterRows(base.tokenizer, config)
    held_out = [source.row(generate_matter(seed, "standard"), held_out=True) for seed in range(config.eval_contexts)]
    options = {} if config.start_from else OPTIONS
    return train(base, source, output, config, held_out=held_out, compactor_options=options, progress=progress)
