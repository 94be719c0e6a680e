"""Drop contexts that say the same as an earlier one: exactly, or nearly by MinHash over word sequences."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

WORDS_IN_SHINGLE = 5
HASHES, BANDS = 64, 16
_PRIME = (1 << 61) - 1


def normalise(text: str) -> str:
    """Words in lower case, without punctuation, single spaces between them."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def holds(text: str, value: str) -> bool:
    """Whether a text holds a value, compared word by word."""
    return f" {normalise(value)} " in f" {normalise(text)} "


def shingles(text: str) -> set[int]:
    """Hashes of every run of five normalised words."""
    words = normalise(text).split()
    runs = range(max(1, len(words) - WORDS_IN_SHINGLE + 1))
    return {_hash(" ".join(words[start : start + WORDS_IN_SHINGLE])) for start in runs}


def jaccard(first: set[int], second: set[int]) -> float:
    """Shared share of two sets."""
    return len(first & second) / len(first | second) if first | second else 1.0


class Deduplicator:
    """Remembers texts and says which new one repeats an earlier one.

    Candidates are texts that share a band of MinHash values; the share of common shingles decides.

    Args:
        near: share of common shingles from which on two texts are duplicates; 1 for exact ones only.
    """

    def __init__(self, near: float):
        rng = random.Random(0)
        self.near = near
        self._turns = [(rng.randrange(1, _PRIME), rng.randrange(_PRIME)) for _ in range(HASHES)]
        self._exact: set[int] = set()
        self._kept: list[set[int]] = []
        self._bands: dict[tuple, list[int]] = defaultdict(list)

    def seen(self, text: str) -> str:
        """`exact_duplicate`, `near_duplicate`, or an empty string for a new text, which is remembered."""
        exact = _hash(normalise(text))
        if exact in self._exact:
            return "exact_duplicate"
        found = shingles(text)
        signature = [min((a * value + b) % _PRIME for value in found) for a, b in self._turns]
        rows = HASHES // BANDS
        keys = [(band, *signature[band * rows : (band + 1) * rows]) for band in range(BANDS)]
        candidates = {index for key in keys for index in self._bands[key]}
        if self.near < 1 and any(jaccard(found, self._kept[index]) >= self.near for index in candidates):
            return "near_duplicate"
        self._exact.add(exact)
        for key in keys:
            self._bands[key].append(len(self._kept))
        self._kept.append(found)
        return ""


def unique(texts: Iterable[tuple[str, object]], near: float, dropped: Counter) -> list:
    """The second elements whose texts repeat no earlier one; the others are counted in `dropped`."""
    known, kept = Deduplicator(near), []
    for text, item in texts:
        reason = known.seen(text)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(item)
    return kept


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
