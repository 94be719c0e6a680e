"""Teach a compactor where its latents should stand, before anything else is trained.

The scorers of a `Placement` learn from the frozen model alone, in a minute or two: each token's target is the attention
that some answer gives it with the full cache. The compactor's other weights wait, and its start, an exact copy of the
tokens it stands at, is already a good compactor then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..calibration import as_asked
from ..calling import logits_of, passing
from ..compactor import StillCompactor
from ..methods.base import attention_scale
from ..placement import Placement, Scorer, SecondLook, listed
from ..reading import capture_queries, read
from .data import Row

REACH = 2.0
"""The heads' weighted attention, times this, is a token's worth, at most 1: half of all attention is as good as all."""

ENOUGH = 0.5
"""Nats that a context must add to what is known of an answer's token for that token to count in full."""

MOST = 1 << 30
"""Bytes of tokens' features that are kept at most for either look. Beyond, contexts are thinned out for the first look,
and the second one, which compares tokens of a text, does without the last texts."""

CANVASSED = 32
"""Texts by which the layer that looks for all is chosen."""

TOGETHER = 6
"""Texts whose shortlists are seen in one step."""

Shown = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Features `[kv_heads, tokens, ...]` and worths `[kv_heads, tokens]` of some tokens, by layer."""


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
        ids, asked = list(row.context_ids), []
        for question, answer in as_asked(row, range(len(row.turns))):
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


class Look(NamedTuple):
    """What the frozen model made of a text, for all contexts in it.

    Attributes:
        ids: of the text.
        cache: full, of all of it.
        queries: rotated ones of each full-attention layer `[1, query_heads, tokens, head_dim]`.
        states: the last layer's hidden states `[tokens, width]`.
    """

    ids: list[int]
    cache: DynamicCache
    queries: dict[int, torch.Tensor]
    states: torch.Tensor

    @classmethod
    @torch.no_grad()
    def at(cls, model, ids: list[int]) -> Look:
        """Read a text."""
        cache, queries, decoder = DynamicCache(config=model.config), {}, model.get_decoder()
        with capture_queries(decoder, queries):
            inputs = torch.tensor([ids], device=model.device)
            states = decoder(input_ids=inputs, **passing(decoder, cache), use_cache=True).last_hidden_state[0]
        return cls(ids, cache, queries, states)


@torch.no_grad()
def informed(
    model, text: Asked, states: torch.Tensor, block: int = 64, cache: DynamicCache | None = None
) -> torch.Tensor:
    """What the context adds to each of a text's answer tokens.

    Most tokens of an answer follow from those before them, whatever the context says, and yet attend to it. A slot kept
    for their sake is a slot lost.

    Args:
        model: the frozen model.
        text: see `Asked`.
        states: the last layer's hidden states of the whole text `[tokens, width]`.
        block: answer tokens whose logits are held at a time.
        cache: the full cache of the text: what stands before the context is not read again then.

    Returns:
        `[asked]`, KL in nats from the model's prediction with the context to its prediction without, where all other
        tokens keep their positions.
    """
    (first, end), device = text.context, states.device
    ids, asked = torch.tensor(text.ids, device=device), torch.tensor(text.asked, device=device)
    before = _cut(cache, first, model.config) if cache is not None and int(asked.min()) >= end else None
    skipped = 0 if before is None else first
    places = torch.arange(len(ids), device=device)
    others = torch.cat((places[skipped:first], places[end:]))[None]
    # The mask says that it is one text: a jump in the positions alone would be taken for the start of another.
    mask = torch.ones(1, skipped + others.shape[1], dtype=torch.long, device=device)
    alone = model.get_decoder()(
        input_ids=ids[others], position_ids=others, attention_mask=mask, **passing(model, before),
        use_cache=before is not None,
    ).last_hidden_state[0]  # fmt: skip
    added = []
    for one, other in zip(states[asked].split(block), alone[asked - (end - first) - skipped].split(block), strict=True):
        known, guessed = (logits_of(model, x).float().log_softmax(-1) for x in (one, other))
        added.append((known.exp() * (known - guessed)).sum(-1))
    return torch.cat(added)


def _cut(cache: DynamicCache, tokens: int, config) -> DynamicCache | None:
    """The cache of a text's first tokens; None where a layer keeps more than keys and values of each."""
    if not tokens or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cut = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        cut.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], index)
    return cut


