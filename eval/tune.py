"""Tune a cheap judge's prompt towards a reference judge, by edits that a model proposes and data decides.

Each round grades the tuning side with the prompt as it is, shows a model where the judge differed from the reference
and asks for small edits. Edits that lower the false passes there go on, the best of them alone, to the **held-out**
side: it is kept only if false passes fall there with an interval, clustered by task, that lies below zero, and false
fails have not risen by more than what is allowed. The held-out side is looked at once a round, and the interval's
confidence is raised for the number of rounds (Bonferroni), so that trying often does not find luck.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .edits import SCHEMA, Edit, read_edits, request
from .grade import GradeConfig, Grader
from .judges import Judge, JudgeError
from .kinds import criterion_kind
from .prices import Prices
from .prompting import Prompt, PromptError, load_prompt
from .questions import write_text
from .scored import ScoredRun
from .stats import PairedDifference, for_json, paired_difference
from .tasks import LabTask
from .verdict_store import VerdictStore
from .verdicts import CriterionVerdict

Verdicts = Mapping[tuple[str, str, str], CriterionVerdict]
"""(task, run id, criterion) -> verdict."""


@dataclass(frozen=True)
class TuneConfig:
    """How a prompt is tuned.

    Attributes:
        prompt: the one to start from: "checklist", "plain", or a file.
        rounds: at most; each looks at the held-out side once.
        edits: asked for in a round.
        cases: shown to the proposing model in a round.
        allowed_false_fails: by how much false fails may rise on the held-out side, as a share (0.02 is 2 points).
        confidence: that false passes have fallen, over all rounds together.
        criteria_per_call: of the judge that is tuned.
        max_cost: most US dollars for the judge; None is no limit.
        max_tokens: most tokens for the judge; None is no limit.
        seed: of the choice of cases.
    """

    prompt: str = "checklist"
    rounds: int = 4
    edits: int = 3
    cases: int = 12
    allowed_false_fails: float = 0.02
    confidence: float = 0.95
    criteria_per_call: int = 1
    max_cost: float | None = None
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds, self.edits, self.cases) < 1 or not 0 < self.confidence < 1:
            raise ValueError(
                f"rounds {self.rounds}, edits {self.edits} and cases {self.cases} are 1 or more, and confidence "
                f"{self.confidence} lies between 0 and 1"
            )


@dataclass(frozen=True)
class Outcome:
    """One prompt against another on one side.

    Attributes:
        false_passes: before and after, of `failed` criteria.
        failed: criteria that the reference fails and both prompts got a verdict on.
        false_fails: before and after, of `passed` criteria.
        passed: the same for those that it passes.
        lost: criteria that have a verdict before and none after.
        change: in the share of false passes, after minus before; None where the reference fails none.
    """

    false_passes: tuple[int, int]
    failed: int
    false_fails: tuple[int, int]
    passed: int
    lost: int
    change: PairedDifference | None = None

    @property
    def false_fail_rise(self) -> float:
        """Rise of the share of false fails."""
        return (self.false_fails[1] - self.false_fails[0]) / self.passed if self.passed else 0.0

    def to_json(self) -> dict[str, Any]:
        """For the log."""
        return {**asdict(self), "false_fail_rise": self.false_fail_rise}


@dataclass
class Tuned:
    """What came of it.

    Attributes:
        prompt: the last one kept; the first one if none was.
        rounds: what was proposed, tried and decided, round by round.
        held_out: the last prompt against the first on the held-out side; None if no edit was kept.
        stopped: why it ended.
    """

    prompt: Prompt
    rounds: list[dict[str, Any]] = field(default_factory=list)
    held_out: Outcome | None = None
    stopped: str = ""


class Tuner:
    """A cheap judge, a proposing model, and the runs that a reference judged.

    Args:
        judge: the one whose prompt is tuned.
        proposer: any served model; it is asked with `ask`.
        reference: graded runs, one judge; their folders are known and hold the deliverables.
        tasks: task id -> task.
        tuning: ids of the tasks that cases are taken from.
        held_out: ids of the tasks that decide.
        store: where the cheap judge's verdicts are kept.
        folder: where prompts and the log go.
        told: called with a line on each step.

    Raises:
        ValueError: a side holds no graded run, or they overlap.
    """

    def __init__(
        self,
        judge: Judge,
        proposer: Judge,
        reference: Sequence[ScoredRun],
        tasks: Mapping[str, LabTask],
        tuning: Sequence[str],
        held_out: Sequence[str],
        folder: str | Path,
        config: TuneConfig | None = None,
        store: VerdictStore | None = None,
        prices: Prices | None = None,
        told: Callable[[str], None] | None = None,
    ):
        self.judge, self.proposer, self.tasks, self.folder = judge, proposer, tasks, Path(folder)
        self.config, self.store, self.prices = config or TuneConfig(), store or VerdictStore(), prices
        self.told = told or (lambda _: None)
        self._dollars, self._tokens = 0.0, 0
        if both := sorted(set(tuning) & set(held_out)):
            raise ValueError(f"{both} are on both sides; a task that is tuned on cannot decide")
        usable = [run for run in reference if run.task in tasks and run.folder]
        self.sides = {
            name: [run for run in usable if run.task in ids]
            for name, ids in (("tuning", set(tuning)), ("held-out", set(held_out)))
        }
        for name, runs in self.sides.items():
            if not runs:
                raise ValueError(
                    f"no graded run whose deliverables are known is on the {name} side; give it tasks that the "
                    "reference judged, and name the folder of the runs"
                )
            if twice := [key for key, n in Counter((run.task, run.run_id) for run in runs).items() if n > 1]:
                task, name = twice[0]
                raise ValueError(f"two runs of {task} are called {name!r}; tune on the runs of one system")
        self.truth = {side: _labels(runs, tasks) for side, runs in self.sides.items()}

    async def tune(self) -> Tuned:
        """Go through the rounds; every step is written to `folder` before the next begins."""
        config = self.config
        prompt = first = load_prompt(config.prompt)
        result = Tuned(prompt)
        rng = random.Random(f"tune:{config.seed}")
        confidence = 1 - (1 - config.confidence) / config.rounds
        for number in range(1, config.rounds + 1):
            before = await self._grade(prompt, "tuning")
            cases = self._cases(before, rng)
            if not cases:
                result.stopped = "the judge passes nothing on the tuning side that the reference fails"
                break
            try:
                edits = await self._propose(prompt, cases)
            except JudgeError as problem:
                result.stopped = f"the proposing model gave no answer: {problem}"
                break
            round_ = {"round": number, "prompt": prompt.sha256, "cases": len(cases), "edits": []}
            result.rounds.append(round_)
            best = await self._screen(prompt, edits, before, number, round_["edits"])
            if best is None:
                self.told(f"round {number}: none of {len(edits)} edits lowers false passes on the tuning side")
                self._write(result)
                continue
            edited, entry = best
            outcome = self._compare(
                await self._grade(prompt, "held-out"), await self._grade(edited, "held-out"), "held-out", confidence
            )
            entry["held_out"], entry["kept"] = outcome.to_json(), self._keeps(outcome)
            if entry["kept"]:
                prompt = result.prompt = edited
            self.told(f"round {number}: {_said(outcome)}: {'kept' if entry['kept'] else 'not kept'}")
            self._write(result)
        result.stopped = result.stopped or f"all {config.rounds} rounds are done"
        if prompt is not first:
            last = await self._grade(prompt, "held-out")
            result.held_out = self._compare(await self._grade(first, "held-out"), last, "held-out", config.confidence)
        self._write(result)
        return result

    async def _screen(
        self, prompt: Prompt, edits: Sequence[Edit], before: Verdicts, number: int, log: list[dict[str, Any]]
    ) -> tuple[Prompt, dict[str, Any]] | None:
        """The edit that lowers false passes on the tuning side the most, with its entry in the log."""
        best: tuple[tuple[float, float], Prompt, dict[str, Any]] | None = None
        for index, edit in enumerate(edits, 1):
            entry: dict[str, Any] = {**asdict(edit), "kept": False}
            log.append(entry)
            try:
                edited = edit.apply(prompt, f"round-{number}-edit-{index}")
            except PromptError as problem:
                entry["refused"] = str(problem)
                continue
            outcome = self._compare(before, await self._grade(edited, "tuning"), "tuning", self.config.confidence)
            entry |= {"prompt": edited.sha256, "tuning": outcome.to_json()}
            fall = outcome.false_passes[0] - outcome.false_passes[1]
            rank = fall, -outcome.false_fail_rise
            if fall > 0 and outcome.false_fail_rise <= self.config.allowed_false_fails and (not best or rank > best[0]):
                best = rank, edited, entry
        return best and best[1:]

    async def _grade(self, prompt: Prompt, side: str) -> Verdicts:
        """The cheap judge's verdicts with a prompt; what it judged before comes from the store."""
        file = self.folder / f"{prompt.sha256}.md"
        if not file.exists():
            write_text(file, prompt.text)
        config = GradeConfig(
            prompt=str(file),
            criteria_per_call=self.config.criteria_per_call,
            max_cost=self._left(self.config.max_cost, self._dollars, "dollars"),
            max_tokens=self._left(self.config.max_tokens, self._tokens, "tokens"),
        )
        grader = Grader(self.judge, config, store=self.store, prices=self.prices)
        runs = self.sides[side]
        gradings = await grader.grade_all((self.tasks[run.task], run.folder, run.run_id) for run in runs)
        self._dollars += grader.budget.spent_dollars
        self._tokens += grader.budget.spent_tokens
        if stopped := next((each.stopped for each in gradings if each.stopped), ""):
            raise ValueError(f"grading stopped: {stopped}; what was judged is kept, run the same command to go on")
        found = {(each.task.id, each.run_id, verdict.id): verdict for each in gradings for verdict in each.verdicts}
        return {key: verdict for key, verdict in found.items() if verdict.passed is not None}

    @staticmethod
    def _left(limit: Any, spent: Any, unit: str) -> Any:
        """What is left of a limit, None without one."""
        if limit is not None and limit <= spent:
            raise ValueError(f"grading stopped: {spent:,} of {limit:,} {unit} are spent; what was judged is kept")
        return None if limit is None else limit - spent

    def _cases(self, given: Verdicts, rng: random.Random) -> list[str]:
        """Descriptions of false passes, and a few false fails, at random; none without a false pass."""
        truth = self.truth["tuning"]
        wrong = [key for key in sorted(given) if key in truth and given[key].passed != truth[key].passed]
        passes, fails = ([key for key in wrong if given[key].passed is kind] for kind in (True, False))
        if not passes:
            return []
        few = min(len(fails), self.config.cases // 4)
        chosen = rng.sample(passes, min(len(passes), self.config.cases - few)) + rng.sample(fails, few)
        return [self._case(key, given[key], truth[key]) for key in chosen]

    def _case(self, key: tuple[str, str, str], given: CriterionVerdict, right: CriterionVerdict) -> str:
        criterion = next(each for each in self.tasks[key[0]].criteria if each.id == key[2])
        told = {
            "mistake": "false pass" if given.passed else "false fail",
            "kind of criterion": criterion_kind(criterion),
            "criterion": f"{criterion.title}\n{criterion.match_criteria}",
            "the judge quoted": list(given.evidence),
            "the judge's reason": given.reason,
            "the stronger judge quoted": list(right.evidence),
            "the stronger judge's reason": right.reason,
        }
        return json.dumps(told, indent=1, ensure_ascii=False)

    async def _propose(self, prompt: Prompt, cases: Sequence[str]) -> list[Edit]:
        reply = await self.proposer.ask(request(prompt, cases, self.config.edits), SCHEMA)
        return read_edits(reply.text)[: self.config.edits]

    def _compare(self, before: Verdicts, after: Verdicts, side: str, confidence: float) -> Outcome:
        truth = self.truth[side]
        both = [key for key in sorted(before) if key in after and key in truth]
        failed = [key for key in both if not truth[key].passed]
        passed = [key for key in both if truth[key].passed]
        first, second = ([float(bool(given[key].passed)) for key in failed] for given in (before, after))
        return Outcome(
            false_passes=(int(sum(first)), int(sum(second))),
            failed=len(failed),
            false_fails=tuple(sum(not given[key].passed for key in passed) for given in (before, after)),
            passed=len(passed),
            lost=sum(key not in after for key in before),
            change=paired_difference(second, first, [key[0] for key in failed], confidence) if failed else None,
        )

    def _keeps(self, outcome: Outcome) -> bool:
        fell = outcome.change is not None and outcome.change.interval.high < 0
        return fell and outcome.false_fail_rise <= self.config.allowed_false_fails and not outcome.lost

    def _write(self, result: Tuned) -> None:
        log = {
            "judge": self.judge.identity(),
            "proposer": self.proposer.identity(),
            "config": asdict(self.config),
            "tasks": {side: sorted({run.task for run in runs}) for side, runs in self.sides.items()},
            "prompt": result.prompt.sha256,
            "rounds": result.rounds,
            "held_out": result.held_out and result.held_out.to_json(),
            "stopped": result.stopped,
        }
        write_text(self.folder / "prompt.md", result.prompt.text)
        write_text(self.folder / "log.json", json.dumps(for_json(log), indent=1, ensure_ascii=False))


def _labels(runs: Sequence[ScoredRun], tasks: Mapping[str, LabTask]) -> Verdicts:
    """The reference's verdicts on criteria whose wording is still the one that it judged."""
    found = {}
    for run in runs:
        now = {criterion.id: criterion.rubric_hash for criterion in tasks[run.task].criteria}
        for verdict in run.verdicts:
            same = run.hashes.get(verdict.id, now.get(verdict.id)) == now.get(verdict.id)
            if verdict.passed is not None and verdict.id in now and same:
                found[run.task, run.run_id, verdict.id] = verdict
    return found


def _said(outcome: Outcome) -> str:
    """One line on the held-out side."""
    (before, after), fails = outcome.false_passes, outcome.false_fails
    change = outcome.change.interval if outcome.change else None
    points = [100 * each for each in (change.estimate, change.low, change.high)] if change else []
    fall = "{:+.1f} points ({:+.1f} to {:+.1f}); ".format(*points) if points else ""
    lost = f", {outcome.lost} verdicts lost" if outcome.lost else ""
    return (
        f"held-out false passes {before} to {after} of {outcome.failed}, {fall}"
        f"false fails {fails[0]} to {fails[1]} of {outcome.passed}{lost}"
    )
