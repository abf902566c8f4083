"""Every eager peer gives plain training's gradients, saves something where it must, and is taken off again."""

import pytest
import torch
from tests.plain_training import instance_attributes
from torch import nn

from slimgrad.comparing.contenders import Values
from slimgrad.comparing.peers import PEERS, PLAIN, chosen_peers
from slimgrad.comparing.runner import PeerRunner
from slimgrad.comparing.saved_file import saved_outside
from slimgrad.comparing.segments import attach_checkpoints, root_segments
from slimgrad.comparing.zoo import ZOO, subject
from slimgrad.errors import MethodError
from slimgrad.types import Column
from slimgrad.verifying.gradient import relative_error, same_bits

CPU = torch.device("cpu")
EAGER = [peer for peer in PEERS.values() if not peer.compiled]


@pytest.fixture(scope="module")
def plain():
    """``plain(name)``: a subject of the zoo, and the values and activation bytes of one plain step of it."""
    found = {}

    def of(name):
        if name not in found:
            made = subject(name, "small")
            found[name] = made, *_step(PLAIN, made)
        return found[name]

    return of


def _step(peer, made):
    runner = PeerRunner(peer, made, CPU)
    gradients = runner.gradients()
    buffers = {n: b.detach().clone() for n, b in runner.model.named_buffers()}
    runner.step()
    with runner.ledger() as ledger:
        runner.step()
    runner.close()
    return Values(gradients, buffers), ledger.columns[Column.ACTIVATIONS]


@pytest.mark.parametrize("peer", EAGER, ids=lambda p: p.name)
@pytest.mark.parametrize("name", ZOO)
def test_an_eager_peer_gives_the_same_bits_with_fewer_activations(name, peer, plain):
    made, values, activations = plain(name)
    ours, fewer = _step(peer, made)
    assert same_bits(ours.gradients, values.gradients)
    assert fewer < activations


def test_gradients_of_another_model_are_told_apart(plain):
    """The comparison can fail: one block left out changes the gradients."""
    made, values, _ = plain("vit")
    runner = PeerRunner(PLAIN, made, CPU)
    runner.model.get_submodule(made.blocks[1]).forward = lambda x: x
    assert relative_error(runner.gradients(), values.gradients) > 1e-3


def test_checkpoints_update_batch_norm_twice_and_this_is_noticed(plain):
    made, values, _ = plain("resnet50")
    ours, _ = _step(PEERS["checkpoint"], made)
    assert not same_bits(ours.buffers, values.buffers)
    assert same_bits(_step(PEERS["offload"], made)[0].buffers, values.buffers)


@pytest.mark.parametrize("peer", EAGER, ids=lambda p: p.name)
def test_a_peer_leaves_nothing_behind(peer):
    made = subject("t5", "small")
    before = instance_attributes(made.model)
    undo = peer.attach(made.model, made)
    undo()
    assert instance_attributes(made.model) == before


def test_a_segment_runs_each_of_its_blocks_once_forward_and_once_again_in_backward():
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    model = nn.Sequential(*(Counted(4, 4) for _ in range(5)))
    undo = attach_checkpoints(model, [["0", "1"], ["2", "3", "4"]])
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    order = [list(model).index(layer) for layer in calls]
    assert order[:5] == [0, 1, 2, 3, 4]
    assert sorted(order[5:]) == [0, 1, 2, 3, 4]
    undo()


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 12, 16, 30, 1000])
def test_root_segments_cover_every_block_once(num_blocks):
    blocks = [str(i) for i in range(num_blocks)]
    segments = root_segments([blocks])
    assert [path for segment in segments for path in segment] == blocks
    assert abs(len(segments) - num_blocks**0.5) < 1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4, 5),
        torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(6, 5).t(),
        torch.randn(4, 10)[:, ::2],
        torch.randn(7)[3:],
        torch.randn(1, 5).expand(3, 5),
        torch.randn(3, dtype=torch.bfloat16),
        torch.arange(5),
        torch.tensor(2.0),
        torch.empty(0, 3),
        torch.rand(4, 4) > 0.5,
    ],
    ids=lambda t: f"{tuple(t.shape)}-{t.dtype}",
)
def test_a_tensor_comes_back_from_the_file_as_it_was(tensor, tmp_path):
    with saved_outside(nn.Linear(1, 1), tmp_path):
        out = _Hold.apply(torch.zeros((), requires_grad=True), tensor)
        read = out.grad_fn.saved_tensors[0]
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert read.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or (
            tensor.numel() == 0
        )


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tensor):
        ctx.save_for_backward(tensor)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_peers_are_chosen_by_name():
    assert [p.name for p in chosen_peers(["selective", "offload"])] == ["selective", "offload"]
    assert chosen_peers([]) == []
    assert chosen_peers(compiled=False) == EAGER
    with pytest.raises(MethodError, match="did you mean 'offload'"):
        chosen_peers(["ofload"])
