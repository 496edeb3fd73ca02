"""What a journal holds, typed: how work was begun (job.json) and one record per finished unit (a line of units.jsonl).

Each carries a checksum of itself, so that a damaged one is found before anything is concluded from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field

from .identity import SourceIdentity

JOURNAL_SCHEMA = 2  # 1 had neither checksums nor what was read of the source
HEX = r"^[0-9a-f]+$"
_CHECK = "check"


class Sealed(BaseModel):
    """What `seal` writes and `unseal` reads."""

    model_config = ConfigDict(extra="forbid")


class Job(Sealed):
    """How work was begun. facts: everything its result depends on; read: label -> each checkpoint that it reads."""

    schema_version: int = JOURNAL_SCHEMA
    facts: dict[str, Any]
    read: dict[str, SourceIdentity] = Field(default_factory=dict)


class UnitRecord(Sealed):
    """A finished unit of any work."""

    unit: int = Field(ge=0)


class ConvertedUnit(UnitRecord):
    """A finished shard. read: source shard -> digest of the tensors that it was made of (`checkpoint.content`).

    The rest is of a calibrated layer; boundary: file name -> xxh3_128 (hex) of the hidden states entering the next unit;
    rounding_error: tensor -> squared distance from the source (`calibration.rounding_errors`).
    """

    shard: str
    size: int = Field(gt=0)
    sha256: str = Field(pattern=HEX, min_length=64, max_length=64)
    read: dict[str, str]
    layer: int | None = Field(default=None, ge=0)
    stream_error: float | None = Field(default=None, ge=0)
    log: dict[str, Any] | None = None
    ledger: dict[str, Any] | None = None
    boundary: dict[str, str] = Field(default_factory=dict)
    rounding_error: dict[str, float] = Field(default_factory=dict)


class MeasuredLayer(UnitRecord):
    """A layer that an evaluation has passed through.

    read: label of a model -> its shard -> digest of the tensors that were read; states: file name -> xxh3_128 (hex) of the hidden states
    entering the next layer.
    """

    facts: dict[str, float]
    read: dict[str, dict[str, str]]
    states: dict[str, str]


Record = TypeVar("Record", bound=Sealed)


def seal(values: Mapping[str, Any]) -> bytes:
    """`values` and their checksum as one line of JSON, without a newline. Raises ValueError for NaN."""
    as_read = json.loads(json.dumps(values, allow_nan=False))  # tuples are lists then, and keys strings
    return json.dumps({**as_read, _CHECK: _checksum(as_read)}).encode()


def unseal(data: bytes, kind: type[Record]) -> Record:
    """The record in bytes that `seal` made. Raises ValueError where they are damaged or no record of this kind."""
    try:
        values = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict) or values.pop(_CHECK, None) != _checksum(values):
        raise ValueError("its checksum is not that of its contents")
    return kind.model_validate(values)


def schema_of(data: bytes) -> int | None:
    """The schema version of a whole job.json, 1 of the bare facts of earlier versions; None for a damaged one."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    check = values.pop(_CHECK, None)
    if check is None:
        return 1 if "version" in values else None
    found = values.get("schema_version")
    return found if type(found) is int and check == _checksum(values) else None


def _checksum(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
