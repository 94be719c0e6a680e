"""One training run from start to end: model, rows, compactor, loop, and the folder that is left."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..attention import attending
from ..budgets import Split
from ..compactor import StillCompactor, fingerprint
from ..provenance import provenance
from .batches import DatasetRows, Draws, IterableRows, RowSource, bucket_lengths
from .checkpoints import newest_complete
from .config import TrainConfig
from .data import Row, load_rows, split_rows
from .journal import write_atomically
from .objective import Distiller
from .placing import Asked, fit_placement
from .rendering import Renderer
from .trainer import DistillTrainer

log = logging.getLogger(__name__)

FREE = ("save_every", "eval_every", "log_every", "keep", "eval_contexts")
"""Settings that may change between a run and its continuation: they change no step."""


def train(
    base: Any,
    rows: str | Path | Sequence[Row] | RowSource | Iterable[Row],
    output: str | Path,
    config: TrainConfig,
    *,
    held_out: Sequence[Row] = (),
    compactor: StillCompactor | None = None,
    compactor_options: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Train a compactor and leave it in `output`; a run that was cut off goes on from its newest whole checkpoint.

    Args:
        base: a `still.models.LoadedModel`, frozen.
        rows: what to train on: a path (see `still.distill.data`), rows, a `RowSource`, or an iterable that yields
            `Row`s without end, in which case `config.lengths` must be given.
        output: folder for the compactor, its card, metrics.jsonl and checkpoints.
        config: see `TrainConfig`.
        held_out: rows to score; without any, those that a path or a list of rows sets apart.
        compactor: the compactor to train; default: `config.start_from`, else a fresh one.
        compactor_options: fields of `StillConfig` for a fresh compactor.
        trainer_options: arguments of the library trainer.
        progress: show a progress bar.

    Returns:
        Scores on the held-out rows: `kl`, `accuracy`, `full`, `share`, and each of them by ratio.

    Raises:
        ValueError: the rows do not fit the lengths, or `output` holds a run with other settings.
    """
    output, renderer = Path(output), Renderer(base.tokenizer)
    if isinstance(rows, str | Path):
        rows = load_rows(rows, renderer)
    digest = ""
    if isinstance(rows, list | tuple):
        digest = hashlib.sha256(repr([(row.id, row.tokens) for row in rows]).encode()).hexdigest()[:16]
        chosen, apart = split_rows(rows, 0 if held_out else config.held_out, config.seed)
        held_out = held_out or apart
        source: RowSource = _dataset_rows(chosen, config)
    elif hasattr(rows, "rows") and hasattr(rows, "draws"):
        source = rows
    else:
        if not config.lengths:
            raise ValueError("rows that are made on the fly have no lengths to go by; give config.lengths")
        source = IterableRows(rows, Draws(config.seed, sorted(config.lengths), config.ratios))
    held_out = sorted(held_out, key=lambda row: hashlib.sha256(f"{config.seed}:{row.id}".encode()).digest())

    record = {"model": base.name, "fingerprint": fingerprint(base.model), "rows": digest, **asdict(config)}
    _check_run(output, record)
    if compactor is None:
        compactor = _compactor(base, config, source.draws.lengths, compactor_options or {})
        if compactor.config.placement and not config.start_from:
            if (checkpoint := newest_complete(output)) is None:
                place_latents(base, compactor, source, config, progress)
            else:
                compactor = StillCompactor.from_pretrained(checkpoint, model=base.model)
    if config.split:
        compactor.config.split = compactor.with_split(config.split).split.to_dict()
    split = Split.uniform(map(int, compactor.layers), compactor.kv_heads)
    if compactor.config.split:
        split = compactor.with_split().split
    distiller = Distiller(base.model, compactor, config.top_k)
    trainer = DistillTrainer(
        distiller, config, output, source, held_out, trainer_options, renderer.pad_id, progress=progress, split=split
    )
    made_by = provenance(config, config.seed, base.model.device, model=base.name, run=record)
    if trainer.is_world_process_zero():
        write_atomically(output / "train.json", json.dumps(made_by, indent=2) + "\n")
    with attending(base.model) if config.uneven or config.split or compactor.config.beta else nullcontext():
        scores = trainer.fit()
    trainer.describe_training()
    if trainer.is_world_process_zero():
        write_atomically(output / "README.md", card(base.name, compactor, config, scores))
        compactor.save_pretrained(output)
        write_atomically(output / "scores.json", json.dumps(scores, indent=2) + "\n")
    trainer.accelerator.wait_for_everyone()
    return scores


