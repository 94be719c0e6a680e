"""The command `run`: an agent on task folders. Loading this module loads no torch."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from ..eval.commands import parse_seeds
from ..flags import add_flags, add_pass_through, from_flags
from .cells import OURS, UNEVEN
from .run_config import RunConfig
from .sandbox import sandbox_of

SERVED = "server:"


@dataclass(frozen=True)
class PolicyConfig:
    """Which model plays, and where it is.

    Attributes:
        policy: `pocket`, a folder or a Hub id, run here; or server:NAME, a model of an OpenAI-compatible server.
        device: cpu, cuda, cuda:1; a GPU if there is one, unless given.
        dtype: such as bfloat16; as the weights were saved, unless given.
        compactor: for the method still: folder, Hub id, or the name of the model that it comes with; the policy's own
            unless given.
        base_url: of the server; OpenAI's own unless given.
        tokenizer: of a served model, folder or Hub id: prompts then go as token ids, and ids come back.
        api_key_env: environment variable that holds the server's key.
        served_window: tokens of context that the served model takes.
        bytes_per_token: of the served model's KV cache, to set budgets in bytes.
        limit_name: what the server calls its limit on new tokens.
    """

    policy: str = "pocket"
    device: str | None = None
    dtype: str = "auto"
    compactor: str | None = None
    base_url: str | None = None
    tokenizer: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    served_window: int = 131_072
    bytes_per_token: int | None = None
    limit_name: str = "max_completion_tokens"

    def load(self, config: RunConfig, options: dict):
        """The policy, and the method for backends that have one.

        Raises:
            ValueError: they do not go together.
        """
        if self.policy.startswith(SERVED):
            return self._served(), None
        from transformers.utils import logging

        from .. import methods, models
        from .policies.local import LocalPolicy

        logging.disable_progress_bar()
        method, attention = None, None
        slots, ours = config.backend in ("kv", "hybrid"), config.method in OURS
        known = sorted({*OURS, *methods.NAMES})
        if slots and config.method not in known:
            raise ValueError(f"there is no method {config.method!r}; choose from {', '.join(known)}")
        if slots and not ours:
            method = methods.get(config.method, **options)
            attention = "still" if method.needs_still_attention else None
        loaded = models.load(self.policy, self.device, self.dtype, attention)
        policy = LocalPolicy(loaded, config.window)
        if slots and ours:
            if options:
                raise ValueError(f"the method {config.method} takes no --option.{sorted(options)[0]}")
            method = self._still(loaded, uneven=config.method.endswith(UNEVEN))
        return policy, method

    def _still(self, loaded, uneven: bool):
        from .. import methods
        from ..compactor import StillCompactor

        where = self.compactor or (loaded.compactors[0] if loaded.compactors else None)
        if where is None:
            raise ValueError(f"{loaded.name} comes with no compactor: give one with --compactor, or another --method")
        compactor = StillCompactor.from_pretrained(where, model=loaded.model).eval().requires_grad_(False)
        compactor = compactor.with_split() if uneven else compactor
        if compactor.config.beta or uneven:
            loaded.model.set_attn_implementation(_own_attention())
        return methods.get("still", compactor=compactor, label=Path(where).name)

    def _served(self):
        from .policies.server import ServerConfig, ServerPolicy

        config = ServerConfig(
            self.policy.removeprefix(SERVED), self.base_url, self.api_key_env, self.served_window,
            self.bytes_per_token, limit_name=self.limit_name,
        )  # fmt: skip
        if self.tokenizer is None:
            return ServerPolicy(config)
        from transformers import AutoTokenizer

        from .policies.token_server import TokenServerPolicy

        return TokenServerPolicy(config, AutoTokenizer.from_pretrained(self.tokenizer))


def _own_attention() -> str:
    from ..attention import NAME, register

    register()
    return NAME


class Run:
    """`still run`: an agent reads matters, is compacted as it reads, and writes what they ask for."""

    help = "Let an agent work through LAB tasks, compacted as it reads by a memo, by slots, or by both."
    description = """\
Play every task below TASKS: read its documents one a turn, compact at each boundary as --backend says, and write the
deliverables. Each run is a folder that LAB's own tools and `still grade` read, with an event log beside.
A run that was stopped, even killed, goes on where it was when the same command runs again."""
    examples = """\
examples:
  still matters generate --family assignments --seeds 0:4 -o lab
  still run lab/tasks --policy pocket-agent --backend memo --budget 256t --tools read,write -o runs/memo
  still run lab/tasks --policy pocket-agent --backend kv --ratio 8 --tools read,write -o runs/still-8x
  still run lab/tasks --policy Qwen/Qwen3-0.6B --backend kv --method snapkv --budget 64MiB -o runs/snapkv
  still run lab/tasks --policy server:gpt-5.5 --backend memo --budget 2000t --together 8 -o runs/gpt
  still run lab/tasks --policy server:pocket --base-url http://localhost:8000/v1 --tokenizer ./pocket -o runs/vllm

A budget is the peak of attended compacted context: bytes (64MiB), or as many as N raw tokens take (2000t)."""
    resume = "whole turns are kept; run the same command again to go on"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments: one flag a field of `RunConfig` and `PolicyConfig`."""
        parser.add_argument("tasks", metavar="TASKS", nargs="+", type=Path, help="folders of tasks, or that hold many")
        parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="folder of the runs")
        parser.add_argument(
            "--seeds", metavar="A,B", type=parse_seeds, default="0", help="of the sampling: 0,3, or 0:4 (default: 0)"
        )
        parser.add_argument(
            "--together", metavar="N", type=int, default=1,
            help="runs at a time: in one batch, or in parallel on a server (default: 1)",
        )  # fmt: skip
        add_flags(parser, PolicyConfig)
        add_flags(parser, RunConfig, skip=("seed",))
        add_pass_through(parser, "option")
        parser.set_defaults(option={})

    def run(self, args: argparse.Namespace) -> int:
        """Play, and print a line for each run. Exit code 1 if any failed."""
        from ..eval.tasks import find_tasks, load_task
        from .play import play_tasks, table

        config, model = from_flags(args, RunConfig, seed=0), from_flags(args, PolicyConfig)
        found = {folder.resolve(): folder for path in args.tasks for folder in find_tasks(path)}
        folders = list(found.values())
        if not folders:
            raise ValueError(f"there is no task.json below {', '.join(map(str, args.tasks))}; name LAB task folders")
        tasks = [load_task(folder) for folder in folders]
        if args.together < 1:
            raise ValueError(f"--together is {args.together}; it must be 1 or more")
        seeds = list(dict.fromkeys(args.seeds))
        sandbox, off = sandbox_of(config)
        if off:
            print(f"bash is off: {off}", file=sys.stderr)
        policy, method = model.load(config, args.option)
        outcomes = play_tasks(
            tasks, policy, config, args.output, seeds=seeds, method=method, sandbox=sandbox, together=args.together,
            report=lambda outcome: print(*table([outcome]), flush=True),
        )  # fmt: skip
        return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0
