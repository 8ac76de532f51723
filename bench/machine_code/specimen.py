"""A specimen: one Triton kernel with the arguments of a typical launch, and the architectures it is compiled for."""

from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NF4_TYPES = {"codes_ptr": "*u8", "absmax_ptr": "*u8"}  # of a weight with nested scales
NF4_TYPES |= dict.fromkeys(("absmax2_ptr", "code2_ptr", "offset_ptr", "code_ptr"), "*fp32")
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may use


@dataclass(frozen=True)
class Specimen:
    """One kernel with the arguments of a typical launch."""

    name: str
    kernel: Any
    types: dict[str, str]  # arguments that are neither constexpr nor known constants
    constants: dict[str, Any]
    warps: int
    options: dict[str, Any] = field(default_factory=dict)
    weights: int = 0  # NF4 weights a program expands; 0 where it expands none
    twin: dict[str, Any] = field(default_factory=dict)  # constants of the larger tile that the marginal count needs
    uses_tensor_cores: bool = True
    main_loop: bool = False  # count the loop around the product instead of the difference to a twin
    archs: tuple[int, ...] = ARCHITECTURES  # where launches use it
    odd: frozenset[str] = frozenset()  # sizes and strides that are no multiples of 16
