"""The training loop: `transformers.Trainer` around the one module that holds teacher, compaction and student."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ..attention import attending
from ..budgets import Split
from ..compactor import StillCompactor
from ..compactor_io import WEIGHTS
from .batches import BatchStream, RowSource
from .checkpoints import is_complete, mark_complete, step_of, take_up
from .config import TrainConfig
from .data import Row
from .objective import Distiller
from .progress import MetricsFile, ProgressBar
from .scoring import score

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
OWN = {
    "output_dir": "-o", "max_steps": "--steps", "learning_rate": "--lr", "lr_scheduler_type": "--schedule",
    "warmup_steps": "--warmup", "weight_decay": "--weight-decay", "max_grad_norm": "--clip", "seed": "--seed",
    "per_device_train_batch_size": "--micro-batch", "gradient_accumulation_steps": "--batch and --micro-batch",
    "logging_steps": "--log-every", "save_steps": "--save-every", "save_total_limit": "--keep",
    "eval_steps": "--eval-every", "num_train_epochs": "--steps", "remove_unused_columns": "", "ignore_data_skip": "",
    "save_strategy": "", "eval_strategy": "", "load_best_model_at_end": "", "auto_find_batch_size": "",
    "label_smoothing_factor": "", "save_only_model": "", "gradient_checkpointing": "", "activation_checkpointing": "",
    "use_cpu": "--device",
}  # fmt: skip
"""Arguments of the library trainer that have a flag here, or that would break this loop (no flag)."""


def check_options(options: Iterable[str], own: Mapping[str, str]) -> None:
    """Refuse arguments of the library trainer that are not to be had.

    Args:
        options: their names.
        own: the flag that sets one instead; empty where a loop depends on its value.

    Raises:
        ValueError: an option does not exist, or is set by a flag of ours.
    """
    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    for name in options:
        if name in own:
            mend = f"use {own[name]}" if own[name] else "this loop depends on its value"
            raise ValueError(f"--trainer.{name} cannot be set: {mend}")
        if name not in known:
            raise ValueError(f"--trainer.{name}: transformers.TrainingArguments has no such field")


def training_arguments(
    config: TrainConfig, output: str | Path, options: dict[str, Any], world: int, cpu: bool
) -> TrainingArguments:
    """The library trainer's arguments.

    Args:
        config: ours.
        output: folder of the run.
        options: further arguments by name, those of `--trainer.NAME VALUE`.
        world: processes.
        cpu: train on the CPU even where there is a GPU.

    Raises:
        ValueError: an option does not exist, or is set by a flag of ours.
    """
    check_options(options, OWN)
    if config.batch % (config.micro_batch * world):
        raise ValueError(
            f"batch is {config.batch}; it must be a multiple of micro_batch {config.micro_batch} times {world} process"
        )
    ours = {
        "output_dir": str(output),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.batch // (config.micro_batch * world),
        "learning_rate": config.lr,
        "lr_scheduler_type": SCHEDULES[config.schedule],
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": config.clip,
        "logging_steps": config.log_every,
        "save_strategy": "steps",
        "save_steps": config.save_every,
        "save_total_limit": config.keep,
        "eval_strategy": "steps" if config.eval_every else "no",
        "eval_steps": config.eval_every or None,
        "seed": config.seed,
        "use_cpu": cpu,  # or several processes on CPUs would each think that they are alone
        "remove_unused_columns": False,
        "ignore_data_skip": True,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**ours, **options})


class DistillTrainer(Trainer):
    """Trains the compactor of a `Distiller`.

    Only the compactor is saved. A resumed run starts at the newest checkpoint that is whole, and continues with the
    batches that an uninterrupted run would have seen.

    Args:
        distiller: the frozen base and the compactor.
        config: how to train.
        output: folder for checkpoints, metrics and the trained compactor.
        source: the rows of every step; see `RowSource`.
        held_out: rows that are scored.
        options: further arguments of the library trainer, by name.
        pad_id: id that fills shorter rows.
        progress: show a progress bar.
        split: around which `config.uneven` of the steps draw theirs; held-out rows are scored with it too.
    """

    def __init__(
        self,
        distiller: Distiller,
        config: TrainConfig,
        output: str | Path,
        source: RowSource,
        held_out: Sequence[Row] = (),
        options: dict[str, Any] | None = None,
        pad_id: int = 0,
        progress: bool = True,
        split: Split | None = None,
    ):
        self.split = split
        self.config, self.source, self.held_out, self.pad_id = config, source, list(held_out), pad_id
        cpu = next(distiller.model.parameters()).device.type == "cpu"
        args = training_arguments(config, output, options or {}, _world(), cpu)
        self.first_step = 0
        self.before = distiller.compactor.config.steps if config.start_from else 0
        self.scores: dict[str, float] = {}
        self._scored_at = -1
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
        self._spans: list[int] = []
        super().__init__(model=distiller, args=args, eval_dataset=self.held_out)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("the compactor trains with plain or DDP processes; turn FSDP and DeepSpeed off")
        if self.args.world_size != _world():
            raise ValueError(f"{_world()} processes were launched, and the trainer sees {self.args.world_size} of them")
        self.model_accepts_loss_kwargs = True  # the library counts answer tokens over the whole step for `compute_loss`
        self.metrics_file = MetricsFile(Path(output) / "metrics.jsonl")
        if progress:
            self.add_callback(ProgressBar(config.steps))
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                self.remove_callback(callback)

    @property
    def compactor(self) -> StillCompactor:
        """The compactor that trains."""
        return self.accelerator.unwrap_model(self.model).compactor

    def fit(self) -> dict[str, float]:
        """Train from where the folder stands to the last step.

        Returns:
            The scores on held-out rows, empty without any.
        """
        checkpoint = take_up(self)
        self.first_step = step_of(checkpoint) if checkpoint else 0
        if self.first_step < self.config.steps:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        elif checkpoint:
            self._load_from_checkpoint(str(checkpoint))
            self.state.global_step = self.first_step
        if self._scored_at != self.state.global_step:
            self.evaluate()
        return self.scores

    def get_train_dataloader(self) -> DataLoader:
        """Batches from the first step onwards; each process makes its own, so nothing is dispatched between them."""
        config = self.config
        stream = BatchStream(
            self.source,
            start=self.first_step,
            batch=config.batch,
            micro_batch=config.micro_batch,
            rank=self.args.process_index,
            world=self.args.world_size,
            questions=config.questions,
            pad_id=self.pad_id,
            split=self.split,
            uneven=config.uneven,
            crowd=config.crowd,
        )
        workers = self.args.dataloader_num_workers
        generator = torch.Generator().manual_seed(config.seed)  # the loader would draw from the global one
        return DataLoader(stream, batch_size=None, num_workers=workers, generator=generator)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices, but neither the latent bank nor anything with one dimension."""
        return [name for name, p in model.named_parameters() if p.ndim == 2 and p.requires_grad]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """KL per answer token over the tokens of the whole step: every process and every micro-batch."""
        inputs = dict(inputs)
        ratio, _ = inputs.pop("ratio"), inputs.pop("length")
        match = self.config.match_at(self.state.global_step)
        out = model(**inputs, num_items_in_batch=num_items_in_batch, match=match)
        counts = [out.kl * out.tokens, out.cross_entropy * out.tokens, out.right.sum(), out.tokens]
        self._sums[f"{ratio:g}x"] += torch.stack([torch.as_tensor(x, dtype=torch.float64).cpu() for x in counts])
        lengths = inputs["context_mask"].sum(-1)
        self._spans = [*self._spans[:2], int(lengths.min()), int(lengths.max())]
        self._spans = [min(self._spans), max(self._spans)]
        loss = out.loss * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line of metrics; `kl` is nats per answer token, mean over the steps since the last line."""
        if "loss" in logs:
            logs.pop("loss")  # what is no KL may be in it
            logs |= self._take_sums()
        super().log(logs, start_time)
        logs.pop("epoch", None)
        if self.is_world_process_zero() and "train_runtime" not in logs:
            self.metrics_file.write({"step": self.state.global_step, **logs})

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Score held-out rows at every ratio; see `scoring.score`."""
        self._scored_at = self.state.global_step
        if not self.held_out:
            return {}
        distiller = self.accelerator.unwrap_model(self.model)
        ranks = (self.args.process_index, self.args.world_size)
        sums = score(distiller, self.held_out[: self.config.eval_contexts], self.config.ratios, *ranks, self.pad_id)
        self.scores = sums.reduced(self.accelerator).metrics()
        if self.compactor.config.split:
            with attending(distiller.model):
                sums = score(distiller, self.held_out[: self.config.eval_contexts], self.config.ratios, *ranks,
                             self.pad_id, split=self.split)  # fmt: skip
            uneven = sums.reduced(self.accelerator).metrics()
            self.scores |= {f"uneven_{name}": value for name, value in uneven.items() if name != "full"}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def describe_training(self) -> None:
        """Write what was trained into the compactor's config: lengths, ratios, seed, steps. Called on all processes."""
        config, kept = self.compactor.config, self.compactor.config.trained_lengths
        spans = self._spans or [0, 0]
        low = self.accelerator.gather(torch.tensor([spans[0] or 1 << 40], device=self.args.device)).min().item()
        high = self.accelerator.gather(torch.tensor([spans[1]], device=self.args.device)).max().item()
        if high:
            config.trained_lengths = [min([low, *kept]), max([high, *kept])]
        config.trained_ratios = sorted({*config.trained_ratios, *self.source.draws.ratios})
        config.seed, config.steps = self.config.seed, self.before + self.state.global_step

    def _take_sums(self) -> dict[str, float]:
        """KL by ratio, and cross-entropy and accuracy of answer tokens, since the last line, over all processes."""
        names = [f"{ratio:g}x" for ratio in self.source.draws.ratios]
        table = torch.stack([self._sums[name] for name in names]).float().to(self.args.device)
        table = self.accelerator.reduce(table, "sum").double().cpu()
        self._sums.clear()
        tokens = table[:, 3].sum().clamp(min=1)
        out = {
            name: (table[:, column].sum() / tokens).item()
            for column, name in enumerate(("kl", "cross_entropy", "right"))
        }
        return out | {f"kl_{name}": (row[0] / row[3]).item() for name, row in zip(names, table, strict=True) if row[3]}

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and folder.exists() and is_complete(folder):
            (folder / "complete.json").unlink()  # it is about to be written again
        self.describe_training()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder, self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.compactor._save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        saved = StillCompactor.from_pretrained(resume_from_checkpoint).config
        self.compactor.load_state_dict(load_file(Path(resume_from_checkpoint) / WEIGHTS))
        self.compactor.config.trained_lengths = saved.trained_lengths


def _world() -> int:
    """Processes of this run; launchers say so before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))
