"""Where latents stand: at tokens worth keeping, and in each head at others.

A small scorer per KV head says how much of some answer's attention a token may get, and looks a second time at those
that may get most, with an eye to what comes later: a token is worth little where a later one repeats it or takes it
back. These worths become inclusion probabilities that sum up to the slots, and a fixed sequence, shifted from head to
head, turns them into a choice: *coordinated sampling* with permanent random numbers (Brewer, Early and Joyce 1972;
order sampling: Rosén 1997). A token of inclusion 0.3 is kept by about three heads of ten, never by all or none by
chance, so that heads which can stand in for one another share the context among them. Each head's choice needs nothing
of the other heads' but the shift.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread as evenly as any sequence's
LEAST_WORTH = 0.01  # of a token that nobody seems to need: slots that are left over go to such tokens evenly
GAIN = 10.0  # of the last layer: it is learned at ten times the rate of other weights, since all else waits for it
SHORTLIST = 4  # one token in so many is looked at a second time: their comparison costs a sixteenth of all tokens'
COMPARED = 16  # directions in which two tokens are compared
LATER = 2  # later tokens whose likeness counts: what is said twice more is surely not needed here
USUAL, STEEP = 0.8, 10.0  # cosines of what is alike crowd near 1: what matters of them lies in the last tenth
LEFT = 0.85  # of a slot's worth that later tokens leave it, if it is not taken back
SPREAD = 3.0  # the worth of a token that all heads keep is e to this power times that of one that just none keeps


def inclusion(worth: torch.Tensor, slots: int) -> torch.Tensor:
    """Probabilities that sum up to `slots`, by which what answers find again is most.

    Heads stand in for one another, so each further head that keeps a token adds less than the one before. Where it adds
    less by some factor each time, the most is reached by *water-filling* (as for parallel channels: Cover and Thomas
    2006, section 9.4): a token's probability rises with the logarithm of its worth above a level that is the same for
    all, and a token below the level is kept by no head at all.

    Args:
        worth: `[..., tokens]`, all above 0.
        slots: at most the number of tokens.
    """
    height = worth.double().log()
    # The sum is piecewise linear in the level: faster from where a token emerges, slower from where one is sure.
    bends = torch.cat((height, height - SPREAD), dim=-1)
    bends, order = bends.sort(dim=-1, descending=True)
    emerged = torch.where(order < height.shape[-1], 1.0, -1.0).double().cumsum(-1)
    fall = (bends[..., :-1] - bends[..., 1:]) / SPREAD
    filled = F.pad((emerged[..., :-1] * fall).cumsum(-1), (1, 0))  # the sum where the level stands at each bend
    at = (filled < slots).sum(-1, keepdim=True).clamp(1, bends.shape[-1] - 1)  # the first bend that gives enough
    missing = slots - filled.gather(-1, at - 1)
    level = bends.gather(-1, at - 1) - SPREAD * missing / emerged.gather(-1, at - 1)
    return ((height - level) / SPREAD).clamp(0, 1)


def worth_of(logits: torch.Tensor) -> torch.Tensor:
    """Worths from a scorer's logits of any shape."""
    return logits.sigmoid() + LEAST_WORTH


def choose(share: torch.Tensor, slots: int, phase: torch.Tensor) -> torch.Tensor:
    """Tokens `[batch, heads, slots]`, ascending, that each head keeps.

    Args:
        share: their `inclusion`, `[batch, heads, tokens]`, or `[batch, 1, tokens]` for all heads.
        slots: of each head, at most the number of tokens.
        phase: where each head's numbers begin, `[heads]`, in 0..1.
    """
    tokens = torch.arange(share.shape[-1], device=share.device, dtype=torch.float64)
    number = (tokens * GOLDEN + phase.double()[:, None]).frac().clamp(1e-9, 1 - 1e-9)
    rank = number.logit() - share.logit(1e-9)
    return rank.topk(slots, dim=-1, largest=False).indices.sort(dim=-1).values


