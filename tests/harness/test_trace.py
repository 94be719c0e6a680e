"""The page of an episode: everything is on it, and nothing that a text says is done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from agent_cases import Reader, episode, make_task, texts

from still.cli import main
from still.harness.agent import drive
from still.harness.confined import empty
from still.harness.runs import read_run
from still.harness.trace import find_runs, trace_page

EVIL = "</pre></details><script>document.title='owned'</script><img src=x onerror=alert(1)> [BRIDGE &amp; \u202e evil"


@pytest.fixture
def run(tmp_path):
    task = make_task(tmp_path, {**texts(5), "00 <b>.txt": EVIL})
    made = episode(tmp_path, task, Reader(memo=lambda names: f"{EVIL} {len(names)}"), backend="memo", budget="300t")
    drive(made)
    root = made.folder.root
    results = [{"id": "C-001", "title": EVIL, "verdict": "fail", "reasoning": EVIL}]
    scores = {"score": 0.0, "n_passed": 0, "n_criteria": 1, "all_pass": False, "criteria_results": results}
    (root / "scores.json").write_text(json.dumps(scores))
    lines = [{"window": 1, "written": ["C-001", "C-002"], "answered": ["C-003"]},
             {"window": 2, "written": ["C-002"], "answered": None}]  # fmt: skip
    (root / "private.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


class Seen(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.attributes = set(), "", set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_the_page_tells_the_whole_episode(run):
    seen, events = Seen(trace_page(run)), read_run(run)
    turns = [event for event in events if event["event"] == "turn"]
    assert len(re.findall(r"turn \d+", seen.text)) >= len(turns)
    for event in events:
        if event["event"] == "compact":
            for name in ("base", "compacted", "raw"):
                assert f"{event['before'][name]:,} {name}" in seen.text
                assert f"{event['after'][name]:,} {name}" in seen.text
    for words in ("boundary 1: memo", "boundary 2: memo", "Continue the assignment above", "0 of 1 criteria pass",
                  "6 of 6 documents opened", "the text says 2 criteria: acquired C-001, C-002", "lost C-001",
                  "the model answers 1 criteria: acquired C-003", "draft after 6 documents"):  # fmt: skip
        assert words in seen.text, words


def test_hostile_text_stays_text(run):
    seen = Seen(trace_page(run))
    assert seen.text.count(EVIL) >= 4
    assert not {"script", "img", "link", "iframe"} & seen.tags
    assert not {name for name in seen.attributes if name.startswith("on")} | ({"src"} & seen.attributes)


def test_the_command_writes_pages_for_unfinished_runs_too(run, tmp_path, capsys):
    log = run / "events.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:9]))
    (run / "scores.json").unlink()
    before = sorted(path.name for path in run.iterdir())
    assert main(["trace", str(run), "--output", str(tmp_path / "pages")]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert "not finished" in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in run.iterdir()) == before
    assert main(["trace", str(run)]) == 0
    assert (run / "trace.html").is_file()
    (tmp_path / "nothing").mkdir()
    assert main(["trace", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_hostile_text_does_nothing_in_a_real_browser(run, tmp_path):
    (tmp_path / "page.html").write_text(trace_page(run), encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    assert re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1] != "owned"
    assert "<img" not in done.stdout
    assert "boundary 2" in done.stdout


def test_runs_are_found_past_a_deep_workspace_and_never_in_one(run):
    folder = run / "workspace"
    here = os.open(folder, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        there = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = there
    os.close(here)
    (folder / "events.jsonl").touch()
    assert find_runs(run.parent) == [run]
    empty(folder)
