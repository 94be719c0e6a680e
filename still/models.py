"""Names of models: what a plug-in calls its own, else anything that Hugging Face's `from_pretrained` takes.

A package names its models in the entry-point group `still.models`; each entry loads a function that takes the
name and returns a `NamedModel`. `still` only looks names up.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUP, ADAPTER = "still.models", "adapter_config.json"


@dataclass(frozen=True)
class NamedModel:
    """What a plug-in's name stands for.

    Attributes:
        name: the full name, version included, as result files print it.
        path: folder with config, weights and tokenizer, in Hugging Face's layout.
        compactors: folders of trained compactors, best first; the first is the default.
    """

    name: str
    path: Path
    compactors: tuple[Path, ...] = ()


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model ready to read, with its tokenizer.

    Attributes:
        name: as result files print it.
        model: in evaluation mode, gradients off.
        tokenizer: the model's own.
        compactors: folders of the compactors that came with the name, best first.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    compactors: tuple[Path, ...] = ()


def names() -> list[str]:
    """The names that installed packages declare."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def find(name: str) -> NamedModel | None:
    """What `name` stands for, or None when no package declares it."""
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return entry.load()(name)
    return None


def load(
    name: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, by a plug-in's name, a folder, or a Hub id.

    Args:
        name: `pocket`, `./my-model`, `Qwen/Qwen3-0.6B`; or a folder with an adapter (peft), which is merged into its
            base.
        device: default: the first GPU if there is one, else the CPU.
        dtype: `"auto"` is what the weights were saved in.
        attn_implementation: as transformers takes it, or `"still"` for caches with beta.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: the name is neither declared, nor a folder with a model, nor on the Hub.
        ModuleNotFoundError: it is an adapter, and peft is not installed.
        ValueError: there is no such dtype or device, or a file of the model is damaged.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .weights import remember

    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(target)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; take float32, bfloat16, float16, or auto")
    named = find(name)
    where = str(named.path) if named else name
    if (Path(where) / ADAPTER).is_file() and not (Path(where) / "config.json").exists():
        return _with_adapter(where, device, dtype, attn_implementation)
    if Path(where).is_dir() and not (Path(where) / "config.json").exists():
        raise FileNotFoundError(f"the folder {where} holds no model that transformers can load: it has no config.json")
    if attn_implementation == "still":
        from .attention import register

        register()
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(where, revision=revision, **options)
    except OSError as problem:
        raise FileNotFoundError(_not_found(name, problem)) from problem
    except (SafetensorError, json.JSONDecodeError) as problem:
        raise ValueError(f"a file of the model {name} is damaged ({problem}): copy it again") from problem
    model = model.to(target).eval().requires_grad_(False)
    if named:
        # Where it lies is no name on another machine; adapters write down the second one.
        model.config._name_or_path = model.name_or_path = named.name
    remember(model)
    return LoadedModel(named.name if named else name, model, tokenizer, named.compactors if named else ())


def _with_adapter(folder: str, device, dtype, attn_implementation: str | None) -> LoadedModel:
    """A model with the adapter in a folder merged into it, and the folder's tokenizer."""
    from transformers import AutoTokenizer

    try:
        from peft import PeftModel
    except ModuleNotFoundError as problem:
        raise ModuleNotFoundError(f"{folder} is an adapter and needs peft: pip install 'still-kv[train]'") from problem
    base = json.loads((Path(folder) / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        loaded = load(base, device, dtype, attn_implementation)
    except FileNotFoundError as problem:
        raise FileNotFoundError(f"{folder} is an adapter of {base}, and {problem}") from problem
    model = PeftModel.from_pretrained(loaded.model, folder).merge_and_unload().eval().requires_grad_(False)
    tokenizer = loaded.tokenizer
    if (Path(folder) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return replace(loaded, name=folder, model=model, tokenizer=tokenizer)


def _check_device(name: str | torch.device) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as problem:  # an assertion where torch was built without it
        reason = str(problem).splitlines()[0]
        here = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"device is {str(name)!r}, which is not here ({reason}); there is {here}") from problem


def _not_found(name: str, problem: OSError) -> str:
    known = ", ".join(names()) or "none"
    if Path(name).is_dir():
        return f"the folder {name} holds no model that transformers can load: {str(problem).splitlines()[0]}"
    reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    near = difflib.get_close_matches(name, names(), 1)
    told = f"no model {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    return f"{told}: not a name that comes with still ({known}), not a folder, and the Hub says: {reason}"
