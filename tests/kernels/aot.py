"""Compile ahead of time, on a machine without a GPU, every kernel that a call would launch on a given GPU.

    python tests/kernels/aot.py prefix_attention 9.0 'bf16 d128'

makes the calls in `aot_prefix_attention.CALLS` whose names match, on meta tensors, chooses as on a GPU of compute
capability 9.0, and hands each launch to Triton's compiler and to its ptxas. One line of JSON for each kernel: what was
asked, registers a thread, bytes of shared memory, bytes of stack (which is where spills go), tensor-core instructions.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TENSOR_CORES = {8: r"mma\.sync", 9: r"wgmma\.mma_async", 10: r"tcgen05\.mma"}
"""By generation, in PTX; older kinds stay for blocks too small for the newer."""
MACHINE = ("HMMA", "HGMMA", "UTCHMMA", "LDL", "STL")
"""The same in machine code, after ptxas, and loads and stores of local memory, where spills would be."""


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: tuple[int, int]):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_calls(operation: str, capability: tuple[int, int], pattern: str = "") -> Iterator[dict[str, Any]]:
    """One record for each distinct kernel that the operation's calls launch."""
    import triton

    from still.kernels import dispatch

    triton.runtime.driver.set_active(Driver(capability))
    found: dict[str, tuple[str, Any, dict[str, Any]]] = {}
    for name, call in importlib.import_module(f"aot_{operation}").CALLS.items():
        if not re.search(pattern, name):
            continue

        def compile_kernel(kernel, grid, *args, name=name, **options):
            compiled = kernel.warmup(*args, grid=grid, **options)
            found.setdefault(compiled.hash, (name, compiled, options))

        with dispatch.compile_only(capability, compile_kernel):
            call()
    for name, compiled, options in found.values():
        yield {"call": name, "kernel": compiled.name, "capability": list(capability), **usage(compiled), **options}


def usage(compiled: Any) -> dict[str, Any]:
    """What one compiled kernel takes of a multiprocessor, and which matrix instructions it has."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text, code = (
            subprocess.run([tool, what, cubin.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    counts = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": counts["REG"],
        "shared": compiled.metadata.shared,
        "spilled": counts["STACK"] + counts["LOCAL"],
        "sass": {kind: code.count(f" {kind}") for kind in MACHINE if f" {kind}" in code},
        "mma": {kind: len(re.findall(kind, ptx)) for kind in TENSOR_CORES.values() if re.search(kind, ptx)},
    }


def run(operation: str, capability: tuple[int, int], pattern: str = "") -> list[dict[str, Any]]:
    """`compile_calls` in a process of its own: a process that interprets kernels cannot compile them."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, operation, f"{capability[0]}.{capability[1]}", pattern]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    asked = tuple(int(part) for part in sys.argv[2].split("."))
    for record in compile_calls(sys.argv[1], asked, *sys.argv[3:]):
        print(json.dumps(record, default=str), flush=True)
