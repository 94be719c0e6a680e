"""LAB tasks as they lie on disk: practice, contracts and firm-knowledge, ours and Harvey's.

`task.json` holds the assignment and the private rubric in one file, so what a solving agent may see is a thing of
its own: `LabTask.agent_view()`. Keys that this loader does not know are kept, and a task is written back equal.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .questions import Document, Question, QuestionSet

FAMILIES = ("practice", "contracts", "firm-knowledge")


class LabTaskError(ValueError):
    """A task folder that cannot be read, or whose rubric cannot be judged."""


@dataclass(frozen=True)
class Criterion:
    """One binary criterion of a rubric.

    Attributes:
        id: `C-001` or `C001`; unique in its task only, so its key is (task id, criterion id).
        match_criteria: what the judge is asked ("PASS if ... FAIL if ...", or a plain statement).
        deliverables: the outputs that it is judged on; None or empty in the file means every output.
        sources: documents that it was written from; for the reader, not for the judge.
        include_redlines: docx outputs are read with all tracked changes instead of accepting them.
        expect: our own key: an expectation that `judge.exact_criterion` can check.
        raw: the criterion as the file has it, unknown keys included.
    """

    id: str
    title: str
    match_criteria: str
    deliverables: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    include_redlines: bool = False
    expect: dict[str, Any] | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def rubric_hash(self) -> str:
        """Sixteen hex digits of what a verdict depends on: the two texts, the bound files and how they are read."""
        judged = [self.title, self.match_criteria, list(self.deliverables), self.include_redlines]
        return hashlib.sha256(json.dumps(judged, ensure_ascii=False).encode()).hexdigest()[:16]

    @property
    def is_distractor(self) -> bool:
        """It passes when something is *not* claimed."""
        return "DISTRACTOR" in self.title.upper() or bool((self.expect or {}).get("absent"))


@dataclass(frozen=True)
class AgentTask:
    """What a solving agent may see of a task: no criteria, no title, no unknown key and no path to `task.json`.

    Attributes:
        deliverables: the output files asked for by name; empty where the task has no map.
        documents: names of the documents, with "/" between folders.
    """

    id: str
    instructions: str
    deliverables: tuple[str, ...]
    documents: tuple[str, ...]
    _root: Path = field(repr=False)

    def read(self, name: str) -> bytes:
        """The bytes of one document.

        Raises:
            FileNotFoundError: it is not one of `documents`.
        """
        if name not in self.documents:
            raise FileNotFoundError(f"{name!r} is no document of task {self.id!r}; it has {len(self.documents)} others")
        return (self._root / name).read_bytes()

    @property
    def folder(self) -> Path:
        """Where the documents lie on disk, for a sandbox that shows the originals; it may be missing."""
        return self._root

    @property
    def hidden(self) -> tuple[Path, ...]:
        """What lies in `folder` and is not the agent's: hidden files and folders."""
        found = (path for path in self._root.rglob(".*") if not path.is_symlink())
        return tuple(sorted(path for path in found if not _hidden(path.parent.relative_to(self._root))))


