"""The safetensors header: parsed strictly, and laid out to the byte before anything is written.

Format: https://huggingface.co/docs/safetensors/index#format - 8 bytes little-endian header length, the header as a JSON
object padded with spaces, then the tensors' bytes, which tile the rest of the file without gap or overlap.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import CheckpointError
from .strict_json import described, parse_object, shown

PREFIX_BYTES = 8
# The same limit as the safetensors library (MAX_HEADER_SIZE in safetensors/src/tensor.rs).
MAX_HEADER_BYTES = 100_000_000
# torch refuses sizes and counts beyond a signed 64-bit integer, and most of its operators more than 64 dimensions.
MAX_COUNT = 2**63 - 1
MAX_RANK = 64

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
# Part of the format, but below one byte. Packed INT4 is stored as I32 and packed FP4 as U8, so these are rare.
SUB_BYTE_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2"})

DAMAGED = "The file is damaged or incomplete: copy or download it again."

Entry: TypeAlias = tuple[str, str, Sequence[int]]
"""Name, safetensors dtype code, shape: what a plan knows of an output tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. `start` and `end` are byte offsets in the shard's file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A valid header. `tensors` are in the order of their bytes; `data_start` is the file offset of the first one."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Length in bytes of the JSON header, from the file's first 8 bytes. `where` names the file in errors.

    Raises CheckpointError if the file cannot hold such a header.
    """
    if file_size < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        raise CheckpointError(
            f"{where} is {file_size} bytes long, too short for a safetensors file, which begins with an 8-byte length. "
            f"{DAMAGED}"
        )
    length: int = struct.unpack("<Q", prefix[:PREFIX_BYTES])[0]
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where} announces a header of {length} bytes, more than the {MAX_HEADER_BYTES} that safetensors allows: "
            f"it is not a safetensors file, or it is damaged. Copy or download it again."
        )
    if PREFIX_BYTES + length > file_size:
        raise CheckpointError(
            f"{where} announces a header of {length} bytes, but only {file_size - PREFIX_BYTES} bytes follow: "
            f"the file is truncated. Copy or download it again."
        )
    return length


def parse_header(raw: bytes, file_size: int, shard: str, where: str) -> Header:
    """Validate a header and the file's length against it.

    raw: the header's JSON bytes, without the 8-byte length; file_size: bytes of the whole file;
    shard: the file name recorded in each TensorInfo; where: names the file in errors.
    Raises CheckpointError naming the file, the tensor and the reason.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: the header does not begin with '{{'. {DAMAGED}")
    parsed = parse_object(raw, f"{where}: the header", DAMAGED)
    metadata = _metadata(parsed.pop("__metadata__", None), where)
    data_start = PREFIX_BYTES + len(raw)
    data_bytes = file_size - data_start
    tensors = [_tensor(name, entry, shard, data_start, where) for name, entry in parsed.items()]
    tensors.sort(key=lambda info: (info.start, info.end))

    covered = 0
    previous: TensorInfo | None = None
    for info in tensors:
        start, end = info.start - data_start, info.end - data_start
        if end > data_bytes:
            raise CheckpointError(
                f"{where}: tensor {shown(info.name)} ends at byte {end} of the data, but the file holds only "
                f"{data_bytes}: the file is truncated. Copy or download it again."
            )
        if start != covered:
            fault = "overlaps" if start < covered else f"leaves a hole of {start - covered} bytes after"
            before = "the header" if previous is None else f"tensor {shown(previous.name)}"
            raise CheckpointError(
                f"{where}: tensor {shown(info.name)} begins at byte {start} of the data and {fault} {before}, "
                f"which ends at byte {covered}. {DAMAGED}"
            )
        covered, previous = end, info
    if covered != data_bytes:
        raise CheckpointError(
            f"{where} is {data_bytes - covered} bytes longer than its header says ({data_bytes} bytes of data, "
            f"{covered} described). {DAMAGED}"
        )
    return Header(tuple(tensors), metadata, data_start)


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{where}: __metadata__ is not an object of strings. {DAMAGED}")
    return value


