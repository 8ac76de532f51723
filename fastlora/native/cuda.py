"""The compiled CUDA library, called through ctypes: the product with an NF4 weight for 1 to 16 tokens.

    y = x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias        W [N, K] in NF4, read once, as bitsandbytes lays it out

Generating text consists of this product: each token reads every weight, so the floor is 0.516 bytes a weight over the
bandwidth of the memory. There are two kernels: one over all columns, cut into ranges, and one that adds up the ranges,
in order, with the update and the bias. The arithmetic is fp32 from the 4-bit codes to the one rounding; the same input
gives the same bits.

The CUDA side (`csrc/cuda`) knows nothing of torch: this module checks every dtype, shape and layout before it passes an
address on. It launches on the current stream, takes its workspace from torch's caching allocator and never waits for
the device, so calls can be captured in a CUDA graph once a first call has loaded the kernels. At import nothing is
raised and no device is queried: `status()` says whether the library is there, `usable()` whether a device runs it.

`python -m fastlora.native` compiles the library where nvcc is found; `FASTLORA_CUDA_ARCHS` names architectures.
Source: arXiv:2305.14314, section 3; arXiv:2106.09685, section 4.1.
"""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastlora.kernels.operands import BLOCKSIZES, Packed, check_product
from fastlora.native import build as native_build
from fastlora.native.weight import DTYPES, Weight, pointer_of, weight_of

MAX_TOKENS = 16
MAX_RANK = 1 << 16
MAX_SIDE = 1 << 26  # of a weight

_COLUMNS = 64  # K is a multiple of this
_ALIGNMENT = 16  # bytes
_X_DTYPES = (torch.bfloat16, torch.float16)


