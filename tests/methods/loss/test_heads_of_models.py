"""Models as they are written by others: the loss and every gradient of the plain step, and never the logits."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from slimgrad.host import Host
from slimgrad.method import Block, Scope
from slimgrad.methods.loss.chunked_cross_entropy import ChunkedCrossEntropy, discover, find_head
from slimgrad.methods.loss.deferring_head import outcomes

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, VOCAB, WIDTH = 3, 16, 419, 8
CHUNK = 5


class Outputs(TorchDispatchMode):
    """The operations whose output had at least ``limit`` elements."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.large = limit, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.limit:
                self.large.append((str(func), tuple(leaf.shape)))
        return out


def llama(tied):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def gemma():
    config = transformers.Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        final_logit_softcapping=0.5,
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return transformers.BertForMaskedLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
    )
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias.copy_(torch.linspace(-1, 1, VOCAB))
    return model


class Plain(nn.Module):
    """A user's own model; the head is neither the widest linear layer nor the last one registered."""

    def __init__(self, num_outputs=VOCAB):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.out = nn.Linear(WIDTH, num_outputs)
        self.up = nn.Linear(WIDTH, 2 * VOCAB)
        self.down = nn.Linear(2 * VOCAB, WIDTH)

    def forward(self, input_ids):
        return self.out(self.down(torch.relu(self.up(self.embed(input_ids)))))


def loss_of_output(model, batch):
    return model(**batch).loss


def loss_by_items(model, batch):
    return model(**batch, num_items_in_batch=torch.tensor(31)).loss


