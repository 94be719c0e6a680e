"""The recipe that teaches the pocket the agent's game: to read document by document, keep a memo, and hand in.

    still pocket agent --output runs/pocket-agent --minutes 10     # again and again until it says that it is done

It goes on from the pocket's base. Every step has rows of the game (`agent_rows`) and rows of bare questions with
context dropout, so that what the base has learnt, and what compactors live on, is kept. The learning rate falls to
nothing over the recipe; each call goes on from the newest state that was wholly written.
"""

from __future__ import annotations

import json
import random
import time
from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F

from ...models import load
from ..episodes import KINDS
from ..episodes import Row as AgentRow
from .agent_rows import AGENT_STAGES, agent_rows
from .base import load_state, logits_of_labels, pad_rows, save_state, whole_answers
from .context_dropout import ContextDropout
from .curriculum import IGNORE, STAGES, Row, Rows
from .tokenizer import CHAT_TEMPLATE

DRAWN = 16
"""Rows that are drawn for a step; neighbours in length are taken, so that little of a batch is padding."""
GOES_ON = 2e-4
"""Peak rate of an agent that goes on; a higher one breaks its memos before they are learnt again."""
EARLIER = 0.1
"""Share of the steps whose rows come from an earlier stage than the current one."""


@dataclass(frozen=True)
class AgentRecipe:
    """Everything that decides the weights.

    Attributes:
        steps: optimizer steps in all.
        schedule: stages of `AGENT_STAGES` and the part of all steps that each takes, one after another. The short look
            at the second stage before the first is learnt is how the weights that ship came to be; nothing rests on it.
        tokens: of the game in a step, padding included, about.
        questions: tokens of bare questions and their matters in a step, about.
        learning_rate: peak rate of AdamW.
        warmup: steps to the peak.
        dropout: share of the question rows in which heads do not see all of the matter.
        seed: of the rows.
        start: model that is trained on.
        slips: share of the steps whose rows teach to take a private note (`slips`).
    """

    steps: int = 700
    schedule: tuple[tuple[int, int], ...] = ((0, 7), (1, 3), (0, 11), (1, 14), (2, 14), (3, 21))
    tokens: int = 8_000
    questions: int = 4_000
    learning_rate: float = 1e-3
    warmup: int = 20
    dropout: float = 0.5
    seed: int = 0
    start: str = "pocket"
    slips: float = 0.0

    def rate(self, step: int) -> float:
        """Learning rate of a step: a rise, then a straight fall to a fiftieth."""
        left = (self.steps - step) / (self.steps - self.warmup)
        return self.learning_rate * min((step + 1) / self.warmup, max(0.02, left))

    def stage(self, step: int) -> int:
        """Stage of a step."""
        parts = [part for _, part in self.schedule]
        ends = [self.steps * end / sum(parts) for end in accumulate(parts)]
        return self.schedule[min(bisect_right(ends, step), len(parts) - 1)][0]


