"""Write synthetic matters as LAB tasks: every family and every trap of the real ones, made offline.

`practice` tasks have a map of deliverables and criteria bound to one or to both of them; some are scenarios of a
slug, some keep their assignment in `instructions.md`. `contracts` tasks nest four levels, number criteria `C001`, have
no map, and name their output in the text alone. `firm-knowledge` tasks share one store of documents and state their
criteria plainly. Each rubric ends with distractors: a value that stands in the documents and must not be claimed.

A task appears under its name only when it is whole, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..questions import Document, depth_of, write_text
from .generate import DIFFICULTIES, Difficulty, Fact, Matter, generate_matter
from .templates import VALUE_FILLERS

FORMAT = 1
"""Raised when the same seed would give other files; a folder of another format is refused."""

MANIFEST = "manifest.json"
DISTRACTORS = 2
_AREAS = ("corporate-commercial", "real-estate", "finance-lending", "disputes")
_DOMAINS = (("supply-services", "obligations-schedule"), ("leases-licences", "term-abstract"))
AUTHORSHIP = "Give one line to each party, name the party in it as the documents do, and copy the value exactly."


@dataclass(frozen=True)
class LabTaskFiles:
    """One task before it is written.

    Attributes:
        path: under `tasks/`.
        task: the contents of `task.json`.
        documents: names (with folders) and texts, below `store`.
        store: the folder of the documents under `tasks/`.
        instructions: the text of `instructions.md`, for tasks that keep it there.
    """

    path: str
    task: dict[str, Any]
    documents: tuple[Document, ...]
    store: str
    instructions: str | None = None


def lab_task(matter: Matter, family: str) -> LabTaskFiles:
    """Lay a matter out as a LAB task.

    Raises:
        ValueError: there is no such family.
    """
    if family == "practice":
        return _practice(matter)
    if family == "contracts":
        return _contracts(matter)
    if family == "firm-knowledge":
        return _firm_knowledge(matter)
    raise ValueError(f"no family is called {family!r}; there are practice, contracts and firm-knowledge")


def write_lab_tasks(
    output: str | Path,
    family: str,
    seeds: Iterable[int],
    difficulty: Difficulty | str = "standard",
    split: str = "held_out",
    unseen_templates: bool = False,
) -> list[Path]:
    """Write the matters of these seeds as LAB tasks below `output/tasks`, and a manifest beside it.

    Tasks that are there already are left as they are. One folder may take more seeds and more families later, but
    only of the same difficulty, split and templates.

    Returns:
        The folders of the tasks, in the order of the seeds.

    Raises:
        ValueError: the folder was made with another config, or holds something else.
    """
    if isinstance(difficulty, str):
        difficulty = DIFFICULTIES[difficulty]
    seeds, output = list(seeds), Path(output)
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds are {seeds}; give at least one, none below 0")
    config = {
        "format": FORMAT,
        "difficulty": asdict(difficulty),
        "digest": difficulty.digest,
        "split": split,
        "unseen_templates": unseen_templates,
    }

    def make(seed: int) -> LabTaskFiles:
        return lab_task(generate_matter(seed, difficulty, split, unseen_templates), family)

    return place_tasks(output, family, seeds, config, make)


def place_tasks(
    output: Path, family: str, seeds: Sequence[int], config: dict[str, Any], make: Callable[[int], LabTaskFiles]
) -> list[Path]:
    """Write one task for each seed below `output/tasks`, and a manifest beside it; see `write_lab_tasks`."""
    first = make(seeds[0])  # refuses before it writes
    _claim(output, config, family, seeds)
    return [_write(output / "tasks", first if seed == seeds[0] else make(seed)) for seed in seeds]


def _claim(output: Path, config: dict[str, Any], family: str, seeds: Sequence[int]) -> None:
    """Write the manifest, or extend one of the same config."""
    file = output / MANIFEST
    manifest: dict[str, Any] = {"config": config, "families": {}}
    if file.is_file():
        manifest = json.loads(file.read_text(encoding="utf-8"))
        there = manifest.get("config", {})
        other = [f"{key} {there.get(key)!r}, not {config[key]!r}" for key in config if there.get(key) != config[key]]
        if other:
            raise ValueError(f"{output} was made with {'; '.join(other)}; name another folder or remove this one")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there and has no {MANIFEST}; name an empty or a new folder")
    known = manifest["families"].setdefault(family, [])
    manifest["families"][family] = sorted({*known, *seeds})
    manifest["versions"] = {"python": platform.python_version(), "still-kv": _version()}
    write_text(file, json.dumps(manifest, indent=2) + "\n")


def _write(root: Path, files: LabTaskFiles) -> Path:
    folder = root / files.path
    if folder.is_dir():
        return folder
    shared = not files.store.startswith(f"{files.path}/")
    if shared and not (root / files.store).is_dir():
        _place(root / files.store, {doc.name: doc.text for doc in files.documents})
    texts = {} if shared else {f"documents/{doc.name}": doc.text for doc in files.documents}
    texts["task.json"] = json.dumps(files.task, indent=2, ensure_ascii=False) + "\n"
    if files.instructions is not None:
        texts["instructions.md"] = files.instructions
    _place(folder, texts)
    return folder


def _place(folder: Path, texts: dict[str, str]) -> None:
    """Write a folder beside its place and move it there whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, text in texts.items():
        file = partial / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    partial.replace(folder)


