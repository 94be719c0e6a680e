"""Which implementation of an operation runs: the Triton kernel or the PyTorch reference beside it.

`runs_triton` is asked once a call and decides by device, dtype and what the operation says of the shape. `use`, or the
environment variable STILL_KERNELS, overrides it. Triton is optional: nothing here imports it before a kernel runs.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

VARIABLE = "STILL_KERNELS"
MODES = ("auto", "triton", "reference")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = (8, 0)
"""The compute capability that the kernels are compiled and tuned for at the least."""

logger = logging.getLogger(__name__)

_mode: ContextVar[str | None] = ContextVar("still_kernels_mode", default=None)
_ahead: ContextVar[tuple[tuple[int, int], Callable[..., None]] | None] = ContextVar("still_kernels_ahead", default=None)


@contextmanager
def use(mode: str) -> Iterator[None]:
    """Override the choice inside the block: `"triton"`, `"reference"`, or `"auto"` for the default.

    `"triton"` raises where the kernel cannot run, instead of taking the reference.
    """
    token = _mode.set(_checked(mode, "use()"))
    try:
        yield
    finally:
        _mode.reset(token)


@contextmanager
def compile_only(capability: tuple[int, int], compile_kernel: Callable[..., None]) -> Iterator[None]:
    """Inside the block kernels are chosen as on a GPU of this compute capability, and compiled instead of run.

    Args:
        capability: for example (9, 0).
        compile_kernel: takes the kernel, its grid, its arguments and its options, in the place of every launch;
            outputs stay as they were allocated.
    """
    token = _ahead.set((capability, compile_kernel))
    try:
        with use("triton"):
            yield
    finally:
        _ahead.reset(token)


def mode() -> str:
    """The mode in force: that of `use`, else of the environment variable STILL_KERNELS, else `"auto"`."""
    return _mode.get() or _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def runs_triton(
    operation: str,
    tensors: Sequence[torch.Tensor],
    obstacle: Callable[[], str] = lambda: "",
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> bool:
    """Whether the Triton kernel of `operation` runs on these tensors, or its reference.

    Args:
        operation: the public function's name.
        tensors: its inputs; the first one's device decides, all share one.
        obstacle: says why the kernel does not take these shapes or strides, or nothing where it does; asked only where
            the machine could run it.
        dtypes: what the first tensor may hold.

    Raises:
        ValueError: the mode is `"triton"` and the kernel cannot run here; the message says why.
    """
    wanted = mode()
    if wanted == "reference":
        return False
    first = tensors[0]
    reason = _missing(first.device, _ahead.get() is not None, wanted == "triton") or obstacle()
    if not reason and first.dtype not in dtypes:
        reason = f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {first.dtype}"
    if not reason:
        return True
    if wanted == "triton":
        shapes = ", ".join(str(list(x.shape)) for x in tensors)
        raise ValueError(f"the Triton kernel of {operation} cannot run on shapes {shapes}: {reason}")
    _say(operation, reason, first.device.type)
    return False


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) elsewhere, which is the interpreter."""
    ahead = _ahead.get()
    if ahead is not None:
        return ahead[0]
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; of an H100 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a Triton kernel on the device of its first tensor: `kernel[grid](*args, **options)`.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along each axis; nothing runs where one of them is zero.
        *args: its positional arguments.
        **options: its constexprs, `num_warps` and `num_stages`.
    """
    if 0 in grid:
        return
    ahead = _ahead.get()
    if ahead is not None:
        ahead[1](kernel, grid, *args, **options)
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


@functools.cache
def _missing(device: torch.device, ahead: bool, forced: bool) -> str:
    """What this machine lacks to run any kernel on `device`; empty where it lacks nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (the extra `gpu` brings it)"
    if ahead or (forced and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return ""
    if device.type != "cuda" or torch.version.hip:
        return f"it runs on NVIDIA GPUs, not on {'an AMD GPU' if torch.version.hip else device.type}"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, not {torch.cuda.get_device_capability(device)}"
    return ""


@functools.cache
def _say(operation: str, reason: str, device: str) -> None:
    """One log line for each operation and reason; on a CPU the reference is what is expected."""
    level = logging.INFO if device == "cpu" else logging.WARNING
    logger.log(level, "%s runs as its PyTorch reference: the Triton kernel cannot run, %s", operation, reason)


def _checked(value: str, source: str) -> str:
    if value not in MODES:
        raise ValueError(f"{source} is {value!r}; it must be one of {', '.join(MODES)}")
    return value
