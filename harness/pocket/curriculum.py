"""Training rows of the pocket base: a matter and all its questions, from easy matters to standard ones."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ...eval.matters import Difficulty, generate_matter
from ...eval.matters.templates import ATTRIBUTES, pick
from ...eval.matters.words import GIVEN_NAMES, SURNAMES, TRADES, draw_company, draw_value
from .dialogue import answer_text, context_messages
from .tokenizer import INSTRUCTION

IGNORE = -100


@dataclass(frozen=True)
class Stage:
    """What rows of one stage look like.

    Attributes:
        facts: facts in a matter.
        lists: share of rows that are bare lists of `party: value`.
        uniform: share of rows whose facts all have one attribute, so that only the party tells them apart.
        small: share of the lists that use a small vocabulary and no punctuation.
        until: go on once this share of the questions is answered wholly right (a running mean),
            or after `at_most` steps.
        amended: share of a matter's facts that a later document supersedes.
    """

    facts: int
    lists: float
    uniform: float
    small: float
    until: float
    at_most: int | None = None
    amended: float = 0.125

    def is_over(self, right: float, steps: int) -> bool:
        """Whether to go on after `steps` steps, with this running mean of right answers."""
        return (right > self.until and steps > 10) or (self.at_most is not None and steps >= self.at_most)


STAGES = (
    Stage(8, 0.2, 0.2, 0.0, 0.7),
    Stage(16, 0.1, 0.2, 0.0, 0.75, at_most=100, amended=0.25),
    Stage(32, 0.05, 0.2, 0.0, 0.8, at_most=100, amended=0.25),
    Stage(64, 0.0, 0.1, 0.0, until=2.0, amended=0.25),
)

LONG = tuple(
    (Stage(facts, 0.0, 0.0, 0.0, until=2.0, amended=0.5), rows) for facts, rows in ((64, 2), (128, 1), (256, 1))
)
"""Matters of one, two and four times the standard length, and the rows of each in a step: what a base goes on with
once it recalls, so that it still does where contexts are read in chunks. Half of their facts are amended, since amended
facts of standard matters are what these steps cost: of 192, 85 % are right after 100 steps with a quarter and 88 %
after 140 with half, where 95 % were before (the rest comes back by `BaseRecipe.long_share`)."""

ASKED = 96
"""Most questions of a row, drawn at random where a matter has more facts."""


@dataclass(frozen=True)
class Row:
    """A matter and its questions.

    Attributes:
        ids: token ids.
        labels: the same where they are supervised (answers), `IGNORE` elsewhere.
        context: tokens of the matter, which come first.
    """

    ids: list[int]
    labels: list[int]
    context: int


class Rows:
    """Draws rows of token ids and labels from the training split, seeded."""

    def __init__(self, tokenizer, seed: int):
        self.tokenizer = tokenizer
        self.rng = random.Random(f"pocket base {seed}")

    def row(self, stage: Stage) -> Row:
        """Ids and labels of one matter with its questions asked once, in random order: all of them, up to `ASKED`."""
        kind = self.rng.random()
        if kind < stage.lists + stage.uniform:
            context, pairs = self._uniform(stage, bare=kind < stage.lists)
        else:
            context, pairs = self._matter(stage)
        self.rng.shuffle(pairs)
        pairs = pairs[:ASKED]
        questions = [f"<|user|> {question}<|end|><|assistant|>" for question, _ in pairs]
        answers = [f" {answer}<|end|>" for _, answer in pairs]
        encoded = self.tokenizer(questions + answers)["input_ids"]
        ids, labels = list(context), [IGNORE] * len(context)
        for asked, told in zip(encoded[: len(pairs)], encoded[len(pairs) :], strict=True):
            ids += asked + told
            labels += [IGNORE] * len(asked) + told
        return Row(ids, labels, len(context))

    def _matter(self, stage: Stage) -> tuple[list[int], list[tuple[str, str]]]:
        documents = max(2, min(4, stage.facts // 8), stage.facts // 16)
        difficulty = Difficulty("curriculum", stage.facts, stage.amended, documents=documents)
        matter = generate_matter(self.rng.randrange(1 << 40), difficulty, "train")
        ids = self.tokenizer.apply_chat_template(context_messages(matter), tokenize=True, return_dict=False)
        return ids, [(fact.question, answer_text(fact)) for fact in matter.facts]

    def _uniform(self, stage: Stage, bare: bool) -> tuple[list[int], list[tuple[str, str]]]:
        """One document whose facts share an attribute: sentences of templates, or a bare list."""
        rng = self.rng
        small = bare and rng.random() < stage.small
        attribute = rng.choice(ATTRIBUTES)
        parties: dict[str, None] = {}
        while len(parties) < stage.facts:
            parties[_small_company(rng) if small else draw_company(rng, "train")] = None
        sentences, pairs = [], []
        for party in parties:
            if small:
                value = f"{rng.choice(GIVEN_NAMES[::4])} {rng.choice(SURNAMES[::8])}"
                sentences.append(f"{party} {value}.")
                pairs.append((party, f"{party} {value}"))
                continue
            value = draw_value(attribute.kind, rng, "train")
            statement = "{c}: {v}." if bare else rng.choice(pick(attribute.statements, unseen=False))
            question = "{c}:" if bare else rng.choice(pick(attribute.questions, unseen=False))
            sentences.append(statement.format(c=party, v=value))
            pairs.append((question.format(c=party), f"{party}: {value}"))
        rng.shuffle(sentences)
        text = f"<|user|> {INSTRUCTION}<|end|><|tool|> document-1.txt: {' '.join(sentences)}<|end|>"
        return self.tokenizer(text)["input_ids"], pairs


def _small_company(rng: random.Random) -> str:
    return f"{rng.choice(SURNAMES[::8])} {rng.choice(TRADES[::4])}"
