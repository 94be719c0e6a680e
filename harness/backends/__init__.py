"""What crosses a boundary, behind one protocol (`harness.types.Backend`): text, slots, or both."""

from __future__ import annotations

from typing import Any

from ...eval.tasks import LabTask
from ..run_config import RunConfig
from ..types import Backend, Policy

NEEDS_SLOTS = ("memo_kv", "kv", "hybrid")


def make(config: RunConfig, policy: Policy, method: Any = None, task: LabTask | None = None) -> Backend:
    """The backend that a config names, for a policy that can serve it.

    Args:
        config: names it, its budget and its method.
        policy: the model that will play.
        method: for kv and hybrid: a `still.methods.Method`, ready to compact; made from its name unless given.
        task: for memo_oracle: the task with its rubric, which no other backend is given.

    Raises:
        ValueError: there is no such backend or method, the policy cannot serve it, or the budget fits nothing.
    """
    if config.backend in NEEDS_SLOTS:
        from .kv import Hybrid, Kv, MemoKv

        if "kv" not in policy.capabilities:
            raise ValueError(
                f"the backend {config.backend} compacts keys and values, which {policy.name} does not show: take a "
                f"local model, or one of full, plain, none, trim and memo"
            )
        if config.backend == "memo_kv":
            return MemoKv(config, policy)
        return (Kv if config.backend == "kv" else Hybrid)(config, policy, method)
    if config.backend == "memo_oracle":
        from .oracle import OracleMemo

        if task is None:
            raise ValueError("the backend memo_oracle knows the rubric: give the task")
        return OracleMemo(config, policy, task)
    from .text import Memo, Nothing, Trim, Uncompacted

    kinds = {"full": Uncompacted, "plain": Uncompacted, "none": Nothing, "trim": Trim, "memo": Memo}
    return kinds[config.backend](config, policy)
