"""Memory counted storage by storage, of real tensors and of fake ones."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure.tracker import BLOCK, Tracker

M, K, N = 96, 64, 160  # each product of two is a multiple of 512 bytes in fp32
X, Y, W = 4 * M * K, 4 * M * N, 4 * N * K


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    with FakeTensorMode() if request.param == "fake" else nullcontext():
        yield


@pytest.mark.usefixtures("tensors")
def test_a_linear_and_its_gradients_by_hand():
    linear, x, dy = nn.Linear(K, N, bias=False), torch.zeros(M, K, requires_grad=True), torch.zeros(M, N)
    with Tracker("forward") as tracker:
        tracker.hold([linear.weight], "weights")
        tracker.hold([x, dy], "inputs")
        y = linear(x)
        assert tracker.held == {"weights": W, "inputs": X + Y, "forward": Y}
        with tracker.labelled("backward"):
            y.backward(dy)
        assert tracker.peak == tracker.total == 2 * (W + X + Y)
        assert tracker.at_peak == {"weights": W, "inputs": X + Y, "forward": Y, "backward": W + X}
        tracker.hold([linear.weight.grad], "gradients")
        del y
        x.grad = None
        assert +tracker.held == {"weights": W, "inputs": X + Y, "gradients": W}
        tracker.reset_peak()
        assert tracker.peak == 2 * W + X + Y


@pytest.mark.usefixtures("tensors")
def test_a_storage_counts_once_rounded_up_as_long_as_a_view_holds_it():
    with Tracker() as tracker:
        whole = torch.zeros(3, 100)
        part = whole.t()[:1]
        assert tracker.total == 3 * BLOCK
        del whole
        part.add_(1)
        assert tracker.total == 3 * BLOCK
        del part
        assert tracker.total == 0
        assert tracker.peak == 3 * BLOCK


def test_what_is_not_to_count_and_what_no_tensor_has():
    on_the_host = torch.zeros(1000)
    with Tracker() as tracker:
        tracker.hold([on_the_host], None)
        on_the_host += 1
        tracker.add("workspace", 100)
        assert tracker.total == 100
        tracker.hold([on_the_host], "moved")
        assert tracker.held == {"workspace": 100, "moved": 4096}
