"""What judging costs: the price table, and a budget in money and tokens that ends a run cleanly."""

from __future__ import annotations

import asyncio
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from .verdicts import Tokens

FILE = Path(__file__).resolve().parent / "prices.toml"
_DATED = re.compile(r"-(?:\d{8}|\d{4}-\d{2}-\d{2}|latest|preview)$")


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens; see `prices.toml` for what each field is for."""

    input: float
    output: float
    cached: float | None = None
    cache_write: float | None = None

    def of(self, tokens: Tokens) -> float:
        """US dollars for these tokens."""
        plain = tokens.input - tokens.cached - tokens.cache_write
        cached = self.input if self.cached is None else self.cached
        write = self.input if self.cache_write is None else self.cache_write
        spent = plain * self.input + tokens.cached * cached + tokens.cache_write * write + tokens.output * self.output
        return spent / 1e6


class Prices:
    """Prices by model name.

    Args:
        table: prices of models, beside or instead of those in `prices.toml`.
    """

    def __init__(self, table: Mapping[str, Price] | None = None):
        self.table = _read(FILE) | dict(table or {})

    @classmethod
    def load(cls, path: str | Path | None = None) -> Prices:
        """The table that comes with us, with the entries of the user's file added.

        Raises:
            ValueError: the file is no price table.
        """
        return cls(_read(Path(path)) if path else None)

    def find(self, model: str) -> Price | None:
        """The price of a model, by its name or that of its dated family; None where there is none."""
        return self.table.get(model) or self.table.get(_DATED.sub("", model))


class BudgetEnded(Exception):
    """The next call might go over the budget."""


class Budget:
    """What a run may spend. A call is let in only if its estimate fits beside what is spent and what is under way.

    Args:
        dollars: most US dollars; None is no limit.
        tokens: most tokens, input and output together; None is no limit.
    """

    def __init__(self, dollars: float | None = None, tokens: int | None = None):
        for name, limit in (("max cost", dollars), ("max tokens", tokens)):
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} is {limit}; give more than 0, or leave it out for no limit")
        self.dollars, self.tokens = dollars, tokens
        self.spent_dollars, self.spent_tokens = 0.0, 0
        self._held_dollars, self._held_tokens, self._holds = 0.0, 0, 0
        self._settled = asyncio.Event()

    async def hold(self, tokens: int, dollars: float) -> None:
        """Set an estimate aside; waits for calls under way if only their estimates stand in the way.

        Raises:
            BudgetEnded: it does not fit beside what is spent.
        """
        while not self._fits(tokens + self._held_tokens, dollars + self._held_dollars):
            if not self._holds:
                raise BudgetEnded(self._ended())
            self._settled.clear()
            await self._settled.wait()
        self._holds += 1
        self._held_tokens += tokens
        self._held_dollars += dollars

    def settle(self, tokens: int, dollars: float, spent: Tokens, cost: float | None) -> None:
        """Give an estimate back and count what was really spent."""
        self._holds -= 1
        self._held_tokens -= tokens
        self._held_dollars -= dollars
        self.spent_tokens += spent.total
        self.spent_dollars += cost or 0.0
        self._settled.set()

    def _fits(self, tokens: int, dollars: float) -> bool:
        within_tokens = self.tokens is None or self.spent_tokens + tokens <= self.tokens
        return within_tokens and (self.dollars is None or self.spent_dollars + dollars <= self.dollars)

    def _ended(self) -> str:
        money = "" if self.dollars is None else f"${self.spent_dollars:.4f} of ${self.dollars:g} spent"
        tokens = "" if self.tokens is None else f"{self.spent_tokens:,} of {self.tokens:,} tokens spent"
        return (
            f"the budget ended: {', '.join(part for part in (money, tokens) if part)}; the next call might go over it"
        )


def _read(path: Path) -> dict[str, Price]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as problem:
        raise ValueError(f"price table {path} is no TOML: {problem}") from problem
    known = {each.name for each in fields(Price)}
    found = {}
    for model, entry in raw.items():
        if not isinstance(entry, dict) or set(entry) - known or not {"input", "output"} <= set(entry):
            raise ValueError(f"price table {path}: {model!r} is {entry!r}; it needs input and output, and may have "
                             "cached and cache_write, in US dollars per million tokens")  # fmt: skip
        if any(not isinstance(price, int | float) or price < 0 for price in entry.values()):
            raise ValueError(f"price table {path}: {model!r} has a price that is no number of 0 or more: {entry!r}")
        found[model] = Price(**entry)
    return found
