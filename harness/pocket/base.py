"""The recipe of the pocket base model: from an induction start to standard matters, on two CPU cores.

    still pocket base --output runs/pocket --minutes 10      # again and again until it says that it is done

Each call goes on from the newest state that was wholly written; the same seed gives the same rows.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...eval.matters.words import TRADES
from .context_dropout import ContextDropout
from .curriculum import IGNORE, STAGES, Row, Rows
from .induction import induction_start, pocket_config
from .tokenizer import train_tokenizer

STATE = "state.pt"


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that decides the weights.

    Attributes:
        steps: optimizer steps in all.
        tokens: tokens in a step, about.
        learning_rate: peak rate of AdamW.
        warmup: steps to the peak.
        decay: share of the steps, at the end, over which the rate falls to a fiftieth.
        dropout: share of the rows in which heads do not see all of the matter (context dropout).
        seed: of the start and of the rows.
    """

    steps: int = 320
    tokens: int = 12_000
    learning_rate: float = 1.5e-3
    warmup: int = 50
    decay: float = 0.5
    dropout: float = 0.5
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * min(1.0, max(0.02, left))


def whole_answers(right: torch.Tensor, gold: torch.Tensor, end: int) -> torch.Tensor:
    """Which answers are right in every token: bool `[answers]` from flat token-level `right` and `gold`."""
    last = (gold == end).nonzero()[:, 0]
    wrong = F.pad((~right).long().cumsum(0), (1, 0))
    first = F.pad(last[:-1] + 1, (1, 0))
    return wrong[last + 1] == wrong[first]


def train_base(output: Path, recipe: BaseRecipe, minutes: float, report=print) -> bool:
    """Train for at most `minutes`, or until the recipe's last step; True when the model is finished.

    Writes the finished model and tokenizer to `output / "base"`.

    Raises:
        ValueError: `output` holds a run of another recipe.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    names = [tokenizer.encode(f" {trade}")[-1] for trade in TRADES]
    model = induction_start(pocket_config(len(tokenizer)), names, recipe.seed)
    decays = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW([{"params": decays}, {"params": rest}], betas=(0.9, 0.98), weight_decay=0.0)
    rows = Rows(tokenizer, recipe.seed)
    step, stage, mean, in_stage = load_state(output, model, optimizer, rows, recipe, (0, 0, 0.0, 0))
    dropout = ContextDropout()
    dropout.attach(model)
    start = time.monotonic()
    model.train()
    while step < recipe.steps and time.monotonic() - start < 60 * minutes:
        if STAGES[stage].is_over(mean, in_stage):
            stage, in_stage = stage + 1, 0
        now = STAGES[stage]
        count = max(2, round(recipe.tokens / (now.facts * 32 + 20)))
        dropped = [rows.rng.random() < recipe.dropout for _ in range(count)]
        # Heads that see different tokens cannot agree on which of two values is newer.
        drawn = [rows.row(replace(now, amended=0.0) if drop else now) for drop in dropped]
        ids, labels = pad_rows(drawn)
        generator = torch.Generator().manual_seed(rows.rng.randrange(1 << 40))
        shape = model.config.num_hidden_layers, model.config.num_key_value_heads
        dropout.draw(generator, [row.context for row in drawn], ids.shape[1], dropped, *shape)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(ids).last_hidden_state[:, :-1]
            wanted = labels[:, 1:] != IGNORE
            logits = model.lm_head(hidden[wanted])
        gold = labels[:, 1:][wanted]
        loss = F.cross_entropy(logits.float(), gold)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        answers = whole_answers(logits.argmax(-1) == gold, gold, tokenizer.eos_token_id)
        share = answers.float().mean().item()
        mean = share if in_stage == 0 else 0.9 * mean + 0.1 * share
        step, in_stage = step + 1, in_stage + 1
        if step % 10 == 0:
            elapsed = (time.monotonic() - start) / 60
            report(f"step {step} {elapsed:.1f} min, {now.facts} facts: loss {loss.item():.3f}, right {mean:.3f}")
        if step % 50 == 0 or step == recipe.steps:
            save_state(output, model, optimizer, rows, recipe, (step, stage, mean, in_stage))
    save_state(output, model, optimizer, rows, recipe, (step, stage, mean, in_stage))
    if step < recipe.steps:
        return False
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    (output / "base" / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    return True


def pad_rows(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels: causality keeps real tokens from seeing the padding."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        labels[index, : len(row.labels)] = torch.tensor(row.labels)
    return ids, labels


def load_state(output: Path, model, optimizer, rows, recipe, start: Any) -> Any:
    """Go on from what `save_state` wrote; returns where the run stands, `start` where there is none.

    Raises:
        ValueError: `output` holds a run of another recipe.
    """
    if not (output / STATE).exists():
        return start
    state = torch.load(output / STATE, weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise ValueError(f"{output} holds a run of {state['recipe']}, not of {asdict(recipe)}; take another folder")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    rows.rng.setstate(state["rng"])
    return state["where"]


def save_state(output: Path, model, optimizer, rows, recipe, where) -> None:
    """Write everything that a run goes on from, whole or not at all."""
    state = {
        "recipe": asdict(recipe), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "rng": rows.rng.getstate(), "where": where,
    }  # fmt: skip
    partial = output / (STATE + ".tmp")
    torch.save(state, partial)
    partial.replace(output / STATE)
