"""The report of one graded run: what was asked of it, what a judge found, in whose words, and at what cost.

It is written for the person who asked for the work, so what was missed comes first, with the reason and the passages
that decided it; what was met can be opened; how the verdicts came about stands at the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .page_parts import Markup, count, dollars, escape, header, note, page, quoted, table, tiles
from .scored import ScoredRun
from .tasks import LabTask
from .verdicts import CriterionVerdict, Tokens

HEADINGS = (("fail", "Not met"), ("unscored", "Not judged"), ("pass", "Met"))
STATES = {
    "missing": "the deliverable was not there",
    "unreadable": "the deliverable could not be read",
    "empty": "the deliverable was empty",
    "error": "the judge could not be reached",
    "malformed": "the judge gave no usable answer",
    "refused": "the judge declined",
    "rejected": "the judge's server refused the request",
    "stopped": "grading stopped before it",
}


def run_page(run: ScoredRun, task: LabTask | None = None) -> str:
    """One run as a page.

    Args:
        run: as its scores file has it; nothing else is needed.
        task: adds the title, the wording of each criterion and the files that it was judged on.
    """
    labels = [verdict.label for verdict in run.verdicts]
    passed, total, unscored = labels.count("pass"), len(labels), labels.count("unscored")
    outcome = {True: ("All met", "pass"), False: (f"{labels.count('fail')} not met", "fail"), None: ("Unknown", "open")}
    state, kind = outcome[run.all_pass]
    coverage = run.scores.get("doc_coverage") or {}
    title = title_of(run, task)
    numbers = [(state, "task passes only if all are met", kind), (f"{passed} of {total}", "criteria met", "")]
    if unscored:
        numbers.append((str(unscored), "criteria not judged", "open"))
    if "total_documents" in coverage:
        numbers.append(
            (f"{coverage.get('documents_read', '?')} of {coverage['total_documents']}", "documents read", "")
        )
    if run.judging_cost is not None:
        numbers.append((dollars(run.judging_cost), "cost of judging", ""))
    return page(
        f"Assessment: {title}",
        [
            header("Assessment of delivered work", title, _facts(run)),
            tiles(numbers),
            note(_warnings(run, task, unscored)),
            *(_section(run, task, label, heading) for label, heading in HEADINGS),
            _cost(run),
            _provenance(run, task),
        ],
        "Verdicts are a language model's reading of what was delivered against the written criteria. "
        "They are no legal advice.",
    )


def criterion_block(verdict: CriterionVerdict, wording: str = "", files: Sequence[str] = (), open_: bool = True) -> str:
    """One criterion: its verdict, the reason, the passages quoted, and, folded, what it asks for.

    Args:
        wording: the criterion's own text.
        files: what it was judged on.
        open_: shown at once.
    """
    head = (
        f'<span class="badge {verdict.label}">{escape(_word(verdict))}</span>'
        f'<span class="id">{escape(verdict.id)}</span><span class="what">{escape(verdict.title)}</span>'
    )
    parts = [f'<p class="said" dir="auto">{escape(verdict.reason)}</p>' if verdict.reason else ""]
    if verdict.state in STATES and verdict.reason != STATES[verdict.state]:
        parts.insert(0, f'<p class="meta">{escape(STATES[verdict.state].capitalize())}.</p>')
    parts += _quoted("Quoted from the work", verdict.evidence)
    parts += _quoted("Quoted by the judge, but not found in the work", verdict.misquotes)
    votes = [vote for vote in verdict.votes if vote.judge]
    if votes:
        rows = [[vote.judge, _word(vote), vote.role or "", vote.reason] for vote in votes]
        parts.append(
            '<p class="label">Votes</p>' + table(["judge", "verdict", "role", "reason"], rows, "", (0, 1, 2, 3))
        )
    if wording:
        parts.append(f'<p class="label">The criterion</p><p class="said faint" dir="auto">{escape(wording)}</p>')
    if files:
        parts.append(f'<p class="meta">Judged on {escape(", ".join(files))}</p>')
    opening = f'<details class="item {verdict.label}"{" open" if open_ else ""}>'
    return f'{opening}<summary>{head}</summary><div class="body">{"".join(parts)}</div></details>'


def _section(run: ScoredRun, task: LabTask | None, label: str, heading: str) -> str:
    chosen = [verdict for verdict in run.verdicts if verdict.label == label]
    if not chosen:
        return ""
    criteria = {criterion.id: criterion for criterion in task.criteria} if task else {}
    blocks = []
    for verdict in chosen:
        criterion = criteria.get(verdict.id)
        wording = criterion.match_criteria if criterion else ""
        files = task.files_for(criterion, ()) if task and criterion else ()
        blocks.append(criterion_block(verdict, wording, files, open_=label != "pass"))
    return f"<h2>{escape(heading)} ({len(chosen)})</h2>\n" + "\n".join(blocks)


def _quoted(label: str, quotes: Sequence[str]) -> list[str]:
    if not quotes:
        return []
    return [
        f'<p class="label">{escape(label)}</p>',
        *(f'<blockquote dir="auto">{escape(quoted(quote))}</blockquote>' for quote in quotes),
    ]


def title_of(run: ScoredRun, task: LabTask | None = None) -> str:
    """The task's title; without the task, the words of its id."""
    if task is not None:
        return task.title
    parts = run.task.split("/")
    named = [part for part in parts if not re.fullmatch(r"tasks|scenario-\d+|\d+", part)]
    numbered = f", {parts[-1]}" if named and parts[-1] != named[-1] else ""
    return (named[-1].replace("-", " ").capitalize() + numbered) if named else run.task


