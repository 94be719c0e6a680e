"""Generate synthetic matters: short legal documents made of incompressible facts.

A matter is a few documents of plain template English. Each asked fact ties one party, met in one phrase, to
a value drawn from at least 65,536; some facts are stated and later amended, and only the amended value is
right. Difficulty is a frozen record whose hash stands beside every number measured on it.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass, field

from ..questions import Document
from .templates import ATTRIBUTES, FILLERS, VALUE_FILLERS, pick
from .words import draw_company, draw_value


@dataclass(frozen=True)
class Difficulty:
    """How hard a matter is to read. Every field enters `digest`, which result rows carry.

    Attributes:
        name: what result rows call it.
        facts: asked facts in a matter.
        amended: share of the facts that a later document supersedes.
        fillers: sentences without a value, per asked fact.
        value_fillers: distractor sentences with a value of no party, per asked fact.
        documents: documents in a matter; amendments stand in the last one.
    """

    name: str
    facts: int
    amended: float = 0.125
    fillers: float = 0.15
    value_fillers: float = 0.2
    documents: int = 4

    @property
    def digest(self) -> str:
        """Eight hex digits that change with any field and with the sentences themselves."""
        from . import words

        text = json.dumps(
            [
                *(asdict(self), repr(ATTRIBUTES), FILLERS, VALUE_FILLERS),
                *(words.STEMS, words.ENDINGS, words.TRADES, words.GIVEN_NAMES, words.HELD_OUT_SHARE),
            ],
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:8]


DIFFICULTIES = {
    "tiny": Difficulty("tiny", facts=8, documents=2),
    "easy": Difficulty("easy", facts=24, documents=3),
    "standard": Difficulty("standard", facts=64),
    "long": Difficulty("long", facts=256, documents=16),
    "longer": Difficulty("longer", facts=1024, documents=64),
}
"""Named difficulties. All numbers in the README use `standard` unless they say otherwise."""


@dataclass(frozen=True)
class Fact:
    """One thing a matter says, how it is asked for, and what answers it.

    Attributes:
        party: the name that makes the fact unique in its matter.
        value: the only right answer, as the documents write it.
        superseded: values that earlier documents gave and an amendment replaced.
        document: index of the document that holds the right value.
        unseen_template: the statement or the question is one that training never shows.
    """

    id: str
    attribute: str
    kind: str
    party: str
    value: str
    question: str
    statement: str
    superseded: tuple[str, ...] = ()
    document: int = 0
    unseen_template: bool = False


@dataclass(frozen=True)
class Matter:
    """Documents in reading order and the facts that can be asked of them."""

    seed: int
    difficulty: Difficulty
    split: str
    documents: tuple[Document, ...]
    facts: tuple[Fact, ...] = field(repr=False)

    @property
    def text(self) -> str:
        """The whole matter as one context, each document under its name."""
        return "\n".join(f"{doc.name}\n{doc.text}" for doc in self.documents)


def generate_matter(
    seed: int,
    difficulty: Difficulty | str = "standard",
    split: str = "held_out",
    unseen_templates: bool = False,
) -> Matter:
    """Make the matter of this seed.

    Args:
        seed: the same seed, difficulty and split always give the same matter.
        difficulty: a `Difficulty` or the name of one in `DIFFICULTIES`.
        split: "train" or "held_out": which names and values may be drawn.
        unseen_templates: use only templates that training never shows.

    Raises:
        KeyError: the difficulty has no such name.
        ValueError: `split` is neither "train" nor "held_out".
    """
    if isinstance(difficulty, str):
        if difficulty not in DIFFICULTIES:
            raise KeyError(f"no difficulty is called {difficulty!r}; there are {', '.join(DIFFICULTIES)}")
        difficulty = DIFFICULTIES[difficulty]
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'held_out'")
    rng = random.Random(f"{split}:{unseen_templates}:{seed}")

    parties: dict[str, None] = {}
    while len(parties) < difficulty.facts:
        parties[draw_company(rng, split)] = None

    last = difficulty.documents - 1
    amended = set(rng.sample(range(difficulty.facts), round(difficulty.amended * difficulty.facts)))
    sentences: list[list[str]] = [[] for _ in range(difficulty.documents)]
    facts = []
    for index, party in enumerate(parties):
        attribute = rng.choice(ATTRIBUTES)
        is_amended = index in amended and last > 0
        place = rng.randrange(last if is_amended else difficulty.documents)
        value = draw_value(attribute.kind, rng, split)
        statement = _sentence(attribute.statements, rng, unseen_templates, party, value)
        sentences[place].append(statement)
        superseded: tuple[str, ...] = ()
        if is_amended:
            superseded, old = (value,), value
            while value == old:
                value = draw_value(attribute.kind, rng, split)
            place = last
            statement = _sentence(attribute.amendments, rng, unseen_templates, party, value)
            sentences[place].append(statement)
        question = rng.choice(pick(attribute.questions, unseen_templates)).format(c=party)
        facts.append(
            Fact(f"C-{index + 1:03d}", attribute.name, attribute.kind, party, value, question, statement,
                 superseded, place, unseen_templates)
        )  # fmt: skip

    for _ in range(round(difficulty.fillers * difficulty.facts)):
        rng.choice(sentences).append(rng.choice(FILLERS))
    for _ in range(round(difficulty.value_fillers * difficulty.facts)):
        kind = rng.choice(list(VALUE_FILLERS))
        rng.choice(sentences).append(VALUE_FILLERS[kind].format(v=draw_value(kind, rng, split)))

    documents = []
    for number, body in enumerate(sentences):
        rng.shuffle(body)
        body = body or [FILLERS[0]]  # small matters may leave a document without a fact
        kind = "amendment" if number == last and amended and last > 0 else "document"
        documents.append(Document(f"{kind}-{number + 1}.txt", " ".join(body)))
    return Matter(seed, difficulty, split, tuple(documents), tuple(facts))


def _sentence(options: tuple[str, ...], rng: random.Random, unseen: bool, party: str, value: str) -> str:
    return rng.choice(pick(options, unseen)).format(c=party, v=value)
