"""Do the trainers make an agent better? iSFT, GRPO and distillation on the pocket, each beside its control.

    python bench/pocket_training.py -o runs/training                       # the whole table: an afternoon on two cores
    python bench/pocket_training.py -o runs/training --only grpo           # some of it, by the beginning of names
    python bench/pocket_training.py -o runs/training --list                # the commands, nothing run

`pocket-agent` plays assignments whose documents are worded as no document that it was trained on, with a boundary after
every document. Training tasks are of the training split, the hold-out has other names and values; the grader of both is
exact. iSFT's first teacher is the oracle, a script that looks answers up in the rubric; then the student teaches
itself. Every run is a `still` command on one thread, two side by side; `--processes 2 --together 1` runs one at a time
in two processes, as on several devices. What was finished is not run again, and what was cut off goes on where it was.
The table goes to bench/rows/pocket_training.csv: pass rates before and after with
intervals clustered by task, and the paired gain, over all seeds of a condition.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from shapes import ROWS, run_still

from still import harness
from still.eval.judges import find_judge
from still.eval.reward import RubricReward
from still.eval.stats import clustered_rate, paired_difference
from still.eval.tasks import find_tasks, load_task
from still.harness.trainers.grading import grade_runs
from still.provenance import provenance

CONFIGS = Path(harness.__path__[0]) / "configs"
ASKED = "--family assignments --unseen-templates"
TASKS = {
    "8": ("--criteria 8 --documents 3", "0:400", "1000:1040"),
    "8-many": ("--criteria 8 --documents 3", "0:800", "2000:2100"),
    "10": ("--criteria 10 --documents 4", "0:40", "1000:1040"),
    "10-many": ("--criteria 10 --documents 4", "0:600", "1000:1040"),
    "14": ("--criteria 14 --documents 5", "0:60", "1000:1040"),
}
"""Matters by their number of parties, the seeds of those to train on, and of the hold-out."""
GAME = (
    "--policy pocket-agent --window 4096 --reads 1 --reads-force 2 --max-new-tokens 1024 --max-turns 60 "
    "--tools read,write --sandbox none --together 20 --micro-tokens 4096"
)
GRPO = "grpo --backend memo --budget 128t --steps 40 --tasks-per-step 4 --group 4 --lr 5e-5 --warmup 8 --no-ask"
GRPO_FALLING = GRPO.replace("--lr 5e-5 --warmup 8", "--lr 1e-4 --schedule linear --warmup 4")
GRPO_12 = GRPO_FALLING.replace("--tasks-per-step 4", "--tasks-per-step 3")
LINES = "--credit lines --credit-share 1 --potential written"
GRPO_LINES, GRPO_12_LINES = f"{GRPO_FALLING} {LINES}", f"{GRPO_12} {LINES}"
GRPO_12_LEDGER = f"{GRPO_12} --credit ledger --credit-share 0.7 --potential written"
GRPO_KV = (
    "grpo --backend kv --ratio 32 --compactor-mode rl --steps 40 --tasks-per-step 4 --group 8 --lr 1e-4 "
    "--schedule linear --warmup 4 --no-ask --credit lines --credit-share 1"
)
GRPO_KV_JOINT = (
    "grpo --backend kv --ratio 32 --compactor-mode joint --place 100 --steps 40 --tasks-per-step 3 --group 8 --lr 5e-5 "
    "--compactor-lr 2e-4 --schedule linear --warmup 4 --no-ask --credit lines --credit-share 1"
)
ISFT = (
    "isft --teacher oracle --rounds 3 --rollouts 2 --keep-per-task 1 --private none --no-rubric --temperature 0.7 "
    "--epochs 2 --batch 4 --lr 2e-4 --schedule linear --start last --no-union --no-ask"
)
ISFT_ONCE = ISFT.replace("--rollouts 2", "--rollouts 1")
UNFILTERED = ISFT_ONCE.replace("--teacher oracle ", "") + " --select any"
MEMO, KV = "--backend memo --evaluate-on memo", "--backend kv --ratio 16 --evaluate-on kv"
ISFT_32 = (
    "isft --rounds 3 --tasks-per-round 200 --rollouts 1 --keep-per-task 1 --private none --no-rubric --temperature 0.7 "
    "--batch 4 --lr 5e-5 --compactor-lr 2e-4 --schedule linear --warmup 5 --start last --no-union --backend kv "
    "--ratio 32 --evaluate-on kv --compactor-mode joint --place 100 --no-ask"
)
DISTILL = (
    "grpo --backend kv --ratio 16 --train-policy frozen --compactor-mode distill --steps 30 --tasks-per-step 6 "
    "--group 2 --lr 5e-4 --schedule linear --no-ask"
)

DISTILL_LONGER = DISTILL.replace("--steps 30", "--steps 60").replace("--lr 5e-4", "--lr 2e-4") + " --place 200"


@dataclass(frozen=True)
class Run:
    """One run of a trainer.

    Attributes:
        group: seeds of one condition share it.
        command: after `still`, without tasks, seed and output.
        parties: of its matters, see `TASKS`.
        seed: of the training.
        matters: which of `TASKS`; those of its parties unless given.
        like: group whose run says how many tokens a round of this one may train on: iSFT's control.
    """

    group: str
    command: str
    parties: int
    seed: int = 0
    matters: str = ""
    like: str = ""

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"{self.group}-{self.seed}"

    def argv(self, root: Path) -> list[str]:
        """The command in full.

        Raises:
            ValueError: the run that it is a control of has not ended.
        """
        trainer, *rest = shlex.split(self.command)
        if self.like:
            rounds = sorted((root / f"{self.like}-{self.seed}").glob("round-*/selection.json"))
            tokens = [json.loads(path.read_text(encoding="utf-8"))["tokens"] for path in rounds]
            if len(tokens) < 3:
                raise ValueError(f"{self.name} trains on as many tokens as {self.like}-{self.seed}: run that first")
            rest += ["--token-budget", str(round(sum(tokens) / len(tokens)))]
        return [
            trainer, str(self.tasks(root) / "train" / "tasks"), "--held-out", str(self.held_out(root)), *rest,
            *shlex.split(GAME), "--train-seed", str(self.seed), "-o", str(root / self.name),
        ]  # fmt: skip

    def tasks(self, root: Path) -> Path:
        """Where its matters lie."""
        return root / "tasks" / (self.matters or str(self.parties))

    def held_out(self, root: Path) -> Path:
        """Where its hold-out lies."""
        return self.tasks(root) / "held-out" / "tasks"

    def folders(self, root: Path) -> list[Path]:
        """Where the hold-out was played: before, and after each round; one of GRPO's is all of its steps."""
        folder = root / self.name
        if self.command.startswith("isft"):
            places = [folder / "before", *(folder / f"round-{number}" / "evaluation" for number in (1, 2, 3))]
        else:
            places = [folder / "evaluation" / "before", folder / "evaluation" / "after"]
        return [place for place in places if (place / "evaluation.json").is_file()]

    def ended(self, root: Path) -> bool:
        """Whether nothing of it is left to do."""
        return len(self.folders(root)) == (4 if self.command.startswith("isft") else 2)


