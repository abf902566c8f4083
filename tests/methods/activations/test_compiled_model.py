"""The whole step compiled: traced on real steps to the byte, right in its gradient, chosen where faster, or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tests.every_method.test_battery import left_on, plain_gradients
from tests.plain_training import State
from tests.sample_models import adamw
from tests.single_method_plans import (
    hand_made,
    measured_peak,
    plan_of,
    predicted_peak,
    programme_of,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

import slimgrad
from slimgrad.comparing.allocations import allocated_peak, held_bytes
from slimgrad.errors import BatchTooLarge, UnsupportedError
from slimgrad.measuring import compiled_code, compiled_step
from slimgrad.measuring.profile import Profile, profile_from_json, profile_to_json
from slimgrad.methods.activations.compiled_model import CompiledModel
from slimgrad.methods.gradients.update_in_backward import UpdateInBackward
from slimgrad.planning import compiled_variants, profiling
from slimgrad.planning.offers import Allowed, schemes
from slimgrad.planning.plan import Choice
from slimgrad.planning.real_passes import setting_of
from slimgrad.verifying.gradient import captured_gradients, relative_error, same_bits
from slimgrad.verifying.verify import verify

pytestmark = [
    pytest.mark.skipif(compiled_code.cpp_compiler() is None, reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # torch.compile looks at every input
]
VARIANT = (setting_of(CompiledModel()),)


class _Model(nn.Module):
    """Two gated layers with batch norm, a counter and, if asked for, dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(48, 32), nn.BatchNorm1d(32)
        self.body = nn.ModuleList([nn.Linear(32, 64) for _ in range(2)])
        self.head, self.drop = nn.Linear(32, 48), nn.Dropout(dropout)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))

    def forward(self, tokens_NT: Tensor) -> Tensor:
        self.num_calls.add_(1)
        x = self.norm(self.embed(tokens_NT).flatten(0, 1))
        for layer in self.body:
            y, gate = layer(x).chunk(2, -1)
            x = x + self.drop(torch.tanh(y) * torch.sigmoid(gate))
        return self.head(x)


def loss_fn(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens_NT[:, :-1]), tokens_NT[:, 1:].flatten())


