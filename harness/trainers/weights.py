"""The weights that train: saved, loaded, and told apart by a digest. A frozen base is never saved."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...compactor import WEIGHTS
from .model import RowModel

POLICY, COMPACTOR, ADAPTER = "policy", "compactor", "adapter.safetensors"


def add_adapter(model, rank: int):
    """The model with a LoRA adapter on its linear layers, which alone trains.

    Raises:
        ModuleNotFoundError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as problem:
        raise ModuleNotFoundError("train_policy=lora needs peft: pip install peft") from problem
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def trained(module: RowModel) -> dict[str, torch.Tensor]:
    """What trains, by name."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def digest(module: RowModel) -> str:
    """Sixteen hex digits of what trains: rollouts of other weights are stale."""
    found = hashlib.sha256()
    for name, tensor in sorted(trained(module).items()):
        found.update(name.encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def save_weights(module: RowModel, folder: str | Path, tokenizer=None) -> None:
    """Write what trains into `folder/policy` (a whole model, or an adapter) and `folder/compactor`."""
    folder = Path(folder)
    if module.trains_policy:
        place = folder / POLICY
        place.mkdir(parents=True, exist_ok=True)
        if hasattr(module.policy, "peft_config"):
            module.policy.save_pretrained(place)
            state = {k.removeprefix("policy."): v.contiguous().cpu().clone() for k, v in trained(module).items()
                     if k.startswith("policy.")}  # fmt: skip
            save_file(state, place / ADAPTER)
        else:
            module.policy.save_pretrained(place, max_shard_size="1000GB")
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
        missing, unknown = module.policy.load_state_dict(load_file(file), strict=False)
        tied = set(getattr(module.policy, "all_tied_weights_keys", None) or ())
        lost = [name for name in missing if name not in tied and name in dict(module.policy.named_parameters())]
        lost = [name for name in lost if dict(module.policy.named_parameters())[name].requires_grad]
        if unknown or lost:
            raise ValueError(f"{file} is of another model: {[*unknown, *lost][:3]} do not fit; give another folder")
    if module.mode != "frozen":
        module.compactor.load_state_dict(load_file(folder / COMPACTOR / WEIGHTS))
