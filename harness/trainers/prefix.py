"""The cache before a row's first token, made again from its plan as the rollout made it, with gradients if asked for.

The windows' raw keys and values are constants (the model reads them without gradients); the slots that a compactor
makes of them are not, so the loss of a later window reaches the compactor through every slot that is in view. With
`recompact` slots of slots are made: gradients stop at the boundary before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache

from ...cache import StillCache
from ...cache_layer import CompactLayer
from ...cache_ragged import RaggedSlots
from ...cache_states import copy_state
from ...calling import passing
from ...methods.base import Method
from ...reading import capture_queries
from ...rope import layer_kinds
from ...types import CompactKV
from ..backends.slots import SlotMaker, called, exact_cache


def check_method(row: Any, method: Method | None) -> None:
    """Refuse a row whose slots another method made.

    Raises:
        ValueError: names both.
    """
    if row.prefix_method and (method is None or called(method) != row.prefix_method):
        given = "none was given" if method is None else f"{called(method)} was given"
        raise ValueError(
            f"window {row.window} of {row.trajectory_id} goes on behind slots of {row.prefix_method}, and {given}"
        )


def rebuild(
    model,
    method: Method | None,
    prefix_ids: Sequence[int],
    plan: Sequence[dict[str, Any]],
    gradients: bool = False,
    known: dict[tuple, StillCache] | None = None,
) -> StillCache:
    """The cache of S, U and slots that a window began behind.

    Args:
        model: the policy, in evaluation mode.
        method: that made the slots; None where the plan needs none.
        prefix_ids: all tokens before the window.
        plan: see `WindowRow.prefix_plan`.
        gradients: let them flow to the method's compactor.
        known: caches of prefixes that were made with these weights, and with gradients or without alike, filled as they
            are made; rollouts of a group have many in common.

    Raises:
        ValueError: the plan does not fit the ids.
    """
    if not plan or plan[0]["keep"] != "exact" or plan[-1]["end"] != len(prefix_ids):
        raise ValueError(f"the plan {plan} does not cover the {len(prefix_ids)} tokens of the prefix from S and U on")
    known = {} if known is None else known
    maker = SlotMaker(method, model) if method is not None else None
    base = plan[0]["end"]
    held = None
    for number, step in enumerate(plan):
        key = _key(prefix_ids, plan[: number + 1])
        if key not in known:
            made = exact_cache(model, prefix_ids[:base]) if not number else None
            ids = prefix_ids[step["start"] : step["end"]]
            known[key] = made or _cross(model, maker, held, base, ids, step, gradients)
        held = known[key]
    return held


def _key(prefix_ids: Sequence[int], plan: Sequence[dict[str, Any]]) -> tuple:
    """What the cache behind the last step of a plan is known by."""
    return tuple(prefix_ids[: plan[-1]["end"]]), str(plan)


def note_exact(known: dict[tuple, StillCache], model, row: Any, full: Cache) -> None:
    """Take S and U of a row behind slots from a full cache that begins with them; see `rebuild`."""
    key = _key(row.prefix_ids, row.prefix_plan[:1])
    if key not in known:
        known[key] = exact_cache(model, row.prefix_ids[: row.prefix_plan[0]["end"]], full)


def _cross(
    model, maker: SlotMaker | None, held: StillCache, base: int, ids: Sequence[int], step: dict, gradients: bool
) -> StillCache:
    """Read a window behind what is held, and compact it."""
    queries: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        reading = held.clone()
        first = reading.logical_length
        inputs = torch.tensor([list(ids)], device=model.device)
        decoder = model.get_decoder()
        needs_queries = maker is not None and maker.method.needs_queries
        with capture_queries(decoder, queries) if needs_queries else nullcontext():
            decoder(input_ids=inputs, **passing(decoder, reading), use_cache=True)
    positions = torch.arange(first, first + len(ids), device=model.device)
    raw = {layer.index: layer.raw()[:2] for layer in reading.compact_layers}
    with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
        if step["keep"] == "append":
            layers, where = maker.append(raw, positions, step["slots"], queries)
            cache, tokens = held.clone(), len(ids)
        elif step["keep"] == "recompact":
            layers, where = maker.recompact(reading, base, raw, positions, step["slots"])
            cache, tokens = _fresh(model, held, base), first + len(ids) - base
        elif step["keep"] == "columns":
            part = slice(step["first"] - step["start"], step["last"] - step["start"])
            layers = {i: CompactKV(k[:, :, part].clone(), v[:, :, part].clone()) for i, (k, v) in raw.items()}
            cache, where, tokens = _fresh(model, held, base), positions[part], first + len(ids) - base
        else:
            raise ValueError(f"the plan keeps {step['keep']!r}; it knows exact, append, recompact and columns")
        cache.append_compact(layers, tokens, positions=where, source=reading)
    return cache


def _fresh(model, held: StillCache, base: int) -> StillCache:
    """S and U of a cache alone."""
    layers = {layer.index: CompactKV(layer.keys[:, :, :base].detach(), layer.values[:, :, :base].detach())
              for layer in held.compact_layers}  # fmt: skip
    return StillCache.from_layers(model.config, layers, base, source=held, positions=torch.arange(base))


STORED = ("keys", "values", "beta")
"""Tensors of a layer, and of its ragged slots, that gradients reach."""


class ReadOnlyLayer(CompactLayer):
    """A layer that shows its slots to a forward and stores nothing, so that a checkpoint's replay sees the same."""

    def update(self, key_states, value_states, *args, **kwargs):
        """What the forward attends to."""
        before = self.keys, self.values, self.logical
        try:
            return super().update(key_states, value_states, *args, **kwargs)
        finally:
            self.keys, self.values, self.logical = before


