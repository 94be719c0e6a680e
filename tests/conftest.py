"""What every test gets: no network, a quiet tokenizer, figures without a screen, a fixed seed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture(autouse=True)
def _seed() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the source tree that the tests belong to."""
    return Path(__file__).resolve().parent.parent
