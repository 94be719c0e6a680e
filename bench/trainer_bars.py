"""How exact the trainers' gradients and log-probabilities are, and what the loop costs besides forward and backward.

Tiny random models along scripts, in float32; the cost is taken on the model that `--model` names.

    python bench/trainer_bars.py --model pocket
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import tempfile
import time
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS / "harness"), str(TESTS / "still")]

from test_kv_rows import CASES, sampled_of, setting, step  # noqa: E402
from test_losses import LENGTHS, backward, cut_rows, whole_rows  # noqa: E402
from trainer_cases import plain_row  # noqa: E402

from still import models  # noqa: E402
from still.harness.trainers.config import TrainSettings  # noqa: E402
from still.harness.trainers.loop import RowTrainer  # noqa: E402
from still.harness.trainers.model import RowModel  # noqa: E402
from still.harness.trainers.steps import RowSource  # noqa: E402
from still.provenance import provenance  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket", help="for the cost (default: pocket)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a row (default: 1024)")
    parser.add_argument("--steps", type=int, default=4, help="default: 4")
    parser.add_argument("--output", type=Path, default=Path("bench/rows/trainer_bars.csv"))
    args = parser.parse_args()
    found = [*invariance(), *log_probabilities(), *checkpointing(), *cost(args)]
    made_by = provenance(vars(args), 0)
    commit = (made_by["git"] or {}).get("commit", "")[:12]
    versions = " ".join(f"{name} {version}" for name, version in made_by["versions"].items())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "case", "value", "unit", "bar", "device", "commit", "versions"])
        writer.writerows([*row, made_by["device"]["name"], commit, versions] for row in found)


def show(what: str, case: str, value: float, unit: str, bar: str) -> tuple:
    print(f"{what:<28} {case:<44} {value:.3g} {unit} (bar {bar})", flush=True)
    return what, case, f"{value:.6g}", unit, bar


def difference(one: dict, other: dict) -> float:
    size = max(float(x.abs().max()) for x in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / size


def invariance():
    from agent_cases import tiny_agent

    torch.manual_seed(0)
    model = tiny_agent(layers=1).model.requires_grad_(True)
    draw = torch.Generator().manual_seed(3)
    ids = {name: torch.randint(7, 260, (n,), generator=draw).tolist() for name, n in LENGTHS.items()}
    whole, cut = whole_rows(ids), cut_rows(ids)
    ways = {
        "padded": [whole], "windows, padded": [cut], "windows, accumulated": [[row] for row in cut],
        "windows, uneven batches": [cut[:1], cut[1:4], cut[4:]],
    }  # fmt: skip
    for kind in ("sft", "policy"):
        for normaliser in ("token", "trajectory", "constant"):
            reference = backward(model, [[row] for row in whole], normaliser, kind)
            worst = max(difference(reference, backward(model, way, normaliser, kind)) for way in ways.values())
            yield show("gradient invariance", f"{kind}, {normaliser}", worst, "of the largest gradient", "1e-5")


def log_probabilities():
    for case in CASES:
        backend, method, kind, settings = getattr(case, "values", case)
        with tempfile.TemporaryDirectory() as folder:
            loaded, made, rows = setting(Path(folder), backend, method, kind, documents=6, **settings)
            module = RowModel(loaded.model, made)
            with torch.no_grad():
                worst = max(float((module.logprobs(row) - sampled_of(row)).abs().max()) for row in rows)
        name = ", ".join(part for part in (backend, method, kind, settings.get("mode", "")) if part)
        yield show("log-probabilities", name, worst, "nats", "1e-4")


def checkpointing():
    for mode in ("rl", "joint"):
        with tempfile.TemporaryDirectory() as folder:
            loaded, made, rows = setting(Path(folder))
        loaded.model.requires_grad_(True)
        reference = step(RowModel(loaded.model, made, compactor=mode), rows)
        other = RowModel(copy.deepcopy(loaded.model), made, compactor=mode)
        other.checkpoint_activations()
        yield show("gradient checkpointing", f"kv, compactor {mode}", difference(reference, step(other, rows)),
                   "of the largest gradient", "1e-5")  # fmt: skip


class Timed(RowModel):
    """Knows how long its forwards took."""

    seconds = 0.0

    def forward(self, shares):
        """See `RowModel`."""
        began = time.perf_counter()
        out = super().forward(shares)
        self.seconds += time.perf_counter() - began
        return out


class Watched(RowTrainer):
    """Knows how long its steps and backward passes took."""

    backward = whole = 0.0

    def training_step(self, model, inputs, num_items_in_batch=None):
        """See `RowTrainer`."""
        inner = self.accelerator.backward

        def timed(loss, **more):
            began = time.perf_counter()
            inner(loss, **more)
            self.backward += time.perf_counter() - began

        self.accelerator.backward = timed
        began = time.perf_counter()
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.whole += time.perf_counter() - began
            self.accelerator.backward = inner


def cost(args):
    loaded = models.load(args.model, "cpu", "float32")
    size = loaded.model.config.vocab_size
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, size, (4, args.tokens), generator=draw).tolist()
    trained = range(args.tokens // 2, args.tokens)
    rows = [plain_row(each, trained, f"t{number}") for number, each in enumerate(ids)]
    settings = TrainSettings(save_every=10_000, micro_tokens=args.tokens)
    module = Timed(loaded.model.requires_grad_(True))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Watched(module, settings, folder, RowSource(rows, 4, settings, 0), args.steps)
        trainer.args.save_strategy = "no"
        trainer.fit()
    outside = 1 - (module.seconds + trainer.backward) / trainer.whole
    yield show("cost of the loop", f"{loaded.name}, {len(rows)} rows of {args.tokens} tokens", outside,
               "of a training step outside forward and backward", "0.1")  # fmt: skip


if __name__ == "__main__":
    main()
