"""A run that is killed at any moment goes on and ends as one that never was: same tokens, artifacts and files."""

from __future__ import annotations

import errno
import os
import random
import signal
import time

import pytest
import torch
from agent_cases import Reader, SteeredPolicy, episode, make_task, of, texts, tiny_agent
from safetensors.torch import load_file

from still import methods
from still.harness.agent import drive, drive_many
from still.harness.confined import own_all
from still.harness.runs import RunError, RunFolder, read_run
from still.harness.sampling import OneByOne
from still.harness.types import Message, ToolCall

CASES = {
    "full": {}, "plain": {}, "none": {}, "trim": {"budget": "60t"}, "memo": {"budget": "100t"},
    "memo_kv": {"budget": "150t"}, "kv": {"budget": "90t"}, "kv-recompact": {"budget": "60t", "mode": "recompact"},
    "kv-snapkv": {"budget": "90t"}, "hybrid": {"budget": "200t"},
}  # fmt: skip
BOUNDARIES = {"full": 0, "plain": 0}


class Worker(Reader):
    """Reads, thinks, edits what it wrote, and lets the model write parts of it all."""

    def __init__(self):
        super().__init__(memo=lambda names: f"{len(names)} read: ~~~~~~~~")

    def __call__(self, seen, limit):
        message = super().__call__(seen, limit)
        if not message.calls:
            edited = any(m.role == "tool" and m.call.name == "edit" for m in seen)
            edit = ToolCall("edit", '{"path": "output/memo.md", "old_string": "draft", "new_string": "~~~~ "}')
            return message if edited or message.content != "Done." else Message("assistant", "", (edit,))
        return Message("assistant", "now ~~~~~~~~", message.calls)


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)  # a forked child of a process with threads would hang
    return tiny_agent()


def start(root, name, loaded):
    """The episode of a case, in `root/run`."""
    task = make_task(root, texts(6, 60))
    policy = SteeredPolicy(loaded.tokenizer, Worker, 6000, loaded)
    method = methods.get("snapkv" if "snapkv" in name else "knorm")
    settings = {"backend": name.split("-")[0], "window": 6000, "tools": ("read", "write", "edit"), **CASES[name]}
    return episode(root, task, None, policy=policy, method=method, **settings)


def killed(root, name, loaded, events: int, pause: float) -> bool:
    """Play in a child process and kill it `pause` seconds after its log holds so many events; whether it was under way.

    Waiting for an event rather than for a time makes every part of a run as likely on a busy machine as on an idle one.
    """
    log = root / "run" / "events.jsonl"
    child = os.fork()
    if not child:
        try:
            drive(start(root, name, loaded))
        finally:
            os._exit(0)
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and logged(log).count(b"\n") < events:
        time.sleep(0.002)
    if not ended[0]:
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    return os.WIFSIGNALED(ended[1]) and b'"event":"end"' not in logged(log)


def logged(log) -> bytes:
    """The log as it is now."""
    return log.read_bytes() if log.exists() else b""


def outcome(root) -> dict:
    """Everything that a resumed run must have in common with an uninterrupted one."""
    events = read_run(root / "run")
    files = {path.name: path.read_bytes() for path in (root / "run" / "output").iterdir()}
    artifacts = [load_file(path) for path in sorted((root / "run" / "artifacts").iterdir())]
    return {
        "turns": [(turn["append_ids"], turn["output_ids"]) for turn in of(events, "turn")],
        "tools": [(tool["name"], tool["result"]) for tool in of(events, "tool")],
        "bridges": [(compact["bridge"], compact["artifact"]["text"]) for compact in of(events, "compact")],
        "files": files,
        "stop": events[-1]["stop"],
        "artifacts": artifacts,
    }