def contributions(mass: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What each head of each layer contributes to answers, `[kv_heads]` a layer; all of them sum up to 1.

    Args:
        mass: of each layer `[kv_heads]`, the attention that answers give the context through a head. Its square is
            taken: of a head that sends a fifth of the others' attention into the context, less than a fifth is felt.
    """
    share = torch.cat(list(mass)).double().square() + 1e-30  # all alike where nothing is known
    return list((share / share.sum()).split([len(layer) for layer in mass]))


def phases(mass: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Where the numbers of each layer's heads begin: on a circle, as far apart as the heads' `contributions` are large.

    Args:
        mass: see `contributions`.
    """
    parts = contributions(mass)
    share = torch.cat(parts)
    return list((share.cumsum(0) - share / 2).split([len(part) for part in parts]))


class Worth:
    """What tokens are worth to all heads of all layers; each number of slots settles their inclusion once.

    Args:
        worth: `[batch, 1, tokens]`.
    """

    def __init__(self, worth: torch.Tensor):
        self.worth, self._shares = worth, {}

    def share(self, slots: int) -> torch.Tensor:
        """Their `inclusion` in a head of so many slots."""
        if slots not in self._shares:
            self._shares[slots] = inclusion(self.worth, slots)
        return self._shares[slots]


class Scorer(nn.Module):
    """A small network for each KV head: features of a token in, a logit out.

    Args:
        source: width of a token's features.
        kv_heads: of the layer.
        hidden: width of the hidden layer.
    """

    def __init__(self, source: int, kv_heads: int, hidden: int):
        super().__init__()
        self.inner = nn.Parameter(torch.randn(kv_heads, source, hidden) * source**-0.5)
        self.inner_bias = nn.Parameter(torch.zeros(kv_heads, 1, hidden))
        self.outer = nn.Parameter(torch.zeros(kv_heads, hidden, 1))  # a fresh scorer finds all tokens alike
        self.outer_bias = nn.Parameter(torch.zeros(kv_heads, 1, 1))

    def forward(self, features: torch.Tensor, heads: Sequence[int] | None = None) -> torch.Tensor:
        """Logits `[batch, heads, tokens]` of `features` `[batch, heads, tokens, source]`; `heads`: which these are."""
        inner, bias, outer, last = (
            x if heads is None else x[list(heads)] for x in (self.inner, self.inner_bias, self.outer, self.outer_bias)
        )
        hidden = F.silu(features @ inner + bias)
        return GAIN * ((hidden * outer.mT).sum(-1) + last.squeeze(-1))  # a product with one column is slow


def listed(tokens: int) -> int:
    """How many of a context's tokens are looked at a second time."""
    return -(-tokens // SHORTLIST)


class SecondLook(nn.Module):
    """Scores the tokens of a shortlist by themselves and by how much later ones of the list are like them.

    By which directions two tokens are compared, each head learns.

    Args:
        source: width of a token's features.
        kv_heads: of the layer.
        hidden: width of the hidden layer.
    """

    def __init__(self, source: int, kv_heads: int, hidden: int):
        super().__init__()
        self.compared = nn.Parameter(torch.randn(kv_heads, source, COMPARED) * source**-0.5)
        self.scorer = Scorer(source + LATER, kv_heads, hidden)

    def forward(self, features: torch.Tensor, heads: Sequence[int] | None = None) -> torch.Tensor:
        """Logits `[batch, heads, some]` of `features` `[batch, heads, some, source]`, in the order of the context."""
        compared = self.compared if heads is None else self.compared[list(heads)]
        signs = F.normalize(features @ compared, dim=-1)
        alike = (signs @ signs.transpose(-1, -2)).triu(1)  # to later tokens alone
        closest = F.pad(alike, (0, max(0, LATER - alike.shape[-1]))).topk(LATER, dim=-1).values.clamp(min=0)
        return self.scorer(torch.cat((features, STEEP * (closest - USUAL)), dim=-1), heads)


class Placement(nn.Module):
    """Scores the tokens of one layer, each KV head by weights of its own, in two looks.

    The first look sees each token by itself. The second one takes the tokens that scored highest and compares each with
    the later ones among them: a causal model's keys and values cannot say that a later line amends or repeats theirs.

    Attributes:
        mass: `[kv_heads]`, the attention that sets answers apart, by head; see `still.distill.placing.wanted`.

    Args:
        source: width of a token, twice the head dim.
        kv_heads: of the layer.
        hidden: width of the scorers' hidden layer.
    """

    def __init__(self, source: int, kv_heads: int, hidden: int):
        super().__init__()
        self.first = Scorer(source, kv_heads, hidden)
        self.second = SecondLook(source, kv_heads, hidden)
        self.register_buffer("mass", torch.ones(kv_heads))
        self.requires_grad_(False)  # it is fitted by itself (`still.distill.placing`): a choice passes no gradient on

    @staticmethod
    def features(source: torch.Tensor) -> torch.Tensor:
        """What a first look sees, as wide as `source`: keys and values differ in size, and layers do."""
        halves = source.unflatten(-1, (2, -1))
        square = torch.linalg.vector_norm(halves, dim=-1, keepdim=True).square() / halves.shape[-1]
        return (halves * (square + torch.finfo(halves.dtype).eps).rsqrt()).flatten(-2)

    @staticmethod
    def shortlist(features: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that are looked at again.

        Args:
            features: `[batch, heads, tokens, 2 * head_dim]`.
            logits: of the first look, `[batch, heads, tokens]`.

        Returns:
            Their places `[batch, heads, some]`, ascending, and features `[batch, heads, some, 2 * head_dim]`.
        """
        places = logits.topk(listed(logits.shape[-1]), dim=-1).indices.sort(dim=-1).values
        return places, features.gather(2, places[..., None].expand(-1, -1, -1, features.shape[-1]))

    def logits(self, source: torch.Tensor, heads: Sequence[int] | None = None) -> torch.Tensor:
        """Logits of the worths `[batch, heads, tokens]`.

        Args:
            source: un-rotated keys and values `[batch, heads, tokens, 2 * head_dim]`, fp32.
            heads: which heads these are; None for all of them.
        """
        features = self.features(source)
        logits = self.first(features, heads)
        places, again = self.shortlist(features, logits)
        return logits.scatter(2, places, self.second(again, heads))

    @torch.no_grad()
    def taken_back(
        self, slots: torch.Tensor, later: torch.Tensor, heads: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Which slots the tokens of a later chunk repeat or take back, `[batch, heads, slots]`.

        A second look at the slots, once by themselves and once beside the later tokens that a first look ranks highest.

        Args:
            slots: un-rotated keys and values `[batch, heads, slots, 2 * head_dim]`, fp32: as good as their tokens'.
            later: likewise of the later tokens.
            heads: which heads these are; None for all of them.
        """
        own, new = self.features(slots), self.features(later)
        _, new = self.shortlist(new, self.first(new, heads))
        alone = self.second(own, heads).sigmoid()
        beside = self.second(torch.cat((own, new), dim=2), heads)[..., : own.shape[2]].sigmoid()
        return beside < LEFT * alone

    @torch.no_grad()
    def worth(self, source: torch.Tensor, heads: Sequence[int] | None = None) -> torch.Tensor:
        """What the tokens are worth to each head `[batch, heads, tokens]`; for the arguments see `logits`."""
        return worth_of(self.logits(source, heads))

    def common_logits(self, source: torch.Tensor) -> torch.Tensor:
        """Logits in which all heads have a say `[batch, 1, tokens]`; see `logits`."""
        return self.logits(source).mean(1, keepdim=True)

    @torch.no_grad()
    def common_worth(self, source: torch.Tensor) -> torch.Tensor:
        """What the tokens are worth by the opinion of all heads `[batch, 1, tokens]`; see `logits`."""
        return worth_of(self.common_logits(source))
