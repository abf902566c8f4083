"""Norms that share what they keep: autograd's gradients, one tensor fewer a norm, the same model."""

import copy
import functools

import pytest
import torch
from torch import nn

from slimgrad import Ledger, measure
from slimgrad.errors import LoadError, UnsupportedError
from slimgrad.host import Host
from slimgrad.measuring.fake import faked
from slimgrad.method import Block, Scope
from slimgrad.methods.activations.memory_sharing_norm import faint_channels, memory_sharing_norm
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.planning.settings import block_record, layout_of, model_record
from slimgrad.training.models import load_model
from slimgrad.types import Column

transformers = pytest.importorskip("transformers")


class LlamaNorm(nn.Module):
    """As in Hugging Face's models, of single operations."""

    def __init__(self, width, eps=1e-6, offset=0.0):
        super().__init__()
        self.weight, self.variance_epsilon, self.offset = (
            nn.Parameter(torch.ones(width)),
            eps,
            offset,
        )

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        wide = hidden_states.to(torch.promote_types(dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + self.offset) * wide.to(dtype)


NORMS = {
    "layer": nn.LayerNorm,
    "layer_no_bias": functools.partial(nn.LayerNorm, bias=False),
    "layer_no_affine": functools.partial(nn.LayerNorm, elementwise_affine=False),
    "layer_large_eps": functools.partial(nn.LayerNorm, eps=0.5),
    "rms": nn.RMSNorm,
    "rms_no_affine": functools.partial(nn.RMSNorm, elementwise_affine=False),
    "rms_large_eps": functools.partial(nn.RMSNorm, eps=0.5),
    "llama": LlamaNorm,
}


def random_weights(model):
    """Weights of either sign, some of them zero or small beside their bias."""
    for p in model.parameters():
        nn.init.normal_(p)
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is not None and weight.dim() == 1:
            with torch.no_grad():
                weight[0], weight[2] = 0.0, 1e-12
                if bias is not None:
                    weight[1], bias[1] = 1e-3, 2.0
    return model


def pairs(norm, width=6, depth=3, dtype=torch.float64):
    layers = [
        nn.Linear(width, width),
        *(m for _ in range(depth) for m in (norm(width), nn.Linear(width, width))),
    ]
    return random_weights(nn.Sequential(*layers).to(dtype))


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y.detach(), torch.autograd.grad(
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), wanted
    )


def assert_equal_gradients(model, x):
    y, expected = gradients(model, x)
    undo = memory_sharing_norm(model)
    found_y, found = gradients(model, x)
    undo()
    assert torch.equal(found_y, y)
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,)])
def test_gradients_are_those_of_autograd(norm, shape):
    assert_equal_gradients(pairs(norm), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_several_dimensions_and_strides(norm):
    model = norm((3, 4)).double()
    nn.init.normal_(model.weight)
    assert_equal_gradients(model, torch.randn(5, 2, 3, 4, dtype=torch.float64))
    assert_equal_gradients(model, torch.randn(4, 3, 2, 5, dtype=torch.float64).permute(3, 2, 1, 0))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_frozen_norms_and_inputs_without_gradient(norm):
    model = pairs(norm)
    for p in model[1].parameters():
        p.requires_grad_(False)
    assert_equal_gradients(model, torch.randn(5, 6, dtype=torch.float64))
    alone = random_weights(nn.LayerNorm(6).double())
    memory_sharing_norm(alone)
    x = torch.randn(5, 6, dtype=torch.float64)
    alone(x).square().sum().backward()
    found = alone.weight.grad
    again = copy.deepcopy(alone)
    del again.__dict__["forward"]
    again.zero_grad()
    again(x).square().sum().backward()
    torch.testing.assert_close(found, again.weight.grad)


def test_a_weight_that_is_used_twice_and_a_residual_that_reads_the_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x):
            x = self.norm(x)
            return self.norm(x + self.linear(x))

    assert_equal_gradients(Twice().double(), torch.randn(5, 6, dtype=torch.float64))


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", ["layer", "rms", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_near_to_float64_as_autograd(name, dtype):
    """Within twice autograd's own distance, or the rounding of the output that is kept in its place."""
    model = nn.Sequential(nn.Linear(64, 64), NORMS[name](64), nn.Linear(64, 64)).to(dtype)
    nn.init.normal_(model[1].weight, 1, 0.3)
    x = torch.randn(32, 64, dtype=dtype)
    _, truth = gradients(copy.deepcopy(model).double(), x.double())
    _, plain = gradients(model, x)
    memory_sharing_norm(model)
    _, found = gradients(model, x)
    for a, p, t in zip(found, plain, truth, strict=True):
        assert error(a, t) <= 2 * error(p, t) + torch.finfo(dtype).eps


