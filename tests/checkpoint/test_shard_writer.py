"""ShardWriter and the atomic writers: exact sizes beforehand, files the safetensors library reads, whole or absent."""

import errno
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3quant.checkpoint import (
    Checkpoint,
    Entry,
    ShardRecord,
    ShardWriter,
    aligned_order,
    file_size,
    header_bytes,
    json_bytes,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
    writer,
)
from m3quant.errors import OutputError, StoppedError
from tests.checkpoint.test_checkpoint import random_tensors, raw

CODES = {
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64", torch.complex64: "C64", torch.float32: "F32",
    torch.int32: "I32", torch.uint32: "U32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16",
    torch.uint16: "U16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
NAME = "model-00001-of-00001.safetensors"


def entries_of(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_shard(folder: Path, tensors: dict[str, torch.Tensor], name: str = NAME) -> ShardRecord:
    with ShardWriter(folder, name, entries_of(tensors)) as shard:
        for tensor_name, tensor in tensors.items():
            shard.write(tensor_name, tensor)
    assert shard.record is not None
    return shard.record


def open_shard(folder: Path) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """In the library's own order (it sorts by dtype and name) the files are equal, byte for byte."""
    tensors = random_tensors(seed=3)
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    ordered = {name: tensors[name] for name in Checkpoint.open(tmp_path).tensors}
    write_shard(tmp_path, ordered)
    assert (tmp_path / NAME).read_bytes() == (tmp_path / "library.safetensors").read_bytes()


@pytest.mark.parametrize("seed", range(8))
def test_any_order_is_loaded_by_the_library_and_by_us(tmp_path: Path, seed: int) -> None:
    tensors = random_tensors(seed)
    names = list(tensors)
    random.Random(seed).shuffle(names)
    shuffled = {name: tensors[name] for name in names}
    record = write_shard(tmp_path, shuffled)
    written = [name for name in open_shard(tmp_path).tensors if tensors[name].numel()]
    assert written == [name for name in names if tensors[name].numel()]
    loaded = load_file(tmp_path / NAME)
    ours = open_shard(tmp_path).read_many(names)
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(loaded[name]) == raw(tensor) == raw(ours[name])
    data = (tmp_path / NAME).read_bytes()
    assert record == ShardRecord(NAME, len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"note": 'quote " and ünïcode'}])
def test_the_size_is_known_to_the_byte_before_writing(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = random_tensors()
    entries = entries_of(tensors)
    # Each count gives a header of another length, and so another padding.
    for count in range(len(entries) + 1):
        with ShardWriter(tmp_path, NAME, entries[:count], metadata) as shard:
            for name, _, _ in entries[:count]:
                shard.write(name, tensors[name])
        size = (tmp_path / NAME).stat().st_size
        assert size == file_size(entries[:count], metadata) == shard.size
        assert len(header_bytes(entries[:count], metadata)) % 8 == 0


def test_aligned_order_puts_every_tensor_at_a_multiple_of_its_element(tmp_path: Path) -> None:
    tensors = random_tensors()
    ordered = {name: tensors[name] for name, _, _ in aligned_order(entries_of(tensors))}
    write_shard(tmp_path, ordered)
    for info in open_shard(tmp_path).tensors.values():
        assert info.start % tensors[info.name].element_size() == 0
    same_width = [("b", "F32", [2]), ("a", "I32", [2])]
    assert aligned_order(same_width) == same_width


def test_tensors_may_be_views_and_bytes_may_come_raw(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.int32).reshape(4, 6)
    exponents = torch.arange(8, dtype=torch.uint8)
    with ShardWriter(
        tmp_path, NAME, [("t", "I32", [6, 4]), ("s", "I32", [4, 2]), ("r", "BF16", [2]), ("e", "F8_E8M0", [8])]
    ) as shard:
        shard.write("t", base.T)
        shard.write("s", base[:, 1:3].requires_grad_(False))
        shard.write("r", memoryview(b"\x80\x3f\x00\x40"))
        shard.write("e", exponents)
    loaded = load_file(tmp_path / NAME)
    assert torch.equal(loaded["t"], base.T) and torch.equal(loaded["s"], base[:, 1:3])
    assert loaded["r"].tolist() == [1.0, 2.0]
    assert torch.equal(loaded["e"].view(torch.uint8), exponents) and loaded["e"].dtype == torch.float8_e8m0fnu


def test_large_tensors_are_hashed_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "OVERLAP_BYTES", 1000)
    monkeypatch.setattr(writer, "WRITE_BYTES", 777)
    generator = torch.Generator().manual_seed(5)
    tensors = {f"w{i}": torch.randn(101 * i + 1, generator=generator) for i in range(12)}
    record = write_shard(tmp_path, tensors)
    assert record.sha256 == sha256_file(tmp_path / NAME) == hashlib.sha256((tmp_path / NAME).read_bytes()).hexdigest()
    loaded = load_file(tmp_path / NAME)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path, NAME, [("a", "U8", [2]), ("b", "U8", [2])])
    shard.write("a", b"aa")
    assert [path.name for path in tmp_path.iterdir()] == [f".{NAME}.tmp"]
    shard.write("b", b"bb")
    record = shard.close()
    assert shard.close() == record
    shard.abort()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_an_exception_drops_the_file_and_keeps_the_one_before(tmp_path: Path) -> None:
    write_shard(tmp_path, {"a": torch.tensor([1.0])})
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, NAME, [("a", "F32", [1])]) as shard:
        shard.write("a", torch.tensor([2.0]))
        raise KeyboardInterrupt
    assert shard.record is None
    assert [path.name for path in tmp_path.iterdir()] == [NAME] and (tmp_path / NAME).read_bytes() == before


