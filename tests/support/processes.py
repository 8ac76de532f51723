"""One of two processes that train tiny models together; tests/ecosystem/test_distributed.py starts them.

    python -m tests.support.processes OUT

Each of `CASES` is trained for a few steps under DDP or FSDP2; process 0 writes the results to OUT.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import accelerate
import peft
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import fastlora
from tests.support.models import bnb_llama, llama, randomize

STEPS, BATCH = 3, 4
TARGETS = ["q_proj", "v_proj", "down_proj"]


def plain_peft(dtype=torch.float32, **options):
    """A PeftModel with an update large enough to show in the output."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS, **options)
    return randomize(peft.get_peft_model(llama().to(dtype), config)).train()


def plain_qlora():
    """A PeftModel over bitsandbytes' weights."""
    model = bnb_llama()
    model.is_loaded_in_4bit = True
    return randomize(peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=32, target_modules=TARGETS))).train()


def sped_up_qlora():
    return fastlora.replace_linear(plain_qlora())


def sped_up_peft(**options):
    return fastlora.replace_linear(plain_peft(**options))


def sped_up_after_an_nn_linear():
    """accelerate finds a class by its name, the first in the model: here nn.Linear, not peft's lora.Linear."""
    model = sped_up_peft()
    attention = model.base_model.model.model.layers[0].self_attn._modules
    attention["q_proj"] = attention.pop("q_proj")  # to the end
    return model


def own(quantize=None):
    """fastlora's own adapters."""
    return randomize(fastlora.replace_linear(llama(), r=4, target_modules=TARGETS, quantize=quantize)).train()


def own_nf4():
    """fastlora's own adapters over NF4."""
    return own("nf4")


def fsdp2(**options):
    """accelerate's FSDP2 with one unit a decoder layer."""
    return accelerate.FullyShardedDataParallelPlugin(
        **{
            "fsdp_version": 2,
            "auto_wrap_policy": "transformer_based_wrap",
            "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": False,
            **options,
        }
    )


def batches():
    """STEPS batches of BATCH rows, the same in every process."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 64, (STEPS, BATCH, 12), generator=generator)


def train(model, accelerator=None, reentrant=None):
    """Train on this process' rows: losses over all rows, trained parameters, and what the report says afterwards."""
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for rows in batches():
        mine = rows.view(world, -1, rows.shape[-1])[rank]
        optimizer.zero_grad()
        loss = model(input_ids=mine, labels=mine, use_cache=False).loss
        if accelerator is None:
            loss.backward()
        else:
            accelerator.backward(loss)
            loss = accelerator.reduce(loss.detach(), "mean")
        optimizer.step()
        losses.append(loss.detach().double())
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            trained[name.removeprefix("module.")] = value.detach().clone()
    unwrapped = model if accelerator is None else accelerator.unwrap_model(model)
    return {
        "losses": torch.stack(losses),
        "trained": trained,
        "calls": calls(model),
        "kind": type(model).__name__,
        "report": fastlora.report(unwrapped) if hasattr(unwrapped, "fastlora_report") else None,
    }


def calls(model):
    """(calls sped up, calls stepped back, reasons) over all of peft's layers."""
    found = [module.fastlora_calls for module in model.modules() if hasattr(module, "fastlora_calls")]
    return sum(c.sped_up for c in found), sum(c.stepped_back for c in found), {c.last_reason for c in found} - {""}


def run_two(module, out, **environment):
    """What `python -m module OUT` writes to the file `out` in two processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(out)],
            env={**os.environ, **shared, **environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(text[-3000:] for text in outputs)
    return torch.load(out, weights_only=False)


class Case(NamedTuple):
    """A model, how it is spread over the processes, and how it is trained."""

    model: Callable[[], nn.Module]
    fsdp2: dict[str, Any] | None = None  # options; DDP where None
    reentrant: bool | None = None  # checkpointing of this kind
    mixed_precision: str = "no"


CASES = {
    "ddp": Case(sped_up_peft),
    "ddp, checkpointing": Case(sped_up_peft, reentrant=False),
    "ddp, reentrant checkpointing": Case(sped_up_peft, reentrant=True),
    "ddp, own nf4": Case(own_nf4),
    "fsdp2": Case(sped_up_peft, {}),
    "fsdp2, checkpointing": Case(sped_up_peft, {}, reentrant=False),
    "fsdp2, loaded by one": Case(sped_up_peft, {"cpu_ram_efficient_loading": True}),
    "fsdp2, dora": Case(lambda: sped_up_peft(use_dora=True), {}),
    "fsdp2, qlora": Case(sped_up_qlora, {}),
    "fsdp2, own": Case(own, {}),
    "fsdp2, own nf4": Case(own_nf4, {}),
    "fsdp2, bf16": Case(sped_up_peft, {}, mixed_precision="bf16"),
    "fsdp2, bf16, plain peft": Case(plain_peft, {}, mixed_precision="bf16"),
    "fsdp2, a unit for each sped-up layer": Case(sped_up_peft, {"transformer_cls_names_to_wrap": ["Linear"]}),
    "fsdp2, a unit for each nn.Linear": Case(sped_up_after_an_nn_linear, {"transformer_cls_names_to_wrap": ["Linear"]}),
}


def accelerator_for(case):
    """A new accelerator; the process group stays."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    if case.fsdp2 is None:
        return accelerate.Accelerator(cpu=True, mixed_precision=case.mixed_precision)
    plugin = fsdp2(**case.fsdp2)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate shards only over processes that have a device each, so these CPU processes are declared to be such
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = accelerate.DistributedType.FSDP, plugin
    if case.mixed_precision != "no":
        plugin.set_mixed_precision(case.mixed_precision)
    return accelerator


def main(out):
    """Train every case with the other processes; process 0 writes the results."""
    torch.set_num_threads(1)
    results = {name: train(case.model(), accelerator_for(case), case.reentrant) for name, case in CASES.items()}
    if os.environ["RANK"] == "0":
        torch.save(results, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
