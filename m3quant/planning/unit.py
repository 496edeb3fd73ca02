"""One step of a conversion: a unit, the tensors that it reads, and what it writes of each. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from ..checkpoint import DTYPE_BYTES, Entry, TensorInfo, aligned_order, entry_bytes, file_size
from ..families import Role
from ..schemes import Scheme
from .source_layouts import SourceTensor

T = TypeVar("T")

SHARD_METADATA = {"format": "pt"}  # transformers refuses shards without it


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written: safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlannedTensor:
    """What happens to one source tensor.

    action: "copy" (byte for byte), "dequantize" (quantized source kept: BF16 out), or "quantize" to `scheme`.
    """

    source: SourceTensor
    role: Role
    action: str
    scheme: Scheme
    reason: str
    outputs: tuple[OutputTensor, ...]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def read(self) -> tuple[TensorInfo, ...]:
        """What is read of the source: all that it stores of a tensor that is copied, else what its values need."""
        return self.source.stored if self.action == "copy" else self.source.parts

    def parts(self, stored: Mapping[str, T]) -> dict[str, T]:
        """This tensor's own of `stored`, by suffix, as `quant.formats.decompress` takes them."""
        return {o.name.removeprefix(f"{self.module}."): stored[o.name] for o in self.outputs}


@dataclass(frozen=True)
class Unit:
    """One shard of the output and one step of the conversion. layer is None for unit 0.

    like: the first unit in which the same happens to tensors of the same names, dtypes and shapes, but for the layer's number; it
    answers for this one, whose own list of tensors is then made when it is read. None where this is the first.
    """

    index: int
    layer: int | None
    shard: str
    tensors: Sequence[PlannedTensor]
    like: Unit | None = None

    @cached_property
    def entries(self) -> list[Entry]:
        """What the shard's header lists, in file order: source order, unless a tensor would start unaligned, which
        safetensors' torch reader refuses (odd sizes only)."""
        entries: list[Entry] = [(o.name, o.dtype, o.shape) for t in self.tensors for o in t.outputs]
        offset = 0
        for entry in entries:
            if offset % DTYPE_BYTES[entry[1]]:
                return aligned_order(entries)
            offset += entry_bytes(entry)
        return entries

    @cached_property
    def bytes_in(self) -> int:
        return self.like.bytes_in if self.like else sum(t.source.stored_bytes for t in self.tensors)

    @cached_property
    def bytes_out(self) -> int:
        return self.like.bytes_out if self.like else file_size(self.entries, SHARD_METADATA)

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of its output tensors, without the header."""
        return self.like.tensor_bytes if self.like else sum(nbytes(o) for t in self.tensors for o in t.outputs)

    @cached_property
    def index_bytes(self) -> int:
        """Bytes of its lines in the index, with a comma and a line end each."""
        if self.like:
            return self.like.index_bytes
        line = len('    "": "",\n') + len(self.shard)
        names = [o.name for t in self.tensors for o in t.outputs]
        return line * len(names) + sum(len(json.dumps(name)) - len('""') for name in names)

    @property
    def label(self) -> str:
        return "embeddings, head and the rest" if self.layer is None else f"layer {self.layer}"


def nbytes(tensor: OutputTensor) -> int:
    """Bytes of one output tensor."""
    return entry_bytes((tensor.name, tensor.dtype, tensor.shape))
