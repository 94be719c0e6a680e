"""How many slots a context may keep, and how they are divided over layers and heads."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


def slots_for(tokens: int, ratio: float) -> int:
    """Slots that `tokens` tokens get at a compression ratio of `ratio`: never over the budget, at least one.

    Raises:
        ValueError: the context is empty, or the ratio is below 1.
    """
    if tokens < 1:
        raise ValueError(f"the context has {tokens} tokens; there is nothing to compact")
    if not 1 <= ratio < math.inf:
        raise ValueError(f"ratio is {ratio}; it must be 1 or more (tokens per slot)")
    return max(1, int(tokens / ratio * (1 + 1e-12)))  # 512 / (512 / 186) is not 186


def resolve_slots(tokens: int, slots: int | None = None, ratio: float | None = None) -> int:
    """Slots for `tokens` tokens, from exactly one of `slots` and `ratio`.

    Raises:
        ValueError: both or neither are given, or `slots` is not between 1 and `tokens`.
    """
    if (slots is None) == (ratio is None):
        raise ValueError(f"give exactly one of slots (got {slots}) and ratio (got {ratio})")
    if ratio is not None:
        return slots_for(tokens, ratio)
    if not 1 <= slots <= tokens or slots % 1:
        raise ValueError(f"slots is {slots}; it must lie between 1 and the context's {tokens} tokens, a whole number")
    return slots


def slots_of_bytes(nbytes: int, layers: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Slots that the average KV head gets when keys and values may take `nbytes` bytes in all, a row.

    Raises:
        ValueError: the bytes hold less than one slot for each head.
    """
    slot = 2 * layers * kv_heads * head_dim * itemsize
    if nbytes < slot:
        raise ValueError(
            f"{nbytes} bytes are less than one slot for each of {layers * kv_heads} KV heads takes ({slot} bytes)"
        )
    return nbytes // slot