def read_only(cache: StillCache) -> StillCache:
    """A view of a cache for one forward over a whole row; it shares the slots, and their gradients.

    Layers that keep a state of their own (sliding windows, recurrent ones) are copied, so they serve one forward.
    """
    view = StillCache._empty(cache.model_config, None)
    view.layers = [_shared(layer) if isinstance(layer, CompactLayer) else copy_state(layer) for layer in cache.layers]
    return view


def _shared(layer: CompactLayer) -> ReadOnlyLayer:
    other = ReadOnlyLayer(layer.index, layer.config)
    for name in (*STORED, "ragged", "slot_positions", "logical", "is_initialized", "dtype", "device"):
        setattr(other, name, getattr(layer, name))
    return other


Slots = list[tuple[torch.Tensor, torch.Tensor]]
"""What a compactor made, each tensor beside the one that a forward sees in its place."""


def made_by_compactor(cache: StillCache, apart: bool) -> tuple[StillCache, Slots]:
    """A view of a cache for a forward, and the slots in it that a compactor made, with gradients.

    Args:
        cache: with slots.
        apart: the forward sees leaves in their place, so that a loss behind it reaches no compactor by itself.
    """
    view, slots = read_only(cache), []
    for layer, own in zip(cache.layers, view.layers, strict=True):
        if not isinstance(own, ReadOnlyLayer):
            continue
        for name, seen in _made(layer, slots, apart).items():
            setattr(own, name, seen)
        if layer.ragged is not None:
            own.ragged = replace(layer.ragged, **_made(layer.ragged, slots, apart))
    return view, slots


def _made(holder: CompactLayer | RaggedSlots, slots: Slots, apart: bool) -> dict[str, torch.Tensor]:
    made = {name: x for name in STORED if (x := getattr(holder, name)) is not None and x.requires_grad}
    seen = {name: x.detach().requires_grad_() if apart else x for name, x in made.items()}
    slots += [(x, seen[name]) for name, x in made.items()]
    return seen


def to_slots_alone(loss: torch.Tensor, slots: Slots, again: bool) -> torch.Tensor:
    """A loss whose gradient reaches slots, and no weight that the forward behind them uses.

    That forward is gone through backward at once; what is left of it is the gradient at the slots. Weights that are
    detached for the forward alone would not do: gradient checkpointing replays it when they are attached again.

    Args:
        loss: a scalar, of a forward over the view that came with the slots.
        slots: see `made_by_compactor`; of those that no compactor made there are none.
        again: another loss goes backward through the forward later; else what it kept is free now.
    """
    if not slots or not loss.requires_grad:
        return loss.detach()
    slopes = torch.autograd.grad(loss, [seen for _, seen in slots], retain_graph=again)
    reach = sum((made * slope).sum() for (made, _), slope in zip(slots, slopes, strict=True))
    return loss.detach() + (reach - reach.detach())


def check_replay(model) -> None:
    """Refuse slots under gradient checkpointing where a replay would not read the same states.

    Raises:
        ValueError: the model has layers whose state a replay would move on twice.
    """
    others = [layer for layer in layer_kinds(model.config) if layer != "full_attention"]
    if others:
        raise ValueError(
            f"gradient checkpointing behind slots replays layers, and {others[0]} layers keep a state that a replay "
            f"would move on twice: train this model without gradient checkpointing"
        )


def let_checkpoint_read(model) -> None:
    """Keep the read-only cache under gradient checkpointing: the replay reads the same states.

    Raises:
        ValueError: see `check_replay`.
    """
    check_replay(model)
    for module in model.get_decoder().modules():
        if hasattr(type(module), "gradient_checkpointing"):
            module._can_checkpoint_with_cache = True