@torch.no_grad()
def wanted(compactor: StillCompactor, model, text: Asked, look: Look | None = None) -> Wanted:
    """How much each token of a context is wanted by the answer token that wants it most.

    An answer token counts by what the context adds to it (`informed`; from `ENOUGH` on in full). What a head
    contributes is measured by what sets answers apart: the attention that one of them gives a token beyond what all of
    them give it on average, so that a head which always looks at the first token contributes nothing. A token's worth
    is its attention, averaged over heads by the `contributions` of these masses, from the answer token that gives it
    most. A sum over answers would let tokens that each of them sees a little outweigh one that a single answer cannot
    do without.

    Args:
        compactor: knows the layers.
        model: the frozen model.
        text: see `Asked`.
        look: at its ids, if there was one.

    Raises:
        ValueError: nothing is asked.
    """
    if not text.asked:
        raise ValueError("a text without answers says nothing of what is wanted")
    first, end = text.context
    _, cache, queries, states = Look.at(model, text.ids) if look is None else look
    asked = torch.tensor(text.asked, device=states.device)
    unseen = torch.arange(len(text.ids), device=asked.device) > asked[:, None]
    need = (informed(model, text, states, cache=cache) / ENOUGH).clamp(0, 1)
    mean = torch.zeros(len(asked), end - first, dtype=torch.float64, device=asked.device)
    weights, mass = torch.zeros((), dtype=torch.float64, device=asked.device), {}
    for layer in map(int, compactor.layers):
        query = queries[layer][0, :, asked].float().unflatten(0, (compactor.kv_heads, -1))
        logits = query @ cache.layers[layer].keys[0].float()[:, None].transpose(-1, -2) * attention_scale(model, layer)
        seen = logits.masked_fill(unseen, -torch.inf).softmax(-1)[..., first:end]
        mass[layer] = torch.einsum("hgat,a->h", (seen - seen.mean(2, keepdim=True)).clamp(min=0), need)
        weight = mass[layer].double().square()  # as in `contributions`, which divides by the sum over all layers
        mean += torch.einsum("h,hat->at", weight, seen.mean(1).double())
        weights += weight.sum()
    worth = REACH * (need[:, None] * mean).amax(0) / weights.clamp(min=1e-30)
    return Wanted(worth.clamp(max=1).float(), mass, _tokens(compactor, cache, text))


