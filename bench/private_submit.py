"""Does a private note raise the yield of a teacher's rollouts? Against as many plain resamples, with intervals.

    still pocket agent --output runs/told --start-from pocket-agent --slips 0.5 --steps 150     # it can use one
    python bench/private_submit.py --model runs/told/base -o runs/private

The model plays training assignments of known wording, without the rubric: once with one private bit whenever it stops
short (`--private submit`), once without (`--private none`); seeds, tasks and the number of rollouts are the same.
A rollout counts when it passes every criterion in two gradings and the leak gate. Finished rollouts are not played
again. Prints a line for each condition and adds them to bench/rows/private_submit.csv.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import torch
from pocket_training import GAME, still
from shapes import ROWS, append_csv

from still import models
from still.eval.judges import find_judge
from still.eval.reward import RubricReward
from still.eval.stats import clustered_rate, paired_difference
from still.eval.tasks import find_tasks, load_task
from still.harness.policies.local import LocalPolicy
from still.harness.run_config import RunConfig
from still.harness.runs import read_run
from still.harness.trainers.collect import Attempt
from still.harness.trainers.config import IsftConfig, TrainSettings
from still.harness.trainers.isft import prepare
from still.provenance import provenance

CONDITIONS = ("none", "submit")
ENDS = {"": "estimate", "_low": "low", "_high": "high"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-agent", help="teacher and student (default: pocket-agent)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the rollouts")
    parser.add_argument("--backend", choices=("kv", "memo"), default="kv", help="(default: kv)")
    parser.add_argument("--count", type=int, default=100, help="tasks (default: 100)")
    parser.add_argument("--parties", type=int, default=20, help="of a task, over 8 documents (default: 20)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling (default: 1)")
    parser.add_argument("--rollouts", type=int, default=1, help="of each task (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = f"--family assignments --criteria {args.parties} --documents 8 --split train --seeds 0:{args.count}"
    made = ["matters", "generate", *shlex.split(size)]
    if still([*made, "-o", str(args.output / "tasks")], args.output / "tasks.log"):
        raise SystemExit(f"no tasks could be made: see {args.output / 'tasks.log'}")
    tasks = [load_task(folder) for folder in find_tasks(args.output / "tasks" / "tasks")]
    loaded = models.load(args.model, device="cpu", dtype="float32")
    window = int(GAME.split("--window ")[1].split()[0])
    shape = {"ratio": 16.0} if args.backend == "kv" else {"budget": "128t"}
    run = RunConfig(
        backend=args.backend, window=window, reads=1, reads_force=2, max_new_tokens=1024, max_turns=60,
        tools=("read", "write"), sandbox="none", **shape,
    )  # fmt: skip
    graders = [RubricReward(find_judge("exact")).grade for _ in range(2)]
    found: dict[str, list[Attempt]] = {}
    clean: dict[str, set[str]] = {}
    for condition in CONDITIONS:
        config = IsftConfig(
            rollouts=args.rollouts, keep_per_task=args.rollouts, private=condition, private_rounds=1, rubric=False,
            temperature=args.temperature, evaluate_on=(),
        )
        folder = args.output / condition
        (folder / "selection.json").unlink(missing_ok=True)  # of fewer tasks
        prepare(LocalPolicy(loaded), tasks, loaded.tokenizer, run, config, TrainSettings(), graders, folder, 1)
        places = [folder / "collect" / task.id / f"attempt-{n}" for task in tasks for n in range(args.rollouts)]
        found[condition] = [Attempt(**json.loads((place / "attempt.json").read_text())) for place in places]
        leaky = set(json.loads((folder / "leaks.json").read_text())["leaks"])
        clean[condition] = {each.folder for each in found[condition] if each.kept} - leaky
    write(args, found, clean)


def write(args: argparse.Namespace, found: dict[str, list[Attempt]], clean: dict[str, set[str]]) -> None:
    """A line for each condition, on the terminal and in the rows."""
    kept = {name: [float(each.folder in clean[name]) for each in attempts] for name, attempts in found.items()}
    clusters = [each.task for each in found["none"]]
    made_by = provenance(vars(args), 0, "cpu", model=args.model)
    rows = []
    for name, attempts in found.items():
        rate = clustered_rate(kept[name], clusters)
        gain = paired_difference(kept[name], kept["none"], clusters).interval if name != "none" else None
        sampled = sum(len(e["output_ids"]) for each in attempts for e in read_run(each.folder) if e["event"] == "turn")
        told = [each for each in attempts if each.corrections]
        rows.append({
            "condition": name, "backend": args.backend, "parties": args.parties, "temperature": args.temperature,
            "tasks": len(set(clusters)), "rollouts": len(attempts),
            "told": len(told), "repaired": sum(each.folder in clean[name] for each in told),
            "leaked": sum(each.kept for each in attempts) - len(clean[name]), "kept": len(clean[name]),
            **{f"yield{end}": round(100 * getattr(rate, part), 1) for end, part in ENDS.items()},
            **{f"gain{end}": round(100 * getattr(gain, part), 1) if gain else "" for end, part in ENDS.items()},
            "public_tokens": sampled, "model": args.model, "device": made_by["device"]["name"],
            "commit": (made_by["git"] or {}).get("commit", "")[:12],
        })  # fmt: skip
        said = f", gain {gain.estimate:+.1%} ({gain.low:.1%} to {gain.high:.1%})" if gain else ""
        print(f"{name:8} {rows[-1]['kept']} of {len(attempts)} kept, {rate.estimate:.1%} [{rate.low:.1%}, "
              f"{rate.high:.1%}]{said}; {rows[-1]['repaired']} of {len(told)} that were told, "
              f"{rows[-1]['leaked']} leaked")  # fmt: skip
    append_csv(ROWS / "private_submit.csv", rows)


if __name__ == "__main__":
    main()
