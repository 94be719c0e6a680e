"""Configuration of a compactor, to and from JSON. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields

UNEQUAL = "unequal"


@dataclass
class StillConfig:
    """What a compactor is and what it was trained on.

    The defaults are the canonical set-up of the STILL paper (arXiv 2606.07878).

    Attributes:
        bank: trained slots per KV head; other counts resample the bank along the slot axis.
        chunk: longest context, in tokens, that one pass was trained on; longer ones are read in chunks.
        blocks: cross- plus self-attention blocks.
        latent_width: width of a latent; None is twice the head dim, where the identity start is defined.
        feed_forward: hidden width of a feed-forward part after each block, 0 for none.
        beta: learn an additive pre-softmax bias per slot.
        shared_bank: one bank for all KV heads of a layer.
        fractional_positions: leave latent positions between tokens instead of rounding them.
        learned_scale: learn the attention scale of each block, from its fixed start `latent_width`.
        open_start: begin the parts that add nothing at first (later blocks, self-attention) with random queries and
            keys and a scale of 8, so that gradients reach them; the start stays the identity. With the canonical
            start they are saturated copies of one direction.
        first_scale: attention scale at which the first cross-attention starts; None is the canonical `latent_width`. A
            lower one mixes neighbouring tokens at first, so that gradients tell which of them to keep; the fresh
            compactor is then no exact copy.
        placement: hidden width of a scorer that chooses the tokens at which latents stand (`still.placement`), so that
            heads share the tokens worth keeping among them; 0 spreads latents evenly, alike in all heads, as published.
            Slots are rotated at even positions either way.
        scout: full-attention layer whose scores place the latents of all layers, wherever whole contexts are compacted
            at once; layers that compact by themselves, as a cache grows, look for themselves. Fitting a placement
            chooses it; None if every layer always looks for itself.
        gain: learn, per KV head, how much louder a slot speaks the more tokens it stands for: keys and values are
            scaled by powers of `tokens / slots`, both 0 at the start. What one slot has to say for several heads or
            tokens depends on the ratio, which nothing else in a compactor sees.
        rms_eps: added to the mean square of a latent before its root.
        rope_base: base of the compactor's own rotary embedding.
        split: how slots are divided over layers and KV heads, as `still.budgets.Split.to_dict` has it, that the
            compactor was trained for beside the uniform one; None if there is none.
        base_model: name of the frozen model; `base_revision` its commit, `base_fingerprint` a hash of its shape,
            `base_weights` a sample of its weights (`still.weights`), empty where there is none.
        trained_lengths: shortest and longest context drawn in training; empty before training.
        trained_ratios: compression ratios drawn in training.
        seed: seed of the training run.
        steps: optimizer steps taken, those of the compactor that it went on from among them.
    """

    bank: int = 128
    chunk: int = 1024
    blocks: int = 2
    latent_width: int | None = None
    feed_forward: int = 0
    beta: bool = False
    shared_bank: bool = False
    fractional_positions: bool = False
    learned_scale: bool = False
    open_start: bool = False
    first_scale: float | None = None
    placement: int = 0
    scout: int | None = None
    gain: bool = False
    rms_eps: float = 1e-3
    rope_base: float = 10.0
    split: dict | None = None
    base_model: str = ""
    base_revision: str = ""
    base_fingerprint: str = ""
    base_weights: str = ""
    trained_lengths: list[int] = field(default_factory=list)
    trained_ratios: list[float] = field(default_factory=list)
    seed: int | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        for name in ("bank", "chunk", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("feed_forward", "placement"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a width, or 0 for none")
        if self.first_scale is not None and self.first_scale <= 0:
            raise ValueError(f"first_scale is {self.first_scale}; it must be above 0, or None for the latent width")
        if self.rms_eps <= 0 or self.rope_base <= 1:
            raise ValueError(f"rms_eps is {self.rms_eps} and rope_base {self.rope_base}; they must be above 0 and 1")

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> StillConfig:
        """Read `to_json`'s text.

        Raises:
            ValueError: the text is no JSON object, or has a key that this version does not know.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the compactor's config is no JSON ({error}): is the file whole?") from error
        if not isinstance(values, dict):
            raise ValueError(f"the compactor's config is a JSON {type(values).__name__}; it must be an object")
        unknown = set(values) - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)} in the compactor's config; a newer version wrote it?")
        return cls(**values)


def field_of(config, name: str):
    """A field of a model's config, or None; `"unequal"` where its layers differ in it."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # what transformers raises for a field that has no one value
        return UNEQUAL


def fingerprint(model) -> str:
    """Sixteen hex digits of everything in a model's config that shapes its KV cache."""
    config = model.config.get_text_config(decoder=True)
    shape = {
        name: field_of(config, name)
        for name in (
            "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "rope_parameters", "layer_types", "sliding_window",
        )
    }  # fmt: skip
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]