def game_rows(tokenizer, recipe: AgentRecipe, step: int) -> list[AgentRow]:
    """Rows of the game for a step, of about one length: a function of the recipe and the step alone."""
    rng = random.Random(f"agent step {recipe.seed}:{step}")
    stage = recipe.stage(step)
    if stage and rng.random() < EARLIER:
        stage = rng.randrange(stage)
    slips = recipe.slips > 0 and rng.random() < recipe.slips
    source = agent_rows(AGENT_STAGES[stage], tokenizer, rng.randrange(1 << 40), slips=slips)
    rows = sorted((next(source) for _ in range(DRAWN)), key=lambda row: len(row.input_ids))
    last = rng.randrange(DRAWN)
    count = max(1, recipe.tokens // len(rows[last].input_ids))
    first = max(0, last + 1 - count)
    return rows[first : first + count]


def train_agent(output: Path, recipe: AgentRecipe, minutes: float, report=print) -> bool:
    """Train for at most `minutes`, or until the recipe's last step; True when the model is finished.

    Writes the finished model and tokenizer to `output / "base"`.

    Raises:
        ValueError: `output` holds a run of another recipe.
    """
    output.mkdir(parents=True, exist_ok=True)
    start = load(recipe.start, device="cpu", dtype="float32")
    model, tokenizer = start.model.train().requires_grad_(True), start.tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE  # the start's may be an older one
    for layer in model.model.layers:  # vLLM's Qwen3 has no such bias, and drops it without a word
        layer.self_attn.o_proj.bias.requires_grad_(False).zero_()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, betas=(0.9, 0.98), weight_decay=0.0)
    questions = Rows(tokenizer, recipe.seed)
    step = load_state(output, model, optimizer, questions, recipe, 0)
    dropout = ContextDropout()
    dropout.attach(model)
    begun, means = time.monotonic(), {}
    while step < recipe.steps and time.monotonic() - begun < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        asked, dropped = _questions(questions, recipe)
        _draw(dropout, model, asked, dropped, questions.rng.randrange(1 << 40))
        _learn(model, *pad_rows(asked), weight=0.3)
        rows = game_rows(tokenizer, recipe, step)
        played = [Row(row.input_ids, row.labels, 0) for row in rows]
        _draw(dropout, model, played, [False] * len(rows), 0)
        ids, labels = pad_rows(played)
        right = _learn(model, ids, labels, weight=1.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for kind, share in _turns_right(rows, labels, right, tokenizer.eos_token_id).items():
            means[kind] = 0.9 * means.get(kind, share) + 0.1 * share
        step += 1
        if step % 10 == 0:
            elapsed = (time.monotonic() - begun) / 60
            shown = ", ".join(f"{kind} {share:.2f}" for kind, share in sorted(means.items()))
            report(f"step {step} {elapsed:.1f} min, stage {recipe.stage(step - 1)}: whole turns right: {shown}")
        if step % 50 == 0:
            save_state(output, model, optimizer, questions, recipe, step)
    save_state(output, model, optimizer, questions, recipe, step)
    if step < recipe.steps:
        return False
    model.set_attn_implementation("sdpa")
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    (output / "base" / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    return True


def _questions(rows: Rows, recipe: AgentRecipe) -> tuple[list[Row], list[bool]]:
    """Standard matters with all their questions, and which of them are read with dropout."""
    stage = STAGES[-1]
    count = max(1, round(recipe.questions / (stage.facts * 32 + 20)))
    dropped = [rows.rng.random() < recipe.dropout for _ in range(count)]
    return [rows.row(replace(stage, amended=0.0) if drop else stage) for drop in dropped], dropped


def _draw(dropout: ContextDropout, model, rows: list[Row], dropped: list[bool], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    dropout.draw(generator, [row.context for row in rows], max(len(row.ids) for row in rows), dropped, *shape)


def _learn(model, ids: torch.Tensor, labels: torch.Tensor, weight: float) -> torch.Tensor:
    """Add the gradient of a batch's mean loss; returns which of its labels were right, flat."""
    logits, gold = logits_of_labels(model, ids, labels)
    (weight * F.cross_entropy(logits, gold)).backward()
    return logits.argmax(-1) == gold


def _turns_right(rows: list[AgentRow], labels: torch.Tensor, right: torch.Tensor, end: int) -> dict[str, float]:
    """Share of the turns of each kind that are right in every token, the right ones before given."""
    wanted = labels[:, 1:] != IGNORE
    kinds = torch.zeros_like(labels)
    for index, row in enumerate(rows):
        kinds[index, : len(row.kinds)] = torch.tensor(row.kinds)
    flat, gold = kinds[:, 1:][wanted], labels[:, 1:][wanted]
    whole, last = whole_answers(right, gold, end), flat[gold == end]
    return {
        name: whole[last == number].float().mean().item() for name, number in KINDS.items() if (last == number).any()
    }
