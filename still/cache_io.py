"""Caches on disk: one safetensors file with what it takes to trust it again, and plain descriptions."""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .cache_compaction import Packed
from .cache_layer import CompactLayer
from .cache_ragged import RaggedSlots
from .config import field_of
from .provenance import versions
from .weights import TOLERANCE, both_known, difference, remember, sample, sample_of

FORMAT = 1
NO_HASH = "0" * 64
SHAPE_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "vocab_size",
    "rope_parameters",
    "layer_types",
    "sliding_window",
)


def state_of(layer) -> dict[str, torch.Tensor]:
    """The tensors that a cache layer attends to or recurs on, by name."""
    names = ("keys", "values", "beta") if isinstance(layer, CompactLayer) else ("keys", "values")
    state = {name: getattr(layer, name, None) for name in names}
    for name in names if getattr(layer, "ragged", None) is not None else ():
        state[f"ragged.{name}"] = getattr(layer.ragged, name)
    for kind in ("conv_states", "recurrent_states"):
        for index, tensor in getattr(layer, kind, {}).items():
            state[f"{kind}.{index}"] = tensor
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def identity(model) -> dict[str, Any]:
    """What of a model decides whether a cache fits it: the shape of its KV cache, name, revision, sample of weights.

    Args:
        model: the model, or its config; the sample is then that of the model that has it, if one is known.
    """
    config = getattr(model, "config", model)
    text = config.get_text_config(decoder=True)
    shape = {name: field_of(text, name) for name in SHAPE_FIELDS}
    shape["head_dim"] = shape["head_dim"] or text.hidden_size // text.num_attention_heads
    shape = json.loads(json.dumps(shape, sort_keys=True, default=str))
    return {
        **shape,
        "config_sha256": hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest(),
        "name": getattr(config, "_name_or_path", "") or "",
        "revision": getattr(config, "_commit_hash", "") or "",
        "weights": sample(model) if isinstance(model, torch.nn.Module) else sample_of(config),
    }


def describe(cache) -> dict[str, Any]:
    """What a cache is, in plain values that JSON can hold."""
    layer = cache.compact_layers[0]
    empty = not layer.is_initialized
    full = [index for index, other in enumerate(cache.layers) if isinstance(other, CompactLayer)]
    slots, raw = cache.slots, 0 if empty else layer.most_raw()
    longest = layer.logical if layer.lengths is None else int(layer.lengths.max())
    return {
        "model": identity(cache.model_config),
        "compact_layers": full,
        "other_layers": [index for index in range(len(cache.layers)) if index not in full],
        "batch": layer.batch,
        "kv_heads": cache.config.num_key_value_heads,
        "logical_length": cache.logical_length,
        "physical_length": cache.physical_length,
        "slots": slots,
        "row_slots": cache.row_slots(),
        "ragged": cache.ragged,
        "raw_tokens": raw,
        "ratio": (longest - raw) / slots if slots else None,
        "beta": layer.beta is not None or (cache.ragged and layer.ragged.beta is not None),
        "dtype": None if empty else str(layer.keys.dtype).removeprefix("torch."),
        "device": None if empty else str(layer.keys.device),
        "nbytes": cache.nbytes,
        **_heads(cache),
        "compacts_itself": None if cache.policy is None else _policy(cache.policy),
        "provenance": cache.provenance,
    }


def _heads(cache) -> dict[str, Any]:
    """What is to say of unequal heads: the first row's slots by layer, and the bytes that padding them would take."""
    if not cache.ragged:
        return {}
    slots = {str(layer): counts for layer, counts in cache.head_slots().items()}
    return {"head_slots": slots, "padded_nbytes": cache.padded_nbytes}


def _policy(policy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in ("chunk", "ratio", "slots", "keep_last", "mode", "reach")}


