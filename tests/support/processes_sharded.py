"""One of two processes over which FSDP2 spreads tiny models; tests/ecosystem/test_sharded.py starts them.

    python -m tests.support.processes_sharded OUT

Each of `MODELS` is sharded and its adapter saved to a directory next to OUT; process 0 writes the rest to OUT.
"""

import os
import sys
from pathlib import Path

import peft
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastlora
from fastlora.layers.sharded import whole
from fastlora.model.trained_tokens import TrainedTokens
from tests.support.eva_cases import batches, spread
from tests.support.expert_cases import ours as experts
from tests.support.models import llama, qwen2, randomize, tokens

TARGETS = ["q_proj", "v_proj", "down_proj"]
EVA = {"r": 4, "target_modules": TARGETS, "init_lora_weights": "eva"}


def own(**options):
    return randomize(fastlora.replace_linear(llama(), r=4, target_modules=TARGETS, **options))


def plain_peft(base=llama, targets=TARGETS, **options):
    return randomize(peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=targets, **options)))


MODELS = {
    "own": lambda: own(modules_to_save=["norm"]),
    "nf4": lambda: own(quantize="nf4"),
    "pissa": lambda: own(init_lora_weights="pissa"),
    "tokens": lambda: own(trainable_token_indices=[3, 60]),
    "experts": lambda: experts(target_modules=["q_proj"]),
    "peft": plain_peft,
    "sped-up peft": lambda: fastlora.replace_linear(plain_peft()),
    "peft with biases": lambda: plain_peft(qwen2, bias="all"),
    "peft with its layers' biases": lambda: fastlora.replace_linear(plain_peft(qwen2, bias="lora_only")),
    "peft with an embedding": lambda: plain_peft(targets=[*TARGETS, "embed_tokens"]),
}


HEADS = {
    "frozen": own,
    "trained": lambda: own(modules_to_save=["lm_head"]),
    "adapted": lambda: randomize(fastlora.replace_linear(llama(), r=4, target_modules=["q_proj", "lm_head"])),
}
SPREAD = {"layers": {}, "one unit": {"units": False}, "head": {"head": True}}


def sharded(model, units=True):
    """One unit a decoder layer and one for the rest; or one for all, which stays gathered after a forward."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.model if not isinstance(model, peft.PeftModel) else model.base_model.model.model).layers:
        if units:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def logits(model):
    return model(tokens()).logits.detach()


def refusal(call):
    """The message of the ValueError that a call raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def step(model):
    """The loss and the full gradients of one step."""
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    named = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | {name: whole(grad) for name, grad in named.items()}


def sped_up(model, units=True, head=False):
    """A step of a model whose loss is sped up, its logits, and why its loss is not, where the head is a unit too."""
    fastlora.speed_up(model)
    if head:
        fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (2,)))
    sharded(model, units)
    with torch.no_grad():
        out = model(input_ids=tokens(), labels=tokens())
        found = {"logits": out.logits + 0, "evaluated": out.loss}
    for _ in range(2):
        model.zero_grad()
        found |= step(model)
    return found | {"reason": [row.reason for row in fastlora.report(model).parts if row.part == "loss"]}


def weights(model):
    """The weights that others read of adapted layers, and the full gradients of what is trained through them."""
    read = {name: m.weight for name, m in model.named_modules() if isinstance(m, (fastlora.LoRALinear, TrainedTokens))}
    sum(weight.square().sum() for weight in read.values()).backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {name: weight.detach() for name, weight in read.items()} | grads


def gathered(model):
    """Sharded as one unit, and left gathered by a forward."""
    logits(sharded(model, units=False))
    return model


def loaded(directory):
    """Logits after loading into sharded models that have other adapters, some of them gathered just before."""
    found = {}
    for name in ("own", "nf4", "tokens", "experts"):
        for units in (True, False):
            model = sharded(MODELS[name](), units)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(0.5)
            before = logits(model)
            fastlora.load_adapter(model, directory / name)
            found[name, units] = before, logits(model)
    return found


def main(out):
    """Save, load, refuse, compile; process 0 writes the results."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, directory = distributed.get_rank(), Path(out).parent
    found = {}
    for name, make in MODELS.items():
        model = sharded(make())
        logits(model)
        fastlora.save_adapter(model, directory / name)
        found["there", name, rank] = (directory / name / "adapter_model.safetensors").is_file()
    found["loaded"] = loaded(directory)
    bare, theirs = sharded(llama()), sharded(MODELS["sped-up peft"]())
    found["refused"] = [
        refusal(lambda: fastlora.load_adapter(bare, directory / "own")),
        refusal(lambda: fastlora.load_adapter(theirs, directory / "peft")),
        refusal(lambda: fastlora.replace_linear(bare)),
        refusal(lambda: fastlora.merge(sharded(own()))),
        refusal(lambda: fastlora.merge(theirs)),
        refusal(lambda: fastlora.merge(gathered(own()))),
        refusal(lambda: fastlora.load_adapter(gathered(llama()), directory / "own")),
    ]
    for backend in ("aot_eager", "inductor"):
        found["compiled", backend] = step(torch.compile(sharded(own()), backend=backend))
        torch._dynamo.reset()
    for kind in HEADS:
        for how in SPREAD:
            found["sped up", kind, how] = sped_up(HEADS[kind](), **SPREAD[how])
    for name in ("own", "nf4", "tokens"):
        found["weights", name] = weights(sharded(MODELS[name]()))
    mine = [{key: value.chunk(2)[rank] for key, value in batch.items()} for batch in batches()]
    found["eva"] = step(fastlora.replace_linear(spread(llama()), eva_dataloader=mine, **EVA))
    if rank == 0:
        torch.save(found, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(os.fspath(sys.argv[1]))