@dataclass(frozen=True)
class LabTask:
    """A task with its rubric.

    Attributes:
        id: the path under `tasks/`, for example `contracts/leases/rent-review/scenario-02`.
        folder: where `task.json` lies.
        family: "practice", "contracts" or "firm-knowledge".
        title: the only text of the task that a judge sees.
        instructions: what the agent is asked, from `task.json` or from `instructions.md` beside it.
        deliverables: name -> file name; None where the task has no map and a judge gets every output.
        docs_dir: firm-knowledge: the shared store, relative to the task's folder (LAB's own) or to `tasks/`.
        own_id: firm-knowledge: the task's own number.
        raw: the file as it was read.
    """

    id: str
    folder: Path
    family: str
    title: str
    instructions: str
    criteria: tuple[Criterion, ...]
    deliverables: dict[str, str] | None = None
    work_type: str | None = None
    tags: tuple[str, ...] = ()
    docs_dir: str | None = None
    own_id: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def rubric_hash(self) -> str:
        """Sixteen hex digits over the criteria, their ids and their order."""
        parts = [f"{criterion.id} {criterion.rubric_hash}" for criterion in self.criteria]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def digest(self) -> str:
        """Of what it asks and how that is graded: tasks of two makers, or of two settings of one, may share an id."""
        return hashlib.sha256(f"{self.instructions}\n{self.rubric_hash}".encode()).hexdigest()[:16]

    @property
    def practice_area(self) -> str:
        """What results and splits are grouped by: the first part of the id, for contracts the first two."""
        parts = self.id.split("/")
        return "/".join(parts[: 2 if self.family == "contracts" and len(parts) > 2 else 1])

    @property
    def documents_folder(self) -> Path | None:
        """The folder that the agent reads: the shared store where it is found, else `documents/`; None without.

        Raises:
            LabTaskError: `docs_dir` leads out of `tasks/`, or holds the task itself and so its rubric.
        """
        if self.docs_dir:
            root = self.folder.parents[self.id.count("/")]
            stores = [(base / self.docs_dir).resolve() for base in (self.folder, root)]
            sound = [_holds(root, store) and not _holds(store, self.folder) for store in stores]
            found = [index for index, store in enumerate(stores) if store.is_dir()]
            if not any(sound) or (found and not sound[found[0]]):
                raise LabTaskError(f"docs_dir {self.docs_dir!r} of {self.id} is no folder of documents under {root}")
            if found:
                return stores[found[0]]
        beside = self.folder / "documents"
        return beside if beside.is_dir() else None

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents below `documents_folder`, nested ones too, sorted."""
        root = self.documents_folder
        if root is None:
            return ()
        files = (path for path in root.rglob("*") if path.is_file() and not _hidden(path.relative_to(root)))
        return tuple(sorted(path.relative_to(root).as_posix() for path in files))

    def agent_view(self) -> AgentTask:
        """What may be handed to a solving agent.

        Raises:
            LabTaskError: a document is a rubric, or a link to something outside of the documents.
        """
        root, names = self.documents_folder, self.documents
        for name in names:
            if Path(name).name == "task.json" or not _holds(root, root / name):
                raise LabTaskError(f"document {name!r} of {self.id} is a rubric or a link to outside; move it away")
        asked = tuple((self.deliverables or {}).values())
        return AgentTask(self.id, self.instructions, asked, names, root or self.folder / "documents")

    def files_for(self, criterion: Criterion, outputs: Iterable[str]) -> tuple[str, ...]:
        """The output files that a criterion is judged on: those it is bound to, else every output in sorted order.

        A bound file is named whether or not it is among the outputs: a missing deliverable is for the grader to say.
        """
        names = self.deliverables or {}
        return tuple(names.get(each, each) for each in criterion.deliverables) or tuple(sorted(outputs))

    def to_json(self) -> dict[str, Any]:
        """The task as its file had it, with the criteria as they are now."""
        return {**copy.deepcopy(self.raw), "criteria": [copy.deepcopy(each.raw) for each in self.criteria]}

    def question_set(self) -> QuestionSet:
        """The documents as a context, and a question for each criterion that expects a value to be present.

        Raises:
            LabTaskError: no criterion carries such an expectation, or a document is no plain text.
        """
        questions = []
        for criterion in self.criteria:
            expect = criterion.expect
            if not expect or expect.get("absent"):
                continue
            tags = {key: value for key, value in expect.items() if key not in ("value", "superseded", "question")}
            wrong = tuple(expect.get("superseded", ()))
            questions.append(Question(criterion.id, expect["question"], expect["value"], wrong, tags))
        if not questions:
            raise LabTaskError(f"no criterion of {self.id} expects a value that can be asked for; a judge must read it")
        documents = []
        for name in self.documents:
            try:
                documents.append(Document(name, (self.documents_folder / name).read_text(encoding="utf-8")))
            except UnicodeDecodeError as problem:
                raise LabTaskError(f"document {name!r} of {self.id} is no plain text; convert it to .txt") from problem
        source = {"generator": "lab", "rubric": self.rubric_hash}
        return QuestionSet(self.id, tuple(documents), tuple(questions), source)


def load_task(path: str | Path, root: str | Path | None = None) -> LabTask:
    """Read one task of any family.

    Args:
        path: the task's folder, or its `task.json`.
        root: the `tasks/` folder that ids are relative to; found from the path when left out.

    Raises:
        LabTaskError: a required key is missing or of the wrong kind, the rubric is empty, or two criteria share an id.
        FileNotFoundError: there is no `task.json`.
    """
    path = Path(path)
    file = path if path.is_file() else path / "task.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no task.json in {path}; name the folder of one task")
    folder = file.parent.resolve()
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise LabTaskError(f"{file} is no JSON: {problem}") from problem
    if not isinstance(raw, dict):
        raise LabTaskError(f"{file} holds a {type(raw).__name__}; a task is a JSON object")

    root = Path(root).resolve() if root is not None else _tasks_root(folder)
    name = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else folder.name
    instructions = raw.get("instructions")
    if instructions is None and (folder / "instructions.md").is_file():
        instructions = (folder / "instructions.md").read_text(encoding="utf-8")
    if not isinstance(instructions, str) or not instructions.strip():
        raise LabTaskError(f"{name} has no 'instructions' and no instructions.md beside task.json; write one of them")
    deliverables = raw.get("deliverables")
    if deliverables is not None and not isinstance(deliverables, dict):
        raise LabTaskError(f"{name} has deliverables {deliverables!r}; they are a map of names to file names")
    return LabTask(
        id=name,
        folder=folder,
        family=_family(name, raw),
        title=_text(raw, "title", name),
        instructions=instructions,
        criteria=_criteria(raw, name),
        deliverables=deliverables or None,
        work_type=raw.get("work_type"),
        tags=_names(raw, "tags", name),
        docs_dir=raw.get("docs_dir"),
        own_id=raw.get("id"),
        raw=raw,
    )


def find_tasks(root: str | Path) -> list[Path]:
    """Folders of the tasks below `root`, at any depth, in sorted order; documents are not searched."""
    root = Path(root)
    files = (file for file in root.rglob("task.json") if not {"documents", "dms"} & set(file.relative_to(root).parts))
    return sorted(file.parent for file in files if not _hidden(file.relative_to(root)))


def problems(task: LabTask) -> list[str]:
    """What is odd about a task that loads: things which a grader or an agent would stumble over."""
    found = []
    names = set(task.deliverables or {}) | set((task.deliverables or {}).values())
    for criterion in task.criteria:
        found += [
            f"{criterion.id} is bound to {each!r}, which the task does not ask for"
            for each in criterion.deliverables
            if each not in names
        ]
        if criterion.expect is not None and (missing := _missing_expectation(criterion.expect)):
            found.append(f"{criterion.id} has an 'expect' block without {missing}")
    if task.docs_dir and task.documents_folder in (None, task.folder / "documents"):
        instead = "; documents/ beside the task is read instead" if task.documents_folder else ""
        found.append(f"docs_dir {task.docs_dir!r} is not there{instead}")
    if not task.documents:
        found.append("it has no documents")
    return found


def _missing_expectation(expect: Mapping[str, Any]) -> str:
    needed = ("value",) if expect.get("absent") else ("value", "question", "party", "kind")
    return ", ".join(key for key in needed if not expect.get(key))


def _criteria(raw: Mapping[str, Any], name: str) -> tuple[Criterion, ...]:
    listed = raw.get("criteria")
    if not isinstance(listed, list) or not listed:
        raise LabTaskError(f"{name} has an empty rubric; 'criteria' is a list of at least one criterion")
    criteria: dict[str, Criterion] = {}
    for index, each in enumerate(listed):
        where = f"criterion {index + 1} of {name}"
        if not isinstance(each, dict):
            raise LabTaskError(f"{where} is a {type(each).__name__}; a criterion is a JSON object")
        criterion = Criterion(
            id=_text(each, "id", where),
            title=_text(each, "title", where),
            match_criteria=_text(each, "match_criteria", where),
            deliverables=_names(each, "deliverables", where),
            sources=_names(each, "sources", where),
            include_redlines=bool((each.get("evaluation_options") or {}).get("include_docx_redlines")),
            expect=each.get("expect"),
            raw=each,
        )
        if criterion.id in criteria:
            raise LabTaskError(f"two criteria of {name} have the id {criterion.id!r}; ids are unique in a task")
        criteria[criterion.id] = criterion
    return tuple(criteria.values())


def _text(raw: Mapping[str, Any], key: str, where: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise LabTaskError(f"{where} has {key} {value!r}; it needs some text there")
    return value


def _names(raw: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise LabTaskError(f"{where} has {key} {value!r}; it is a list of file names")
    return tuple(value)


def _family(name: str, raw: Mapping[str, Any]) -> str:
    first = name.split("/")[0]
    if first == "firm-knowledge" or "docs_dir" in raw:
        return "firm-knowledge"
    return "contracts" if first == "contracts" else "practice"


def _tasks_root(folder: Path) -> Path:
    """The `tasks/` that an id is relative to: the nearest one above, but never firm-knowledge's own."""
    for parent in folder.parents:
        if parent.name == "tasks" and parent.parent.name != "firm-knowledge":
            return parent
    for parent in folder.parents:
        if parent.name == "firm-knowledge":
            return parent.parent
    return folder.parent


def _holds(folder: Path, inner: Path) -> bool:
    return inner.resolve().is_relative_to(folder.resolve())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
