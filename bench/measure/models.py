"""The linear layers of models that people fine-tune, as (in_features, out_features), each shape once.

Source: the `config.json` of meta-llama/Meta-Llama-3-8B and -70B, Qwen/Qwen2.5-7B, mistralai/Mistral-7B-v0.3.
"""

MODEL_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "llama-3-70b": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
    "qwen2.5-7b": ((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)),
    "mistral-7b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}


def model_shapes(names: list[str]) -> tuple[tuple[int, int], ...]:
    """The shapes of these models, each once.

    Raises:
        ValueError: an unknown model.
    """
    for name in names:
        if name not in MODEL_SHAPES:
            raise ValueError(f"no model called {name!r}; there are {', '.join(MODEL_SHAPES)}")
    return tuple(dict.fromkeys(shape for name in names for shape in MODEL_SHAPES[name]))


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x14336" -> (4096, 14336), in_features and out_features.

    Raises:
        ValueError: not two positive integers with an x between them.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--shapes takes in_features x out_features such as 4096x14336, not {text!r}")
    return int(parts[0]), int(parts[1])
