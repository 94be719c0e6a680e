"""The sweep: methods x ratios x question sets x seeds, each cell computed once and kept.

For each question set the context is read once; every method makes its cache from that reading, and all questions are
asked of a copy of that cache. The full cache is the ceiling and the teacher of every KL; what it answers rightly is, in
its own words, what likelihoods are measured on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import Cache
from transformers.utils import logging

from .. import methods, models
from ..attention import attending
from ..behind import goes_behind
from ..budgets import Split
from ..compactor import StillCompactor
from ..eval.judge import exact_judge
from ..eval.questions import Question, QuestionSet
from ..methods import Method, MethodRecord, cache_nbytes, measure
from ..prompts import PromptFormat, render, render_alone, render_answer
from ..provenance import provenance
from ..reading import read
from ..types import Reading
from .ask import Asked, Prompt, ask_each
from .cells import (
    CEILING,
    CHUNKED,
    CHUNKS,
    CONTROLS,
    FLOOR,
    PLACED,
    UNEVEN,
    Cell,
    CellStore,
    SweepConfig,
    cells_of,
    digest,
)
from .question_sets import question_sets
from .workers import share_out, worker_device

COMPACTOR_FILE = "compactor.json"
PATIENCE = 20.0
"""Seconds of compaction that an interrupt may cost: caches that took longer are asked before another is made."""


def run_sweep(
    config: SweepConfig, output: str | Path, device: str | None = None, progress: bool = True, workers: int = 1
) -> CellStore:
    """Compute every cell that `output` does not hold yet.

    Args:
        config: what to compute.
        output: results folder; one that the same config made is taken up where it stopped.
        device: default: the first GPU if there is one, else the CPU; several workers take the GPUs in turn.
        progress: show a bar.
        workers: processes that share the question sets, each with a model of its own and its share of the CPU's
            threads: see `share_out`. Two are faster than one wherever one keeps no device busy.

    Raises:
        ValueError: a method, task or seed has no such name, or the folder holds another sweep's results.
        RuntimeError: a worker died; finished cells are kept.
    """
    every = tuple(dict.fromkeys(name for names in config.methods_of.values() for name in names))
    check_methods(every)
    loaded = models.load(config.model, device=device, dtype=config.dtype)
    bench = Bench(config, loaded, every)
    tasks = {task: question_sets(config, task, bench.count_tokens) for task in config.methods_of}
    lone = [task for task, names in config.methods_of.items() if "still-wrong-matter" in names and len(tasks[task]) < 2]
    if lone:
        raise ValueError(f"still-wrong-matter asks of another question set, but {lone[0]} has only one; raise --count")
    record = provenance(config, seed=config.first, device=loaded.model.device, model=loaded.name)
    inputs = {
        "model": f"{loaded.name} {weights_digest(loaded.model)}",
        "questions": digest([each.to_json() for sets in tasks.values() for each in sets])[:16],
        **{f"compactor seed {seed}": name for seed, name in bench.compactor_names.items()},
        **({"split": digest(bench.split_of(None).to_dict())[:16]} if config.split else {}),
    }
    store = CellStore.create(output, config, inputs, record)
    parts = [
        Part(each, sets[(place + 1) % len(sets)], [*cells_of(config, task, each.id, bench.seeds)])
        for task, sets in tasks.items()
        for place, each in enumerate(sets)
    ]
    stamp = {name: record[name] for name in ("versions", "device", "git", "created")}
    left = [part.without(store.done) for part in parts]
    left = [part for part in left if part.cells]
    if workers > 1 and len(left) > 1:
        del bench, loaded  # each worker has its own
        done = share_out(left, workers, _computing_elsewhere, config, every, output, device, stamp)
    else:
        done = (cell for part in left for cell in _computing(bench, store, stamp)(part))
    total, todo = (sum(len(part.cells) for part in some) for some in (parts, left))
    bar = tqdm(desc="cells", unit="cell", total=total, initial=total - todo, disable=not progress, smoothing=0.05)
    with bar, closing(done):
        for cell in done:
            bar.set_postfix_str(f"{cell.set_id}: {cell.label}", refresh=False)
            bar.update()
    return store


@dataclass(frozen=True)
class Part:
    """Some cells of one question set; a wrong matter's cache is made of the other set."""

    asked: QuestionSet
    other: QuestionSet
    cells: list[Cell]

    def without(self, done: Callable[[Cell], bool]) -> Part:
        """What is left of it."""
        return dataclasses.replace(self, cells=[cell for cell in self.cells if not done(cell)])


