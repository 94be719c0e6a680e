"""A sample of a base model's weights: what tells models of one shape apart.

A fingerprint of the config lets any weights of that shape pass. Of some layers a few numbers are kept beside it, which
are 0.2 % off in another dtype, a little more after fine-tuning, and more than 100 % off in another model.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import nn

if TYPE_CHECKING:
    from .config import StillConfig

LAYERS, NUMBERS, TOLERANCE = 16, 6, 0.02
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_known: WeakSet[nn.Module] = WeakSet()


def remember(model: nn.Module) -> None:
    """Let `sample_of` find `model` by its config, which is all that a cache keeps of it."""
    _known.add(model)


def sample_of(config) -> str:
    """The sample of the one remembered model that is alive and has this very config; empty if there is none."""
    text = config.get_text_config(decoder=True)
    found = {sample(model) for model in list(_known) if model.config.get_text_config(decoder=True) is text}
    return found.pop() if len(found) == 1 else ""


@torch.no_grad()
def sample(model: nn.Module) -> str:
    """Numbers from the first weight matrix of up to 16 layers, evenly chosen, as text.

    Returns:
        A hash of the matrices' names and shapes, then the numbers, all apart by spaces. Empty where a matrix is not
        there as plain floats: quantised, offloaded (meta) or sharded.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = list(getattr(decoder, "layers", ()))
    names, numbers = [], []
    for index in sorted({i * len(layers) // LAYERS for i in range(LAYERS)} if layers else ()):
        name, weight = next((item for item in layers[index].named_parameters() if item[1].ndim == 2), ("", None))
        if type(weight) is not nn.Parameter or weight.is_meta or weight.dtype not in PLAIN or not weight.numel():
            return ""
        names.append(f"{index}.{name.replace('.base_layer', '')} {list(weight.shape)}")  # as peft wraps a projection
        diagonal = weight.diagonal()  # a view: only the numbers themselves leave the device
        step = max(1, len(diagonal) // (NUMBERS + 1))  # rarely a multiple of the head dim: rows may be pruned alike
        numbers += diagonal[step // 2 :: step][:NUMBERS].float().tolist()
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
    return " ".join([digest, *(f"{x:.4g}" for x in numbers)]) if numbers else ""


def difference(one: str, other: str) -> float | None:
    """Relative L2 distance of two samples; None where one is missing, or they are of other matrices."""
    (first, *a), (second, *b) = (text.split(" ") for text in (one, other))
    if not a or first != second or len(a) != len(b):
        return None
    x, y = (torch.tensor([float(number) for number in numbers], dtype=torch.float64) for numbers in (a, b))
    return float((x - y).norm() / torch.maximum(x.norm(), y.norm()).clamp(min=1e-30))


def both_known(one: str, other: str) -> bool:
    """Whether two names of models can be compared: neither is missing, or a folder."""
    return all((one, other)) and not any(os.path.isabs(name) or os.path.isdir(name) for name in (one, other))


def warn_if_foreign(config: StillConfig, model: nn.Module) -> None:
    """Warn where a compactor was trained for other weights than `model`'s, or has no sample and names another model.

    A warning and no error: a policy that is trained keeps its compactor.
    """
    name = getattr(model.config, "_name_or_path", "") or ""
    apart = difference(config.base_weights, sample(model))
    if apart is None and both_known(config.base_model, name) and config.base_model != name:
        reason = "the names differ"
    elif apart is not None and apart > TOLERANCE:
        reason = f"the shape is the same; a sample of the weights differs by {apart:.0%}"
    else:
        return
    warnings.warn(
        f"this compactor was trained for {config.base_model or 'another model'} and is bound to "
        f"{name or 'this one'} ({reason}): expect bad answers, unless that one was trained on from it; load the model "
        f"that the compactor was trained on, or train it on this one",
        stacklevel=4,
    )
