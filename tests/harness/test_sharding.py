"""Steps whose gradients and optimizer states lie in shards of two processes, and files that accelerate takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import train_worker
from accelerate.commands.config.config_args import load_config_from_file
from agent_cases import tiny_agent
from test_kv_rows import still
from test_train_kills import assert_alike

from still.harness.trainers.model import RowModel
from still.harness.trainers.sharding import check_deepspeed

SHARDS = Path(__file__).with_name("shard_worker.py")


def launch(*command: str | Path) -> None:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-m", *map(str, command)], env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.full
def test_shards_train_as_the_whole_does_however_uneven_the_processes_are(tmp_path):
    launch("torch.distributed.run", "--standalone", "--nproc_per_node", "2", SHARDS, tmp_path)
    assert len(list(tmp_path.glob("process-*"))) == 2


@pytest.mark.full
@pytest.mark.parametrize(("kind", "stage"), [("rows", "1"), ("rows", "2"), ("isft", "2"), ("grpo", "2")])
def test_deepspeed_trains_as_one_process_does(tmp_path, kind, stage, checkout):
    pytest.importorskip("deepspeed", reason="pip install deepspeed to run DeepSpeed's tests")
    train_worker.work(kind, str(tmp_path / "one"))
    file = checkout / "harness" / "configs" / "deepspeed.yaml"
    options = ("--config_file", file, "--zero_stage", stage, "--main_process_port", "0")
    for _ in range(2):
        launch("accelerate.commands.launch", *options, train_worker.__file__, kind, tmp_path / "two")
        assert len(list((tmp_path / "two").glob("process-*-of-2"))) == 2
        assert_alike(kind, tmp_path / "one", tmp_path / "two", bound=1e-4)
        if kind == "rows":  # and goes on where it was cut off
            assert list((tmp_path / "two" / "checkpoint-10").glob("global_step*"))  # DeepSpeed's own
            shutil.rmtree(tmp_path / "two" / "checkpoint-10")


@pytest.mark.parametrize(
    ("compactor", "config", "said"),
    [
        ("frozen", {"zero_optimization": {"stage": 3}}, "zero_stage is 3"),
        ("frozen", {}, "zero_stage is 0"),
        ("frozen", {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16"),
        ("rl", {"zero_optimization": {"stage": 2}}, "compactors have scalars"),
    ],
)
def test_deepspeed_is_told_what_rows_need(compactor, config, said):
    loaded = tiny_agent(layers=1)
    module = RowModel(loaded.model, still(loaded.model), compactor=compactor)
    engine = type("Engine", (), {"coalesce_grad_reduction": None})
    with pytest.raises(ValueError, match=said):
        check_deepspeed(module, config, engine)
    with pytest.raises(ValueError, match="pip install 'deepspeed>=0"):
        check_deepspeed(module, config, type("Older", (), {}))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_accelerate_takes_the_files_that_are_shipped(name, checkout):
    found = load_config_from_file(str(checkout / "harness" / "configs" / f"{name}.yaml"))
    assert found.num_processes == 2
    if name == "deepspeed":
        assert found.deepspeed_config["zero_stage"] == 2
    if name == "fsdp":
        assert found.fsdp_config["fsdp_version"] == 2
        assert found.fsdp_config["fsdp_reshard_after_forward"] is False
