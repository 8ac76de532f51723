"""Tensors that wait on the host: the same bits, fetched one ahead, given back."""

import gc
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastlora.ops import offload
from fastlora.ops.offload import offloaded


@pytest.fixture
def waiting(monkeypatch):
    """The tensors that wait, in the order in which they were packed."""
    found = []
    real = offload._Waiting.__init__

    def noted(self, tensor, previous):
        real(self, tensor, previous)
        found.append(weakref.ref(self))

    monkeypatch.setattr(offload._Waiting, "__init__", noted)
    return found


def layers(x, count, again):
    for number in range(count):

        def layer(x, number=number):
            return (x * (number + 1)).sin()

        if again:
            with offloaded(least=16):
                x = checkpoint(layer, x, use_reentrant=False)
        else:
            x = layer(x)
    return x


def test_inputs_of_checkpointed_layers_wait_and_change_no_bit(waiting):
    x = torch.randn(5, 7, requires_grad=True)
    plain = torch.autograd.grad(layers(x, 4, False).sum(), x)[0]
    y = layers(x, 4, True)
    assert len(waiting) == 4  # one a layer: what a layer saves inside is its checkpoint's
    grad = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(grad, plain)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], plain)
    del y
    gc.collect()
    assert not any(each() for each in waiting)


def test_the_one_before_is_fetched_ahead_and_given_away_when_taken():
    tensors = [torch.randn(3) for _ in range(3)]
    chain = []
    for tensor in tensors:
        chain.append(offload._Waiting(tensor, chain[-1] if chain else None))
    assert torch.equal(chain[2].take(), tensors[2])
    assert [each._back is not None for each in chain] == [False, True, False]
    assert torch.equal(chain[1].take(), tensors[1])
    assert [each._back is not None for each in chain] == [True, False, False]
    first = chain[0].take()
    assert torch.equal(first, tensors[0])
    assert chain[0].take() is not first


def test_what_is_small_whole_numbers_or_a_parameter_stays(waiting):
    weight = torch.nn.Parameter(torch.randn(64))
    x = torch.randn(64, requires_grad=True)
    with offloaded(least=4 * 64):
        (x * weight).sum().backward()
        assert len(waiting) == 1  # x
        x[:3].sin().sum().backward()
        x.masked_fill(torch.ones(64, dtype=torch.bool), 0.0).sum().backward()
        assert len(waiting) == 1
    assert torch.equal(weight.grad, x.detach())


def test_rows_apart_come_back_with_their_values(waiting):
    x = torch.randn(6, 8, requires_grad=True)
    turned = x.t() * 1
    with offloaded(least=16):
        y = turned.t()[:, ::2].sin()
    assert len(waiting) == 1
    found, plain = (torch.autograd.grad(z.sum(), x)[0] for z in (y, (x * 1)[:, ::2].sin()))
    assert torch.equal(found, plain)


def test_each_thread_has_its_own_chain(waiting):
    def work():
        x = torch.randn(40, requires_grad=True)
        for _ in range(20):
            torch.autograd.grad(layers(x, 3, True).sum(), x)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waiting) == 3 * 20 * 3
    assert not any(each() for each in waiting)
