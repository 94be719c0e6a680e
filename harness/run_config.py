"""What decides a run of the agent, apart from the model: every field is a flag of `still run`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

BackendName = Literal["full", "plain", "none", "trim", "memo", "memo_oracle", "memo_kv", "kv", "hybrid"]
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run.

    Attributes:
        backend: what crosses a boundary: full (everything, until it overflows), plain (LAB's own loop, no rules),
            none (nothing), trim (the last tokens), memo, memo_kv, kv, hybrid; memo_oracle (an upper bound: a memo that
            the harness writes from the rubric).
        method: how slots are made, for kv and hybrid: still, still-uneven (with the split that the compactor carries),
            or any other method of still.methods.
        budget: peak of attended compacted context: bytes (65536, 64KiB, 1.5MiB), or tokens' worth of them (512t).
        ratio: tokens per slot of each window, for kv and hybrid, instead of a budget.
        mode: append (each window adds slots) or recompact (one size, again and again).
        memo_share: share of a hybrid's budget that its memo may take.
        window: tokens of context to use; the model's own limit unless given.
        reserve: tokens kept free for a memo or a draft; a quarter of the window, at most 16384, unless given.
        reads: documents since the last boundary that make a compaction due.
        reads_force: documents that make it due at once; a further read is refused until the memo is written.
        jitter: widen both thresholds by up to this many documents, drawn for each task.
        max_turns: assistant's turns in a run.
        max_windows: windows in a run.
        max_new_tokens: longest turn.
        attempts: how often a memo is sampled before it counts as failed.
        on_failure: when no memo could be had: degrade (go on with the memo before, flagged) or fail (stop).
        temperature: 0 is greedy.
        retry_temperature: least temperature of a second attempt.
        review: answer the agent's first stop, good or bad, with one neutral note to check its work again.
        seed: of the sampling.
        tools: which of bash, read, write, edit, glob and grep the agent is given.
        sandbox: what bash runs in: auto (bubblewrap where it works, else there is no bash), bwrap (it must work), none.
    """

    backend: BackendName = "kv"
    method: str = "still"
    budget: str | None = None
    ratio: float | None = None
    mode: Literal["append", "recompact"] = "append"
    memo_share: float = 0.5
    window: int | None = None
    reserve: int | None = None
    reads: int = 4
    reads_force: int = 6
    jitter: int = 0
    max_turns: int = 200
    max_windows: int = 32
    max_new_tokens: int = 2048
    attempts: int = 3
    on_failure: Literal["degrade", "fail"] = "degrade"
    temperature: float = 0.0
    retry_temperature: float = 0.7
    review: bool = False
    seed: int = 0
    tools: tuple[str, ...] = ("read", "write", "edit", "glob", "grep", "bash")
    sandbox: Literal["auto", "bwrap", "none"] = "auto"

    def __post_init__(self) -> None:
        for name in ("reads", "max_turns", "max_windows", "max_new_tokens", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.reads_force < self.reads:
            raise ValueError(f"reads_force is {self.reads_force}, less than reads, {self.reads}")
        if not 0 < self.memo_share < 1:
            raise ValueError(f"memo_share is {self.memo_share}; it must lie between 0 and 1")
        if self.budget is not None and self.ratio is not None:
            raise ValueError(f"give one of budget (got {self.budget}) and ratio (got {self.ratio})")
        if self.ratio is not None and (self.ratio < 1 or self.backend not in ("kv", "hybrid")):
            raise ValueError(f"ratio is {self.ratio} for {self.backend}: 1 or more, and for kv and hybrid only")
        if self.budget is not None:
            budget_bytes(self.budget, 1)
        if unknown := [name for name in self.tools if name not in RunConfig.tools]:
            raise ValueError(f"tools has {', '.join(map(repr, unknown))}; the tools are {', '.join(RunConfig.tools)}")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")


def budget_bytes(text: str, bytes_per_token: int | None) -> int:
    """The bytes that a budget names.

    Args:
        text: `65536`, `64KiB`, `1.5MiB`, or `512t`, as many bytes as that many raw tokens take.
        bytes_per_token: of the model's KV cache; None where it is not known.

    Raises:
        ValueError: it is no budget, or of tokens whose bytes are not known.
    """
    tokens = re.fullmatch(r"(\d+)t", text)
    if tokens:
        return int(tokens[1]) * (bytes_per_token or 1)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]ib|b?)", text.lower())
    if not size:
        raise ValueError(f"budget is {text!r}; write bytes (65536, 64KiB, 1.5MiB) or tokens' worth of them (512t)")
    if bytes_per_token is None:
        raise ValueError(f"budget is {text!r}, but this policy's bytes a token are not known; give tokens, as in 512t")
    return int(float(size[1]) * _UNITS[size[2]])
