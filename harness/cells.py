"""Cells of a sweep: what one is, and the folder that keeps one JSON file for each.

A cell is one method at one ratio and seed on one question set. Its file is written whole or not at all, so a
sweep that is killed loses the cell in flight, or the few that are asked in one batch, and nothing else. This module
imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

FORMAT = 1
FLOOR, CEILING = "none", "full"
QUANTISED = ("int8", "int4")
CONTROLS = ("still-untrained", "still-wrong-matter")
UNEVEN = "-uneven"
"""Ending of a method whose slots are divided over the heads by a split: `still-uneven`, `snapkv-uneven`."""

OURS = {"still": "STILL", f"still{UNEVEN}": "STILL, uneven heads"}
"""Trained compactors, as people call them."""

PLACED = "still-placed"
"""A compactor that stands where the trained one stands, and copies: what its placement brings without its training."""

CHUNKS = "-chunks"
"""Ending of a trained compactor that reads what is longer than its trained chunk chunk by chunk: `still-chunks`."""

CHUNKED = tuple(f"{name}{CHUNKS}" for name in OURS)

LEARNED = (*OURS, *CHUNKED, PLACED, *CONTROLS)
"""Rows made by a STILL compactor: trained ones, one that only places, untrained, and asked about another matter."""

WITHOUT_RATIO = (FLOOR, CEILING, *QUANTISED)
"""Methods whose size no ratio sets."""

METHODS = (
    "full", "none", "still", "still-untrained", "still-wrong-matter", "truncation", "random", "streaming_llm", "knorm",
    "keydiff", "snapkv", "h2o", "expected_attention", "attention_matching", "int8", "int4",
)  # fmt: skip
"""Every row that is computed by default; `cartridge` trains on each context and must be asked for."""


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep computes. Every field enters the digest that its results folder is bound to.

    Attributes:
        model: causal language model: `pocket`, a folder or a Hub id
        compactor: trained STILL compactors: the name of a model that brings its own, folders (a folder of folders is
            one compactor per seed), or Hub ids
        split: JSON file of `still budgets` for methods such as `still-uneven` and `snapkv-uneven`; the compactor's own
            unless given
        tasks: `matters`, `matters-unseen` (templates that training never shows), `ruler`, `ruler/TASK`, or paths of
            question sets and LAB tasks; `TASK:METHOD+METHOD` computes only these methods of it
        difficulty: of the synthetic matters
        methods: rows to compute; `full` and `none` are always among them. `still-chunks` reads what is longer than
            the compactor's trained chunk chunk by chunk, where `still` goes over it in one pass
        ratios: context tokens per slot
        seeds: of the compactors' training, and of methods that draw at random
        count: question sets of each task
        first: seed of the first question set
        questions: questions asked of each set, drawn uniformly; 0 asks all
        tokens: context tokens of a RULER task
        max_new_tokens: longest answer
        dtype: of the model's weights
    """

    model: str = "pocket"
    compactor: tuple[str, ...] = ("pocket",)
    split: str = ""
    tasks: tuple[str, ...] = ("matters",)
    difficulty: str = "standard"
    methods: tuple[str, ...] = METHODS
    ratios: tuple[float, ...] = (2, 4, 8, 16, 32, 64)
    seeds: tuple[int, ...] = (0,)
    count: int = 20
    first: int = 0
    questions: int = 0
    tokens: int = 4096
    max_new_tokens: int = 24
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, list | tuple):
                if not value:
                    raise ValueError(f"{entry.name} is empty; name at least one")
                object.__setattr__(self, entry.name, tuple(dict.fromkeys(value)))
        object.__setattr__(self, "ratios", tuple(int(r) if float(r).is_integer() else float(r) for r in self.ratios))
        for ratio in self.ratios:
            if not 1 <= ratio < math.inf:
                raise ValueError(f"ratio is {ratio}; it must be 1 or more (tokens per slot)")
        for name in ("count", "max_new_tokens", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.questions < 0:
            raise ValueError(f"questions is {self.questions}; it must be 0 (all) or more")
        object.__setattr__(self, "methods", tuple(dict.fromkeys((CEILING, FLOOR, *self.methods))))
        self.methods_of  # noqa: B018 - refuses a task that is named twice

    @property
    def methods_of(self) -> dict[str, tuple[str, ...]]:
        """For each task, without its own list of methods, the methods to compute."""
        found = {}
        for entry in self.tasks:
            task, _, own = entry.partition(":")
            if task in found:
                raise ValueError(f"the task {task!r} is named twice; name it once, with all its methods")
            found[task] = tuple(dict.fromkeys((CEILING, FLOOR, *own.split("+")))) if own else self.methods
        return found

    def to_json(self) -> dict:
        """The fields as JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: dict) -> SweepConfig:
        """Read what `to_json` wrote."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


PRESETS = {
    "quickstart": SweepConfig(
        tasks=("matters", f"matters-unseen:still+still{UNEVEN}+still-untrained"),
        methods=(
            *METHODS, f"still{UNEVEN}", PLACED, f"random{UNEVEN}", f"attention_matching{UNEVEN}",
        ),
        count=7, questions=32, max_new_tokens=16,
    ),
    "uneven": SweepConfig(
        methods=(
            "still", f"still{UNEVEN}", "attention_matching", f"attention_matching{UNEVEN}", "keydiff",
            f"keydiff{UNEVEN}", f"snapkv{UNEVEN}", f"h2o{UNEVEN}", f"expected_attention{UNEVEN}",
        ),
        seeds=(0, 1, 2), count=12, questions=32, max_new_tokens=16,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One method at one ratio and seed on one question set.

    Attributes:
        ratio: context tokens per slot, or None where no ratio sets the size.
        seed: seed of the compactor or of the draws, or None where nothing depends on one.
    """

    task: str
    set_id: str
    method: str
    ratio: float | None = None
    seed: int | None = None

    @property
    def stem(self) -> str:
        """The cell as the beginning of a file's name."""
        ratio = "" if self.ratio is None else f"-{self.ratio:g}x"
        seed = "" if self.seed is None else f"-s{self.seed}"
        return f"{_safe(self.method)}{ratio}{seed}"

    @property
    def label(self) -> str:
        """The cell for people: method, ratio and seed."""
        ratio = "" if self.ratio is None else f" {self.ratio:g}x"
        return f"{self.method}{ratio}" + ("" if self.seed is None else f" seed {self.seed}")

    def key(self, binding: str) -> str:
        """Sixteen hex digits that change with the cell and with what the folder is bound to."""
        return digest({"cell": asdict(self), "binding": binding})[:16]


def digest(value: object) -> str:
    """SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cells_of(
    config: SweepConfig, task: str, set_id: str, seeds: Mapping[str, Sequence[int]]
) -> Iterator[Cell]:
    """The cells of one question set, ceiling and floor first.

    Args:
        task: a key of `config.methods_of`.
        seeds: for each method that depends on a seed, the seeds to run; the others get one cell.
    """
    for method in config.methods_of[task]:
        for ratio in (None,) if method in WITHOUT_RATIO else config.ratios:
            for seed in seeds.get(method, (None,)):
                yield Cell(task, set_id, method, ratio, seed)


class CellStore:
    """A results folder: `sweep.json` says what it is bound to, `cells/` holds one JSON file a cell.

    Attributes:
        binding: digest of the config and of the inputs' fingerprints; part of every cell's key.
        config_type: of the sweep.
        cell_type: of its cells.
    """

    config_type: ClassVar[type] = SweepConfig
    cell_type: ClassVar[type] = Cell

    def __init__(self, folder: str | Path, header: dict) -> None:
        self.folder, self.header = Path(folder), header
        self.binding = digest({name: header[name] for name in ("format", "config", "inputs")})
        self.config = self.config_type.from_json(header["config"])

    @classmethod
    def open(cls, folder: str | Path) -> CellStore:
        """Open a results folder to read it.

        Raises:
            FileNotFoundError: the folder holds no sweep.
            ValueError: `sweep.json` cannot be read, or another version wrote it.
        """
        path = Path(folder) / "sweep.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no sweep.json; give the --output folder of a `still sweep`")
        header = read_json(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} has format {header.get('format')}; this version reads {FORMAT}: sweep again")
        return cls(folder, header)

    @classmethod
    def create(cls, folder: str | Path, config: SweepConfig, inputs: dict, provenance: dict) -> CellStore:
        """Make a results folder, or take up the one that the same config and inputs made.

        Args:
            inputs: fingerprints of what the config only names (model, compactor, difficulty).
            provenance: kept for the report; it does not bind the folder.

        Raises:
            ValueError: the folder's results come from another config or other inputs.
        """
        folder = Path(folder)
        header = {"format": FORMAT, "config": config.to_json(), "inputs": inputs, "provenance": provenance}
        if (folder / "sweep.json").exists():
            store = cls.open(folder)
            for part in ("config", "inputs"):
                then, now = store.header[part], json.loads(json.dumps(header[part]))
                changed = [f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
                           for name in sorted({*then, *now}) if then.get(name) != now.get(name)]  # fmt: skip
                if changed:
                    raise ValueError(
                        f"{folder} holds results of another sweep: {'; '.join(changed)}. "
                        "Give another --output, or remove that folder"
                    )
            return store
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no sweep.json; give another --output")
        write_json(folder / "sweep.json", header)
        return cls(folder, header)

    def path(self, cell: Cell) -> Path:
        """The file of this cell: names for people, a key for the machine."""
        place = self.folder / "cells" / _safe(cell.task) / _safe(cell.set_id)
        return place / f"{cell.stem}-{cell.key(self.binding)}.json"

    def done(self, cell: Cell) -> bool:
        """True when the cell's result is on disk."""
        return self.path(cell).exists()

    def write(self, cell: Cell, result: dict) -> None:
        """Put the cell's result on disk, whole or not at all."""
        write_json(self.path(cell), {"format": FORMAT, "cell": asdict(cell), **result})

    def read(self, cell: Cell) -> dict:
        """The result of one cell."""
        return read_json(self.path(cell))

    def results(self) -> list[dict]:
        """Every cell's result, in the order of their paths."""
        results = []
        for path in sorted((self.folder / "cells").rglob("*.json")):
            result = read_json(path)
            if path != self.path(self.cell_type(**result["cell"])):
                raise ValueError(f"{path} belongs to another sweep; remove it and run `still sweep` again")
            results.append(result)
        return results


def read_json(path: Path) -> dict:
    """Read a JSON file.

    Raises:
        ValueError: the file is not JSON; the message says to remove it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run `still sweep` again") from None


def write_json(path: Path, value: object) -> None:
    """Write a JSON file in one step."""
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one, the new one or none, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _safe(name: str) -> str:
    """A name as one part of a path."""
    clean = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".")
    return clean[-80:] if clean == name else f"{clean[-60:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