def _practice(matter: Matter) -> LabTaskFiles:
    seed, area = matter.seed, _AREAS[matter.seed % len(_AREAS)]
    documents = in_order(matter)
    instructions = (
        "Review the attached matter and report, for every party that the documents name, the one term that they fix "
        "for it, as it stands after all amendments. Put sums and reference numbers into the schedule, dates and "
        f"people into the memo; an amended term may stand in either. {AUTHORSHIP}\n\n"
        "Output: `schedule.md` and `memo.md`."
    )
    criteria = []
    for number, fact in enumerate(matter.facts):
        bound = ["schedule.md"] if fact.kind in ("sum", "reference") else ["memo.md"]
        if fact.superseded:
            bound = ["memo.md", "schedule.md"]
        criterion = criterion_of(f"C-{number + 1:03d}", f"ISSUE_{number + 1:03d}: ", fact, documents)
        criterion["deliverables"] = bound
        criterion["sources"] = [documents[fact.document].name]
        if number == 0:
            criterion["evaluation_options"] = {"include_docx_redlines": True}
        criteria.append(criterion)
    for number, (kind, value) in enumerate(_distractors(matter)):
        criterion = distractor_of(f"C-{len(criteria) + 1:03d}", f"DISTRACTOR_{number + 1:03d}: ", kind, value)
        criteria.append({**criterion, "deliverables": ["memo.md", "schedule.md"]})
    task: dict[str, Any] = {
        "title": f"Schedule of Current Terms, Matter {seed}",
        "work_type": "review",
        "tags": [area, "synthetic"],
    }
    in_file = seed % 4 == 3
    if not in_file:
        task["instructions"] = instructions
    task |= {"deliverables": {"schedule.md": "schedule.md", "memo.md": "memo.md"}, "criteria": criteria}
    name = f"{area}/schedule-current-terms-{seed}"
    if seed % 2:
        name = f"{area}/schedule-current-terms/scenario-{seed:02d}"
    return LabTaskFiles(name, task, documents, f"{name}/documents", instructions if in_file else None)


def _contracts(matter: Matter) -> LabTaskFiles:
    domain, slug = _DOMAINS[matter.seed % len(_DOMAINS)]
    name = f"contracts/{domain}/{slug}/scenario-{matter.seed:02d}"
    documents = tuple(
        Document(f"{'amendments' if 'amendment' in doc.name else 'agreement'}/{doc.name}", doc.text)
        for doc in in_order(matter)
    )
    criteria = [criterion_of(f"C{number + 1:03d}", "", fact, documents) for number, fact in enumerate(matter.facts)]
    for kind, value in _distractors(matter):
        criteria.append(distractor_of(f"C{len(criteria) + 1:03d}", "DISTRACTOR: ", kind, value))
    task = {
        "title": f"Abstract of Terms, Scenario {matter.seed}",
        "instructions": "Abstract the contract papers into one list: for every party the term that binds it now, after "
        f"all amendments. {AUTHORSHIP}\n\n### Output:\nterm-abstract.md",
        "criteria": criteria,
    }
    return LabTaskFiles(name, task, documents, f"{name}/documents")


