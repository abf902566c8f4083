"""A run that was stopped and resumed in new objects has the bits of one that went straight through."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slimgrad.errors import CheckpointError, FingerprintError, UnsupportedError
from slimgrad.training.checkpoint import load_checkpoint, save_checkpoint
from slimgrad.training.resume import capture, random_states, restore
from slimgrad.training.tensor_files import Chunked, StoredTensor
from slimgrad.training.text import TokenBlocks


class TinyLanguageModel(nn.Module):
    """Tied embedding, dropout, batch-norm's buffers, and draws from Python's and NumPy's generators."""

    def __init__(self, width: int = 8, vocab: int = 17) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, input_ids, labels):
        self.calls += 1
        h = self.drop(self.norm(self.embed(input_ids).flatten(0, 1)))
        h = h * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        return nn.functional.cross_entropy(self.head(h), labels.flatten())


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2), foreach=False),
}
SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
}


class Run:
    """Everything that a training loop has."""

    def __init__(self, optimizer="adamw", scheduler="cosine", seed=0):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = TinyLanguageModel()
        norm = [p for name, p in self.model.named_parameters() if "norm" in name]
        rest = [p for name, p in self.model.named_parameters() if "norm" not in name]
        groups = [{"params": rest}, {"params": norm, "weight_decay": 0.0}]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.data = TokenBlocks(torch.arange(64) % 17, seq_len=4, batch_size=4, seed=5)
        self.losses: list[float] = []

    def train(self, num_steps):
        for _ in range(num_steps):
            loss = self.model(**next(self.data))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.losses.append(loss.item())

    def save(self, folder, **options):
        state = capture(
            self.model,
            self.optimizer,
            step=len(self.losses),
            scheduler=self.scheduler,
            data=self.data.state(),
            **options,
        )
        return save_checkpoint(folder, state)

    def resume(self, folder, **options):
        checkpoint = load_checkpoint(folder)
        restore(checkpoint, self.model, self.optimizer, scheduler=self.scheduler, **options)
        self.data.restore(checkpoint.values["data"])

    def bits(self):
        """All that must agree, in a form that ``==`` compares bit for bit."""

        def plain(value):
            if isinstance(value, torch.Tensor):
                return (str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes())
            if isinstance(value, np.ndarray):
                return (str(value.dtype), value.tobytes())
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)

        return plain(
            {
                "parameters": dict(self.model.named_parameters()),
                "buffers": dict(self.model.named_buffers()),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "rng": random_states(),
                "data": self.data.state(),
                "losses": self.losses[-3:],
            }
        )


def run_pair(tmp_path, optimizer, scheduler):
    """A straight run of 6 steps, and one of 3 steps continued for 3 in other objects."""
    straight = Run(optimizer, scheduler)
    straight.train(3)
    straight.save(tmp_path)
    straight.train(3)
    expected = straight.bits()
    resumed = Run(optimizer, scheduler, seed=123)
    resumed.resume(tmp_path)
    resumed.train(3)
    return expected, resumed.bits()


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        *((name, "cosine") for name in OPTIMIZERS),
        ("adamw", "steps"),
        ("adamw", "one_cycle"),
        ("sgd", "one_cycle"),
    ],
)
def test_resume_is_bit_identical(tmp_path, optimizer, scheduler):
    expected, found = run_pair(tmp_path, optimizer, scheduler)
    for part in expected:
        assert found[part] == expected[part], part


@pytest.mark.parametrize("part", ["torch", "python", "numpy"])
def test_each_generator_matters(tmp_path, part, monkeypatch):
    """The comparison above notices when one generator is not restored."""
    from slimgrad.training import resume

    original = resume.set_random_states
    monkeypatch.setattr(
        resume, "set_random_states", lambda s: original({**s, part: random_states()[part]})
    )
    expected, found = run_pair(tmp_path, "adamw", "cosine")
    assert found["losses"] != expected["losses"]


