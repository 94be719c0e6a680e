"""What a run shows while it goes: a progress bar in the terminal and lines in `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback

from .journal import write_atomically


class MetricsFile:
    """One JSON object a line, each with its `step`."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, line: dict) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run takes again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # cut short by a kill
        write_atomically(self.path, "".join(line + "\n" for line in kept))


class ProgressBar(TrainerCallback):
    """Steps, the latest KL and the latest score on held-out contexts."""

    def __init__(self, steps: int):
        self.steps = steps
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar where the run stands."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=self.steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        """Move on by a step."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest numbers."""
        for name, label in (("kl", "kl"), ("eval_kl", "held-out kl"), ("eval_share", "of full")):
            if name in (logs or {}):
                self.shown[label] = f"{logs[name]:.1%}" if name == "eval_share" else f"{logs[name]:.3f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
