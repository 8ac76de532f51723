"""How many kernels a layer of Qwen3 launches, and what launches them, where CUDA is not there: no kernel runs.

    python -m tests.support.layer_launches

Prints, for each way to compute it, "way mode launches-of-Triton calls-of-a-library". 4,096 tokens, NF4, r = 8, dense
enough in tokens that weights are expanded; the attention, torch's own, is one call here and is left out of the count.
"""

import os

os.environ["FASTLORA_BACKEND"] = "triton"

import torch
import transformers
from torch import Tensor, nn

import fastlora
from bench.compare.host_cuda import Counts, count
from bench.measure.pretend import pretend

TOKENS, HIDDEN = 4096, 256
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model() -> nn.Module:
    """One layer with adapters, random."""
    config = transformers.Qwen3Config(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=64, attn_implementation="nothing",
    )  # fmt: skip
    found = transformers.Qwen3ForCausalLM(config).bfloat16()
    return fastlora.replace_linear(found, r=8, quantize="nf4", target_modules=LINEARS)


def nothing(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, **options: object) -> tuple[Tensor, None]:
    """In the place of attention: q as attention returns it, and gradients for k and v, all without a kernel."""
    return _Nothing.apply(q, k, v), None


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return q.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, dy):
        _, k, v = ctx.saved_tensors
        return dy.transpose(1, 2), k.detach().view_as(k), v.detach().view_as(v)


def main() -> None:
    """Print the counts."""
    transformers.AttentionInterface.register("nothing", nothing)
    pretend(90)
    for way in ("linears", "speed_up", "group", "kept", "recomputed"):
        forward, both = one(way)
        print(way, "forward", forward.launches, forward.library)
        print(way, "backward", both.launches - forward.launches, both.library - forward.library)


def one(way: str) -> tuple[Counts, Counts]:
    """What forward launches, and forward and backward together."""
    whole = model()
    if way != "linears":
        fastlora.speed_up(whole, group=way != "speed_up")
    layer = whole.model.layers[0].train()
    x = torch.zeros(1, TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.zeros_like(x)
    angles = whole.model.rotary_emb(x, torch.arange(TOKENS)[None])
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    if way in ("kept", "recomputed"):
        options = {"context_fn": fastlora.keep_linears if way == "kept" else fastlora.keep_weights}
        whole.gradient_checkpointing_enable({"use_reentrant": False, **options})

    def forward() -> Tensor:
        return layer(x, position_embeddings=angles, attention_mask=None)

    both = count(lambda: torch.autograd.grad(forward(), leaves, dy))
    return count(forward), both


if __name__ == "__main__":
    main()
