"""Parity with LAB's evaluator on real runs: which files, in which order, as which text, with which words around them.

The other side is written here from the description of LAB's protocol, on the raw JSON and pandoc itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from judge_server import Answer, JudgeServer
from office_files import docx, redlines

from still.eval.client import OpenAIJudge
from still.eval.grade import GradeConfig, grade
from still.eval.judges import JudgeConfig
from still.eval.tasks import load_task

pytest.importorskip("openai")
pypandoc = pytest.importorskip("pypandoc")

PROMPT = (
    "You are evaluating a legal agent's work against one criterion.\n\n## Task\n{task_description}\n\n"
    "{agent_output}\n\n## Criterion\n**{criterion_title}**\n\n{match_criteria}\n\n"
    'Answer with JSON only: {{"verdict": "pass" or "fail", "reasoning": "..."}}\n'
)
RUNS = ["compare-merger-remedies", "draft-safe-agreement", "extract-transaction-entity-details"]


def to_text(file: Path, changes: str = "accept") -> str:
    """A docx as LAB converts it."""
    command = [pypandoc.get_pandoc_path(), "-f", "docx", "-t", "markdown", "--wrap=none", f"--track-changes={changes}"]
    return subprocess.run([*command, str(file)], capture_output=True, check=True).stdout.decode()


def lab_output(criterion: dict, names: dict, folder: Path) -> str:
    """What LAB's judge sees for a criterion: the bound files under their headings, else every output."""
    changes = "all" if criterion.get("evaluation_options", {}).get("include_docx_redlines") else "accept"
    bound = criterion.get("deliverables") or []
    if not bound:
        return "\n\n".join(f"## {file.name}\n{to_text(file)}" for file in sorted(folder.iterdir()))
    sections = []
    for name in bound:
        file = folder / names.get(name, name)
        text = to_text(file, changes) if file.exists() else f"(File not found: {file.name})"
        sections.append(f"## Agent Output: {name}\n{text}")
    return "\n\n".join(sections)


def graded(task, run: Path, prompt: Path, answers: dict[str, tuple[str, str]], name: str = "judge"):
    """Grade over HTTP with LAB's prompt; the server gives the verdicts by the criterion's text."""

    def rule(asked) -> Answer:
        text = re.search(r"\n\n## Criterion\n\*\*.*\*\*\n\n(.*)\n\nAnswer with JSON", asked.text)[1]
        verdict, reasoning = answers[text]
        return Answer(json.dumps({"verdict": verdict, "reasoning": reasoning}))

    with JudgeServer(rule) as server:
        judge = OpenAIJudge(JudgeConfig(name, name, server.url))
        grading = asyncio.run(grade(task, run, judge, GradeConfig(prompt=str(prompt)), run_id=task.id))
    return grading, [each.text for each in server.log]


@pytest.fixture
def prompt(tmp_path) -> Path:
    file = tmp_path / "rubric_criterion.txt"
    file.write_text(PROMPT)
    return file


@pytest.mark.parametrize("name", RUNS)
def test_real_runs_fed_their_real_verdicts_give_their_real_scores(lab, prompt, tmp_path, name):
    run = lab / "runs" / "irys" / name
    real = json.loads((run / "scores.json").read_text())
    index = [json.loads(line) for line in (lab / "tasks-index.jsonl").read_text().splitlines()]
    known = next((each for each in index if each["id"] == real["task"]), {"title": name})
    raw = {
        "title": known["title"],
        "instructions": "See the title.",
        "criteria": [
            {"id": each["id"], "title": each["title"], "match_criteria": f"PASS if {each['id']}. FAIL if not."}
            for each in real["criteria_results"]
        ],
    }
    folder = tmp_path / "tasks" / real["task"]
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(raw))
    answers = {
        asked["match_criteria"]: (each["verdict"], each["reasoning"])
        for asked, each in zip(raw["criteria"], real["criteria_results"], strict=True)
    }

    grading, sent = graded(load_task(folder), run, prompt, answers, real["judge_model"])
    ours = grading.scores()
    assert {key: ours[key] for key in real} == real
    missed = real["n_criteria"] - real["n_passed"]
    passed = f"{real['n_passed']}/{real['n_criteria']} criteria passed.  "
    assert ours["summary"] == passed + (f"Missed {missed} — task FAIL." if missed else "Task PASS.")

    outputs = lab_output({}, {}, run / "output")
    expected = [
        PROMPT.format(
            task_description=raw["title"], agent_output=outputs, criterion_title=each["title"],
            match_criteria=each["match_criteria"],
        )
        for each in raw["criteria"]
    ]  # fmt: skip
    assert sorted(sent) == sorted(expected)
    hashes = {file.name: hashlib.sha256(to_text(file).encode()).hexdigest() for file in (run / "output").iterdir()}
    assert {each["name"]: each["sha256"] for each in grading.judging["deliverables"]} == hashes


