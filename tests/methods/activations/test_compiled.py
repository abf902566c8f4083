"""Compiled blocks: measured on the real block, replayed to the byte, right in their gradients, or refused."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

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
    scheme_of,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slimgrad
from slimgrad.comparing.allocations import allocated_peak
from slimgrad.errors import PlanError, UnsupportedError
from slimgrad.measuring import compiled_code, compiled_cost
from slimgrad.measuring.compiled_cost import Inputs
from slimgrad.measuring.profile import Profile, profile_from_json, profile_to_json
from slimgrad.method import Block, CompiledCost, Record, Refusal, Scope
from slimgrad.methods.activations.compiled import Compiled
from slimgrad.methods.gradients.update_in_backward import UpdateInBackward
from slimgrad.planning import compiled_variants, compiling, profiling
from slimgrad.planning.compiled_variants import Variants
from slimgrad.planning.menu import Menu
from slimgrad.planning.plan import Choice
from slimgrad.planning.solve import Programme
from slimgrad.verifying.gradient import captured_gradients, relative_error, same_bits
from slimgrad.verifying.verify import verify

pytestmark = [
    pytest.mark.skipif(compiled_code.cpp_compiler() is None, reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # torch.compile looks at every input
]
PATHS = ["body.0", "body.1", "body.2"]
COST = CompiledCost(40, 60, 20, 0.1, 0.2, 100, 0.2, 0.4, 30.0, 3, True, False)
RECORD = Record(100, 100, 10, 10, 0.2, 0.4, compiled=COST)


class _Block(nn.Module):
    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        y = self.up(self.norm(x_NTD))
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return x_NTD + self.drop(self.down(y))


class _Breaking(_Block):
    def forward(self, x_NTD: Tensor) -> Tensor:
        out = super().forward(x_NTD)
        return out * 2 if float(out.detach().sum()) > 1e9 else out


class _Model(nn.Module):
    def __init__(self, block: Any = _Block, **fields: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.body = nn.ModuleList([block(**fields) for _ in range(3)])

    def forward(self, tokens_NT: Tensor) -> Tensor:
        x = self.embed(tokens_NT)
        for block in self.body:
            x = block(x)
        return x @ self.embed.weight.T


def loss_fn(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens_NT[:, :-1]).flatten(0, 1), tokens_NT[:, 1:].flatten())


def make(block: Any = _Block, **fields: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _Model(block, **fields), torch.randint(64, (4, 65))


@functools.cache
def measured(block: Any = _Block, **fields: Any) -> tuple[Profile, list[str], int]:
    """The profile with compiled blocks, what measuring left changed, and how many graphs were compiled."""
    from torch._dynamo.utils import counters

    model, batch = make(block, **fields)
    optimizer = adamw(model)
    loss_fn(model, batch).backward()
    before, graphs = State.of(model, optimizer), counters["stats"]["unique_graphs"]
    marks = left_on(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "compiled_variants", lambda *_: Variants({}, 0.0, {}, 0.0))
        profile = slimgrad.measure(
            model, optimizer, loss_fn, batch, limit_s=0.0, allow_compile=True
        )
    made = counters["stats"]["unique_graphs"] - graphs
    differences = State.of(model, optimizer).differences(before)
    return profile, differences + ["marks"] * (left_on(model) != marks), made


def test_equal_blocks_are_compiled_once_and_nothing_is_changed() -> None:
    profile, differences, graphs = measured()
    assert list(profile.compiled) == PATHS
    assert profile.refusals.get("compiled") is None
    assert graphs == 1
    assert differences == []
    cost = profile.compiled[PATHS[0]]
    assert cost.num_sharing == 3
    assert cost.compile_s > 0
    assert 0 < cost.saved_bytes < 0.7 * cost.plain_saved_bytes  # what tanh's neighbours keep


@pytest.mark.parametrize("method", [None, Compiled(), Compiled(recompute=True)], ids=str)
def test_replay_ledger_and_profiler_find_the_same_peak(method: Compiled | None) -> None:
    profile, _, _ = measured()
    chosen = dict.fromkeys(PATHS, method) if method else {}
    predicted = predicted_peak(programme_of(profile, scheme_of(profile), chosen))
    model, batch = make()
    optimizer = adamw(model)
    plan = hand_made(model, optimizer, method, PATHS) if method else plan_of(model, optimizer, [])
    with slimgrad.apply(plan, model, optimizer, loss_fn) as step:
        counted = measured_peak(step, batch)
        held = sum(t.nbytes for t in (*model.parameters(), batch))
        held += sum(t.nbytes for s in optimizer.state.values() for t in s.values())
        step(batch)
        allocated = held + allocated_peak(lambda: step(batch))
    assert counted == pytest.approx(allocated, rel=0.01)
    assert predicted == pytest.approx(allocated, rel=0.03)
    assert predicted >= counted - 1024


def test_replay_with_updates_during_backward() -> None:
    profile, _, _ = measured()
    scheme = scheme_of(profile, UpdateInBackward())
    assert not isinstance(scheme, Refusal)
    programme = programme_of(profile, scheme, dict.fromkeys(PATHS, Compiled()))
    options = [
        replace(o, record=replace(o.record, gradients_stay=False)) for o in programme.menu.options
    ]
    predicted = predicted_peak(Programme(scheme, Menu(programme.layout, options)))
    model, batch = make()
    optimizer = adamw(model)
    choices = [Choice("", "update_in_backward", {})]
    choices += [Choice(p, "compiled", {"recompute": False}) for p in PATHS]
    with slimgrad.apply(plan_of(model, optimizer, choices), model, optimizer, loss_fn) as step:
        counted = measured_peak(step, batch)
    assert 0.99 * counted <= predicted <= 1.05 * counted


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_within_the_exact_rung(recompute: bool) -> None:
    profile, _, _ = measured()
    model, batch = make()
    optimizer = adamw(model)
    plan = hand_made(model, optimizer, Compiled(recompute), PATHS)
    plan = replace(
        plan,
        plain_peak_bytes=profile.peak_bytes,
        peak_bytes=profile.peak_bytes,
        budget_bytes=profile.peak_bytes,
    )
    before, keys = left_on(model), list(model.state_dict())
    with slimgrad.apply(plan, model, optimizer, loss_fn) as step:
        report = verify(step, batch, time_pairs=0)
        blocks = verify(step, batch, time_pairs=0, available_bytes=1)
        assert report.gradient_error
        assert report.passed, str(report)
        assert blocks.mode == "blocks"
        assert blocks.passed, str(blocks)
        found: dict[str, Tensor] = {}
        other = torch.randint(64, (3, 40))  # compiled again, for another shape
        with captured_gradients(model, found):
            reference = plain_copy_gradients(model, other)
            step(other)
        assert relative_error(found, reference) < 1e-5
    assert left_on(model) == before
    assert list(model.state_dict()) == keys
    fresh, _ = make()
    fresh.load_state_dict(model.state_dict())
    assert same_bits(plain_gradients(model, loss_fn, batch), plain_gradients(fresh, loss_fn, batch))


def plain_copy_gradients(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Plain training's gradients on a model with the same parameters."""
    copy, _ = make()
    copy.load_state_dict(model.state_dict())
    return plain_gradients(copy, loss_fn, batch)


