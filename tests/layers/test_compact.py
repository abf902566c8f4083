"""Projected inputs: autograd's input gradients, the true weight gradient in the mean, bytes, and a small language model."""

import copy

import pytest
import torch
from tests.layers.small_language_model import LanguageModel, block_linears, loss_of, train, windows
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.layers.compact import compact
from slimgrad.layers.compact_adam import CompactAdam
from slimgrad.measuring.fake import faked
from slimgrad.types import Column


def small_model(dtype=torch.float64, width=8):
    return LanguageModel(width=width, num_layers=2, length=12, num_heads=2).to(dtype)


def batch_of(num=3, length=12):
    return windows(num, length, torch.Generator().manual_seed(0))


def gradients(model, batch):
    """By name; None where ``grad`` is None."""
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_everything_but_the_weights_is_autograds(ratio):
    """Input gradients are, for all gradients of what comes before pass through them."""
    model, batch = small_model(), batch_of()
    plain = gradients(model, batch)
    compact(model, ratio)
    found = gradients(model, batch)
    small = {n + ".weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, expected in plain.items():
        if name in small:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,)])
@pytest.mark.parametrize("bias", [True, False])
def test_input_gradients_and_small_gradients(shape, bias):
    linear = nn.Linear(6, 4, bias=bias).double()
    x, g = torch.randn(shape).double(), torch.randn(*shape[:-1], 4).double()
    plain = torch.autograd.grad(
        linear(y := x.clone().requires_grad_()), [y, *linear.parameters()], g
    )
    compact(linear, 0.5)
    y = x.clone().requires_grad_()
    out = linear(y)
    out.backward(g)
    torch.testing.assert_close(y.grad, plain[0])
    projection = linear.compaction.projection(x)
    torch.testing.assert_close(linear.compaction.gradient, plain[1] @ projection)
    torch.testing.assert_close(linear.compaction.lifted(), plain[1] @ projection @ projection.T)
    if bias:
        torch.testing.assert_close(linear.bias.grad, plain[2])
    linear(x).backward(g)  # and x without a gradient; it accumulates
    torch.testing.assert_close(linear.compaction.gradient, 2 * plain[1] @ projection)


def test_lifted_gradients_have_the_true_mean():
    """Within three standard errors over projections, entry by entry and along the true gradient; a twin of 0.9 is not."""
    linear = nn.Linear(6, 3).double()
    x, g = torch.randn(5, 6).double(), torch.randn(5, 3).double()
    truth = g.T @ x
    compact(linear, 0.5)
    draws = []
    for number in range(3000):
        linear.compaction.num_refreshes, linear.compaction.gradient = number, None
        linear(x).backward(g)
        draws.append(linear.compaction.lifted())
    drawn = torch.stack(draws)
    along = (drawn * truth).sum((1, 2)) / truth.square().sum()

    def standard_errors(values, expected):
        return (values.mean(0) - expected).abs() / (values.std(0) / len(values) ** 0.5)

    assert standard_errors(drawn, truth).max() < 3
    assert standard_errors(along, 1.0) < 3
    assert standard_errors(0.9 * along, 1.0) > 3
    assert standard_errors(0.9 * drawn, truth).max() > 3


