"""Tensors without values: what is alive counts, and backward frees what torch's frees."""

import pytest

from fastlora.memory.sizes import BLOCK, Book, Parameter, apply, backward, checkpointed

N = 1024  # values: 4 KiB in fp32


def _leaf(book):
    x = Parameter(book, N, 4)
    return apply("x", [x], N, 4)


def test_a_tensor_counts_until_nothing_refers_to_it():
    book = Book()
    x = book.tensor("x", N, 4)
    y = x.alias()
    del x
    assert book.total == 4 * N
    del y
    assert book.total == 0
    assert book.peak == 4 * N
    assert book.at_peak == {("activations", "x"): 4 * N}


def test_sizes_are_rounded_as_the_allocator_rounds():
    book = Book()
    held = [book.tensor("x", 1, 4) for _ in range(3)]
    assert book.total == len(held) * BLOCK


def test_what_backward_needs_is_kept_and_then_freed():
    book = Book()
    x = _leaf(book)
    y = apply("square", [x], N, 4, saves=[x])
    del x
    z = apply("sum", [y], 1, 4)
    del y
    assert book.held["activations", "x"] == 4 * N  # saved
    assert book.held["activations", "square"] == 0  # a sum saves nothing
    backward(z)
    assert book.held["activations", "x"] == 0
    with pytest.raises(RuntimeError, match="twice"):
        backward(z)


def test_nothing_is_kept_without_a_gradient():
    book = Book()
    x = book.tensor("x", N, 4)
    y = apply("square", [x], N, 4, saves=[x])
    del x
    assert book.total == 4 * N
    with book.said(recording=False):
        z = apply("square", [_leaf(book)], N, 4)
    assert z.node is None
    assert y.node is None


def test_a_gradient_of_two_uses_is_added_in_place_unless_its_bytes_are_shared():
    def peak(passes):
        book = Book()
        x = _leaf(book)
        a, b = (apply(name, [x], N, 4, passes=passes) for name in "ab")
        loss = apply("loss", [apply("a + b", [a, b], N, 4, passes=True)], 1, 4)
        del a, b, x
        backward(loss)
        return book.held

    assert ("activations", "sum of gradients") not in peak(passes=False)
    assert ("activations", "sum of gradients") in peak(passes=True)  # both are the gradient of the sum


def test_a_parameter_keeps_its_gradient():
    book = Book()
    weight = Parameter(book, N, 4)
    x = book.tensor("x", N, 4)
    for _ in range(2):
        backward(apply("loss", [weight, x], 1, 4, saves=[x]))
        assert book.held["gradients", "of trained tensors"] == 4 * N


def test_a_checkpoint_keeps_its_input_and_runs_again():
    def run(keep):
        book = Book()
        ran = []

        def layer(x):
            ran.append(book.recording)
            for _ in range(4):
                x = apply("inside", [x], N, 4, saves=[x])
            return x

        x = _leaf(book)
        for _ in range(3):
            x = layer(x) if keep else checkpointed("input", layer, x)
        before = book.total
        backward(apply("loss", [x], 1, 4))
        return before, ran, book.at_peak

    kept, ran, _ = run(keep=True)
    assert ran == [True] * 3
    assert kept == 13 * 4 * N
    before, ran, at_peak = run(keep=False)
    assert ran == [False] * 3 + [True] * 3
    assert before == 4 * 4 * N  # x, and the results of three layers
    assert any(term == "recomputed" for term, _ in at_peak)


def test_an_operators_scratch_is_gone_when_it_is_done():
    book = Book()
    y = apply("y", [_leaf(book)], N, 4, scratch=10 * N, scratch_back=100 * N)
    assert book.held["scratch", "of an operator"] == 0
    assert book.peak == 10 * N + 8 * N
    backward(apply("loss", [y], 1, 4))
    assert book.peak > 100 * N
