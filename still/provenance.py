"""What made a result: the config, the seed, the versions, the device and the git commit of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

PACKAGES = ("still-kv", "torch", "transformers", "tokenizers", "safetensors", "triton", "accelerate", "datasets")


def provenance(config: Any = None, seed: int | None = None, device: Any = None, **more: Any) -> dict[str, Any]:
    """A record of this run that JSON can hold; every result file carries one.

    Args:
        config: a dataclass, a mapping, or None.
        seed: the seed that the run drew everything from.
        device: where it ran (`model.device`, or a string); None is the CPU.
        more: further entries, for example `model="pocket"`.

    Returns:
        `config, seed, command, versions, device, git, created` and what `more` adds. `git` is
        `{"commit": ..., "dirty": ...}` of the checkout that `still` was imported from, or None outside one.
    """
    return {
        "config": _plain(config),
        "seed": seed,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv and sys.argv[0] else None,
        "versions": versions(),
        "device": describe_device(device),
        "git": git_state(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: _plain(value) for name, value in more.items()},
    }


def versions() -> dict[str, str]:
    """The Python version and those of the packages that a result depends on, without importing any."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_device(device: Any = None) -> dict[str, Any]:
    """Name, kind and threads of a device. torch is asked only if something has imported it already."""
    kind = str(device).split(":")[0] if device is not None else "cpu"
    torch = sys.modules.get("torch")
    known: dict[str, Any] = {"type": kind, "name": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if torch is not None and kind == "cuda":
        known["name"] = torch.cuda.get_device_name(device)
    elif torch is not None:
        known["threads"] = torch.get_num_threads()
    return known


def git_state(package: str | Path | None = None) -> dict[str, Any] | None:
    """Commit and cleanliness of the checkout that holds `package` (default: this one), or None outside a checkout.

    A package installed into an environment that happens to lie inside somebody's repository is not a checkout:
    the file itself has to be tracked.
    """
    file = Path(package or __file__).resolve()
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    commit = _git(file.parent, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        return _installed_from_git() if package is None else None
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_from_git() -> dict[str, Any] | None:
    """The commit that pip wrote down when it installed from a repository's address (PEP 610)."""
    try:
        text = Distribution.read_text(distribution("still-kv"), "direct_url.json")
    except PackageNotFoundError:
        return None
    commit = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    return {"commit": commit, "dirty": False} if commit else None


def _plain(value: Any) -> Any:
    """The value as JSON would give it back: dataclasses as dicts, tuples as lists, the rest as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part) for part in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
