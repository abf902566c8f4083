"""A pretrained model made reversible: near what it was, autograd's gradients, bytes flat in depth, and its undoing."""

import copy

import pytest
import torch

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, LoadError, UnsupportedError
from slimgrad.layers.meft import ReversibleLayers, meft
from slimgrad.layers.reversible_sequence import reconstruction_error
from slimgrad.training.models import load_model
from slimgrad.types import Column

transformers = pytest.importorskip("transformers")

SENTENCES = [
    "The cat sat on the mat.",
    "Reversible networks reconstruct their activations during the backward pass, and so need little memory.",
    "How much does a ticket to Vienna cost?",
    "It rained.",
    "She sold the old house to a painter who had always wanted to live by the sea.",
    "Interest rates rose by half a point, the bank said on Monday.",
]


def bert(layers=4, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).to(dtype).train()


def llama(layers=4, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).train()


MODELS = {"bert": bert, "llama": llama}


def tokens(shape=(3, 7)):
    ids = torch.randint(1, 60, shape)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output(model, batch):
    return model(**batch)[0]


def chains_of(model):
    (stack,) = (m for m in model.modules() if isinstance(m, ReversibleLayers))
    return list(stack.chains)


def gradients(model, batch, *, is_reversible):
    for chain in chains_of(model):
        chain.is_reversible = is_reversible
    torch.manual_seed(1)
    found = output(model, batch)
    loss = (found.double() * torch.linspace(-1, 1, found.shape[-1])).sum(-1).square().mean()
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def difference(found, expected):
    norm = torch.stack([x.double().norm() for x in expected]).norm()
    pairs = zip(found, expected, strict=True)
    return float(torch.stack([(a.double() - b.double()).norm() for a, b in pairs]).norm() / norm)


def gradient_error(model, batch):
    expected = gradients(model, batch, is_reversible=False)
    assert all(bool(g.norm() > 0) for g in expected)
    return difference(gradients(model, batch, is_reversible=True), expected)


@pytest.fixture(scope="module")
def pretrained():
    try:
        return load_model("minilm", dtype=torch.float64)
    except LoadError as error:
        pytest.skip(str(error))