def test_with_dropout_blocks_are_measured_and_their_own_gradients_right() -> None:
    profile, _, _ = measured(dropout=0.3)
    assert list(profile.compiled) == PATHS
    model, batch = make(dropout=0.3)
    module, x = model.get_submodule("body.0"), torch.randn(2, 8, 32)
    fast, inputs = compiled_code.compiled(module), Inputs.now((x,), {}, "cpu")
    torch.manual_seed(0)
    first = fast(x)
    torch.manual_seed(0)
    assert torch.equal(fast(x), first)
    assert not torch.equal(fast(x), first)
    compiled_cost._check_values(module, fast, inputs)
    optimizer = adamw(model)
    plan = hand_made(model, optimizer, Compiled(recompute=True), PATHS)
    with slimgrad.apply(plan, model, optimizer, loss_fn) as step:
        found: list[dict[str, Tensor]] = [{}, {}]
        for method, into in zip((False, True), found, strict=True):
            torch.manual_seed(5)
            run = fast_step(step, method)
            with captured_gradients(model, into):
                run(batch)
    assert same_bits(*found)  # the second run of the forward draws what the first did


def fast_step(step: Any, recompute: bool) -> Any:
    """Forward and backward alone, the blocks compiled with or without recomputation."""
    model = step.host.model

    def run(batch: Tensor) -> None:
        kept = {p: model.get_submodule(p).forward for p in PATHS}
        try:
            if not recompute:
                for path in PATHS:
                    module = model.get_submodule(path)
                    del module.forward
                    module.forward = compiled_code.compiled(module)
            loss_fn(model, batch).backward()
        finally:
            for path, forward in kept.items():
                model.get_submodule(path).forward = forward
            model.zero_grad(set_to_none=True)

    return run


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_wrong_gradients_are_noticed(dropout: float) -> None:
    model, _ = make(dropout=dropout)
    module = model.get_submodule("body.0")
    inputs = Inputs.now((torch.randn(2, 8, 32),), {}, "cpu")

    def scaled(x: Tensor) -> Tensor:
        out = module.forward(x)
        return 0.8 * out + 0.2 * out.detach()

    compiled_cost._check_values(module, module.forward, inputs)
    with pytest.raises(UnsupportedError, match="gradients are off"):
        compiled_cost._check_values(module, scaled, inputs)


