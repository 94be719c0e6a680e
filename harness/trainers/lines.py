"""Which lines of what a policy wrote speak of which criterion, token by token: where `credit=lines` puts its advantage.

A memo or a deliverable is a list of statements, and what a criterion hangs on is the statement that names its party. A
trajectory's advantage on all of its tokens tells a wrong line from the right ones beside it only over many rollouts;
the criterion's own advantage on the lines that name it does so at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...eval.judge import names, sentences
from ..windows import IGNORE, WindowRow

ESCAPES = re.compile(r"\\[nrt]")
"""Line breaks and tabs inside the JSON of a tool call."""

Decode = Callable[[list[int]], str]


def anchors(task: Any) -> dict[str, str]:
    """What a line must name to speak of a criterion, by its id: its party, or the value that must be absent."""
    found = {}
    for criterion in task.criteria:
        expect = criterion.expect or {}
        name = expect.get("value") if expect.get("absent") else expect.get("party")
        if name:
            found[criterion.id] = name
    return found


def spoken_of(ids: Sequence[int], decode: Decode, named: Mapping[str, str]) -> list[frozenset[str]]:
    """The criteria that the line of each token speaks of.

    Args:
        ids: of one turn, as it was sampled.
        decode: token ids to text.
        named: see `anchors`.

    Returns:
        One set for each token; empty outside such lines. Lines are sentences, as the exact judge reads them.
    """
    starts, text = [], ""
    for place, token in enumerate(ids):
        starts.append(len(text))
        before = [ids[place - 1]] if place else []  # some tokenizers drop the space of a first token
        text += decode([*before, token])[len(decode(before)) if before else 0 :]
    text = ESCAPES.sub("\n\n", text)  # of the same length
    found: list[frozenset[str]] = [frozenset()] * len(ids)
    for start, end in sentences(text):
        about = frozenset(id_ for id_, name in named.items() if names(text[start:end], name))
        if about:
            for place, first in enumerate(starts):
                if start <= first < end:
                    found[place] = about
    return found


def line_advantages(
    row: WindowRow, decode: Decode, named: Mapping[str, str], own: Mapping[str, float], plain: float, share: float
) -> list[float]:
    """The advantage of each trained token of a row.

    Args:
        row: of a trajectory.
        decode: token ids to text.
        named: see `anchors`.
        own: advantage of each scored criterion (`credit.criterion_advantages`).
        plain: of the trajectory, for tokens outside all lines, and for its share inside them.
        share: of the criterion's own inside its lines; the mean where a line speaks of several.
    """
    scored = {id_: name for id_, name in named.items() if id_ in own}
    found = [plain] * len(row.input_ids)
    for span in row.spans:
        start = span["start"]
        for place, about in enumerate(spoken_of(row.input_ids[start : span["end"]], decode, scored), start):
            if about:
                found[place] = (1 - share) * plain + share * sum(own[id_] for id_ in about) / len(about)
    return [value for value, label in zip(found, row.labels, strict=True) if label != IGNORE]