def _are_counts(values: list[Any]) -> bool:
    # A loop takes a quarter of the time of all() over a generator, and a checkpoint has 140,000 tensors.
    for value in values:  # noqa: SIM110
        # type() and not isinstance(): True is an int, but no size.
        if type(value) is not int or not 0 <= value <= MAX_COUNT:
            return False
    return True


def _refusal(where: str, name: str, reason: str, remedy: str = DAMAGED) -> CheckpointError:
    return CheckpointError(f"{where}: tensor {shown(name)} {reason}. {remedy}")


def _tensor(name: str, entry: Any, shard: str, data_start: int, where: str) -> TensorInfo:
    if not name.isprintable():
        # Such a name (a lone surrogate, a control character) has no place in a state dict, an index or a terminal.
        raise _refusal(where, name, "has a name with unprintable characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refusal(where, name, "is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype in SUB_BYTE_DTYPES:
        raise _refusal(
            where,
            name,
            f"has dtype {dtype}, which has less than one byte per element and which m3quant does not read",
            "Use the BF16 or FP8 checkpoint that this one was made from.",
        )
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _refusal(
            where,
            name,
            f"has the unknown dtype {described(dtype, 40)}",
            f"Known are {', '.join(sorted(DTYPE_BYTES))}; otherwise the file is damaged: copy or download it again.",
        )
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not _are_counts(shape):
        raise _refusal(
            where, name, f"has the shape {described(shape)}, not a list of at most {MAX_RANK} sizes of 0 or more"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_counts(offsets):
        raise _refusal(where, name, f"has data_offsets {described(offsets)}, not two offsets of 0 or more")
    begin, end = offsets
    if begin > end:
        raise _refusal(where, name, f"begins at byte {begin} of the data, after its end at byte {end}")
    # Zero sizes are left out here, because torch computes strides as if they were 1.
    if math.prod([size or 1 for size in shape]) > MAX_COUNT:
        raise _refusal(where, name, f"has the shape {described(shape)}, which has more elements than can be counted")
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if needed != end - begin:
        raise _refusal(where, name, f"needs {needed} bytes as {dtype} {shape}, but data_offsets give it {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), shard, data_start + begin, data_start + end)


def entry_bytes(entry: Entry) -> int:
    """Bytes of one tensor. Raises ValueError for a dtype that cannot be written or a negative size."""
    name, dtype, shape = entry
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r}: cannot write dtype {dtype!r}; known are {', '.join(sorted(DTYPE_BYTES))}")
    if any(size < 0 for size in shape):
        raise ValueError(f"tensor {name!r}: negative size in shape {tuple(shape)}")
    return math.prod(shape) * DTYPE_BYTES[dtype]


def header_bytes(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Everything before the first tensor's bytes: the 8-byte length and the padded JSON header.

    Compact JSON in the given order, space-padded to a multiple of 8 bytes: what the safetensors library writes for
    tensors in that order. Raises ValueError for a name given twice, an unknown dtype, or a header above the limit.
    """
    table: dict[str, Any] = {}
    if metadata is not None:
        table["__metadata__"] = dict(metadata)
    offset = 0
    for entry in entries:
        name, dtype, shape = entry
        if name in table or name == "__metadata__":
            raise ValueError(f"tensor name {name!r} is given twice, or is reserved")
        end = offset + entry_bytes(entry)
        table[name] = {"dtype": dtype, "shape": [int(size) for size in shape], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes is above the limit of {MAX_HEADER_BYTES}; use more shards")
    return struct.pack("<Q", len(text)) + text


def file_size(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> int:
    """Exact bytes of the safetensors file that `ShardWriter` writes for these entries and metadata."""
    listed = list(entries)
    return len(header_bytes(listed, metadata)) + sum(entry_bytes(entry) for entry in listed)


def aligned_order(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with the widest dtypes first, otherwise in the given order.

    Every tensor then begins at a multiple of its element size, as in files of the safetensors library, so that a loader
    may use the mapped file in place.
    """
    return sorted(entries, key=lambda entry: -DTYPE_BYTES[entry[1]])
