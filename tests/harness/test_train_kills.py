"""Both trainers killed at random moments and inside a checkpoint's writing: rows and weights as if they never were.

The runs are forked from a server that has everything imported, so that a kill lands in the run and not in its imports.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import train_worker
from safetensors.torch import load_file

from still.distill.checkpoints import MARKER, checkpoints, is_complete
from still.harness.runs import read_run
from still.harness.trainers.placing import DONE

WEIGHTS = {
    "rows": "checkpoint-10/policy/model.safetensors", "isft": "run/round-2/student/policy/model.safetensors",
    "grpo": "run/trained/policy/model.safetensors", "kv": "run/trained/policy/model.safetensors",
}  # fmt: skip
CHECKPOINT = "checkpoint-"
LOGS = {
    "rows": ["metrics.jsonl"], "isft": ["run/round-1/train/metrics.jsonl", "run/round-2/train/metrics.jsonl"],
    "grpo": ["run/metrics.jsonl"], "kv": ["run/metrics.jsonl"],
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    """A context whose processes begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["still.harness.trainers.grpo", "still.harness.trainers.isft"])
    return context


def start(server, kind: str, folder: Path):
    child = server.Process(target=train_worker.work, args=(kind, str(folder)))
    child.start()
    return child


def finish(server, kind: str, folder: Path) -> None:
    child = start(server, kind, folder)
    child.join()
    assert child.exitcode == 0


def curve(kind: str, folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for log in LOGS[kind] for line in (folder / log).read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def played(folder: Path) -> dict[str, list]:
    """What was sampled in every rollout that is trained on."""
    found = {}
    for path in sorted(folder.glob("run/rollouts/**/events.jsonl")):
        turns = [event for event in read_run(path.parent) if event["event"] == "turn"]
        found[str(path.relative_to(folder))] = [(turn["append_ids"], turn["output_ids"]) for turn in turns]
    return found


def assert_alike(kind: str, one: Path, other: Path, bound: float = 1e-6) -> None:
    compactors = sorted(one.glob("run/trained/compactor/*.safetensors"))
    files = [WEIGHTS[kind], *(str(path.relative_to(one)) for path in compactors)]
    assert len(files) == 1 + (kind == "kv")
    for file in files:
        mine, theirs = load_file(one / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) <= bound
    ours, others = curve(kind, one), curve(kind, other)
    assert [step for step, _ in ours] == [step for step, _ in others]
    assert torch.allclose(torch.tensor([x for _, x in ours]), torch.tensor([x for _, x in others]), atol=1e-5)
    assert played(one) == played(other)
    rows = sorted(one.rglob("rows.jsonl"))
    assert len(rows) == {"isft": 2}.get(kind, 0)
    for path in rows:
        assert path.read_text() == (other / path.relative_to(one)).read_text().replace(str(other), str(one))


def entries(folder: Path) -> list[Path]:
    """All that lies in a folder; what disappears meanwhile is left out."""
    return [Path(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files)]


def half_written(folder: Path) -> bool:
    """Whether a checkpoint lies there that is not whole."""
    return any(path.is_dir() and not is_complete(path) for path in entries(folder) if CHECKPOINT in path.name)


def stage(kind: str, folder: Path) -> str:
    """Where a run that was killed had got to."""
    if half_written(folder):
        return "checkpoint"
    run = folder / "run"
    if kind == "isft" and (rounds := sorted(run.glob("round-*"))):
        if not (rounds[-1] / "selection.json").is_file():
            return "collect"
        return "train" if not (rounds[-1] / "student" / "complete.json").is_file() else "evaluate"
    if kind == "isft" and run.exists():
        return "evaluate"
    if kind == "kv" and (run / "placement").exists() and not (run / "placement" / DONE).is_file():
        return "place"
    if kind in ("grpo", "kv") and (steps := sorted(run.glob("rollouts/step-*"))):
        if not (steps[-1] / "rewards-0.json").is_file():
            return "rollouts"
        return "train" if not (run / "evaluation" / "after").exists() else "evaluate"
    if kind in ("grpo", "kv") and (run / "evaluation" / "before").exists():
        return "evaluate"
    return "train" if checkpoints(folder) else "begin"


def progress(folder: Path, seen: dict[Path, int]) -> int:
    """Files that a run has written so far, and lines of its logs; `seen` keeps those that it deleted again."""
    for path in entries(folder):
        with contextlib.suppress(OSError):  # a folder, or gone by now
            seen[path] = path.read_bytes().count(b"\n") if path.suffix == ".jsonl" else 1
    return sum(seen.values())


def killed_at(server, kind: str, folder: Path, target: int) -> None:
    """Kill a run when it has written so much, or at its end."""
    child, seen = start(server, kind, folder), {}
    while child.is_alive() and progress(folder, seen) < target:
        child.join(0.01)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "moments"), [("isft", 10), ("grpo", 10), ("kv", 5)])
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_never_was(tmp_path, server, kind, moments):
    seen: dict[Path, int] = {}
    killed_at(server, kind, tmp_path / "whole", sys.maxsize)
    whole, rng, hit = progress(tmp_path / "whole", seen), random.Random(f"kills {kind}"), Counter()
    for number in range(moments):
        folder = tmp_path / f"killed-{number}"
        share = (number + rng.random()) / moments  # one moment in each part of the run
        killed_at(server, kind, folder, int(share * whole))
        hit[stage(kind, folder)] += 1
        if number % 3 == 0:  # and the run that goes on is killed too
            killed_at(server, kind, folder, int((share + rng.random() * (1 - share)) * whole))
            hit[stage(kind, folder)] += 1
        finish(server, kind, folder)
        assert_alike(kind, tmp_path / "whole", folder)
    print(f"{kind}: {sum(hit.values())} kills, by where they hit: {dict(hit)}")
    assert len(hit) >= 2


def killed_inside_a_checkpoint(server, kind: str, folder: Path, rng: random.Random) -> None:
    """Kill a run that is writing a checkpoint, at a random moment of the writing."""
    while True:
        child, skip = start(server, kind, folder), rng.randrange(2)
        seen: set[Path] = set()
        while child.is_alive():
            found = [path for path in entries(folder) if CHECKPOINT in path.name]
            writing = {path for path in found if path.is_dir() and not (path / MARKER).exists()}
            seen |= writing
            if writing and len(seen) > skip:
                time.sleep(rng.uniform(0, 0.01))
                child.kill()
        child.join()
        if child.exitcode != 0 and half_written(folder):
            return
        shutil.rmtree(folder)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["rows", "isft", "grpo"])
def test_a_kill_inside_a_checkpoints_writing_is_mended(tmp_path, server, kind):
    finish(server, kind, tmp_path / "whole")
    rng = random.Random(f"writing {kind}")
    for number in range(3):
        folder = tmp_path / f"killed-{number}"
        killed_inside_a_checkpoint(server, kind, folder, rng)
        finish(server, kind, folder)
        assert not half_written(folder)
        assert_alike(kind, tmp_path / "whole", folder)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["rows", "isft", "grpo"])
def test_two_processes_give_the_curve_of_one(tmp_path, server, kind, checkout):
    finish(server, kind, tmp_path / "one")
    file = checkout / "harness" / "configs" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*command, train_worker.__file__, kind, str(tmp_path / "two")], env=quiet,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "two").glob("process-*-of-2"))) == 2
    assert_alike(kind, tmp_path / "one", tmp_path / "two", bound=1e-4)
