"""The outcome of grading one run, and the files that say it.

`scores.json` is LAB's, with our block `still`: `verdicts` (see `verdicts.py`) and `judging`, whose keys are

- `judge`: the name; `judges`: for each judge behind it its identity (model, endpoint, parameters; no key), the
  `tokens` and `cost` of this run's calls (US dollars, None where unknown), the `reused_tokens` of verdicts that came
  from the cache, `fresh_verdicts`, `cached_verdicts`, `troubles` (failed calls and useless answers by kind), and
  `adapted` where the model refused a parameter;
- `prompt`: its name and hash; `config`: every field of `grade.GradeConfig`;
- `deliverables`: each file with its state, reader, hash and length, and the missing name that it was `taken_for`;
- `states`: how many verdicts came about how;
- `started_at`, `seconds`, and `stopped`: why calls were no longer made, or "".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dual import write_dual
from .ensemble import Ensemble, Panel
from .scores import build_scores, write_scores
from .tasks import LabTask
from .verdicts import CriterionVerdict, count_states

SCORES, PARTIAL = "scores.json", "scores.partial.json"


@dataclass(frozen=True)
class Grading:
    """What a judge, or a panel of them, says of one run.

    Attributes:
        task: with its rubric.
        verdicts: in rubric order.
        judge: who gave them.
        judging: how; see the module.
        run_id: what the scores call the run.
    """

    task: LabTask
    verdicts: tuple[CriterionVerdict, ...]
    judge: Panel
    judging: Mapping[str, Any]
    run_id: str = ""

    @property
    def n_passed(self) -> int:
        """Criteria that pass."""
        return sum(verdict.label == "pass" for verdict in self.verdicts)

    @property
    def n_unscored(self) -> int:
        """Criteria without a verdict."""
        return sum(verdict.label == "unscored" for verdict in self.verdicts)

    @property
    def pass_rate(self) -> float | None:
        """Share of the criteria that pass; None while any is unscored."""
        return None if self.n_unscored else self.n_passed / len(self.verdicts)

    @property
    def all_pass(self) -> bool | None:
        """True, False, or None where it hangs on unscored criteria."""
        labels = {verdict.label for verdict in self.verdicts}
        return False if "fail" in labels else None if "unscored" in labels else True

    @property
    def cost(self) -> float | None:
        """US dollars for this run's calls, answers of no use included; None where a price is unknown."""
        costs = [each["cost"] for each in self.judging["judges"].values() if "cost" in each]
        return None if None in costs else sum(costs)

    @property
    def stopped(self) -> str:
        """Why calls were no longer made, or ""."""
        return self.judging.get("stopped", "")

    def scores(self, cost: Mapping[str, float] | None = None, doc_coverage: Mapping[str, Any] | None = None) -> dict:
        """The contents of `scores.json`.

        Args:
            cost: what the agent used; see `scores.build_scores`.
            doc_coverage: what the agent read.
        """
        return self._scores(self.verdicts, self.judge.name, cost, doc_coverage)

    def save(self, folder: str | Path) -> Path:
        """Write the scores into a run folder, with the agent's cost and coverage from its `metrics.json`.

        A run that was stopped goes to `scores.partial.json`, so that it never stands in place of a whole one. An
        ensemble of two or more judges leaves `scores_<judge>.json` and LAB's `scores_dual.json` too.
        """
        folder = Path(folder)
        cost, coverage = agent_facts(folder)
        target = folder / (PARTIAL if self.stopped else SCORES)
        if isinstance(self.judge, Ensemble) and not self.stopped:
            each = [
                self._scores([vote.votes[index] for vote in self.verdicts], judge.name, cost, coverage)
                for index, judge in enumerate(self.judge.judges)
            ]
            write_dual(folder, each)
        write_scores(target, self.scores(cost, coverage))
        if not self.stopped:
            (folder / PARTIAL).unlink(missing_ok=True)
        return target

    def _scores(self, verdicts: Any, judge: str, cost: Any, coverage: Any) -> dict:
        judging = {**self.judging, "states": count_states(verdicts)}
        return build_scores(
            self.task,
            {verdict.id: verdict for verdict in verdicts},
            run_id=self.run_id,
            judge_model=judge,
            cost=cost,
            doc_coverage=coverage,
            scored_at=self.judging["started_at"],
            extras={"judging": judging},
        )


def agent_facts(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """LAB's `cost` and `doc_coverage` from a run's `metrics.json`; None each where that is absent."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None, None
    if "total_vdr_files" in metrics:
        metrics.setdefault("total_documents", metrics["total_vdr_files"])
    cost = ("input_tokens", "output_tokens", "wall_clock_seconds")
    coverage = (
        "documents_read", "total_documents", "documents_skipped", "documents_read_list", "documents_skipped_list",
    )  # fmt: skip
    found = [{key: metrics[key] for key in keys if key in metrics} for keys in (cost, coverage)]
    return found[0] or None, found[1] or None
