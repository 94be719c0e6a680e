"""Kernels run on a GPU where there is one, and in Triton's interpreter where there is none."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Poisoned:
    """Within it fresh memory holds NaN, so that a value which a kernel forgets to write is seen."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *problem: object) -> None:
        torch.use_deterministic_algorithms(self.before[0])
        torch.utils.deterministic.fill_uninitialized_memory = self.before[1]


@pytest.fixture
def poisoned(device: torch.device) -> Poisoned:
    return Poisoned(device)
