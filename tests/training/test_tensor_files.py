"""Files written in pieces are the safetensors library's own, and the other way round."""

import pytest
import safetensors.torch
import torch

from slimgrad.errors import CheckpointError
from slimgrad.training import tensor_files
from slimgrad.training.tensor_files import Chunked, open_tensors, write_tensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes (NaN included)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return torch.equal(*flat)


def samples() -> dict[str, torch.Tensor]:
    bits = torch.randint(0, 2, (48,), dtype=torch.uint8)
    tensors = {
        str(d).removeprefix("torch."): (
            bits[:8].bool() if d is torch.bool else (bits * 37).view(d).clone()
        )
        for d in DTYPES
    }
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    tensors["transposed"] = torch.randn(5, 7, 3).permute(2, 0, 1)
    tensors["strided"] = torch.randn(40)[::3]
    return tensors


@pytest.mark.parametrize("piece_bytes", [16, 4 * 2**20])
def test_library_reads_what_is_written(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", piece_bytes)
    tensors = samples()
    size, _ = write_tensors(tmp_path / "a.safetensors", tensors)
    assert size == (tmp_path / "a.safetensors").stat().st_size
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(read[name], tensor), name


@pytest.mark.parametrize("piece_bytes", [16, 4 * 2**20])
def test_reads_what_the_library_writes(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", piece_bytes)
    tensors = {name: tensor.contiguous() for name, tensor in samples().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"by": "library"})
    for name, stored in open_tensors(tmp_path / "a.safetensors").items():
        assert same_bits(stored.read(), tensors[name]), name
        assert same_bits(
            torch.cat([*stored.parts(), torch.zeros(0, dtype=stored.dtype)]),
            tensors[name].reshape(-1),
        )


def test_a_source_in_chunks_is_written_without_ever_being_whole(tmp_path):
    alive: list[int] = []

    def chunks():
        for start in range(0, 60, 7):
            part = torch.arange(start, min(start + 7, 60), dtype=torch.float32)
            alive.append(part.numel())
            yield part

    source = Chunked(torch.float32, (6, 10), chunks)
    write_tensors(tmp_path / "a.safetensors", {"x": source, "y": torch.ones(2)})
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["x"], torch.arange(60.0).view(6, 10))
    assert torch.equal(read["y"], torch.ones(2))
    assert max(alive) == 7


def test_row_slices_are_read_into_tensors_of_any_strides(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 32)
    whole = torch.randn(9, 4, 5)
    write_tensors(tmp_path / "a.safetensors", {"pad": torch.ones(3), "x": whole})
    stored = open_tensors(tmp_path / "a.safetensors")["x"]
    rows = torch.empty(2, 4, 5)
    stored.read_into(rows, start=3 * 20)
    assert torch.equal(rows, whole[3:5])
    for out in (torch.empty(5, 9, 4).permute(1, 2, 0), torch.empty(9, 4, 10)[..., ::2]):
        stored.read_into(out)
        assert torch.equal(out, whole)
    parameter = torch.nn.Parameter(torch.zeros(9, 4, 5))
    address = parameter.data_ptr()
    stored.read_into(parameter)
    assert torch.equal(parameter, whole)
    assert parameter.data_ptr() == address
    assert parameter.requires_grad


def test_asking_for_more_than_is_stored_is_refused(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.randn(4), "y": torch.randn(4)})
    stored = open_tensors(tmp_path / "a.safetensors")["x"]
    for out, start in ((torch.empty(5), 0), (torch.empty(2), 3), (torch.empty(2).double(), 0)):
        with pytest.raises(CheckpointError, match="'x'"):
            stored.read_into(out, start)


@pytest.mark.parametrize(
    "source",
    [
        Chunked(torch.float32, (4,), lambda: [torch.ones(3)]),
        Chunked(torch.float32, (4,), lambda: [torch.ones(5)]),
        Chunked(torch.float32, (4,), lambda: [torch.ones(4).double()]),
        torch.ones(2, dtype=torch.complex128),
    ],
    ids=["short", "long", "dtype", "complex128"],
)
def test_a_source_that_does_not_keep_its_word_is_refused(tmp_path, source):
    with pytest.raises(CheckpointError, match="'x'"):
        write_tensors(tmp_path / "a.safetensors", {"x": source})


def test_every_truncation_of_a_file_is_noticed(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.randn(4), "y": torch.randn(2)})
    data = (tmp_path / "a.safetensors").read_bytes()
    for length in range(len(data)):
        (tmp_path / "b.safetensors").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            open_tensors(tmp_path / "b.safetensors")
