"""One choice between kernel and reference: by device, dtype and shape, with an override and one log line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from still.kernels import dispatch

X = torch.zeros(2, 3)


def test_reference_runs_on_a_cpu_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO):
        assert not any(dispatch.runs_triton("an_operation", [X]) for _ in range(3))
    lines = [record for record in caplog.records if "an_operation" in record.message]
    assert len(lines) == 1
    assert lines[0].levelno == logging.INFO
    assert "not on cpu" in lines[0].message or "not installed" in lines[0].message


@pytest.mark.skipif(not dispatch.importlib.util.find_spec("triton"), reason="needs triton")
def test_the_override_forces_and_refuses():
    with dispatch.use("triton"):
        assert dispatch.runs_triton("forced", [X])
        with pytest.raises(ValueError, match=r"forced cannot run on shapes \[2, 3\]: head dim 7"):
            dispatch.runs_triton("forced", [X], obstacle=lambda: "head dim 7")
        with pytest.raises(ValueError, match=r"not torch\.float64"):
            dispatch.runs_triton("forced", [X.double()])
        with dispatch.use("reference"):
            assert not dispatch.runs_triton("forced", [X])
        assert dispatch.runs_triton("forced", [X])
    assert not dispatch.runs_triton("forced", [X])


def test_a_forced_kernel_without_a_device_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._missing.cache_clear()
    with dispatch.use("triton"), pytest.raises(ValueError, match=r"not on cpu|not installed"):
        dispatch.runs_triton("forced", [X])
    dispatch._missing.cache_clear()


def test_the_environment_variable(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.mode() == "reference"
    with dispatch.use("auto"):
        assert dispatch.mode() == "auto"
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="STILL_KERNELS is 'cuda'; it must be one of auto, triton, reference"):
        dispatch.mode()


def test_kernels_import_and_run_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import logging; logging.basicConfig(level=logging.INFO)
import torch, still.kernels
from still.kernels.prefix_attention import prefix_attention
x = torch.ones(1, 1, 2, 16)
print(prefix_attention(x, x, x)[0].sum().item())
"""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 32.0
    assert done.stderr.count("triton is not installed") == 1


def test_nothing_is_launched_on_an_empty_grid():
    dispatch.launch(None, (4, 0, 1), X)
