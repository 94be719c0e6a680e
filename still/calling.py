"""What models differ in when they are called part by part.

The argument of a cache: transformers 5.24 renamed it, and will drop the old name. And what some do to their logits.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch


def passing(model, cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument that a forward of `model` takes it by: `cache`, or `past_key_values`.

    Args:
        model: a causal language model, or its decoder.
        cache: any cache, or None.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return {_name(type(decoder)): cache}


@lru_cache(maxsize=64)
def _name(kind: type) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def logits_of(model, states: torch.Tensor) -> torch.Tensor:
    """Logits `[..., vocabulary]` of last hidden states `[..., width]`, scaled and capped as by the model's own forward.

    Granite divides them by `logits_scaling`, HyperCLOVA X multiplies them by it, Cohere by `logit_scale` and Falcon-H1
    by `lm_head_multiplier`, and Gemma caps them softly at `final_logit_softcapping`.
    """
    logits, config = model.get_output_embeddings()(states), model.config.get_text_config(decoder=True)
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    scale *= scaling if config.model_type == "hyperclovax" else 1 / scaling
    if scale != 1:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()
