"""Steps whose gradients and optimizer states lie in shards, by FSDP2 or DeepSpeed, and whose weights are whole.

Processes play different tasks, and have different numbers of micro-batches and of forwards behind slots, so that no
forward or backward may wait for the other processes: weights are whole from rollouts to the last backward, every
backward of a step keeps its gradients to itself, and they are reduced to shards once. ZeRO calls that stages 1 and 2.
FSDP2 gathers its weights before a step, and reduces in one more backward, over nothing, the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..windows import IGNORE
from .model import RowModel, Share


@dataclass
class Nothing:
    """A row of two tokens; with a scale of 0 it adds nothing, and its forward and backward are the same everywhere."""

    input_ids: list[int] = field(default_factory=lambda: [0, 0])
    labels: list[int] = field(default_factory=lambda: [IGNORE, 0])
    token_kind: list[int] = field(default_factory=lambda: [0, 1])
    logprobs: list[float] = field(default_factory=lambda: [0.0, 0.0])
    prefix_plan: list = field(default_factory=list)
    temperature: float = 1.0
    weight: float = 1.0


NOTHING = Share(Nothing(), 0.0, 0.0, torch.zeros(()))


def parts(module: nn.Module) -> list[FSDPModule]:
    """What was sharded; empty without FSDP."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def prepare(module: nn.Module) -> None:
    """Settle a module that was just sharded: no forward gives weights away, and its root is the whole."""
    found = parts(module)
    for part in found:
        part.set_reshard_after_forward(False, recurse=False)
        if next(part.parameters()).device.type == "cpu":
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no mean
    if found:
        with torch.no_grad():
            module([NOTHING])


def gather(module: nn.Module) -> None:
    """Make all weights whole; every process calls this."""
    for part in parts(module):
        part.unshard()


def scatter(module: nn.Module) -> None:
    """Keep shards alone; every process calls this."""
    for part in parts(module):
        part.reshard()


def hold_gradients(module: nn.Module, hold: bool) -> None:
    """Whether backward passes leave gradients unreduced and weights whole, until one may reduce them."""
    for part in parts(module):
        part.set_requires_gradient_sync(not hold, recurse=False)
        part.set_reshard_after_backward(not hold, recurse=False)


def check_fsdp(module: RowModel, plugin: Any) -> None:
    """Refuse what FSDP cannot shard.

    Raises:
        ValueError: adapters or a compactor train, or it is FSDP1, whose weights are never whole.
    """
    if plugin.fsdp_version != 2:
        raise ValueError("rows train with FSDP2, whose weights can be held whole: set fsdp_version: 2")
    if hasattr(module.policy, "peft_config") or module.mode != "frozen":
        raise ValueError(
            "adapters are small and compactors have scalars, which FSDP does not shard: train them with DDP "
            "(harness/configs/ddp.yaml)"
        )


def check_deepspeed(module: RowModel, config: Mapping[str, Any], engine: type) -> None:
    """Refuse what DeepSpeed cannot do with rows.

    Args:
        module: policy and compactor.
        config: DeepSpeed's own.
        engine: its class.

    Raises:
        ValueError: a compactor trains, weights are sharded too, the engine would turn the model into 16 bits, or it is
            one that cannot reduce the gradients of several micro-batches at once.
    """
    if not hasattr(engine, "coalesce_grad_reduction"):
        raise ValueError("this DeepSpeed reduces gradients in every micro-batch: pip install 'deepspeed>=0.19.8'")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2):
        raise ValueError(
            f"zero_stage is {stage}; rows train with 1 or 2: weights are whole for rollouts, and processes have "
            f"different numbers of forwards (harness/configs/deepspeed.yaml)"
        )
    if module.mode != "frozen":
        raise ValueError("compactors have scalars, which DeepSpeed does not broadcast: take harness/configs/ddp.yaml")
    narrow = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True]
    if narrow:
        raise ValueError(f"DeepSpeed's {narrow[0]} casts the weights that play and train: leave mixed_precision 'no'")


@contextmanager
def reducing_once(
    model: nn.Module, accelerator: Any
) -> Iterator[tuple[Callable[[], AbstractContextManager], Callable[[torch.Tensor], None]]]:
    """The backward passes of one step, whose gradients the processes reduce once, however many passes each has.

    Args:
        model: as accelerate wrapped it.
        accelerator: that wrapped it.

    Yields:
        What goes around forward and backward of all micro-batches but the last, and how to go backward from a loss.
    """
    if parts(model):
        hold_gradients(model, True)
        yield nullcontext, accelerator.backward
        hold_gradients(model, False)
        accelerator.backward(model([NOTHING]).loss)
        scatter(model)
    elif accelerator.distributed_type == "DEEPSPEED":  # its own backward: accelerate's steps each time
        with model.coalesce_grad_reduction():
            yield nullcontext, model.backward
        model.step()
    else:
        yield partial(accelerator.no_sync, model), accelerator.backward


def whole_state(module: nn.Module) -> dict[str, torch.Tensor] | None:
    """All weights on the CPU by name, or None without FSDP; every process calls this."""
    if not parts(module):
        return None
    scatter(module)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for name, p in module.named_parameters()
    }


@torch.no_grad()
def assign(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into a module's parameters by name, sharded or not; every process calls this."""
    scatter(module)
    own = {**dict(module.named_buffers()), **dict(module.named_parameters(remove_duplicate=False))}
    for name, tensor in state.items():
        mine = own[name]
        if isinstance(mine, DTensor):
            tensor = distribute_tensor(tensor.to(mine.device), mine.device_mesh, mine.placements, src_data_rank=None)
        mine.copy_(tensor)