def _computing(bench: Bench, store: CellStore, stamp: dict) -> Callable[[Part], Iterator[Cell]]:
    """What computes a part, and yields each cell when it is on disk."""

    def compute(part: Part) -> Iterator[Cell]:
        sitting = Sitting(bench, part.asked, part.other)
        for cells in asked_at_once(part.cells, 1.0 if goes_behind(bench.model) else 0.0):
            for cell, result in zip(cells, sitting.results(cells), strict=True):
                store.write(cell, {**result, "provenance": stamp})
                yield cell

    return compute


def _computing_elsewhere(
    number: int, config: SweepConfig, names: Sequence[str], folder: str | Path, device: str | None, stamp: dict
) -> Callable[[Part], Iterator[Cell]]:
    """The same in a worker."""
    logging.disable_progress_bar()  # the caller has shown it, and an interrupt would leave its lock behind
    bench = Bench(config, models.load(config.model, device or worker_device(number), config.dtype), names)
    return _computing(bench, CellStore.open(folder), stamp)


def asked_at_once(cells: Sequence[Cell], most: float = 1.0) -> Iterator[list[Cell]]:
    """Cells of one method and seed that may be asked in one batch: their caches hold at most so many full ones."""
    like: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in cells:
        like.setdefault((cell.method, cell.seed), []).append(cell)
    for same in like.values():
        some, held = [], 0.0
        for cell in same:
            share = 1.0 if cell.ratio is None else 1 / cell.ratio
            if some and held + share > most:
                yield some
                some, held = [], 0.0
            some.append(cell)
            held += share
        yield some


def check_methods(names: tuple[str, ...]) -> None:
    """Refuse a method that nobody knows, before anything is loaded."""
    known = [*methods.NAMES, *CHUNKED, PLACED, *CONTROLS]
    known += [name + UNEVEN for name in methods.SPLIT_NAMES]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no method {unknown[0]!r}; choose from {', '.join(known)}")


