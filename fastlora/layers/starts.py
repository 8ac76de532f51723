"""What A and B are before the first step, by peft's names for `init_lora_weights`.

    True                   A Kaiming-uniform, B = 0
    "gaussian"             A normal with deviation 1/r, B = 0
    "orthogonal"           A and B random with B A = 0; r even
    "pissa"                s B A = the r largest singular triples of W; the base becomes W - s B A
    "pissa_niter_N"        the same by N subspace iterations from a random start
    "olora"                B, A = the first r columns and rows of Q and R, W = Q R; the base becomes W - s B A
    "loftq"                s B A = the r largest singular triples of W - Q; the base becomes Q = NF4(W), and with
                           loftq_iter = N > 1 it is Q = NF4(W - s B A), N - 1 times over
    "eva"                  A = leading singular vectors of the layer's inputs, B = 0 (`fastlora.model.eva`)
    False                  A and B as `nn.Linear` makes them: the update is not zero

Random numbers are drawn in peft's order, so one seed gives both libraries the same start.

Where the base changes, the adapter is valid only on that changed base. So a model keeps its start and saves
s (B A - B0 A0), of rank 2 r, which means the same on the original base (`standalone`). "loftq" with one iteration does
not need that: loading the base in NF4 gives the changed base. For loftq peft leaves s out; here B A is divided by it,
so that the start is right for any `lora_alpha`, and equal to peft's where that is r.

Source: arXiv:2404.02948 (PiSSA), arXiv:2406.01775 (OLoRA), arXiv:2310.08659 (LoftQ);
https://datta0.github.io/posts/rethink-lora-init (orthogonal).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.layers.quoted import shown
from fastlora.ops import nf4

Pair = tuple[Tensor, Tensor]

_NAMES = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")
_NITER = re.compile(r"pissa_niter_(\d+)")


def check_known(init: Any) -> None:
    """Raise ValueError unless this is a start by one of the names above."""
    if isinstance(init, bool) or init in _NAMES or (isinstance(init, str) and _NITER.fullmatch(init)):
        return
    with_peft = "let peft initialize (get_peft_model) and call replace_linear on the result"
    raise ValueError(
        f"init_lora_weights={shown(init)} is not supported: use True, False, {', '.join(map(repr, _NAMES))} or "
        f"'pissa_niter_<N>', or {with_peft}"
    )


def reads_weight(init: Any) -> bool:
    """Whether a start is computed from the weight."""
    return isinstance(init, str) and init.startswith(("pissa", "olora", "loftq"))


def changes_base(init: Any, loftq_iter: int = 1) -> bool:
    """Whether the base becomes something other than the checkpoint's weight or its quantized form."""
    return reads_weight(init) and (init != "loftq" or loftq_iter > 1)


def loftq_iterations(config: Any) -> int:
    """`loftq_iter` of peft's `loftq_config`, a mapping or an object; 1 for None.

    Raises:
        ValueError: not such a config, an unknown option, other bits than 4, or a number of iterations below 1.
    """
    if not isinstance(config, (Mapping, type(None))) and not hasattr(config, "__dict__"):
        raise ValueError(f"loftq_config must be a mapping or a LoftQConfig, not {shown(config)}")
    options = dict(config or {}) if isinstance(config, (Mapping, type(None))) else dict(vars(config))
    unknown = [name for name in options if name not in ("loftq_bits", "loftq_iter")]
    if unknown:
        raise ValueError(f"loftq_config has no option {shown(unknown[0])}; it has loftq_bits and loftq_iter")
    if options.get("loftq_bits", 4) != 4:
        raise ValueError(f"loftq_config={options} is not supported: loftq_bits must be 4, as NF4 has")
    count = options.get("loftq_iter", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"loftq_config: loftq_iter must be a whole number of at least 1, not {shown(count)}")
    return count


