"""Grade what a run delivered against its task's rubric.

```python
grading = await grade(task, "runs/7", find_judge("gpt-5.5"), store=VerdictStore(default_store()))
grading.n_passed, grading.all_pass, grading.cost
grading.save("runs/7")                                     # scores.json, as LAB writes it, with our block
```

Criteria on the same files form a group whose prompts begin alike. One call of a group goes first and fills the
server's prefix cache; the others follow at once. A judge may be an `Ensemble` or a `Cascade`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

from .asking import Asker, Batch, Ledger
from .deliverables import Names, Outputs, Policy, Sheet, group_by_sheet
from .ensemble import Ensemble, Panel, Verdicts, join
from .grading import Grading
from .judge import Label
from .judges import ExactJudge
from .lanes import Lane, Retry
from .planning import Estimate, estimate, make_batches
from .prices import Budget, Prices
from .prompting import Prompt, load_prompt
from .tasks import Criterion, LabTask
from .verdict_store import VerdictStore
from .verdicts import CriterionVerdict, State

Told = Callable[[CriterionVerdict], None]


@dataclass(frozen=True)
class GradeConfig:
    """How criteria are put to judges.

    Attributes:
        prompt: "plain", "checklist", or a file of the user's own; LAB's works as it is.
        criteria_per_call: 1, more, or 0 for all criteria on the same files.
        repeats: verdicts of each judge on each criterion, joined by majority; the order of the criteria is drawn anew
            for each but the first.
        seed: of those orders.
        prime: send one call of a group first, so that the others find its prefix cached.
        reasks: how often what an answer left open is asked again.
        missing: what follows from a deliverable that is not there: "fail" or "unscored", without a call, or "judge".
        empty: the same for one without text.
        unreadable: the same for one that no reader can read.
        names: "closest" takes a misnamed output for a missing one as LAB's evaluator does, "exact" calls it missing.
        max_cost: most US dollars for fresh calls; None is no limit.
        max_tokens: most tokens for fresh calls; None is no limit.
    """

    prompt: str = "plain"
    criteria_per_call: int = 1
    repeats: int = 1
    seed: int = 0
    prime: bool = True
    reasks: int = 2
    missing: Policy = "fail"
    empty: Policy = "fail"
    unreadable: Policy = "fail"
    names: Names = "exact"
    max_cost: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.criteria_per_call < 0 or self.repeats < 1 or self.reasks < 0:
            raise ValueError(
                f"criteria_per_call is {self.criteria_per_call} (0 or more), repeats {self.repeats} (1 or more), "
                f"reasks {self.reasks} (0 or more)"
            )
        for state in ("missing", "empty", "unreadable"):
            if getattr(self, state) not in get_args(Policy):
                raise ValueError(f"the policy for {state} is {getattr(self, state)!r}; it is fail, unscored or judge")
        if self.names not in get_args(Names):
            raise ValueError(f"names is {self.names!r}; it is exact or closest")


class Grader:
    """Judges at work: one for many runs, so that they share lanes, cache and budget.

    Args:
        judge: a judge, an `Ensemble` or a `Cascade`.
        config: how criteria are put to it.
        store: where verdicts are kept; this process's memory when left out.
        prices: what tokens cost; the table that comes with us when left out.
        retry: when a call is given up.
        told: called with every verdict of every judge as it becomes final, for progress bars.
        planned: called with the number of verdicts that were just set to work.

    Raises:
        ValueError: the prompt and the criteria a call do not fit, or a budget in money has no price.
    """

    def __init__(
        self,
        judge: Panel,
        config: GradeConfig | None = None,
        *,
        store: VerdictStore | None = None,
        prices: Prices | None = None,
        retry: Retry | None = None,
        told: Told | None = None,
        planned: Callable[[int], None] | None = None,
    ):
        self.judge, self.config = judge, config or GradeConfig()
        self.prompt: Prompt = load_prompt(self.config.prompt)
        self.budget = Budget(self.config.max_cost, self.config.max_tokens)
        self._store = VerdictStore() if store is None else store
        prices = prices or Prices()
        self._told, self._planned = told or (lambda _: None), planned or (lambda _: None)
        self.leaves = {leaf.name: leaf for leaf in leaves(judge)}
        if self.prompt.is_labs and self.config.criteria_per_call != 1:
            raise ValueError(f"prompt {self.prompt.name!r} takes one criterion a call; set criteria per call to 1")
        lanes: dict[Any, Lane] = {}
        self.askers: dict[str, Asker] = {}
        for name, leaf in self.leaves.items():
            if hasattr(leaf, "decide"):
                continue
            settings = getattr(leaf, "config", None)
            model = settings.model if settings else leaf.identity()["model"]
            price = prices.find(model)
            if self.config.max_cost is not None and settings and price is None:
                raise ValueError(
                    f"the price table has no {model!r}, so a budget in dollars cannot hold; add it to a file of your "
                    "own (--prices FILE), or limit tokens"
                )
            place = (settings.base_url, settings.api_key_env) if settings else name
            if place not in lanes:
                lanes[place] = (
                    Lane(settings.concurrency, settings.requests_per_minute, settings.tokens_per_minute)
                    if settings
                    else Lane()
                )
            self.askers[name] = Asker(
                leaf, self.prompt, lanes[place], self._store, self.budget, price, self.config.reasks, retry
            )

    async def grade(
        self, task: LabTask, outputs: Outputs | str | Path | Mapping[str, str], run_id: str | None = None
    ) -> Grading:
        """Judge every criterion of a task.

        Args:
            task: with its rubric.
            outputs: a run folder, an output folder, or texts by file name.
            run_id: what the scores call the run; the folder's name when left out.
        """
        started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        folder = Path(outputs) if isinstance(outputs, str | Path) else None
        outputs = outputs if isinstance(outputs, Outputs) else Outputs(outputs)
        groups = await asyncio.to_thread(group_by_sheet, task, outputs, task.criteria, self.config.names)
        ledgers = {name: Ledger() for name in self.askers}

        async def ask(panel: Panel, criteria: Sequence[Criterion]) -> Verdicts:
            if panel.name not in self.leaves:
                return await panel.verdicts(criteria, ask)
            return await self._leaf(panel, task, _regroup(groups, criteria), ledgers.get(panel.name))

        given = await ask(self.judge, task.criteria)
        verdicts = tuple(given[each.id] for each in task.criteria)
        judging = self._record(outputs, ledgers, started, time.monotonic() - clock)
        return Grading(task, verdicts, self.judge, judging, run_id or (folder.resolve().name if folder else ""))

    async def grade_all(
        self,
        runs: Iterable[tuple[LabTask, Outputs | str | Path | Mapping[str, str], str | None]],
        done: Callable[[Grading, Any], None] | None = None,
        at_once: int = 16,
    ) -> list[Grading]:
        """Judge many runs, several at a time.

        Args:
            runs: task, outputs and run id of each, as `grade` takes them.
            done: called with each grading and its outputs (as they were given) as it is ready; nothing is returned
                then, so memory stays flat.
            at_once: runs whose texts are in memory.
        """
        found: list[tuple[int, Grading]] = []
        waiting = iter(enumerate(runs))

        async def work() -> None:
            for index, (task, outputs, run_id) in waiting:
                grading = await self.grade(task, outputs, run_id)
                if done is None:
                    found.append((index, grading))
                else:
                    done(grading, outputs)

        await asyncio.gather(*(work() for _ in range(at_once)))
        return [grading for _, grading in sorted(found, key=lambda each: each[0])]

    def plan(self, task: LabTask, outputs: Outputs | str | Path | Mapping[str, str]) -> dict[str, Estimate]:
        """What each judge would be asked about a run, without asking; a cascade's strong judge at most."""
        outputs = outputs if isinstance(outputs, Outputs) else Outputs(outputs)
        total = dict.fromkeys(self.leaves, Estimate())
        for sheet, criteria in group_by_sheet(task, outputs, task.criteria, self.config.names):
            for name, judge in self.leaves.items():
                if self._settled(judge, sheet) or name not in self.askers:
                    total[name] += Estimate(criteria=len(criteria), without_call=len(criteria))
                    continue
                asker = self.askers[name]
                total[name] += estimate(*self._batches(asker, task, sheet, criteria, Ledger()), asker)
        return total

    async def aclose(self) -> None:
        """Close the judges' connections."""
        for leaf in self.leaves.values():
            await leaf.aclose()

    async def __aenter__(self) -> Grader:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _leaf(
        self, judge: Any, task: LabTask, groups: Iterable[tuple[Sheet, list[Criterion]]], ledger: Ledger | None
    ) -> Verdicts:
        """One judge's verdicts, its repeats joined."""
        parts = await asyncio.gather(*(self._group(judge, task, sheet, group, ledger) for sheet, group in groups))
        votes: dict[str, list[CriterionVerdict]] = {}
        for verdict in (each for part in parts for each in part):
            votes.setdefault(verdict.id, []).append(verdict)
        return {
            name: given[0] if len(given) == 1 else join(given, "majority", judge.name) for name, given in votes.items()
        }

    async def _group(
        self, judge: Any, task: LabTask, sheet: Sheet, criteria: Sequence[Criterion], ledger: Ledger | None
    ) -> list[CriterionVerdict]:
        """One judge's verdicts on the criteria of one sheet, a list for each repeat, one after another."""
        if label := self._settled(judge, sheet):
            return self._all(judge, criteria, label, sheet.state, sheet.why)
        if hasattr(judge, "decide"):
            return self._decided(judge, criteria, sheet)
        asker = self.askers[judge.name]
        found, batches = self._batches(asker, task, sheet, criteria, ledger)
        self._planned(len(found) + sum(len(each.criteria) for each in batches))
        for verdict in found:
            self._told(verdict)
        if batches and self.config.prime and len(batches) > 1:
            first = list((await asker.ask(batches[0], self._told)).values())
            found += first
            batches = batches[1:]
            # Length and parameters are the others' too; what a filter stops is "refused" and says nothing of them.
            if all(each.state == "rejected" for each in first):
                left = [each for batch in batches for each in batch.criteria]
                return found + self._all(judge, left, "unscored", "rejected", first[0].reason, planned=True)
        for part in await asyncio.gather(*(asker.ask(batch, self._told) for batch in batches)):
            found += part.values()
        return found

    def _settled(self, judge: Any, sheet: Sheet) -> Label | None:
        """The label that the state of the deliverables gives without a judge, or None."""
        policy = getattr(self.config, sheet.state, "judge")
        if policy != "judge":
            return policy
        return "fail" if sheet.state != "ok" and hasattr(judge, "decide") else None

    def _batches(
        self, asker: Asker, task: LabTask, sheet: Sheet, criteria: Sequence[Criterion], ledger: Ledger
    ) -> tuple[list[CriterionVerdict], list[Batch]]:
        sections = [each.section for each in sheet.files]
        system, shared = self.prompt.shared(task.title, task.instructions, sections, sheet.bound)
        start = partial(Batch, sheet, system, shared, self._base(asker, task, sheet), ledger)
        seeds = (None, *(self.config.seed + repeat for repeat in range(1, self.config.repeats)))
        return make_batches(asker, start, criteria, seeds, self.config.criteria_per_call)

    def _all(
        self, judge: Any, criteria: Sequence[Criterion], label: Any, state: State, why: str, planned: bool = False
    ) -> list[CriterionVerdict]:
        if not planned:
            self._planned(len(criteria))
        given = [
            CriterionVerdict(each.id, each.title, label, why, judge=judge.name, state=state, cost=0.0)
            for each in criteria
        ]
        for verdict in given:
            self._told(verdict)
        return given

    def _decided(self, judge: ExactJudge, criteria: Sequence[Criterion], sheet: Sheet) -> list[CriterionVerdict]:
        self._planned(len(criteria))
        found = []
        for each in criteria:
            said = judge.decide(each, sheet.text)
            found.append(
                CriterionVerdict(
                    each.id, each.title, said.label, said.reason, judge=judge.name, cost=0.0, stale=said.stale
                )
            )
            self._told(found[-1])
        return found

    def _base(self, asker: Asker, task: LabTask, sheet: Sheet) -> str:
        instructions = task.instructions if self.prompt.slots & {"instructions", "task_instructions"} else ""
        parts = [
            self.prompt.sha256,
            asker.judge.identity(),
            task.title,
            instructions,
            sheet.key,
            self.config.criteria_per_call,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _record(self, outputs: Outputs, ledgers: Mapping[str, Ledger], started: str, seconds: float) -> dict[str, Any]:
        judges = {name: leaf.identity() for name, leaf in self.leaves.items()}
        for name, ledger in ledgers.items():
            judges[name] |= ledger.record()
            if adapted := getattr(self.leaves[name], "adapted", []):
                judges[name]["adapted"] = list(adapted)
        return {
            "judge": self.judge.name,
            "judges": judges,
            "prompt": {"name": self.prompt.name, "sha256": self.prompt.sha256},
            "config": asdict(self.config),
            "deliverables": outputs.records(),
            "started_at": started,
            "seconds": round(seconds, 3),
            "stopped": "; ".join(dict.fromkeys(each.stopped for each in ledgers.values() if each.stopped)),
        }


async def grade(
    task: LabTask,
    outputs: Outputs | str | Path | Mapping[str, str],
    judge: Panel,
    config: GradeConfig | None = None,
    *,
    run_id: str | None = None,
    **more: Any,
) -> Grading:
    """Judge one run; `more` is handed to `Grader` (store, prices, retry, told)."""
    async with Grader(judge, config, **more) as grader:
        return await grader.grade(task, outputs, run_id)


def leaves(panel: Panel) -> list[Any]:
    """The judges of a panel, each once, in order."""
    if isinstance(panel, Ensemble):
        inner: Sequence[Panel] = panel.judges
    elif hasattr(panel, "cheap"):
        inner = (panel.cheap, panel.strong)
    else:
        return [panel]
    found: dict[str, Any] = {}
    for each in inner:
        for leaf in leaves(each):
            found.setdefault(leaf.name, leaf)
    return list(found.values())


def _regroup(
    groups: Iterable[tuple[Sheet, list[Criterion]]], criteria: Sequence[Criterion]
) -> list[tuple[Sheet, list[Criterion]]]:
    wanted = {each.id for each in criteria}
    kept = [(sheet, [each for each in group if each.id in wanted]) for sheet, group in groups]
    return [(sheet, group) for sheet, group in kept if group]
