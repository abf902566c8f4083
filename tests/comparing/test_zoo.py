"""The zoo's models train, are the same every time, and say truly which of their blocks follow one another."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from slimgrad.comparing import zoo
from slimgrad.comparing.peers import PLAIN
from slimgrad.comparing.runner import PeerRunner
from slimgrad.comparing.sequences import Decoder
from slimgrad.errors import LoadError
from slimgrad.measuring.blocks import cut

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_model_of_the_zoo_learns_its_batch(name):
    made = zoo.subject(name, "small")
    runner = PeerRunner(PLAIN, made, CPU)
    gradients = runner.gradients()
    assert set(gradients) == {n for n, _ in runner.model.named_parameters()}
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    before = float(made.loss_fn(runner.model, runner.batch).detach())
    for _ in range(8):
        runner.step()
    assert float(made.loss_fn(runner.model, runner.batch).detach()) < before


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_seed_makes_the_same_model_and_batch_and_leaves_the_random_state(name):
    state = torch.get_rng_state()
    one, other = (zoo.subject(name, "small", seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    ours, theirs = (float(s.loss_fn(s.model, s.batch).detach()) for s in (one, other))
    assert ours == theirs


@pytest.mark.parametrize("name", zoo.ZOO)
def test_chains_are_the_blocks_and_each_hands_its_output_to_the_next(name):
    made = zoo.subject(name, "small")
    assert sorted(made.blocks) == sorted(cut(made.model))
    taken, given = {}, {}
    handles = []
    for path in made.blocks:

        def note(_module, args, out, path=path):
            taken[path], given[path] = args[0], out

        handles.append(made.model.get_submodule(path).register_forward_hook(note))
    made.loss_fn(made.model, made.batch)
    for handle in handles:
        handle.remove()
    for chain in made.chains:
        for first, second in pairwise(chain):
            assert given[first] is taken[second]


def test_resnet_50_has_the_published_number_of_parameters():
    """25,557,032: He et al.'s model in every public implementation."""
    with torch.device("meta"):
        model = zoo.ResNet()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert len(cut(model)) == 16


def test_the_own_decoder_stands_in_where_transformers_is_missing(monkeypatch):
    monkeypatch.setattr(zoo, "find_spec", lambda _: None)
    made = zoo.subject("gpt2", "small")
    assert isinstance(made.model, Decoder)
    assert "transformers" in made.note
    made.loss_fn(made.model, made.batch).backward()
    with pytest.raises(LoadError, match="transformers"):
        zoo.subject("smollm2", "small")


def test_the_decoder_does_not_look_ahead():
    made = Decoder(vocabulary=20, width=16, num_layers=2, num_heads=2, num_tokens=8).eval()
    tokens_NT = torch.randint(0, 20, (1, 8))
    changed_NT = tokens_NT.clone()
    changed_NT[0, 5] = (changed_NT[0, 5] + 1) % 20
    ours, theirs = made(tokens_NT), made(changed_NT)
    assert torch.equal(ours[:, :5], theirs[:, :5])
    assert not torch.equal(ours[:, 5:], theirs[:, 5:])


@pytest.mark.parametrize(("name", "size"), [("gtp2", "small"), ("gpt2", "smal")])
def test_unknown_names_and_sizes_are_told(name, size):
    with pytest.raises(LoadError, match=r"gpt2|small"):
        zoo.subject(name, size)


def test_chains_of_a_flat_model_are_empty():
    assert zoo.chains(nn.Linear(2, 2)) == []