def _tokens(compactor: StillCompactor, cache: DynamicCache, text: Asked) -> dict[int, torch.Tensor]:
    """Un-rotated keys and values of a text's context, by layer `[kv_heads, tokens, 2 * head_dim]`."""
    first, end = text.context
    tokens = {}
    for layer in map(int, compactor.layers):
        keys, values = (x[:, :, first:end] for x in (cache.layers[layer].keys, cache.layers[layer].values))
        tokens[layer] = compactor.plain(layer, keys, values, torch.arange(first, end, device=keys.device))[0]
    return tokens


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
    """Fit the scorers of every layer and head, note what each head contributes, and choose the layer that scouts.

    Args:
        compactor: with a placement, bound to the model.
        model: the frozen model.
        texts: what to learn from; some hundreds serve a small model.
        seed: of the draws.
        steps: of AdamW for the first look; the second one takes half as many, on `TOGETHER` texts each.
        batch: tokens in a step of the first look.
        lr: peak of the learning rate, which rises and falls again (one cycle).
        progress: show a bar.

    Returns:
        Cross-entropy of the second look over the last tenth of its steps, mean over heads, nats per token.

    Raises:
        ValueError: there is no text, or the compactor spreads its latents evenly.
    """
    if not compactor.config.placement:
        raise ValueError("this compactor spreads its latents evenly: make it with placement=64, say")
    texts = list(texts)
    if not texts:
        raise ValueError("no text was given from which a placement could learn")
    generator = torch.Generator().manual_seed(seed)
    parts = {int(name): layer.placement for name, layer in compactor.layers.items()}
    width = sum(2 * part.first.inner[..., 0].numel() for part in parts.values())  # bytes of a token
    each = max(1, MOST // (width * len(texts)))  # tokens of a text
    worths, seen, mass, look = [], [], {}, None
    for text in tqdm(texts, desc="what answers look at", unit="text", disable=not progress):
        if look is None or look.ids != text.ids:  # contexts of one text follow one another
            look = Look.at(model, text.ids)
        one = wanted(compactor, model, text, look)
        worths.append(one.worth)
        kept = torch.randperm(len(one.worth), generator=generator)[:each].sort().values.to(model.device)
        seen.append({layer: (parts[layer].features(tokens[:, kept]).half(), one.worth[kept].expand(len(tokens), -1))
                     for layer, tokens in one.tokens.items()})  # fmt: skip
        mass = {layer: mass.get(layer, 0) + own for layer, own in one.mass.items()}
    del look
    with torch.no_grad():
        compactor.note_mass(mass)
    sizes = [min(each, len(worth)) for worth in worths]
    seen = [{layer: tuple(torch.cat([one[layer][i] for one in seen], dim=1) for i in (0, 1)) for layer in parts}]
    fit = partial(_fit, lr=lr, generator=generator, progress=progress)
    fit({layer: part.first for layer, part in parts.items()}, seen, batch, steps, name="first look")
    each_text = {layer: features.split(sizes, dim=1) for layer, (features, _) in seen[0].items()}
    seen, room = [], MOST // width
    for index, worth in enumerate(tqdm(worths, desc="once more", unit="text", disable=not progress)):
        room -= listed(len(worth))
        if room < 0 and seen:
            break
        features = {layer: own[index] for layer, own in each_text.items()}
        if len(worth) > each:  # it was thinned out, and a second look compares all of its tokens
            tokens = _tokens(compactor, _read(model, texts[index]), texts[index])
            features = {layer: parts[layer].features(own) for layer, own in tokens.items()}
        seen.append(_seen_again(parts, features, worth))
    del each_text
    last = fit({layer: part.second for layer, part in parts.items()}, seen, None, -(-steps // 2), name="second look")
    compactor.config.scout = _scout(compactor, model, texts[:CANVASSED], worths)
    return last


@torch.no_grad()
def _scout(compactor: StillCompactor, model, texts: Sequence[Asked], worths: Sequence[torch.Tensor]) -> int:
    """The layer whose heads' common opinion comes nearest to the worths of these texts."""
    missed = dict.fromkeys(map(int, compactor.layers), 0.0)
    for text, worth in zip(texts, worths, strict=False):
        for layer, tokens in _tokens(compactor, _read(model, text), text).items():
            logits = compactor.layers[str(layer)].placement.common_logits(tokens[None])[0, 0]
            missed[layer] += F.binary_cross_entropy_with_logits(logits, worth).item()
    return min(missed, key=missed.get)


def _read(model, text: Asked) -> DynamicCache:
    """The full cache of a text up to the end of its context."""
    return read(model, torch.tensor([text.ids[: text.context[1]]], device=model.device)).cache


@torch.no_grad()
def _seen_again(parts: Mapping[int, Placement], features: Mapping[int, torch.Tensor], worth: torch.Tensor) -> Shown:
    """What a second look will see of a text whose features `[kv_heads, tokens, 2 * head_dim]` are given by layer."""
    shown = {}
    for layer, own in features.items():
        own = own[None].float()
        places, again = parts[layer].shortlist(own, parts[layer].first(own))
        shown[layer] = again[0].half(), worth[places[0]]
    return shown


def _fit(
    looks: Mapping[int, Scorer | SecondLook], shown: Sequence[Shown], batch: int | None, steps: int, *, lr: float,
    generator: torch.Generator, progress: bool, name: str,
) -> float:  # fmt: skip
    """Fit one look of every layer; returns the cross-entropy of the last tenth of the steps.

    Args:
        looks: by layer.
        shown: what they see: in each step `TOGETHER` of these, or all of them if there are fewer.
        batch: tokens drawn from each in a step, by chance; None for all of them, in order.
        steps: of AdamW.
        lr: see `fit_placement`, as for the others.
        generator: of all draws.
        progress: show a bar.
        name: of the bar.
    """
    weights = [weight.requires_grad_() for look in looks.values() for weight in look.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    losses = []
    for _ in tqdm(range(steps), desc=name, unit="step", disable=not progress):
        loss = 0.0
        chosen = torch.randperm(len(shown), generator=generator)[:TOGETHER].tolist()
        for one in chosen:
            first = shown[one][next(iter(looks))][1]
            drawn = slice(None)
            if batch is not None:
                drawn = torch.randint(first.shape[1], (batch,), generator=generator).to(first.device)
            for layer, look in looks.items():
                features, worth = (x[:, drawn].float() for x in shown[one][layer])
                missed = F.binary_cross_entropy_with_logits(look(features[None])[0], worth)
                loss = loss + missed / (len(looks) * len(chosen))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    for weight in weights:
        weight.requires_grad_(False).grad = None
    return torch.stack(losses[-max(1, steps // 10) :]).mean().item()
