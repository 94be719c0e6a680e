"""Questions about a context, with the answers that are right and the ones that were right once.

A `QuestionSet` is what a sweep asks of a cache: documents that become the context, and questions of which each
carries its own expectation, so that an exact judge can score them. Synthetic matters (`matters.question_set`),
RULER (`ruler.generate`) and LAB tasks with expectations (`tasks.question_set`) all end here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Document:
    """A text of the context: its name and what it says."""

    name: str
    text: str


@dataclass(frozen=True)
class Question:
    """One question and what answers it.

    Attributes:
        id: unique in its set.
        text: the question as it is put to the model.
        answer: the right answer, exactly as the documents write it. Where several values are asked for at once, all
            of them joined by ", ": the reference text that a likelihood is measured on.
        wrong: values that the documents give and that are no longer right (superseded ones).
        tags: what result rows group by. Matters: attribute, kind, amended, unseen_template, depth. RULER: task, kind,
            haystack, depth, depths.
        answers: the values that the judge looks for; `(answer,)` unless several are asked for at once.
    """

    id: str
    text: str
    answer: str
    wrong: tuple[str, ...] = ()
    tags: dict[str, Any] = field(default_factory=dict)
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "wrong", tuple(self.wrong))
        object.__setattr__(self, "answers", tuple(self.answers) or (self.answer,))
        if not self.answer.strip() or not all(value.strip() for value in (*self.answers, *self.wrong)):
            raise ValueError(f"question {self.id!r} has an empty answer or wrong value; every value needs some text")
        if both := set(self.answers) & set(self.wrong):
            raise ValueError(f"question {self.id!r} calls {sorted(both)} both right and wrong; drop it from one side")


@dataclass(frozen=True)
class QuestionSet:
    """A context and the questions asked of it.

    Attributes:
        id: names the context in result rows; the cluster of its questions in the statistics.
        documents: in reading order.
        source: where it came from, enough to make it again (generator, seed, difficulty digest, lengths).
    """

    id: str
    documents: tuple[Document, ...]
    questions: tuple[Question, ...]
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = [question.id for question in self.questions]
        if twice := sorted({each for each in ids if ids.count(each) > 1}):
            raise ValueError(f"question set {self.id!r} has more than one question called {twice[0]!r}; ids are unique")

    @property
    def text(self) -> str:
        """The whole context as one text, each document under its name."""
        return context_text(self.documents)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` turns back into an equal set."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuestionSet:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a key is missing or unknown.
        """
        try:
            documents = tuple(Document(**each) for each in data["documents"])
            questions = tuple(Question(**each) for each in data["questions"])
            return cls(data["id"], documents, questions, dict(data.get("source", {})))
        except (KeyError, TypeError) as problem:
            raise ValueError(f"this is no question set: {problem}; write one with QuestionSet.to_json") from problem

    def save(self, path: str | Path) -> None:
        """Write the set as a JSON file, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> QuestionSet:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it holds no question set.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from problem


def context_text(documents: tuple[Document, ...]) -> str:
    """Documents in reading order as one text, each under its name."""
    return "\n".join(f"{doc.name}\n{doc.text}" for doc in documents)


def depth_of(documents: tuple[Document, ...], index: int, passage: str) -> float:
    """Where a passage starts in the context: 0.0 at its first character, towards 1.0 at its last.

    Raises:
        ValueError: document `index` does not hold the passage.
    """
    place = documents[index].text.find(passage)
    if place < 0:
        raise ValueError(f"{documents[index].name} does not say {passage!r}")
    before = len(context_text((*documents[:index], Document(documents[index].name, ""))))
    return (before + place) / len(context_text(documents))


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old one or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
