"""Checkpoint.open: headers only, strict; reads: exactly the bytes on disk, in tensors of the stored dtype."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m3quant.checkpoint import Checkpoint, parse_header, reader
from m3quant.checkpoint.index import check_numbering
from m3quant.checkpoint.listing import classify
from m3quant.errors import CheckpointError
from tests.support import adversarial, hostile


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """One tensor of every dtype that safetensors and torch share, with random bits."""
    generator = torch.Generator().manual_seed(seed)

    def bits(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    wide = [torch.float64, torch.int64, torch.uint64, torch.complex64, torch.float32, torch.int32, torch.uint32]
    narrow = [torch.bfloat16, torch.float16, torch.int16, torch.uint16, torch.int8, torch.uint8]
    floats8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
    tensors = {f"m.{dtype}".replace("torch.", ""): bits(240).view(dtype) for dtype in wide + narrow + floats8}
    tensors = {name: tensor.reshape(2, 3, -1) for name, tensor in tensors.items()}
    tensors["m.e8m0"] = bits(12).view(torch.float8_e8m0fnu)
    tensors["m.bool"] = bits(7) > 127
    tensors["m.scalar"] = torch.tensor(-1.5)
    tensors["m.empty"] = torch.empty(0, 4, dtype=torch.bfloat16)
    tensors["m.ünï cödé"] = bits(3)
    return tensors


def save(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 2, index: bool = True) -> None:
    """Write tensors with the safetensors library, dealt out over shards."""
    folder.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "config.json").write_text('{"model_type": "minimax_m2", "eps": 1e-06}')
    if index:
        total = sum(tensor.nbytes for tensor in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("index", [True, False])
def test_every_dtype_reads_back_bit_for_bit(tmp_path: Path, index: bool) -> None:
    tensors = random_tensors()
    save(tmp_path, tensors, index=index)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, read in checkpoint.read_many(tensors).items():
        expected = tensors[name]
        # E8M0 exponents come as uint8, whatever label the file gives them.
        dtype = torch.uint8 if expected.dtype == torch.float8_e8m0fnu else expected.dtype
        assert (read.dtype, read.shape) == (dtype, expected.shape)
        assert raw(read) == raw(expected) == checkpoint.read_bytes(name)
        info = checkpoint.tensors[name]
        assert (info.shape, info.nbytes, info.numel) == (tuple(expected.shape), expected.nbytes, expected.numel())
    assert checkpoint.local and checkpoint.warnings == []
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_names_are_ordered_by_shard_and_offset_and_read_many_as_asked(tmp_path: Path) -> None:
    save(tmp_path, random_tensors(), shards=3)
    checkpoint = Checkpoint.open(tmp_path)
    places = [(info.shard, info.start, info.end) for info in checkpoint.tensors.values()]
    assert places == sorted(places)
    asked = ["m.uint8", "m.float64", "m.bfloat16", "m.uint8"]
    assert list(checkpoint.read_many(asked)) == ["m.uint8", "m.float64", "m.bfloat16"]


def test_every_tensor_has_its_own_memory(tmp_path: Path) -> None:
    save(tmp_path, random_tensors(), shards=1)
    checkpoint = Checkpoint.open(tmp_path)
    tensors = checkpoint.read_many(checkpoint.tensors)
    pointers = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    assert len(set(pointers)) == len(pointers)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())


def test_large_reads_are_split_over_threads_without_changing_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PIECE_BYTES", 4096)
    monkeypatch.setattr(reader, "PARALLEL_BYTES", 8192)
    monkeypatch.setattr(reader, "MAX_BUFFERS", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    generator = torch.Generator().manual_seed(1)
    sizes = [100_003, 5, 1, 4096, 4097, 12_288, *[2] * 20]
    tensors = {
        f"w{i:02d}": torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for i, n in enumerate(sizes)
    }
    save(tmp_path, tensors, shards=3)
    checkpoint = Checkpoint.open(tmp_path)
    some = list(tensors)[1::2]
    for names in (list(tensors), some, list(reversed(some))):
        for name, read in checkpoint.read_many(names).items():
            assert torch.equal(read, tensors[name]), name
    assert checkpoint.read_bytes("w00") == raw(tensors["w00"])


def test_a_read_that_the_kernel_cuts_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors()
    save(tmp_path, tensors)
    checkpoint = Checkpoint.open(tmp_path)

    def at_most_seven_bytes(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        data = os.pread(descriptor, min(7, buffers[0].nbytes), offset)
        buffers[0][: len(data)] = data
        return len(data)

    monkeypatch.setattr(os, "preadv", at_most_seven_bytes)
    assert all(raw(read) == raw(tensors[name]) for name, read in checkpoint.read_many(tensors).items())


def test_tensors_at_unaligned_offsets_are_read(tmp_path: Path) -> None:
    payload = b"abc" + torch.tensor([1.5, -2.5]).numpy().tobytes()
    header = adversarial.table({"a": ("U8", [3], payload[:3]), "b": ("F32", [2], payload[3:])})
    adversarial.write(tmp_path, {"config.json": b"{}", "model.safetensors": adversarial.pack(header, payload)})
    assert Checkpoint.open(tmp_path).read("b").tolist() == [1.5, -2.5]


def test_opening_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 40 * 2**30
    header = adversarial.pack({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b"")
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    ends: list[int] = []
    pread, preadv = os.pread, os.preadv

    def counted_pread(descriptor: int, count: int, offset: int) -> bytes:
        ends.append(offset + count)
        return pread(descriptor, count, offset)

    def counted_preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        ends.append(offset + sum(buffer.nbytes for buffer in buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pread", counted_pread)
    monkeypatch.setattr(os, "preadv", counted_preadv)
    assert Checkpoint.open(tmp_path).nbytes == size
    assert max(ends) == len(header)


def test_links_to_shards_as_in_the_hub_cache_are_followed(tmp_path: Path) -> None:
    tensors = random_tensors()
    save(tmp_path / "direct", tensors)
    snapshot = hostile.cached(tmp_path / "direct", tmp_path / "hub")
    linked, direct = Checkpoint.open(snapshot), Checkpoint.open(tmp_path / "direct")
    assert torch.equal(linked.read("m.int64"), tensors["m.int64"])
    assert linked.fingerprint() == direct.fingerprint()


def test_the_fingerprint_follows_headers_config_and_index(tmp_path: Path) -> None:
    save(tmp_path, random_tensors(seed=1))
    first = Checkpoint.open(tmp_path).fingerprint()
    assert Checkpoint.open(tmp_path).fingerprint() == first
    seen = {first}
    for name, old, new in [
        ("config.json", "1e-06", "1e-05"),
        ("model.safetensors.index.json", '"weight_map"', ' "weight_map"'),
    ]:
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(old, new))
        seen.add(Checkpoint.open(tmp_path).fingerprint())
    save(tmp_path, random_tensors(seed=1) | {"m.scalar": torch.tensor(2, dtype=torch.int32)})
    seen.add(Checkpoint.open(tmp_path).fingerprint())
    assert len(seen) == 4


def test_other_files_are_listed_and_skipped_ones_say_why(tmp_path: Path) -> None:
    save(tmp_path, random_tensors())
    for name in ["tokenizer.json", "README.md", "code/modeling.py", "images/a.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"this is {name}")
    left_out = [".gitattributes", "pytorch_model.bin", "original/consolidated.safetensors", "x.safetensors.index.json"]
    for name in [*left_out, ".git/config", "__pycache__/modeling.pyc"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("left out")
    (tmp_path / "elsewhere").symlink_to("/usr")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.other_files == ["README.md", "code/modeling.py", "images/a.png", "tokenizer.json"]
    assert checkpoint.file_bytes("code/modeling.py") == b"this is code/modeling.py"
    assert checkpoint.file_bytes("config.json") == checkpoint.config_text
    assert set(checkpoint.skipped_files) == {*left_out, ".git/", "__pycache__/", "elsewhere/"}
    assert "another format" in checkpoint.skipped_files["pytorch_model.bin"]
    with pytest.raises(CheckpointError, match=r"no file 'pytorch_model\.bin'"):
        checkpoint.file_bytes("pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no file '\.\./secret'"):
        checkpoint.file_bytes("../secret")


def test_a_wrong_total_size_is_a_warning(tmp_path: Path) -> None:
    adversarial.with_index(tmp_path, lambda index: index["metadata"].update(total_size=1))
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.warnings) == 1 and "total_size 1, but the tensors take 45 bytes" in checkpoint.warnings[0]


@pytest.mark.parametrize("total_size", [45, None, "45"])
def test_a_total_size_that_is_right_or_no_number_is_no_warning(tmp_path: Path, total_size: object) -> None:
    adversarial.with_index(tmp_path, lambda index: index["metadata"].update(total_size=total_size))
    assert Checkpoint.open(tmp_path).warnings == []


@pytest.mark.parametrize("case", adversarial.CASES, ids=lambda case: case.name)
def test_a_broken_checkpoint_is_refused_with_the_reason(tmp_path: Path, case: adversarial.Case) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    case.build(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    text = str(caught.value)
    assert [phrase for phrase in case.phrases if phrase not in text] == [], text
    assert "\x1b" not in text and text.endswith("."), text


def numbered(*numbers: int, count: int = 3) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in numbers]


@pytest.mark.parametrize("numbers", [(1, 2, 3), (0, 1, 2)], ids=["from 1", "from 0"])
def test_a_whole_set_of_numbered_shards_needs_no_index(numbers: tuple[int, ...]) -> None:
    check_numbering([*numbered(*numbers), "other.safetensors"], "here")


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((1, 3), r"1 is absent: first model-00002-of-00003.safetensors\."),
        ((0, 2), r"1 is absent: first model-00001-of-00003.safetensors\."),
        ((0,), r"2 are absent: first model-00001"),
        ((3,), r"2 are absent: first model-00001"),
        ((1, 2), r"1 is absent: model-00000-of-00003.safetensors or model-00003-of-00003.safetensors\."),
        ((2,), r"2 are absent: model-00000-of-00003.safetensors or model-00003-of-00003.safetensors and model-00001"),
        (
            (0, 1, 2, 3),
            r"model-00003-of-00003.safetensors is one of 4 shards numbered 0 to 3, where the names promise 3",
        ),
        ((0, 3), r"model-00003-of-00003.safetensors is one of 2 shards numbered 0 to 3, where the names promise 3"),
        ((1, 2, 7), r"model-00007-of-00003.safetensors is one of 3 shards numbered 1 to 7"),
    ],
)
def test_absent_shards_are_named_only_where_they_are_known(numbers: tuple[int, ...], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        check_numbering(numbered(*numbers), "here")


def test_nesting_is_refused_at_every_depth() -> None:
    """Also where Python's stack just suffices to parse a value, but not to print it in the refusal."""
    frames = sys.getrecursionlimit()
    for depth in [*range(frames - 120, frames + 10), 100_000]:
        raw = b'{"w":{"dtype":"U8","shape":' + b"[" * depth + b"]" * depth + b',"data_offsets":[0,1]}}'
        with pytest.raises(CheckpointError, match=r"nested too deeply|has the shape"):
            parse_header(raw, 8 + len(raw) + 1, "x.safetensors", "folder/x.safetensors")