def save(cache, path: str | Path) -> Path:
    """Write a cache to one safetensors file: into a temporary file beside it first, then renamed.

    Raises:
        ValueError: the cache is empty.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not cache.compact_layers[0].is_initialized:
        raise ValueError("the cache is empty; read a context into it before saving")
    tensors, layers = {}, []
    for index, layer in enumerate(cache.layers):
        kind = {"type": type(layer).__name__}
        for name, tensor in state_of(layer).items():
            tensors[f"layers.{index}.{name}"] = tensor
        if isinstance(layer, CompactLayer):
            kind["logical"] = layer.logical
            for name in ("slot_positions", "lengths", "live"):
                if getattr(layer, name) is not None:
                    tensors[f"layers.{index}.{name}"] = getattr(layer, name)
            if layer.ragged is not None:
                tensors[f"layers.{index}.ragged.positions"] = layer.ragged.positions
                tensors[f"layers.{index}.ragged.counts"] = layer.ragged.counts
        elif hasattr(layer, "cumulative_length"):
            kind["cumulative_length"] = int(layer.cumulative_length)
        layers.append(kind)
    for name, tensor in (("token_ids", cache.token_ids), ("columns", cache.columns.mask)):
        if tensor is not None:
            tensors[name] = tensor
    header = {
        "format": FORMAT,
        "sha256": NO_HASH,
        "layers": layers,
        "description": describe(cache),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    tensors = {name: _narrow(tensor.detach().cpu()).clone().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, partial, metadata={"still": json.dumps(header)})
        _stamp(partial)
        os.replace(partial, path)
    except BaseException as problem:
        with suppress(OSError):
            partial.unlink()
        if isinstance(problem, SafetensorError):
            raise OSError(f"{path} cannot be written ({problem})") from problem
        raise
    return path


def _narrow(x: torch.Tensor) -> torch.Tensor:
    """Whole numbers in 16 or 32 bits where those hold them: ids and positions stand beside few bytes of slots."""
    if x.dtype not in (torch.int32, torch.int64) or not x.numel():
        return x
    most = max(-int(x.min()), int(x.max()))
    return x.to(next((kind for kind in (torch.int16, torch.int32) if most <= torch.iinfo(kind).max), torch.int64))


def read_header(path: str | Path) -> dict[str, Any]:
    """What a saved cache says of itself, without its tensors; its structure and length are checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or no saved cache.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{path} has {size} bytes and no complete header: truncated, or no saved cache")
        try:
            table = json.loads(file.read(length))
            header = json.loads(table.pop("__metadata__")["still"])
            end = 8 + length + max(entry["data_offsets"][1] for entry in table.values())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no cache written by StillCache.save: {error!r}") from error
    if size != end:
        raise ValueError(f"{path} has {size} bytes where its header says {end}: truncated or corrupt; save it again")
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} has format {header.get('format')}; this version reads {FORMAT}")
    return header


def verify_data(path: str | Path) -> str:
    """Compare a saved cache with the sha256 that it carries, and return it. Finds corruption, not forgery.

    Raises:
        ValueError: a byte differs.
    """
    wanted, found = read_header(path)["sha256"], _digest(Path(path))
    if wanted != found:
        raise ValueError(f"{path} is corrupt: its contents hash to {found[:16]}..., it was saved as {wanted[:16]}...")
    return found


def load(cls, path: str | Path, model: Any, verify: bool = False, device=None, compactor=None):
    """Open a saved cache; its tensors stay memory-mapped until they are changed or moved.

    Args:
        cls: `StillCache`.
        path: the file.
        model: the model that it was made for, or its config.
        verify: compare every byte with the sha256 in the file.
        device: where to put the tensors; the model's device unless given.
        compactor: lets a cache that compacted itself go on; otherwise it is ready-made.

    Raises:
        ValueError: the file is truncated, corrupt or no saved cache, or was made for another model, other weights of
            its shape, or another dtype than the model runs in.
    """
    header = read_header(path)
    if verify:
        verify_data(path)
    config = getattr(model, "config", model)
    refuse_foreign(header["description"]["model"], identity(model), path)
    if isinstance(model, torch.nn.Module):
        _refuse_dtype(header["description"]["dtype"], model, path)
        remember(model)
    device = getattr(model, "device", "cpu") if device is None else device
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    whole = (torch.int16, torch.int32)
    tensors = {name: x.long() if x.dtype in whole else x for name, x in tensors.items()}
    policy = header["description"]["compacts_itself"]
    resumed = cls(compactor, config=config, **_resume(policy)) if compactor is not None and policy else None
    cache = cls._empty(config, None if resumed is None else resumed.policy)
    for index, (layer, kind) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        own = {n.removeprefix(f"layers.{index}."): x for n, x in tensors.items() if n.startswith(f"layers.{index}.")}
        if kind["type"] != type(layer).__name__:
            layer = cache.layers[index] = _plain_layer(kind["type"], layer, path)
        if isinstance(layer, CompactLayer):
            slots = _ragged(own) if "ragged.counts" in own else None
            rows = Packed(own["keys"], own["values"], own["slot_positions"], own.get("beta"), kind["logical"], slots)
            lengths = own.get("lengths")
            layer.fill(rows, kind["logical"], None if lengths is None else lengths.cpu(), own.get("live"))
        else:
            _restore(layer, own, kind)
    columns = tensors.get("columns")
    cache.columns.mask = None if columns is None else columns.cpu()
    cache.token_ids, cache.provenance = tensors.get("token_ids"), header["description"]["provenance"]
    return cache


