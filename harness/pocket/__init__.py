"""The pocket: a small base model that reads synthetic matters, and compactors for it, with their recipes."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
VERSION, AGENT = "pocket-3", "pocket-agent-1"
SEEDS = (0, 1, 2)


def resolve(name: str):
    """The `NamedModel` behind `pocket` and `pocket-agent`, for the entry-point group `still.models`."""
    from ...models import NamedModel

    version = AGENT if name.startswith("pocket-agent") else VERSION
    folders = (WEIGHTS / f"still-{version}-seed{seed}" for seed in SEEDS)
    return NamedModel(version, WEIGHTS / version, tuple(folder for folder in folders if folder.is_dir()))