def make(dropout: float = 0.0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _Model(dropout), torch.randint(48, (8, 65))


class _Measured(NamedTuple):
    profile: Profile
    differences: list[str]


def measure(dropout: float = 0.0, **fields: Any) -> _Measured:
    """The profile with the compiled step, no block compiled, and what measuring left changed."""
    model, batch = make(dropout)
    optimizer = adamw(model)
    loss_fn(model, batch).backward()
    optimizer.step()
    before, marks = State.of(model, optimizer), left_on(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "compiled_costs", lambda *_: ({}, None))
        asked = {"limit_s": 0.0, "allow_compile": True} | fields
        profile = slimgrad.measure(model, optimizer, loss_fn, batch, **asked)
    differences = State.of(model, optimizer).differences(before)
    return _Measured(profile, differences + ["marks"] * (left_on(model) != marks))


@pytest.fixture(scope="module")
def measured() -> _Measured:
    return measure()


@pytest.fixture(scope="module")
def profile(measured: _Measured) -> Profile:
    return measured.profile


def priced(profile: Profile, ratio: float, compile_s: float = 0.0) -> Profile:
    """The profile with a plain step of a second, and a compiled one of ``ratio`` seconds."""
    traces = {key: replace(trace) for key, trace in profile.variants.items()}
    for key, trace in traces.items():
        seconds = ratio if key == VARIANT else 1.0
        trace.op_seconds = trace.op_seconds * seconds / trace.op_seconds.sum()
    return replace(profile, variants=traces, compile_s=compile_s)


def test_measuring_changes_nothing_and_is_saved(measured: _Measured) -> None:
    profile = measured.profile
    assert measured.differences == []
    assert VARIANT in profile.variants
    assert "compiled_model" not in profile.refusals
    assert profile.compile_s > 0
    assert profile.variants[VARIANT].op_seconds.sum() > 0
    again = profile_from_json(profile_to_json(profile))
    assert again.compile_s == profile.compile_s
    peaks = [slimgrad.plan(priced(p, 0.9), "100%").peak_bytes for p in (profile, again)]
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("others", [[], [UpdateInBackward()]], ids=str)
def test_replay_ledger_and_profiler_find_the_same_peak(profile: Profile, others: list[Any]) -> None:
    found = schemes(profile, Allowed())
    wanted = {type(m) for m in (CompiledModel(), *others)}
    (scheme,) = [s for s in found if {type(m) for m, _ in s.methods} == wanted]
    predicted = predicted_peak(programme_of(profile, scheme, {}))
    model, batch = make()
    optimizer = adamw(model)
    choices = [
        Choice("", "compiled_model", {}),
        *(Choice("", setting_of(m)[0], {}) for m in others),
    ]
    with slimgrad.apply(plan_of(model, optimizer, choices), model, optimizer, loss_fn) as step:
        counted = measured_peak(step, batch)
        held = held_bytes(model, optimizer, batch)
        allocated = allocated_peak(lambda: step(batch), held)
    assert counted == pytest.approx(allocated, rel=0.01)
    assert predicted == pytest.approx(counted, rel=0.03)
    assert predicted >= counted - 1024


def test_the_compiled_step_takes_less_than_the_plain_one(profile: Profile) -> None:
    plain, made = (profile.variants[key].timeline().peak_bytes for key in ((), VARIANT))
    assert made < 0.95 * plain  # the gradient of the logits goes into what multiplies it


def test_gradient_is_within_the_exact_rung_and_undo_leaves_nothing(profile: Profile) -> None:
    model, batch = make()
    optimizer = adamw(model)
    plan = hand_made(model, optimizer, CompiledModel())
    peak = profile.peak_bytes
    plan = replace(plan, plain_peak_bytes=peak, peak_bytes=peak, budget_bytes=peak)
    before, keys = left_on(model), list(model.state_dict())
    with slimgrad.apply(plan, model, optimizer, loss_fn) as step:
        report = verify(step, batch, time_pairs=0)
        assert report.gradient_error  # compiled code ran
        assert report.passed, str(report)
        assert report.float64_gradient_error is not None
        with torch.no_grad():
            assert torch.equal(step.host.loss_fn(model, batch), loss_fn(model, batch))
        found: dict[str, Tensor] = {}
        other = torch.randint(48, (5, 33))  # compiled again, for another shape
        twin, _ = make()
        twin.load_state_dict(model.state_dict())
        with captured_gradients(model, found):
            step(other)
        assert relative_error(found, plain_gradients(twin, loss_fn, other)) < 1e-5
    assert step.host.loss_fn is loss_fn
    assert left_on(model) == before
    assert list(model.state_dict()) == keys
    fresh, _ = make()
    fresh.load_state_dict(model.state_dict())
    assert same_bits(plain_gradients(model, loss_fn, batch), plain_gradients(fresh, loss_fn, batch))


def test_with_dropout_it_is_offered_and_wrong_gradients_are_noticed() -> None:
    dropped = measure(0.3)
    assert dropped.differences == []
    assert VARIANT in dropped.profile.variants, dropped.profile.refusals
    for dropout in (0.0, 0.3):
        model, batch = make(dropout)
        plain = compiled_step._run(model, loss_fn, batch)
        wrong = compiled_step._run(model, _lacking, batch)
        assert plain.draws is (dropout > 0)
        compiled_step._check(model, loss_fn, batch, plain, plain, 1e-7)
        with pytest.raises(UnsupportedError, match="gradient is off"):
            compiled_step._check(model, _lacking, batch, wrong, plain, 1e-7)


def _lacking(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    """The same loss; its gradient lacks the head's weight."""
    weight = model.head.weight
    inputs, targets = tokens_NT[:, :-1], tokens_NT[:, 1:]
    stopped = {"head.weight": weight.detach() + 0 * weight}
    return F.cross_entropy(functional_call(model, stopped, inputs), targets.flatten())


def test_it_is_chosen_where_it_is_faster(profile: Profile) -> None:
    def chosen(profile: Profile, **fields: Any) -> list[str]:
        return [c.method for c in slimgrad.plan(profile, "100%", **fields).choices]

    fast = slimgrad.plan(priced(profile, 0.9), "100%")
    assert [c.method for c in fast.choices] == ["compiled_model"]
    assert fast.seconds - 0.92 == pytest.approx(  # less what may be noise
        fast.plain_seconds - profile.forward_s - profile.backward_s
    )
    assert fast.choices[0].added_s == pytest.approx(-0.1)
    assert fast.needs_step
    assert "compiled_model" not in chosen(priced(profile, 1.1))
    for fields in ({"allow_compile": False}, {"exactness": "bitwise"}):
        plan = slimgrad.plan(priced(profile, 0.9), "100%", **fields)
        assert all(c.method != "compiled_model" for c in plan.choices)
        assert plan.refusals["compiled_model"]
    late = priced(profile, 0.9, compile_s=60.0)
    assert "compiled_model" in chosen(late, steps=10_000)
    assert "compiled_model" not in chosen(late, steps=100)


def test_a_larger_batch_is_predicted_as_it_runs_plain(profile: Profile) -> None:
    model, batch = make()
    optimizer = adamw(model)
    plan = slimgrad.plan(priced(profile, 0.9), "100%")
    with slimgrad.apply(plan, model, optimizer, loss_fn, profile=profile) as step:
        step.admit(batch[:4])
        with pytest.raises(BatchTooLarge, match="batch norm") as caught:
            step.admit(torch.cat([batch, batch]))
    assert caught.value.largest_batch_size is not None
    assert 0 < caught.value.largest_batch_size <= 8
    assert caught.value.predicted_bytes > plan.budget_bytes


def test_it_goes_with_no_other_rewriting_and_no_block(profile: Profile) -> None:
    for scheme in schemes(profile, Allowed()):
        if VARIANT[0] in scheme.variant:
            assert scheme.variant == VARIANT
            assert not scheme.trace.calls


def never(*_: Any) -> Any:
    raise AssertionError("compiled")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"allow_compile": False}, "not allowed"),
        ({"allow_compile": None}, "steps"),
        ({"compile_limit_s": 1.0}, "expected to take"),
        ({"limit_bytes": 1000}, "a real step is needed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(compiled_variants, "compiled_step", never)
    found = measure(**fields).profile
    assert VARIANT not in found.variants
    assert reason in found.refusals["compiled_model"]
    assert reason in slimgrad.plan(found, "100%").refusals["compiled_model"]


def test_refused_on_fake_tensors_and_beside_gradient_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_variants, "compiled_step", never)
    monkeypatch.setattr(profiling, "compiled_costs", lambda *_: ({}, None))
    fields: dict[str, Any] = {"limit_s": 0.0, "allow_compile": True}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, batch = make()
        found = slimgrad.measure(model, None, loss_fn, batch, **fields)
    assert "no memory" in found.refusals["compiled_model"]
    model, batch = make()
    model.head.weight.register_post_accumulate_grad_hook(lambda _: None)
    found = slimgrad.measure(model, None, loss_fn, batch, **fields)
    assert "hooks" in found.refusals["compiled_model"]


def test_refused_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    found = measure().profile
    assert VARIANT not in found.variants
    assert "C++ compiler" in found.refusals["compiled_model"]
    model, _ = make()
    optimizer = adamw(model)
    with pytest.raises(UnsupportedError, match="allow_compile=False"):
        slimgrad.apply(hand_made(model, optimizer, CompiledModel()), model, optimizer, loss_fn)


def test_what_fails_or_stays_plain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel for this")

    plain: Any = lambda _, loss_fn: loss_fn  # noqa: E731
    for stand_in, reason in ((fails, "no kernel"), (plain, "made no code")):
        monkeypatch.setattr(
            "slimgrad.methods.activations.compiled_model.compiled_loss",
            (lambda *_, s=stand_in: s) if stand_in is fails else stand_in,
        )
        found = measure()
        assert found.differences == []
        assert reason in found.profile.refusals["compiled_model"]
