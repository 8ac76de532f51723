"""Weights kept in fp32 under a module that computes in 16 bits."""

import copy
import io

import pytest
import torch
from torch import nn

from fastlora.layers import kept_fp32

IDS = torch.arange(4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


def net(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return Net().to(dtype)


def kept(dtype=torch.bfloat16):
    model = net(dtype)
    kept_fp32.keep(model, [model.head, model.norm])
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_as_before_and_trains_in_fp32(dtype):
    model, expected = kept(dtype), net(dtype)(IDS)
    assert model.head.weight is model.embed.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    y = model(IDS)
    assert y.dtype is dtype
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert isinstance(model.head, nn.Linear)
    assert repr(model) == repr(net(dtype))
    assert model.state_dict().keys() == net(dtype).state_dict().keys()


def test_small_steps_are_not_lost():
    models = net(), kept()
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        for _ in range(20):
            optimizer.zero_grad()
            model(IDS).float().pow(2).sum().backward()
            optimizer.step()
    start = net().norm.weight.float()
    assert torch.equal(models[0].norm.weight.float(), start)  # 1.0 in bf16 does not move by so little
    assert (models[1].norm.weight - start).abs().min() > 0


def test_an_exception_leaves_the_fp32_weights():
    model = kept()
    with pytest.raises(RuntimeError):
        model.head(torch.ones(3, 5, dtype=torch.bfloat16))
    assert model.head.weight.dtype is torch.float32
    assert isinstance(model.head.weight, nn.Parameter)


def test_copies_pickles_and_compiled_models():
    model, expected = kept(), net()(IDS)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert again.head.weight is again.embed.weight
        assert torch.equal(again(IDS), expected)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(IDS), expected)


def test_released_it_is_as_it_was():
    model = kept()
    kept_fp32.release(model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in net().modules()]
    assert model.head.weight is model.embed.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(IDS), net()(IDS))
    assert "fastlora_computes_in" not in vars(model.head)


def test_fp32_modules_are_left_alone():
    model = net(torch.float32)
    kept_fp32.keep(model, [model.head])
    assert type(model.head) is nn.Linear
