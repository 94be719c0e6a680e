"""Training rows of the agent's game for the pocket, made through the very loop and renderer of a run.

    rows = agent_rows(AGENT_STAGES[0], tokenizer, seed=0)
    next(rows).input_ids

A teacher that knows the rubric (`episodes.Oracle`) plays assignments from the training split: it reads document by
document, writes a memo within the budget that its system prompt names, goes on from a BRIDGE, writes the deliverable
and stops. What it copies stands in view: in the window, in the memo, or in what slots stand for. The rows are those of
`episodes.rows_of`: a memo run gives one for each window, a run behind slots gives one, with the cuts at which a
compactor would work.

The stages go from matters that fit a window whole (learn the format, learn to copy a term into the deliverable), to
memos (learn to keep what is asked and leave the rest), to all relevance shares at once. Relevance, backend, budget
and thresholds are drawn anew for each matter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ...eval.matters.assignments import Assignment, write_assignments
from ...eval.tasks import load_task
from ..episodes import Row, oracle_events, rows_of
from ..run_config import RunConfig
from .slips import slip_rows


@dataclass(frozen=True)
class AgentStage:
    """What matters and runs of one stage look like; a pair is drawn from uniformly, ends included.

    Attributes:
        criteria: facts that are asked for.
        documents: in a matter.
        relevance: shares of a matter's facts that are asked for, drawn evenly.
        backends: whose shapes the rows have, drawn evenly: full, memo, kv, hybrid.
        budgets: tokens that may cross a boundary, drawn evenly; for a memo, its longest. There are few of them, since
            a small model learns by heart how many lines one takes.
        reads: documents since the last boundary that make a compaction due.
        window: tokens of context; a longer row is left out and counted.
    """

    criteria: tuple[int, int]
    documents: tuple[int, int]
    relevance: tuple[float, ...]
    backends: tuple[str, ...]
    budgets: tuple[int, ...] = (64, 128, 256, 512)
    reads: tuple[int, int] = (1, 3)
    window: int = 4096


AGENT_STAGES = (
    AgentStage((2, 6), (1, 3), (1.0,), ("full",)),
    AgentStage((4, 12), (2, 6), (1.0, 0.5), ("full", "memo", "kv")),
    AgentStage((8, 20), (4, 8), (1.0, 0.25), ("full", "memo", "kv", "hybrid")),
    AgentStage((16, 24), (6, 10), (1.0, 0.25, 0.05), ("full", "memo", "memo", "kv", "hybrid")),
)
"""The last stage is mixed with a tenth of each before it, as the base's own curriculum does with its lists."""


def draw(stage: AgentStage, rng: random.Random) -> tuple[Assignment, RunConfig, int]:
    """What is asked, how it is played, and the matter's seed."""
    asked = Assignment(rng.choice(stage.relevance), rng.randint(*stage.criteria), rng.randint(*stage.documents))
    backend, reads = rng.choice(stage.backends), rng.randint(*stage.reads)
    config = RunConfig(
        backend=backend, budget=None if backend in ("full", "kv") else f"{rng.choice(stage.budgets)}t",
        ratio=8.0 if backend == "kv" else None, window=4 * stage.window, reserve=stage.window // 4, reads=reads,
        reads_force=reads + 1, max_new_tokens=stage.window, tools=("read", "write"), sandbox="none",
    )  # fmt: skip
    return asked, config, rng.randrange(1 << 40)


class AgentRows:
    """An endless iterator over rows, seeded.

    Args:
        stage: of the curriculum.
        tokenizer: the pocket's.
        seed: the same seed always gives the same rows.
        split: whose names and values; "train" but in tests.
        slips: the teacher's first draft has wrong lines, and it is told so privately (`slips`).

    Attributes:
        too_long: rows that were left out because they are longer than the stage's window.
    """

    def __init__(self, stage: AgentStage, tokenizer, seed: int, split: str = "train", slips: bool = False):
        self.stage, self.tokenizer, self.split, self.slips, self.too_long = stage, tokenizer, split, slips, 0
        self.rng = random.Random(f"agent rows {seed}")

    def __iter__(self) -> Iterator[Row]:
        while True:
            for row in self.episode():
                if len(row.input_ids) <= self.stage.window:
                    yield row
                else:
                    self.too_long += 1

    def episode(self) -> list[Row]:
        """The rows of the next matter, whatever their lengths."""
        asked, config, seed = draw(self.stage, self.rng)
        with TemporaryDirectory(prefix="still-agent-row-") as folder:
            (place,) = write_assignments(Path(folder) / "lab", asked, [seed], self.split)
            task, root = load_task(place), Path(folder) / "run"
            if self.slips:
                return slip_rows(task, self.tokenizer, config, root, self.rng)
            return rows_of(oracle_events(task, self.tokenizer, config, root))


def agent_rows(
    stage: AgentStage, tokenizer, seed: int, split: str = "train", slips: bool = False
) -> Iterator[Row]:  # fmt: skip
    """Rows of a stage without end; see `AgentRows`."""
    return iter(AgentRows(stage, tokenizer, seed, split, slips))