RUNS = (
    *(Run("grpo", GRPO, 8, seed) for seed in range(3)),
    Run("grpo-random", f"{GRPO} --reward random", 8),
    *(Run("grpo-lines", GRPO_LINES, 10, seed, matters="10-many") for seed in range(3)),
    Run("grpo-lines-random", f"{GRPO_LINES} --reward random", 10, matters="10-many"),
    *(Run("grpo-12-lines", GRPO_12_LINES, 10, seed, matters="10-many") for seed in range(3)),
    *(Run("grpo-12-ledger", GRPO_12_LEDGER, 10, seed, matters="10-many") for seed in range(3)),
    *(Run("grpo-12-plain", GRPO_12, 10, seed, matters="10-many") for seed in range(3)),
    *(Run("grpo-kv-32", GRPO_KV, 10, seed, matters="10-many") for seed in range(3)),
    Run("grpo-kv-32-random", f"{GRPO_KV} --reward random", 10, matters="10-many"),
    *(Run("grpo-kv-32-joint", GRPO_KV_JOINT, 10, seed, matters="10-many") for seed in range(3)),
    *(Run("isft-memo", f"{ISFT_ONCE} {MEMO} --budget 192t", 14, seed) for seed in range(3)),
    Run("isft-memo-unfiltered", f"{UNFILTERED} {MEMO} --budget 192t", 14, like="isft-memo"),
    Run("isft-memo-10", f"{ISFT} {MEMO} --budget 128t", 10),
    Run("isft-memo-10-unfiltered", f"{UNFILTERED} {MEMO} --budget 128t", 10, like="isft-memo-10"),
    Run("isft-kv", f"{ISFT} {KV}", 10),
    Run("isft-kv-unfiltered", f"{UNFILTERED} {KV}", 10, like="isft-kv"),
    *(Run("isft-kv-32", f"{ISFT_32} --teacher oracle --teacher-rounds 3", 10, seed, matters="10-many")
      for seed in range(3)),
    Run("isft-kv-32-unfiltered", f"{ISFT_32} --select any", 10, matters="10-many", like="isft-kv-32"),
    Run("distill", DISTILL, 8),
    *(Run("distill-placed", f"{DISTILL} --place 200", 8, seed) for seed in range(3)),
    *(Run("distill-longer", DISTILL_LONGER, 8, seed, matters="8-many") for seed in range(3)),
)


