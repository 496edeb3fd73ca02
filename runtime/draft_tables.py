"""The tables of a draft that guesses some of the target's tokens only: they are numbers from a file, which an engine uses as places unchecked."""

from __future__ import annotations

import struct

from ..checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from ..checkpoint.strict_json import shown
from ..errors import CheckpointError

TABLE_TOKENS = 2**21  # of a vocabulary whose tables are read: ten times those of MiniMax's models
_INTEGERS = {"I64": "q", "I32": "i"}


def check_tables(checkpoint: Checkpoint, guessed: int, vocabulary: int) -> None:
    """d2t [guessed] holds each guessed token's id less its place, t2d [vocabulary] whether a token of the target can be guessed.

    Raises CheckpointError for a draft that needs d2t and has none, for ids beyond the vocabulary or named twice, and where t2d, if there
    is one, says otherwise.
    """
    d2t = _table(checkpoint, "d2t", guessed, vocabulary)
    if d2t is None:
        if guessed < vocabulary:
            raise CheckpointError(
                f"{checkpoint.root} guesses {guessed:,} of {vocabulary:,} tokens, but holds no table d2t that says which: download it again."
            )
        return
    if d2t.dtype not in _INTEGERS:
        raise CheckpointError(
            f"{checkpoint.root}: {shown(d2t.name)} is {d2t.dtype}, not a table of whole numbers: download it again."
        )
    offsets = struct.unpack(f"<{guessed}{_INTEGERS[d2t.dtype]}", _read(checkpoint, d2t))
    seen = bytearray(vocabulary)
    for place, offset in enumerate(offsets):
        token = place + offset
        if not 0 <= token < vocabulary:
            raise CheckpointError(
                f"{checkpoint.root}: entry {place:,} of {shown(d2t.name)} is token {token:,}, but the target has {vocabulary:,}: take a draft that was trained for this model."
            )
        if seen[token]:
            raise CheckpointError(
                f"{checkpoint.root}: {shown(d2t.name)} names token {token:,} twice: download it again."
            )
        seen[token] = 1
    t2d = _table(checkpoint, "t2d", vocabulary, vocabulary)
    if t2d is not None and _set(_read(checkpoint, t2d), DTYPE_BYTES[t2d.dtype]) != seen:
        raise CheckpointError(
            f"{checkpoint.root}: {shown(t2d.name)} says of other tokens than {shown(d2t.name)} that they can be guessed: download it again."
        )


def _table(checkpoint: Checkpoint, name: str, entries: int, vocabulary: int) -> TensorInfo | None:
    """The one tensor of that name, of one dimension and so many entries."""
    found = [info for stored, info in checkpoint.tensors.items() if stored.rpartition(".")[2] == name]
    if not found:
        return None
    info = found[0]
    if len(found) > 1 or tuple(info.shape) != (entries,):
        what = (
            f"has {len(found)} tables {name}" if len(found) > 1 else f"has a table {name} of shape {list(info.shape)}"
        )
        raise CheckpointError(f"{checkpoint.root} {what}; one of {entries:,} entries is needed: download it again.")
    if vocabulary > TABLE_TOKENS:
        raise CheckpointError(
            f"{checkpoint.root} has a table {name} for {vocabulary:,} tokens, of which at most {TABLE_TOKENS:,} are read: take another draft."
        )
    return info


def _read(checkpoint: Checkpoint, info: TensorInfo) -> bytearray:
    data = bytearray(info.nbytes)
    checkpoint.peek([(info, 0, memoryview(data))])
    return data


def _set(data: bytearray, size: int) -> bytearray:
    """1 for each entry of `size` bytes that is not 0."""
    return bytearray(any(data[at : at + size]) for at in range(0, len(data), size))
