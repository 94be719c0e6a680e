"""A compactor on disk or on the Hub: weights as safetensors, and a config as JSON beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import StillConfig
from .models import find

WEIGHTS, CONFIG = "compactor.safetensors", "compactor.json"


def write_compactor(
    folder: Path, config: StillConfig, shape: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> None:
    """Write both files, each whole or not at all, the weights last.

    Args:
        folder: that is there.
        config: of the compactor.
        shape: `head_dim`, `kv_heads` and `layers`.
        state: its weights, stored as fp32.

    Raises:
        OSError: they cannot be written there.
    """
    state = {name: tensor.detach().float().contiguous().cpu() for name, tensor in state.items()}
    weights, text = (folder / f"{name}.tmp" for name in (WEIGHTS, CONFIG))
    try:
        save_file(state, weights, metadata={"format": "pt", **{key: json.dumps(value) for key, value in shape.items()}})
        text.write_text(config.to_json())
        text.replace(folder / CONFIG)
        weights.replace(folder / WEIGHTS)
    except SafetensorError as problem:
        raise OSError(f"{folder / WEIGHTS} cannot be written ({problem})") from problem
    finally:
        for partial in (weights, text):
            with suppress(OSError):
                partial.unlink()


def find_compactor(name: str | Path, **download) -> Path:
    """The folder of a compactor: `name` itself, the best one that comes with a model of that name, or the Hub's.

    Args:
        name: folder, name of a model that comes with compactors (`pocket`), or Hub id.
        **download: what `huggingface_hub.snapshot_download` takes.

    Raises:
        FileNotFoundError: there is no such compactor, or one of its files is missing.
    """
    # Not the mixin's own: it looks for a config.json, and a base model's must not be mistaken for ours.
    folder = Path(name)
    named = None if folder.is_dir() else find(str(name))
    if named and named.compactors:
        folder = named.compactors[0]
    elif not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=[WEIGHTS, CONFIG], **download))
        except (OSError, ValueError) as problem:
            reason = str(problem).strip().splitlines()[0]
            raise FileNotFoundError(
                f"no compactor {name}: not a folder, not a name that comes with one, and the Hub says: {reason}"
            ) from problem
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}; it is no folder of StillCompactor.save_pretrained")
    return folder


def read_compactor(folder: Path) -> tuple[StillConfig, dict[str, Any], dict[str, torch.Tensor]]:
    """Config, shape (see `write_compactor`) and weights.

    Raises:
        ValueError: a file is no whole one of a compactor.
    """
    try:
        config = StillConfig.from_json((folder / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            known = file.metadata() or {}
            shape = {name: json.loads(known[name]) for name in ("head_dim", "kv_heads", "layers")}
            return config, shape, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} is no whole file of a compactor's weights ({error}): copy or train it again"
        ) from error
