"""One of two processes that share a step with FSDP2 on CPUs, against the same step in one piece.

    torchrun --nproc_per_node 2 shard_worker.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "still")]


def main(folder: Path) -> None:
    """Three steps with KV rows and text rows, saved and loaded; asserts what the test says."""
    import torch
    import torch.distributed as dist
    from agent_cases import tiny_agent
    from test_kv_rows import still
    from test_train_loop import rows
    from torch.distributed.fsdp import fully_shard
    from trainer_cases import plain_row

    from still.harness.trainers import sharding
    from still.harness.trainers.model import RowModel
    from still.harness.trainers.steps import own_batches, shares_of
    from still.harness.trainers.weights import digest, load_weights, save_weights, trained

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    step = {"keep": "exact", "start": 0, "end": 8, "slots": 8, "first": 0, "last": 0}
    plan = [step, {**step, "keep": "append", "start": 8, "end": 40, "slots": 8}]
    ids = torch.randint(7, 260, (60,), generator=torch.Generator().manual_seed(2)).tolist()
    behind = plain_row(ids[40:], range(4, 20), "slots", prefix_ids=ids[:40], prefix_plan=plan, prefix_method="still")
    shares = shares_of([*rows(6), behind], "token", 0, 1.0)  # one process gets the slots, with forwards of its own

    def fresh() -> RowModel:
        loaded = tiny_agent(layers=2)
        return RowModel(loaded.model.requires_grad_(True), still(loaded.model)).train()

    whole, shards = fresh(), fresh()
    for layer in shards.policy.get_decoder().layers:
        fully_shard(layer)
    fully_shard(shards)
    accelerator = SimpleNamespace(backward=lambda loss: loss.backward())
    one, other = (torch.optim.SGD(module.parameters(), lr=0.1) for module in (whole, shards))
    sharding.prepare(shards)
    for _ in range(3):
        for batch in own_batches(shares, 0, 1, 60):
            whole(batch).loss.backward()
        sharding.gather(shards)
        assert digest(shards)  # whole weights, to play with
        mine = own_batches(shares, rank, world, 60)
        with sharding.reducing_once(shards, accelerator) as (_, backward):
            for batch in mine:
                backward(shards(batch).loss * world)
        for optimizer in (one, other):
            optimizer.step()
            optimizer.zero_grad()
    counts = [None] * world
    dist.all_gather_object(counts, len(mine))
    assert len(set(counts)) > 1, f"processes were meant to have unequal numbers of micro-batches, not {counts}"
    state = {name: tensor for name, tensor in sharding.whole_state(shards).items() if name.startswith("policy")}
    wanted = trained(whole)
    assert state.keys() == wanted.keys()
    worst = max(float((state[name] - tensor).abs().max()) for name, tensor in wanted.items())
    assert worst < 1e-6, worst
    start = trained(fresh())
    assert max(float((state[name] - start[name]).abs().max()) for name in state) > 1e-3
    local = sum(p.to_local().numel() for p in shards.policy.parameters())
    assert local < 0.6 * sum(p.numel() for p in whole.policy.parameters())

    if rank == 0:
        save_weights(shards, folder, state=state)
    dist.barrier()
    plain = fresh()
    load_weights(plain, folder)
    sharding.assign(shards, start)
    again = sharding.whole_state(shards)
    assert all(torch.equal(again[name], tensor) for name, tensor in start.items())
    load_weights(shards, folder)
    sharding.gather(shards)
    assert digest(plain) == digest(shards)
    if rank == 0:  # a rollout of one process waits for no other
        with torch.no_grad():
            logits = shards.policy.eval()(torch.tensor([ids])).logits
            assert torch.allclose(logits, plain.policy.eval()(torch.tensor([ids])).logits, atol=1e-5)
    dist.barrier()
    (folder / f"process-{rank}").write_text(f"{worst}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
