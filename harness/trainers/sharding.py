"""FSDP2 for rows: gradients and optimizer states lie in shards, and weights are whole from rollouts to last backward.

Processes play different tasks, and have different numbers of micro-batches and of forwards behind slots, so that no
forward or backward may wait for the other processes. Weights are therefore gathered before a step, every backward of
the step keeps its gradients to itself, and one more over nothing, the same everywhere, reduces them to shards. This is
what ZeRO calls stage 2. Without FSDP all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..windows import IGNORE
from .model import Share


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


NOTHING = Share(Nothing(), 0.0, 0.0, torch.zeros(1))


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
