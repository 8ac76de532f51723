"""Another library's adapters on top of fastlora's: the words that refuse them, and the check of each call.

peft finds layers by name and kind. In a model with fastlora's adapters it would wrap the A, B and base inside our
layers, freeze A and B, and train nothing that is computed.
"""

from torch import nn

REFUSAL = (
    "the model has fastlora's adapters, which adapters of peft on top would freeze and hide. Two orders work. "
    "(1) peft first: model = get_peft_model(model, config), or trainer = SFTTrainer(model, peft_config=config); then "
    "fastlora.replace_linear(model), or fastlora.replace_linear(trainer.model), without options. (2) fastlora only: "
    "fastlora.replace_linear(model, r=..., target_modules=...), and no peft_config. This model is ready for (2). For "
    "(1), load it again, or fold its adapters in with fastlora.merge(model)"
)


def check_unwrapped(*parts: nn.Module) -> None:
    """Raise RuntimeError if another library has wrapped one of these parts of a layer."""
    for part in parts:
        if "base_layer" in part._modules:
            raise RuntimeError(f"a part of a fastlora layer has become a {type(part).__name__}: {REFUSAL}")
