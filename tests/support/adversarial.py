"""Broken checkpoints, one builder each, with the words that the refusal must contain.

Each builder gets an empty folder and leaves a checkpoint in it which is sound but for the one fault in its name.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
PAYLOADS = {
    FIRST: {"model.a": ("F32", [2, 3], bytes(range(24))), "model.b": ("BF16", [4], bytes(range(100, 108)))},
    SECOND: {"model.c": ("U8", [5], b"hello"), "model.d": ("I64", [], bytes(range(8)))},
}


def table(tensors: dict[str, tuple[str, list[int], bytes]]) -> dict[str, Any]:
    """The header of these tensors as a JSON-able dict, in their order."""
    result: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        result[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    return result


def pack(header: dict[str, Any] | bytes, payload: bytes, length: int | None = None) -> bytes:
    """A safetensors file from a header (JSON-able or raw), a payload, and a header length which may be a lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + payload


def payload_of(shard: str) -> bytes:
    return b"".join(data for _, _, data in PAYLOADS[shard].values())


def good_files(index: bool = True) -> dict[str, bytes]:
    """A sound checkpoint of two shards, by file name."""
    files = {shard: pack(table(tensors), payload_of(shard)) for shard, tensors in PAYLOADS.items()}
    files[CONFIG] = b'{"architectures": ["MiniMaxM2ForCausalLM"]}'
    if index:
        weight_map = {name: shard for shard, tensors in PAYLOADS.items() for name in tensors}
        total = sum(len(payload_of(shard)) for shard in PAYLOADS)
        files[INDEX] = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}).encode()
    return files


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[Path], None]
    phrases: tuple[str, ...]


CASES: list[Case] = []