MISUSES: dict[str, tuple[Callable[[ShardWriter], object], str]] = {
    "another name": (lambda shard: shard.write("b", torch.zeros(2, 3)), "'b' comes where 'a' was announced"),
    "another dtype": (lambda shard: shard.write("a", torch.zeros(2, 3, dtype=torch.float64)), "torch.float64"),
    "another shape": (lambda shard: shard.write("a", torch.zeros(3, 2)), r"\(3, 2\) comes where F32 \(2, 3\)"),
    "too few bytes": (lambda shard: shard.write("a", bytes(23)), "23 bytes come where .* takes 24"),
    "too many bytes": (lambda shard: shard.write("a", bytes(25)), "25 bytes come where .* takes 24"),
    "closed too early": (lambda shard: shard.close(), "closed before 'a' was written"),
}


@pytest.mark.parametrize(("misuse", "phrase"), MISUSES.values(), ids=MISUSES)
def test_what_was_not_announced_is_refused(
    tmp_path: Path, misuse: Callable[[ShardWriter], object], phrase: str
) -> None:
    with pytest.raises(ValueError, match=phrase), ShardWriter(tmp_path, NAME, [("a", "F32", [2, 3])]) as shard:
        misuse(shard)
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_too_many_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="after the last of 1 tensors"),
        ShardWriter(tmp_path, NAME, [("a", "U8", [1])]) as shard,
    ):
        shard.write("a", b"a")
        shard.write("b", b"b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entries", "phrase"),
    [
        ([("a", "U8", [1]), ("a", "U8", [1])], "'a' is given twice"),
        ([("__metadata__", "U8", [1])], "reserved"),
        ([("a", "INT4", [1])], "cannot write dtype 'INT4'"),
        ([("a", "U8", [-1])], "negative size"),
    ],
)
def test_a_layout_that_makes_no_file_is_refused(tmp_path: Path, entries: list[Entry], phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        ShardWriter(tmp_path, NAME, entries)
    with pytest.raises(ValueError, match=phrase):
        file_size(entries)
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """Stands in for the system calls of a disk with `free` bytes left, which writes in small parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, announced: int | None = None) -> None:
        self.free = free
        self._write = os.write
        # What is announced may be more than what a write finds: other programs write too.
        self.announced = announced
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr("m3quant.checkpoint.system.free_bytes", self.free_bytes)

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.free == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self._write(descriptor, data[: min(self.free, 100)])
        self.free -= count
        return count

    def free_bytes(self, folder: Path) -> int:
        told = self.free if self.announced is None else self.announced
        self.announced = None
        return told


def test_a_disk_without_room_stops_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [("a", "F32", [1000])]
    size = file_size(entries, writer.DEFAULT_METADATA)
    FullDisk(monkeypatch, free=size - 7)
    with pytest.raises(
        StoppedError, match=rf"No space left on device: 7 bytes are missing to write .*{NAME}"
    ) as caught:
        ShardWriter(tmp_path, NAME, entries)
    assert "free space and run the same command again" in str(caught.value) and caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("free", [0, 1, 60, 150, 1000, 4000])
def test_a_disk_that_fills_up_stops_cleanly_and_the_same_write_works_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    write_shard(tmp_path, {"done": torch.tensor([1.0])}, "model-00000.safetensors")
    done = (tmp_path / "model-00000.safetensors").read_bytes()
    tensors = {"a": torch.arange(10.0), "b": torch.arange(1000.0)}
    size = file_size(entries_of(tensors), writer.DEFAULT_METADATA)
    with monkeypatch.context() as patch:
        FullDisk(patch, free, announced=10**9)
        with pytest.raises(StoppedError, match=rf"{size - free} bytes are missing to write .*\({size} bytes\)"):
            write_shard(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["model-00000.safetensors"]
    assert (tmp_path / "model-00000.safetensors").read_bytes() == done
    write_shard(tmp_path, tensors)
    assert torch.equal(load_file(tmp_path / NAME)["b"], tensors["b"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's always full device")
def test_a_real_no_space_error_of_the_kernel_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def open_full(path: object, flags: int, mode: int = 0o777) -> int:
        os.close(real_open(path, flags, mode))  # type: ignore[arg-type]
        return real_open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", open_full)
    with pytest.raises(StoppedError, match="No space left on device"):
        ShardWriter(tmp_path, NAME, [("a", "F32", [1000])])
    assert list(tmp_path.iterdir()) == []


def test_a_sync_that_fails_is_no_finished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=f"{NAME} cannot be written: Input/output error"):
        write_shard(tmp_path, {"a": torch.tensor([1.0])})
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_synced_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor: int) -> None:
        calls.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def traced_replace(old: Path, new: Path) -> None:
        calls.append(f"rename {old.name} {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    write_shard(tmp_path, {"a": torch.tensor([1.0])})
    assert calls == [f"fsync .{NAME}.tmp", f"rename .{NAME}.tmp {NAME}", f"fsync {tmp_path.name}"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be written: No such file or directory"):
        ShardWriter(tmp_path / "absent", NAME, [("a", "U8", [1])])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b.safetensors", "/x.safetensors"])
def test_a_path_instead_of_a_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        ShardWriter(tmp_path, name, [("a", "U8", [1])])


KILLED = """
import os, signal, sys
from m3quant.checkpoint import ShardWriter
shard = ShardWriter(sys.argv[1], "model.safetensors", [("a", "U8", [3000]), ("b", "U8", [3000])])
shard.write("a", bytes(3000))
if sys.argv[2] == "written":
    shard.write("b", bytes(3000))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["half", "written"])
