"""A run of train_worker.py whose steps DeepSpeed takes, in processes on CPUs.

    torchrun --nproc_per_node 2 zero_worker.py STAGE rows|isft|grpo FOLDER

On CPUs accelerate takes DeepSpeed for one process alone, so it is told beforehand of the others.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    stage, kind, place = sys.argv[1:]
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
    }  # fmt: skip
    import deepspeed
    import train_worker
    from accelerate.state import DistributedType, PartialState

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    train_worker.work(kind, place)
