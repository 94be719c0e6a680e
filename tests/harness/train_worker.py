"""One small training run as a program of its own, for tests that kill it or launch it twice.

    python train_worker.py rows|isft|grpo FOLDER
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "still")]


def rows(folder: Path) -> None:
    """Ten steps over fixed rows, a checkpoint after each."""
    from test_train_loop import trainer

    trainer(folder, steps=10, save_every=1).fit()


def small(folder: Path) -> list:
    """Two matters of two documents each."""
    from trainer_cases import matters

    from still.eval.matters.generate import Difficulty

    return matters(folder / "lab", difficulty=Difficulty("small", facts=2, documents=2, amended=0.0))


def isft(folder: Path) -> None:
    """Two rounds with a scripted teacher, a step and then two."""
    from agent_cases import tiny_agent
    from trainer_cases import RUN, exact, scripted_teacher

    from still.harness.trainers.config import IsftConfig, TrainSettings
    from still.harness.trainers.isft import run_isft

    tasks = small(folder)
    run = replace(RUN, reads=1, reads_force=2)
    config = IsftConfig(rounds=2, rollouts=1, keep_per_task=1, batch=2)
    settings = TrainSettings(lr=1e-3, save_every=1, micro_tokens=4000)
    run_isft(
        tasks, (), tiny_agent(layers=1), run, config, settings, folder / "run", exact(), exact()[0],
        teacher_of=lambda round, student: scripted_teacher(tasks), report=lambda line: None,
    )  # fmt: skip


def grpo(folder: Path) -> None:
    """Three steps of a random model with random rewards."""
    from agent_cases import tiny_agent
    from trainer_cases import RUN, exact

    from still.harness.trainers.config import GrpoConfig, TrainSettings
    from still.harness.trainers.grpo import run_grpo

    run = replace(RUN, reads=1, reads_force=2, max_new_tokens=12)
    config = GrpoConfig(steps=3, tasks_per_step=2, group=2, reward="random", length_cut=1.0)
    settings = TrainSettings(lr=1e-3, save_every=1, micro_tokens=4000)
    run_grpo(
        small(folder), (), tiny_agent(layers=1), run, config, settings, folder / "run", *exact(),
        report=lambda line: None,
    )  # fmt: skip


def work(kind: str, folder: str) -> None:
    """One run to its end; each process leaves a file with its number."""
    import torch

    torch.set_num_threads(1)
    {"rows": rows, "isft": isft, "grpo": grpo}[kind](Path(folder))
    together = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    (Path(folder) / f"process-{os.environ.get('RANK', '0')}-of-{together}").touch()


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2])
