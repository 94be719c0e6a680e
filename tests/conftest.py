"""What every test gets: no network, a quiet tokenizer, figures without a screen, a fixed seed, kernels interpreted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from still import memory

memory.keep_freed()  # as commands do

# Triton reads it when a kernel is made, its own library's at its first import: no test file may come before.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the source tree that the tests belong to."""
    return Path(__file__).resolve().parent.parent
