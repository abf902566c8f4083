"""Backward in two stages: autograd's bits, the bytes held in between, and less idle time in every pipeline schedule."""

import copy
import itertools
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, ModelError
from slimgrad.layers.pipeline_schedule import SCHEDULES, orders, simulate
from slimgrad.layers.two_stage_backward import TwoStageBackward, peaks


def small_lm(tied=False):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, use_cache=False, tie_word_embeddings=tied,
    )  # fmt: skip
    words = torch.randint(90, (2, 16))
    return transformers.LlamaForCausalLM(config), {"input_ids": words, "labels": words}


def lm_loss(model, batch):
    return model(**batch).loss


def convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
        nn.Flatten(), nn.Linear(8 * 5 * 5, 4),
    )  # fmt: skip
    return model, (torch.randn(6, 3, 12, 12), torch.randint(4, (6,)))


def class_loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def sequences():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 20, bias=False), nn.GELU(), nn.Conv1d(5, 7, 3), nn.Linear(18, 4)
    )
    return model, torch.randn(3, 5, 12)


def square_loss(model, batch):
    return model(batch).square().mean()


CASES = {
    "lm": (small_lm, lm_loss),
    "tied lm": (lambda: small_lm(tied=True), lm_loss),
    "convolutions": (convolutions, class_loss),
    "sequences": (sequences, square_loss),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_bit_equal_over_two_micro_batches(case):
    make, loss_fn = CASES[case]
    model, batch = make()
    twin = copy.deepcopy(model)
    for _ in range(2):
        loss_fn(twin, batch).backward()
    stages = TwoStageBackward(model)
    for _ in range(2):
        loss_fn(model, batch).backward()
    assert all(layer.weight.grad is None for layer in stages.layers)
    assert stages.num_pending == 2 * len(stages.layers)
    assert stages.flush(1) == 1
    assert stages.flush() == 2 * len(stages.layers) - 1
    assert stages.num_pending == stages.held_bytes == 0
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    stages.undo()
    model.zero_grad()
    loss_fn(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all("forward" not in vars(m) for m in model.modules())


def test_the_bytes_held_until_stage_two_are_what_the_ledger_counts():
    model, batch = small_lm()
    live, stages = [], None
    for two_stage in (False, True):
        model.zero_grad()
        stages = TwoStageBackward(model) if two_stage else None
        with Ledger(model, inputs=batch) as ledger:
            lm_loss(model, batch).backward()
            live.append(ledger.now_bytes)
            if stages is not None:
                held, layers = stages.held_bytes, stages.layers
                stages.flush()
                assert ledger.now_bytes == live[0]  # nothing is left of it
    owed = sum(layer.weight.nbytes for layer in layers)
    assert held > 0
    assert live[1] - live[0] == held - owed


def test_hooks_on_complete_gradients_run_once_and_updates_in_flush_are_the_optimizers():
    model, batch = small_lm()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        lm_loss(twin, batch).backward()
    optimizer.step()
    calls = []

    def update(parameter):
        calls.append(parameter)
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    stages = TwoStageBackward(model)
    for layer in stages.layers:
        layer.weight.register_post_accumulate_grad_hook(update)
    for _ in range(2):
        lm_loss(model, batch).backward()
    assert not calls
    stages.flush()
    assert len(calls) == len(stages.layers)
    for layer, (name, weight) in ((la, (n, w)) for la in stages.layers for n, w in model.named_parameters() if w is la.weight):  # fmt: skip
        torch.testing.assert_close(layer.weight, dict(twin.named_parameters())[name])
        assert weight.grad is None


def sum_loss(model, batch):
    return model(batch).sum()


def stack(*between):
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(64, 64), *(kind() for kind in between)) for _ in range(4)),
        nn.Linear(64, 256),
    )


def test_which_order_peaks_lower_depends_on_model_and_batch_and_is_measured():
    much_else = stack(nn.GELU, nn.Tanh, nn.Sigmoid, nn.GELU)  # stays beside what the queue holds
    few = peaks(much_else, sum_loss, torch.randn(8, 64), gradients_stay=False)
    nothing_else = stack(nn.Tanh)
    many = peaks(nothing_else, sum_loss, torch.randn(800, 64), gradients_stay=False)
    assert few["later"] < few["now"]
    assert many["now"] < many["later"]
    x = torch.randn(800, 64)
    stages = TwoStageBackward(nothing_else)
    with Ledger(nothing_else, inputs=x) as ledger:
        sum_loss(nothing_else, x).backward()
        stages.flush()
    stages.undo()
    nothing_else.zero_grad()
    predicted = peaks(nothing_else, sum_loss, x)["later"]
    assert abs(predicted - ledger.peak_bytes) <= 0.02 * ledger.peak_bytes


