"""Backends for any policy: everything, nothing, the last tokens, or the memo."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ..run_config import RunConfig, budget_bytes
from ..types import Artifact, Boundary, Message, Policy, Session

DEFAULT_TOKENS = 1024
"""Tokens' worth of budget where none is given."""


class TextBackend:
    """A boundary that begins the next window afresh, with text in its bridge."""

    needs: ClassVar[frozenset[str]] = frozenset()
    compacts: ClassVar[bool] = True
    writes_memo: ClassVar[bool] = False

    def __init__(self, config: RunConfig, policy: Policy):
        self.name, self.bytes_per_token = config.backend, policy.bytes_per_token
        known = budget_bytes(config.budget or f"{DEFAULT_TOKENS}t", policy.bytes_per_token)
        self.tokens = known // (policy.bytes_per_token or 1)
        if self.compacts and self.tokens < 1:
            raise ValueError(f"a budget of {config.budget} is less than one token of {policy.name}")

    @property
    def memo_tokens(self) -> int:
        """Tokens that a memo may have; 0 where none is written."""
        return self.tokens if self.writes_memo else 0

    def compact(self, session: Session, base: Sequence[Message], memo: str, boundary: Boundary) -> Artifact:
        """Begin afresh; the text is for the bridge."""
        kind, text = self.keep(session, memo, boundary)
        tokens = session.count(text) if text else 0
        session.start(base)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Artifact(kind, text, "", digest, tokens, tokens * (self.bytes_per_token or 0))

    def keep(self, session: Session, memo: str, boundary: Boundary) -> tuple[str, str]:
        """Kind and text of what crosses."""
        raise NotImplementedError

    def restore(self, session: Session, base: Sequence[Message], artifact: Artifact, folder: Path) -> None:
        """Begin afresh."""
        session.start(base)


class Uncompacted(TextBackend):
    """`full` and `plain`: no boundary; the run stops when the window overflows."""

    compacts = False


class Nothing(TextBackend):
    """`none`: the floor. The bridge's bookkeeping is all that is left."""

    def keep(self, session: Session, memo: str, boundary: Boundary) -> tuple[str, str]:
        """No text."""
        return "none", ""


class Trim(TextBackend):
    """`trim`: the last tokens of what was said, as text."""

    def keep(self, session: Session, memo: str, boundary: Boundary) -> tuple[str, str]:
        """The end of the history, that of earlier windows included as far as it is held."""
        held = f"{boundary.held.text}\n" if boundary.held else ""
        return "trimmed", session.cut(held + boundary.history(), self.tokens, last=True)


class Memo(TextBackend):
    """`memo`: the agent's own, verbatim; each holds everything, since only the latest crosses."""

    writes_memo = True

    def keep(self, session: Session, memo: str, boundary: Boundary) -> tuple[str, str]:
        """The memo, cut to the budget where the agent could not be brought to keep it."""
        return "memo", session.cut(memo, self.tokens)
