"""Plans with norms that share what they keep: faint channels, what is composed with them, and what is not offered."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.hand_made_plans import block_paths, hand_made
from tests.sample_models import adamw
from tests.single_method_plans import measured_peak
from torch import Tensor, nn
from torch.nn import functional

from slimgrad import apply, catalogue, measure, plan, slim, verify
from slimgrad.host import Host
from slimgrad.measuring.fake import faked
from slimgrad.measuring.profile import Profile, Setting
from slimgrad.method import Block, Refusal, Scope
from slimgrad.methods.activations.approx_bp import ApproxBp
from slimgrad.methods.activations.memory_sharing_norm import (
    MemorySharingNorm,
    faint_channels,
    memory_sharing_norm,
)
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.methods.activations.values import Operation
from slimgrad.planning.settings import block_record, layout_of, model_record

WIDTH, TOKENS, WORDS = 48, 96, 50
SHARING: Setting = ("memory_sharing_norm", ())
MEASURED: dict[str, Any] = {"limit_s": 0.0, "allow_compile": False}


class Layer(nn.Module):
    """The feed-forward half of a transformer's layer; what its norm returns the linear layer keeps too."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Words(nn.Module):
    """Layers between an embedding and a head."""

    def __init__(self, norm: Any = nn.LayerNorm, num_layers: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(Layer(norm) for _ in range(num_layers))
        self.norm = norm(WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss_fn(model: nn.Module, words: Tensor) -> Tensor:
    return functional.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


def made(norm: Any = nn.LayerNorm, num_samples: int = 2) -> tuple[Words, Tensor]:
    torch.manual_seed(0)
    model = Words(norm).double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.2)
    return model, torch.randint(0, WORDS, (num_samples, TOKENS + 1))


def make_faint(model: Words, num: int = 5) -> None:
    """As training may: weights of zero, and small ones beside a bias."""
    with torch.no_grad():
        for module in (*(layer.norm for layer in model.layers), model.norm):
            module.weight[:num] = 0.0
            module.weight[num] = 1e-9
            assert int(faint_channels(module.weight, getattr(module, "bias", None)).numel()) >= num


def gradients(model: nn.Module, words: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss_fn(model, words).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11 * scale, msg=name)


def records(profile: Profile, variant: tuple[Setting, ...] = ()) -> dict[str, Any]:
    layout, whole = layout_of(profile, profile.variants[variant]), model_record(profile, 1, None)
    return {p: block_record(profile, layout, b, model=whole) for p, b in layout.blocks.items()}


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_codes_meet_their_tensors_whatever_channels_are_faint(norm: Any, when: str) -> None:
    """The same code on the same tensors has the same (approximate) gradient with shared norms as with plain ones."""

    def coded(is_shared: bool) -> dict[str, Tensor]:
        model, words = made(norm)
        if when == "before":
            make_faint(model)
        if is_shared:
            memory_sharing_norm(model)
        profile = measure(model, None, loss_fn, words, **MEASURED)
        if when == "after":
            make_faint(model)
        plain, host = gradients(model, words), Host(model, None, loss_fn)
        for path, record in records(profile).items():
            store = ApproxBp().on(record)
            assert len(store.storages) == 1
            for method in (store, SelectiveRecompute(record.graph.saved)):
                method.attach(Block(path, Scope.BLOCK, host=host))
        found = gradients(model, words)
        with pytest.raises(AssertionError):
            assert_agree(found, plain)  # it is approximate: the code is used
        return found

    assert_agree(coded(True), coded(False))


@pytest.mark.parametrize("when", ["before", "after", "never"])
@pytest.mark.parametrize("is_kept", [True, False])
def test_schedules_mean_their_storages_whatever_channels_are_faint(
    when: str, is_kept: bool
) -> None:
    """Gradients are plain's, and where everything is kept nothing is run again, so that nothing else is held."""
    model, words = made()
    if when == "before":
        make_faint(model)
    profile = measure(model, None, loss_fn, words, **MEASURED)
    if when == "after":
        make_faint(model)
    expected, host = gradients(model, words), Host(model, None, loss_fn)
    MemorySharingNorm().attach(Block("", Scope.MODEL, host=host))
    again: list[int] = []
    for path, record in records(profile, (SHARING,)).items():
        keep = record.graph.saved if is_kept else record.graph.saved[:1]
        method = SelectiveRecompute(keep)
        again.append(len(_made_again(model, words, method, path, host)))
    assert_agree(gradients(model, words), expected)
    assert len(again) == 4
    assert all(num == 0 if is_kept else num > 0 for num in again)


def _made_again(
    model: nn.Module, words: Tensor, method: SelectiveRecompute, path: str, host: Host
) -> list[str]:
    """The operations that backward runs again once ``method`` is attached, where it stays."""
    run, names = Operation.run, list[str]()

    def noted(operation: Operation, holding: Any) -> None:
        names.append(str(operation.func))
        run(operation, holding)

    method.attach(Block(path, Scope.BLOCK, host=host))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Operation, "run", noted)
        gradients(model, words)
    return names


