"""Which layers the settings select, with which rank and alpha: peft's, for configs drawn at random from a seed."""

import random
import warnings

import pytest
import torch
from torch import nn

import fastlora
from tests.support.models import llama

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

COMPARED = 120
# What peft lets pass with a warning, or silently: an entry that matches nothing, and a pattern that fits nothing.
STRICTER = ("matches no module", "fits none of the adapted layers")
# What peft refuses too.
ALSO = ("leaves no layer to adapt", "which is not a linear layer")


def three_layers():
    return llama(num_hidden_layers=3)


class Nested(nn.Module):
    """Numbers at several depths, under several names, at the top too."""

    def __init__(self):
        super().__init__()
        for stem in ("h", "layers", "vision.blocks"):
            parent = self
            for part in stem.split(".")[:-1]:
                setattr(parent, part, nn.Module())
                parent = getattr(parent, part)
            setattr(parent, stem.split(".")[-1], nn.ModuleList(self.block() for _ in range(3)))
        self.proj, self.lm_head, self.up = nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))

    def block(self):
        block = nn.Module()
        block.proj, block.gate = nn.Linear(8, 8), nn.Linear(8, 8)
        block.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "proj": nn.Linear(8, 8)}) for _ in range(2))
        return block


def drawn(draw, model):
    """A config's options: ends of names, whole names, patterns and numbers, some of which fit nothing."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]

    def end(name):
        parts = name.split(".")
        return ".".join(parts[-draw.randint(1, len(parts)) :])

    def some(most):
        return [end(draw.choice(names)) for _ in range(draw.randint(1, most))]

    def pattern():
        name = end(draw.choice(names))
        return draw.choice([name, name, rf".*\.{name}", name.replace("0", r"[01]"), rf"^{name}", f"{name}|no", "0.*"])

    targets = draw.choice(
        [
            some(4),
            some(4),
            [*some(2), "lm_head"],
            [draw.choice(names)],
            rf".*{end(draw.choice(names))}",
            "all-linear",
        ]
    )
    options = {"target_modules": targets, "r": draw.randint(1, 4), "lora_alpha": draw.randint(1, 9)}
    if isinstance(targets, list) and draw.random() < 0.6:
        layers = draw.choice([0, 1, 2, [0], [0, 2], [1, 2], [], [5, 0]])
        options["layers_to_transform"] = layers
        if draw.random() < 0.6:
            options["layers_pattern"] = draw.choice(
                [
                    "layers",
                    "h",
                    ["h", "layers"],
                    "blocks",
                    "(h|layers)",
                    "",
                    [],
                    "experts",
                    r"model\.layers",
                    ["no", "h"],
                ]
            )
    if draw.random() < 0.4:
        options["exclude_modules"] = draw.choice([some(2), rf".*{end(draw.choice(names))}", [draw.choice(names)]])
    for option in ("rank_pattern", "alpha_pattern"):
        if draw.random() < 0.4:
            options[option] = {pattern(): draw.randint(5, 9) for _ in range(draw.randint(1, 2))}
    return options


def ours(model, options):
    """{name: (r, alpha)}, None where the options are refused; the refusal."""
    try:
        fastlora.replace_linear(model, **options)
    except ValueError as error:
        return None, str(error)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, fastlora.LoRALinear)}
    return {name: (m.r["default"], m.lora_alpha["default"]) for name, m in layers.items()}, ""


def theirs(model, options):
    """The same of peft, and its warnings or its refusal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tuner = peft.LoraModel(model, peft.LoraConfig(**options), "default")
        except ValueError as error:
            return None, [str(error)]
    modules = dict(model.named_modules())
    found = {name: modules[name] for name in tuner.targeted_module_names}
    return {name: (m.r["default"], m.lora_alpha["default"]) for name, m in found.items()}, [
        str(each.message) for each in caught
    ]


@pytest.mark.parametrize("make", [three_layers, Nested])
@pytest.mark.filterwarnings("ignore")
def test_random_configs_select_what_peft_selects(make):
    draw, compared, refused = random.Random(11), 0, 0
    with torch.device("meta"):
        while compared < COMPARED:
            options = drawn(draw, make())
            if make is Nested and options["target_modules"] == "all-linear":
                continue  # peft knows the head only of transformers' models
            expected, said = theirs(make(), options)
            found, refusal = ours(make(), options)
            if found is not None:
                assert found == expected, options
                compared += 1
                continue
            refused += 1
            known = STRICTER if expected is not None else STRICTER + ALSO
            assert any(text in refusal for text in known), (options, refusal)
            if expected is not None:
                _check_that_nothing_fits(refusal, said, options, make())
    assert refused < 2 * COMPARED


def _check_that_nothing_fits(error, said, options, model):
    """peft says so too, except of one of several targets."""
    if error.startswith("target_modules"):
        names = [name for name, _ in model.named_modules()]
        lost = [e for e in options["target_modules"] if not any(n == e or n.endswith(f".{e}") for n in names)]
        assert lost, error
    else:
        option = error.split(":")[0].split("=")[0]
        wanted = "no modules were excluded" if option == "exclude_modules" else f"The following {option} keys did not"
        assert any(wanted in text for text in said), (error, said, options)


TABLE = [
    ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}, 2),
    ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1, "layers_pattern": "layers"}, 2),
    ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [7]}, 1),
    ({"target_modules": ["q_proj", "model.layers.2.mlp.up_proj"], "layers_to_transform": [0]}, 2),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "(layers|h)"}, 2),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ""}, 1),
    ({"target_modules": ["q_proj"], "layers_to_transform": []}, 3),
    ({"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"], "layers_to_transform": [0]}, 1),
]


@pytest.mark.parametrize(("options", "count"), TABLE)
def test_layers_to_transform_beside_whole_names(options, count):
    with torch.device("meta"):
        found, _ = ours(three_layers(), options)
        assert found == theirs(three_layers(), options | {"r": 16, "lora_alpha": 32})[0]
    assert len(found) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": "1"}, "layers_to_transform must be a number or a list of numbers, not '1'"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be a number or a list of numbers"),
        ({"layers_to_transform": 1.0}, "layers_to_transform must be a number or a list of numbers, not 1.0"),
        ({"layers_to_transform": 1, "layers_pattern": "h("}, "layers_pattern='h\\(' is not a regular expression"),
        ({"layers_to_transform": 1, "layers_pattern": ["h", "h("]}, "layers_pattern='h\\(' is not a regular"),
        ({"layers_to_transform": 1, "layers_pattern": 3}, "layers_pattern must be a string or a list of strings"),
        ({"layers_to_transform": 1, "layers_pattern": ["h", 3]}, "layers_pattern must hold strings only; got 3"),
    ],
)
def test_what_is_no_number_and_no_pattern_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fastlora.replace_linear(llama(), target_modules=["q_proj"], **options)