def _facts(run: ScoredRun) -> list[str]:
    scored_at = str(run.scores.get("scored_at") or "")[:10]
    return [
        f"Task {run.task}",
        " \u00b7 ".join(
            part
            for part in (run.run_id != run.task and f"Run {run.run_id}", run.system and f"made by {run.system}")
            if part
        ),
        " \u00b7 ".join(part for part in (f"Judge {run.judge}", scored_at and f"graded {scored_at}") if part),
    ]


def _warnings(run: ScoredRun, task: LabTask | None, unscored: int) -> list[str]:
    found = []
    if unscored:
        found.append(
            f"{unscored} of {len(run.verdicts)} criteria have no verdict. They count neither as met nor as not met"
            + ("; whether the whole task passes is therefore unknown." if run.all_pass is None else ".")
        )
    if run.judging.get("stopped"):
        found.append(f"Grading was stopped: {run.judging['stopped']}.")
    if task is not None:
        hashes = {criterion.id: criterion.rubric_hash for criterion in task.criteria}
        given = (run.scores.get("still") or {}).get("rubric_hashes") or {}
        changed = [name for name, value in given.items() if hashes.get(name, value) != value]
        if changed:
            found.append(f"The wording of {', '.join(changed)} has changed since; what is shown is today's wording.")
    misquoted = sum(bool(verdict.misquotes) for verdict in run.verdicts)
    if misquoted:
        found.append(f"In {count(misquoted, 'verdict')} the judge quoted a passage that does not stand in the work so.")
    return found


def _cost(run: ScoredRun) -> str:
    judges: Mapping[str, Any] = run.judging.get("judges") or {}
    rows = []
    for name, each in judges.items():
        fresh, reused = (Tokens(**(each.get(key) or {})) for key in ("tokens", "reused_tokens"))
        if "cost" in each:
            rows.append(
                [name, str(each.get("model", "")), f"{fresh.calls:,}", f"{fresh.input - fresh.cached:,}",
                 f"{fresh.cached:,}", f"{fresh.output:,}", dollars(each["cost"]),
                 f"{each.get('cached_verdicts', 0):,}", f"{reused.total:,}"]
            )  # fmt: skip
    head = ["judge", "model", "calls", "input tokens", "cached input", "output tokens", "cost", "verdicts reused",
            "their tokens"]  # fmt: skip
    agent = run.scores.get("cost") or {}
    made = ""
    if agent:
        figures = [
            f"{agent[key]:,} {name}"
            for key, name in (("input_tokens", "input tokens"), ("output_tokens", "output tokens"))
            if isinstance(agent.get(key), int)
        ]
        if isinstance(agent.get("wall_clock_seconds"), int | float):
            figures.append(f"{agent['wall_clock_seconds'] / 60:.0f} minutes")
        made = f"<p>Making the work took {escape(', '.join(figures))}.</p>" if figures else ""
    shown = table(head, rows, "Calls of this grading; reused verdicts came from the cache at no cost.", (0, 1))
    return f"<h2>Cost</h2>\n{shown}{made}" if shown or made else ""


def _provenance(run: ScoredRun, task: LabTask | None) -> str:
    block = run.scores.get("still") or {}
    prompt = run.judging.get("prompt") or {}
    rubric = block.get("rubric") or (task.rubric_hash if task else "")
    facts = [
        ("Rubric", f"{len(run.verdicts)} criteria" + (f", version {rubric}" if rubric else "")),
        ("Prompt", f"{prompt['name']}, version {prompt['sha256']}" if prompt else ""),
        ("Graded at", run.scores.get("scored_at") or ""),
        ("Grader", "still" if block else "LAB's evaluator, or one that writes its format"),
    ]
    rows = [[name, value] for name, value in facts if value]
    files = [
        [each.get("name", ""), each.get("state", ""), f"{each.get('characters', 0):,}", each.get("reader", ""),
         Markup(f"<code>{escape(str(each.get('sha256', ''))[:16])}</code>")]
        for each in run.judging.get("deliverables") or ()
    ]  # fmt: skip
    read = table(
        ["deliverable", "state", "characters", "reader", "text's sha256"], files, "What was read", (0, 1, 3, 4)
    )
    return "<h2>How the verdicts came about</h2>\n" + table(["", ""], rows, "", (0, 1)) + read


def _word(verdict: CriterionVerdict) -> str:
    return {"pass": "met", "fail": "not met", "unscored": "not judged"}[verdict.label]