def assert_same(one: dict, other: dict) -> None:
    """Equal in every token, text and file, and in every bit of every artifact."""
    for name in ("turns", "tools", "bridges", "files", "stop"):
        assert one[name] == other[name], name
    assert len(one["artifacts"]) == len(other["artifacts"])
    for mine, theirs in zip(one["artifacts"], other["artifacts"], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def check_kills(tmp_path, loaded, name: str, wanted: int, seed: int) -> list[int]:
    """Kill runs of a case at random moments until so many were hit under way, take each up again and compare.

    A third of the runs is killed twice, the second time perhaps while it is replaying. Returns the events that the logs
    held at each hit.
    """
    whole = tmp_path / "whole"
    began = time.perf_counter()
    assert drive(start(whole, name, loaded))["status"] == "done"
    events = len(read_run(whole / "run"))
    step = (time.perf_counter() - began) / events
    expected, rng, hits = outcome(whole), random.Random(f"{seed} {name}"), []
    assert len(expected["bridges"]) == BOUNDARIES.get(name, 2)
    for attempt in range(4 * wanted):
        if len(hits) >= wanted:
            break
        root = tmp_path / f"killed-{attempt}"
        log, left = root / "run" / "events.jsonl", b""
        for again in (False, True) if rng.random() < 0.3 else (False,):
            if killed(root, name, loaded, 0 if again else rng.randrange(events - 1), rng.uniform(0, 2 * step)):
                hits.append(logged(log).count(b"\n"))
            assert logged(log).startswith(left[: left.rfind(b"\n") + 1])
            left = logged(log)
        drive(start(root, name, loaded))
        assert logged(log).startswith(left[: left.rfind(b"\n") + 1])
        assert_same(expected, outcome(root))
    return hits


@pytest.mark.parametrize("name", ["memo", "kv", "hybrid"])
def test_a_killed_run_ends_as_though_it_had_not_been(tmp_path, loaded, name):
    assert len(check_kills(tmp_path, loaded, name, wanted=2, seed=0)) >= 2


@pytest.mark.full
def test_fifty_random_moments_over_all_backends(tmp_path, loaded, record_property):
    hits = {}
    for name in CASES:
        (tmp_path / name).mkdir()
        hits[name] = check_kills(tmp_path / name, loaded, name, wanted=6, seed=1)
    total = sum(map(len, hits.values()))
    record_property("kills under way", total)
    print(f"{total} kills of runs under way; events in the log at each: {hits}")
    assert all(len(found) >= 6 for found in hits.values())
    assert total >= 50
    assert len({n for found in hits.values() for n in found}) > 10  # moments all over a run


def test_a_run_that_ended_is_replayed_without_a_computation(tmp_path, loaded, monkeypatch):
    drive(start(tmp_path, "kv", loaded))
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    run = start(tmp_path, "kv", loaded)
    monkeypatch.setattr(run.session, "_forward", None)
    monkeypatch.setattr(run.workspace, "call", None)
    assert drive(run)["status"] == "done"
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", range(4, 28, 4))
def test_a_log_cut_at_any_event_ends_alike_with_a_workspace_put_back(tmp_path, loaded, cut):
    drive(start(tmp_path / "whole", "memo", loaded))
    drive(start(tmp_path / "cut", "memo", loaded))
    log = tmp_path / "cut" / "run" / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[: min(cut, len(lines) - 1)]) + b'{"event": "tu')
    (tmp_path / "cut" / "run" / "workspace" / "stray.txt").write_text("from a call that was never committed")
    drive(start(tmp_path / "cut", "memo", loaded))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "run" / "workspace" / "stray.txt").exists()


class Waiting(Reader):
    """Says that it plays, and waits to be killed."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def __call__(self, seen, limit):
        self.mark.touch()
        time.sleep(600)


def test_two_processes_do_not_play_one_run_and_a_killed_one_leaves_no_lock(tmp_path):
    task, mark = make_task(tmp_path, texts(3)), tmp_path / "playing"
    child = os.fork()
    if not child:
        try:
            drive(episode(tmp_path, task, Waiting(mark)))
        finally:
            os._exit(1)
    try:
        while not mark.exists():
            assert os.waitpid(child, os.WNOHANG)[0] == 0
            time.sleep(0.01)
        before = logged(tmp_path / "run" / "events.jsonl")
        with pytest.raises(RunError, match=f"{tmp_path}/run is being played by another process"):
            drive(episode(tmp_path, task, Reader()))
        assert logged(tmp_path / "run" / "events.jsonl") == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert drive(episode(tmp_path, task, Reader()))["status"] == "done"


def test_runs_that_were_left_half_way_can_be_taken_up_in_the_same_process(tmp_path):
    def broken(seen, limit):
        raise RuntimeError("no script")

    task = make_task(tmp_path, texts(3))
    runs = [episode(tmp_path, task, player, name=name) for name, player in (("one", broken), ("two", Reader()))]
    playing = drive_many(runs, 2, OneByOne())
    assert isinstance(next(playing)[1], RuntimeError)
    playing.close()
    for name in ("one", "two"):
        assert drive(episode(tmp_path, task, Reader(), name=name))["status"] == "done"


def test_where_files_cannot_be_locked_a_run_is_played(tmp_path, monkeypatch):
    def refused(file, how):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", refused)
    assert drive(episode(tmp_path, make_task(tmp_path, texts(3)), Reader()))["status"] == "done"


def deep(folder, depth: int) -> None:
    """Folders in folders, longer together than a path may be, with a file at the end that nobody may touch."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 20, dir_fd=here)
        there = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = there
    os.close(os.open("x", os.O_CREAT | os.O_WRONLY, 0o000, dir_fd=here))
    os.chmod(here, 0o000)
    os.close(here)


def test_a_workspace_of_any_depth_is_made_ours_and_put_back(tmp_path):
    folder = RunFolder(tmp_path / "run")
    files = {"output/memo.md": [folder.keep("draft"), 5]}
    (tmp_path / "kept").mkdir()
    (folder.workspace / "link").symlink_to(tmp_path / "kept")
    for _ in range(2):
        deep(folder.workspace, 1500)
        own_all(folder.workspace)
        folder.restore(files)
    assert folder.snapshot() == files
    assert [path.name for path in folder.workspace.iterdir()] == ["output"]
    assert (tmp_path / "kept").is_dir()
