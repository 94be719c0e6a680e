"""The weights that train: saved, loaded, and told apart by a digest. A frozen base is never saved."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...compactor_io import CONFIG, WEIGHTS
from ...config import StillConfig
from .model import RowModel
from .sharding import assign, scatter

POLICY, COMPACTOR, ADAPTER = "policy", "compactor", "adapter.safetensors"


def add_adapter(model, rank: int, seed: int = 0):
    """The model with a LoRA adapter on its linear layers, which alone trains.

    Args:
        model: a causal language model.
        rank: of the adapter.
        seed: of its first weights, so that every process and every start of a run has the same.

    Raises:
        ModuleNotFoundError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as problem:
        raise ModuleNotFoundError("train_policy=lora needs peft: pip install 'still-kv[train]'") from problem
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def trained(module: RowModel) -> dict[str, torch.Tensor]:
    """What trains, by name."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def digest(module: RowModel) -> str:
    """Sixteen hex digits of what trains: rollouts of other weights are stale."""
    found = hashlib.sha256()
    for name, tensor in sorted(trained(module).items()):
        found.update(name.encode())
        copied = tensor.flatten().to("cpu", copy=True)  # what numpy has seen, no wrapper can free any more
        found.update(copied.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def check_finite(weights: dict[str, torch.Tensor]) -> None:
    """Refuse weights that are no numbers: whoever loads them would play noise.

    Raises:
        ValueError: names the first.
    """
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name} is no longer finite, and nothing of it was saved: take a lower --lr or --clip in a new folder"
            )


def save_weights(module: RowModel, folder: str | Path, tokenizer=None, state: dict | None = None) -> None:
    """Write what trains into `folder/policy` (a whole model, or an adapter) and `folder/compactor`.

    Args:
        module: policy and compactor.
        folder: made if it is not there.
        tokenizer: saved beside the policy.
        state: the whole weights, where the module holds shards.

    Raises:
        ValueError: a weight is no number.
    """
    folder = Path(folder)
    check_finite(trained(module) if state is None else state)
    if module.trains_policy:
        place = folder / POLICY
        place.mkdir(parents=True, exist_ok=True)
        if hasattr(module.policy, "peft_config"):
            module.policy.save_pretrained(place)
            state = {k.removeprefix("policy."): v.contiguous().cpu().clone() for k, v in trained(module).items()
                     if k.startswith("policy.")}  # fmt: skip
            save_file(state, place / ADAPTER)
        else:
            start = f"{POLICY}."
            whole = state and {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            module.policy.save_pretrained(place, state_dict=whole, max_shard_size="1000GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
    if module.mode != "frozen":
        module.compactor.save_pretrained(folder / COMPACTOR)


def load_weights(module: RowModel, folder: str | Path) -> None:
    """Put saved weights into a module, in place.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are of another model.
    """
    folder = Path(folder)
    if module.trains_policy:
        file = folder / POLICY / (ADAPTER if hasattr(module.policy, "peft_config") else "model.safetensors")
        _put(module, POLICY, file)
    if module.mode != "frozen":
        load_compactor(module, folder / COMPACTOR)


def load_compactor(module: RowModel, folder: Path) -> None:
    """Put a saved compactor's weights into a module's, in place, and what its config says of its placement.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another model.
    """
    _put(module, COMPACTOR, folder / WEIGHTS)
    saved, config = StillConfig.from_json((folder / CONFIG).read_text(encoding="utf-8")), module.compactor.config
    config.split, config.scout = saved.split, saved.scout


def _put(module: RowModel, part: str, file: Path) -> None:
    saved, owner = load_file(file), getattr(module, part)
    known = {name for name, _ in owner.named_parameters(remove_duplicate=False)} | dict(owner.named_buffers()).keys()
    unknown = [name for name in saved if name not in known]
    lost = [name for name, p in owner.named_parameters() if p.requires_grad and name not in saved]
    if unknown or lost:
        raise ValueError(f"{file} is of another model: {[*unknown, *lost][:3]} do not fit; give another folder")
    scatter(module)  # of all shards, since those of the policy's first and last weights belong to the whole
    assign(owner, saved)