class Bench:
    """What all question sets share: the model, its prompt format, the compactors and the methods.

    Attributes:
        compactors: trained compactors by seed.
        compactor_names: for each seed the compactor's name and a digest of its weights.
        seeds: for each method that depends on a seed, the seeds to run.
    """

    def __init__(self, config: SweepConfig, loaded: models.LoadedModel, names: Sequence[str]) -> None:
        self.config, self.model, self.tokenizer = config, loaded.model, loaded.tokenizer
        self.form = PromptFormat.of(self.tokenizer)
        self.attention = self.model.config._attn_implementation
        self.compactors: dict[int, StillCompactor] = {}
        self.compactor_names: dict[int, str] = {}
        names = [name.removesuffix(CHUNKS) for name in names]
        plain = [name.removesuffix(UNEVEN) for name in names]
        self.needs_queries = any(methods.METHODS[name].needs_queries for name in plain if name in methods.METHODS)
        uneven = any(name.endswith(UNEVEN) for name in names)
        if {"still", "still-wrong-matter", PLACED} & set(plain) or (uneven and not config.split):
            for seed, (name, compactor) in load_compactors(config.compactor, config.seeds, loaded).items():
                self.compactors[seed], self.compactor_names[seed] = compactor, name
        trained = tuple(self.compactors)
        self.seeds = {"still": trained, "still-wrong-matter": trained, PLACED: trained, "random": config.seeds}
        self.seeds |= {f"{name}{UNEVEN}": self.seeds[name] for name in ("still", "random")}
        self.seeds |= dict.fromkeys(CHUNKED, trained)
        if uneven:
            self.split_of(None)  # refuses a missing one before hours of work

    def method(self, cell: Cell) -> Method:
        """The method of a cell, ready to compact."""
        if cell.method == "still-untrained":
            return methods.get("still", compactor=self.untrained, label="untrained")
        if cell.method == PLACED:
            return methods.get("still", compactor=self.placed(cell.seed), label="placed")
        whole = cell.method.removesuffix(CHUNKS)
        name = whole.removesuffix(UNEVEN)
        options = {"split": self.split_of(cell.seed)} if whole.endswith(UNEVEN) else {}
        options |= {"chunks": True} if cell.method in CHUNKED else {}
        if name in ("still", "still-wrong-matter"):
            options |= {"compactor": self.compactors[cell.seed], "label": self.compactor_names[cell.seed]}
            return methods.get("still", **options)
        return methods.get(name, **({} if cell.seed is None else {"seed": cell.seed}), **options)

    def split_of(self, seed: int | None) -> Split:
        """The split that was given, or else that of the compactor of this seed, of the first one if there is none.

        Raises:
            ValueError: none was given, and the compactor carries none.
        """
        if self.config.split:
            return Split.load(self.config.split)
        return self.compactors.get(seed, next(iter(self.compactors.values()))).with_split().split

    @cached_property
    def untrained(self) -> StillCompactor:
        """A fresh compactor of the trained one's shape; no seed enters it."""
        options = {}
        for trained in self.compactors.values():
            known = dataclasses.asdict(trained.config)
            shape = ("bank", "chunk", "blocks", "latent_width", "feed_forward", "beta", "shared_bank",
                     "fractional_positions", "learned_scale", "rms_eps", "rope_base")  # fmt: skip
            options = {name: known[name] for name in shape}
        return StillCompactor.for_model(self.model, **options).eval().requires_grad_(False)

    def placed(self, seed: int) -> StillCompactor:
        """A compactor that stands where the trained one of this seed stands, and copies what it finds there.

        Raises:
            ValueError: that one spreads its latents evenly.
        """
        trained = self.compactors[seed]
        if not trained.config.placement:
            name = self.compactor_names[seed]
            raise ValueError(f"{name} spreads its latents evenly: {PLACED} is for one with a placement")
        own = trained.config
        fresh = StillCompactor.for_model(self.model, bank=1, placement=own.placement, scout=own.scout)
        for name, part in fresh.layers.items():
            part.placement.load_state_dict(trained.layers[name].placement.state_dict())
        return fresh.eval().trains(False)

    def read(self, ids: list[int], queries: bool = False) -> Reading:
        """One forward over a context."""
        return read(self.model, torch.tensor([ids], device=self.model.device), queries=queries)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def text(self, output: list[int]) -> str:
        """The text of an answer's ids."""
        return self.tokenizer.decode(output, skip_special_tokens=True).strip()

    @contextmanager
    def attending(self, method: Method):
        """Run the model with the attention that the method's cache needs, and then with its own again."""
        with attending(self.model) if method.needs_still_attention else nullcontext():
            yield


def load_compactors(
    names: Sequence[str], seeds: Sequence[int], loaded: models.LoadedModel
) -> dict[int, tuple[str, StillCompactor]]:
    """Trained compactors with what results call them, by training seed.

    Args:
        names: as `SweepConfig.compactor` has them.
        seeds: that are wanted; where there is only one compactor, it is taken whatever its seed.
        loaded: the model that they belong to.

    Raises:
        ValueError: two have the same seed, or there is none of a seed.
    """
    found = {}
    for name in names:
        for where in compactor_folders(name, loaded):
            compactor = StillCompactor.from_pretrained(where, model=loaded.model).eval().requires_grad_(False)
            seed = compactor.config.seed or 0
            if seed in found:
                raise ValueError(f"{found[seed][0]} and {where} have the same training seed {seed}; name one")
            found[seed] = (where, compactor)
    chosen = {seed: found[seed] for seed in seeds if seed in found}
    if missing := [seed for seed in seeds if seed not in found]:
        if len(found) > 1:
            raise ValueError(f"no compactor was trained with seed {missing[0]}; there are {sorted(found)}: --seeds")
        chosen = found
    return {
        seed: (f"{Path(where).name} {weights_digest(compactor)}", compactor)
        for seed, (where, compactor) in chosen.items()
    }