def test_a_block_that_cannot_be_compiled_is_refused() -> None:
    profile, differences, _ = measured(_Breaking)
    assert not profile.compiled
    assert differences == []
    assert "body.0" in profile.refusals["compiled"]
    plan = slimgrad.plan(profile, "100%")
    assert "compiled" in plan.refusals
    assert all(c.method != "compiled" for c in plan.choices)


def test_a_foreign_mode_runs_the_plain_block_and_spoils_nothing() -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    module, x = _Block(), torch.randn(2, 8, 32)
    fast, plain = compiled_code.compiled(module), module.forward
    with Watching():
        assert torch.equal(fast(x), plain(x))
    assert torch.ops.aten.tanh.default in seen
    with slimgrad.Ledger(module, inputs=x) as first:  # compiled within
        out = fast(x)
        out.sum().backward()
    module.zero_grad(set_to_none=True)
    del out
    with slimgrad.Ledger(module, inputs=x) as second:
        out = fast(x)
        assert type(out.grad_fn).__name__ == "CompiledFunctionBackward"
        out.sum().backward()
    assert second.peak_bytes == pytest.approx(first.peak_bytes, rel=0.01)


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    model, batch = make()
    optimizer = adamw(model)
    profile = slimgrad.measure(model, optimizer, loss_fn, batch, limit_s=0.0, allow_compile=True)
    assert not profile.compiled
    assert "C++ compiler" in profile.refusals["compiled"]
    with pytest.raises(UnsupportedError, match="allow_compile=False"):
        slimgrad.apply(hand_made(model, optimizer, Compiled(), PATHS), model, optimizer, loss_fn)
    assert all("forward" not in vars(m) for m in model.modules())


def test_it_is_used_only_where_allowed() -> None:
    profile, _, _ = measured()
    slow = {p: replace(c, compile_s=0.0, forward_s=0.0) for p, c in profile.compiled.items()}
    eager = replace(profile, compiled=slow)
    for trace in eager.variants.values():
        trace.op_seconds[:] = 1e-3
    chosen = [c.method for c in slimgrad.plan(eager, "100%").choices]
    assert chosen.count("compiled") == 3
    for arguments in ({"allow_compile": False}, {"exactness": "bitwise"}):
        plan = slimgrad.plan(eager, "100%", **arguments)
        assert all(c.method != "compiled" for c in plan.choices)
        assert plan.refusals["compiled"]
    late = {p: replace(c, compile_s=60.0) for p, c in slow.items()}
    long = replace(profile, compiled=late)
    assert any(c.method == "compiled" for c in slimgrad.plan(long, "100%", steps=10**6).choices)
    assert all(c.method != "compiled" for c in slimgrad.plan(long, "100%", steps=10).choices)
    with pytest.raises(PlanError, match="steps"):
        slimgrad.plan(profile, "100%", steps=0)


def test_nothing_is_compiled_unless_it_may_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(compiling, "compiled_cost", never)
    monkeypatch.setattr(compiled_variants, "compiled_step", never)
    model, batch = make()
    for allow, reason in ((None, "steps"), (False, "not allowed")):
        profile = slimgrad.measure(model, None, loss_fn, batch, limit_s=0.0, allow_compile=allow)
        assert reason in profile.refusals["compiled"]
    profile = slimgrad.measure(model, None, loss_fn, batch, limit_s=0.0, allow_compile=True)
    assert "AssertionError" in profile.refusals["compiled"]
    assert "AssertionError" in profile.refusals["compiled_model"]


def test_a_profile_keeps_what_was_measured() -> None:
    profile, _, _ = measured()
    data = profile_to_json(profile)
    assert profile_from_json(data).compiled == profile.compiled
    with pytest.raises(ValueError, match="measure again"):
        profile_from_json(data | {"format": 2})


def test_an_offer_scales_the_plain_seconds_and_shares_the_compiling() -> None:
    offer = Compiled().offer(Block("a", Scope.BLOCK, RECORD))
    assert not isinstance(offer, Refusal)
    made = offer.record
    assert isinstance(made, Record)
    assert (made.saved_bytes, made.held_bytes) == (40, 40)
    assert made.forward_s == pytest.approx(0.1)
    assert made.backward_s == pytest.approx(0.2)
    assert made.seconds == pytest.approx(0.3 + 10.0 / 1000)
    again = Compiled(recompute=True).offer(Block("a", Scope.BLOCK, RECORD))
    assert not isinstance(again, Refusal)
    assert isinstance(again.record, Record)
    assert again.record.held_bytes == 0
    assert again.record.seconds == pytest.approx(made.seconds + 0.1)
    alike = replace(COST, saved_bytes=100, forward_s=0.2, backward_s=0.4)
    for record in (replace(RECORD, compiled=None), replace(RECORD, compiled=alike)):
        assert isinstance(Compiled().offer(Block("a", Scope.BLOCK, record)), Refusal)
