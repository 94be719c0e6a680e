"""What the harness itself costs a turn, as episodes grow: scripted turns, no model, real files and a real event log.

    python bench/harness_overhead.py --output bench/rows/harness_overhead.csv
    python bench/harness_overhead.py --shape qwen3-0.6b      # and its share of such a model's turn: a minute

A script reads one document a turn and writes a memo every four. The seconds of a turn are everything but the script:
rendering, tokenising, tools, rules, boundaries, hashing and the log's writes. CPU seconds are of this process, so that
other work on the machine does not count; wall seconds do count it, and the disk's. A model's turn is what a random one
takes to read the document and to sample the call, token by token.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from statistics import median

from shapes import SHAPES, random_model
from transformers import AutoTokenizer

from still.eval.tasks import load_task
from still.harness.agent import Episode
from still.harness.backends import make
from still.harness.documents import Documents
from still.harness.policies.scripted import ScriptedPolicy
from still.harness.run_config import RunConfig
from still.harness.runs import RunFolder
from still.harness.tools import Workspace
from still.harness.types import MEMO, Message, ToolCall
from still.models import find
from still.provenance import provenance

WORDS = "the lease of the party named above ends on the date that the schedule fixes for it"


class Script:
    """Reads the documents in turn, and writes memos and one deliverable."""

    def __init__(self, count: int):
        self.count, self.read, self.wrote = count, 0, False

    def __call__(self, seen: list[Message], limit) -> Message:
        if f"write {MEMO}" in seen[-1].content[-200:]:
            return _call("write", f'{{"path": "{MEMO}", "content": "{WORDS}, {self.read} read"}}')
        if self.read < self.count:
            self.read += 1
            return _call("read", f'{{"path": "documents/{self.read - 1:04d}.txt"}}')
        if not self.wrote:
            self.wrote = True
            return _call("write", f'{{"path": "output/memo.md", "content": "{WORDS}"}}')
        return Message("assistant", "Done.")


def _call(name: str, arguments: str) -> Message:
    return Message("assistant", "", (ToolCall(name, arguments),))


def seconds_of_turns(root: Path, count: int, backend: str, tokenizer, words: int) -> tuple[list[float], list[float]]:
    """CPU and wall seconds of each turn of an episode over `count` documents."""
    folder = root / "tasks" / "matter"
    (folder / "documents").mkdir(parents=True)
    for number in range(count):
        text = " ".join([f"{number}", *(WORDS.split() * (1 + words // 17))[:words]])
        (folder / "documents" / f"{number:04d}.txt").write_text(text)
    (folder / "task.json").write_text(
        '{"title": "t", "instructions": "Report.", "criteria": [{"id": "C-001", "title": "t", "match_criteria": "m"}],'
        '"deliverables": {"memo.md": "memo.md"}}'
    )
    config = RunConfig(backend=backend, budget=None if backend == "full" else "512t", window=1 << 20, reserve=1024,
                       max_turns=1 << 20, max_windows=1 << 20, tools=("read", "write"), sandbox="none")  # fmt: skip
    policy = ScriptedPolicy(tokenizer, lambda: Script(count), config.window)
    run = RunFolder(root / "run")
    documents = Documents.load(load_task(folder).agent_view(), cache=root / "cache", workers=1)
    workspace = Workspace(run.workspace, documents)
    episode = Episode(workspace, policy, make(config, policy), config, run)
    steps, cpu, wall, answer = episode.play(), [], [], None
    while True:
        started, clock = time.process_time(), time.perf_counter()
        try:
            request = steps.send(answer)
        except StopIteration:
            return cpu, wall
        cpu.append(time.process_time() - started)
        wall.append(time.perf_counter() - clock)
        answer = request.session.sample(request.limit)


def seconds_of_model(shape: str, read: int, sampled: int) -> float:
    """CPU seconds over the threads used: a forward over `read` tokens, then one for each of `sampled` tokens."""
    import torch
    from transformers import DynamicCache

    model = random_model(shape)
    ids = torch.randint(3, model.config.vocab_size, (1, read), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    started = time.process_time()
    with torch.no_grad():
        for _ in range(sampled + 1):
            ids = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    return (time.process_time() - started) / torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", default="16,64,256", help="episodes of so many documents")
    parser.add_argument("--words", type=int, default=600, help="in each document")
    parser.add_argument("--shape", choices=SHAPES, help="measure a model of this shape beside it")
    parser.add_argument("--output", type=Path, default=Path("bench/rows/harness_overhead.csv"))
    args = parser.parse_args()
    tokenizer, record = AutoTokenizer.from_pretrained(find("pocket").path), provenance()
    git = record["git"] or {"commit": "", "dirty": False}
    text = " ".join((WORDS.split() * (1 + args.words // 17))[: args.words])
    call = '<|call|>read {"path": "documents/0000.txt"}'
    read, sampled = (len(tokenizer(written)["input_ids"]) for written in (text, call))
    model_ms = 1e3 * seconds_of_model(args.shape, read, sampled) if args.shape else 0.0
    rows = []
    for backend in ("memo", "none", "full"):
        for count in map(int, args.documents.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                cpu, wall = seconds_of_turns(Path(folder), count, backend, tokenizer, args.words)
            cpu, wall = cpu[1:], wall[1:]  # the first opens the run
            mean = 1e3 * sum(cpu) / len(cpu)
            fifth = max(1, len(cpu) // 5)
            rows.append({
                "backend": backend, "documents": count, "words": args.words, "turns": len(cpu),
                "cpu_ms_median": 1e3 * median(cpu), "cpu_ms_mean": mean,
                "cpu_ms_first_fifth": 1e3 * sum(cpu[:fifth]) / fifth,
                "cpu_ms_last_fifth": 1e3 * sum(cpu[-fifth:]) / fifth,
                "wall_ms_median": 1e3 * median(wall), "model": args.shape or "", "model_ms": model_ms,
                "share_percent": 100 * mean / (mean + model_ms) if args.shape else "",
                "device": record["device"]["name"],
                "commit": git["commit"][:12] + "-dirty" * git["dirty"], "python": record["versions"]["python"],
            })  # fmt: skip
            rows[-1] = {name: round(v, 3) if isinstance(v, float) else v for name, v in rows[-1].items()}
            print(rows[-1], flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
