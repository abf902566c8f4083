"""The reversible supernet: autograd's gradients of weights and architecture, bytes flat in depth, cells."""

import pytest
import torch
from tests.layers.copy_reverse import LENGTH, WIDTH, Tagger, batches, loss_fn

from slimgrad import Ledger
from slimgrad.errors import ArgumentError
from slimgrad.layers.architecture_search import architecture_parameters, weight_parameters
from slimgrad.layers.reversible_supernet import ReversibleSupernet, cell_sequence
from slimgrad.layers.sequence_operations import sequence_operations
from slimgrad.types import Column

OPERATIONS = sequence_operations(WIDTH)


def supernet(num_streams=2, cell_length=2, num_cells=2, **options):
    return ReversibleSupernet(
        OPERATIONS,
        num_streams=num_streams,
        cell_length=cell_length,
        num_cells=num_cells,
        **options,
    )


def gradients(model, batch, is_reversible):
    model.body.is_reversible = is_reversible
    wanted = [weight_parameters(model), architecture_parameters(model)]
    found = torch.autograd.grad(loss_fn(model, batch), [p for kind in wanted for p in kind])
    return found[: len(wanted[0])], found[len(wanted[0]) :]


def relative_errors(found, expected):
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("num_streams", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_gradients_of_weights_and_architecture_are_autograds(num_streams, dtype, limit):
    model = Tagger(supernet(num_streams), num_streams).to(dtype)
    with torch.no_grad():
        for alpha in architecture_parameters(model):
            alpha.normal_()  # choices far from even
    (batch,) = batches(1, 0, size=4)
    expected, found = gradients(model, batch, False), gradients(model, batch, True)
    by_weights, by_alphas = (relative_errors(*pair) for pair in zip(found, expected, strict=True))
    print(f"{num_streams} streams, {dtype}: {max(by_weights):.1e}, {max(by_alphas):.1e}")
    assert len(by_alphas) == 2 * num_streams
    assert max(by_weights) < limit
    assert max(by_alphas) < limit
    with torch.no_grad():
        architecture_parameters(model)[0][2] += 0.1
    assert max(relative_errors(gradients(model, batch, True)[1], expected[1])) > 1e-3


def bytes_of(num_streams, num_cells, is_reversible=True):
    body = supernet(num_streams, 1, num_cells)
    body.is_reversible = is_reversible
    streams = [torch.randn(8, LENGTH, WIDTH) for _ in range(num_streams)]
    with Ledger(body, inputs=streams) as ledger:
        sum(x.square().mean() for x in body(streams)).backward()
    return ledger.columns[Column.ACTIVATIONS]


@pytest.mark.parametrize("num_streams", [2, 3, 4])
def test_saved_bytes_do_not_grow_with_depth(num_streams):
    shallow, deep = bytes_of(num_streams, 2), bytes_of(num_streams, 6)
    plain = [bytes_of(num_streams, num_cells, False) for num_cells in (1, 3)]
    print(shallow, deep, plain)
    assert deep == shallow < plain[0]
    assert plain[1] > 2.9 * plain[0]


def test_repetitions_of_a_cell_make_one_choice():
    body = supernet(3, 2, 2)
    alphas = architecture_parameters(body)
    assert len(alphas) == 6
    assert len(body.blocks) == 4
    with torch.no_grad():
        for number, alpha in enumerate(alphas):
            alpha.copy_(torch.arange(7) == number)
    names = list(OPERATIONS)
    assert body.cell() == (tuple(names[:3]), tuple(names[3:6]))
    assert "zero" not in body.cell(exclude=("zero",))[0]
    for block, twin in ((0, 2), (1, 3)):
        for f, g in zip(body.blocks[block].functions, body.blocks[twin].functions, strict=True):
            assert f.alpha is g.alpha
            assert f.candidates is not g.candidates


def test_a_mixture_with_one_share_is_the_network_of_its_cell():
    body = supernet(3, 2, 2)
    for number, alpha in enumerate(architecture_parameters(body)):
        alpha.data.fill_(-200.0)[number + 1] = 0.0
    found = cell_sequence(OPERATIONS, body.cell(), num_cells=2)
    for block, mixed in zip(found.blocks, body.blocks, strict=True):
        for f, mixture in zip(block.functions, mixed.functions, strict=True):
            f.load_state_dict(mixture.candidates[mixture.chosen()].state_dict())
    streams = [torch.randn(2, LENGTH, WIDTH) for _ in range(3)]
    for a, b in zip(found(streams), body(streams), strict=True):
        torch.testing.assert_close(a, b)


def test_the_zero_operation_leaves_its_stream():
    body = cell_sequence(OPERATIONS, (("zero", "attention"),))
    streams = [torch.randn(2, LENGTH, WIDTH) for _ in range(2)]
    out = body(streams)
    assert torch.equal(out[0], streams[0])
    assert not torch.equal(out[1], streams[1])


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n != "zero"])
def test_causal_operations_do_not_look_ahead(name):
    looks_ahead = {}
    for is_causal in (True, False):
        operation = sequence_operations(WIDTH, is_causal=is_causal)[name]()
        x = torch.randn(2, LENGTH, WIDTH)
        changed = x.clone()
        changed[:, 6:] = torch.randn(2, 4, WIDTH)
        assert operation(x).shape == x.shape
        looks_ahead[is_causal] = not torch.allclose(operation(x)[:, :6], operation(changed)[:, :6])
    assert not looks_ahead[True]
    assert looks_ahead[False] == (name in ("attention", "convolution_3", "convolution_7"))


def test_bad_sizes_and_names_are_refused():
    with pytest.raises(ArgumentError, match="1 or more"):
        supernet(num_cells=0)
    with pytest.raises(ArgumentError, match="heads divide"):
        sequence_operations(30)
    with pytest.raises(ArgumentError, match="found \\['recurrent'\\]"):
        cell_sequence(OPERATIONS, (("attention", "recurrent"),))
