"""Both trainers killed at random moments, and launched as two processes: the same rows, curves and weights."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("train_worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
WEIGHTS = {
    "rows": "checkpoint-10/policy/model.safetensors", "isft": "run/round-2/student/policy/model.safetensors",
    "grpo": "run/trained/policy/model.safetensors",
}  # fmt: skip
LOGS = {"rows": "metrics.jsonl", "isft": "run/round-2/train/metrics.jsonl", "grpo": "run/metrics.jsonl"}


def start(kind: str, folder: Path, launcher=()) -> subprocess.Popen:
    command = [*(launcher or [sys.executable]), str(WORKER), kind, str(folder)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(kind: str, folder: Path, launcher=()) -> float:
    began = time.perf_counter()
    child = start(kind, folder, launcher)
    said, _ = child.communicate()
    assert child.returncode == 0, said[-3000:]
    return time.perf_counter() - began


def curve(kind: str, folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / LOGS[kind]).read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def assert_alike(kind: str, one: Path, other: Path, bound: float = 1e-6) -> None:
    mine, theirs = load_file(one / WEIGHTS[kind]), load_file(other / WEIGHTS[kind])
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) <= bound
    ours, others = curve(kind, one), curve(kind, other)
    assert [step for step, _ in ours] == [step for step, _ in others]
    assert torch.allclose(torch.tensor([x for _, x in ours]), torch.tensor([x for _, x in others]), atol=1e-5)
    for rows in one.rglob("rows.jsonl"):
        assert rows.read_text() == (other / rows.relative_to(one)).read_text().replace(str(other), str(one))


@pytest.mark.full
@pytest.mark.parametrize(("kind", "moments"), [("rows", 6), ("isft", 7), ("grpo", 7)])
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_never_was(tmp_path, kind, moments):
    length = finish(kind, tmp_path / "whole")
    rng, hits = random.Random(f"kills {kind}"), 0
    for number in range(moments):
        folder = tmp_path / f"killed-{number}"
        for _ in range(2):  # twice, so that a resumed run is killed as well
            child = start(kind, folder)
            time.sleep(rng.uniform(0.3, 1.0) * length)
            hits += child.poll() is None
            child.send_signal(signal.SIGKILL)
            child.communicate()
        finish(kind, folder)
        assert_alike(kind, tmp_path / "whole", folder)
    assert hits >= moments / 2


@pytest.mark.full
@pytest.mark.parametrize("kind", ["rows", "grpo"])
def test_two_processes_give_the_curve_of_one(tmp_path, kind):
    finish(kind, tmp_path / "one")
    options = {"num_processes": "2", "num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *flags]
    finish(kind, tmp_path / "two", launcher)
    assert len(list((tmp_path / "two").glob("process-*-of-2"))) == 2
    assert_alike(kind, tmp_path / "one", tmp_path / "two", bound=1e-4)
