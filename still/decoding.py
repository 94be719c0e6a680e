"""Rows of one batch, decoded side by side until each has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers.cache_utils import Cache

from .calling import passing

Choose = Callable[[torch.Tensor, list[int]], list[int]]
"""Gives a token for each row of logits `[rows, vocabulary]`; the rows' numbers are given with them."""
KEPT = 0.75
"""Share of rows still open below which the others are dropped, which copies the cache of those that stay."""


def decode(
    model, cache: Cache, start: int, prompts: Sequence[Sequence[int]], choose: Choose, ended: Callable[[int], bool],
    outputs: list[list[int]],
) -> None:  # fmt: skip
    """Read prompts of unequal length as rows of a batch, and what follows each into `outputs`, empty lists, in place.

    Args:
        model: a causal language model of full attention alone, so that padding leaves no trace.
        cache: of no own columns; what it stands behind, every row sees.
        start: logical position of the prompts' first token.
        prompts: token ids.
        choose: a token of each row.
        ended: whether a row, by its number, is done with what is in `outputs`.
        outputs: for each prompt.
    """
    lengths, device = torch.tensor([len(prompt) for prompt in prompts]), model.device
    columns = torch.arange(int(lengths.max()))[None] - (lengths.max() - lengths)[:, None]
    ids = torch.zeros(columns.shape, dtype=torch.long)
    ids[columns >= 0] = torch.tensor([token for prompt in prompts for token in prompt])
    mask = (columns >= 0).long().to(device)
    logits = feed(model, cache, ids.to(device), mask, columns.clamp(min=0).to(device) + start)
    for output, token in zip(outputs, choose(logits, list(range(len(prompts)))), strict=True):
        output.append(token)
    go_on(model, cache, mask, [start + len(prompt) for prompt in prompts], choose, ended, outputs)


def go_on(
    model, cache: Cache, mask: torch.Tensor, starts: Sequence[int], choose: Choose, ended: Callable[[int], bool],
    outputs: list[list[int]],
) -> None:  # fmt: skip
    """Decode rows until each has ended; what follows goes into `outputs` in place.

    Args:
        model: a causal language model.
        cache: of all rows, up to the last token of each output, which is not read yet.
        mask: columns of the cache that each row sees, `[rows, columns]`.
        starts: logical position of each output's first token.
        choose: a token of each row.
        ended: whether a row, by its number, is done with what is in `outputs`.
        outputs: of each row, not empty.
    """
    rows = list(range(len(outputs)))
    while going := [row for row in rows if not ended(row)]:
        if len(going) <= KEPT * len(rows):
            index = torch.tensor([rows.index(row) for row in going], device=mask.device)
            cache.batch_select_indices(index)
            mask, rows = mask[index], going
        ids = torch.tensor([outputs[row][-1:] for row in rows], device=mask.device)
        where = torch.tensor([[starts[row] + len(outputs[row]) - 1] for row in rows], device=mask.device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        for row, token in zip(rows, choose(feed(model, cache, ids, mask, where), rows), strict=True):
            if row in going:
                outputs[row].append(token)


def draw(logits: torch.Tensor, temperature: float, numbers: Sequence[torch.Generator]) -> list[int]:
    """A token of each row of logits `[rows, vocabulary]`; greedy at 0."""
    return drawn((logits / temperature).log_softmax(-1), numbers) if temperature else logits.argmax(-1).tolist()


def drawn(log_probs: torch.Tensor, numbers: Sequence[torch.Generator]) -> list[int]:
    """A token of each row of log-probabilities `[rows, vocabulary]`, by one random number of the row's own.

    `torch.multinomial` would draw one for every token of the vocabulary.
    """
    edges = log_probs.double().exp().cumsum(-1)
    points = torch.stack([torch.rand(1, generator=each, dtype=torch.float64) for each in numbers])
    return torch.searchsorted(edges, points.to(edges.device) * edges[:, -1:], right=True)[:, 0].tolist()


def feed(model, cache: Cache, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Feed ids `[rows, tokens]` at logical positions; logits `[rows, vocabulary]` behind the last of each, in fp32."""
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, **passing(model, cache), use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    return out.logits[:, -1].float()
