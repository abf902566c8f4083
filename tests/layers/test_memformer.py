"""The Memformer: its slots follow the formula, and they carry what a segment alone cannot know."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgrad.errors import BatchError, MethodError
from slimgrad.layers.memformer import Memformer
from slimgrad.methods.activations.memory_replay import memory_replay


def layer(**options):
    torch.manual_seed(0)
    return Memformer(16, num_layers=2, num_heads=4, num_slots=5, max_length=6, **options).double()


def test_the_first_memory_is_the_normed_bias():
    memory = layer().initial_memory(3)
    assert memory.shape == (3, 5, 16)
    torch.testing.assert_close(memory.norm(dim=-1), torch.ones(3, 5).double())
    assert torch.equal(memory[0], memory[2])


def test_slots_are_written_by_the_formula_one_at_a_time():
    writer = layer(temperature=0.5, keep=1.5).writer
    x, memory = torch.randn(2, 6, 16).double(), F.normalize(torch.randn(2, 5, 16).double(), dim=-1)
    found = writer(x, memory)
    for b in range(2):
        for i in range(5):
            slot = F.layer_norm(memory[b, i], (16,))
            keys = torch.cat([writer.key(slot)[None], writer.key(x[b])])
            logits = keys @ writer.query(slot) / (16**0.5 * 0.5)
            logits[0] += 1.5
            values = torch.cat([memory[b, i][None], F.normalize(writer.value(x[b]), dim=-1)])
            written = logits.softmax(0) @ values + writer.bias[i]
            torch.testing.assert_close(found[b, i], written / written.norm())


def test_every_layer_reads_the_memory_and_every_weight_is_used():
    module, x = layer(), torch.randn(2, 6, 16).double()
    memory = module.initial_memory(2)
    first, after = module(x, memory)
    second, last = module(x, after)
    assert not torch.allclose(first, second)
    (second.sum() + last.square().sum(-1).sin().sum() + last[..., 0].sum()).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_causal_layer_does_not_look_ahead():
    x = torch.randn(1, 6, 16).double()
    changed = x.clone()
    changed[:, 4:] = torch.randn(1, 2, 16).double()
    for is_causal in (True, False):
        module = layer(is_causal=is_causal)
        memory = module.initial_memory(1)
        same = torch.allclose(module(x, memory)[0][:, :4], module(changed, memory)[0][:, :4])
        assert same == is_causal


def test_sizes_that_do_not_go_together_are_refused():
    with pytest.raises(MethodError, match="dim=10"):
        Memformer(10, num_heads=4)
    with pytest.raises(MethodError, match="num_slots=0"):
        Memformer(8, num_slots=0)
    with pytest.raises(BatchError, match="max_length=6"):
        layer()(torch.zeros(1, 7, 16).double(), layer().initial_memory(1))


# -- recall -------------------------------------------------------------------------------------------

SYMBOLS, LENGTH, SEGMENTS = 8, 2, 16


class Copier(nn.Module):
    """Answers in the last segment what was in the first; ``forgets`` makes it see the segment alone."""

    def __init__(self, forgets):
        super().__init__()
        self.forgets = forgets
        self.embedding = nn.Embedding(SYMBOLS + 2, 32)
        self.body = Memformer(32, num_layers=1, num_heads=2, num_slots=8, max_length=LENGTH)
        self.head = nn.Linear(32, SYMBOLS)

    def forward(self, tokens, memory):
        if self.forgets:
            memory = self.body.initial_memory(len(tokens))
        hidden, memory = self.body(self.embedding(tokens), memory)
        return self.head(hidden), memory


def copy_task(num_segments, batch_size):
    symbols = torch.randint(SYMBOLS, (batch_size, LENGTH))
    blank, question = torch.full_like(symbols, SYMBOLS), torch.full_like(symbols, SYMBOLS + 1)
    return [symbols, *[blank] * (num_segments - 2), question], symbols


def trained(forgets, steps=240):
    """A model trained by memory replay on sequences that grow to ``SEGMENTS``."""
    torch.manual_seed(0)
    model = Copier(forgets)
    optimizer = torch.optim.Adam(model.parameters(), 8e-3)
    for step in range(steps):
        num_segments = (2, 4, 8, SEGMENTS)[4 * step // steps]
        segments, symbols = copy_task(num_segments, 64)

        def loss_fn(output, t, symbols=symbols, last=num_segments - 1):
            return F.cross_entropy(output.flatten(0, 1), symbols.flatten()) if t == last else None

        optimizer.zero_grad()
        memory_replay(model, segments, model.body.initial_memory(64), loss_fn)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def accuracy(model):
    torch.manual_seed(1)
    segments, symbols = copy_task(SEGMENTS, 256)
    memory = model.body.initial_memory(256)
    with torch.no_grad():
        for segment in segments:
            output, memory = model(segment, memory)
    return float((output.argmax(-1) == symbols).double().mean())


@pytest.mark.slow
def test_recall_over_16_segments_beats_a_model_that_sees_the_segment_alone():
    with_memory, without = trained(forgets=False), trained(forgets=True)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (with_memory, without)]
    found = accuracy(with_memory), accuracy(without)
    print(f"recall {found[0]:.3f} with memory, {found[1]:.3f} without, chance {1 / SYMBOLS:.3f}")
    assert sizes[0] == sizes[1]
    assert found[1] < 2 / SYMBOLS  # it can only guess
    assert found[0] > 3 / SYMBOLS