def test_the_adversarial_base_is_sound(tmp_path: Path) -> None:
    """What the broken checkpoints are made from opens with and without its index: each is refused for its own fault."""
    for index in (True, False):
        folder = tmp_path / str(index)
        folder.mkdir()
        adversarial.write(folder, adversarial.good_files(index))
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.read_bytes("model.c") == b"hello"
        assert list(checkpoint.tensors) == ["model.a", "model.b", "model.c", "model.d"]


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shorten(path: Path) -> None:
    os.truncate(path, 200)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [grow, touch, Path.unlink, shorten])
def test_a_shard_that_changes_after_opening_is_noticed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    adversarial.write(tmp_path, adversarial.good_files())
    checkpoint = Checkpoint.open(tmp_path)
    change(tmp_path / adversarial.FIRST)
    for read in (checkpoint.read, checkpoint.read_bytes):
        with pytest.raises(CheckpointError, match=rf"{adversarial.FIRST} (has changed|cannot be read)"):
            read("model.b")
    assert checkpoint.read_bytes("model.c") == b"hello"


def test_a_file_cut_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adversarial.write(tmp_path, adversarial.good_files())
    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: 0)
    with pytest.raises(CheckpointError, match=f"{adversarial.FIRST} ended at byte"):
        checkpoint.read("model.a")


