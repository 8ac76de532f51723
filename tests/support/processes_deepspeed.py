"""One of two processes that train a tiny model by DeepSpeed ZeRO, which tests/ecosystem/test_deepspeed.py starts.

python -m tests.support.processes_deepspeed OUT
"""

import os
import sys

import deepspeed
import torch
from deepspeed import zero

from tests.support import processes as processes

CASES = {  # name: (model, stage)
    "zero 2": (processes.sped_up_peft, 2),
    "zero 3": (processes.sped_up_peft, 3),
    "zero 2, own nf4": (processes.own_nf4, 2),
    "zero 3, own nf4": (processes.own_nf4, 3),
    "zero 3, own": (processes.own, 3),
}


def train(model, stage):
    """As `processes.train`, on this process' rows."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = {
        "train_micro_batch_size_per_gpu": processes.BATCH // world,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=torch.optim.SGD(list(trained.values()), lr=0.5)
    )
    losses = []
    for rows in processes.batches():
        mine = rows.view(world, -1, rows.shape[-1])[rank]
        loss = engine(input_ids=mine, labels=mine, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        loss = loss.detach().double()
        torch.distributed.all_reduce(loss)
        losses.append(loss / world)
    with zero.GatheredParameters(list(trained.values()), enabled=stage == 3):
        values = {name: parameter.detach().clone() for name, parameter in trained.items()}
    return {"losses": torch.stack(losses), "trained": values, "calls": processes.calls(model)}


def main(out):
    """Train every case with the other process; process 0 writes the results."""
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    results = {name: train(make(), stage) for name, (make, stage) in CASES.items()}
    if os.environ["RANK"] == "0":
        torch.save(results, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