@pytest.fixture
def minilm(pretrained):
    batch = dict(pretrained.tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    return copy.deepcopy(pretrained.model).eval(), batch


def cosines(found, expected, mask):
    """Of each sentence's mean, and over all tokens the mean."""
    found, expected = (x.detach() * mask[..., None] for x in (found, expected))
    of_means = torch.cosine_similarity(found.sum(1), expected.sum(1), dim=-1)
    return of_means, torch.cosine_similarity(found, expected, dim=-1)[mask > 0].mean()


def test_minilm_starts_near_what_it_was_with_autograds_gradients(minilm):
    model, batch = minilm
    expected = output(model, batch).detach()
    meft(model)
    assert len(chains_of(model)) == 1  # no streams are kept between its layers
    of_means, of_tokens = cosines(output(model, batch), expected, batch["attention_mask"])
    assert of_means.min() > 0.99
    assert of_tokens > 0.99
    assert gradient_error(model, batch) < 1e-8


def test_the_papers_scale_starts_farther_away(minilm):
    model, batch = minilm
    expected = output(model, batch).detach()
    meft(model, scales=(0.1, 1.0))
    of_means, of_tokens = cosines(output(model, batch), expected, batch["attention_mask"])
    assert 0.95 < of_tokens < 0.98
    assert 0.95 < of_means.min() < 0.98
    assert gradient_error(model, batch) < 1e-10


def test_float32_minilm_is_reconstructed_to_the_bit(minilm):
    model, batch = minilm
    meft(model)
    model.float()
    (errors,) = reconstruction_error(model, **batch).values()
    assert errors == (0.0,) * 6
    truth = gradients(model, batch, is_reversible=False)
    assert gradient_error(model, batch) < 5e-6
    for chain in chains_of(model):
        chain.wide = False  # as without the wide streams that it comes from
    assert difference(gradients(model, batch, is_reversible=True), truth) > 1e-2


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("arrangement", [1, 2, 3])
@pytest.mark.parametrize(("out", "train_all"), [("carrier", True), ("mean", False)])
def test_gradients_are_those_of_autograd(make, arrangement, out, train_all):
    model, batch = make(3), tokens()
    meft(model, arrangement, output=out, bottleneck=4, train_all=train_all, blocks_per_chain=2)
    assert gradient_error(model, batch) < 1e-8


@pytest.mark.parametrize("arrangement", [1, 2, 3])
def test_dropout_is_replayed(arrangement):
    model = bert(3, dropout=0.3)
    meft(model, arrangement)
    assert gradient_error(model, tokens()) < 1e-8


def test_only_adapters_are_trained_and_all_of_them():
    model = bert(3)
    before = {id(p) for p in model.parameters()}
    meft(model, bottleneck=4)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not before & {id(p) for p in trained}
    size = 2 * 4 * 32 + 4 + 32
    assert sum(p.numel() for p in trained) == 5 * size  # the last layer has no adapter after it


def saved_bytes(layers, *, convert, make, **options):
    model = make(layers, torch.float32)
    if convert:
        meft(model, **options)
    batch = tokens((8, 32))
    with Ledger(model, inputs=batch) as ledger:
        output(model, batch).square().mean().backward()
    return ledger.columns[Column.ACTIVATIONS]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("arrangement", [1, 2, 3])
def test_activations_are_flat_in_depth(make, arrangement):
    shallow, deep = (
        saved_bytes(n, convert=True, make=make, arrangement=arrangement, blocks_per_chain=None)
        for n in (4, 8)
    )
    assert deep == shallow
    assert deep < saved_bytes(8, convert=False, make=make) / 4


def test_each_chain_keeps_its_streams():
    stream = 8 * 32 * 32 * 4
    one, two, four = (
        saved_bytes(8, convert=True, make=bert, blocks_per_chain=n) for n in (8, 4, 2)
    )
    assert two - one == (four - one) // 3
    assert 4 * stream <= two - one <= 6 * stream  # two streams in float64


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("arrangement", [1, 2, 3])
def test_undo_gives_back_the_model(make, arrangement):
    model, batch = make(3), tokens()
    model.get_input_embeddings().requires_grad_(False)
    keys, needed = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    cache, before = model.config.use_cache, output(model, batch)
    undo = meft(model, arrangement)
    assert not torch.equal(output(model, batch), before)
    undo()
    assert torch.equal(output(model, batch), before)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == needed
    assert model.config.use_cache == cache


def test_evaluation_and_training_compute_the_same():
    model, batch = bert(3), tokens()
    meft(model)
    with torch.no_grad():
        expected = output(model, batch)
    torch.testing.assert_close(output(model, batch), expected)


def test_the_error_is_told_and_bounded():
    model, batch = bert(6, torch.float32), tokens()
    meft(model, scales=(0.03, 1.0), max_error=1e-9)  # no power of two: bits are lost
    (errors,) = reconstruction_error(model, **batch).values()
    assert len(errors) == 6
    assert errors[0] > errors[-1]
    with pytest.raises(UnsupportedError, match=r"above max_error=1\.0e-09"):
        output(model, batch)
    model = bert(6, torch.float32)
    meft(model, max_error=1e-9)
    output(model, batch)


def test_what_it_refuses():
    with pytest.raises(ArgumentError, match="an arrangement of 1, 2 or 3"):
        meft(bert(1), 4)
    with pytest.raises(ArgumentError, match="an output 'carrier' or 'mean'"):
        meft(bert(1), output="sum")
    with pytest.raises(ArgumentError, match="blocks_per_chain of 1 or more"):
        meft(bert(1), blocks_per_chain=0)
    with pytest.raises(UnsupportedError, match="Sequential has no list of layers"):
        meft(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    model = llama(2)
    meft(model)
    with pytest.raises(UnsupportedError, match="no key-value cache"):
        model(**tokens(), use_cache=True)