def _firm_knowledge(matter: Matter) -> LabTaskFiles:
    number, client = f"{matter.seed + 1:03d}", f"{1001 + matter.seed}-00001"
    documents = tuple(
        Document(f"{1800000000 + 100 * matter.seed + index}__{doc.name}", doc.text)
        for index, doc in enumerate(matter.documents)
    )
    criteria = []
    for index, fact in enumerate(matter.facts):
        criterion = criterion_of(f"C-{index + 1:03d}", f"Matter {client} — ", fact, documents)
        criterion["match_criteria"] = f"States {fact.value} as the {fact.attribute} of {fact.party} in matter {client}."
        criterion["expect"]["question"] = f"In matter {client}: {fact.question}"
        criteria.append(criterion)
    for kind, value in _distractors(matter):
        criterion = distractor_of(f"C-{len(criteria) + 1:03d}", f"Matter {client}, precision — ", kind, value)
        criterion["match_criteria"] = f"Does not state {value}, which no party of matter {client} is bound by."
        criteria.append(criterion)
    task = {
        "id": number,
        "title": f"Current terms of the parties to matter {client}",
        "instructions": f"What did the parties to matter {client} end up agreeing? Look through our files and tell me "
        f"the current term of each of them. {AUTHORSHIP}",
        "docs_dir": "firm-knowledge/dms",
        "criteria": criteria,
    }
    return LabTaskFiles(f"firm-knowledge/tasks/{number}", task, documents, f"firm-knowledge/dms/{client}")


def in_order(matter: Matter) -> tuple[Document, ...]:
    """The documents under names that sort in reading order, since a folder has no other: `03-amendment.txt`."""
    names = (re.sub(r"-\d+(?=\.)", "", doc.name) for doc in matter.documents)
    return tuple(
        Document(f"{number:02d}-{name}", doc.text)
        for number, (name, doc) in enumerate(zip(names, matter.documents, strict=True), 1)
    )


def criterion_of(identifier: str, prefix: str, fact: Fact, documents: tuple[Document, ...]) -> dict[str, Any]:
    """A criterion of `task.json` that passes when a fact is stated, with what the exact judge needs."""
    stale = f" or gives {' or '.join(fact.superseded)}, which was superseded" if fact.superseded else ""
    return {
        "id": identifier,
        "title": f"{prefix}States the {fact.attribute} of {fact.party}",
        "match_criteria": f"PASS if the output gives {fact.value} as the {fact.attribute} of {fact.party}. "
        f"FAIL if it gives none or another value{stale}.",
        "expect": {
            "value": fact.value,
            "superseded": list(fact.superseded),
            "kind": fact.kind,
            "question": fact.question,
            "party": fact.party,
            "attribute": fact.attribute,
            "amended": bool(fact.superseded),
            "unseen_template": fact.unseen_template,
            "depth": round(depth_of(documents, fact.document, fact.statement), 6),
        },
    }


def distractor_of(identifier: str, prefix: str, kind: str, value: str) -> dict[str, Any]:
    """A criterion that passes when a value is not stated."""
    return {
        "id": identifier,
        "title": f"{prefix}Does not report {value}",
        "match_criteria": f"PASS if the output does not state {value}, which binds no party. FAIL if it does.",
        "expect": {"value": value, "superseded": [], "kind": kind, "question": "", "absent": True},
    }


def _distractors(matter: Matter) -> list[tuple[str, str]]:
    """Kind and value of the first distractor sentences in the documents, unless a fact has the same value."""
    taken = {value for fact in matter.facts for value in (fact.value, *fact.superseded)}
    found: dict[str, str] = {}
    for kind, sentence in VALUE_FILLERS.items():
        before, after = (re.escape(part) for part in sentence.split("{v}"))
        for doc in matter.documents:
            for value in re.findall(f"{before}(.+?){after}", doc.text):
                if value not in taken:
                    found.setdefault(value, kind)
    return [(kind, value) for value, kind in list(found.items())[:DISTRACTORS]]


def _version() -> str:
    try:
        return version("still-kv")
    except PackageNotFoundError:
        return "unknown"
