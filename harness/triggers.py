"""When to compact: a pure function of what the window holds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .run_config import RunConfig


@dataclass(frozen=True)
class WindowStats:
    """What the policy for compaction looks at.

    Attributes:
        reads: documents read, in full or in part, since the last boundary.
        unread: documents that are still to read.
        tokens: of the window, everything included.
        next_document: tokens of the next unread document, or of the part of it that fits an empty window.
        reserve: tokens kept free for a memo or a draft.
        window: tokens that fit.
        progress: a document was read or a file written since the last boundary.
    """

    reads: int
    unread: int
    tokens: int
    next_document: int
    reserve: int
    window: int
    progress: bool


@dataclass(frozen=True)
class Decision:
    """Attributes: `level` is "no", "suggest" or "force"; `trigger` is "reads" or "tokens", empty at "no"."""

    level: Literal["no", "suggest", "force"] = "no"
    trigger: str = ""

    def __bool__(self) -> bool:
        return self.level != "no"


@dataclass(frozen=True)
class Thresholds:
    """Documents since the last boundary that suggest and that force a compaction."""

    suggest: int
    force: int

    @classmethod
    def of(cls, config: RunConfig, task: str) -> Thresholds:
        """The config's, widened by a draw that depends on the task alone, so that a group of rollouts shares it."""
        extra = random.Random(f"thresholds {task}").randint(0, config.jitter) if config.jitter else 0
        return cls(config.reads + extra, config.reads_force + extra)


def decide(stats: WindowStats, thresholds: Thresholds) -> Decision:
    """Whether a compaction is due. Nothing is due without progress since the last one.

    The count of documents asks for one only while there are more to read: after the last, the window may be drafted
    from as it is.
    """
    if not stats.progress:
        return Decision()
    if stats.tokens + stats.next_document + stats.reserve > stats.window:
        return Decision("force", "tokens")
    if stats.unread and stats.reads >= thresholds.force:
        return Decision("force", "reads")
    if stats.unread and stats.reads >= thresholds.suggest:
        return Decision("suggest", "reads")
    return Decision()


def boundaries_ahead(documents: Sequence[int], room: int, thresholds: Thresholds) -> int:
    """Boundaries to come, the present one included, if the rest is read in order.

    Args:
        documents: tokens of each unread document.
        room: tokens of documents that fit into a window.
        thresholds: of the run.
    """
    ahead, reads, used = 1, 0, 0
    for tokens in documents:
        while tokens > room:  # it is read in parts, a window each
            ahead, reads, used, tokens = ahead + 1, 0, 0, tokens - room
        if used + tokens > room or reads >= thresholds.suggest:
            ahead, reads, used = ahead + 1, 0, 0
        reads, used = reads + 1, used + tokens
    return ahead
