"""Teach a compactor where its latents should stand, before anything else is trained.

The scorers of a `Placement` learn from the frozen model alone, in a minute or two: each token's target is the attention
that some answer gives it with the full cache. The compactor's other weights wait, and its start, an exact copy of the
tokens it stands at, is already a good compactor then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache

from ..compactor import StillCompactor
from ..methods.base import attention_scale
from ..reading import capture_queries
from .data import Row

REACH = 2.0
"""The heads' weighted attention, times this, is a token's worth, at most 1: half of all attention is as good as all."""

MOST = 1 << 30
"""Bytes of tokens' features that are kept at most; contexts are thinned out beyond."""


class Asked(NamedTuple):
    """A text with a context to be compacted and tokens that are predicted after it.

    Attributes:
        ids: all of it.
        context: first token of the context and the first one after it.
        asked: places whose next token is an answer's.
    """

    ids: list[int]
    context: tuple[int, int]
    asked: list[int]

    @classmethod
    def of(cls, row: Row) -> Asked:
        """A training row with all its turns, each question after the answer before."""
        ids, asked = [*row.context_ids, *row.raw_ids], []
        for question, answer in row.turns:
            first = len(ids) + len(question) - 1
            asked += range(first, first + len(answer))
            ids += [*question, *answer]
        return cls(ids, (0, row.tokens), asked)


class Wanted(NamedTuple):
    """What answers look at in a context.

    Attributes:
        worth: `[tokens]`, in 0..1.
        mass: for each full-attention layer `[kv_heads]`, the attention through a head that sets answers apart.
        tokens: for each layer un-rotated keys and values `[kv_heads, tokens, 2 * head_dim]`.
    """

    worth: torch.Tensor
    mass: dict[int, torch.Tensor]
    tokens: dict[int, torch.Tensor]


@torch.no_grad()
def wanted(compactor: StillCompactor, model, text: Asked) -> Wanted:
    """How much each token of a context is wanted by the answer token that wants it most.

    What a head contributes is measured by what sets answers apart: the attention that one of them gives a token beyond
    what all of them give it on average, so that a head which always looks at the first token contributes nothing. A
    token's worth is its attention, averaged over heads by the `contributions` of these masses, from the answer token
    that gives it most. A sum over answers would let tokens that each of them sees a little outweigh one that a single
    answer cannot do without.

    Raises:
        ValueError: nothing is asked.
    """
    if not text.asked:
        raise ValueError("a text without answers says nothing of what is wanted")
    first, end = text.context
    ids, asked = torch.tensor([text.ids], device=model.device), torch.tensor(text.asked, device=model.device)
    cache, queries = DynamicCache(config=model.config), {}
    decoder = model.get_decoder()
    with capture_queries(decoder, queries):
        decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    unseen = torch.arange(ids.shape[1], device=ids.device) > asked[:, None]
    positions = torch.arange(first, end, device=ids.device)
    mean = torch.zeros(len(asked), end - first, dtype=torch.float64, device=ids.device)
    weights, mass, tokens = torch.zeros((), dtype=torch.float64, device=ids.device), {}, {}
    for layer in map(int, compactor.layers):
        keys, values = cache.layers[layer].keys, cache.layers[layer].values
        query = queries[layer][0, :, asked].float().unflatten(0, (compactor.kv_heads, -1))
        logits = query @ keys[0].float()[:, None].transpose(-1, -2) * attention_scale(model, layer)
        seen = logits.masked_fill(unseen, -torch.inf).softmax(-1)[..., first:end]
        mass[layer] = (seen - seen.mean(2, keepdim=True)).clamp(min=0).sum((1, 2, 3))
        weight = mass[layer].double().square()  # as in `contributions`, which divides by the sum over all layers
        mean += torch.einsum("h,hat->at", weight, seen.mean(1).double())
        weights += weight.sum()
        tokens[layer] = compactor.plain(layer, keys[:, :, first:end], values[:, :, first:end], positions)[0]
    return Wanted((REACH * mean.amax(0) / weights.clamp(min=1e-30)).clamp(max=1).float(), mass, tokens)


def fit_placement(
    compactor: StillCompactor,
    model,
    texts: Iterable[Asked],
    seed: int = 0,
    steps: int = 1500,
    batch: int = 4096,
    lr: float = 4e-3,
    progress: bool = True,
) -> float:
    """Fit the scorers of every layer and head, and note what each head contributes.

    Args:
        compactor: with a placement, bound to the model.
        model: the frozen model.
        texts: what to learn from; some dozens serve a small model.
        seed: of the draws.
        steps: of AdamW, on `batch` tokens each.
        batch: tokens in a step.
        lr: peak of the learning rate, which rises and falls again (one cycle).
        progress: show a bar.

    Returns:
        Cross-entropy of the last tenth of the steps, mean over heads, nats per token.

    Raises:
        ValueError: there is no text, or the compactor spreads its latents evenly.
    """
    if not compactor.config.placement:
        raise ValueError("this compactor spreads its latents evenly: make it with placement=64, say")
    generator = torch.Generator().manual_seed(seed)
    known = _gather(compactor, model, texts, generator, progress)
    with torch.no_grad():
        compactor.note_mass(known.mass)
    parts = {layer: compactor.layers[str(layer)].placement for layer in known.tokens}
    weights = [weight.requires_grad_() for part in parts.values() for weight in part.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    losses = []
    for _ in tqdm(range(steps), desc="placement", unit="step", disable=not progress):
        drawn = torch.randint(len(known.worth), (batch,), generator=generator).to(known.worth.device)
        target = known.worth[drawn].expand(1, compactor.kv_heads, -1)
        loss = torch.stack([
            F.binary_cross_entropy_with_logits(part.logits(known.tokens[layer][None, :, drawn].float()), target)
            for layer, part in parts.items()
        ]).mean()  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    for weight in weights:
        weight.requires_grad_(False).grad = None
    return torch.stack(losses[-max(1, steps // 10) :]).mean().item()


def _gather(compactor: StillCompactor, model, texts: Iterable[Asked], generator, progress: bool) -> Wanted:
    """All texts' tokens side by side, in half precision; as many of each as `MOST` has room for."""
    texts = list(texts)
    if not texts:
        raise ValueError("no text was given from which a placement could learn")
    worth: list[torch.Tensor] = []
    tokens: Mapping[int, list[torch.Tensor]] = {int(name): [] for name in compactor.layers}
    mass: dict[int, torch.Tensor] = {}
    for text in tqdm(texts, desc="what answers look at", unit="text", disable=not progress):
        one = wanted(compactor, model, text)
        width = sum(part[:, 0].numel() for part in one.tokens.values()) * 2
        room = max(1, MOST // (width * len(texts)))
        kept = torch.randperm(len(one.worth), generator=generator)[:room].to(one.worth.device)
        worth.append(one.worth[kept])
        for layer, part in one.tokens.items():
            tokens[layer].append(part[:, kept].half())
            mass[layer] = mass.get(layer, 0) + one.mass[layer]
    return Wanted(torch.cat(worth), mass, {layer: torch.cat(parts, dim=1) for layer, parts in tokens.items()})