def refuse_foreign(saved: dict[str, Any], own: dict[str, Any], path: str | Path) -> None:
    """Raise a ValueError that names all in which two models differ; names and weights only where both are known."""
    called = [side.get("name") or "a model without a name" for side in (saved, own)]
    for kind in ("name", "revision"):
        if not both_known(saved.get(kind, ""), own.get(kind, "")):
            saved, own = ({**side, kind: ""} for side in (saved, own))
    differ = [n for n in (*SHAPE_FIELDS, "name", "revision") if saved.get(n) != own.get(n)]
    if differ:
        listed = "; ".join(f"{name} {saved.get(name)!r} there, {own.get(name)!r} here" for name in differ)
        raise ValueError(f"{path} was made for another model ({listed}): load the model that read the context")
    apart = difference(saved.get("weights", ""), own.get("weights", ""))
    if apart is not None and apart > TOLERANCE:
        raise ValueError(
            f"{path} was made for other weights of the same shape ({called[0]} there, {called[1]} here; a sample of "
            f"them differs by {apart:.0%}): load the model that read the context, or compact the context with this one"
        )


def _refuse_dtype(saved: str, model: torch.nn.Module, path: str | Path) -> None:
    """Raise where a model would add keys of another dtype. What a quantised one computes in is not asked for."""
    own = str(model.dtype).removeprefix("torch.")
    if saved != own and not getattr(model, "is_quantized", False):
        raise ValueError(
            f"{path} holds keys and values in {saved}, and {model.config._name_or_path or 'the model'} runs in {own}: "
            f"load the model with dtype={saved}, or compact the context with it as it is"
        )


def _ragged(own: dict[str, torch.Tensor]) -> RaggedSlots:
    keys, values, beta = (own.get(f"ragged.{name}") for name in ("keys", "values", "beta"))
    where = own["ragged.positions"]
    where = where if where.is_floating_point() else where.int()
    return RaggedSlots(keys, values, where, beta, own["ragged.counts"].cpu())


def _resume(policy: dict[str, Any]) -> dict[str, Any]:
    ratio = policy["ratio"] if policy["slots"] is None else None
    return {**policy, "ratio": ratio, "reach": policy.get("reach") or math.inf}  # files of earlier versions have none


def _plain_layer(kind: str, layer, path):
    """A source cache made without a config kept whole states where a window would do."""
    from transformers import cache_utils

    if kind != "DynamicLayer" or isinstance(layer, CompactLayer):
        raise ValueError(f"{path} holds a {kind} where this model has a {type(layer).__name__}")
    return cache_utils.DynamicLayer()


def _restore(layer, state: dict[str, torch.Tensor], kind: dict[str, Any]) -> None:
    state = {name: tensor.clone() for name, tensor in state.items()}  # recurrent states are written in place
    if "keys" in state:
        layer.lazy_initialization(state["keys"], state["values"])
        layer.keys, layer.values = state["keys"], state["values"]
    for name, tensor in state.items():
        if "." not in name:
            continue
        states, index = name.split(".")
        if states == "conv_states":
            layer.lazy_initialization(conv_states=tensor, state_idx=int(index))
        else:
            layer.lazy_initialization(recurrent_states=tensor, state_idx=int(index))
        getattr(layer, states)[int(index)].copy_(tensor)
        layer.has_previous_state[int(index)] = True
    if "cumulative_length" in kind:
        layer.cumulative_length = kind["cumulative_length"]


def _stamp(path: Path) -> None:
    """Put the file's hash where its header has 64 zeros."""
    digest = _digest(path)
    with path.open("r+b") as file:
        head = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8 + head.index(NO_HASH.encode()))
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    """sha256 of a file as if its header carried 64 zeros for it."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        size = file.read(8)
        head = file.read(int.from_bytes(size, "little"))
        mark = b'\\"sha256\\": \\"'
        at = head.index(mark) + len(mark)
        sha.update(size + head[:at] + NO_HASH.encode() + head[at + 64 :])
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()

