"""What several processes of a run divide among them, one process after the other."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from agent_cases import tiny_agent
from trainer_cases import RUN, exact, matters, scripted_teacher, written

from still.harness.policies.local import LocalPolicy
from still.harness.trainers import evaluate as evaluation
from still.harness.trainers import isft
from still.harness.trainers.config import IsftConfig, TrainSettings
from still.harness.trainers.loop import mine
from still.harness.trainers.placing import all_cores
from still.harness.trainers.setup import make_module

SETTINGS = TrainSettings(lr=1e-3, micro_tokens=4000)


class Waits(Exception):
    """A process has done its share and waits for the first one to end."""


def process(monkeypatch, rank: int, room) -> None:
    """Make this the process `rank` of two; at its last barrier, all but the first stop."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    met = []

    def barrier() -> None:
        met.append(rank)
        if rank and len(met) == 2:
            raise Waits

    monkeypatch.setattr(room, "barrier", barrier)


def test_a_share_is_every_so_manieth(monkeypatch):
    assert mine([1, 2, 3]) == [1, 2, 3]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert mine([1, 2, 3]) == [2]


def test_processes_share_the_hold_out(tmp_path, monkeypatch):
    tasks, loaded = matters(tmp_path / "lab", (1, 2, 3)), tiny_agent(layers=1)
    module, loaded = make_module(loaded, None, SETTINGS)
    short = replace(RUN, max_new_tokens=40)

    def run(folder):
        return evaluation.evaluate(module, loaded, tasks, short, ["memo"], exact()[0], folder)

    whole, shared = run(tmp_path / "whole"), tmp_path / "shared"
    process(monkeypatch, 1, evaluation)
    with pytest.raises(Waits):
        run(shared)
    others = written(shared / "memo")
    assert len(others) == 1
    assert not (shared / evaluation.DONE).exists()
    process(monkeypatch, 0, evaluation)
    assert run(shared) == whole
    everyone = written(shared / "memo")
    assert len(everyone) == 3
    assert others.items() <= everyone.items()  # read, not played again


def test_processes_share_what_a_teacher_plays(tmp_path, monkeypatch):
    tasks, student = matters(tmp_path / "lab", (1, 2, 3)), LocalPolicy(tiny_agent(layers=1), RUN.window)
    config, said = IsftConfig(rollouts=1, keep_per_task=1, batch=1), []

    def collected(folder):
        return isft.prepare(scripted_teacher(tasks), tasks, student.tokenizer, RUN, config, SETTINGS, exact(), folder,
                            1, said.append)  # fmt: skip

    whole, shared = collected(tmp_path / "whole"), tmp_path / "shared"
    said.clear()
    process(monkeypatch, 1, isft)
    with pytest.raises(Waits):
        collected(shared)
    others = written(shared / "collect")
    assert len(others) == len(said) == 1
    assert not (shared / "selection.json").exists()
    process(monkeypatch, 0, isft)
    rows = collected(shared)
    assert [row.input_ids for row in rows] == [row.input_ids for row in whole]
    assert len(said) == 3  # each attempt is told of once
    assert others.items() <= written(shared / "collect").items()


def test_who_works_alone_has_the_threads_of_those_who_wait(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        monkeypatch.setattr(os, "cpu_count", lambda: 3)
        for processes, threads in ((1, 1), (2, 2), (8, 3)):
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            with all_cores():
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 1
        with pytest.raises(RuntimeError, match="broken"), all_cores():
            raise RuntimeError("broken")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
