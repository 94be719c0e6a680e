"""The pocket: a small base model that reads synthetic matters, and compactors for it, with their recipes."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
VERSION = "pocket-2"
SEEDS = (0, 1, 2)


def resolve(name: str):
    """The `NamedModel` behind `pocket` and `pocket-2`, for the entry-point group `still.models`."""
    from ...models import NamedModel

    folders = (WEIGHTS / f"still-{VERSION}-seed{seed}" for seed in SEEDS)
    return NamedModel(VERSION, WEIGHTS / VERSION, tuple(folder for folder in folders if folder.is_dir()))
