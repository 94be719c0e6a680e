"""Steps whose gradients and optimizer states lie in shards of two processes, and files that accelerate takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

WORKER = Path(__file__).with_name("shard_worker.py")


@pytest.mark.full
def test_shards_train_as_the_whole_does_however_uneven_the_processes_are(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*command, str(tmp_path)], env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(list(tmp_path.glob("process-*"))) == 2


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_accelerate_takes_the_files_that_are_shipped(name, checkout):
    found = load_config_from_file(str(checkout / "harness" / "configs" / f"{name}.yaml"))
    assert found.num_processes == 2
    if name == "fsdp":
        assert found.fsdp_config["fsdp_version"] == 2
        assert found.fsdp_config["fsdp_reshard_after_forward"] is False
