"""How well a compact cache answers held-out rows, teacher-forced, beside the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..budgets import Split
from .batches import Draw, make_batch
from .data import Row
from .objective import IGNORE, Distiller

NAMES = ("kl", "tokens", "right", "full_right", "questions")


@dataclass
class Scores:
    """Sums over held-out rows.

    Attributes:
        ratios: one line of `table` each.
        table: `[ratios, 5]`: KL in nats, answer tokens, questions answered right from the compact cache, from the
            full cache, and questions.
    """

    ratios: list[float]
    table: torch.Tensor = field(repr=False)

    def reduced(self, accelerator) -> Scores:
        """The sums over all processes."""
        table = accelerator.reduce(self.table.float().to(accelerator.device), "sum")
        return Scores(self.ratios, table.double().cpu())

    def metrics(self) -> dict[str, float]:
        """`kl` per answer token, `accuracy` (every token of an answer right), `full` (the same with the full cache)
        and `share` (accuracy / full), over all ratios and, with a suffix such as `_8x`, for each."""
        out = {}
        for suffix, row in [("", self.table.sum(0))] + [
            (f"_{ratio:g}x", row) for ratio, row in zip(self.ratios, self.table, strict=True)
        ]:
            kl, tokens, right, full, questions = row.tolist()
            out |= {f"kl{suffix}": kl / max(tokens, 1), f"accuracy{suffix}": right / max(questions, 1)}
            if not suffix:
                out["full"] = full / max(questions, 1)
            if full:
                out[f"share{suffix}"] = right / full
        return out


@torch.no_grad()
def score(
    distiller: Distiller,
    rows: Sequence[Row],
    ratios: Sequence[float],
    rank: int = 0,
    world: int = 1,
    pad_id: int = 0,
    split: Split | None = None,
) -> Scores:
    """Score this process's share of the rows at every ratio; all of a row's questions, in one fixed order.

    Args:
        distiller: not wrapped; its mode is restored.
        rows: held-out rows.
        ratios: compression ratios.
        rank: this process.
        world: processes.
        pad_id: fills shorter rows.
        split: how the slots are divided over the heads; None for equal numbers.
    """
    table = torch.zeros(len(ratios), len(NAMES), dtype=torch.float64)
    device = next(distiller.model.parameters()).device
    training = distiller.training
    distiller.eval()
    for row in rows[rank::world]:
        for index, ratio in enumerate(ratios):
            batch = make_batch([row], Draw(0, row.tokens, ratio), seed=0, pad_id=pad_id)
            inputs = {name: value for name, value in batch.items() if name not in ("ratio", "length")}
            inputs = {name: v.to(device) if torch.is_tensor(v) else v for name, v in inputs.items()}
            out = distiller(**inputs, split=split)
            right = whole_answers(inputs["labels"], out.right)
            full = whole_answers(inputs["labels"], out.teacher_right)
            table[index] += torch.tensor(
                [out.kl.item() * out.tokens, out.tokens, sum(right), sum(full), len(right)], dtype=torch.float64
            )
    distiller.train(training)
    return Scores(list(ratios), table)


def whole_answers(labels: torch.Tensor, right: torch.Tensor) -> list[bool]:
    """For each answer whether all of its tokens are right.

    Args:
        labels: `[batch, L]`; an answer is a run of labels that are not `IGNORE`.
        right: bool `[answer tokens]`, in the order of the labels.
    """
    answers, place = [], 0
    tokens = right.tolist()
    for row in labels[:, 1:].tolist():
        open_ = False
        for label in row:
            if label == IGNORE:
                open_ = False
                continue
            if open_:
                answers[-1] = answers[-1] and tokens[place]
            else:
                answers.append(tokens[place])
            open_, place = True, place + 1
    return answers
