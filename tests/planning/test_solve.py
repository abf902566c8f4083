"""The solver against exhaustive search, on random chains of blocks."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgrad.measuring.optimizer import OptimizerLaw
from slimgrad.measuring.trace import Call, Trace
from slimgrad.method import Record, Restore
from slimgrad.methods.activations.recompute import Recompute
from slimgrad.planning.calls import border_bytes
from slimgrad.planning.menu import Menu
from slimgrad.planning.offers import Option, Scheme
from slimgrad.planning.settings import plain_record
from slimgrad.planning.simulate import Layout
from slimgrad.planning.solve import Programme
from slimgrad.types import Column

NO_OPTIMIZER = OptimizerLaw((), 0, 0.0, False, False, 0)
DRAWN = settings(max_examples=40, deadline=None, derandomize=True)
_POSITION = {column: position for position, column in enumerate(Column)}


@dataclass(frozen=True)
class ChainBlock:
    """What one block saves inside, passes on and needs for a moment, in bytes; its forward in seconds."""

    saved: int
    output: int
    transient: int
    seconds: float


BLOCKS = st.lists(
    st.builds(
        ChainBlock,
        saved=st.integers(1, 2000),
        output=st.integers(0, 500),
        transient=st.integers(0, 2000),
        seconds=st.floats(0.01, 10.0),
    ),
    min_size=1,
    max_size=6,
)


def chain(blocks):
    """The trace of a chain: two ticks a block forward (what it saves, its output), two backward."""
    num = len(blocks)
    storages, calls = [], []  # (nbytes, birth, death, column)

    def add(nbytes, birth, death, column):
        storages.append((nbytes, birth, death, _POSITION[column]))
        return len(storages) - 1

    end = 4 * num + 1
    border = add(100, 0, end, Column.INPUTS)
    for i, block in enumerate(blocks):
        forward, backward = 2 * i, 2 * num + 2 * (num - 1 - i)
        add(block.saved, forward + 1, backward + 2, Column.ACTIVATIONS)
        add(block.transient, forward + 1, forward + 2, Column.TEMPORARIES)
        add(block.transient, backward + 1, backward + 2, Column.TEMPORARIES)
        # an output is dead once the next block has taken it, unless that is recomputed
        output = add(block.output, forward + 2, forward + 4, Column.ACTIVATIONS)
        calls.append(Call(str(i), forward, forward + 2, (border,), (output,)))
        border = output
    columns = np.array(storages, dtype=np.int64).T
    ops = np.repeat(np.concatenate([np.arange(num), np.arange(num)[::-1]]), 2)
    return Trace(
        *columns,
        num_ticks=4 * num,
        op=np.zeros(4 * num, dtype=np.int64),
        op_call=ops,
        op_backward=np.arange(4 * num) >= 2 * num,
        calls=calls,
        gradients={},
        module=np.zeros(len(storages), dtype=np.int64),
        module_paths=[""],
        op_seconds=np.array([blocks[i].seconds / 2 for i in ops]),
    )


def programme_of(blocks, *, half=False, stretches=2):
    """The programme that may recompute each block, or (``half``) also keep half of what it saves at a price.

    Few ``stretches``: most slots that bind are found only by replaying.
    """
    trace = chain(blocks)
    layout = Layout(trace, NO_OPTIMIZER, 0)
    options = []
    for i, block in enumerate(blocks):
        given_, made = border_bytes(trace, trace.calls[i])
        record = Record(block.saved, block.saved, given_, made, block.seconds, block.seconds)
        lean = Record(
            block.saved, 0, given_, made, block.seconds, block.seconds,
            restore=Restore.REPLAY, restore_s=block.seconds, holds_inputs=True,
        )  # fmt: skip
        options.append(Option(str(i), (Recompute(),), lean, "", lean.seconds - record.seconds))
        if half:
            halved = Record(
                block.saved, block.saved // 2, given_, made, block.seconds, block.seconds,
                restore=Restore.COPY, restore_s=0.3 * block.seconds,
            )  # fmt: skip
            options.append(Option(str(i), (Recompute(),), halved, "", 0.3 * block.seconds))
    scheme = Scheme((), (), plain_record(NO_OPTIMIZER), trace)
    programme = Programme(scheme, Menu(layout, options))
    programme.edges = np.linspace(0, layout.num_slots, stretches + 1).astype(int)
    return programme


def every_choice(programme):
    """(peak, added seconds) of every choice of at most one option a block."""
    paths = sorted({o.path for o in programme.menu.options})
    by_path = [
        [None, *(i for i, o in enumerate(programme.menu.options) if o.path == p)] for p in paths
    ]
    found = []
    for picked in itertools.product(*by_path):
        chosen = np.zeros(len(programme.menu.options))
        chosen[[i for i in picked if i is not None]] = 1
        found.append((int(programme.replay(chosen)[0].max()), float(chosen @ programme.added_s)))
    return found


def added_seconds(programme, solution):
    return solution.seconds - programme.scheme.seconds


@DRAWN
@given(
    blocks=BLOCKS,
    half=st.booleans(),
    share=st.floats(0.0, 1.1),
    stretches=st.sampled_from([1, 3, 48]),
)
def test_least_seconds_equals_exhaustive_search(blocks, half, share, stretches):
    programme = programme_of(blocks[:4] if half else blocks, half=half, stretches=stretches)
    choices = every_choice(programme)
    lowest, highest = min(p for p, _ in choices), choices[0][0]
    budget = int(lowest * 0.9 + share * (highest - lowest * 0.9))
    fitting = [s for p, s in choices if p <= budget]
    solution = programme.least_seconds(budget)
    if not fitting:
        assert solution is None
        return
    assert solution is not None
    assert solution.peak_bytes <= budget
    # the solver stops within a thousandth of the best
    assert added_seconds(programme, solution) == pytest.approx(min(fitting), rel=1.1e-3, abs=1e-6)


@settings(DRAWN, max_examples=150)
@given(blocks=BLOCKS, short=st.floats(0.0, 0.1))
def test_what_cannot_fit_has_no_solution(blocks, short):
    programme = programme_of(blocks, stretches=1)
    lowest = min(p for p, _ in every_choice(programme))
    assert programme.least_seconds(int(lowest * (1 - short)) - 1) is None
    assert programme.least_seconds(lowest) is not None


@DRAWN
@given(blocks=BLOCKS, half=st.booleans())
def test_least_peak_equals_exhaustive_search(blocks, half):
    programme = programme_of(blocks[:4] if half else blocks, half=half)
    choices = every_choice(programme)
    lowest = min(p for p, _ in choices)
    solution = programme.least_peak()
    assert solution.peak_bytes <= lowest * 1.001 + 1
    fastest = min(s for p, s in choices if p <= solution.peak_bytes)
    assert added_seconds(programme, solution) == pytest.approx(fastest, rel=1.1e-3, abs=1e-6)


@DRAWN
@given(blocks=BLOCKS)
def test_more_budget_never_costs_more_time(blocks):
    programme = programme_of(blocks)
    peaks = sorted({p for p, _ in every_choice(programme)})
    seconds = []
    for budget in peaks:
        solution = programme.least_seconds(budget)
        assert solution is not None
        seconds.append(added_seconds(programme, solution))
    for less, more in itertools.pairwise(seconds):
        assert more <= less * (1 + 1.1e-3) + 1e-6
    assert seconds[-1] == pytest.approx(0.0, abs=1e-6) or len(peaks) == 1


@DRAWN
@given(blocks=BLOCKS)
def test_a_solution_is_its_own_replay(blocks):
    programme = programme_of(blocks)
    solution = programme.least_peak()
    assert programme.layout.timeline(solution.changes).peak_bytes == solution.peak_bytes
    assert len({o.path for o in solution.options}) == len(solution.options)


def test_a_chain_by_hand():
    """Two blocks: the peak at the turn, with nothing, one or both of them recomputed."""
    programme = programme_of([ChainBlock(1000, 10, 0, 1.0), ChainBlock(300, 10, 0, 5.0)])
    by_choice = {
        (): 100 + 1000 + 300 + 10,  # batch, both insides, the output
        (0,): 100 + 1000 + 10,  # when the first block is back
        (1,): 100 + 1000 + 300 + 10,  # when the second is back; its input is held
        (0, 1): 100 + 1000 + 10,
    }
    scalars = 1024
    for picked, peak in by_choice.items():
        chosen = np.zeros(2)
        chosen[list(picked)] = 1
        live, _ = programme.replay(chosen)
        assert int(live.max()) - scalars == pytest.approx(peak, abs=20), picked
    solution = programme.least_seconds(scalars + 1150)
    assert [o.path for o in solution.options] == ["0"]
    assert added_seconds(programme, solution) == pytest.approx(1.0)
