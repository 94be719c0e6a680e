"""The recipe of the agent's compactor: from one of bare matters to the windows of episodes, by distillation.

    still pocket agent-compactor --output runs/pocket-agent --start-from COMPACTOR

The teacher of `agent_rows` plays, each window is compacted behind S and U as a run does it, and the compactor learns
the distribution that the full cache gives every later turn (`trainers.model`, compactor "distill"). The base stays as
it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ... import methods
from ...attention import attending
from ...compactor import StillCompactor
from ...distill.checkpoints import newest_complete
from ...distill.placing import Asked, fit_placement
from ...eval.matters.assignments import write_assignments
from ...eval.tasks import load_task
from ...methods.base import Method
from ...models import LoadedModel
from ..cells import UNEVEN
from ..episodes import oracle_events
from ..trainers.config import TrainSettings
from ..trainers.loop import RowTrainer
from ..trainers.model import RowModel, Share
from ..trainers.placing import asked_of
from ..trainers.steps import shares_of
from ..trainers.weights import COMPACTOR
from ..windows import WindowRow, rows_of_events
from .agent_rows import AgentStage, draw

KV_STAGE = AgentStage((6, 20), (4, 8), (1.0, 1.0, 0.25), ("kv", "kv", "hybrid"))
RATIOS = (2.0, 4.0, 8.0, 8.0, 16.0, 16.0, 32.0)
"""Drawn for each episode."""

PLACED = 256
"""Windows to which a placement is fitted before the first step, where the compactor has one."""

DIVIDED = 0.5
"""Share of the episodes whose slots are divided unevenly, where the compactor has a split, around that one."""


@dataclass(frozen=True)
class EpisodeSteps:
    """A source of steps: each has fresh episodes, a function of the seed and the step alone.

    Attributes:
        tokenizer: the pocket's.
        settings: of the training.
        episodes: in a step.
        seed: of the draws.
        divided: share of the episodes whose slots are divided unevenly.
    """

    tokenizer: object
    settings: TrainSettings
    episodes: int = 4
    seed: int = 0
    divided: float = 0.0

    def step(self, number: int) -> list[Share]:
        """The last windows of a step's episodes."""
        rng = random.Random(f"agent compactor {self.seed}:{number}")
        rows = [row for place in range(self.episodes) for row in self._episode(rng, f"{number}-{place}")]
        return shares_of(rows, self.settings.normaliser, self.settings.constant, self.settings.memo_weight)

    def _episode(self, rng: random.Random, name: str) -> Sequence[WindowRow]:
        while True:
            asked, config, seed = draw(KV_STAGE, rng)
            method = f"still{UNEVEN}" if rng.random() < self.divided else "still"
            config, ratio = replace(config, method=method), rng.choice(RATIOS)
            with TemporaryDirectory(prefix="still-agent-row-") as folder:
                (place,) = write_assignments(Path(folder) / "lab", asked, [seed], "train")
                events = oracle_events(load_task(place), self.tokenizer, config, Path(folder) / "run")
            rows = [row for row in rows_of_events(events, None, name) if row.prefix_plan]
            if rows and len(rows[-1].prefix_ids) + len(rows[-1].input_ids) <= KV_STAGE.window:
                return [compacted(rows[-1], ratio)]  # where it hands in; earlier windows copy file names

    def texts(self, count: int) -> Iterator[Asked]:
        """Windows of episodes of their own, with all that the agent does after them."""
        for number in range(count):
            rng = random.Random(f"agent placement {self.seed}:{number}")
            yield rng.choice([text for row in self._episode(rng, f"placement-{number}") for text in asked_of(row)])


def compacted(row: WindowRow, ratio: float) -> WindowRow:
    """A row behind slots as if every window before it had been compacted by this ratio."""
    plan = [
        {**step, "slots": max(1, int((step["end"] - step["start"]) / ratio))} if step["keep"] == "append" else step
        for step in row.prefix_plan
    ]
    return replace(row, prefix_plan=plan)


class DividedRows(RowModel):
    """The policy on rows of which some have slots that are divided unevenly, each in a way of its own.

    Its method has the split around which these are drawn.
    """

    def method_of(self, row: WindowRow) -> Method:
        """The method with the row's split, or without one."""
        if not row.prefix_method.endswith(UNEVEN):
            return self.method.even()
        return replace(self.method, split=self.method.split.drawn(row.trajectory_id))


def train_agent_compactor(
    base: LoadedModel, compactor: StillCompactor, output: Path, steps: int = 240, lr: float = 3e-4, seed: int = 0
) -> Path:
    """Train, or go on training; returns the folder of the compactor."""
    settings = TrainSettings(
        train_policy="frozen", compactor_mode="distill", lr=lr, schedule="cosine", warmup=10, save_every=50,
        train_seed=seed,
    )  # fmt: skip
    base.model.requires_grad_(False)
    source, kind, attention = EpisodeSteps(base.tokenizer, settings, seed=seed), RowModel, nullcontext()
    if compactor.config.placement:
        if (checkpoint := newest_complete(output)) is None:
            fit_placement(compactor, base.model, source.texts(PLACED), seed)
        else:  # it was fitted before that
            compactor = StillCompactor.from_pretrained(checkpoint / COMPACTOR, model=base.model)
        source, kind, attention = replace(source, divided=DIVIDED), DividedRows, attending(base.model)
        compactor = compactor.with_split()
    with attention:
        module = kind(base.model, methods.get("still", compactor=compactor), compactor="distill")
        RowTrainer(module.eval(), settings, output, source, steps).fit()
    place, config = output / "compactor", module.compactor.config
    config.base_model, config.seed, config.steps = base.name, seed, steps
    config.trained_ratios = sorted({*config.trained_ratios, *RATIOS})
    module.compactor.save_pretrained(place)
    return place
