"""Parts of a batch give the gradient of the whole, under the weights that are found by value."""

import pytest
import torch
from tests.hand_plans import hand_plan, on_model
from torch import nn
from torch.nn import functional

import slimgrad
from slimgrad.errors import BatchError, MethodError
from slimgrad.host import Host, Share
from slimgrad.method import Refusal
from slimgrad.methods.gradients.micro_batches import MicroBatches, find_weighing

WORDS = 9


def language_model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Embedding(WORDS, 6), nn.Tanh(), nn.Linear(6, WORDS)).double()


def words(num=6, length=8):
    generator = torch.Generator().manual_seed(4)
    x, labels = torch.randint(0, WORDS, (2, num, length), generator=generator)
    for i in range(num):  # sample i counts only its first i + 1 targets
        labels[i, i + 1 :] = -100
    return {"x": x, "labels": labels}


def token_mean(model, batch):
    return functional.cross_entropy(model(batch["x"]).transpose(1, 2), batch["labels"])


def shifted_mean(model, batch):
    logits = model(batch["x"])[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:])


def token_sum(model, batch):
    return functional.cross_entropy(
        model(batch["x"]).transpose(1, 2), batch["labels"], reduction="sum"
    )


def sample_mean(model, batch):
    each = functional.cross_entropy(
        model(batch["x"]).transpose(1, 2), batch["labels"], reduction="none"
    )
    return each.sum(1).mean()


LOSSES = {
    "targets": token_mean,
    "shifted_targets": shifted_mean,
    "sum": token_sum,
    "samples": sample_mean,
}


@pytest.mark.parametrize("weigh", LOSSES)
def test_the_weighing_is_found_by_value(weigh):
    model, batch = language_model(), words()
    batch["labels"] = torch.randint(0, WORDS, (6, 8))
    random = torch.get_rng_state()
    found = find_weighing(Host(model, None, LOSSES[weigh]), batch)
    assert found == (weigh, "" if weigh in ("samples", "sum") else "labels", -100)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


@pytest.mark.parametrize(("reduction", "weigh"), [("mean", "samples"), ("sum", "sum")])
def test_losses_without_targets_are_weighed_by_samples(reduction, weigh):
    def loss_fn(model, batch):
        return functional.mse_loss(model(batch[0]), batch[1], reduction=reduction)

    batch = (torch.randn(6, 4), torch.randn(6, 3))
    assert find_weighing(Host(nn.Linear(4, 3), None, loss_fn), batch) == (weigh, "", -100)


def ignoring_zero(model, batch):
    logits_BTV = model(batch["x"])
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1), batch["labels"].flatten(), ignore_index=0
    )


def ignoring_seven(model, batch):
    logits_BTV = model(batch["x"])
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1), batch["labels"].flatten(), ignore_index=7
    )


def masked_mean(model, batch):
    loss_N = functional.cross_entropy(
        model(batch["x"]).flatten(0, 1), batch["labels"].flatten(), reduction="none"
    )
    return (loss_N * batch["mask"].flatten()).sum() / batch["mask"].sum()


def mean_of_sample_means(model, batch):
    """Every sample's mean over its own mask: weighed by no count of this batch."""
    loss_N = functional.cross_entropy(
        model(batch["x"]).flatten(0, 1), batch["labels"].flatten(), reduction="none"
    )
    loss_BT = loss_N.reshape(batch["labels"].shape) * batch["mask"]
    return (loss_BT.sum(1) / batch["mask"].sum(1)).mean()


def with_spread(model, batch):
    logits_BTV = model(batch["x"])
    mean = functional.cross_entropy(logits_BTV.flatten(0, 1), batch["labels"].flatten())
    return mean + 0.1 * logits_BTV.std()


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (ignoring_zero, ("targets", "labels", 0)),
        (ignoring_seven, ("targets", "labels", 7)),
        (masked_mean, ("values", "mask", -100)),
        (mean_of_sample_means, ("samples", "", -100)),
        (with_spread, None),
    ],
)
def test_what_does_not_count_is_found_on_a_batch_where_all_count(loss_fn, found):
    """The sample batch has no padding: later ones have."""
    model, batch = language_model(), words()
    batch["labels"] = torch.randint(1, 7, (6, 8))
    batch["mask"] = torch.ones(6, 8, dtype=torch.float64)
    assert find_weighing(Host(model, None, loss_fn), batch) == found
    if found is not None:
        batch["mask"] = torch.rand(6, 8, dtype=torch.float64)
        for i in range(6):
            batch["labels"][i, i:] = found[2] if found[2] >= 0 else batch["labels"][i, i:]
        method = {"num": 3, "weigh": found[0], "targets": found[1], "ignore_index": found[2]}
        assert_close(gradients_and_loss(loss_fn, batch, method), gradients_and_loss(loss_fn, batch))