def case(*phrases: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(build: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES.append(Case(build.__name__, build, phrases))
        return build

    return register


def with_header(folder: Path, change: Callable[[dict[str, Any]], None], payload: bytes | None = None) -> None:
    """The good checkpoint, its first shard's header changed and given its right length."""
    header = table(PAYLOADS[FIRST])
    change(header)
    write(folder, good_files() | {FIRST: pack(header, payload_of(FIRST) if payload is None else payload)})


def with_first(folder: Path, data: bytes) -> None:
    write(folder, good_files() | {FIRST: data})


def with_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    files = good_files()
    index = json.loads(files[INDEX])
    change(index)
    write(folder, files | {INDEX: json.dumps(index).encode()})


# --- the file and its header


@case(FIRST, "0 bytes long", "too short")
def empty_file(folder: Path) -> None:
    with_first(folder, b"")


@case(FIRST, "5 bytes long", "too short")
def shorter_than_its_length(folder: Path) -> None:
    with_first(folder, good_files()[FIRST][:5])


@case(FIRST, "the file is truncated")
def truncated_header(folder: Path) -> None:
    with_first(folder, good_files()[FIRST][:60])


@case(FIRST, "tensor 'model.b'", "the file is truncated")
def truncated_payload(folder: Path) -> None:
    with_first(folder, good_files()[FIRST][:-3])


@case(FIRST, "4 bytes longer than its header says")
def trailing_bytes(folder: Path) -> None:
    with_first(folder, good_files()[FIRST] + b"tail")


@case(FIRST, "more than the 100000000 that safetensors allows")
def huge_header_length(folder: Path) -> None:
    with_first(folder, pack(table(PAYLOADS[FIRST]), payload_of(FIRST), 2**63))


@case(FIRST, "99999999 bytes", "the file is truncated")
def header_length_beyond_the_file(folder: Path) -> None:
    with_first(folder, pack(table(PAYLOADS[FIRST]), payload_of(FIRST), 99_999_999))


@case(FIRST, "not usable JSON")
def header_length_too_small(folder: Path) -> None:
    with_first(folder, pack(table(PAYLOADS[FIRST]), payload_of(FIRST), 40))


@case(FIRST, "the header")
def header_length_into_the_payload(folder: Path) -> None:
    raw = json.dumps(table(PAYLOADS[FIRST])).encode()
    with_first(folder, pack(raw, payload_of(FIRST), len(raw) + 4))


@case(FIRST, "does not begin with '{'")
def header_is_a_list(folder: Path) -> None:
    with_first(folder, pack(b"[1, 2]  ", b""))


@case(FIRST, "does not begin with '{'")
def a_pickle_named_safetensors(folder: Path) -> None:
    with_first(folder, struct.pack("<Q", 16) + b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K" + bytes(64))


@case(FIRST, "not UTF-8")
def header_is_not_utf8(folder: Path) -> None:
    with_first(folder, pack(b'{"\xff\xfe": 1}', b""))


@case(FIRST, "nested too deeply")
def header_nested_deeply(folder: Path) -> None:
    with_first(folder, pack(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""))


@case(FIRST, "'model.a' occurs twice")
def duplicate_name_in_one_header(folder: Path) -> None:
    raw = json.dumps(table(PAYLOADS[FIRST])).replace("model.b", "model.a").encode()
    with_first(folder, pack(raw, payload_of(FIRST)))


@case(FIRST, "'shape' occurs twice")
def duplicate_key_in_an_entry(folder: Path) -> None:
    raw = json.dumps(table(PAYLOADS[FIRST])).replace('"shape": [4]', '"shape": [4], "shape": [4]').encode()
    with_first(folder, pack(raw, payload_of(FIRST)))


@case(FIRST, "NaN is not JSON")
def header_with_nan(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(shape=[float("nan"), 3]))


@case(FIRST, "__metadata__ is not an object of strings")
def metadata_with_a_number(folder: Path) -> None:
    with_header(folder, lambda header: header["__metadata__"].update(version=1))


# --- one tensor's entry


@case(FIRST, "'model.a'", "exactly dtype, shape and data_offsets")
def entry_without_dtype(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].pop("dtype"))


@case(FIRST, "'model.a'", "exactly dtype, shape and data_offsets")
def entry_with_an_extra_key(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(stride=[3, 1]))


@case(FIRST, "'model.a'", "exactly dtype, shape and data_offsets")
def entry_is_a_number(folder: Path) -> None:
    with_header(folder, lambda header: header.update({"model.a": 7}))


@case(FIRST, "'model.a'", "unknown dtype 'Q4_K'")
def unknown_dtype(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(dtype="Q4_K"))


@case(FIRST, "'model.a'", "unknown dtype")
def dtype_is_a_list(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(dtype=["F32"]))


@case(FIRST, "'model.a'", "F4", "less than one byte per element", "Use the BF16 or FP8 checkpoint")
def sub_byte_dtype(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(dtype="F4", shape=[8, 6]))


@case(FIRST, "'model.a'", "needs 48 bytes as F64 [2, 3], but data_offsets give it 24")
def dtype_of_another_width(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(dtype="F64"))


@case(FIRST, "'model.a'", "has the shape [-2, -3], not a list")
def negative_shape(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(shape=[-2, -3]))


@case(FIRST, "'model.a'", "has the shape [2.0, 3], not a list")
def fractional_shape(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(shape=[2.0, 3]))


@case(FIRST, "'model.a'", "has the shape [True, 6], not a list")
def boolean_shape(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(shape=[True, 6]))


@case(FIRST, "'model.a'", "has the shape 6, not a list")
def shape_is_a_number(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(shape=6))


@case(FIRST, "'model.a'", "has the shape [[[[[", "not a list of at most 64")
def shape_nested_deeply(folder: Path) -> None:
    raw = json.dumps(table(PAYLOADS[FIRST])).replace("[2, 3]", "[" * 600 + "]" * 600).encode()
    with_first(folder, pack(raw, payload_of(FIRST)))


@case(FIRST, "'model.a'", "at most 64 sizes")
def too_many_dimensions(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(shape=[2, 3] + [1] * 100))


@case(FIRST, "'model.a'", "more elements than can be counted")
def shape_that_overflows_64_bits(folder: Path) -> None:
    # 2**33 * 2**33 * 4 is 0 in 64-bit arithmetic, and 6 elements more would make it fit.
    with_header(folder, lambda header: header["model.a"].update(shape=[2**33, 2**33]))


@case(FIRST, "'model.a'", "more elements than can be counted")
def empty_shape_whose_strides_overflow(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["model.a"].update(shape=[0, 2**40, 2**40], data_offsets=[0, 0])

    with_header(folder, change)


@case(FIRST, "'model.a'", "needs 28 bytes as F32 [7], but data_offsets give it 24")
def shape_larger_than_its_bytes(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(shape=[7]))


@case(FIRST, "'model.a'", "data_offsets", "not two offsets")
def three_offsets(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(data_offsets=[0, 24, 24]))


@case(FIRST, "'model.a'", "data_offsets", "not two offsets")
def negative_offset(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(data_offsets=[-24, 0]))


@case(FIRST, "'model.a'", "begins at byte 24 of the data, after its end at byte 0")
def reversed_offsets(folder: Path) -> None:
    with_header(folder, lambda header: header["model.a"].update(data_offsets=[24, 0]))


@case(FIRST, "'model.b'", "overlaps tensor 'model.a', which ends at byte 24")
def overlapping_tensors(folder: Path) -> None:
    with_header(folder, lambda header: header["model.b"].update(data_offsets=[20, 28]), bytes(28))


@case(FIRST, "'model.b'", "overlaps tensor 'model.a'")
def two_tensors_on_the_same_bytes(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["model.b"].update(dtype="F32", shape=[6], data_offsets=[0, 24])

    with_header(folder, change, bytes(24))


@case(FIRST, "'model.b'", "leaves a hole of 8 bytes after tensor 'model.a'")
def hole_between_tensors(folder: Path) -> None:
    with_header(folder, lambda header: header["model.b"].update(data_offsets=[32, 40]), bytes(40))


@case(FIRST, "'model.a'", "leaves a hole of 8 bytes after the header")
def hole_before_the_first_tensor(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["model.a"].update(data_offsets=[8, 32])
        header["model.b"].update(data_offsets=[32, 40])

    with_header(folder, change, bytes(40))


@case(FIRST, "unprintable characters")
def name_with_a_terminal_escape(folder: Path) -> None:
    with_header(folder, lambda header: header.update({"\x1b[2Jgone": header.pop("model.a")}))


@case(FIRST, "unprintable characters")
def name_with_a_lone_surrogate(folder: Path) -> None:
    with_header(folder, lambda header: header.update({"\ud800": header.pop("model.a")}))


# --- several shards and the index


@case("'model.a'", "is in two shards", FIRST, "model-00003.safetensors")
def duplicate_name_in_two_shards(folder: Path) -> None:
    files = good_files(index=False)
    write(folder, files | {"model-00003.safetensors": files[FIRST]})


@case("no shard of", "'model.zzz'", SECOND)
def index_names_an_absent_tensor(folder: Path) -> None:
    with_index(folder, lambda index: index["weight_map"].update({"model.zzz": SECOND}))


@case(INDEX, "absent from", SECOND, "'model.c'")
def shard_is_missing(folder: Path) -> None:
    files = good_files()
    del files[SECOND]
    write(folder, files)


@case("no model.safetensors.index.json", "1 is absent", SECOND)
def numbered_shard_is_missing_without_an_index(folder: Path) -> None:
    files = good_files(index=False)
    del files[SECOND]
    write(folder, files)


@case(INDEX, "'model.c'", f"is in {FIRST}", f"it is in {SECOND}")
def index_names_the_wrong_shard(folder: Path) -> None:
    with_index(folder, lambda index: index["weight_map"].update({"model.c": FIRST}))


@case(INDEX, "does not name the tensor 'model.d'", SECOND)
def tensor_not_in_the_index(folder: Path) -> None:
    with_index(folder, lambda index: index["weight_map"].pop("model.d"))


@case("extra.safetensors", "does not name", "would be lost")
def shard_not_in_the_index(folder: Path) -> None:
    extra = pack(table({"model.e": ("U8", [1], b"e")}), b"e")
    write(folder, good_files() | {"extra.safetensors": extra})


@case(INDEX, "'../elsewhere.safetensors'", "not the plain name")
def index_escapes_upwards(folder: Path) -> None:
    (folder.parent / "elsewhere.safetensors").write_bytes(good_files()[FIRST])
    with_index(folder, lambda index: index["weight_map"].update({"model.a": "../elsewhere.safetensors"}))


@case(INDEX, "'/etc/x.safetensors'", "not the plain name")
def index_with_an_absolute_path(folder: Path) -> None:
    with_index(folder, lambda index: index["weight_map"].update({"model.a": "/etc/x.safetensors"}))


@case(INDEX, "not the plain name")
def index_with_a_number_for_a_shard(folder: Path) -> None:
    with_index(folder, lambda index: index["weight_map"].update({"model.a": 1}))


@case(INDEX, "'weights.bin'", "not the plain name")
def index_names_a_pickle(folder: Path) -> None:
    with_index(folder, lambda index: index["weight_map"].update({"model.a": "weights.bin"}))


@case(INDEX, "no weight_map")
def index_without_weight_map(folder: Path) -> None:
    with_index(folder, lambda index: index.pop("weight_map"))


@case(INDEX, "no weight_map")
def index_with_an_empty_weight_map(folder: Path) -> None:
    with_index(folder, lambda index: index["weight_map"].clear())


@case(INDEX, "not usable JSON")
def truncated_index(folder: Path) -> None:
    files = good_files()
    write(folder, files | {INDEX: files[INDEX][:-20]})


@case(INDEX, "'model.a' occurs twice")
def index_naming_a_tensor_twice(folder: Path) -> None:
    files = good_files()
    write(folder, files | {INDEX: files[INDEX].replace(b"model.b", b"model.a")})


# --- the folder


@case("no config.json")
def no_config(folder: Path) -> None:
    files = good_files()
    del files[CONFIG]
    write(folder, files)


@case(CONFIG, "not usable JSON")
def truncated_config(folder: Path) -> None:
    write(folder, good_files() | {CONFIG: b'{"architectures": ["Mini'})


@case(CONFIG, "holds a JSON list, not an object")
def config_is_a_list(folder: Path) -> None:
    write(folder, good_files() | {CONFIG: b"[]"})


@case(CONFIG, "not UTF-8")
def config_is_not_utf8(folder: Path) -> None:
    write(folder, good_files() | {CONFIG: b'{"a": "\xff"}'})


@case("no *.safetensors file")
def no_shards(folder: Path) -> None:
    write(folder, {CONFIG: good_files()[CONFIG]})


@case("hold no tensor")
def shards_without_a_tensor(folder: Path) -> None:
    write(folder, {CONFIG: good_files()[CONFIG], "model.safetensors": pack({}, b"")})


@case(FIRST, "absent from")
def shard_is_a_folder(folder: Path) -> None:
    files = good_files()
    del files[FIRST]
    write(folder, files)
    (folder / FIRST).mkdir()


@case(FIRST, "not a regular file")
def shard_is_a_pipe(folder: Path) -> None:
    files = good_files()
    del files[FIRST]
    write(folder, files)
    os.mkfifo(folder / FIRST)


@case(FIRST, "is a link to", "Put the file itself there")
def shard_is_a_broken_link(folder: Path) -> None:
    files = good_files()
    del files[FIRST]
    write(folder, files)
    (folder / FIRST).symlink_to("../blobs/0123abcd")
