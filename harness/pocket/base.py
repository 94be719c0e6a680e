"""The recipe of the pocket base model: from an induction start to standard matters, then to long ones, on two cores.

    still pocket base --output runs/pocket --minutes 10      # again and again until it says that it is done
    still pocket base --output runs/longer --start-from DIR  # the second part alone, from a base that recalls

Each call goes on from the newest state that was wholly written; the same seed gives the same rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...eval.matters.words import TRADES
from ...models import load
from .context_dropout import ContextDropout
from .curriculum import IGNORE, LONG, STAGES, Row, Rows, Stage
from .induction import induction_start, pocket_config
from .tokenizer import train_tokenizer

STATE, BEFORE_LONG = "state.pt", "before-long"


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that decides the weights.

    Attributes:
        steps: optimizer steps up to standard matters.
        tokens: tokens in each of them, about.
        learning_rate: peak rate of AdamW.
        warmup: steps to the peak.
        decay: share of the steps, at the end, over which the rate falls to a fiftieth.
        long_steps: further steps, on rows of `curriculum.LONG`.
        long_rate: their peak rate, which rises and falls once more.
        long_warmup: steps to that peak.
        long_share: where the finished weights stand between those before the long steps (0) and those after them (1).
            On the way the pocket recalls long matters about as well as at 1 and amended facts of standard ones about
            as well as at 0 (WiSE-FT, arXiv 2109.01903).
        dropout: share of the rows in which heads do not see all of the matter (context dropout).
        seed: of the start and of the rows.
        start: a base that goes on with the long steps alone.
    """

    steps: int = 320
    tokens: int = 12_000
    learning_rate: float = 1.5e-3
    warmup: int = 50
    decay: float = 0.5
    long_steps: int = 200
    long_rate: float = 3e-4
    long_warmup: int = 10
    long_share: float = 0.7
    dropout: float = 0.5
    seed: int = 0
    start: str | None = None

    @property
    def all_steps(self) -> int:
        """Of both parts."""
        return self.steps + self.long_steps

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        peak, warmup, steps = self.learning_rate, self.warmup, self.steps
        if step >= self.steps:
            peak, warmup, steps, step = self.long_rate, self.long_warmup, self.long_steps, step - self.steps
        left = (steps - step) / (self.decay * steps)
        return peak * min(1.0, (step + 1) / warmup) * min(1.0, max(0.02, left))


def whole_answers(right: torch.Tensor, gold: torch.Tensor, end: int) -> torch.Tensor:
    """Which answers are right in every token: bool `[answers]` from flat token-level `right` and `gold`."""
    last = (gold == end).nonzero()[:, 0]
    wrong = F.pad((~right).long().cumsum(0), (1, 0))
    first = F.pad(last[:-1] + 1, (1, 0))
    return wrong[last + 1] == wrong[first]


def train_base(output: Path, recipe: BaseRecipe, minutes: float, report=print) -> bool:
    """Train for at most `minutes`, or until the recipe's last step; True when the model is finished.

    Writes the finished model and tokenizer to `output / "base"`, and the model as it was before the long steps to
    `output / "before-long"`.

    Raises:
        ValueError: `output` holds a run of another recipe.
    """
    output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = _start(recipe)
    decays = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW([{"params": decays}, {"params": rest}], betas=(0.9, 0.98), weight_decay=0.0)
    rows = Rows(tokenizer, recipe.seed)
    first = recipe.steps if recipe.start else 0
    step, stage, mean, in_stage = load_state(output, model, optimizer, rows, recipe, (first, 0, 0.0, 0))
    dropout = ContextDropout()
    dropout.attach(model)
    start = time.monotonic()
    model.train()
    while step < recipe.all_steps and time.monotonic() - start < 60 * minutes:
        if step == recipe.steps:
            model.save_pretrained(output / BEFORE_LONG)
            tokenizer.save_pretrained(output / BEFORE_LONG)
        batches = LONG
        if step < recipe.steps:
            if STAGES[stage].is_over(mean, in_stage):
                stage, in_stage = stage + 1, 0
            batches = ((STAGES[stage], max(2, round(recipe.tokens / (STAGES[stage].facts * 32 + 20)))),)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss, share = _learn(model, dropout, recipe, rows, batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = share if in_stage == 0 else 0.9 * mean + 0.1 * share
        step, in_stage = step + 1, in_stage + 1
        if step % 10 == 0:
            elapsed = (time.monotonic() - start) / 60
            report(f"step {step} {elapsed:.1f} min, {batches[-1][0].facts} facts: loss {loss:.3f}, right {mean:.3f}")
        if step % 50 == 0 or step == recipe.all_steps:
            save_state(output, model, optimizer, rows, recipe, (step, stage, mean, in_stage))
    save_state(output, model, optimizer, rows, recipe, (step, stage, mean, in_stage))
    if step < recipe.all_steps:
        return False
    if recipe.long_steps:
        before = load(str(output / BEFORE_LONG), device="cpu", dtype="float32").model
        with torch.no_grad():
            for after, earlier in zip(model.parameters(), before.parameters(), strict=True):
                after.lerp_(earlier, 1 - recipe.long_share)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    (output / "base" / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    return True


def _start(recipe: BaseRecipe):
    """The model before its first step, and its tokenizer."""
    if recipe.start:
        loaded = load(recipe.start, device="cpu", dtype="float32")
        return loaded.model.requires_grad_(True), loaded.tokenizer
    tokenizer = train_tokenizer()
    names = [tokenizer.encode(f" {trade}")[-1] for trade in TRADES]
    return induction_start(pocket_config(len(tokenizer)), names, recipe.seed), tokenizer


def _learn(
    model, dropout: ContextDropout, recipe: BaseRecipe, rows: Rows, batches: Sequence[tuple[Stage, int]]
) -> tuple[float, float]:
    """Gradients of one step, batch by batch: its mean loss, and the share of answers that are wholly right."""
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    drawn: list[tuple[list[Row], list[bool]]] = []
    for stage, count in batches:
        dropped = [rows.rng.random() < recipe.dropout for _ in range(count)]
        # Heads that see different tokens cannot agree on which of two values is newer.
        drawn.append(([rows.row(replace(stage, amended=0.0) if drop else stage) for drop in dropped], dropped))
    answered = sum(label != IGNORE for batch, _ in drawn for row in batch for label in row.labels)
    total, right = 0.0, []
    for batch, dropped in drawn:
        ids, labels = pad_rows(batch)
        generator = torch.Generator().manual_seed(rows.rng.randrange(1 << 40))
        dropout.draw(generator, [row.context for row in batch], ids.shape[1], dropped, *shape)
        logits, gold = logits_of_labels(model, ids, labels)
        loss = F.cross_entropy(logits, gold, reduction="sum") / answered
        loss.backward()
        total += loss.item()
        right.append(whole_answers(logits.argmax(-1) == gold, gold, rows.tokenizer.eos_token_id))
    return total, torch.cat(right).float().mean().item()


def logits_of_labels(model, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward in bfloat16: float32 logits `[n, vocabulary]` where `labels` has n tokens to learn, and those."""
    wanted = labels[:, 1:] != IGNORE
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[wanted])
    return logits.float(), labels[:, 1:][wanted]


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
