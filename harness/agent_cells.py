"""Cells of an agent's sweep: one backend at one budget and seed on one matter. Imports no torch and no transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Literal, get_args

from ..eval.matters.assignments import Assignment
from .cells import CEILING, FLOOR, UNEVEN, CellStore, _safe, digest
from .run_config import BackendName, RunConfig, budget_bytes

UNSIZED = (CEILING, FLOOR, "plain")
"""Backends without a budget."""
SLOTS = ("kv", "hybrid")
"""Backends that take a method."""


@dataclass(frozen=True)
class AgentSweepConfig:
    """What an agent's sweep computes. Every field enters the digest that its results folder is bound to.

    Attributes:
        model: `pocket-agent`, a folder or a Hub id, run here; or server:NAME, a model of an OpenAI-compatible server
        compactor: trained STILL compactors: the name of a model that brings its own, folders (a folder of folders is
            one compactor per seed), or Hub ids
        tasks: `matters`, `matters-unseen` (templates that training never shows), or folders of LAB tasks whose criteria
            the exact judge can judge
        relevance: shares of a synthetic matter's facts that are asked for
        criteria: facts that are asked for in each synthetic matter
        documents: in each synthetic matter
        backends: what crosses a boundary; `full` and `none` are always among them
        methods: how slots are made, for kv and hybrid
        modes: append (each window adds slots) and recompact (one size, again and again; not for unequal slots), for kv
            and hybrid
        budgets: peak of attended compacted context: bytes (64KiB), or as many as N raw tokens take (128t)
        seeds: of the compactors' training, and of the sampling
        count: synthetic matters at each relevance
        first: seed of the first of them
        max_new_tokens: longest turn
        dtype: of the model's weights
        window: tokens of context that compacted runs may use; `full` and `plain` use the model's own limit
        reserve: tokens kept free for a memo or a draft
        reads: documents since the last boundary that make a compaction due
        reads_force: documents that make it due at once
        max_turns: assistant's turns in a run
        max_windows: windows in a run
        attempts: how often a memo is sampled before it counts as failed
        memo_share: share of a hybrid's budget that its memo may take
        tools: that the agent is given
        probe: after each boundary, ask a local model for every criterion and log which it still answers
        together: runs at a time
        base_url: of the server
        tokenizer: of a served model: prompts then go as token ids
        served_window: tokens of context that the served model takes
        bytes_per_token: of the served model's KV cache
    """

    model: str = "pocket-agent"
    compactor: tuple[str, ...] = ("pocket-agent",)
    tasks: tuple[str, ...] = ("matters",)
    relevance: tuple[float, ...] = (1.0, 0.25, 0.05)
    criteria: int = 20
    documents: int = 8
    backends: tuple[str, ...] = ("memo", "memo_oracle", "memo_kv", "kv", "hybrid", "trim")
    methods: tuple[str, ...] = ("still",)
    modes: tuple[str, ...] = ("append",)
    budgets: tuple[str, ...] = ("64t", "128t", "256t", "512t")
    seeds: tuple[int, ...] = (0,)
    count: int = 20
    first: int = 0
    max_new_tokens: int = 1024
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    window: int | None = None
    reserve: int | None = None
    reads: int = 2
    reads_force: int = 3
    max_turns: int = 200
    max_windows: int = 32
    attempts: int = 3
    memo_share: float = 0.5
    tools: tuple[str, ...] = ("read", "write")
    probe: bool = True
    together: int = 1
    base_url: str | None = None
    tokenizer: str | None = None
    served_window: int = 131_072
    bytes_per_token: int | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, list | tuple):
                if not value:
                    raise ValueError(f"{entry.name} is empty; name at least one")
                object.__setattr__(self, entry.name, tuple(dict.fromkeys(value)))
        known = get_args(BackendName)
        if unknown := [name for name in self.backends if name not in known]:
            raise ValueError(f"there is no backend {unknown[0]!r}; choose from {', '.join(known)}")
        if unknown := [mode for mode in self.modes if mode not in ("append", "recompact")]:
            raise ValueError(f"there is no mode {unknown[0]!r}; choose append, recompact or both")
        object.__setattr__(self, "backends", tuple(dict.fromkeys((CEILING, FLOOR, *self.backends))))
        if set(self.backends) & set(SLOTS) and not self._ways:
            raise ValueError(
                f"{self.methods[0]} with mode recompact: slots that are divided unevenly cannot be compacted again; "
                f"take append"
            )
        for budget in self.budgets:
            budget_bytes(budget, 1)
        if self.count < 1 or self.together < 1:
            raise ValueError(f"count is {self.count} and together {self.together}; both are 1 or more")
        for share in self.relevance:
            Assignment(share, self.criteria, self.documents)
        for condition in self.conditions:
            self.run_config(condition)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Everything that is compared, ceiling and floor first."""
        found = []
        for backend in self.backends:
            ways = self._ways if backend in SLOTS else [("", "")]
            budgets = [""] if backend in UNSIZED else self.budgets
            found += [Condition(backend, method, mode, budget) for method, mode in ways for budget in budgets]
        return tuple(found)

    @property
    def _ways(self) -> list[tuple[str, str]]:
        """Methods and modes that go together: unequal slots are not compacted again."""
        every = ((method, mode) for method in self.methods for mode in self.modes)
        return [(method, mode) for method, mode in every if not (method.endswith(UNEVEN) and mode == "recompact")]

    def run_config(self, condition: Condition, seed: int = 0) -> RunConfig:
        """The settings of a run under a condition."""
        ours = {name: getattr(self, name) for name in (
            "reserve", "reads", "reads_force", "max_turns", "max_windows", "attempts", "memo_share", "tools",
            "max_new_tokens",
        )}  # fmt: skip
        return RunConfig(
            backend=condition.backend, method=condition.method or "still", mode=condition.mode or "append",
            budget=condition.budget or None, window=None if condition.backend in (CEILING, "plain") else self.window,
            seed=seed, sandbox="none", **ours,
        )  # fmt: skip

    def to_json(self) -> dict:
        """The fields as JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: dict) -> AgentSweepConfig:
        """Read what `to_json` wrote."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


