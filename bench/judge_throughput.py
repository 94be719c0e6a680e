"""How fast is the grader itself? Against a server on this machine that answers at once, in a process of its own.

    python bench/judge_throughput.py            # about a minute

Rounds of the bare openai client and of the grader alternate, with the same chats at the same concurrency, so the load
of the machine falls on both alike; the median of the rounds counts. Bars: fresh calls at 70 % or more of the bare
client's rate, with 8 criteria a call 1,000 verdicts a second, 5,000 cached verdicts a second, memory flat.
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
from pathlib import Path
from statistics import median

from still.eval.grade import GradeConfig, Grader
from still.eval.judges import find_judge
from still.eval.prompting import Section, load_prompt, messages
from still.eval.tasks import Criterion, LabTask
from still.eval.verdict_store import VerdictStore
from still.provenance import provenance

MEMO = "The memo says what each clause is about and who bears its cost.\n" * 40
PER_TASK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=384, help="in a round (default: 384)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--concurrency", type=int, default=8, help="calls in flight (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("bench/rows/judge_throughput.csv"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
        return
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        rows = [asyncio.run(measure(args, url, per_call)) for per_call in (1, 8)]
    finally:
        server.terminate()
    made = provenance({key: value for key, value in vars(args).items() if isinstance(value, int)})
    del made["command"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "made"])
        writer.writeheader()
        writer.writerows({**row, "made": json.dumps(made)} for row in rows)
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in row.items()
            )
        )


async def measure(args: argparse.Namespace, url: str, per_call: int) -> dict:
    """Rates of one size of call."""
    import openai

    bare, fresh, cached, memory = [], [], [], []
    client = openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0)
    judge = find_judge(f"m@{url}")
    tasks_a_round = max(1, args.calls * per_call // PER_TASK)
    store = VerdictStore(Path(os.environ.get("TMPDIR", "/tmp")) / f"throughput-{os.getpid()}.sqlite")
    config = GradeConfig(criteria_per_call=per_call, prime=False)
    # Both get the same number of calls in flight: the lane neither widens nor narrows.
    async with Grader(judge, config, store=store) as grader:
        lane = grader.askers["m"].lane
        lane.most = lane.width = args.concurrency
        for number in range(args.rounds + 1):  # the first warms up
            tasks = [rubric(f"{number}-{index}", per_call) for index in range(tasks_a_round)]
            rate = await bare_round(client, tasks, per_call, args.concurrency)
            times = []
            for _ in range(2):
                clock = time.perf_counter()
                gradings = await grader.grade_all([(task, {"memo.md": MEMO}, None) for task in tasks])
                times.append(time.perf_counter() - clock)
            if any(each.n_unscored for each in gradings):
                sys.exit(f"unscored verdicts: {gradings[0].judging}")
            verdicts = tasks_a_round * PER_TASK
            if number:
                bare.append(rate)
                fresh.append(verdicts / per_call / times[0])
                cached.append(verdicts / times[1])
            memory.append(resident())
    await client.close()
    store.close()
    for file in Path(store.path).parent.glob(f"{Path(store.path).name}*"):
        file.unlink()
    return {
        "per_call": per_call,
        "bare_calls_per_s": round(median(bare)),
        "fresh_calls_per_s": round(median(fresh)),
        "share_of_bare": round(median(ours / theirs for ours, theirs in zip(fresh, bare, strict=True)), 3),
        "fresh_verdicts_per_s": round(median(fresh) * per_call),
        "cached_verdicts_per_s": round(median(cached)),
        "verdicts": args.rounds * tasks_a_round * PER_TASK,
        "memory_after_first_round_mib": round(memory[0], 1),
        "memory_half_way_mib": round(memory[len(memory) // 2], 1),
        "memory_at_end_mib": round(memory[-1], 1),
    }


async def bare_round(client, tasks: list[LabTask], per_call: int, concurrency: int) -> float:
    """Calls a second of the client alone, with the chats and the schema that the grader sends."""
    prompt = load_prompt("plain")
    named = {"name": "verdicts", "strict": True, "schema": prompt.schema}
    shape = {"type": "json_schema", "json_schema": named}
    chats = []
    for task in tasks:
        system, shared = prompt.shared(task.title, "", [Section("memo.md", MEMO)])
        parts = [task.criteria[at : at + per_call] for at in range(0, PER_TASK, per_call)]
        chats += [messages(system, shared, prompt.question(part)) for part in parts]
    waiting = iter(chats)

    async def work() -> None:
        for chat in waiting:
            await client.chat.completions.create(model="m", messages=chat, temperature=0.0, response_format=shape)

    clock = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return len(chats) / (time.perf_counter() - clock)


def rubric(name: str, per_call: int) -> LabTask:
    criteria = tuple(
        Criterion(f"C-{n:03d}", f"Clause {n} of {name}, {per_call}", f"PASS if clause {n} is explained. FAIL if not.")
        for n in range(PER_TASK)
    )
    return LabTask(f"bench/{name}", Path(), "practice", "Memo on the clauses", "Write a memo.", criteria)


def resident() -> float:
    """MiB that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def serve() -> None:
    """Answer every chat with verdicts on the criteria that it asks about."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            size = 0
            while (line := await reader.readline()).strip():
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split(b":")[1])
            asked = (await reader.readexactly(size)).rpartition(b"# Criteria")[2]
            ids = [name.decode() for name in re.findall(rb"## (C-\d+)\\n", asked)]
            said = [{"id": each, "evidence": [], "reason": "It says so.", "verdict": "pass"} for each in ids]
            message = {"role": "assistant", "content": json.dumps({"verdicts": said})}
            usage = {"prompt_tokens": 900, "completion_tokens": 30, "total_tokens": 930}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            done = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
            body = json.dumps({**done, "choices": [choice], "usage": usage}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
            writer.write(body)
            await writer.drain()
            del head

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    main()
