"""What judging will cost: a workload times the price table, or times what graded runs were seen to cost.

The model: a prompt is a shared part (system, task, deliverables), which a prefix cache can hold, then the criteria and
the answer's instructions; each verdict is a reason with its label. Reasoning tokens are not in it. Graded runs know
better (`observed`): what their verdicts took, with reasoning, cache hits and answers that were of no use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .prices import Price
from .scored import ScoredRun, scaled
from .verdicts import Tokens


@dataclass(frozen=True)
class Workload:
    """What is to be judged.

    Attributes:
        tasks: different tasks.
        rollouts: outputs of each task in a step.
        steps: training steps, or evaluations.
        criteria: of a task; LAB's median is 57.
        deliverable_tokens: that a criterion is judged on, with the task's title and the system message.
        instruction_tokens: at the end of each prompt.
        criterion_tokens: title and wording.
        verdict_tokens: reason, quotations and label.
        repeats: verdicts on each criterion.
    """

    tasks: int = 1
    rollouts: int = 1
    steps: int = 1
    criteria: int = 57
    deliverable_tokens: int = 7000
    instruction_tokens: int = 200
    criterion_tokens: int = 110
    verdict_tokens: int = 170
    repeats: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}; give 1 or more")

    @property
    def outputs(self) -> int:
        """Outputs that are judged."""
        return self.tasks * self.rollouts * self.steps

    @property
    def verdicts(self) -> int:
        """Verdicts that are asked for."""
        return self.outputs * self.criteria * self.repeats


@dataclass(frozen=True)
class Bill:
    """What a workload comes to.

    Attributes:
        tokens: all of them, with the calls.
        dollars: US dollars; None without a price.
        verdicts: that they buy.
    """

    tokens: Tokens
    dollars: float | None
    verdicts: int

    @property
    def per_thousand(self) -> float | None:
        """US dollars per 1,000 criteria judged once."""
        return None if self.dollars is None else 1000 * self.dollars / self.verdicts


def estimate(workload: Workload, price: Price | None, criteria_per_call: int = 1, cached: bool = True) -> Bill:
    """The bill by the model.

    Args:
        criteria_per_call: 1, more, or 0 for all at once.
        cached: the server's prefix cache holds the shared part after the first call on an output.
    """
    if criteria_per_call < 0:
        raise ValueError(f"criteria per call is {criteria_per_call}; give 1 or more, or 0 for all")
    size = criteria_per_call or workload.criteria
    calls = math.ceil(workload.criteria / size) * workload.repeats
    shared, again = workload.deliverable_tokens, (calls - 1) * workload.deliverable_tokens
    asked = calls * workload.instruction_tokens + workload.criteria * workload.repeats * workload.criterion_tokens
    one = Tokens(
        input=shared + again + asked,
        cached=again if cached else 0,
        cache_write=shared if cached and calls > 1 else 0,
        output=workload.criteria * workload.repeats * workload.verdict_tokens,
        calls=calls,
    )
    total = scaled(one, workload.outputs)
    return Bill(total, price.of(total) if price else None, workload.verdicts)


def observed(workload: Workload, runs: Iterable[ScoredRun]) -> Bill:
    """The bill by what the verdicts of graded runs took.

    Raises:
        ValueError: they do not say.
    """
    runs = list(runs)
    given = sum(verdict.passed is not None for run in runs for verdict in run.verdicts)
    seen = sum((run.judging_tokens for run in runs), Tokens())
    if not given:
        raise ValueError("these runs hold no verdict, so nothing says what one takes")
    if not seen.calls and not seen.total:
        raise ValueError("these runs do not say what their verdicts took; grade some with `still grade` first")
    share = workload.verdicts / given
    costs = [run.judging_cost for run in runs]
    return Bill(scaled(seen, share), None if None in costs else sum(costs) * share, workload.verdicts)
