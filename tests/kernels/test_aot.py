"""Every kernel that can be chosen compiles for Ampere, Hopper and Blackwell on a machine without a GPU, and fits.

`python tests/kernels/aot.py OPERATION CAPABILITY [PATTERN]` prints what these tests assert on. An operation joins by a
module `aot_OPERATION.py` that has `CALLS`; a kernel whose name is in its `SCALAR` has no matrix product to speak of.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from aot import TENSOR_CORES, run

SHARED = {8: 99 * 1024, 9: 227 * 1024, 10: 227 * 1024}
"""Bytes of shared memory that a block may have; programs for sm_80 also run on sm_86 and sm_89, which have less."""
OPERATIONS = sorted(file.stem.removeprefix("aot_") for file in Path(__file__).parent.glob("aot_*.py"))
SAMPLES = {
    "latent_attention": "bf16 d128 rotary 128 many",
    "prefix_attention": "decode bf16 d128$|read bf16 d128$",
    "rope": "strip_rope bf16 d128 rotary 128",
}

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


def check(operation, capability, pattern=""):
    kernels = run(operation, capability, pattern)
    assert kernels, f"no call of {operation} matches {pattern!r}"
    print(f"\n{operation} on sm_{capability[0]}{capability[1]}: registers, KiB of shared memory, bytes spilled")
    for each in kernels:
        used = f"{each['registers']:4d} {each['shared'] / 1024:6.1f} {each['spilled']:3d}"
        print(f"{used}  {each['kernel']}: {each['call']}")
    spilled = [each for each in kernels if each["spilled"]]
    assert not spilled, f"{len(spilled)} of {len(kernels)} spill: {spilled[:3]}"
    assert max(each["shared"] for each in kernels) <= SHARED[capability[0]]
    scalar = importlib.import_module(f"aot_{operation}").SCALAR
    matrix = [each for each in kernels if each["kernel"] not in scalar]
    assert all(each["mma"] for each in matrix), [each["call"] for each in matrix if not each["mma"]]
    assert not any({"LDL", "STL"} & each["sass"].keys() for each in kernels)
    assert all({"HMMA", "HGMMA", "UTCHMMA"} & each["sass"].keys() for each in matrix)
    return matrix


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_sample_compiles_for_hopper(operation):
    check(operation, (9, 0), SAMPLES.get(operation, "bf16"))


@pytest.mark.full
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_everything_compiles_without_spills(operation, capability):
    matrix = check(operation, capability)
    if matrix and capability[0] > 8:  # tiles of 64 rows and more use the instructions of the generation
        assert any(TENSOR_CORES[capability[0]] in each["mma"] for each in matrix)
    for each in matrix:
        if capability[0] == 9 and operation == "latent_attention" and "bf16 d128 rotary 128 " in each["call"]:
            assert "HGMMA" in each["sass"] or each.get("SOURCE"), each