def compactor_folders(name: str, loaded: models.LoadedModel) -> list[str]:
    """Where the compactors that `name` stands for lie: those of a named model, a folder, its subfolders, a Hub id.

    Raises:
        FileNotFoundError: the name stands for a model or a folder that has none.
    """
    named = models.find(name)
    if named is not None:
        if not named.compactors:
            raise FileNotFoundError(f"the model {name!r} brings no compactor; give --compactor a folder or a Hub id")
        return [str(folder) for folder in named.compactors]
    folder = Path(name)
    if not folder.is_dir() or (folder / COMPACTOR_FILE).is_file():
        return [name]
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{COMPACTOR_FILE}"))
    if not inside:
        raise FileNotFoundError(f"{name} holds no compactor ({COMPACTOR_FILE}), nor does any folder in it")
    return inside


@dataclass(frozen=True)
class _Ceiling:
    """The full cache on one question set.

    Attributes:
        reference: an answer to every question as token ids; likelihoods are measured on these. They are the full
            cache's own words: a model that answers in a sentence would otherwise be judged by how badly it imitates a
            bare value.
        measured: whether the question's likelihoods count: those that the full cache answers rightly. Where it
            answers none of a set, the plain right answers are the references, and all count.
        stop_ids: ids that end an answer.
    """

    record: MethodRecord
    asked: Asked
    reference: list[list[int]]
    measured: list[bool]
    stop_ids: tuple[int, ...]