def test_what_is_refused_and_what_stays_plain():
    with pytest.raises(ModelError, match="weights of their own"):
        TwoStageBackward(nn.LayerNorm(4))
    model, x = sequences()
    model[0].weight.requires_grad_(False)
    stages = TwoStageBackward(model)
    square_loss(model, x).backward()
    assert stages.num_pending == 2
    with torch.no_grad():
        model(x)
    assert stages.num_pending == 2
    stages.flush()
    assert model[0].weight.grad is None
    with pytest.raises(ArgumentError, match="gpipe, 1f1b"):
        orders("zigzag", 2, 4)
    with pytest.raises(ArgumentError, match="same number"):
        simulate("gpipe", 2, [1.0], [1.0, 1.0], [1.0], two_stage=True)


# -- pipelines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_pipeline_is_idle_for_less_time(schedule, num_stages):
    seconds = [[1.0] * num_stages] * 3
    for num_micro_batches in (num_stages, 2 * num_stages):
        one, two = (
            simulate(schedule, num_micro_batches, *seconds, two_stage=flag)
            for flag in (False, True)
        )
        # (p - 1)(F + B) of p stages' time each, in both schedules, with one stage
        assert one.idle_s == pytest.approx(num_stages * (num_stages - 1) * 3)
        assert two.idle_s < one.idle_s
        assert two.seconds < one.seconds
        print(schedule, num_stages, num_micro_batches, one.idle_ratio, two.idle_ratio)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    num_micro_batches=st.integers(1, 9),
    seconds=st.lists(st.tuples(*[st.floats(0.1, 3.0)] * 3), min_size=1, max_size=5),
    two_stage=st.booleans(),
    transfer_s=st.floats(0, 0.5),
)
def test_every_task_runs_once_after_what_it_needs(
    schedule, num_micro_batches, seconds, two_stage, transfer_s
):
    timeline = simulate(
        schedule, num_micro_batches, *zip(*seconds, strict=True), two_stage=two_stage, transfer_s=transfer_s
    )  # fmt: skip
    kinds = "FIW" if two_stage else "FB"
    at = {(t.kind, t.stage, t.micro_batch): t for t in timeline.tasks}
    assert len(at) == len(timeline.tasks) == len(kinds) * num_micro_batches * len(seconds)
    for (kind, stage, index), task in at.items():
        before = {"F": ("F", stage - 1), "W": ("I", stage)}.get(kind, (kind, stage + 1))
        needed = at.get((*before, index))
        if needed is not None:
            gap = transfer_s if before[1] != stage else 0.0
            assert task.start_s >= needed.end_s + gap - 1e-9
    for stage in range(len(seconds)):
        mine = sorted((t for t in timeline.tasks if t.stage == stage), key=lambda t: t.start_s)
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in itertools.pairwise(mine))
    plain = simulate(
        schedule, num_micro_batches, *zip(*seconds, strict=True), two_stage=False, transfer_s=transfer_s
    )  # fmt: skip
    # a weight's gradient that has begun is not broken off: among unequal stages one may wait for it once a micro-batch
    waiting = 0.0 if len(set(seconds)) == 1 else num_micro_batches * sum(w for _, _, w in seconds)
    assert timeline.seconds <= plain.seconds + waiting + 1e-9


WORKER = """
import json, sys, time
import torch, torch.distributed as dist
from torch import nn
from slimgrad.layers.two_stage_backward import TwoStageBackward
torch.set_num_threads(1)
rank, place, two_stage, steps, micro, rows, width = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "2", 6, 4, 128, 384
dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
torch.manual_seed(0)
halves = [nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))) for _ in range(2)]
xs = torch.randn(micro, rows, width)
model = halves[rank]
stages = TwoStageBackward(model) if two_stage else None
seconds = []
for _ in range(steps):
    model.zero_grad()
    dist.barrier()
    start = time.perf_counter()
    outputs = []
    for x in xs:
        if rank == 1:
            x = torch.empty(rows, width)
            dist.recv(x, 0)
            x.requires_grad_()
        outputs.append((x, model(x)))
        if rank == 0:
            dist.send(outputs[-1][1].detach(), 1)
    for x, y in outputs:
        if rank == 1:
            y.square().mean().backward()
            dist.send(x.grad, 0)
        else:
            g = torch.empty(rows, width)
            dist.recv(g, 1)
            y.backward(g)
    if stages is not None:
        stages.flush()
    dist.barrier()
    seconds.append(time.perf_counter() - start)
whole = nn.Sequential(*halves)
found = [p.grad for p in model.parameters()]
if stages is not None:
    stages.undo()
whole.zero_grad()
for x in xs:
    whole(x).square().mean().backward()
equal = all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters()))
print(json.dumps({"rank": rank, "equal": equal, "median_s": sorted(seconds)[len(seconds) // 2]}))
dist.destroy_process_group()
"""


def two_processes(place, stages):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(place), str(stages)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=110)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
def test_two_processes_in_a_pipeline_have_the_gradients_of_one(tmp_path):
    found = {stages: two_processes(tmp_path / f"store{stages}", stages) for stages in (1, 2)}
    print(found)
    for told in (*found[1], *found[2]):
        assert told["equal"]
        assert told["median_s"] > 0
