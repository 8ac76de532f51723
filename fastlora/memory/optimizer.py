"""The terms "optimizer" and "gradients": bytes a trained value, by optimizer.

    adamw         two moments in fp32                                     arXiv:1711.05101
    adamw-bf16    two moments in the dtype of 16-bit parameters, as torch keeps them
    adamw-8bit    two moments of 1 byte, and a scale of 4 bytes for 256 of each     arXiv:2110.02861
    paged-adamw-8bit   the same, in memory that may move to the host: up to 0 here
    adafactor     a row and a column of fp32 a matrix: less than a hundredth     arXiv:1804.04235
    sgd           nothing
    in-backward   as adamw, but a gradient is gone once its tensor has been updated: only the largest one counts

While it updates, `foreach` AdamW holds one more fp32 value a parameter (the denominator); the fused one nothing.
"""

BYTES = {
    "adamw": 8.0,
    "adamw-bf16": 4.0,
    "adamw-8bit": 2 + 2 * 4 / 256,
    "paged-adamw-8bit": 0.0,
    "adafactor": 0.08,
    "sgd": 0.0,
}
OPTIMIZERS = tuple(BYTES)


def state_bytes(values: int, optimizer: str) -> int:
    """Bytes of the state over `values` trained parameters.

    Raises:
        ValueError: an unknown optimizer.
    """
    if optimizer not in BYTES:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}")
    return round(values * BYTES[optimizer])


def update_bytes(values: int, width: float, optimizer: str) -> int:
    """Bytes more while the parameters are updated by a `foreach` optimizer, in the dtype of the moments."""
    return (
        round(values * (4 if optimizer == "adamw" and width == 4 else width))
        if optimizer.startswith("adamw") and "8bit" not in optimizer
        else 0
    )