def place_latents(
    base: Any, compactor: StillCompactor, source: RowSource, config: TrainConfig, progress: bool = True
) -> float:
    """Fit the placement to the contexts of the first steps (see `Draws.placing`), and leave it then.

    Every process does it alike. See `placing.fit_placement`.
    """
    rows: list[Row] = []
    while len(rows) < config.place:
        rows += source.rows(source.draws.placing(len(rows) // config.batch), config.batch, range(config.batch))
    texts = [Asked.of(row) for row in rows[: config.place]]
    return fit_placement(compactor, base.model, texts, config.seed, progress=progress)


def place(device: str | None, dtype: str) -> tuple[str, str]:
    """Where the base goes and in what dtype: this process's GPU in bfloat16, else the CPU in float32."""
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return device, dtype


def card(model: str, compactor: StillCompactor, config: TrainConfig, scores: dict[str, float]) -> str:
    """A model card: what the compactor is for, what it was trained on, and how it scored."""
    trained = compactor.config
    ratios = ", ".join(f"{ratio:g}x" for ratio in trained.trained_ratios)
    lengths = " to ".join(str(length) for length in trained.trained_lengths) or "unknown"
    size = sum(p.numel() for p in compactor.parameters())
    own = any(name.startswith("uneven_") for name in scores)
    rows = [
        f"| {ratio:g}x | {scores[f'kl_{ratio:g}x']:.3f} | {scores[f'accuracy_{ratio:g}x']:.1%} | "
        + (f"{scores[f'share_{ratio:g}x']:.1%} |" if f"share_{ratio:g}x" in scores else "none right |")
        + (f" {scores.get(f'uneven_share_{ratio:g}x', 0):.1%} |" if own else "")
        for ratio in sorted(config.ratios)
        if f"accuracy_{ratio:g}x" in scores
    ]
    head = "| ratio | KL, nats per answer token | answers right | share of full |" + own * " with its own split |"
    table = "\n".join([head, "|---|---|---|---|" + own * "---|", *rows])
    scored = (
        f"On held-out contexts, teacher-forced (every token of an answer is the likeliest one after the right tokens "
        f"before it); with the full cache {scores['full']:.1%} of the answers are right.\n\n{table}\n"
        if rows
        else "It was not scored on held-out contexts.\n"
    )
    return f"""---
library_name: still-kv
base_model: {model}
tags: [kv-cache, compaction]
---

# A STILL compactor for {model}

It turns the KV cache of a context into a smaller one in a single forward pass; the base model itself is unchanged
and not part of these files.

```python
from still import StillCompactor

compactor = StillCompactor.from_pretrained("this-folder", model=model)
cache = compactor.prefill(model, context_ids, ratio={sorted(config.ratios)[len(config.ratios) // 2]:g})
```

- Parameters: {size:,} in float32.
- Trained on contexts of {lengths} tokens at ratios {ratios}, {trained.steps} steps of {config.batch} contexts, seed
  {config.seed}. Outside these lengths and ratios expect worse answers.
- Loss: forward KL from the full cache to the compact one on answer tokens, over the teacher's top {config.top_k}.

{scored}"""


def _dataset_rows(rows: Sequence[Row], config: TrainConfig) -> DatasetRows:
    lengths = config.lengths or bucket_lengths(row.tokens for row in rows)
    source = DatasetRows(rows, lengths, config.ratios, config.seed)
    if source.left_out:
        log.warning("%d rows are longer than %d tokens and are left out", source.left_out, max(lengths))
    return source


def _compactor(base: Any, config: TrainConfig, lengths: Sequence[int], options: dict[str, Any]) -> StillCompactor:
    """The compactor to start from: a trained one, or a fresh one whose bank fits the middle ratio."""
    if config.start_from:
        if options:
            raise ValueError(f"--compactor.{next(iter(options))} is set, but --start-from fixes what the compactor is")
        return StillCompactor.from_pretrained(config.start_from, model=base.model)
    options = {"chunk": max(lengths), "base_model": base.name, **options}
    ratio = None if "bank" in options else sorted(config.ratios)[len(config.ratios) // 2]
    with torch.random.fork_rng(devices=[]):  # the start is a function of the seed, whatever was drawn before
        torch.manual_seed(config.seed)
        return StillCompactor.for_model(base.model, ratio=ratio, **options)


def _check_run(output: Path, record: dict[str, Any]) -> None:
    """Refuse to continue a run with settings that would make it another run."""
    if newest_complete(output) is None or not (output / "train.json").exists():
        return
    before = json.loads((output / "train.json").read_text(encoding="utf-8"))["run"]
    free = (*FREE, "steps") if record["schedule"] == "constant" and not record["match"] else FREE
    changed = [name for name in record if name not in free and before.get(name) != record[name]]
    if changed:
        shown = ", ".join(f"{name} {before.get(name)!r} -> {record[name]!r}" for name in changed)
        raise ValueError(f"{output} holds a run with other settings ({shown}); give another output folder")
