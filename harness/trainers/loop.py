"""The training loop: `transformers.Trainer` around `RowModel`, one optimizer step for each set of trajectories."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ...distill.checkpoints import MARKER, is_complete, mark_complete, step_of, take_up
from ...distill.progress import MetricsFile
from ...distill.trainer import check_options
from .attention import attending_rows, can_pack
from .clock import Clock
from .config import TrainSettings
from .model import Outcome, RowModel, Share
from .openings import LEAST, can_share
from .sharding import check_deepspeed, check_fsdp, gather, prepare, reducing_once, whole_state
from .steps import StepSource, StepStream
from .weights import load_weights, save_weights

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
OWN = {
    "output_dir": "-o", "max_steps": "--steps or --epochs", "learning_rate": "--lr", "lr_scheduler_type": "--schedule",
    "warmup_steps": "--warmup", "weight_decay": "--weight-decay", "max_grad_norm": "--clip", "seed": "--train-seed",
    "save_steps": "--save-every", "save_total_limit": "--keep", "gradient_checkpointing": "--checkpointing",
    "per_device_train_batch_size": "--micro-tokens", "gradient_accumulation_steps": "--micro-tokens",
    "num_train_epochs": "--epochs", "remove_unused_columns": "", "ignore_data_skip": "", "save_strategy": "",
    "load_best_model_at_end": "", "auto_find_batch_size": "", "save_only_model": "", "use_cpu": "--device",
    "logging_nan_inf_filter": "", "label_smoothing_factor": "",
}  # fmt: skip
"""Arguments of the library trainer that have a flag here, or that would break this loop (no flag)."""


def training_arguments(
    settings: TrainSettings, output: str | Path, steps: int, options: dict[str, Any], cpu: bool
) -> TrainingArguments:
    """The library trainer's arguments.

    Raises:
        ValueError: an option does not exist, or is set by a flag of ours.
    """
    check_options(options, OWN)
    ours = {
        "output_dir": str(output), "max_steps": steps, "per_device_train_batch_size": 1, "learning_rate": settings.lr,
        "lr_scheduler_type": SCHEDULES[settings.schedule], "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay, "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": settings.clip,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": settings.save_every,
        "save_total_limit": settings.keep, "seed": settings.train_seed, "use_cpu": cpu,
        "remove_unused_columns": False, "ignore_data_skip": True, "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(**{**ours, **options})


class RowTrainer(Trainer):
    """Trains a `RowModel` on the steps of a source, and resumes at the newest whole checkpoint.

    Args:
        module: policy and compactor.
        settings: how.
        output: folder of checkpoints and `metrics.jsonl`.
        source: of the steps; asked for a step when its turn has come, so it may roll out with the weights as they are.
        steps: optimizer steps.
        tokenizer: saved beside a whole policy.
        options: further arguments of the library trainer.
        extra: further numbers of the step that was just taken, for the log.
        clock: that the source measures its own work with; the log says where each step's seconds went.
    """

    def __init__(
        self, module: RowModel, settings: TrainSettings, output: str | Path, source: StepSource, steps: int,
        tokenizer: Any = None, options: dict[str, Any] | None = None, extra: Callable[[], dict[str, float]] = dict,
        clock: Clock | None = None,
    ):  # fmt: skip
        cpu = next(module.policy.parameters()).device.type == "cpu"
        args = training_arguments(settings, output, steps, options or {}, cpu)
        self.settings, self.source, self.tokenizer, self.extra = settings, source, tokenizer, extra
        self.first_step, self._sums, self._settled, self.clock = 0, {}, False, clock or Clock()
        super().__init__(model=module, args=args)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not self.is_fsdp_enabled:
            raise ValueError("accelerate has no FSDP on CPUs: take harness/configs/ddp.yaml or deepspeed.yaml")
        if self.is_fsdp_enabled:
            check_fsdp(module, self.accelerator.state.fsdp_plugin)
        if self.is_deepspeed_enabled:
            from deepspeed import DeepSpeedEngine

            check_deepspeed(module, self.accelerator.state.deepspeed_plugin.deepspeed_config, DeepSpeedEngine)
        self.metrics_file = MetricsFile(Path(output) / "metrics.jsonl")
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                self.remove_callback(callback)

    @property
    def module(self) -> RowModel:
        """What trains, without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def fit(self) -> None:
        """Train from where the folder stands to the last step."""
        checkpoint = take_up(self)
        self.first_step = step_of(checkpoint) if checkpoint else 0
        self.clock.start()
        if self.first_step < self.args.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if self.is_deepspeed_enabled:
                self.deepspeed.destroy()  # or its hooks would meet those of the next trainer's engine
        elif checkpoint:
            load_weights(self.module, checkpoint)
        gather(self.model)

    def get_train_dataloader(self) -> DataLoader:
        """Steps from the first one on; none is fetched ahead, since it may need the weights that the last one left."""
        policy = self.module.policy
        sharing = can_share(policy)
        with attending_rows(policy):
            packing = can_pack(policy, LEAST if sharing else 0)
        stream = StepStream(
            self.source, self.first_step, self.args.max_steps, self.args.process_index, self.args.world_size,
            self.settings.micro_tokens, sharing, packing, self._ready,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(self.settings.train_seed)
        return DataLoader(stream, batch_size=None, generator=generator)

    def _ready(self) -> None:
        """Before a step: rollouts and rows find whole weights."""
        if not self._settled:
            self._settled = True
            prepare(self.model)
        gather(self.model)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward over the step's micro-batches; only the last one synchronises."""
        with attending_rows(self.module.policy), self.clock.measuring("model"):
            total = self._micro_batches(model, inputs)
            if total.device.type == "cuda":
                torch.cuda.synchronize(total.device)  # or the last backward pass would count as something else
        return total

    def _micro_batches(self, model, inputs) -> torch.Tensor:
        model.train()
        total = torch.zeros((), device=self.args.device)
        with reducing_once(model, self.accelerator) as (alone, backward):
            for place, batch in enumerate(inputs, 1):
                with alone() if place < len(inputs) else contextlib.nullcontext():
                    out = self._forward(model, batch)
                    backward(out.loss * self.accelerator.num_processes)
                total += out.loss.detach()
                for name, value in out.sums.items():
                    self._sums[name] = self._sums.get(name, 0.0) + value
        return self.accelerator.reduce(total, "sum")

    def _forward(self, model, batch: Sequence[Share]) -> Outcome:
        with self.compute_loss_context_manager():
            out = model(batch)
        if not math.isfinite(out.loss.item()):
            names = sorted({share.row.trajectory_id for share in batch})
            raise ValueError(f"the loss of step {self.state.global_step} is {out.loss.item()}: look at {names}")
        return out

    def floating_point_ops(self, inputs) -> int:
        """Not counted."""
        return 0

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices."""
        return [name for name, p in model.named_parameters() if p.ndim == 2 and p.requires_grad]

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """The library's; a compactor with a rate of its own in the last groups."""
        made = self.optimizer is None
        optimizer, rate = super().create_optimizer(*args, **kwargs), self.settings.compactor_lr
        if made and rate is not None:
            slots = {id(p) for p in self.module.compactor.parameters()}
            groups = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            for which, lr in ((False, self.settings.lr), (True, rate)):
                for group in groups:
                    params = [p for p in group["params"] if (id(p) in slots) is which]
                    if params:
                        optimizer.param_groups.append({**group, "params": params, "lr": lr})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line of metrics: per-token means over all processes, and what the source adds."""
        if "loss" in logs:
            if self.settings.compactor_lr is not None:
                logs["compactor_learning_rate"] = logs["learning_rate"] * self.settings.compactor_lr / self.settings.lr
            logs |= self._means() | self.extra() | self.clock.take()
        super().log(logs, start_time)
        logs.pop("epoch", None)
        if self.is_world_process_zero() and "train_runtime" not in logs:
            self.metrics_file.write({"step": self.state.global_step, **logs})

    def _means(self) -> dict[str, float]:
        names = ("tokens", "nll", "gap", "ratio", "kl", "distill", "clipped", "truncated")
        table = torch.tensor([self._sums.get(name, 0.0) for name in names], device=self.args.device)
        seen = [name in self._sums for name in names]
        self._sums = {}
        sums = dict(zip(names, self.accelerator.reduce(table, "sum").tolist(), strict=True))
        tokens = max(1.0, sums["tokens"])
        shown = {name: sums[name] / tokens for name, there in zip(names, seen, strict=True) if there}
        return {**shown, "tokens": sums["tokens"]}

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and folder.exists() and is_complete(folder):
            (folder / MARKER).unlink()  # it is about to be written again
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder, self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains; every process calls this."""
        state = whole_state(self.module)
        if self.args.should_save:
            save_weights(self.module, Path(output_dir or self.args.output_dir), self.tokenizer, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_weights(self.module, resume_from_checkpoint)


def world() -> tuple[int, int]:
    """Rank and number of the processes of this run; launchers say so before any process group exists."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def mine(items: Sequence[Any]) -> Sequence[Any]:
    """This process's share of what all of this run divide among them."""
    rank, processes = world()
    return items[rank::processes]


def barrier() -> None:
    """Wait for the other processes of this run, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def agreed(value: Any) -> Any:
    """What the first process of this run says, in all of them."""
    said = [value]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(said, src=0)
    return said[0]
