"""Backends in KV space: slots by STILL or any method, the memo's own keys and values, or memo and slots.

S and U are always exact. What a boundary keeps stands where it stood: positions are those of the whole episode.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from ... import methods
from ...budgets import slots_for
from ...cache import StillCache
from ...methods.base import Method
from ...types import CompactKV
from ..policies.local import LocalPolicy, LocalSession, Window
from ..run_config import RunConfig, budget_bytes
from ..runs import sha256_of
from ..types import Artifact, Boundary, Message
from .slots import SlotMaker, called, check_attention, fingerprint
from .text import DEFAULT_TOKENS


class KvBackend:
    """A boundary that goes on behind a cache of S, U and slots."""

    compacts: ClassVar[bool] = True
    writes_memo: ClassVar[bool] = False

    def __init__(self, config: RunConfig, policy: LocalPolicy):
        self.name, self.config, self.policy = config.backend, config, policy
        self.needs = frozenset({"kv"})
        self.budget = budget_bytes(config.budget or f"{DEFAULT_TOKENS}t", policy.bytes_per_token)
        if self.budget < policy.bytes_per_token:
            raise ValueError(f"a budget of {config.budget} is less than the {policy.bytes_per_token} bytes of one slot")

    @property
    def memo_tokens(self) -> int:
        """Tokens that a memo may have; 0 where none is written."""
        return 0

    def restore(self, session: LocalSession, base: Sequence[Message], artifact: Artifact, folder: Path) -> None:
        """Open the saved cache, checked against its hash."""
        path = folder / artifact.path
        if not path.is_file() or sha256_of(path) != artifact.sha256:
            raise ValueError(f"{path} is missing or damaged; start the run in another folder")
        session.hold(StillCache.load(path, self.policy.model))

    def close(
        self, session: LocalSession, cache: StillCache, memo: str, boundary: Boundary, behind: Hashable = None,
        **details,
    ) -> Artifact:  # fmt: skip
        """Save the cache and go on behind it; `behind` says what made it, see `LocalSession.hold`."""
        path = boundary.folder / f"window-{boundary.window:03d}.safetensors"
        cache.save(path)
        session.hold(cache, behind)
        size = session.size()
        return Artifact(
            self.name, memo, f"{boundary.folder.name}/{path.name}", sha256_of(path), size.compacted,
            size.compacted_bytes, details,
        )  # fmt: skip


class Kv(KvBackend):
    """`kv`: each window becomes slots, in one pass and without a turn of the model.

    Args:
        config: `mode`, and `ratio` or `budget`.
        policy: a local model.
        method: made from `config.method` unless given.

    Raises:
        ValueError: the method cannot compact a window inside an episode.
    """

    def __init__(self, config: RunConfig, policy: LocalPolicy, method: Method | None = None):
        super().__init__(config, policy)
        self.method = methods.get(config.method) if method is None else method
        name = self.method.name
        own = type(self.method)
        if own.compact_view is Method.compact_view and own.compact_layer is Method.compact_layer:
            raise ValueError(f"the method {name} works on whole contexts, not on one window of an episode")
        if self.method.needs_queries:
            self.needs |= {"queries"}
            if config.mode == "recompact":
                raise ValueError(f"{name} looks at queries, and slots have none: take mode='append'")
        self.bytes_per_slot = policy.bytes_per_token
        if self.method.split is not None and config.mode == "recompact":
            raise ValueError("slots that are divided unevenly cannot be compacted again: take mode='append'")
        if self.method.uses_beta and config.mode == "recompact":
            raise ValueError(f"mode='recompact' would lose the beta of {name}; take mode='append'")
        check_attention(self.method, policy.model)
        if self.method.uses_beta:
            if self.method.needs_queries:
                raise ValueError(f"{name} needs queries and a bias at once, which no attention gives past one window")
            text = policy.model.config.get_text_config(decoder=True)
            layers = len(policy.session([]).layers)
            self.bytes_per_slot += layers * text.num_key_value_heads * policy.model.dtype.itemsize
        self.maker, self._made_by = SlotMaker(self.method, policy.model), None

    @property
    def slots(self) -> int:
        """Slots per KV head that the budget pays for."""
        return self.budget // self.bytes_per_slot

    def compact(self, session: LocalSession, base: Sequence[Message], memo: str, boundary: Boundary) -> Artifact:
        """Compact the window behind what is held, or both together."""
        window, trail = session.close_window(), session.trail()
        held, count = window.held, self.share(window, window.held, boundary)
        exhausted = count < 1
        again = held > 0 and (self.config.mode == "recompact" or exhausted)
        if exhausted and not again:
            raise ValueError(f"a budget of {self.slots} slots is too small for {boundary.ahead} windows; raise it")
        if again:
            count = min(max(held, 1) if exhausted else count, held + window.tokens)
        # The method by its identity, which no other can have while an episode that made slots with it is open.
        slots = trail, id(self.method), self._fingerprint(), count, again
        cache = session.policy.once(slots, lambda: self._made(session, window, count, again))
        return self.close(
            session, cache, memo, boundary, slots, method=called(self.method), mode=self.config.mode, slots=count,
            compactor=self._fingerprint(), window_tokens=window.tokens, exhausted=exhausted,
        )  # fmt: skip

    def _fingerprint(self) -> str:
        if self._made_by is None:  # an episode has a backend of its own, and one compactor throughout
            self._made_by = fingerprint(self.method)
        return self._made_by

    def share(self, window: Window, held: int, boundary: Boundary) -> int:
        """Slots that this window gets (append), or that everything gets (recompact)."""
        again = self.config.mode == "recompact"
        if self.method.fixed_size:
            return window.tokens + (held if again else 0)
        if self.config.ratio is not None:
            return held if again and held else slots_for(window.tokens, self.config.ratio)
        if again:
            return min(self.slots, held + window.tokens)
        return min((self.slots - held) // boundary.ahead, window.tokens)

    @torch.no_grad()
    def _made(self, session: LocalSession, window: Window, count: int, again: bool) -> StillCache:
        """The window's slots behind what is held, or `again` those of both together."""
        if not again:
            layers, where = self.maker.append(_raw(window), window.positions, count, window.queries)
            window.cache.append_compact(layers, window.tokens, positions=where)
            return window.cache
        layers, where = self.maker.recompact(window.cache, window.base, _raw(window), window.positions, count)
        cache = session.exact_base()
        tokens = window.cache.logical_length - window.base
        cache.append_compact(layers, tokens, positions=where, source=window.cache)
        return cache


