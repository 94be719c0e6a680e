"""Losses on trained tokens, and what each row of an optimizer step counts.

A loss of a step is `sum over rows of scale(row) * sum over its trained tokens of loss(token)`. The scales come from the
whole step, so cutting a trajectory into windows, splitting the step into micro-batches, accumulating and padding all
leave the gradient as it is. A mean per row would not (a trajectory that is cut into more windows would weigh more), so
it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NORMALISERS = ("token", "trajectory", "constant")


@dataclass(frozen=True)
class Counted:
    """What the normaliser needs of a row.

    Attributes:
        trajectory: of which it is a window.
        tokens: trained tokens, each as often as it weighs.
    """

    trajectory: str
    tokens: float


def row_scales(rows: Sequence[Counted], normaliser: str = "token", constant: float = 0.0) -> list[float]:
    """What the summed token losses of each row are multiplied by.

    Args:
        rows: every row of the optimizer step, over all micro-batches and processes.
        normaliser: "token" divides by the trained tokens of the step; "trajectory" by those of the row's trajectory and
            then by the trajectories; "constant" by `constant` times the trajectories (Dr. GRPO).
        constant: tokens, for "constant".

    Raises:
        ValueError: nothing is trained, or there is no such normaliser.
    """
    if normaliser in ("row", "window", "per_row"):
        raise ValueError(
            f"normaliser={normaliser!r} takes a mean per row, which changes the gradient's direction when a trajectory "
            f"is cut into windows; take one of {', '.join(NORMALISERS)}"
        )
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser is {normaliser!r}; it is one of {', '.join(NORMALISERS)}")
    totals: dict[str, float] = {}
    for row in rows:
        totals[row.trajectory] = totals.get(row.trajectory, 0.0) + row.tokens
    if not sum(totals.values()) > 0:
        raise ValueError(f"no token of the {len(rows)} rows of this step is trained: every mask is zero")
    if normaliser == "token":
        return [1.0 / sum(totals.values())] * len(rows)
    trajectories = sum(total > 0 for total in totals.values())
    if normaliser == "trajectory":
        return [1.0 / (totals[row.trajectory] * trajectories) if totals[row.trajectory] else 0.0 for row in rows]
    if not constant > 0:
        raise ValueError(f"normaliser='constant' divides by a number of tokens above 0; constant is {constant}")
    return [1.0 / (constant * trajectories)] * len(rows)


def sft_loss(logprobs: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each trained token.

    Args:
        logprobs: of the trained tokens under the model `[tokens]`.

    Returns:
        `[tokens]`, nats.
    """
    return -logprobs


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped policy-gradient loss and what a run logs of it.

    Attributes:
        loss: of each token `[tokens]`.
        clipped: tokens whose ratio was clipped where that mattered.
        truncated: tokens whose ratio was cut at the cap.
        gap: mean absolute difference to the log-probabilities at sampling, nats.
        ratio: mean ratio.
        kl: mean of the KL estimate, 0 without a reference.
    """

    loss: torch.Tensor
    clipped: int
    truncated: int
    gap: float
    ratio: float
    kl: float


def policy_loss(
    logprobs: torch.Tensor,
    sampled: torch.Tensor,
    advantage: float | Sequence[float] | torch.Tensor,
    *,
    low: float = 0.2,
    high: float = 0.28,
    cap: float = 4.0,
    kl: float = 0.0,
    reference: torch.Tensor | None = None,
) -> PolicyLoss:
    """Ratios per token against the engine's log-probabilities, clipped (PPO, DAPO's uneven bounds) and truncated.

    Args:
        logprobs: under the model that trains `[tokens]`.
        sampled: when the tokens were sampled `[tokens]`.
        advantage: of the trajectory, or of each token `[tokens]`.
        low: the ratio is clipped below `1 - low`.
        high: and above `1 + high`.
        cap: no token counts with a ratio above this, whatever its advantage.
        kl: weight of the KL to the reference (the k3 estimate).
        reference: log-probabilities under the reference `[tokens]`; needed where `kl` is not 0.

    Raises:
        ValueError: a log-probability is not finite, or there is no reference for the KL.
    """
    if not torch.isfinite(sampled).all():
        bad = int((~torch.isfinite(sampled)).sum())
        raise ValueError(
            f"{bad} of {sampled.numel()} trained tokens have no log-probability from sampling: roll out with a policy "
            f"that gives them, and retry memos at the sampling temperature"
        )
    difference = logprobs - sampled
    ratio = difference.exp()
    advantage = torch.as_tensor(advantage, dtype=ratio.dtype, device=ratio.device)
    kept = ratio.clamp(max=cap)
    bounded = kept.clamp(1 - low, 1 + high)
    gain = torch.minimum(kept * advantage, bounded * advantage)
    loss, estimate = -gain, torch.zeros(())
    if kl:
        if reference is None:
            raise ValueError(f"kl is {kl}, and there are no log-probabilities of a reference")
        back = reference - logprobs
        estimate = back.exp() - back - 1
        loss = loss + kl * estimate
    with torch.no_grad():
        clipped = int(((bounded * advantage) < (kept * advantage)).sum())
        truncated = int((ratio > cap).sum())
        return PolicyLoss(
            loss, clipped, truncated, difference.abs().mean().item(), ratio.mean().item(), estimate.mean().item()
        )


def token_weights(kinds: torch.Tensor, memo_weight: float, memo_kind: int) -> torch.Tensor:
    """What each token weighs: memo tokens are few and decide what the rest can see, so they may weigh more.

    Args:
        kinds: of the trained tokens `[tokens]`.
        memo_weight: of memo tokens.
        memo_kind: their kind.
    """
    if not (math.isfinite(memo_weight) and memo_weight > 0):
        raise ValueError(f"memo_weight is {memo_weight}; masked memos degenerate, so it must be above 0")
    return torch.where(kinds == memo_kind, memo_weight, 1.0)