def test_what_a_weight_near_zero_would_do():
    """Without columns of their own, such channels lose the gradient."""
    weight, bias = torch.ones(4), torch.zeros(4)
    weight[1], bias[2], weight[3] = 0.0, 9.0, torch.finfo(torch.float32).tiny
    assert faint_channels(weight, bias).tolist() == [1, 2, 3]
    assert not faint_channels(torch.full((4,), 1e-30), None).numel()
    assert not faint_channels(torch.full((4,), 1e-5), torch.full((4,), 7e-5)).numel()


def saved_bytes(model, x):
    with Ledger(model, inputs=x) as ledger:
        model(x).square().sum().backward()
    return ledger.columns[Column.ACTIVATIONS]


@pytest.mark.parametrize("name", list(NORMS))
def test_one_tensor_fewer_for_each_norm(name):
    depth, tokens, width = 4, 32, 24
    tensor, column = tokens * width * 4, tokens * 4
    model = nn.Sequential(
        nn.Linear(width, width),
        *(m for _ in range(depth) for m in (NORMS[name](width), nn.Linear(width, width))),
    )
    x = torch.randn(tokens, width)
    plain = saved_bytes(model, x)
    undo = memory_sharing_norm(model)
    saved = plain - saved_bytes(model, x)
    if name.startswith("layer"):  # its mean is not kept either
        assert saved == depth * (tensor + column)
    else:  # of single operations on the CPU: what they keep in between is gone too
        assert saved >= depth * tensor
        assert saved % depth == 0
    undo()
    assert saved_bytes(model, x) == plain


def test_columns_are_kept_for_faint_channels_alone():
    model = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24))
    x = torch.randn(32, 24)
    memory_sharing_norm(model)
    without = saved_bytes(model, x)
    with torch.no_grad():
        model[1].weight[:3] = 0.0
    assert saved_bytes(model, x) - without == 3 * 32 * 4


def llama(layers=3, dtype=torch.float64):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=48, num_hidden_layers=layers, num_attention_heads=3,
        num_key_value_heads=1, intermediate_size=128, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def bert(layers=3, dtype=torch.float64):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=48, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=96,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).to(dtype).train()


MODELS = {"llama": llama, "bert": bert}


def model_gradients(model, ids):
    torch.manual_seed(3)
    y = model(input_ids=ids)[0]
    loss = (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).square().mean()
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def relative(found, expected):
    pairs = [
        (a.double(), b.double()) for a, b in zip(found, expected, strict=True) if b is not None
    ]
    norm = torch.stack([b.norm() for _, b in pairs]).norm()
    return float(torch.stack([(a - b).norm() for a, b in pairs]).norm() / norm)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_hugging_face_models_have_the_same_gradients_and_names(make):
    model, ids = make(), torch.randint(0, 60, (2, 9))
    for module in model.modules():
        if "Norm" in type(module).__name__:
            nn.init.normal_(module.weight, 1, 0.3)
    keys, expected = list(model.state_dict()), model_gradients(model, ids)
    undo = memory_sharing_norm(model)
    assert relative(model_gradients(model, ids), expected) < (1e-12 if make is bert else 1e-6)
    assert list(model.state_dict()) == keys
    copied = copy.deepcopy(model)
    assert relative(model_gradients(copied, ids), expected) < 1e-6
    undo()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model_gradients(model, ids), expected, strict=True)
        if b is not None
    )


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_hugging_face_models_keep_less(make):
    """BERT: one tensor fewer for each of two norms a layer. Llama: in float32 at least two for each."""
    tokens, width, tensors = 4 * 32, 48, {"llama": 2, "bert": 1}

    def slope(convert):
        held = []
        for layers in (2, 4):
            model = make(layers, torch.float32)
            if convert:
                memory_sharing_norm(model)
            ids = torch.randint(0, 60, (4, 32))
            with Ledger(model, inputs=ids) as ledger:
                model(input_ids=ids)[0].square().mean().backward()
            held.append(ledger.columns[Column.ACTIVATIONS])
        return (held[1] - held[0]) / 2

    name = make.__name__
    assert slope(False) - slope(True) >= 2 * tensors[name] * tokens * width * 4