def test_a_disk_error_is_put_into_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adversarial.write(tmp_path, adversarial.good_files())
    checkpoint = Checkpoint.open(tmp_path)

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=f"{adversarial.FIRST} cannot be read: Input/output error"):
        checkpoint.read("model.a")


def test_unknown_tensors_are_refused_by_name(tmp_path: Path) -> None:
    adversarial.write(tmp_path, adversarial.good_files())
    checkpoint = Checkpoint.open(tmp_path)
    for read in (checkpoint.read, checkpoint.read_bytes, lambda name: checkpoint.read_many(["model.a", name])):
        with pytest.raises(CheckpointError, match=r"no tensor 'model\.nope'"):
            read("model.nope")


@pytest.mark.parametrize(
    ("where", "revision", "phrase"),
    [
        ("nowhere/at/all", None, "There is no folder nowhere/at/all"),
        ("nowhere", None, "There is no folder nowhere"),
        ("./org/name", None, "There is no folder"),
        ("org/name@", None, "There is no folder org/name@"),
        (Path("org/name"), None, "There is no folder org/name"),
        ("org/name@one", "two", "Two revisions"),
        (__file__, None, "is a file"),
        (Path(__file__).parent, "main", "has no revision 'main'"),
    ],
)
def test_what_is_neither_folder_nor_repo_is_refused(where: str | Path, revision: str | None, phrase: str) -> None:
    with pytest.raises(CheckpointError, match=phrase):
        Checkpoint.open(where, revision)


def test_a_name_that_leads_out_of_the_folder_is_refused() -> None:
    """A listing comes from a server too, and its names become paths when files are carried over."""
    for name in ["../x", "a/../../x", "/etc/passwd", "a\\b", "a\nb", ""]:
        with pytest.raises(CheckpointError, match="no usable name"):
            classify([name], "org/name")


def test_importing_needs_neither_torch_nor_the_hub() -> None:
    code = "import sys, m3quant.checkpoint; print(sorted({'torch', 'numpy', 'huggingface_hub'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
