from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def lab() -> Path:
    """Real LAB tasks and graded runs, which lie beside the checkout and are not part of it."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "lab"
    if not folder.is_dir():
        pytest.skip("real LAB data is not here: ../shared/lab is absent")
    return folder
