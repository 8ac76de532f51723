"""What the kernels share at the level of a tile: the mask of dropout, and products that keep the adapters' precision.

`kernels.lora` says what the modes mean and how the mask is drawn.
"""

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def keep_mask(seed_ptr, offs_m, k_start, K, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which elements of the tile [BLOCK_M, BLOCK_K] survive dropout; k_start is a multiple of eight."""
    seed = tl.load(seed_ptr)
    group = k_start // 8 + tl.arange(0, BLOCK_K // 8)
    counter = offs_m[:, None] * ((K + 7) // 8) + group[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter.to(tl.int32), n_rounds=PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.uint32, bitcast=True)
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_M, BLOCK_K))
    return halves.to(tl.int32) >= threshold


@triton.jit
def top(v):
    """The upper half of fp32's bits: a value that bf16 holds exactly."""
    return (v.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def dot_bf16(left, right, acc, INTERPRETED: tl.constexpr):
    """acc + left right for values exact in bf16. The interpreter multiplies bf16 wrongly, so it is given fp32."""
    if INTERPRETED:
        acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc)
    else:
        acc = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), acc)
    return acc


@triton.jit
def dot(left, v, acc, MODE: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + left v, where `left` is an activation and `v` an adapter, h or g.

    "split" adds a tile's products up by themselves, the smallest first, and rounds once where they join `acc`: tensor
    cores cut off what they add to a sum, which over a long sum costs several bits.
    """
    if MODE == "narrow":
        acc = tl.dot(left, v.to(left.dtype), acc)
    elif MODE == "split":
        v1 = top(v)
        v2 = top(v - v1)
        v3 = v - v1 - v2
        part = dot_bf16(left, v3, tl.zeros_like(acc), INTERPRETED)
        part = dot_bf16(left, v2, part, INTERPRETED)
        acc += dot_bf16(left, v1, part, INTERPRETED)
    else:
        acc = tl.dot(left.to(tl.float32), v.to(tl.float32), acc, input_precision=MODE)
    return acc
