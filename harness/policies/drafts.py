"""What a turn may go on with, copied from where text went on from the same tokens before.

Agents copy: what they read (*prompt lookup*: a draft model for which nothing is computed), and still more what they and
other episodes of theirs wrote, since calls and deliverables have one form and rollouts of a group one task
(SuffixDecoding: Oliaro et al., arXiv 2411.04975). A wrong draft costs a forward some rows and changes no token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

DRAFT = 6
"""Tokens of a draft at most. Six hold in three drafts of ten of what `pocket-agent` writes; eight save little more."""
ALIKE = 5
"""Tokens that are looked for where they stood before; where they never did, fewer are."""
KEPT = 2**16
"""Places of what was written that are kept at least; twice as many at most, of about a quarter of a KiB."""

Place = tuple[Sequence[int], int]
"""A text, and where in it."""


class Written:
    """Where what a policy wrote went on, in all its episodes: the latest place by the tokens before it."""

    def __init__(self):
        self._latest: dict[tuple[int, ...], Place] = {}
        self._earlier: dict[tuple[int, ...], Place] = {}

    def put(self, before: tuple[int, ...], place: Place) -> None:
        """The text goes on at this place behind these tokens."""
        if len(self._latest) >= KEPT:
            self._earlier, self._latest = self._latest, {}
        self._latest[before] = place

    def get(self, before: tuple[int, ...]) -> Place | None:
        """Where text went on behind these tokens the last time."""
        return self._latest.get(before) or self._earlier.get(before)


class Drafts:
    """Drafts for one turn.

    Args:
        read: its prompt.
        written: what its policy wrote, to which the turn's own tokens are added as they come.
    """

    def __init__(self, read: Iterable[int], written: Written):
        self._text, self._output, self._written = list(read), [], written
        self._read: dict[tuple[int, ...], int] = {}
        for size in range(1, ALIKE + 1):
            before = zip(*(self._text[start:] for start in range(size)), strict=False)
            self._read.update(zip(before, range(size, len(self._text)), strict=False))

    def add(self, token: int) -> None:
        """One more token of the turn."""
        for before in self._endings():
            self._written.put(before, (self._output, len(self._output)))
        self._output.append(token)
        self._text.append(token)

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that may follow; none where the last one is new."""
        for before in self._endings():
            place = self._written.get(before)
            if place is None and before in self._read:
                place = self._text, self._read[before]
            if place is not None:
                text, start = place
                return list(text[start : start + max(0, most)])
        return []

    def _endings(self) -> list[tuple[int, ...]]:
        """The last tokens, from many to one."""
        last = tuple(self._text[-ALIKE:])
        return [last[start:] for start in range(len(last))]