def test_projections_come_from_seeds():
    linear = nn.Linear(16, 3)
    compact(linear, 0.5, seed=3)
    found, like = linear.compaction.projection, torch.empty(0)
    first = found(like)
    assert first.shape == (16, 8)
    assert torch.equal(found(like), first)
    assert abs(float(first.square().mean()) * 8 - 1) < 0.5
    linear.compaction.num_refreshes = 1
    assert not torch.equal(found(like), first)
    linear.compaction.num_refreshes = 0
    assert torch.equal(found(like), first)
    torch.testing.assert_close(
        found(like.double()).float(), first, rtol=0, atol=9
    )  # another draw, same law
    state = torch.get_rng_state()
    linear(torch.randn(2, 16, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    other = nn.Linear(16, 3)
    compact(other, 0.5, seed=4)
    assert not torch.equal(other.compaction.projection(like), first)


def saved_bytes(model, x):
    """Of the weights' gradients: without them, nothing of the inputs is kept."""
    held = []
    for needed in (True, False):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.requires_grad_(needed)
        with Ledger(model, inputs=x) as ledger:
            model(x).sum().backward()
        held.append(ledger.columns[Column.ACTIVATIONS])
    return held[0] - held[1]


@pytest.mark.parametrize("rank", [1, 8, 12, 24])
def test_saved_inputs_are_of_the_rank(rank):
    """Of a batch that the caller keeps: what is new is its projection, rank numbers a row."""
    linear, x = nn.Linear(24, 5), torch.randn(4, 32, 24)
    compact(linear, rank / 24)
    assert saved_bytes(linear, x) == 4 * 32 * rank * 4
    assert saved_bytes(linear, x) * 24 == x.nbytes * rank


class Beside(nn.Module):
    """Three layers that read one input."""

    def __init__(self, width=24):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return self.query(x) + self.key(x) + self.value(x)


def test_layers_that_read_one_input_keep_one_projection():
    model, x = Beside(), torch.randn(32, 24)
    compact(model, 0.25)
    assert saved_bytes(model, x) == 32 * 6 * 4
    plain = Beside().double()
    x = x.double()
    expected = [g @ x for g in [torch.ones(24, 32).double()] * 3]
    compact(plain, 0.25)
    for _ in range(2):  # the second pass projects anew
        plain(x).sum().backward()
    with torch.no_grad():
        x.mul_(2)
    plain(x).sum().backward()
    for linear, weight in zip((plain.query, plain.key, plain.value), expected, strict=True):
        projected = weight @ linear.compaction.projection(x)
        torch.testing.assert_close(linear.compaction.gradient, 4 * projected)
        assert linear.compaction.projected._z_NR is None


def test_adam_of_other_parameters_is_torchs():
    ours, theirs = small_model(), small_model()
    theirs.load_state_dict(ours.state_dict())
    keywords = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizers = (
        CompactAdam(ours.parameters(), **keywords),
        torch.optim.AdamW(theirs.parameters(), **keywords),
    )
    for seed in range(4):
        batch = windows(2, 12, torch.Generator().manual_seed(seed))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            optimizer.step(lambda model=model, batch=batch: loss_of(model, batch).backward())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_one_update_by_hand_and_state_of_the_rank():
    linear, x = nn.Linear(8, 3).double(), torch.randn(5, 8).double()
    compact(linear, 0.25)
    optimizer = CompactAdam(linear.parameters(), lr=0.1, scale=0.5, gap=2)
    before, projection = linear.weight.detach().clone(), linear.compaction.projection(x)
    linear(x).square().sum().backward()
    small = linear.compaction.gradient.clone()
    optimizer.step()
    torch.testing.assert_close(
        linear.weight, before - 0.1 * 0.5 * small.sign() @ projection.T, rtol=1e-6, atol=1e-6
    )
    state = optimizer.state[linear.weight]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (3, 2)
    assert linear.compaction.num_refreshes == 0
    optimizer.step()
    assert linear.compaction.num_refreshes == 1
    optimizer.zero_grad()
    assert linear.compaction.gradient is None
    linear(x).square().sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert not linear.compaction.gradient.any()


def test_training_goes_on_from_a_checkpoint():
    def trained(steps, model, optimizer, start=0):
        for seed in range(start, start + steps):
            optimizer.zero_grad()
            loss_of(model, windows(2, 12, torch.Generator().manual_seed(seed))).backward()
            optimizer.step()
        return model, optimizer

    def fresh(seed=0):
        torch.manual_seed(seed)
        model = small_model()
        compact(model, 0.5)
        return model, CompactAdam(model.parameters(), lr=1e-2, gap=2)

    whole, _ = trained(5, *fresh())
    half, optimizer = trained(3, *fresh())
    model, other = fresh(1)
    model.load_state_dict(half.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(2, model, other, start=3)
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_undo_copies_fakes_and_names():
    model, batch = small_model(), batch_of()
    keys, plain = list(model.state_dict()), gradients(model, batch)
    undo = compact(model, 0.5)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert loss_of(model, batch).isfinite()
    with faked(model, batch) as (fake,):
        loss_of(model, fake).backward()
    assert all(m.compaction.gradient is None for m in model.modules() if hasattr(m, "compaction"))
    copied = copy.deepcopy(model)
    gradients(copied, batch)
    optimizer = CompactAdam(copied.parameters())
    before = copied.layers[0].up.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(copied.layers[0].up.weight, before)
    assert model.layers[0].up.compaction.gradient is None
    undo()
    for name, grad in gradients(model, batch).items():
        assert torch.equal(grad, plain[name])


def test_autocast():
    model, x = Beside(), torch.randn(32, 24)
    compact(model, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))
    exact = torch.ones(24, 32) @ x @ model.query.compaction.projection(x)
    found = model.query.compaction.gradient
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_what_it_refuses():
    with pytest.raises(MethodError, match="a ratio above 0"):
        compact(Beside(), 0.0)
    with pytest.raises(MethodError, match="gap of 1 or more"):
        CompactAdam(Beside().parameters(), gap=0)
    with pytest.raises(UnsupportedError, match="none in LayerNorm"):
        compact(nn.LayerNorm(3))
    with pytest.raises(MethodError, match="a list of paths"):
        compact(Beside(), layers="query")
    model = small_model(width=16)
    with pytest.raises(
        UnsupportedError, match=r"expected an nn\.Linear with a weight of its own.* at 'embed'"
    ):
        compact(model, layers=["embed"])
    model.head.weight = model.embed.weight
    with pytest.raises(UnsupportedError, match="at 'head'"):
        compact(model, layers=["layers.0.up", "head"])
    undo = compact(model, 0.25)
    assert not hasattr(model.head, "compaction")
    with pytest.raises(UnsupportedError, match="undo what was done"):
        compact(model, 0.25)
    undo()
    linear = nn.Linear(4, 4)
    compact(linear, 0.5)
    optimizer = CompactAdam(linear.parameters(), gap=1)
    x = torch.randn(2, 4, requires_grad=True)
    early = linear(x).sum()
    linear(x).sum().backward()
    optimizer.step()  # its projection is another now, and autograd sees that the weight is
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        early.backward()
    (g,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        g.sum().backward()


def test_the_output_layer_of_an_attention_is_left_as_it_is():
    """``nn.MultiheadAttention`` reads its weight and never calls it: no small gradient would come."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    layer(x).square().sum().backward()
    expected = layer.self_attn.out_proj.weight.grad
    layer.zero_grad()
    compact(layer)
    optimizer = CompactAdam(layer.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.self_attn.out_proj.weight.grad, expected)
    assert layer.linear1.weight.grad is None
    optimizer.step()
    assert not [n for n, p in layer.named_parameters() if torch.equal(p, before[n])]
    with pytest.raises(UnsupportedError, match=r"at 'self_attn\.out_proj'"):
        compact(nn.TransformerEncoderLayer(16, 2, 32), layers=["self_attn.out_proj"])


def test_a_gradient_beside_the_small_one_is_not_lost_silently():
    linear, x = nn.Linear(6, 4), torch.randn(3, 6)
    compact(linear, 0.5)
    optimizer = CompactAdam(linear.parameters(), lr=1e-2)
    (linear(x).sum() + linear.weight.square().sum()).backward()
    with pytest.raises(UnsupportedError, match=r"\(4, 6\) to be read by its layer's forward alone"):
        optimizer.step()
    optimizer.zero_grad()
    linear(x).sum().backward()
    optimizer.step()


@pytest.mark.slow
def test_a_small_language_model():
    """A quarter of the width: a peak at least 25 % lower, a loss within 3 % of Adam's; frozen layers are not."""

    def made(kind):
        torch.manual_seed(0)
        model = LanguageModel()
        if kind == "compact":
            compact(model, 0.25, layers=block_linears(model))
            return model, CompactAdam(model.parameters(), lr=6e-3, gap=50)
        if kind == "frozen":
            for name in block_linears(model):
                model.get_submodule(name).requires_grad_(False)
        return model, torch.optim.AdamW(
            model.parameters(), lr=6e-3, weight_decay=0.0, foreach=False
        )

    def peak_bytes(model, optimizer):
        batch = windows(8, 64, torch.Generator().manual_seed(0))
        loss_of(model, batch).backward()
        optimizer.step()  # there is state
        with Ledger(model, optimizer, inputs=batch) as ledger:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        return ledger.peak_bytes

    assert peak_bytes(*made("compact")) <= 0.75 * peak_bytes(*made("plain"))
    plain, found, frozen = (
        train(*made(kind), 300, num=8) for kind in ("plain", "compact", "frozen")
    )
    assert found < 1.03 * plain
    assert frozen > 1.03 * plain
