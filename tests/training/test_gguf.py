"""A GGUF header that passes can be read; one that does not agree with its file is refused, quickly."""

import math
import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from slimgrad.errors import GgufError
from slimgrad.training.gguf import GGML_TYPES, MAX_ELEMENTS, validate_gguf
from slimgrad.training.models import packaged_file


def text(value: bytes | str) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, content: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + content


def tensor(name, shape=(4, 2), kind=0, offset=0, n_dims=None) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    count = len(shape) if n_dims is None else n_dims
    return text(name) + struct.pack("<I", count) + dims + struct.pack("<IQ", kind, offset)


ARCHITECTURE = entry("general.architecture", 8, text("llama"))


def build(
    entries=(ARCHITECTURE,),
    tensors=(),
    data=b"",
    *,
    counts=None,
    version=3,
    magic=b"GGUF",
    align=32,
) -> bytes:
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_entries)
    head += b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % align) + data


@pytest.fixture
def check(tmp_path):
    def validate(data: bytes):
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        return validate_gguf(path)

    return validate


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    """A small file by the reference writer: every kind of value, several tensors, some quantized."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_bool("test.flag", True)
    writer.add_float64("test.ratio", 0.5)
    writer.add_int8("test.small", -3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé", "", "long token"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, -2.0])
    writer.add_array("test.flags", [True, False, True])
    writer.add_array("test.nested", [[1, 2], [3, 4, 5]])
    rows = np.arange(128, dtype=np.float32).reshape(4, 32)
    writer.add_tensor("blk.0.weight", rows)
    writer.add_tensor("blk.1.weight", rows.astype(np.float16))
    packed = gguf.quantize(rows, gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.2.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.3.bias", np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_types_are_the_reference_ones():
    reference = {k.value: (k.name, *v) for k, v in gguf.GGML_QUANT_SIZES.items()}
    assert {k: v for k, v in GGML_TYPES.items() if k in reference} == {
        k: v for k, v in reference.items() if k in GGML_TYPES
    }
    assert reference.keys() - GGML_TYPES.keys() <= set(range(42, 1000))  # newer than this code


def test_a_whole_file_agrees_with_the_reference_reader(check, written, tmp_path):
    header = check(written)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert (header.version, header.architecture) == (3, "llama")
    assert header.data_offset == reader.data_offset
    assert header.metadata["test.flag"] is True
    assert header.metadata["test.small"] == -3
    assert header.metadata["test.ratio"] == 0.5
    assert [(t.name, t.offset, t.num_bytes, math.prod(t.shape)) for t in header.tensors] == [
        (t.name, t.data_offset, t.n_bytes, t.n_elements) for t in reader.tensors
    ]


def test_the_packaged_model_passes():
    header = validate_gguf(packaged_file("smollm2"))
    assert (header.architecture, len(header.tensors)) == ("llama", 272)
    assert sum(math.prod(t.shape) for t in header.tensors) == 134_515_008


def test_a_minimal_file_passes(check):
    header = check(build(tensors=[tensor("a"), tensor("b", (2,), 1, 32)], data=b"\0" * 36))
    assert [(t.type_name, t.num_bytes) for t in header.tensors] == [("F32", 32), ("F16", 4)]
    assert check(build(version=2)).version == 2


BIG = 2**62
FLAG = entry("a.b", 7, b"\1")
BAD = {
    "empty": (b"", "magic number needs 4 bytes, but 0"),
    "magic": (build(magic=b"GGML"), "magic number is b'GGML'"),
    "version": (build(version=1), "version is 1, expected 2 or 3"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "keys": (build(counts=(0, BIG)), "claims .* metadata keys, expected at most"),
    "tensors": (build(counts=(BIG, 1)), "claims .* tensors, expected at most"),
    "more keys than there are": (build(counts=(0, 2), data=b"\xff" * 64), "key '' is empty"),
    "key length": (
        build([ARCHITECTURE, struct.pack("<Q", BIG) + b"key" * 9]),
        "metadata key claims",
    ),
    "key text": (build([entry(b"\xc3\xa9", 7, b"\1")]), "metadata key is not ascii"),
    "key empty": (build([ARCHITECTURE, entry("", 7, b"\1"), FLAG]), "empty, reserved or repeated"),
    "key twice": (build([ARCHITECTURE, FLAG, FLAG]), "'a.b' is empty, reserved or repeated"),
    "value type": (build([ARCHITECTURE, entry("a.b", 13, b"\1" * 8)]), "unknown value type 13"),
    "truth value": (build([ARCHITECTURE, entry("a.b", 7, b"\2")]), "truth value of 2"),
    "truth values": (
        build([ARCHITECTURE, entry("a.b", 9, array(7, 3, b"\1\2\0"))]),
        "other than 0 and 1",
    ),
    "string length": (
        build([ARCHITECTURE, entry("a.b", 8, struct.pack("<Q", BIG))]),
        "value of 'a.b' claims",
    ),
    "string text": (
        build([ARCHITECTURE, entry("a.b", 8, text(b"\xff\xfe"))]),
        "'a.b' is not utf-8",
    ),
    "array length": (
        build([ARCHITECTURE, entry("a.b", 9, array(4, BIG, b""))]),
        "'a.b' claims .* elements",
    ),
    "array of strings": (
        build([ARCHITECTURE, entry("a.b", 9, array(8, BIG, b""))]),
        "'a.b' claims .* elements",
    ),
    "array of arrays": (
        build([ARCHITECTURE, entry("a.b", 9, array(9, BIG, b""))]),
        "'a.b' claims .* elements",
    ),
    "array type": (
        build([ARCHITECTURE, entry("a.b", 9, array(13, 1, b"\0"))]),
        "unknown element type 13",
    ),
    "array depth": (
        build([ARCHITECTURE, entry("a.b", 9, array(9, 1, b"") * 5 + array(4, 0, b""))]),
        "nested more than 4 deep",
    ),
    "no architecture": (build([FLAG]), "no text under 'general.architecture'"),
    "alignment": (
        build([ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 48))]),
        "alignment is 48, expected a power of two",
    ),
    "alignment zero": (
        build([ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 0))]),
        "alignment is 0",
    ),
    "alignment type": (
        build([ARCHITECTURE, entry("general.alignment", 10, struct.pack("<Q", 32))]),
        "not an unsigned 32-bit",
    ),
    "tensor name": (build(tensors=[tensor("x" * 65)], data=b"\0" * 32), "name claims 65"),
    "tensor twice": (
        build(tensors=[tensor("a"), tensor("a", offset=32)], data=b"\0" * 64),
        "same name",
    ),
    "tensor dims": (
        build(tensors=[tensor("a", n_dims=9)], data=b"\0" * 99),
        "claims 9 dimensions",
    ),
    "tensor dims huge": (build(tensors=[tensor("a", n_dims=2**32 - 1)]), "claims 4294967295 dim"),
    "tensor dim zero": (build(tensors=[tensor("a", (4, 0))]), "expected no zero"),
    "tensor type": (build(tensors=[tensor("a", kind=4)], data=b"\0" * 32), "removed ggml type 4"),
    "tensor block": (
        build(tensors=[tensor("a", (16, 2), 2)], data=b"\0" * 64),
        "Q4_0, a first dimension that is a multiple of 32",
    ),
    "tensor beyond": (build(tensors=[tensor("a")], data=b"\0" * 31), "ends at byte 160, expected at most 159"),
    "tensor overflow": (build(tensors=[tensor("a", (2**33, 2**33))], data=b"\0" * 64), "ends at"),
    "tensor offset": (build(tensors=[tensor("a", offset=2**63)], data=b"\0" * 64), "ends at"),
    "tensor unaligned": (build(tensors=[tensor("a", offset=8)], data=b"\0" * 64), "not aligned"),
    "tensor overlap": (
        build(tensors=[tensor("a", (16,)), tensor("b", offset=32)], data=b"\0" * 99),
        "'b' at data offset 32 overlaps 'a', which ends at 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_each_disagreement_is_told(check, case):
    data, words = BAD[case]
    with pytest.raises(GgufError, match=words) as error:
        check(data)
    assert "x.gguf is not a usable GGUF file: at byte" in str(error.value)
    assert "get it again" in str(error.value)


def test_a_reader_would_never_finish_is_refused(check, monkeypatch):
    """Elements without end are refused before they are walked, also when the bytes for them are there."""
    monkeypatch.setattr("slimgrad.training.gguf.MAX_ELEMENTS", 1000)
    many = entry("a.b", 9, array(8, 600, text("") * 600))
    more = entry("a.c", 9, array(0, 600, b"\0" * 600))
    check(build([ARCHITECTURE, many]))
    with pytest.raises(
        GgufError, match=r"'a\.c' brings the array elements above the limit of 1,000"
    ):
        check(build([ARCHITECTURE, many, more]))
    assert MAX_ELEMENTS > 2**21  # the largest vocabularies and their merges, several times


def test_a_missing_file_is_told(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(GgufError, match="expected a GGUF model file"):
            validate_gguf(path)


def test_memory_is_bounded_by_what_is_there(check):
    tracemalloc.start()
    try:
        for case in BAD:
            with pytest.raises(GgufError):
                check(BAD[case][0])
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_every_truncation_is_refused(check, written):
    end = max(t.offset + t.num_bytes for t in check(written).tensors)
    for length in range(end):
        with pytest.raises(GgufError):
            check(written[:length])


def outcome(check, data: bytes) -> bool:
    try:
        check(data)
    except GgufError:
        return False
    return True


def mutate(data: bytes, generator: np.random.Generator, header_bytes: int) -> bytes:
    """One to three changes in the header: bytes, extreme numbers, cuts, repeats and insertions."""
    changed = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        place = int(generator.integers(0, max(1, min(header_bytes, len(changed)))))
        kind = generator.integers(0, 6)
        if kind == 0:
            changed[place : place + 1] = bytes([generator.integers(0, 256)])
        elif kind == 1:
            changed[place : place + 8] = struct.pack("<Q", 2 ** int(generator.integers(0, 64)))
        elif kind == 2:
            changed[place : place + 4] = struct.pack("<I", int(generator.integers(0, 20)))
        elif kind == 3:
            del changed[place : place + int(generator.integers(1, 40))]
        elif kind == 4:
            changed[place:place] = changed[place : place + int(generator.integers(1, 40))]
        else:
            changed = changed[: max(place, 1)]
    return bytes(changed)


def test_what_passes_the_reference_reader_can_read(check, written, tmp_path):
    """Mutations of a small file: refused, or read without an error by the reader that would hang or crash."""
    header_bytes = check(written).data_offset
    generator = np.random.default_rng(0)
    passed = 0
    for _ in range(1500):
        data = mutate(written, generator, header_bytes)
        if outcome(check, data):
            reader = gguf.GGUFReader(tmp_path / "x.gguf")
            passed += 1
            assert len(reader.tensors) <= 4
            del reader
    assert 20 < passed < 1400


def test_mutations_of_a_real_header_end(tmp_path):
    """SmolLM2's header with the tensors' bytes as a hole in the file: passes, or is refused, and soon."""
    path = packaged_file("smollm2")
    header = validate_gguf(path)
    with path.open("rb") as file:
        data = file.read(header.data_offset)
    infos = data.index(b"token_embd.weight") - 8
    generator = np.random.default_rng(1)
    copy = tmp_path / "x.gguf"
    refused = 0
    for number in range(60):
        parts = [data[:900], data[900:infos], data[infos:]]
        part = number % 3  # counts and scalars; tokens and merges; where each tensor lies
        parts[part] = mutate(parts[part], generator, len(parts[part]))
        copy.write_bytes(b"".join(parts))
        os.truncate(copy, path.stat().st_size)
        try:
            validate_gguf(copy)
        except GgufError:
            refused += 1
    assert 20 < refused < 60
