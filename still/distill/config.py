"""What `still data` and `still train` can be told. The flags are made from these dataclasses; no torch in here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DataConfig:
    """How training contexts are made from documents.

    Attributes:
        questions: questions asked of each context.
        context_tokens: lengths of the contexts in tokens; every document is cut at each of them.
        endpoint: base URL of an OpenAI-compatible server whose model writes the questions; without one the base
            model writes them itself.
        api_model: name of that server's model.
        concurrency: requests under way at a time.
        retries: times that a failed request is sent again.
        timeout: seconds that a request may take.
        answer_tokens: longest answer in tokens; longer ones are dropped.
        temperature: temperature at which the base answers training questions; validation ones are answered greedily.
        held_out: share of the documents whose contexts are kept for validation.
        near: share of common word sequences from which on two contexts count as duplicates.
        dtype: dtype of the base model.
        device: where the base model runs, such as cpu or cuda:1; the first GPU if there is one.
        revision: branch, tag or commit of the base model on the Hub.
        seed: seed of every draw.
    """

    questions: int = 8
    context_tokens: list[int] = field(default_factory=lambda: [1024])
    endpoint: str | None = None
    api_model: str | None = None
    concurrency: int = 8
    retries: int = 5
    timeout: float = 120.0
    answer_tokens: int = 64
    temperature: float = 0.7
    held_out: float = 0.05
    near: float = 0.8
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str | None = None
    revision: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least_one(self, "questions", "concurrency", "answer_tokens")
        if not self.context_tokens or min(self.context_tokens) < 16:
            raise ValueError(f"context_tokens is {self.context_tokens}; give one or more lengths of at least 16 tokens")
        if (self.endpoint is None) != (self.api_model is None):
            raise ValueError(
                f"endpoint is {self.endpoint!r} and api_model {self.api_model!r}; give both, or neither so that the "
                "base model writes the questions"
            )
        _share(self, "held_out")
        if not 0 < self.near <= 1:
            raise ValueError(f"near is {self.near}; it must be above 0 and at most 1 (1 drops exact duplicates only)")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")


@dataclass
class TrainConfig:
    """How a compactor is trained. Defaults follow the STILL paper (arXiv 2606.07878).

    Attributes:
        ratios: compression ratios; each step draws one.
        lengths: context lengths in tokens; each step draws one and takes contexts that fit it but no shorter length
            in the list. Without any: powers of two that cover the data.
        steps: optimizer steps.
        lr: learning rate; small base models may want more, up to 1e-3.
        schedule: the learning rate after the warm-up.
        warmup: steps of warm-up.
        batch: contexts in one optimizer step, over all processes.
        micro_batch: contexts that one process holds at a time.
        questions: questions asked of a context in one step, drawn anew each time; 0 asks all that it has.
        uneven: share of the steps that divide their slots unevenly over the heads, each in a way of its own around
            `split`: between it and equal numbers, jittered. Such runs use the attention "still".
        crowd: share of the steps in which a context's slots stand among those of the other contexts of its batch, as a
            chunk's do between earlier and later ones. Contexts of one micro-batch serve one another, so it needs two
            or more.
        split: JSON file of `still budgets`, stored in the checkpoint; equal numbers unless given.
        place: contexts from which the compactor's placement (`--compactor.placement`) is learnt before the first step.
        top_k: teacher tokens, beside the right one, over which the loss is taken.
        match: weight, at the first step, of the hidden states' relative squared error beside the KL; it falls linearly
            to zero over the first two thirds of the run. The paper has none; it speeds the start up.
        weight_decay: weight decay of matrices; the latent bank and the biases have none.
        clip: largest norm of the gradient.
        held_out: share of the contexts held out for validation when no row's `split` says which; 0 for none.
        eval_contexts: held-out contexts that are scored, each at every ratio.
        eval_every: steps between two scores on held-out contexts; 0 scores at the end only.
        save_every: steps between two checkpoints.
        keep: checkpoints kept, two or more, since the newest may be half written.
        log_every: steps between two lines of metrics.jsonl.
        start_from: folder or Hub name of a trained compactor to go on from.
        dtype: dtype of the frozen base; the compactor trains in float32.
        attention: attention implementation of the base.
        revision: branch, tag or commit of the base model on the Hub.
        seed: seed of the draws and of the order of the rows.
    """

    ratios: list[float] = field(default_factory=lambda: [2.0, 4.0, 8.0, 16.0, 32.0])
    lengths: list[int] = field(default_factory=list)
    steps: int = 1500
    lr: float = 4e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 100
    batch: int = 16
    micro_batch: int = 1
    questions: int = 0
    uneven: float = 0.0
    crowd: float = 0.0
    split: str | None = None
    place: int = 64
    top_k: int = 200
    match: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    held_out: float = 0.05
    eval_contexts: int = 32
    eval_every: int = 100
    save_every: int = 100
    keep: int = 2
    log_every: int = 10
    start_from: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    attention: str = "sdpa"
    revision: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counted = ("steps", "batch", "micro_batch", "save_every", "log_every", "top_k", "eval_contexts", "place")
        _at_least_one(self, *counted)
        _share(self, "held_out")
        if not self.ratios or min(self.ratios) < 1:
            raise ValueError(f"ratios is {self.ratios}; give one or more, each at least 1 (tokens per slot)")
        if self.lengths and min(self.lengths) < 1:
            raise ValueError(f"lengths is {self.lengths}; each must be at least 1 token")
        if self.match < 0:
            raise ValueError(f"match is {self.match}; it must be 0 or more")
        for name in ("uneven", "crowd"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the steps: 0 to 1")
        if self.crowd and self.micro_batch == 1:
            raise ValueError(
                f"crowd is {self.crowd} with a micro_batch of 1: the contexts of one micro-batch crowd one another, "
                f"so give micro_batch 2 or more"
            )
        if self.keep < 2:
            raise ValueError(f"keep is {self.keep}; it must be 2 or more, since the newest may be half written")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule is {self.schedule!r}; it must be constant, linear or cosine")

    def match_at(self, step: int) -> float:
        """The weight `match` at a step, counted from 0."""
        return self.match * max(0.0, 1 - 1.5 * step / self.steps)


def _at_least_one(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be 1 or more")


def _share(config: object, name: str) -> None:
    if not 0 <= getattr(config, name) < 1:
        raise ValueError(f"{name} is {getattr(config, name)}; it is a share: at least 0, below 1")