def test_a_killed_writer_leaves_nothing_that_counts_and_is_simply_run_again(tmp_path: Path, when: str) -> None:
    write_shard(tmp_path, {"kept": torch.tensor([1.0])}, "kept.safetensors")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], check=False)
    assert done.returncode == -signal.SIGKILL
    checkpoint = open_shard(tmp_path)
    assert list(checkpoint.tensors) == ["kept"]
    assert checkpoint.skipped_files == {".model.safetensors.tmp": "hidden file"}
    write_shard(tmp_path, {"a": torch.ones(3)}, "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "kept.safetensors", "model.safetensors"]


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.json"
    value = {"b": [1, 2.5, None], "a": "ünï"}
    write_json_atomic(path, value)
    text = path.read_bytes()
    assert text == json_bytes(value) and json.loads(text) == value and list(json.loads(text)) == ["b", "a"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"x": float("nan")})
    for free in itertools.chain(range(3), [50]):
        with monkeypatch.context() as patch:
            FullDisk(patch, free, announced=10**9)
            with pytest.raises(StoppedError, match="run the same command again"):
                write_json_atomic(path, {"long": "x" * 100})
        assert path.read_bytes() == text and list(tmp_path.iterdir()) == [path]
    write_bytes_atomic(path, b"")
    assert path.read_bytes() == b""


def test_hashing_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be read: No such file"):
        sha256_file(tmp_path / "absent")