@pytest.mark.parametrize("is_faint", [True, False])
def test_columns_are_counted_in_the_plan(is_faint: bool) -> None:
    """What is faint when the plan is made is predicted to the byte, block by block."""
    model, words = made()
    without = measure(model, None, loss_fn, words, **MEASURED)
    if is_faint:
        make_faint(model, 20)
    profile = measure(model, None, loss_fn, words, **MEASURED)
    more = [
        after.saved_bytes - before.saved_bytes
        for before, after in zip(
            *(records(p, (SHARING,)).values() for p in (without, profile)), strict=True
        )
    ]
    assert more == [21 * 2 * TOKENS * 8 if is_faint else 0] * 4
    for on_blocks in ((), ["layers.1"]):
        made_plan = hand_made(profile, on_blocks, variant=(SHARING,))
        with apply(made_plan, model, None, loss_fn) as step:
            assert measured_peak(step, words) == pytest.approx(made_plan.peak_bytes, rel=0.01)


@functools.cache
def language_model_profile(num_samples: int = 2) -> Profile:
    model, words = made(num_samples=num_samples)
    return measure(model, adamw(model), loss_fn, words, **MEASURED)


def test_it_is_traced_alone() -> None:
    variants = language_model_profile(4).variants
    assert [variant for variant in variants if SHARING in variant] == [(SHARING,)]
    assert any(len(variant) == 2 for variant in variants)  # others are combined


@pytest.mark.parametrize("on_block", ["", "recompute", "offload_activations"])
def test_what_it_is_composed_with(on_block: str) -> None:
    profile = language_model_profile()
    model, words = made()
    optimizer = adamw(model)
    made_plan = hand_made(
        profile,
        dict.fromkeys(block_paths(profile)[:2], on_block) if on_block else (),
        variant=(SHARING,),
        on_model=["update_in_backward"] if on_block else (),
    )
    with apply(made_plan, model, optimizer, loss_fn) as step:
        report = verify(step, words)
    assert report.passed, report.checks
    assert report.gradient_error is not None
    assert 0 < report.gradient_error < 1e-12


def test_slim_chooses_it_where_nothing_else_is_allowed() -> None:
    model, words = made()
    model.float()
    others = [name for name in catalogue.methods() if name != "memory_sharing_norm"]
    profile = measure(model, adamw(model), loss_fn, words, **MEASURED)
    tight = plan(profile, "min", forbid=others)
    assert [c.method for c in tight.choices] == ["memory_sharing_norm"]
    assert tight.peak_bytes < 0.95 * profile.peak_bytes
    budget = tight.peak_bytes + 2**14
    with slim(
        model, adamw(model), loss_fn, words, budget=budget, forbid=others, allow_compile=False
    ) as step:
        assert [c.method for c in step.plan.choices] == ["memory_sharing_norm"]
        assert step.report.passed
        assert step.report.within_budget
        assert all("forward" in vars(layer.norm) for layer in model.layers)
    assert not any("forward" in vars(module) for module in model.modules())


def test_codes_are_offered_on_the_blocks_that_they_were_measured_on() -> None:
    model, words = made()
    profile = measure(model, None, loss_fn, words, sensitivity=True, **MEASURED)
    by_variant = {v: records(profile, v) for v in profile.variants}
    assert any(record.coding for record in by_variant[()].values())
    for variant, blocks in by_variant.items():
        for path, record in blocks.items():
            expected = {} if SHARING in variant else by_variant[()][path].coding
            assert record.coding == expected


class Dropped(nn.Module):
    """Nobody but the norm keeps what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.dropout(self.norm(x), 0.1))


def test_where_it_frees_next_to_nothing_it_is_left_out() -> None:
    model, x = nn.Sequential(*(Dropped() for _ in range(3))), torch.randn(64, WIDTH)
    profile = measure(model, None, lambda m, b: m(b).square().mean(), x, **MEASURED)
    assert not any(SHARING in variant for variant in profile.variants)
    assert "would fall by less than" in profile.refusals["memory_sharing_norm"]


def test_models_without_such_a_norm_are_refused() -> None:
    host = Host(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)), None, loss_fn)
    assert isinstance(MemorySharingNorm.settings(host, None), Refusal)
    model, _ = made()
    host = Host(model, None, loss_fn)
    assert MemorySharingNorm.settings(host, None) == [MemorySharingNorm()]
    undo = memory_sharing_norm(model)
    refused = MemorySharingNorm.settings(host, None)
    assert isinstance(refused, Refusal)
    assert "forward pass of its class" in refused.reason
    undo()
    assert MemorySharingNorm.settings(host, None) == [MemorySharingNorm()]


def test_a_model_on_fakes_is_planned_for() -> None:
    model, words = made()
    with faked(model, words):
        host = Host(model, None, loss_fn)
        assert MemorySharingNorm.settings(host, words) == [MemorySharingNorm()]
        undo = MemorySharingNorm().attach(Block("", Scope.MODEL, host=host))
        undo()


def test_compiled_norms_are_plain() -> None:
    model, words = made()
    expected = gradients(model, words)
    memory_sharing_norm(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = gradients(compiled, words)  # pyright: ignore[reportArgumentType]
    assert_agree({n.removeprefix("_orig_mod."): g for n, g in found.items()}, expected)