def test_a_real_rubric_with_bound_files_sees_those_in_its_own_order(lab, prompt, tmp_path):
    """77 criteria bound to a letter, a memo or both; two of a real run's documents stand in for them."""
    folder = lab / "tasks" / "banking-finance" / "draft-commitment-letter"
    task, raw = load_task(folder), json.loads((folder / "task.json").read_text())
    source = lab / "runs" / "irys" / "draft-safe-agreement" / "output"
    outputs = tmp_path / "run" / "output"
    outputs.mkdir(parents=True)
    shutil.copy(source / "safe-agreement-brightloom-canopy.docx", outputs / "commitment-letter.docx")
    shutil.copy(source / "drafting-issues-memo.docx", outputs / "issues-memo.docx")
    bindings = {tuple(each["deliverables"]) for each in raw["criteria"]}
    assert len(bindings) == 3

    seen = {bound: lab_output({"deliverables": bound}, raw["deliverables"], outputs) for bound in bindings}
    expected = [
        PROMPT.format(
            task_description=raw["title"], agent_output=seen[tuple(each["deliverables"])],
            criterion_title=each["title"], match_criteria=each["match_criteria"],
        )
        for each in raw["criteria"]
    ]  # fmt: skip
    answers = {each["match_criteria"]: ("pass", "r") for each in raw["criteria"]}
    grading, sent = graded(task, tmp_path / "run", prompt, answers)
    assert sorted(sent) == sorted(expected)
    assert grading.all_pass is True

    (outputs / "issues-memo.docx").unlink()
    seen = {bound: lab_output({"deliverables": bound}, raw["deliverables"], outputs) for bound in bindings}
    both = [each for each in raw["criteria"] if len(each["deliverables"]) == 2]
    grading, sent = graded(task, tmp_path / "run", prompt, answers)
    states = {each.id: each.state for each in grading.verdicts}
    assert {states[each["id"]] for each in raw["criteria"] if each["deliverables"] == ["issues-memo.docx"]} == {
        "missing"
    }
    assert sum("(File not found: issues-memo.docx)" in each for each in sent) == len(both)
    assert {states[each["id"]] for each in both} == {"judged"}


def test_tracked_changes_are_shown_where_the_criterion_wants_them(lab, prompt, tmp_path):
    """The same file, accepted for one criterion and with its changes for the other: two groups, two texts."""
    outputs = tmp_path / "run" / "output"
    outputs.mkdir(parents=True)
    (outputs / "markup.docx").write_bytes(docx(redlines("the old rent", "the new rent")))
    criteria = [
        {"id": "C-1", "title": "clean", "match_criteria": "PASS if clean.", "deliverables": ["markup.docx"]},
        {"id": "C-2", "title": "redlines", "match_criteria": "PASS if marked.", "deliverables": ["markup.docx"],
         "evaluation_options": {"include_docx_redlines": True}},
    ]  # fmt: skip
    folder = tmp_path / "tasks" / "area" / "markup"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"title": "T", "instructions": "I", "criteria": criteria}))
    answers = {"PASS if clean.": ("pass", "r"), "PASS if marked.": ("fail", "r")}
    grading, sent = graded(load_task(folder), tmp_path / "run", prompt, answers)
    clean, marked = sorted(sent, key=lambda text: "**redlines**" in text)
    assert lab_output(criteria[0], {}, outputs) in clean
    assert lab_output(criteria[1], {}, outputs) in marked
    assert ("the old rent" in clean, "the old rent" in marked) == (False, True)
    assert [each.get("redlines", False) for each in grading.judging["deliverables"]] == [False, True]