class Sitting:
    """One question set: its reading, its reference answers, and the cells asked of it."""

    def __init__(self, bench: Bench, asked: QuestionSet, other: QuestionSet) -> None:
        self.bench, self.set, self.other = bench, asked, other

    def results(self, cells: Sequence[Cell]) -> Iterator[dict]:
        """Compute cells of one method: what the cache of each was, and what it answered to each question.

        Those before one that fails come all the same, and what took long to make does not wait for the next one.
        """
        if cells[0].method in (CEILING, FLOOR):
            with hearing() as heard:
                ceiling = self._ceiling
                record, asked = (ceiling.record, ceiling.asked) if cells[0].method == CEILING else self._floor()
            found = [(record, asked, heard)]
        else:
            found = self._compacted(cells)
        for record, asked, heard in found:
            yield {
                "record": record.to_dict(),
                "warnings": list(dict.fromkeys(heard)),
                "facts": self.set.source["facts"],
                "source": self.set.source,
                "questions": [self._row(question, place, asked) for place, question in enumerate(self.set.questions)],
            }

    def _row(self, question: Question, place: int, asked: Asked) -> dict:
        output = self.bench.text(asked.outputs[place])
        verdict = exact_judge(output, question)
        counts = self._ceiling.measured[place]
        return {
            "id": question.id,
            "output": output,
            "label": verdict.label,
            "stale": verdict.stale,
            "recall": round(verdict.recall, 6),
            "cross_entropy": round(asked.cross_entropy[place], 6) if counts else 0.0,
            "kl": round(asked.kl[place], 6) if counts and asked.kl else 0.0,
            "tokens": len(self._ceiling.reference[place]) if counts else 0,
            "tags": question.tags,
        }

    def _compacted(self, cells: Sequence[Cell]) -> Iterator[tuple[MethodRecord, Asked, list[str]]]:
        method, made, failed = self.bench.method(cells[0]), [], None
        reading = self._wrong_reading if cells[0].method == "still-wrong-matter" else self._reading
        for cell in cells:
            try:
                with self.bench.attending(method), hearing() as heard, torch.no_grad():
                    made.append((*measure(method, self.bench.model, reading, ratio=cell.ratio), heard))
            except Exception as problem:
                failed = problem
            last = failed or cell is cells[-1]
            if made and (last or sum(record.seconds for _, record, _ in made) > PATIENCE):
                yield from self._answered(method, made)
                made = []
            if failed:
                raise failed

    def _answered(
        self, method: Method, made: Sequence[tuple[Cache, MethodRecord, list[str]]]
    ) -> Iterator[tuple[MethodRecord, Asked, list[str]]]:
        ceiling = self._ceiling
        with self.bench.attending(method), hearing() as heard:
            caches, teacher = [cache for cache, *_ in made], ceiling.asked.distributions
            asked = self._ask(caches, self._rendered[1], ceiling.reference, teacher=teacher)
        for (_, record, told), own in zip(made, asked, strict=True):
            yield record, own, [*told, *heard]

    def _floor(self) -> tuple[MethodRecord, Asked]:
        """The questions alone, in the model's own format, after a conversation without a document."""
        ceiling, full = self._ceiling, self._reading
        ids, questions = render_alone(self.bench.tokenizer, [each.text for each in self.set.questions], self.bench.form)
        reading = self.bench.read(ids)
        (asked,) = self._ask([reading.cache], questions, ceiling.reference, teacher=ceiling.asked.distributions)
        tokens, nbytes = full.input_ids.shape[-1], cache_nbytes(full.cache)
        return MethodRecord(FLOOR, {}, False, False, False, tokens, 0, 0, nbytes, 0.0, reading.seconds), asked

    @cached_property
    def _ceiling(self) -> _Ceiling:
        bench, questions = self.bench, self._rendered[1]
        with torch.no_grad():
            cache, record = measure(methods.get(CEILING), bench.model, self._reading)
        plain = [render_answer(bench.tokenizer, each.text, each.answer, bench.form) for each in self.set.questions]
        ends = [bench.tokenizer.eos_token_id, *_as_list(bench.model.generation_config.eos_token_id)]
        plain = [ids if ids[-1] in ends or bench.form.style == "plain" else [*ids, ends[0]] for ids in plain]
        stop_ids = tuple(dict.fromkeys(end for end in (*ends, *(ids[-1] for ids in plain)) if end is not None))
        (asked,) = self._ask([cache], questions, plain, stop_ids, keep_distributions=True)
        answers = zip(self.set.questions, asked.outputs, strict=True)
        right = [bool(exact_judge(bench.text(output), question).passed) for question, output in answers]
        if not any(right):
            return _Ceiling(record, asked, plain, [True] * len(plain), stop_ids)
        own = [[*output, ids[-1]] for output, ids in zip(asked.outputs, plain, strict=True)]
        again = [place for place, ids in enumerate(own) if ids != plain[place]]
        if again:
            some = [questions[place] for place in again], [own[place] for place in again]
            (second,) = self._ask([cache], *some, stop_ids, keep_distributions=True)
            for place, entropy, distribution in zip(again, second.cross_entropy, second.distributions, strict=True):
                asked.cross_entropy[place], asked.distributions[place] = entropy, distribution
        return _Ceiling(record, asked, own, right, stop_ids)

    def _ask(
        self, caches: Sequence, questions: list[list[int]], answers: list[list[int]], stop_ids=None, **options
    ) -> list[Asked]:
        prompt = Prompt(questions, answers, stop_ids or self._ceiling.stop_ids)
        limit = self.bench.config.max_new_tokens
        return ask_each(self.bench.model, caches, prompt, max_new_tokens=limit, **options)

    @cached_property
    def _rendered(self) -> tuple[list[int], list[list[int]]]:
        texts = [question.text for question in self.set.questions]
        return render(self.bench.tokenizer, self.set.documents, texts, self.bench.form)

    @cached_property
    def _reading(self) -> Reading:
        return self.bench.read(self._rendered[0], queries=self.bench.needs_queries)

    @cached_property
    def _wrong_reading(self) -> Reading:
        return self.bench.read(render(self.bench.tokenizer, self.other.documents, (), self.bench.form)[0])


@contextmanager
def hearing() -> Iterator[list[str]]:
    """What is warned of in the block, once it is over: a row says itself what lies outside the training."""
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield heard
    heard += [str(each.message) for each in caught if each.category is UserWarning]


def weights_digest(module: torch.nn.Module) -> str:
    """Twelve hex digits of a module's weights, from a few hundred entries of each tensor: enough to tell two apart."""
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        few = flat[:: max(1, flat.numel() // 256)].float().cpu().contiguous()
        state.update(f"{name} {tuple(tensor.shape)}".encode() + few.numpy().tobytes())
    return state.hexdigest()[:12]


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
