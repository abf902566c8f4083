"""Tiles against whole score matrices in float64; bytes, dropout drawn twice, and when torch's kernel serves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layers.plain_attention import (
    assert_same,
    gradients,
    normal,
    overhead_bytes,
    plain_attention,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import slimgrad
from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.layers import chunked_attention
from slimgrad.layers.fused_attention import torch_is_lean
from slimgrad.layers.memory_efficient_attention import memory_efficient_attention


def tiled(*args, **kwargs):
    return memory_efficient_attention(*args, backend="chunked", **kwargs)


class Operations(TorchDispatchMode):
    """The names of the operations that are run, and the most elements of an output."""

    def __init__(self):
        super().__init__()
        self.names, self.numel = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    batch=st.integers(1, 3),
    num_groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    num_queries=st.integers(1, 9),
    num_keys=st.integers(1, 9),
    widths=st.sampled_from([(1, 1), (4, 4), (3, 5)]),
    chunks=st.sampled_from([(1, 1), (2, 3), (4, 2), (3, 100), (100, 100)]),
    tile_elements=st.sampled_from([1, 12, 2**18]),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
def test_equals_plain_attention(
    data,
    batch,
    num_groups,
    per_group,
    num_queries,
    num_keys,
    widths,
    chunks,
    tile_elements,
    is_causal,
    scale,
    seed,
):
    heads, full = num_groups * per_group, (batch, num_groups * per_group, num_queries, num_keys)

    def broadcast(of):
        ones = data.draw(st.lists(st.booleans(), min_size=4, max_size=4))
        shape = [1 if one else size for one, size in zip(ones, of, strict=True)]
        return shape[data.draw(st.integers(0, 3)) :]

    query = normal(batch, heads, num_queries, widths[0], seed=seed)
    key = normal(batch, num_groups, num_keys, widths[0], seed=seed + 1)
    value = normal(batch, num_groups, num_keys, widths[1], seed=seed + 2)
    bias = normal(*broadcast(full), seed=seed + 3) if data.draw(st.booleans()) else None
    mask = normal(*broadcast(full), grad=False) > -0.5 if data.draw(st.booleans()) else None
    leaves = (query, key, value, bias)
    plain = plain_attention(query, key, value, mask, bias, is_causal=is_causal, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunked_attention._TILE_ELEMENTS, "cpu", tile_elements)
        found = tiled(
            query,
            key,
            value,
            mask,
            bias=bias,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=per_group > 1,
            query_chunk=chunks[0],
            key_chunk=chunks[1],
        )
        assert_same([found], [plain])
        assert_same(gradients(found, leaves), gradients(plain, leaves))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    inputs = (normal(2, 2, 3, 2), normal(2, 1, 5, 2), normal(2, 1, 5, 3), normal(2, 3, 5))

    def attend(query, key, value, bias):
        torch.manual_seed(3)
        return tiled(
            query,
            key,
            value,
            bias=bias,
            enable_gqa=True,
            query_chunk=2,
            key_chunk=3,
            dropout_p=dropout_p,
        )

    assert torch.autograd.gradcheck(attend, inputs)


def test_an_additive_mask_is_a_bias_and_infinite_entries_hide():
    query, key, value = (normal(1, 2, 6, 4, seed=i) for i in range(3))
    mask = normal(6, 6, grad=False) > -0.3
    mask[2] = False
    added = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    leaves = (query, key, value)
    plain = plain_attention(*leaves, mask)
    found = tiled(*leaves, added, query_chunk=4, key_chunk=4)
    assert_same([found], [plain])
    assert_same(gradients(found, leaves), gradients(plain, leaves))


@pytest.mark.parametrize("added", [False, True])
def test_rows_that_attend_to_nothing_are_zero_as_with_torch(added):
    leaves = query, key, value = [normal(1, 2, 5, 4, seed=i) for i in range(3)]
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[3] = False
    if added:
        mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    theirs = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    found = tiled(query, key, value, mask, query_chunk=2, key_chunk=2)
    assert found[:, :, 3].abs().max() == 0
    grads = gradients(found, leaves)
    assert grads[0][:, :, 3].abs().max() == 0
    assert_same([found, *grads], [theirs, *gradients(theirs, leaves)])


def test_no_keys_and_no_queries():
    query, key = normal(1, 2, 3, 4), normal(1, 2, 0, 4)
    assert tiled(query, key, key).tolist() == torch.zeros(1, 2, 3, 4).tolist()
    assert tiled(key, query, query).shape == (1, 2, 0, 4)


def drawn_mask(dropout_p, num_queries, num_keys, seed, **chunks):
    """What dropout multiplied the probabilities by: read off through values that are the identity."""
    query, key = normal(1, 2, num_queries, 3), normal(1, 2, num_keys, 3, seed=1)
    identity = torch.eye(num_keys, dtype=torch.float64).expand(1, 2, num_keys, num_keys)
    torch.manual_seed(seed)
    dropped = tiled(query, key, identity, dropout_p=dropout_p, **chunks)
    return (query, key), (dropped / tiled(query, key, identity, **chunks)).detach()


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_is_replayed_in_the_backward_pass(is_causal):
    chunks = {"query_chunk": 5, "key_chunk": 4}
    (query, key), kept = drawn_mask(0.3, 11, 9, seed=5, **chunks)
    scaled = torch.tensor([0.0, 1 / 0.7], dtype=torch.float64)
    assert (kept.unsqueeze(-1) - scaled).abs().amin(-1).max() < 1e-12
    value = normal(1, 2, 9, 4, seed=2)
    leaves = (query, key, value)
    torch.manual_seed(5)
    found = tiled(*leaves, dropout_p=0.3, is_causal=is_causal, **chunks)
    if is_causal:  # tiles on the diagonal are cut short, and draw less
        torch.manual_seed(5)
        identity = torch.eye(9, dtype=torch.float64).expand(1, 2, 9, 9)
        dropped = tiled(query, key, identity, dropout_p=0.3, is_causal=True, **chunks)
        whole = tiled(query, key, identity, is_causal=True, **chunks)
        kept = (dropped / whole).detach().nan_to_num()
    plain = plain_attention(*leaves, kept=kept, is_causal=is_causal)
    assert_same([found], [plain])
    assert_same(gradients(found, leaves), gradients(plain, leaves))


def test_dropout_keeps_its_share_tile_by_tile_and_differs_between_tiles_heads_and_calls():
    chunks = {"query_chunk": 50, "key_chunk": 50}
    _, kept = drawn_mask(0.3, 200, 150, seed=0, **chunks)
    kept = kept > 0
    tiles = kept.unflatten(2, (4, 50)).unflatten(4, (3, 50)).transpose(3, 4).reshape(24, 50, 50)
    deviation = (0.3 * 0.7 / 2500) ** 0.5
    assert ((tiles.double().mean((1, 2)) - 0.7).abs() < 5 * deviation).all()
    assert len({tile.numpy().tobytes() for tile in tiles}) == 24
    assert not torch.equal(drawn_mask(0.3, 200, 150, seed=1, **chunks)[1] > 0, kept)


def test_only_one_draw_is_taken_from_the_global_generator():
    query = normal(1, 2, 9, 4)
    state = torch.get_rng_state()
    tiled(query, query, query, query_chunk=2).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    out = tiled(query, query, query, query_chunk=2, dropout_p=0.5)
    after = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(state)
    torch.randint(2**62, ())
    assert torch.equal(torch.get_rng_state(), after)


def test_everything_dropped_is_zero():
    query = normal(1, 2, 5, 4)
    out = tiled(query, query, query, dropout_p=1.0)
    (grad,) = gradients(out, [query])
    assert out.abs().max() == 0
    assert grad.abs().max() == 0


def test_under_checkpoint_the_same_mask_is_drawn_again():
    query = normal(2, 2, 9, 4)

    def attend(x):
        return tiled(x, x.sin(), x.cos(), dropout_p=0.4, query_chunk=4)

    torch.manual_seed(1)
    plain = gradients(attend(query), [query])
    torch.manual_seed(1)
    again = gradients(checkpoint(attend, query, use_reentrant=False), [query])
    assert torch.equal(plain[0], again[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_further_from_float64_than_twice_plain(dtype):
    exact = [normal(2, 3, 70, 16, seed=i, dtype=dtype).detach().double() for i in range(3)]
    exact.append(normal(3, 70, 70, seed=4, dtype=dtype).detach().double())
    exact = [t.requires_grad_() for t in exact]
    low = [t.detach().to(dtype).requires_grad_() for t in exact]

    def results(attend, leaves):
        out = attend(*leaves[:3], bias=leaves[3])
        return [out, *gradients(out, leaves)]

    truth, plain = results(plain_attention, exact), results(plain_attention, low)
    found = results(lambda *a, **k: tiled(*a, query_chunk=32, key_chunk=16, **k), low)
    for mine, theirs, true in zip(found, plain, truth, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - true).norm() <= 2 * (theirs.double() - true).norm()


@pytest.mark.parametrize("backend", ["chunked", "torch", "auto"])
def test_under_autocast_the_dtype_is_torchs(backend):
    query, key, value = (normal(1, 2, 6, 4, seed=i, dtype=torch.float32) for i in range(3))
    bias = normal(6, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        found = memory_efficient_attention(query, key, value, bias=bias, backend=backend)
    assert found.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(found, theirs, rtol=0.02, atol=0.02)
    assert [g.dtype for g in gradients(found, [query, bias])] == [torch.float32] * 2


def test_inputs_need_not_be_contiguous_and_the_output_is_laid_out_for_a_projection():
    packed = normal(2, 7, 3, 2, 4)
    leaves = query, key, value = packed.permute(2, 0, 3, 1, 4)
    found = tiled(query, key, value, query_chunk=3, key_chunk=2)
    assert_same([found], [plain_attention(*leaves)])
    assert_same(gradients(found, [packed]), gradients(plain_attention(*leaves), [packed]))
    assert found.transpose(1, 2).is_contiguous()


def test_a_second_backward_pass_works_and_a_double_backward_is_refused():
    query = normal(1, 1, 5, 4)
    out = tiled(query, query, query)
    (first,) = torch.autograd.grad(out.sum(), query, retain_graph=True)
    (second,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(UnsupportedError, match=r"memory_efficient_attention.*double backward"):
        torch.autograd.grad(second.sum(), query)


def test_chunks_above_the_diagonal_are_not_computed():
    query = normal(1, 1, 32, 4)
    counts = {}
    for is_causal in (False, True):
        with Operations() as operations:
            tiled(query, query, query, is_causal=is_causal, query_chunk=8, key_chunk=8)
        counts[is_causal] = operations.names.count("bmm")
    assert counts == {False: 16, True: 10}


def test_what_is_saved_are_inputs_output_and_one_number_a_query():
    query, key, value = (normal(2, 4, 96, 8, seed=i, dtype=torch.float32) for i in range(3))
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        tiled(query, key, value, query_chunk=16, key_chunk=16)
    assert sum(saved.values()) == 4 * query.numel() * 4 + 2 * 4 * 96 * 4


@pytest.mark.parametrize("variant", ["plain", "causal", "dropout", "bias"])
def test_overhead_bytes_are_linear_in_the_length(variant):
    options = {"causal": {"is_causal": True}, "dropout": {"dropout_p": 0.1}}.get(variant, {})
    found = []
    for length in (256, 512, 1024):
        inputs = [normal(1, 2, length, 16, seed=i, dtype=torch.float32) for i in range(3)]
        bias = normal(2, 1, length, dtype=torch.float32) if variant == "bias" else None
        extra = [] if bias is None else [bias]

        def attend(query, key, value, bias=None):
            return tiled(query, key, value, bias=bias, query_chunk=64, key_chunk=64, **options)

        found.append(overhead_bytes(attend, inputs + extra))
    first, second = found[1] - found[0], found[2] - found[1]
    assert second == pytest.approx(2 * first, rel=0.02)  # length doubles: a constant and a slope
    assert second <= 512 * 2 * 4 * (5 * 16 + 4)  # outputs, gradients, a few numbers a query


def test_at_8192_tokens_the_ledger_finds_a_twentieth_of_plain_attention():
    inputs = [normal(1, 1, 8192, 32, seed=i, dtype=torch.float32) for i in range(3)]
    with FakeTensorMode() as mode:  # the same bytes, and nothing is computed
        plain = overhead_bytes(functional_plain, [mode.from_tensor(t) for t in inputs])
    assert plain >= 3 * 8192**2 * 4
    assert 20 * overhead_bytes(tiled, inputs) <= plain


class Block(nn.Module):
    """Half a Transformer layer, with dropout on its attention."""

    def __init__(self, width=16):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        self.project = nn.Linear(width, 3 * width)

    def forward(self, x):
        query, key, value = (
            self.project(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = tiled(query, key, value, dropout_p=0.2, query_chunk=16, key_chunk=16)
        return x + self.out(attended.transpose(1, 2).flatten(2))


@pytest.mark.slow
def test_a_planned_step_with_dropout_has_the_bits_of_the_plain_one():
    model = nn.Sequential(*[Block() for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters())
    batch = normal(2, 40, 16, dtype=torch.float32, grad=False)

    def loss_fn(model, batch):
        return model(batch).square().mean()

    step = slimgrad.slim(model, optimizer, loss_fn, batch, budget="min", allow_compile=False)
    assert any("recompute" in choice.method for choice in step.plan.choices)
    assert float(step(batch)) > 0


def functional_plain(query, key, value):
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "grouped": {"groups": 1},
    "key mask": {"mask": (1, 1, 1, 512)},
    "square mask": {"mask": (1, 1, 512, 512)},
    "bias": {"bias": (1, 2, 512, 512)},
    "bias with a gradient": {"bias": (1, 2, 512, 512), "bias_grad": True},
    "dropout": {"dropout_p": 0.1},
    "wider values": {"value_width": 24},
    "mask and causal": {"mask": (1, 1, 512, 512), "is_causal": True},
    "mask and bias": {"mask": (1, 1, 1, 512), "bias": (1, 2, 1, 512)},
}
LEAN = {"plain", "causal", "grouped", "key mask", "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_auto_takes_torch_where_its_kernel_holds_no_scores(case, dtype):
    asked = dict(CASES[case])
    groups, width = asked.pop("groups", 2), asked.pop("value_width", 16)
    mask_shape, bias_shape = asked.pop("mask", None), asked.pop("bias", None)
    needs_gradient = asked.pop("bias_grad", False)
    query, key = normal(1, 2, 512, 16, dtype=dtype), normal(1, groups, 512, 16, dtype=dtype)
    value = normal(1, groups, 512, width, dtype=dtype)
    mask = None if mask_shape is None else normal(*mask_shape, grad=False) > -1
    bias = None if bias_shape is None else normal(*bias_shape, dtype=dtype, grad=needs_gradient)
    inputs = [t for t in (query, key, value, mask, bias) if t is not None]

    def attend(backend):
        return lambda *_: memory_efficient_attention(
            query, key, value, mask, bias=bias, enable_gqa=True, backend=backend, **asked
        )

    with Operations() as operations:
        attend("auto")()
    fused = "_scaled_dot_product_flash_attention_for_cpu" in operations.names
    assert fused == (case in LEAN)
    square = 512 * 512 * dtype.itemsize
    gradient = 2 * square if needs_gradient else 0
    assert overhead_bytes(attend("auto"), inputs) - gradient < 2 * square + 2 * 256 * 256 * 16
    if not fused and "and" not in case:  # what torch would have held
        assert overhead_bytes(attend("torch"), inputs) - gradient >= square


def test_the_conditions_of_torchs_kernel_are_torchs():
    checked = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        for dropout_p in (0.0, 0.1):
            for width in (16, 24):
                for bias_grad in (None, False, True):
                    query = normal(1, 2, 64, 16, dtype=dtype)
                    for key in (query, query.mT.contiguous().mT):
                        value = normal(1, 2, 64, width, dtype=dtype)
                        bias = (
                            normal(1, 2, 64, 64, dtype=dtype, grad=bias_grad)
                            if bias_grad is not None
                            else None
                        )
                        theirs = torch._fused_sdp_choice(query, key, value, bias, dropout_p) == 1
                        mine = torch_is_lean(query, key, value, None, bias, dropout_p, False, False)
                        assert mine == theirs
                        checked.add(mine)
    assert checked == {True, False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": normal(2, 6, 4)}, "batch, heads, length, width"),
        ({"key": normal(1, 2, 5, 3)}, r"query \[B, H, N, D\]"),
        ({"value": normal(1, 2, 6, 4)}, r"query \[B, H, N, D\]"),
        ({"query": normal(1, 3, 6, 4), "enable_gqa": True}, "a divisor"),
        ({"query": normal(1, 4, 6, 4)}, "enable_gqa=False"),
        ({"value": normal(1, 2, 5, 4, dtype=torch.float32)}, "one dtype"),
        ({"attn_mask": torch.ones(6, 4, dtype=torch.bool)}, r"broadcasts to \(1, 2, 6, 5\)"),
        ({"attn_mask": torch.ones(6, 5, dtype=torch.int64)}, "boolean or floating"),
        ({"bias": torch.ones(1, 1, 1, 1, 1)}, "broadcasts"),
        ({"bias": torch.ones(5), "attn_mask": torch.ones(5)}, "their sum"),
        ({"dropout_p": 1.5}, "dropout_p"),
        ({"key_chunk": 0}, "chunks"),
        ({"backend": "flash"}, "backend"),
        ({"backend": "torch", "attn_mask": torch.ones(6, 5) > 0, "is_causal": True}, "is_causal"),
        ({"backend": "torch", "attn_mask": torch.ones(5) > 0, "bias": torch.ones(5)}, "both"),
    ],
)
def test_arguments_that_do_not_fit_are_told(change, message):
    given = {"query": normal(1, 2, 6, 4), "key": normal(1, 2, 5, 4), "value": normal(1, 2, 5, 4)}
    with pytest.raises(MethodError, match=message):
        memory_efficient_attention(**(given | change))