def gradients_and_loss(loss_fn, batch, method=None, twist=None):
    """Gradients by name and the loss of a plain step, or of one in parts."""
    model = language_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    choices = [on_model("micro_batches", **method)] if method else []
    step = slimgrad.apply(hand_plan(model, optimizer, *choices), model, optimizer, loss_fn)
    if twist is not None:
        split = step.host.split
        step.host.split = lambda b: [Share(s.batch, s.weight * twist) for s in split(b)]
    loss = step(batch)
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}, float(loss)


def assert_close(ours, theirs):
    size = sum(float(g.square().sum()) for g in theirs[0].values()) ** 0.5
    off = sum(float((ours[0][n] - g).square().sum()) for n, g in theirs[0].items()) ** 0.5
    assert size > 0.01
    assert off <= 1e-12 * size
    assert abs(ours[1] - theirs[1]) <= 1e-12 * abs(theirs[1])


@pytest.mark.parametrize("num", [2, 3, 4, 6, 50])
@pytest.mark.parametrize("weigh", LOSSES)
def test_uneven_parts_add_up_to_the_whole(weigh, num):
    batch = words()
    plain = gradients_and_loss(LOSSES[weigh], batch)
    method = {"num": num, "weigh": weigh, "targets": "labels"}
    assert_close(gradients_and_loss(LOSSES[weigh], batch, method), plain)


def test_wrong_weights_are_seen():
    batch = words()
    plain = gradients_and_loss(token_mean, batch)
    method = {"num": 2, "weigh": "targets", "targets": "labels"}
    with pytest.raises(AssertionError):
        assert_close(gradients_and_loss(token_mean, batch, method, twist=0.9), plain)
    for weigh in ("shifted_targets", "samples", "sum"):
        wrong = gradients_and_loss(token_mean, batch, {**method, "weigh": weigh})
        with pytest.raises(AssertionError):
            assert_close(wrong, plain)


def test_a_part_without_targets_is_left_out():
    batch = words()
    batch["labels"][:3] = -100
    shares = MicroBatches(2, "targets", "labels").split(batch)
    assert [s.weight for s in shares] == [1.0]
    assert torch.equal(shares[0].batch["x"], batch["x"][3:])
    plain = gradients_and_loss(token_mean, batch)
    method = {"num": 4, "weigh": "targets", "targets": "labels"}
    assert_close(gradients_and_loss(token_mean, batch, method), plain)


def test_parts_cover_the_batch_in_order():
    batch = words(num=5)
    shares = MicroBatches(3).split(batch)
    assert [len(s.batch["x"]) for s in shares] == [1, 2, 2]
    assert torch.equal(torch.cat([s.batch["x"] for s in shares]), batch["x"])
    assert sum(s.weight for s in shares) == pytest.approx(1)


def refusal(model, loss_fn, batch):
    settings = MicroBatches.settings(Host(model, None, loss_fn), batch)
    assert isinstance(settings, Refusal)
    return settings.reason


def test_losses_across_samples_are_refused():
    def contrastive(model, batch):
        z = functional.normalize(model(batch), dim=-1)
        return functional.cross_entropy(z @ z.T, torch.arange(len(z)))

    assert "neither" in refusal(nn.Linear(4, 3), contrastive, torch.randn(8, 4))


def test_statistics_over_the_batch_are_refused():
    def loss_fn(model, batch):
        return model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert "batch norm" in refusal(model, loss_fn, torch.randn(8, 4))
    model.eval()
    nums = [m.num for m in MicroBatches.settings(Host(model, None, loss_fn), torch.randn(8, 4))]
    assert nums == [2, 4, 8]


def test_batches_that_cannot_be_split_are_refused():
    def loss_fn(model, batch):
        return model(batch["x"]).square().mean()

    model = nn.Linear(4, 4)
    assert "split" in refusal(model, loss_fn, {"x": torch.randn(1, 4)})
    ragged = {"x": torch.randn(4, 4), "y": torch.randn(3)}
    assert "split" in refusal(model, loss_fn, ragged)
    with pytest.raises(BatchError, match="agree"):
        MicroBatches(2).split(ragged)


@pytest.mark.parametrize("fields", [{"num": 0}, {"num": -2}, {"weigh": "guess"}])
def test_fields_out_of_bounds_are_refused(fields):
    with pytest.raises(MethodError):
        MicroBatches(**fields)
