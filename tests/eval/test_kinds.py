from __future__ import annotations

from collections import Counter

import pytest

from still.eval.kinds import KINDS, criterion_kind, kind_of
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.tasks import FAMILIES, find_tasks, load_task


@pytest.mark.parametrize(
    ("kind", "title", "match"),
    [
        ("distractor", "DISTRACTOR_002: Non-compete", "PASS if the memo does not treat it as an issue."),
        ("distractor", "Treats 5 % fee as market (Distractor_001)", ""),
        (
            "absence",
            "Letter does not disclose the fee letter",
            "PASS if it does not disclose them. FAIL if so.",
        ),
        ("absence", "Precision", "Does not assert any matter outside this list: 1003-00001."),
        ("absence", "Clean copy", "PASS if the agreement contains no tracked changes. FAIL if it contains any."),
        ("absence", "No invented authority", ""),
        (
            "absence",
            "Letter does not include a Market MAC",
            "PASS if the letter either (a) has no such clause, or (b).",
        ),
        ("counting", "Conditions precedent with at least 6 of 8 standard items", "PASS if it includes them."),
        ("counting", "Explanations", "PASS if, for at least 75% of flagged provisions, it explains. FAIL if not."),
        ("counting", "Finds the issues", "PASS if the memo identifies at least ten distinct issues."),
        ("counting", "Counsel", "PASS if it names 3 of the following 5 firms."),
        ("numeric", "Identifies damages cap at $16.1M", "PASS if the markup flags the cap."),
        ("numeric", "Revolver spread", "PASS if the letter states SOFR + 375 basis points. FAIL if not."),
        ("numeric", "Share", "PASS if the share given lies outside 48%-56%."),
        (
            "presence",
            "Identifies Zurich seat (ISSUE_002)",
            "PASS if it flags Section 3.1. FAIL if it does not.",
        ),
        ("presence", "Explains", "PASS if it explains at least one consequence, such as the FAA."),
        ("presence", "Limitations", "PASS if it says that the 6-month period is short. FAIL only if it does not."),
        ("presence", "Dated", "PASS if the memo is dated November 15, 2025."),
    ],
)
def test_kinds_by_their_words(kind, title, match):
    assert kind_of(title, match) == kind


def test_generated_tasks_have_distractors_amounts_and_presence(tmp_path):
    for family in FAMILIES:
        write_lab_tasks(tmp_path, family, range(3), "tiny")
    for folder in find_tasks(tmp_path):
        task = load_task(folder)
        for criterion in task.criteria:
            kind = criterion_kind(criterion)
            assert (kind == "distractor") == bool(criterion.expect.get("absent"))
            if criterion.expect.get("kind") == "sum" and kind != "distractor":
                assert kind == "numeric"


def test_real_rubrics_show_every_kind_but_distractors(lab):
    rubrics = [load_task(folder) for folder in find_tasks(lab / "tasks")]
    found = Counter(criterion_kind(criterion) for task in rubrics for criterion in task.criteria)
    assert set(found) == set(KINDS) - {"distractor"}
    letter = load_task(lab / "tasks" / "banking-finance" / "draft-commitment-letter")
    kinds = {criterion.id: criterion_kind(criterion) for criterion in letter.criteria}
    assert {kinds[name] for name in ("C-049", "C-053", "C-068", "C-069", "C-073")} == {"counting"}
    assert kinds["C-052"] == "absence"
    assert {kinds[name] for name in ("C-035", "C-038", "C-045", "C-048", "C-074")} == {"numeric"}
    assert {kinds[name] for name in ("C-047", "C-051", "C-057", "C-067", "C-071", "C-077")} == {"presence"}
