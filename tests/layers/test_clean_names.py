"""Names of a model without the wrappers of torch.compile and of torch.distributed's checkpointing."""

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastlora.layers.sharded import clean, clean_names


def wrapped():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model[0] = torch.compile(model[0], backend="eager")
    model[1] = torch.compile(model[1], backend="eager")
    model[2] = torch.compile(checkpoint_wrapper(model[2]), backend="eager")
    return model


def names(model):
    return [name for name, _ in model.named_parameters()]


def test_names_are_clean_inside_and_the_wrappers_are_back_afterwards():
    model = wrapped()
    before, blocks = names(model), list(model)
    with clean_names(model):
        assert names(model) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias", "2.0.weight", "2.0.bias"]
    assert names(model) == before
    assert all(one is other for one, other in zip(model, blocks, strict=True))
    assert {clean(name) for name, _ in model.named_modules()} >= {"0.0", "1", "2.0"}


def test_a_block_that_was_replaced_is_wrapped_again():
    model = wrapped()
    with clean_names(model):
        model[1], model[2] = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
    assert names(model)[2:] == [
        "1._orig_mod.weight",
        "2._orig_mod._checkpoint_wrapped_module.weight",
        "2._orig_mod._checkpoint_wrapped_module.bias",
    ]
    assert model(torch.ones(2, 4)).shape == (2, 3)


def test_an_error_inside_puts_the_wrappers_back():
    model = wrapped()
    before = names(model)
    try:
        with clean_names(model):
            raise ValueError("inside")
    except ValueError:
        assert names(model) == before
