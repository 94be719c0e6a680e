"""A rubric as a reward: many rollouts at once, each verdict cached, in trainers and notebooks alike.

```python
reward = RubricReward(find_judge("m@http://localhost:8000/v1"), store=VerdictStore("verdicts.sqlite"))
reward([(task, {"memo.md": text}), (task, other_text)])        # [0.83, None]: None is unscored, never 0
trainer = GRPOTrainer(..., reward_funcs=reward.of_completions(tasks))
```
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .deliverables import Outputs
from .ensemble import Panel
from .grade import GradeConfig, Grader
from .grading import Grading
from .tasks import LabTask

Delivered = Mapping[str, str] | str | Path


class RubricReward:
    """Rewards from a judge, on an event loop of their own, so that they can be called from anywhere.

    Args:
        judge: a judge, an `Ensemble` or a `Cascade`.
        config: how criteria are put to it.
        metric: "criteria" is the share of the criteria that pass, "all-pass" is 1.0 or 0.0.
        at_once: rollouts whose texts are in memory.
        more: handed to `Grader` (store, prices, retry, told).
    """

    __name__ = "rubric_reward"  # trainers name their columns by it

    def __init__(
        self,
        judge: Panel,
        config: GradeConfig | None = None,
        *,
        metric: Literal["criteria", "all-pass"] = "criteria",
        at_once: int = 16,
        **more: Any,
    ):
        if metric not in ("criteria", "all-pass"):
            raise ValueError(f"the metric is {metric!r}; it is criteria or all-pass")
        self.metric, self.at_once = metric, at_once
        self._grader = Grader(judge, config, **more)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rubric-reward", daemon=True)
        self._thread.start()

    def __call__(self, rollouts: Iterable[tuple[LabTask, Delivered]]) -> list[float | None]:
        """Rewards of rollouts: what each delivered, as a run folder, texts by file name, or one text.

        Returns:
            Values from 0.0 to 1.0 in the same order; None where a criterion is unscored and hangs on it.
        """
        return [self.value(grading) for grading in self.grade(rollouts)]

    def grade(self, rollouts: Iterable[tuple[LabTask, Delivered]]) -> list[Grading]:
        """The gradings behind the rewards, with every verdict and its reason; equal rollouts are graded once.

        Equal are those of one task that delivered the same files.
        """
        runs = [(task, as_files(task, delivered)) for task, delivered in rollouts]
        keys = [(id(task), Outputs(files).content()) for task, files in runs]
        different = dict(zip(keys, runs, strict=True))
        work = self._grader.grade_all([(*run, None) for run in different.values()], at_once=self.at_once)
        found = dict(zip(different, asyncio.run_coroutine_threadsafe(work, self._loop).result(), strict=True))
        return [found[key] for key in keys]

    def value(self, grading: Grading) -> float | None:
        """The reward of one grading."""
        if self.metric == "criteria":
            return grading.pass_rate
        return None if grading.all_pass is None else float(grading.all_pass)

    def of_completions(self, tasks: Mapping[str, LabTask]) -> Callable[..., list[float | None]]:
        """A reward function as TRL's trainers call it: `f(completions=..., task=..., **columns)`.

        Args:
            tasks: by the values of the data set's column `task`.
        """

        def rubric_reward(*, completions: Sequence[Any], task: Sequence[str], **_: Any) -> list[float | None]:
            texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
            return self([(tasks[name], text) for name, text in zip(task, texts, strict=True)])

        return rubric_reward

    def close(self) -> None:
        """Close connections and the loop."""
        asyncio.run_coroutine_threadsafe(self._grader.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> RubricReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_files(task: LabTask, delivered: Delivered) -> Mapping[str, str] | Path:
    """What a rollout delivered; one text stands for every deliverable that the task names."""
    if isinstance(delivered, str):
        return dict.fromkeys((task.deliverables or {"answer.md": "answer.md"}).values(), delivered)
    return delivered
