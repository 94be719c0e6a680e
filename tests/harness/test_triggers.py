"""When to compact, what budgets mean, and what a bridge says: pure functions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from still.harness.bridge import LISTED, Counters, Ledger, base_messages, rewrite
from still.harness.run_config import RunConfig, budget_bytes
from still.harness.triggers import Thresholds, WindowStats, boundaries_ahead, decide
from still.harness.types import Artifact

STATS = WindowStats(reads=0, unread=9, tokens=1000, next_document=500, reserve=1000, window=8000, progress=True)


@pytest.mark.parametrize(("changes", "level", "trigger"), [
    ({}, "no", ""),
    ({"reads": 3}, "no", ""),
    ({"reads": 4}, "suggest", "reads"),
    ({"reads": 6}, "force", "reads"),
    ({"reads": 6, "unread": 0}, "no", ""),
    ({"tokens": 6500}, "no", ""),
    ({"tokens": 6501}, "force", "tokens"),
    ({"tokens": 6501, "unread": 0}, "force", "tokens"),
    ({"tokens": 7900, "reads": 9, "progress": False}, "no", ""),
])  # fmt: skip
def test_decisions(changes, level, trigger):
    decision = decide(replace(STATS, **changes), Thresholds(4, 6))
    assert (decision.level, decision.trigger) == (level, trigger)
    assert bool(decision) == (level != "no")


def test_jitter_is_drawn_from_the_task_alone():
    config = RunConfig(jitter=3)
    drawn = {task: Thresholds.of(config, task) for task in map(str, range(40))}
    assert {each.suggest for each in drawn.values()} == {4, 5, 6, 7}
    assert all(each.force == each.suggest + 2 for each in drawn.values())
    assert Thresholds.of(replace(config, seed=9), "7") == drawn["7"]
    assert Thresholds.of(RunConfig(), "7") == Thresholds(4, 6)


@pytest.mark.parametrize(("documents", "expected"), [
    ([], 1), ([100], 1), ([100] * 4, 1), ([100] * 5, 2), ([600, 600, 600], 3), ([2500], 3), ([100] * 40, 10),
])  # fmt: skip
def test_boundaries_ahead(documents, expected):
    """The present one closes what was read; each window of the rest but the last is closed by another."""
    assert boundaries_ahead(documents, room=1000, thresholds=Thresholds(4, 6)) == expected


@pytest.mark.parametrize(("text", "per_token", "expected"), [
    ("512t", 4096, 512 * 4096), ("512t", None, 512), ("65536", 1, 65536), ("64KiB", 1, 65536), ("1.5 MiB", 1, 3 << 19),
])  # fmt: skip
def test_budgets(text, per_token, expected):
    assert budget_bytes(text, per_token) == expected


@pytest.mark.parametrize(("settings", "complaint"), [
    ({"budget": "64 apples"}, "64 apples"), ({"budget": "64t", "ratio": 8.0, "backend": "kv"}, "one of budget"),
    ({"ratio": 8.0, "backend": "memo"}, "for kv and hybrid only"), ({"ratio": 0.5, "backend": "kv"}, "ratio is 0.5"),
    ({"reads": 5, "reads_force": 4}, "less than reads"), ({"max_turns": 0}, "max_turns is 0"),
    ({"memo_share": 1.0}, "memo_share"), ({"temperature": -1.0}, "temperature is -1"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        RunConfig(**settings)


def test_a_bridge_is_pure_and_says_what_was_read_and_what_is_left():
    ledger = Ledger(("a.txt", "b.txt", "c.txt"), files={"memento.md": 12})
    ledger.note("a.txt", 0, 0, 100, 100)
    ledger.note("b.txt", 1, 0, 40, 100)
    base = base_messages("Do it.", ["memo.md"], ledger.documents, RunConfig(backend="memo"), 100)
    artifact, counters = Artifact("memo", "The memo.\n## Files not yet read\nnone"), Counters(2, 32, 9, 500)
    first, again = (rewrite(base, artifact, ledger, counters) for _ in range(2))
    assert first == again
    assert first[:2] == base
    text = first[2].content
    assert text.startswith("[BRIDGE 2 of at most 31]\nContinue the assignment above, do not restart it.")
    assert "documents/a.txt (window 0)\n" in text
    assert "documents/b.txt (window 1, characters 0 to 40 of 100; go on with offset 40)" in text
    assert "## Files not yet read\ndocuments/b.txt\ndocuments/c.txt\n" in text
    assert "memento.md (12 bytes)" in text
    assert "9 turns, 30 windows, 500 tokens here" in text
    without = rewrite(base, Artifact("kv", path="x"), ledger, counters)[2].content
    assert "## Memo" not in without
    assert without == text.replace("## Memo\nThe memo.\n## Files not yet read\nnone\n", "")


def test_parts_join_and_a_hole_stays_unread():
    ledger = Ledger(("a.txt",))
    ledger.note("a.txt", 0, 0, 40, 100)
    ledger.note("a.txt", 1, 60, 40, 100)
    assert ledger.unread == ["a.txt"]
    ledger.note("a.txt", 1, 40, 60, 100)
    assert ledger.unread == []


def test_a_data_room_is_not_listed_whole():
    names = tuple(f"{n:04d}.txt" for n in range(4000))
    _, task = base_messages("Do it.", [], names, RunConfig(), 0)
    assert task.content.count("documents/") == LISTED
    assert f"and {4000 - LISTED} more" in task.content