def main() -> int:
    """Run what is left, and write the table of what has ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default="", metavar="NAMES", help="beginnings of names, with commas (default: all)")
    parser.add_argument("--together", type=int, default=2, help="runs side by side (default: 2)")
    parser.add_argument("--processes", type=int, default=1, help="of each run, with a thread each (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the commands")
    args = parser.parse_args()
    chosen = [run for run in RUNS if run.name.startswith(tuple(args.only.split(",")))]
    if not chosen:
        raise SystemExit(f"no run begins with {args.only!r}; there are {', '.join(run.name for run in RUNS)}")
    if args.list:
        for run in chosen:
            print(shown(run, args.output))
        return 0
    make_tasks(args.output, {run.matters or str(run.parties) for run in chosen})
    failed: list[str] = []
    for wave in ([run for run in chosen if not run.like], [run for run in chosen if run.like]):
        with ThreadPoolExecutor(args.together) as pool:
            failed += [name for name in pool.map(lambda run: start(run, args.output, args.processes), wave) if name]
    write_table(args.output)
    return 1 if failed else 0


def shown(run: Run, root: Path) -> str:
    """The command, or why it is not known yet."""
    try:
        return shlex.join(["still", *run.argv(root)])
    except ValueError as problem:
        return f"# {problem}"


def make_tasks(root: Path, which: set[str]) -> None:
    """Matters to train on, and their hold-out."""
    for matters in sorted(which):
        size, seeds, held_out = TASKS[matters]
        for name, split, drawn in (("train", "train", seeds), ("held-out", "held_out", held_out)):
            command = ["matters", "generate", *shlex.split(f"{ASKED} {size}"), "--split", split, "--seeds", drawn]
            if still([*command, "-o", str(root / "tasks" / matters / name)], root / "tasks.log"):
                raise SystemExit(f"no tasks could be made: see {root / 'tasks.log'}")


def start(run: Run, root: Path, processes: int) -> str:
    """Run it if it has not ended; its name if it failed."""
    if run.ended(root):
        return ""
    print(shown(run, root), flush=True)
    began = time.monotonic()
    try:
        status = still(run.argv(root), root / f"{run.name}.log", processes)
    except ValueError:  # as it was shown
        return run.name
    ended = f"failed, see {root / run.name}.log" if status else "done"
    print(f"{run.name}: {ended}, {(time.monotonic() - began) / 60:.0f} minutes", flush=True)
    return run.name if status else ""


def still(argv: list[str], log: Path, processes: int = 1) -> int:
    """One command of `still` in some processes with a thread each; its exit status."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml"), "--num_processes",
                str(processes), "--main_process_port", "0"] if processes > 1 else []  # fmt: skip
    return run_still(argv, log, launcher=launcher)


def write_table(root: Path) -> None:
    """Grade the hold-outs again, criterion by criterion, and put the seeds of a condition together.

    Conditions that have no run in this folder keep the lines they had.
    """
    lines: list[dict] = []
    for group in dict.fromkeys(run.group for run in RUNS):
        runs = [run for run in RUNS if run.group == group]
        for number in (1, 2, 3):
            there = [run for run in runs if len(run.folders(root)) > number]
            lines += [line_of(there, number, root)] if there else []
    if not lines:
        return
    made_by = provenance({"game": GAME, "asked": ASKED, "tasks": TASKS, "runs": [asdict(run) for run in RUNS]}, 0)
    commit, device = (made_by["git"] or {}).get("commit", "")[:12], made_by["device"]["name"]
    table, anew = ROWS / "pocket_training.csv", {line["condition"] for line in lines}
    rows = [{**line, "device": device, "commit": commit} for line in lines]
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["condition"] not in anew] + rows
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)
    for line in lines:
        name, rates = f"{line['condition']}, round {line['round']}", f"{line['before']:5} -> {line['after']:5}"
        print(f"{name:32} {rates}  gain {line['gain']:+} ({line['gain_low']} to {line['gain_high']})")


def line_of(runs: list[Run], number: int, root: Path) -> dict:
    """The table's line of a condition after some round, over its seeds."""
    tasks = [load_task(folder) for folder in find_tasks(runs[0].held_out(root))]
    grade = RubricReward(find_judge("exact")).grade
    backend = "kv" if "--backend kv" in runs[0].command else "memo"
    labels: tuple[list[float], list[float]] = ([], [])
    whole: tuple[list[float], list[float]] = ([], [])
    for run in runs:
        places = run.folders(root)
        for place, folder in enumerate((places[0], places[number])):
            found = grade_runs(grade, [(task, folder / backend / task.id / "seed-0") for task in tasks])
            labels[place].extend(float(label == "pass") for each in found for label in each.labels.values())
            whole[place].extend(float(bool(each.all_pass)) for each in found)
    clusters = [task.id for task in tasks for _ in task.criteria] * len(runs)
    before, after = (clustered_rate(values, clusters) for values in labels)
    gain = paired_difference(labels[1], labels[0], clusters).interval
    shown = {"before": before, "after": after, "gain": gain}
    return {
        "condition": runs[0].group, "round": number, "seeds": len(runs),
        "parties": runs[0].parties, "tasks": len(tasks),
        **{name + end: round(100 * getattr(rate, part), 1) for name, rate in shown.items()
           for end, part in (("", "estimate"), ("_low", "low"), ("_high", "high"))},
        "all_pass_before": round(100 * sum(whole[0]) / len(whole[0]), 1),
        "all_pass_after": round(100 * sum(whole[1]) / len(whole[1]), 1), "command": runs[0].command,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