class _Decode(ctypes.Structure):
    """fastlora::CudaDecode of csrc/fastlora_cuda.h."""

    _fields_ = (
        ("weight", Weight),
        ("x", ctypes.c_void_p),
        ("x_row_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("lora_a", ctypes.c_void_p),
        ("lora_b", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        ("x_dtype", ctypes.c_int32),
        ("adapter_dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
        ("device", ctypes.c_int32),
    )


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and what it is, or None and why there is none."""
    path, version = native_build.cuda_library_path(), native_build.CUDA_ABI_VERSION
    library, text = native_build.open_built(
        path, native_build.find_nvcc, open_library, lambda it: it.fastlora_cuda_abi_version(), version
    )
    if library is None:
        return None, text
    names = library.fastlora_cuda_architectures().decode().split("_")
    return library, f"{text} (for {', '.join(f'sm_{name}' for name in names)} and later)"


def open_library(path: Path) -> ctypes.CDLL:
    """Opens a library with the interface of csrc/fastlora_cuda.h and declares its functions.

    Raises:
        OSError: it cannot be opened.
        AttributeError: it lacks a function.
    """
    library = ctypes.CDLL(str(path))
    long = ctypes.c_int64
    library.fastlora_cuda_architectures.restype = ctypes.c_char_p
    library.fastlora_cuda_message.restype = ctypes.c_char_p
    library.fastlora_cuda_message.argtypes = (ctypes.c_int,)
    library.fastlora_cuda_decode_shared.restype = long
    library.fastlora_cuda_decode_shared.argtypes = (long,)
    library.fastlora_cuda_decode_workspace.restype = long
    library.fastlora_cuda_decode_workspace.argtypes = (long, long, long, long, long, ctypes.c_int, ctypes.c_int)
    library.fastlora_cuda_decode.argtypes = (ctypes.POINTER(_Decode), ctypes.c_void_p)
    return library


def _loaded() -> ctypes.CDLL:
    library, text = _load()
    if library is None:
        raise RuntimeError(f"fastlora's CUDA library is not loaded: {text}")
    return library


def status() -> tuple[bool, str]:
    """Whether the compiled library is there, with what it is, or why not and what to do. No device is queried."""
    library, text = _load()
    return library is not None, text


@lru_cache(maxsize=64)
def _usable(index: int) -> str:
    library, text = _load()
    if library is None:
        return text
    with torch.cuda.device(index):
        result = library.fastlora_cuda_probe(index)
    if result == 0:
        return ""
    rebuild = f"run `{native_build.REBUILD}` on this machine"
    return f"{text} does not run on cuda:{index}: {_message(library, result)}; {rebuild}"


def usable(device: torch.device) -> tuple[bool, str]:
    """Whether the library runs on a CUDA device, or why not and what to do. Queries the device, once."""
    if device.type != "cuda":
        return False, f"the CUDA library is for CUDA devices, not {device.type}"
    reason = _usable(device.index if device.index is not None else torch.cuda.current_device())
    return not reason, reason


def static_facts() -> tuple[Path, dict[int, int]]:
    """The library's path, and the bytes of shared memory that a block takes, by the largest number of tokens.

    0 stands for the second kernel, which adds up.


    Raises:
        RuntimeError: the library is not loaded.
    """
    library = _loaded()
    return native_build.cuda_library_path(), {m: library.fastlora_cuda_decode_shared(m) for m in (0, 2, 8, MAX_TOKENS)}


def build() -> Path:
    """Compiles the library into this installed package and loads it; about half a minute on two cores.

    Returns:
        the library's path.
    Raises:
        RuntimeError: it cannot be compiled (no nvcc, folder not writable), or what was compiled cannot be loaded.
    """
    path = native_build.compile_cuda_library(native_build.cuda_library_path())
    _load.cache_clear()
    _usable.cache_clear()
    library, text = _load()
    if library is None:
        raise RuntimeError(text)
    return path


def build_where_possible() -> str:
    """Compiles the library if there is an nvcc, and says what has been done.

    Raises:
        RuntimeError: there is an nvcc, but `build` fails.
    """
    try:
        native_build.find_nvcc()
    except native_build.BuildError as error:
        return f"no CUDA library: {error}"
    build()
    return status()[1]


def supports(x_dtype: torch.dtype, m: int, k: int, n: int, blocksize: int, r: int) -> str:
    """Empty where `decode` takes x [m, k], a weight [n, k] and adapters of rank r (0: none), else why not."""
    if x_dtype not in _X_DTYPES:
        return f"activations are {x_dtype}, but the decode kernel takes bf16 and fp16"
    if not 0 <= m <= MAX_TOKENS:
        return f"{m} tokens, but the decode kernel takes at most {MAX_TOKENS}"
    if blocksize not in BLOCKSIZES:
        return f"blocksize is {blocksize}, expected a power of two from 32 to 4096"
    if k < 1 or k % _COLUMNS or k % blocksize:
        return f"in_features is {k}, but the decode kernel takes multiples of {max(_COLUMNS, blocksize)}"
    if not 0 <= n <= MAX_SIDE or k > MAX_SIDE or n * k // blocksize >= 1 << 31:
        return f"a weight of [{n}, {k}] has more blocks than the decode kernel can count"
    if not 0 <= r <= MAX_RANK:
        return f"rank is {r}, but the decode kernel takes at most {MAX_RANK}"
    return ""


def decode(
    x: Tensor,
    weight: Packed,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias, rounded once from fp32.

    Args:
        x: [M, K], bf16 or fp16, any strides; M 0 to 16. Copied unless columns are adjacent and rows 16-byte aligned.
        weight: [N, K], its blocksize a divisor of K. Codes that are not at a 16-byte address are copied.
        lora_a, lora_b: [R, K] and [N, R], both or neither; used in fp32 unless both have x's dtype.
        bias: [N].
    Returns:
        [M, N], dtype of x.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above; nothing has been launched.
        RuntimeError: the library is not loaded or does not run on this device, see `status()` and `usable()`.
    Source: arXiv:2305.14314, section 3; arXiv:2106.09685, section 4.1.
    """
    if x.device.type != "cuda":
        raise ValueError(f"x is on {x.device}; this library is for CUDA tensors: move it with .cuda()")
    library = _loaded()
    with torch.cuda.device_of(x):
        stream = torch.cuda.current_stream().cuda_stream
        return _decode(library, stream, x, weight, lora_a, lora_b, scaling, bias)


def _decode(
    library: ctypes.CDLL, stream: int, x: Tensor, weight: Packed, lora_a: Tensor | None, lora_b: Tensor | None,
    scaling: float, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    check_product(x, weight, lora_a, lora_b, bias)
    (M, K), n = x.shape, weight.shape[0]
    a, b = _adapters(x, lora_a, lora_b)
    R = 0 if a is None else a.shape[0]
    if reason := supports(x.dtype, M, K, n, weight.blocksize, R):
        raise ValueError(reason)
    bias = None if bias is None else _bias(bias, x)
    codes = _aligned(weight.codes)
    out = torch.empty(M, n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if x.stride(1) != 1 or (M > 1 and x.stride(0) * x.element_size() % _ALIGNMENT):
        x = x.contiguous()
    x = _aligned(x)
    row_stride = x.stride(0) if M > 1 else K
    device = x.device.index or 0
    packed = weight_of(weight, x.device)
    packed.codes = codes.data_ptr()
    size = _workspace(library, device, M, n, K, packed.log2_blocksize, R, DTYPES[x.dtype])
    workspace = torch.empty(size // 4, dtype=torch.float32, device=x.device)
    arguments = _Decode(
        packed, x.data_ptr(), row_stride, M, pointer_of(a), pointer_of(b), R, pointer_of(bias), out.data_ptr(),
        workspace.data_ptr(), scaling, DTYPES[x.dtype], DTYPES[x.dtype if a is None else a.dtype],
        DTYPES[x.dtype if bias is None else bias.dtype], device,
    )  # fmt: skip
    result = library.fastlora_cuda_decode(arguments, stream)
    if result != 0:
        raise RuntimeError(f"fastlora's CUDA library: {_message(library, result)}")
    return out


@lru_cache(maxsize=4096)
def _workspace(
    library: ctypes.CDLL, device: int, m: int, n: int, k: int, log2_blocksize: int, r: int, dtype: int
) -> int:
    """Bytes of workspace on a device."""
    size: int = library.fastlora_cuda_decode_workspace(m, n, k, log2_blocksize, r, dtype, device)
    if size < 0:
        result = size if size > -1000 else -1000 - size
        raise RuntimeError(f"fastlora's CUDA library: {_message(library, result)}")
    return size


def _message(library: ctypes.CDLL, result: int) -> str:
    text: str = library.fastlora_cuda_message(result).decode()
    return text


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone(memory_format=torch.contiguous_format)


def _adapters(x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both adapters in the one dtype that the kernels read, at aligned addresses."""
    if lora_a is None or lora_b is None:
        return None, None
    for name, adapter in (("lora_a", lora_a), ("lora_b", lora_b)):
        if adapter.dtype not in DTYPES or adapter.device != x.device:
            raise ValueError(
                f"{name} is {adapter.dtype} on {adapter.device}, expected fp32, bf16 or fp16 on {x.device}"
            )
    dtype = x.dtype if lora_a.dtype == lora_b.dtype == x.dtype else torch.float32
    return _aligned(lora_a.to(dtype).contiguous()), _aligned(lora_b.to(dtype).contiguous())


def _bias(bias: Tensor, x: Tensor) -> Tensor:
    if bias.dtype not in DTYPES or bias.device != x.device:
        raise ValueError(f"bias is {bias.dtype} on {bias.device}, expected fp32, bf16 or fp16 on {x.device}")
    return bias.to(x.dtype if bias.dtype == x.dtype else torch.float32).contiguous()
