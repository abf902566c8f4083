"""Inference in an arena: the same bits, the predicted bytes by the ledger, and a clear word where inputs differ."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from slimgrad import Ledger
from slimgrad.comparing.zoo import subject
from slimgrad.errors import PlanError
from slimgrad.layers.arena_inference import ArenaInference
from slimgrad.types import Column


def tensors(output):
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def named(name):
    made = subject(name)
    batch = made.batch
    model = made.model.eval()
    return (model, (), dict(batch)) if isinstance(batch, dict) else (model, (batch[0],), {})


def minilm():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=384,
    )  # fmt: skip
    return transformers.BertModel(config).eval(), (torch.randint(400, (4, 48)),), {}


def smollm2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=900, hidden_size=96, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, intermediate_size=256, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), (torch.randint(900, (2, 64)),), {}


CASES = {
    "unet": lambda: named("unet"),
    "vit": lambda: named("vit"),
    "minilm": minilm,
    "smollm2": smollm2,
}


@pytest.mark.parametrize("case", CASES)
def test_the_arena_is_as_small_as_the_live_bytes_and_the_outputs_are_bit_equal(case):
    model, args, kwargs = CASES[case]()
    infer = ArenaInference(model, *args, **kwargs)
    assert infer.bound_bytes <= infer.arena.nbytes <= 1.05 * infer.bound_bytes
    assert infer.arena.nbytes <= infer.first_fit_bytes < infer.total_bytes
    with torch.no_grad():
        plain = tensors(model(*args, **kwargs))
    for _ in range(2):  # what lies in the arena from the call before does not matter
        found = tensors(infer(*args, **kwargs))
        assert len(found) == len(plain) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("case", ["unet", "smollm2"])
def test_nothing_is_allocated_but_outputs_and_what_cannot_be_written_into_its_place(case):
    model, args, kwargs = CASES[case]()
    infer = ArenaInference(model, *args, **kwargs)
    with Ledger(model, inputs=(args, kwargs)) as ledger:
        output = infer(*args, **kwargs)
    outputs = sum(t.untyped_storage().nbytes() for t in tensors(output))
    weights = ledger.columns[Column.WEIGHTS]
    inputs = sum(t.nbytes for t in args)
    allowed = weights + inputs + infer.arena.nbytes + 64 + outputs + infer.beside_bytes
    assert ledger.peak_bytes <= allowed
    assert ledger.peak_bytes >= weights + infer.arena.nbytes


def test_outputs_stay_when_the_arena_is_used_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    infer = ArenaInference(model, torch.randn(3, 8))
    first, second = torch.randn(3, 8), torch.randn(3, 8)
    out = infer(first)
    infer(second)
    assert torch.equal(out, model(first))


def test_other_shapes_are_refused():
    model = nn.Linear(8, 4)
    infer = ArenaInference(model, torch.randn(3, 8))
    with pytest.raises(PlanError, match="make another"):
        infer(torch.randn(4, 8))


class Forking(nn.Module):
    def forward(self, x):
        return (x * 2).sum() if x.sum() > 0 else (x + 2).mean()


def test_another_path_is_refused():
    infer = ArenaInference(Forking(), torch.ones(3))
    assert infer(torch.ones(3)) == 6
    with pytest.raises(PlanError, match="depends on the inputs"):
        infer(-torch.ones(3))


class Hoarding(nn.Module):
    def forward(self, x):
        self.cache = x * 2
        return self.cache + 1


def test_a_model_that_keeps_what_it_made_is_refused():
    with pytest.raises(PlanError, match="beyond the call"):
        ArenaInference(Hoarding(), torch.ones(3))


def test_in_place_operations_and_views_are_as_they_were():
    def forward(x):
        y = x + 1
        y[0].mul_(3)
        return y.t().reshape(-1)[:2] * y.relu_().sum()

    class Model(nn.Module):
        def forward(self, x):
            return forward(x)

    x = torch.randn(4, 5)
    infer = ArenaInference(Model(), x)
    assert torch.equal(infer(x), forward(x))
    assert "above the live bytes" in str(infer)