def _raw(window: Window) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    return {layer.index: layer.raw()[:2] for layer in window.cache.compact_layers}


class MemoKv(KvBackend):
    """`memo_kv`: the memo's tokens with the keys and values that they had while the history was in view."""

    writes_memo = True

    @property
    def memo_tokens(self) -> int:
        """The budget, less what the call around the memo takes."""
        slots = self.budget // self.policy.bytes_per_token
        return max(1, slots - min(32, slots // 4))

    def compact(self, session: LocalSession, base: Sequence[Message], memo: str, boundary: Boundary) -> Artifact:
        """Keep the columns of the last assistant's turn, the memo; all else of the history goes."""
        window = session.close_window()
        first, end = window.last_turn
        first = max(first, end - self.budget // self.policy.bytes_per_token)
        layers = {}
        for layer in window.cache.compact_layers:
            keys, values, _ = layer.raw()
            layers[layer.index] = CompactKV(keys[:, :, first:end].clone(), values[:, :, first:end].clone())
        cache = session.exact_base()
        tokens = window.cache.logical_length - window.base
        cache.append_compact(layers, tokens, positions=window.positions[first:end], source=window.cache)
        return self.close(session, cache, "", boundary, slots=end - first, window_tokens=window.tokens)


class Hybrid(Kv):
    """`hybrid`: the memo as text in the bridge, and slots of the window, memo turn included, in what it leaves."""

    writes_memo = True

    @property
    def memo_tokens(self) -> int:
        """The memo's share of the budget."""
        return max(1, int(self.budget * self.config.memo_share) // self.policy.bytes_per_token)

    @property
    def slots(self) -> int:
        """Slots that the rest of the budget pays for."""
        return (self.budget - self.memo_tokens * self.policy.bytes_per_token) // self.bytes_per_slot

    def compact(self, session: LocalSession, base: Sequence[Message], memo: str, boundary: Boundary) -> Artifact:
        """As `kv`; the artifact counts memo and slots."""
        memo = session.cut(memo, self.memo_tokens)
        made = super().compact(session, base, memo, boundary)
        tokens = session.count(memo) if memo else 0
        nbytes = made.nbytes + tokens * self.policy.bytes_per_token
        return Artifact(made.kind, memo, made.path, made.sha256, made.tokens + tokens, nbytes, made.details)