def check_layer(init: Any, name: str, weight: Any, r: int, shared_with: str, quantized: bool) -> None:
    """Raise ValueError where a layer cannot have this start.

    Args:
        weight: [N, K], dense; or an `NF4Weight`.
        shared_with: the name of another parameter that is the same weight, or empty.
        quantized: whether the weight is about to become NF4.
    """
    said = f"init_lora_weights={shown(init)}"
    if init == "orthogonal" and r % 2:
        raise ValueError(f"{said} needs an even rank; {name} has r={r}")
    if init == "eva" and weight.device.type == "meta":
        raise ValueError(f"{said} runs the model, but the weight of {name} is not loaded: load the weights first")
    if not reads_weight(init):
        return
    if isinstance(weight, nf4.NF4Weight):
        raise ValueError(
            f"{said} starts from the weight before quantization, but that of {name} is quantized: load the model in "
            "full precision and pass quantize='nf4'"
        )
    if init == "loftq" and not quantized:
        raise ValueError(f"{said} makes up for quantization, but {name} is not quantized: pass quantize='nf4'")
    if changes_base(init) and shared_with:
        raise ValueError(f"{said} would change the weight of {name}, which is {shared_with} too: exclude the layer")
    if weight.device.type == "meta" or weight.numel() == 0:
        raise ValueError(f"{said} starts from the weight, but that of {name} is not loaded: load the weights first")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}.weight holds NaN or inf: repair the checkpoint, or exclude the layer")
    if r > min(weight.shape):
        raise ValueError(f"{said} needs r of at most {min(weight.shape)}, the rank of {name}; got r={r}")


def fill(init: Any, lora_a: nn.Linear, lora_b: nn.Linear, dtype: torch.dtype) -> None:
    """Start two new layers without reading the weight. dtype: the base's, to which "orthogonal" is rounded."""
    r = lora_a.out_features
    if init is True:
        nn.init.kaiming_uniform_(lora_a.weight, a=5**0.5)
    elif init == "gaussian":
        nn.init.normal_(lora_a.weight, std=1 / r)
    elif init == "orthogonal":
        basis = torch.linalg.qr(torch.randn(r, r)).Q
        a = (torch.randn(lora_a.in_features, r // 2) @ basis[0::2]).t() / 10
        b = (torch.randn(r // 2, lora_b.out_features).t() @ basis[1::2]) / 10
        lora_a.weight.data, lora_b.weight.data = (part.to(dtype).float().contiguous() for part in (a, b))
    if init in (True, "gaussian"):
        nn.init.zeros_(lora_b.weight)
    elif init not in (False, "orthogonal") and not reads_weight(init):
        raise ValueError(
            f"init_lora_weights={shown(init)} starts from data: replace_linear takes it, one layer does not"
        )


@torch.no_grad()
def from_weight(init: str, weight: Tensor, r: int, scaling: float) -> Pair:
    """(A0 [R, K], B0 [N, R]) in fp32, for `take_out` to take out of the weight.

    Args:
        init: "pissa", "pissa_niter_N" or "olora".
        weight: [N, K], any strides.
    """
    wide = weight.float()
    if init == "olora":
        q, upper = torch.linalg.qr(wide)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    found = _NITER.fullmatch(init)
    return _leading(wide, r, None if found is None else int(found[1]), scaling)


@torch.no_grad()
def take_out(weight: Tensor, pair: Pair, scaling: float) -> None:
    """The weight becomes W - scaling · B0 A0, in place."""
    weight.copy_(torch.addmm(weight.float(), pair[1], pair[0], alpha=-scaling))


@torch.no_grad()
def loftq(
    weight: Tensor, r: int, scaling: float, blocksize: int, double_quant: bool, iterations: int = 1
) -> tuple[Pair, Pair | None]:
    """(A0, B0) in fp32 that make up for the quantization of a weight [N, K], as far as rank r can.

    Returns:
        the pair, and the pair of the iteration before: the base is NF4(W - scaling · B A) of that one, NF4(W) if None.
    """
    wide, pair, before = weight.float(), None, None
    for _ in range(iterations):
        before = pair
        left = wide if before is None else torch.addmm(wide, before[1], before[0], alpha=-scaling)
        quantized = nf4.quantize(left, blocksize, double_quant)
        pair = _leading(wide - quantized.dequantize(torch.float32), r, None, scaling)
    assert pair is not None
    return pair, before


def standalone(pair: Pair, taken_out: Pair, scaling: float) -> Pair:
    """(A [2 R, K], B [N, 2 R]): the update on the base as it was before the start.

    Args:
        taken_out: (A0, s0 · B0), where s0 is the scaling at the start.
        scaling: the present one.
    """
    (a, b), (a0, b0) = pair, (part.to(pair[0].device) for part in taken_out)
    return torch.cat((a.float(), a0)), torch.cat((b.float(), -b0 / scaling), dim=1)


def _leading(matrix: Tensor, r: int, niter: int | None, scaling: float) -> Pair:
    """(A, B) with scaling · B A = the part of the r largest singular values; each factor has their square roots."""
    if niter is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, r, niter=niter)
        vh = v.t()
    root = (s[:r] / scaling).sqrt()
    return (root.unsqueeze(1) * vh[:r]).contiguous(), (u[:, :r] * root).contiguous()
