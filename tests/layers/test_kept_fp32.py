"""Weights kept in fp32 under a module that computes in 16 bits."""

import copy
import io
import threading

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


def test_parameters_stay_themselves():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    kept_fp32.keep(model, [model.head, model.norm])
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    model(IDS).float().pow(2).sum().backward()
    expected = model.norm.weight.detach() - 0.1 * model.norm.weight.grad
    optimizer.step()
    torch.testing.assert_close(model.norm.weight.detach(), expected, rtol=1e-6, atol=0)


def test_threads_may_share_a_module():
    model, expected = kept(), net()(IDS)
    results, dtypes = [], []

    def compute():
        for _ in range(200):
            results.append(model(IDS))
            dtypes.append(model.head.weight.dtype)

    workers = [threading.Thread(target=compute) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 800
    assert all(torch.equal(result, expected) for result in results)
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv1d(8, 8, 1)])
def test_an_input_cast_to_the_weights_dtype_is_cast_back(make):
    module = make().bfloat16()
    x = torch.randn(4, 8, 8, dtype=torch.bfloat16)
    expected = module(x)
    kept_fp32.keep(module, [module])
    y = module(x.to(module.weight.dtype))
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, expected)


def test_modules_within_that_are_read_by_their_parent():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).bfloat16()
    x = torch.randn(2, 4, 8, dtype=torch.bfloat16)
    expected = attention(x, x, x)[0]
    kept_fp32.keep(attention, [attention])
    y = attention(x, x, x)[0]
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert attention.out_proj.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cast_of_the_model_is_for_what_is_computed(dtype):
    model = kept().to(dtype)
    assert model.norm(torch.ones(1, 8, dtype=dtype)).dtype is dtype
    assert model(IDS).dtype is dtype