@dataclass(frozen=True)
class Condition:
    """One way to carry context over a boundary.

    Attributes:
        backend: see `RunConfig`.
        method: for kv and hybrid; else empty.
        mode: for kv and hybrid; else empty.
        budget: as it was written; empty where there is none.
    """

    backend: str
    method: str = ""
    mode: str = ""
    budget: str = ""

    @property
    def name(self) -> str:
        """Without the budget: `kv still`, `kv still recompact`, `memo`."""
        again = self.mode if self.mode == "recompact" else ""
        return " ".join(filter(None, [self.backend, self.method, again]))


@dataclass(frozen=True)
class AgentCell:
    """One condition with one seed on one matter; `task` is the group that rows are made of."""

    task: str
    set_id: str
    backend: str
    method: str
    mode: str
    budget: str
    seed: int

    @property
    def condition(self) -> Condition:
        """Without matter and seed."""
        return Condition(self.backend, self.method, self.mode, self.budget)

    @property
    def stem(self) -> str:
        """The cell as the beginning of a file's name."""
        return _safe("-".join(filter(None, [self.backend, self.method, self.mode, self.budget]))) + f"-s{self.seed}"

    @property
    def label(self) -> str:
        """The cell for people."""
        return f"{self.condition.name} {self.budget} seed {self.seed}".replace("  ", " ")

    def key(self, binding: str) -> str:
        """Sixteen hex digits that change with the cell and with what the folder is bound to."""
        return digest({"cell": asdict(self), "binding": binding})[:16]


class AgentStore(CellStore):
    """A results folder of an agent's sweep; beside `cells/` it holds the tasks and the runs themselves."""

    config_type: ClassVar[type] = AgentSweepConfig
    cell_type: ClassVar[type] = AgentCell


def agent_cells(
    condition: Condition, tasks: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> Iterator[AgentCell]:
    """The cells of one condition.

    Args:
        condition: of the runs.
        tasks: ids of the matters by group.
        seeds: of the compactor, or of the sampling.
    """
    for group, ids in tasks.items():
        for identifier in ids:
            for seed in seeds:
                yield AgentCell(group, identifier, **asdict(condition), seed=seed)


AGENT_PRESETS = {
    "quickstart": AgentSweepConfig(
        relevance=(1.0, 0.25), backends=("memo", "memo_oracle", "kv", "trim"), methods=("still-uneven", "still"),
        budgets=("128t",), count=2, together=6, probe=False,
    )
}
