"""What is written comes back bit for bit, errors are told, bytes are freed, and the worker makes no tensor."""

import errno
import os
import threading

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from slimgrad.errors import StorageError
from slimgrad.host import Host
from slimgrad.storage import (
    MAX_PENDING_BYTES,
    FileStore,
    PinnedStore,
    dense_view,
    measure_bandwidth,
    open_store,
    store_of,
)
from slimgrad.storage import files as files_module

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint8,
]


def sample(dtype: torch.dtype, num: int = 1001) -> torch.Tensor:
    bits = torch.randint(0, 2, (num * dtype.itemsize,), dtype=torch.uint8)
    if dtype is torch.bool:
        return bits.view(torch.bool)
    return torch.randint(0, 256, (num * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.fixture
def store(tmp_path):
    store = FileStore(tmp_path)
    yield store
    store.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_comes_back(store, dtype):
    tensor = sample(dtype)
    slot = store.allocate(tensor.numel() * dtype.itemsize)
    store.write(slot, tensor)
    found = torch.empty_like(tensor)
    store.read(slot, found)
    assert same_bits(found, tensor)


def test_offsets_and_views(store):
    tensor = torch.arange(1000.0)
    slot = store.allocate(4000)
    store.write(slot, tensor[600:], 2400)
    store.write(slot, tensor[:600])
    found = torch.zeros(300)
    store.read(slot, found[100:200], 4 * 550)
    assert torch.equal(found[100:200], tensor[550:650])
    assert not found[:100].any()
    assert not found[200:].any()


def test_scalars_and_empty_tensors(store):
    slot = store.allocate(8)
    store.write(slot, torch.tensor(2.5, dtype=torch.float64))
    found = torch.zeros((), dtype=torch.float64)
    store.read(slot, found)
    assert found.item() == 2.5
    store.write(slot, torch.zeros(0))
    store.read(store.allocate(0), torch.zeros(0))


def test_transfers_keep_their_order(store):
    slot, found = store.allocate(8 * 10_000), []
    for value in range(30):
        store.start_write(slot, torch.full((10_000,), float(value), dtype=torch.float64))
        target = torch.empty(10_000, dtype=torch.float64)
        found.append((store.start_read(slot, target), target))
    for value, (transfer, target) in enumerate(found):
        transfer.wait()
        assert target.eq(value).all()


def test_partial_transfers_are_completed(store, monkeypatch):
    monkeypatch.setattr(files_module, "_LARGEST_CALL", 1000)
    tensor, found = sample(torch.float32, 5003), torch.empty(5003)
    slot = store.allocate(4 * 5003)
    store.write(slot, tensor)
    store.read(slot, found)
    assert same_bits(found, tensor)


def test_a_source_is_freed_as_soon_as_it_is_written(store):
    slot = store.allocate(4000)
    tensor = torch.ones(1000)
    alive = StorageWeakRef(tensor.untyped_storage())
    transfer = store.start_write(slot, tensor)
    del tensor
    transfer.wait()
    assert alive.expired()


def test_bytes_waiting_to_be_written_are_bounded(store):
    num = MAX_PENDING_BYTES // 4 // 4  # four of them are the bound
    slots = [store.allocate(4 * num) for _ in range(12)]
    alive = []
    for slot in slots:
        tensor = torch.ones(num)
        alive.append(StorageWeakRef(tensor.untyped_storage()))
        store.start_write(slot, tensor)
        del tensor
        assert sum(not a.expired() for a in alive) <= 4


def test_an_inplace_change_during_a_write_is_told(store, monkeypatch):
    begun, pwritev = threading.Event(), os.pwritev

    def held_back(*arguments):
        begun.wait()
        return pwritev(*arguments)

    monkeypatch.setattr(os, "pwritev", held_back)
    tensor = torch.zeros(1000)
    transfer = store.start_write(store.allocate(4000), tensor)
    tensor.add_(1)
    begun.set()
    with pytest.raises(StorageError, match="in-place"):
        transfer.wait()


def test_freed_places_are_used_again_and_joined(store):
    slots = [store.allocate(4096 * n) for n in (1, 2, 3)]
    size = store.file_bytes
    for slot in (slots[0], slots[2], slots[1]):
        store.free(slot)
    again = store.allocate(4096 * 6)
    assert store.file_bytes == size
    store.free(again)
    first, second = store.allocate(4096 * 2), store.allocate(4096 * 4)
    assert store.file_bytes == size
    a, b = torch.ones(2048), torch.full((4096,), 2.0)
    store.write(first, a)
    store.write(second, b)
    found = torch.empty(2048)
    store.read(first, found)
    assert torch.equal(found, a)


def test_a_freed_slot_is_refused(store):
    slot = store.allocate(400)
    store.free(slot)
    with pytest.raises(StorageError, match="freed"):
        store.write(slot, torch.zeros(100))


@pytest.mark.parametrize("offset", [-4, 4])
def test_outside_a_slot_is_refused(store, offset):
    with pytest.raises(StorageError, match="cannot hold"):
        store.write(store.allocate(400), torch.zeros(100), offset)


def test_tensors_that_are_no_single_piece_are_refused(store):
    slot = store.allocate(4096)
    with pytest.raises(StorageError, match="contiguous"):
        store.write(slot, torch.zeros(10, 10).t()[1:])
    with pytest.raises(StorageError, match="conjugation"):
        store.write(slot, torch.zeros(10, dtype=torch.complex64).conj())


def test_a_shortened_file_is_told(store):
    slot = store.allocate(4000)
    store.write(slot, torch.ones(1000))
    os.ftruncate(store.fileno(), 2000)
    transfer = store.start_read(slot, torch.empty(1000))
    for _ in range(2):
        with pytest.raises(StorageError, match="cut short"):
            transfer.wait()


@pytest.mark.parametrize("call", ["pwritev", "posix_fallocate"])
def test_a_full_disk_is_told(store, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match="no space left"):
        store.write(store.allocate(4000), torch.ones(1000))


def test_an_impossible_folder_is_told(tmp_path):
    with pytest.raises(StorageError, match="name another folder"):
        FileStore(tmp_path / "absent")


def test_the_file_has_no_name_and_close_gives_it_back(tmp_path):
    store = FileStore(tmp_path)
    assert list(tmp_path.iterdir()) == []
    slot = store.allocate(4000)
    store.start_write(slot, torch.ones(1000))
    fd, num_threads = store.fileno(), threading.active_count()
    store.close()
    store.close()
    assert threading.active_count() == num_threads - 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    for act in (lambda: store.read(slot, torch.empty(1000)), lambda: store.allocate(1)):
        with pytest.raises(StorageError, match="closed"):
            act()


def test_a_forgotten_store_ends_its_worker(tmp_path):
    before = set(threading.enumerate())
    store = FileStore(tmp_path)
    (worker,) = set(threading.enumerate()) - before
    del store
    worker.join(timeout=10)
    assert not worker.is_alive()


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_is_refused(store):
    slot = store.allocate(4000)
    store.write(slot, torch.ones(1000))
    pid = os.fork()
    if pid == 0:
        try:
            store.read(slot, torch.empty(1000))
            os._exit(1)
        except StorageError as error:
            os._exit(0 if "forked" in str(error) else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    found = torch.empty(1000)
    store.read(slot, found)
    assert found.eq(1).all()


def test_the_worker_makes_no_tensor(tmp_path):
    called: set[str] = set()

    def trace(frame, event, argument):
        if event == "c_call" and frame.f_globals.get("__name__", "").startswith(
            ("slimgrad", "torch")
        ):
            called.add(f"{getattr(argument, '__module__', None)}.{argument.__qualname__}")

    threading.setprofile(trace)
    try:
        store = FileStore(tmp_path)
    finally:
        threading.setprofile(None)
    slot = store.allocate(4000)
    store.write(slot, torch.ones(1000))
    store.read(slot, torch.empty(1000))
    store.close()
    assert {"posix.pwritev", "posix.preadv"} <= called
    touching = {name for name in called if "torch" in name or "Tensor" in name}
    assert {name.rpartition(".")[2] for name in touching} <= {"is_inference"}


def test_dense_views_keep_the_order_of_memory():
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    flat = dense_view(tensor)
    assert flat is not None
    assert flat.data_ptr() == tensor.data_ptr()
    assert torch.equal(flat, tensor.permute(0, 2, 3, 1).reshape(-1))
    assert dense_view(torch.zeros(4, 4)[:, :2]) is None
    assert dense_view(torch.zeros(1).expand(5)) is None


def test_one_store_for_a_host(tmp_path):
    host = Host(torch.nn.Linear(2, 2), None, lambda model, batch: model(batch), folder=tmp_path)
    store = store_of(host)
    assert store_of(host) is store
    assert isinstance(store, FileStore)
    slot = store.allocate(400)
    store.write(slot, torch.zeros(100))
    worker = store._worker
    del store
    worker.join(timeout=10)
    assert not worker.is_alive()
    assert isinstance(store_of(host), FileStore)


def test_bandwidths_are_positive_and_leave_nothing(store):
    read, write = measure_bandwidth(store, 2**20)
    assert read > 0
    assert write > 0
    size = store.file_bytes
    store.allocate(2**20)
    assert store.file_bytes == size


def test_an_unknown_device_is_refused(tmp_path):
    with pytest.raises(StorageError, match="meta"):
        open_store(torch.device("meta"), tmp_path)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pinned_round_trip(dtype):
    store = PinnedStore(torch.device("cuda"))
    tensor = sample(dtype).cuda()
    slot = store.allocate(tensor.numel() * dtype.itemsize)
    transfer = store.start_write(slot, tensor)
    found = torch.empty_like(tensor)
    store.read(slot, found)
    transfer.wait()
    assert same_bits(found, tensor)
    store.close()
    with pytest.raises(StorageError, match="closed"):
        store.allocate(1)


@pytest.mark.gpu
@needs_cuda
def test_pinned_memory_is_used_again_and_sources_are_freed():
    store = PinnedStore(torch.device("cuda"))
    slot = store.allocate(2**20)
    place = store._memory[slot].data_ptr()
    tensor = torch.ones(2**18, device="cuda")
    alive = StorageWeakRef(tensor.untyped_storage())
    transfer = store.start_write(slot, tensor)
    del tensor
    transfer.wait()
    assert alive.expired()
    store.free(slot)
    assert store._memory[store.allocate(2**20)].data_ptr() == place


@pytest.mark.gpu
@needs_cuda
def test_pinned_bandwidths():
    read, write = measure_bandwidth(open_store(torch.device("cuda"), None), 2**22)
    assert read > 0
    assert write > 0
