import importlib.util

import pytest
import torch

from slimgrad import Ledger
from slimgrad.coding import bits as packing
from slimgrad.coding.bits import BLOCK, pack, packed_bytes, unpack
from slimgrad.errors import MethodError

SIZES = [0, 1, 2, 3, 5, 7, 8, 9, 63, 64, 65, 1000, BLOCK - 3, BLOCK, BLOCK + 1, 2 * BLOCK + 13]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def some_codes(num_codes, bits):
    return torch.randint(2**bits, (num_codes,), dtype=torch.uint8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("num_codes", SIZES)
def test_codes_come_back_from_exactly_so_many_bytes(num_codes, bits):
    codes = some_codes(num_codes, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.nbytes == packed_bytes(num_codes, bits) == (num_codes * bits + 7) // 8
    assert torch.equal(unpack(packed, num_codes, bits), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_code_has_bits_of_its_own(bits):
    num_codes = 21
    for place in range(num_codes):
        codes = torch.zeros(num_codes, dtype=torch.uint8)
        codes[place] = 2**bits - 1
        ones = sum(int(byte).bit_count() for byte in pack(codes, bits))
        assert ones == bits


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_codes_of_any_integer_dtype(dtype):
    codes = some_codes(1000, 3)
    kept = codes.to(dtype)
    assert torch.equal(pack(kept, 3), pack(codes, 3))
    assert torch.equal(kept, codes.to(dtype))  # they are not overwritten


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_block_is_unpacked_to_floats_too(bits):
    codes = some_codes(1003, bits)
    out = torch.empty(1003)
    packing.unpack_block(pack(codes, bits), bits, out)
    assert torch.equal(out, codes.float())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_scratch_does_not_grow_with_the_codes(bits):
    extra = {}
    for blocks in (2, 9):
        codes = some_codes(blocks * BLOCK, bits)
        with Ledger(inputs=codes) as ledger:
            packed = pack(codes, bits)
            unpacked = unpack(packed, len(codes), bits)
        extra[blocks] = ledger.peak_bytes - codes.nbytes - packed.nbytes - unpacked.nbytes
    assert extra[9] == extra[2] <= 2**20


@pytest.mark.parametrize("bits", [0, 5, 8])
def test_other_widths_are_refused(bits):
    with pytest.raises(MethodError, match=f"found {bits}"):
        pack(some_codes(4, 1), bits)


@needs_triton
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("num_codes", [0, 1, 13, 2048, 3 * 2048 + 1029])
def test_the_kernels_make_the_same_bytes(num_codes, bits, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 2048)  # several blocks, though few codes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = some_codes(num_codes, bits)
    expected = pack(codes, bits)
    packed = torch.empty_like(expected, device=device)
    packing.pack_on_device(codes.to(device), bits, packed)
    assert torch.equal(packed.cpu(), expected)
    out = torch.empty(num_codes, dtype=torch.uint8, device=device)
    packing.unpack_on_device(packed, bits, out)
    assert torch.equal(out.cpu(), codes)