def test_resume_in_a_new_process(tmp_path):
    straight = Run()
    straight.train(3)
    straight.save(tmp_path)
    straight.train(3)
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
from test_resume import Run
run = Run(seed=42)
run.resume(sys.argv[2])
run.train(3)
import hashlib
print(hashlib.sha256(repr(run.bits()).encode()).hexdigest())
"""
    folder = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", script, folder, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = hashlib.sha256(repr(straight.bits()).encode()).hexdigest()
    assert result.stdout.strip() == expected


def test_a_tied_parameter_is_stored_once_and_stays_tied(tmp_path):
    run = Run()
    run.train(1)
    names = list(load_checkpoint(run.save(tmp_path)).model)
    assert "embed.weight" in names
    assert "head.weight" not in names
    other = Run(seed=1)
    address = other.model.embed.weight.data_ptr()
    other.resume(tmp_path)
    assert other.model.head.weight is other.model.embed.weight
    assert other.model.embed.weight.data_ptr() == address
    assert torch.equal(other.model.embed.weight, run.model.embed.weight)


def test_state_kept_elsewhere_goes_through_the_callers_hands(tmp_path):
    """Optimizer state in files: handed over and taken back in parts of one row."""
    run = Run()
    run.train(2)

    def in_rows(parameter):
        def one(value):
            if not isinstance(value, torch.Tensor) or value.dim() < 2:
                return value
            return Chunked(value.dtype, tuple(value.shape), lambda: iter(value))

        return {key: one(value) for key, value in run.optimizer.state[parameter].items()}

    run.save(tmp_path, state_of=in_rows)
    taken: dict[int, dict] = {}

    def put(parameter, entries):
        taken[id(parameter)] = {
            key: value.read() if isinstance(value, StoredTensor) else value
            for key, value in entries.items()
        }

    other = Run(seed=1)
    other.resume(tmp_path, put_state=put)
    assert not other.optimizer.state
    pairs = list(zip(run.model.parameters(), other.model.parameters(), strict=True))
    assert len(taken) == len(pairs)
    for mine, theirs in pairs:
        for key, value in run.optimizer.state[mine].items():
            assert torch.equal(taken[id(theirs)][key], value)


def test_memory_format_of_state_follows_the_parameter(tmp_path):
    def make():
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = make()
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, capture(model, optimizer, step=1))
    other, other_optimizer = make()
    restore(load_checkpoint(tmp_path), other, other_optimizer)
    assert torch.equal(other.weight, model.weight)
    a, b = optimizer.state[model.weight]["exp_avg"], other_optimizer.state[other.weight]["exp_avg"]
    assert torch.equal(a, b)
    assert a.stride() == b.stride()


def other_model(run):
    run.model.extra = nn.Linear(2, 2)


def other_shape(run):
    run.model.norm = nn.BatchNorm1d(9)


def other_dtype(run):
    run.model.double()


def other_groups(run):
    run.optimizer.param_groups.reverse()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_model, "lacks 'extra.bias', 'extra.weight'"),
        (other_shape, "'norm.weight' .* expected torch.float32 of shape"),
        (other_dtype, "expected torch.float64"),
        (other_groups, "same names in the same order"),
    ],
)
def test_a_checkpoint_of_another_run_changes_nothing(tmp_path, change, words):
    run = Run()
    run.train(2)
    run.save(tmp_path)
    other = Run(seed=1)
    change(other)
    before = other.bits()
    with pytest.raises(CheckpointError, match=words):
        other.resume(tmp_path)
    assert other.bits() == before


def test_a_fingerprint_of_another_run_changes_nothing(tmp_path):
    run = Run()
    run.train(1)
    run.save(tmp_path, fingerprint="a")
    other = Run(seed=1)
    before = other.bits()
    with pytest.raises(FingerprintError, match="made for 'a', expected 'b'"):
        other.resume(tmp_path, fingerprint="b")
    assert other.bits() == before
    other.resume(tmp_path, fingerprint="a")


def test_what_was_not_saved_is_not_restored(tmp_path):
    run = Run()
    save_checkpoint(tmp_path, capture(run.model, step=0))
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        restore(load_checkpoint(tmp_path), run.model, run.optimizer)
    with pytest.raises(CheckpointError, match="holds no scheduler"):
        restore(load_checkpoint(tmp_path), run.model, scheduler=run.scheduler)
    restore(load_checkpoint(tmp_path), run.model)


def test_what_needs_pickling_is_refused():
    class Odd(nn.Linear):
        def get_extra_state(self):
            return object()

    with pytest.raises(UnsupportedError, match="extra state"):
        capture(nn.Sequential(Odd(2, 2)), step=0)


def test_an_optimizer_over_foreign_parameters_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(CheckpointError, match="group 0 of the optimizer holds a parameter"):
        capture(nn.Linear(2, 2), optimizer, step=0)
