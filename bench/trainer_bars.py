"""How exact the trainers' gradients, log-probabilities and processes are, and what the loop costs besides the model.

Tiny random models along scripts, in float32; cost and memory are taken on the model that `--model` names. Memory is
what autograd keeps for the backward pass, each storage once, which no other process on the machine changes.

    python bench/trainer_bars.py --model pocket
    python bench/trainer_bars.py --only memory,cost
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS / "harness"), str(TESTS / "still")]

from test_kv_rows import CASES, sampled_of, setting, step  # noqa: E402
from test_losses import LENGTHS, backward, cut_rows, whole_rows  # noqa: E402
from test_train_kills import WEIGHTS, curve  # noqa: E402
from trainer_cases import kept_bytes, plain_row  # noqa: E402

from still import methods, models  # noqa: E402
from still.compactor import StillCompactor  # noqa: E402
from still.harness.trainers.advantages import group_advantages  # noqa: E402
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
    parser.add_argument("--only", metavar="LIST", help=f"of {', '.join(PARTS)} (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = args.only.split(",") if args.only else PARTS
    found = [row for name in chosen for row in PARTS[name](args)]
    made_by = provenance(vars(args), 0)
    commit = (made_by["git"] or {}).get("commit", "")[:12]
    versions = " ".join(f"{name} {version}" for name, version in made_by["versions"].items())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    known = {row[0] for row in found}
    kept = []
    if args.output.is_file():  # what was not measured again stays, with the commit that it was measured at
        with args.output.open(newline="", encoding="utf-8") as file:
            kept = [row for row in list(csv.reader(file))[1:] if row[0] not in known]
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "case", "value", "unit", "bar", "device", "commit", "versions"])
        writer.writerows(kept)
        writer.writerows([*row, made_by["device"]["name"], commit, versions] for row in found)


def show(what: str, case: str, value: float, unit: str, bar: str) -> tuple:
    print(f"{what:<28} {case:<44} {value:.3g} {unit} (bar {bar})", flush=True)
    return what, case, f"{value:.6g}", unit, bar


def difference(one: dict, other: dict) -> float:
    size = max(float(x.abs().max()) for x in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / size


def invariance(args):
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


def log_probabilities(args):
    for case in CASES:
        backend, method, kind, settings = getattr(case, "values", case)
        with tempfile.TemporaryDirectory() as folder:
            loaded, made, rows = setting(Path(folder), backend, method, kind, documents=6, **settings)
            module = RowModel(loaded.model, made)
            with torch.no_grad():
                worst = max(float((module.logprobs(row) - sampled_of(row)).abs().max()) for row in rows)
        name = ", ".join(part for part in (backend, method, kind, settings.get("mode", "")) if part)
        yield show("log-probabilities", name, worst, "nats", "1e-4")


def checkpointing(args):
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


def baseline(args):
    """Two trajectories of one group with ragged numbers of windows, against the mean by hand."""
    found = group_advantages({"four": 1.0, "one": 0.0, "two": 0.25}, dict.fromkeys(("four", "one", "two"), "g")).of
    by_hand = {"four": 7 / 12, "one": -5 / 12, "two": -2 / 12}
    worst = max(abs(found[name] - value) for name, value in by_hand.items())
    yield show("group baseline", "3 trajectories of 4, 1 and 2 windows", worst, "from the hand computation", "1e-9")


def slot_row(ids: list[int], tokens: int):
    """A row of `tokens` behind S and U of 32 tokens and a window of 512 in 128 slots."""
    step = {"keep": "exact", "start": 0, "end": 32, "slots": 32, "first": 0, "last": 0}
    plan = [step, {**step, "keep": "append", "start": 32, "end": 544, "slots": 128}]
    return plain_row(ids[:tokens], range(tokens // 2, tokens), prefix_ids=ids[-544:], prefix_plan=plan,
                     prefix_method="still", backend="kv")  # fmt: skip


def memory(args):
    """Bytes a token at one length and at eight times that."""
    loaded = models.load(args.model, "cpu", "float32")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, loaded.model.config.vocab_size, (5000,), generator=draw).tolist()
    compactor = StillCompactor.for_model(loaded.model, ratio=4, chunk=512)
    module = RowModel(loaded.model.requires_grad_(True), methods.get("still", compactor=compactor), compactor="rl")
    module.train()
    for kind in ("text row", "row behind slots"):
        each = {}
        for tokens in (256, 512, 1024, 2048):
            row = plain_row(ids[:tokens], range(tokens // 2, tokens)) if kind == "text row" else slot_row(ids, tokens)
            each[tokens] = kept_bytes(module, row) / tokens
        more = (2048 * each[2048] - 1024 * each[1024]) / (512 * each[512] - 256 * each[256]) / 4
        sizes = ", ".join(f"{tokens}: {size / 1024:.0f} KiB" for tokens, size in each.items())
        yield show("memory", f"{loaded.name}, {kind}; a token at {sizes}", more,
                   "bytes of a further token at 2,048 tokens over those at 512", "1.1")  # fmt: skip


def processes(args):
    """Two processes through `accelerate launch` against one with doubled accumulation."""
    worker = TESTS / "harness" / "train_worker.py"
    config = Path(__file__).resolve().parent.parent / "harness" / "configs" / "ddp.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for kind in ("rows", "isft", "grpo"):
        with tempfile.TemporaryDirectory() as root:
            one, two = Path(root) / "one", Path(root) / "two"
            for command, folder in (([sys.executable], one), (launch, two)):
                subprocess.run([*command, str(worker), kind, str(folder)], env=quiet, check=True, capture_output=True)
            assert len(list(two.glob("process-*-of-2"))) == 2
            ours, theirs = curve(kind, one), curve(kind, two)
            mine, others = load_file(one / WEIGHTS[kind]), load_file(two / WEIGHTS[kind])
        worst = max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
        yield show("two processes", f"{kind}, loss of {len(ours)} steps", worst, "largest difference", "1e-5")
        yield show("two processes", f"{kind}, weights", max(float((mine[n] - others[n]).abs().max()) for n in mine),
                   "largest difference", "1e-4")  # fmt: skip


PARTS = {
    "invariance": invariance, "baseline": baseline, "log-probabilities": log_probabilities,
    "checkpointing": checkpointing, "processes": processes, "memory": memory, "cost": cost,
}  # fmt: skip

if __name__ == "__main__":
    main()