def loss_of_shifted(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    shifted = logits[..., :-1, :].contiguous()
    return nn.CrossEntropyLoss()(shifted.view(-1, VOCAB), batch["labels"][:, 1:].reshape(-1))


def loss_of_tuple(model, batch):
    return model(**batch, return_dict=False)[0]


def loss_by_view(model, batch):
    logits = model(batch["input_ids"])
    return functional.cross_entropy(
        logits.view(-1, VOCAB), batch["labels"].view(-1), ignore_index=-100
    )


def loss_by_transpose(model, batch):
    return functional.cross_entropy(model(batch["input_ids"]).transpose(1, 2), batch["labels"])


CASES = {
    "llama": (lambda: llama(False), loss_of_output, "lm_head"),
    "llama_tied": (lambda: llama(True), loss_of_output, "lm_head"),
    "llama_items": (lambda: llama(True), loss_by_items, "lm_head"),
    "llama_own_loss": (lambda: llama(True), loss_of_shifted, "lm_head"),
    "llama_tuple": (lambda: llama(True), loss_of_tuple, "lm_head"),
    "gemma": (gemma, loss_of_output, "lm_head"),
    "gpt2": (gpt2, loss_of_output, "lm_head"),
    "bert": (bert, loss_of_output, "cls.predictions.decoder"),
    "t5": (t5, loss_of_output, "lm_head"),
    "bart": (bart, loss_of_output, "lm_head"),
    "plain": (Plain, loss_by_view, "out"),
    "plain_transposed": (Plain, loss_by_transpose, "out"),
}


def make_batch():
    labels = torch.randint(0, VOCAB, (BATCH, LENGTH))
    labels[0, -3:] = -100
    return {"input_ids": torch.randint(0, VOCAB, (BATCH, LENGTH)), "labels": labels}


def make_model(name):
    torch.manual_seed(0)
    return CASES[name][0]().double().train()


def method_for(name):
    own = isinstance(make_model(name), Plain)
    return ChunkedCrossEntropy(chunk_size=CHUNK, heads=(CASES[name][2],) if own else ())


def run(model, loss_fn, batch):
    torch.manual_seed(5)  # the same dropout masks
    model.zero_grad(set_to_none=True)
    with Outputs(BATCH * (LENGTH - 1) * VOCAB) as seen:
        loss = loss_fn(model, batch)
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, seen.large


def assert_same_step(found, plain, tolerance=1e-12):
    """Each gradient relative to its largest entry; one that is truly zero (a key's bias) is rounding noise."""
    torch.testing.assert_close(found[0], plain[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == plain[1].keys()
    largest = max(float(grad.abs().max()) for grad in plain[1].values())
    for name, grad in plain[1].items():
        scale = max(float(grad.abs().max()), 1e-4 * largest)
        torch.testing.assert_close(found[1][name] / scale, grad / scale, rtol=0, atol=tolerance)


@pytest.fixture
def in_double(monkeypatch):
    """Transformers takes its losses in float32 (``logits.float()``); here in float64, to see the last digits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("name", CASES)
def test_unmodified_models(name):
    _, loss_fn, path = CASES[name]
    model, batch = make_model(name), make_batch()
    plain = run(model, loss_fn, batch)
    undo = method_for(name).attach(Block("", Scope.MODEL, host=Host(model, None, loss_fn)))
    found = run(model, loss_fn, batch)
    assert_same_step(found, plain)
    outcome = outcomes(model.get_submodule(path))[-1]
    assert outcome.is_lean
    assert outcome.consumed == 1
    limit = 2 * VOCAB * BATCH * LENGTH if "plain" in name else 0  # the inner layer is wider still
    assert [shape for _, shape in found[2] if shape[-1] == VOCAB or not limit] == []
    assert [shape for _, shape in plain[2] if shape[-1] == VOCAB] != []
    undo()
    again = run(model, loss_fn, batch)
    assert torch.equal(again[0], plain[0])
    assert all(torch.equal(again[1][n], g) for n, g in plain[1].items())


@pytest.mark.parametrize("name", CASES)
def test_unmodified_models_in_their_own_precision(name):
    _, loss_fn, path = CASES[name]
    model, batch = make_model(name).float(), make_batch()
    plain = run(model, loss_fn, batch)
    undo = method_for(name).attach(Block("", Scope.MODEL, host=Host(model, None, loss_fn)))
    assert_same_step(run(model, loss_fn, batch), plain, tolerance=1e-3)
    assert outcomes(model.get_submodule(path))[-1].is_lean
    undo()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_twin_scaled_by_nine_tenths_is_rejected(what):
    model, batch = make_model("llama"), make_batch()
    plain = run(model, loss_of_output, batch)
    loss, grads, large = run(model, loss_of_output, batch)
    if what == "loss":
        loss = 0.9 * loss
    else:
        grads["lm_head.weight"] = 0.9 * grads["lm_head.weight"]
    with pytest.raises(AssertionError):
        assert_same_step((loss, grads, large), plain)


@pytest.mark.parametrize("name", CASES)
def test_the_head_is_found(name):
    _, loss_fn, path = CASES[name]
    model, batch = make_model(name), make_batch()
    if name.startswith("plain"):
        assert find_head(model) == "up"  # by structure alone; only a run can tell
    else:
        assert find_head(model) == path
    with torch.no_grad():
        assert discover(model, loss_fn, batch) == (path,)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["llama_tied", "plain"])
def test_the_head_is_found_on_fake_tensors(name):
    make, loss_fn, path = CASES[name]
    with FakeTensorMode():
        model, batch = make(), make_batch_of_zeros()
        assert discover(model, loss_fn, batch) == (path,)


def make_batch_of_zeros():
    zeros = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    return {"input_ids": zeros, "labels": zeros}


def test_generation_and_the_logits_of_an_output():
    model, batch = make_model("llama_tied").eval(), make_batch()
    prompt = batch["input_ids"][:, :4]
    with torch.no_grad():
        plain_logits = model(**batch).logits
    plain = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    undo = ChunkedCrossEntropy().attach(Block("", Scope.MODEL, host=Host(model, None, None)))
    assert torch.equal(
        model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0), plain
    )
    output = model(**batch)
    output.loss.backward()
    assert torch.equal(output.logits.detach() + 0, plain_logits)
    undo()


def test_under_recomputation_and_autocast():
    found = []
    for attached in (False, True):
        model, batch = make_model("llama_tied").float(), make_batch()
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
        if attached:
            host = Host(model, None, loss_of_output)
            ChunkedCrossEntropy(chunk_size=CHUNK).attach(Block("", Scope.MODEL, host=host))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of_output(model, batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, mine in zip(*found, strict=True):
        assert mine.dtype == plain.dtype
        assert float((mine - plain).norm()) <= 2e-2 * float(plain.norm())


@pytest.mark.usefixtures("in_double")
def test_three_optimizer_steps_equal_plain():
    ends = []
    for attached in (False, True):
        model, batch = make_model("gpt2").eval(), make_batch()
        if attached:
            host = Host(model, None, loss_of_output)
            ChunkedCrossEntropy(chunk_size=CHUNK).attach(Block("", Scope.MODEL, host=host))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of_output(model, batch).backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for plain, mine in zip(*ends, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)