@dataclass(frozen=True)
class Split:
    """How the slots of a context are divided over full-attention layers and KV heads.

    Attributes:
        weights: for each full-attention layer, by its index, a share per KV head; only their proportions count.
        floor: slots that every head gets at least.
        fingerprint: of the model it was made for (`still.compactor.fingerprint`); empty for any of its shape.
        source: where it comes from: "uniform", "given", "measured", "learned", or "attention" (that answers give to
            the context).
        exact: `weights` are numbers of slots, to be kept as they are; they serve one budget.
    """

    weights: Mapping[int, tuple[float, ...]]
    floor: int = 1
    fingerprint: str = ""
    source: str = "given"
    exact: bool = False

    def __post_init__(self) -> None:
        if not self.weights or not all(self.weights.values()):
            raise ValueError("a split needs the share of at least one KV head in every layer that it names")
        for layer, shares in self.weights.items():
            for head, share in enumerate(shares):
                if not 0 <= share < math.inf:
                    raise ValueError(f"the share of layer {layer}, KV head {head} is {share}; it must be 0 or more")
                if self.exact and (share != int(share) or share < self.floor):
                    raise ValueError(
                        f"layer {layer}, KV head {head} has {share:g} slots; give a whole number, the floor of "
                        f"{self.floor} or more"
                    )
        if self.floor < 0:
            raise ValueError(f"floor is {self.floor}; it must be 0 slots or more")

    @classmethod
    def uniform(cls, layers: Iterable[int], kv_heads: int) -> Split:
        """The same share for every head."""
        return cls({layer: (1.0,) * kv_heads for layer in layers}, source="uniform")

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Every (layer, head), in order."""
        return [(layer, head) for layer in sorted(self.weights) for head in range(len(self.weights[layer]))]

    def counts(self, tokens: int, slots: int) -> dict[int, tuple[int, ...]]:
        """Slots of every KV head for a context of `tokens` tokens, `slots` for the average head.

        No head gets more slots than there are tokens, nor less than the floor; what is cut or added there is shared
        out among the others in proportion. The sum is exactly `slots` times the heads.

        Raises:
            ValueError: `slots` lies outside 1 to `tokens`, the floor alone costs more than the budget, or an exact
                split misses the budget.
        """
        heads, budget = self.heads, resolve_slots(tokens, slots) * len(self.heads)
        if self.exact:
            return self._exact_counts(tokens, slots, budget)
        if self.floor * len(heads) > budget:
            layer, head = heads[budget // self.floor]
            raise ValueError(
                f"{budget} slots for {len(heads)} KV heads are fewer than a floor of {self.floor} for each: they are "
                f"used up at layer {layer}, KV head {head}; take a lower ratio, more slots or a lower floor"
            )
        shares = [self.weights[layer][head] for layer, head in heads]
        given = _share_out(budget, shares, min(self.floor, tokens), tokens)
        table: dict[int, list[int]] = {layer: [] for layer in sorted(self.weights)}
        for (layer, _), count in zip(heads, given, strict=True):
            table[layer].append(count)
        return {layer: tuple(counts) for layer, counts in table.items()}

    def _exact_counts(self, tokens: int, slots: int, budget: int) -> dict[int, tuple[int, ...]]:
        table = {layer: tuple(map(int, self.weights[layer])) for layer in sorted(self.weights)}
        total = sum(map(sum, table.values()))
        if total != budget:
            raise ValueError(
                f"the split gives {total} slots in all, and the budget is {budget} ({slots} for each of "
                f"{len(self.heads)} KV heads): give shares (weights) instead, or the ratio that it was made for"
            )
        for layer, head in self.heads:
            if table[layer][head] > tokens:
                raise ValueError(
                    f"layer {layer}, KV head {head} has {table[layer][head]} slots for {tokens} tokens: a compact "
                    f"cache has no more slots than tokens"
                )
        return table

    def check(self, layers: Iterable[int], kv_heads: int, fingerprint: str = "") -> Split:
        """The split itself, if it is one for this model.

        Raises:
            ValueError: it was made for another model, or names other layers or heads.
        """
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise ValueError(
                f"this split was made for a model with fingerprint {self.fingerprint}, not for this one "
                f"({fingerprint}): measure one with `still budgets`"
            )
        if sorted(self.weights) != (theirs := sorted(layers)):
            raise ValueError(f"the split names layers {sorted(self.weights)}; the model's are {theirs}")
        for layer, shares in self.weights.items():
            if len(shares) != kv_heads:
                raise ValueError(f"the split has {len(shares)} heads in layer {layer}; the model has {kv_heads}")
        return self

    def mixed(self, other: Split, share: float) -> Split:
        """This split with `share` of the slots divided as `other` has it."""
        mine, theirs = (sum(map(sum, split.weights.values())) for split in (self, other))
        weights = {
            layer: tuple(
                (1 - share) * own / mine + share * new / theirs
                for own, new in zip(self.weights[layer], other.weights[layer], strict=True)
            )
            for layer in self.weights
        }
        return replace(self, weights=weights, source="mixed", exact=False)

    def drawn(self, seed: int | str) -> Split:
        """A split around this one, for training: part of the slots as here, the rest equal, each share then jittered.

        The part is uniform from 0 to 1, the jitter log-normal with a sigma of 0.5; both are functions of the seed.
        """
        rng = random.Random(f"split {seed}")
        heads = len(next(iter(self.weights.values())))
        mixed = Split.uniform(self.weights, heads).mixed(self, rng.random())
        weights = {
            layer: tuple(share * rng.lognormvariate(0, 0.5) for share in shares)
            for layer, shares in mixed.weights.items()
        }
        return replace(self, weights=weights, source="drawn", exact=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        weights = {str(layer): list(shares) for layer, shares in sorted(self.weights.items())}
        rest = {"floor": self.floor, "fingerprint": self.fingerprint, "source": self.source}
        if self.exact:
            return {"slots": {layer: list(map(int, counts)) for layer, counts in weights.items()}, **rest}
        return {"weights": weights, **rest}

    @classmethod
    def from_dict(cls, values: Any) -> Split:
        """Read what `to_dict` made; "slots" in the place of "weights" gives an exact split.

        Raises:
            ValueError: it is no such object, or has keys that this version does not know.
        """
        if isinstance(values, dict) and "slots" in values and "weights" not in values:
            values = {**values, "weights": values["slots"], "exact": True}
            values.pop("slots")
        if not isinstance(values, dict) or not isinstance(values.get("weights"), dict):
            raise ValueError(
                'a split is a JSON object such as {"weights": {"0": [1, 3], "1": [0, 0]}, "floor": 1}, a share for '
                "each KV head by layer, or one with the numbers themselves as \"slots\""
            )
        if unknown := sorted(set(values) - {item.name for item in fields(cls)}):
            raise ValueError(f"unknown keys {unknown} in a split; a newer version wrote it?")
        try:
            weights = {int(layer): tuple(map(float, shares)) for layer, shares in values["weights"].items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"the weights of a split are lists of numbers by layer index ({error})") from error
        return cls(**{**values, "weights": weights})

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Read a JSON file.

        Raises:
            ValueError: the file holds no split.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _share_out(budget: int, shares: Sequence[float], low: int, high: int) -> list[int]:
    """Whole numbers between `low` and `high` that sum to `budget`, in proportion to `shares` where they can."""
    smallest = max(sum(shares), 1.0) * 1e-9  # heads without a share come last, but they come
    shares = [share + smallest for share in shares]
    fixed: dict[int, int] = {}
    while True:
        free = [place for place in range(len(shares)) if place not in fixed]
        left, total = budget - sum(fixed.values()), sum(shares[place] for place in free)
        wanted = {place: left * shares[place] / total for place in free}
        below, above = ([p for p in free if wanted[p] < low], [p for p in free if wanted[p] > high])
        if not below and not above:
            break
        lacking, spare = (sum(low - wanted[p] for p in below), sum(wanted[p] - high for p in above))
        # The larger of both corrections is final; the smaller may still turn.
        fixed |= dict.fromkeys(below, low) if lacking >= spare else dict.fromkeys(above, high)
        if len(fixed) == len(shares):
            return [fixed[place] for place in range(len(shares))]
    counts = [fixed.get(place, 0) or int(wanted.get(place, 0)) for place in range(len(shares))]
    order = sorted(free, key=lambda place: (int(wanted[place]) - wanted[place], place))
    for place in order[: budget - sum(counts)]:
        counts[place] += 1
    return counts