def test_pretrained_minilm_has_the_same_gradients():
    try:
        loaded = load_model("minilm", dtype=torch.float64)
    except LoadError as error:
        pytest.skip(str(error))
    model = loaded.model.eval()
    batch = dict(
        loaded.tokenizer(
            ["The cat sat on the mat.", "It rained."], padding=True, return_tensors="pt"
        )
    )
    expected = model_gradients(model, batch["input_ids"])
    memory_sharing_norm(model)
    assert relative(model_gradients(model, batch["input_ids"]), expected) < 1e-12


def test_storages_have_the_numbers_that_were_found_on_fakes():
    """A schedule that keeps all that was found to be saved lets nothing go."""
    model, ids = llama(2, torch.float32), torch.zeros(2, 16, dtype=torch.int64)
    model.config.use_cache = False  # a cache holds some of the tensors besides
    memory_sharing_norm(model)

    def loss_fn(model, ids):
        return model(input_ids=ids, labels=ids).loss

    def held():
        with Ledger(model, inputs=ids) as ledger:
            loss_fn(model, ids).backward()
        return ledger.columns[Column.ACTIVATIONS]

    profile, plain = measure(model, None, loss_fn, ids, allow_compile=False), held()
    layout, whole = layout_of(profile, profile.variants[()]), model_record(profile, 1, None)
    host = Host(model, None, loss_fn)
    for path, block in layout.blocks.items():
        record = block_record(profile, layout, block, model=whole)
        SelectiveRecompute(record.graph.saved).attach(Block(path, Scope.BLOCK, host=host))
    assert held() == plain


def test_nothing_is_recorded_without_gradients_and_fakes_run():
    model, x = pairs(nn.LayerNorm), torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    memory_sharing_norm(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with faked(model, x) as (fake,):
        model(fake).sum().backward()


def test_autocast():
    model = pairs(nn.LayerNorm, dtype=torch.float32)
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = gradients(model, x)
        memory_sharing_norm(model)
        found_y, found = gradients(model, x)
    assert torch.equal(found_y, y)
    assert [f.dtype for f in found] == [e.dtype for e in expected]
    assert relative(found, expected) < 0.05


def test_what_it_refuses():
    with pytest.raises(UnsupportedError, match="none in Linear"):
        memory_sharing_norm(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="none in LlamaNorm"):  # of another form
        memory_sharing_norm(LlamaNorm(4, offset=1.0))
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    undo = memory_sharing_norm(model[1])
    with pytest.raises(UnsupportedError, match="undo what was done"):
        memory_sharing_norm(model)
    assert "forward" not in model[0].__dict__
    undo()
    memory_sharing_norm(model)
    x = torch.randn(2, 4, requires_grad=True)
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        g.sum().backward()


def test_hooks_and_weights_are_left_alone_when_norms_are_looked_for():
    model, calls = nn.Sequential(LlamaNorm(4), nn.Linear(4, 4), LlamaNorm(4)), []
    for module in model:
        module.register_forward_hook(lambda *_: calls.append(1))
    weight, random = model[0].weight, torch.get_rng_state()
    undo = memory_sharing_norm(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert "forward" in model[0].__dict__
    assert not calls
    model(torch.randn(2, 4).requires_grad_()).sum().backward()
    assert len(calls) == 3
    undo()
    assert model[0].weight is weight
    assert torch.equal(weight, torch.ones(4))
    assert "forward" not in model[0].__dict__


class Broken(nn.Module):
    """Something else with a norm's attributes, whose forward takes two arguments."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x, y):
        return x * self.weight + y


def test_other_modules_with_the_attributes_of_a_norm_are_left_alone():
    model = nn.Sequential(nn.LayerNorm(4), Broken())
    memory_sharing_norm(model)
    assert "forward" in model[0].__dict__
    assert "forward" not in model[1].__dict__
