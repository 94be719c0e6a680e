"""One small training run as a program of its own, for tests that kill it or launch it twice.

    python train_worker.py rows|isft|grpo|kv FOLDER
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


def small(folder: Path) -> tuple[list, list]:
    """Two matters of two documents each to train on, and one that is held out."""
    from trainer_cases import matters

    from still.eval.matters.generate import Difficulty

    size = Difficulty("small", facts=2, documents=2, amended=0.0)
    return matters(folder / "lab", difficulty=size), matters(folder / "held-out", (9,), size)


def isft(folder: Path) -> None:
    """Two rounds with a scripted teacher, a step and then two."""
    from agent_cases import tiny_agent
    from trainer_cases import RUN, exact, scripted_teacher

    from still.harness.trainers.config import IsftConfig, TrainSettings
    from still.harness.trainers.isft import run_isft

    tasks, held_out = small(folder)
    run = replace(RUN, reads=1, reads_force=2)
    config = IsftConfig(rounds=2, rollouts=1, keep_per_task=1, batch=2, evaluate_on=("memo",))
    settings = TrainSettings(lr=1e-3, save_every=1, micro_tokens=4000)
    run_isft(
        tasks, held_out, tiny_agent(layers=1), run, config, settings, folder / "run", exact(), exact()[0],
        teacher_of=lambda round, student: scripted_teacher(tasks), report=lambda line: None,
    )  # fmt: skip


def grpo(folder: Path, method_of=lambda loaded: None, backend: dict | None = None, more=None, **settings) -> None:
    """Three steps of a random model with random rewards."""
    from agent_cases import tiny_agent
    from trainer_cases import RUN, exact

    from still.harness.trainers.config import GrpoConfig, TrainSettings
    from still.harness.trainers.grpo import run_grpo

    run = replace(RUN, reads=1, reads_force=2, **{"max_new_tokens": 12, **(backend or {})})
    config = GrpoConfig(steps=3, tasks_per_step=2, group=2, reward="random", length_cut=1.0)
    settings = TrainSettings(lr=1e-3, save_every=1, micro_tokens=4000, **settings)
    loaded = tiny_agent(layers=1)
    run_grpo(
        *small(folder), loaded, run, config, settings, folder / "run", *exact(), method=method_of(loaded),
        report=lambda line: None, **(more or {}),
    )  # fmt: skip


def kv(folder: Path) -> None:
    """The same behind slots, on scripted rollouts: a placement is fitted first, and the compactor trains too."""
    from agent_cases import Reader
    from test_placing import placed
    from trainer_cases import Honest

    from still.harness.trainers import placing

    placing.STEPS = 12
    backend = {"backend": "kv", "budget": None, "ratio": 4.0, "max_new_tokens": 200}
    more = {"policy_of": lambda loaded, window: Honest(loaded.tokenizer, Reader, window, loaded)}
    grpo(folder, lambda loaded: placed(loaded, placement=8), backend, more, compactor_mode="joint", place=2)


def work(kind: str, folder: str) -> None:
    """One run to its end; each process leaves a file with its number."""
    import torch

    torch.set_num_threads(1)
    {"rows": rows, "isft": isft, "grpo": grpo, "kv": kv}[kind](Path(folder))
    together = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    (Path(folder) / f"process-{os.environ.get('RANK', '0')}-of-{together}").touch()


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2])
