"""How an agent works, apart from whether it succeeds: what a training run plots beside its reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..runs import metrics

NAMES = ("grep_share", "documents_read", "characters_read", "memo_tokens", "reread_rate", "turns", "windows", "errors")
CUT = ("max_turns", "max_windows", "overflow")
"""Why a run stopped that was too long."""


def behaviour(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One run's behaviour.

    Returns:
        grep_share: greps among the tool calls; documents_read: share of them; characters_read: share of the matter;
        memo_tokens: mean of the artifacts; reread_rate: characters read again for each read; turns; windows; errors:
        share of the tool calls.
    """
    found = metrics(list(events))
    ours = found["still"]
    tools = [event for event in events if event["event"] == "tool"]
    held = [event["artifact"]["tokens"] for event in events if event["event"] == "compact"]
    read = ours["characters_read"]
    return {
        "grep_share": sum(tool["name"] == "grep" for tool in tools) / max(1, len(tools)),
        "documents_read": found["documents_read"] / max(1, found["total_documents"]),
        "characters_read": read / max(1, ours["characters_available"]),
        "memo_tokens": fmean(held) if held else 0.0,
        "reread_rate": ours["characters_read_again"] / max(1, read),
        "turns": float(found["turn_count"]),
        "windows": float(ours["windows"]),
        "errors": ours["tool_errors"] / max(1, len(tools)),
    }


def mean_behaviour(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """The mean over runs."""
    each = [behaviour(events) for events in runs]
    return {name: fmean(one[name] for one in each) for name in NAMES} if each else {}


def was_cut(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a limit on length stopped the run, or its last turn."""
    turns = [event for event in events if event["event"] == "turn"]
    return events[-1].get("stop") in CUT or bool(turns and turns[-1]["finish"] == "length")
