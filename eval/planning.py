"""What a grading will ask, before anything is spent: batches of criteria, and what they may cost."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from .asking import Asker, Batch
from .prices import Price
from .tasks import Criterion
from .verdicts import CriterionVerdict, Tokens

CHARACTERS_A_TOKEN = 4
TOKENS_A_VERDICT = 170
"""Of English legal text, and of a verdict with its reason; measured on real judgings."""


@dataclass(frozen=True)
class Estimate:
    """What one judge would be asked.

    Attributes:
        criteria: verdicts wanted, repeats included.
        without_call: of these, settled by the state of their deliverables.
        cached: of these, in the verdict cache.
        calls: requests that the others take.
        input_tokens: in all of them, by the length of the prompts.
        prefix_tokens: of these, in beginnings that an earlier call of the group shares: what a prefix cache saves.
        output_tokens: by what verdicts usually take.
    """

    criteria: int = 0
    without_call: int = 0
    cached: int = 0
    calls: int = 0
    input_tokens: int = 0
    prefix_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def dollars(self, price: Price) -> tuple[float, float]:
        """US dollars without and with a prefix cache."""
        plain = Tokens(input=self.input_tokens, output=self.output_tokens)
        cached = Tokens(input=self.input_tokens, cached=self.prefix_tokens, output=self.output_tokens)
        return price.of(plain), price.of(cached)


def make_batches(
    asker: Asker,
    start: Callable[[tuple[Criterion, ...], int | None], Batch],
    criteria: Sequence[Criterion],
    seeds: Sequence[int | None],
    size: int,
) -> tuple[list[CriterionVerdict], list[Batch]]:
    """The verdicts on one sheet that the cache has, and the calls that the others take.

    Args:
        asker: the judge's.
        start: a batch on the sheet, from criteria and a seed.
        criteria: of the sheet, in rubric order.
        seeds: one for each repeat; None is rubric order.
        size: criteria a call; 0 is all that are left.
    """
    found: list[CriterionVerdict] = []
    batches: list[Batch] = []
    for seed in seeds:
        ordered = list(criteria)
        if seed is not None:
            random.Random(f"order:{seed}").shuffle(ordered)
        whole = start(tuple(ordered), seed)
        kept = {each.id: asker.find(whole, each) for each in ordered}
        found += [verdict for verdict in kept.values() if verdict]
        todo = [each for each in ordered if kept[each.id] is None]
        step = size or max(1, len(todo))
        batches += [start(tuple(todo[at : at + step]), seed) for at in range(0, len(todo), step)]
    return found, batches


def estimate(found: Sequence[CriterionVerdict], batches: Sequence[Batch], asker: Asker) -> Estimate:
    """What the calls on one sheet may take."""
    shared = [len(batch.system) + len(batch.shared) for batch in batches]
    questions = [len(asker.prompt.question(batch.criteria)) for batch in batches]
    verdicts = sum(len(batch.criteria) for batch in batches)
    return Estimate(
        criteria=len(found) + verdicts,
        cached=len(found),
        calls=len(batches),
        input_tokens=(sum(shared) + sum(questions)) // CHARACTERS_A_TOKEN,
        prefix_tokens=sum(shared[1:]) // CHARACTERS_A_TOKEN,
        output_tokens=verdicts * TOKENS_A_VERDICT,
    )
