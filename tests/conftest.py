"""The hostile test environment: NaN-filled ``torch.empty``, few threads, no hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture(autouse=True)
def _hostile_environment():
    """Uninitialised memory reads as NaN, and every test starts from the same random state."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def measured():
    """``measured(name)``: what ``measure`` found on a sample model, run once, and what it left changed."""
    from tests.plain_training import State, plain_step
    from tests.sample_models import SAMPLES, adamw

    from slimgrad import measure

    found = {}

    def of(name):
        if name not in found:
            model, loss_fn, batch = SAMPLES[name].make()
            optimizer = adamw(model)
            plain_step(model, optimizer, loss_fn, batch)  # there is state that could be changed
            loss_fn(model, batch).backward()  # and there are gradients
            before = State.of(model, optimizer)
            profile = measure(model, optimizer, loss_fn, batch, limit_s=0.0)
            found[name] = profile, State.of(model, optimizer).differences(before)
        return found[name]

    return of


@pytest.fixture(scope="session")
def profile_of(measured):
    """``profile_of(name)``: the profile of a sample model."""
    return lambda name: measured(name)[0]
