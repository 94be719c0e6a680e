"""The recipe of the pocket's compactors: `still train`'s loop on matters that are made as it goes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ...compactor import StillCompactor
from ...distill.batches import Draw, Draws
from ...distill.config import TrainConfig
from ...distill.data import Row
from ...distill.rendering import Renderer
from ...distill.train import train
from ...eval.matters import Difficulty, Matter, generate_matter
from ...models import LoadedModel
from ...perceiver import POWER_GAIN
from .dialogue import answer_text

LENGTHS = {336: 16, 608: 32, 1152: 64}
"""Facts of the matters that fit a length in tokens."""

HARD = 32.0
"""The ratio that teaches most. What is learnt there serves every other one: a compactor that saw nothing else was
within a point of one that drew all ratios at 2x to 16x, and better at 64x. It is drawn three times in four, and always
where a compactor goes on, if it is among the ratios at all."""

MORE = 14
"""Times that `HARD` stands in the list beside every ratio once."""

OPTIONS = {"bank": 128, "chunk": max(LENGTHS), "learned_scale": True, "open_start": True, "placement": 64}

SHORT = 0.5
"""Share of the steps, at the beginning, that draw the shortest length alone: what is learnt there carries over. A
compactor that goes on has learnt it."""

LOUDER = {2: 0.09, 3: 0.16, 4: 0.16}
"""Powers of tokens per slot by which the values of a layer's slots are louder when a compactor goes on with a `gain`:
the best of a few that were tried on it without training. One that has a gain from the first step on ends up worse."""

CROWD = 0.5
"""Share of a later go's steps in which the slots of the batch's other matters stand before and after a matter's own, as
those of other chunks do where a longer matter is read chunk by chunk."""

READ_ON = 0.25
"""Share of the steps in which only a matter's first documents are compacted, and the others are read behind them."""


class Curriculum(Draws):
    """Short contexts first, then all lengths, the longest most often."""

    def __init__(self, seed: int, ratios: Sequence[float], short: int):
        super().__init__(seed, list(LENGTHS), ratios, weights=[1, 1, 3])
        self.short = short

    def at(self, step: int) -> Draw:
        """The draw of a step."""
        draw = super().at(step)
        return replace(draw, length=min(LENGTHS)) if step < self.short else draw

    def placing(self, number: int) -> Draw:
        """Of all lengths, from steps before the first."""
        return super().at(-1 - number)


def recipe(seed: int, steps: int | None = None, start_from: str | None = None) -> TrainConfig:
    """How a compactor of the pocket is trained; only the seed differs between the three that ship.

    Args:
        seed: of the run.
        steps: 320 for a fresh compactor, 160 for one that goes on, unless given.
        start_from: a trained compactor, to which `train_compactor` gives a gain if it has none.
    """
    return TrainConfig(
        ratios=[2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
        lengths=list(LENGTHS),
        steps=steps or (160 if start_from else 320),
        lr=1e-4 if start_from else 1.5e-4,
        schedule="cosine",
        warmup=20,
        batch=4,
        micro_batch=4,
        questions=32,
        uneven=0.5,
        crowd=CROWD if start_from else 0.0,
        place=256,
        match=0.0 if start_from else 0.5,
        eval_contexts=8,
        eval_every=0,
        save_every=50,
        log_every=10,
        start_from=start_from,
        seed=seed,
    )


def louder(start_from: str, base: LoadedModel) -> StillCompactor:
    """A trained compactor with a gain that starts at `LOUDER`, if it has none yet."""
    trained = StillCompactor.from_pretrained(start_from, model=base.model)
    if trained.config.gain:
        return trained
    made = StillCompactor.for_model(base.model, **{**asdict(trained.config), "gain": True})
    made.load_state_dict(trained.state_dict(), strict=False)
    with torch.no_grad():
        for layer, power in LOUDER.items():
            made.layers[str(layer)].gain[1] = power / POWER_GAIN
    return made


class MatterRows:
    """A `RowSource` of synthetic matters: every step's rows are a function of the seed and the step alone.

    Args:
        tokenizer: the pocket's.
        config: of the run.
        before: steps that the compactor has been trained already, whose matters do not come again.
    """

    def __init__(self, tokenizer, config: TrainConfig, before: int = 0):
        self.renderer, self.before = Renderer(tokenizer), before
        ratios, short = config.ratios, 0 if config.start_from else round(SHORT * config.steps)
        if HARD in ratios:
            ratios = [HARD] if config.start_from else [*ratios, *[HARD] * MORE]
        self.draws = Curriculum(config.seed, ratios, short)

    def rows(self, draw: Draw, count: int, part: range) -> Sequence[Row]:
        """Matters as long as the draw says, from the training split."""
        rng = random.Random(f"pocket compactor {self.draws.seed}:{self.before + draw.step}")
        size = Difficulty("training", LENGTHS[draw.length])
        # A placement cannot see what documents behind the context take back of it: it would learn noise.
        read_on = rng.random() < READ_ON and draw.step >= 0
        rows = [self.row(generate_matter(rng.randrange(1 << 40), size, "train"), read_on=read_on) for _ in range(count)]
        rows.sort(key=lambda row: row.tokens)
        return [rows[index] for index in part]

    def row(self, matter: Matter, held_out: bool = False, read_on: bool = False) -> Row:
        """A matter with every question that can be asked of it.

        Args:
            matter: the matter.
            held_out: the row is for scoring.
            read_on: only the first half of the documents is compacted; the others are read behind it.
        """
        turns = [
            (self.renderer.later(fact.question), self.renderer.answer(fact.question, answer_text(fact)))
            for fact in matter.facts
        ]
        documents = [(doc.name, doc.text) for doc in matter.documents]
        context = self.renderer.context(documents)
        cut = len(self.renderer.context(documents[: len(documents) // 2])) if read_on else len(context)
        kinds = [fact.kind for fact in matter.facts]
        name = f"{matter.split}-{matter.seed}"
        return Row(name, context[:cut], turns, kinds=kinds, held_out=held_out, raw_ids=context[cut:])


def train_compactor(base: LoadedModel, output: Path, config: TrainConfig, progress: bool = True) -> dict[str, float]:
    """Train, or go on training, one compactor of the pocket; returns its scores on held-out matters."""
    start = None if config.start_from is None else louder(config.start_from, base)
    source = MatterRows(base.tokenizer, config, before=start.config.steps if start else 0)
    held_out = [source.row(generate_matter(seed, "standard"), held_out=True) for seed in range(config.eval_contexts)]
    return train(
        base, source, output, config, held_out=held_out, compactor=start, compactor_options=OPTIONS, progress=progress
    )
