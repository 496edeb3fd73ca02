"""An output opened although some of its shards are on the Hub alone: their headers are those that the plan gave them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..checkpoint import Checkpoint, header_bytes
from ..checkpoint.checkpoint import LocalStore
from ..checkpoint.header import PREFIX_BYTES
from ..checkpoint.listing import Listing
from ..planning.plan import Plan
from ..planning.unit import SHARD_METADATA
from .output import plan_in, read_config, read_manifest
from .uploads import read_uploads


class _PartlyHere(LocalStore):
    """A folder whose absent shards are known by header and size. No tensor of theirs can be read."""

    def __init__(self, root: Path, absent: Mapping[str, tuple[bytes, int]]) -> None:
        super().__init__(root)
        self.absent = absent

    def listing(self) -> Listing:
        found = super().listing()
        found.shards = sorted({*found.shards, *self.absent})
        return found

    def headers(self, names: list[str]) -> dict[str, tuple[bytes, bytes, int]]:
        here = super().headers([name for name in names if name not in self.absent])
        away = {name: (data[:PREFIX_BYTES], data[PREFIX_BYTES:], size) for name, (data, size) in self.absent.items()}
        return {name: away[name] if name in away else here[name] for name in names}


def recorded_plan(output: Path) -> Plan:
    """The plan that the manifest records; of the output's own files none but config.json and the recipe is read. Raises VerifyError."""
    return plan_in(output, read_config(output), read_manifest(output))


def open_output(output: Path, plan: Plan | None = None) -> Checkpoint:
    """The output with all its tensors' names and shapes. plan: the conversion's, or the recorded one, if it is at hand.

    Raises CheckpointError, or as `recorded_plan`.
    """
    uploads = read_uploads(output)
    if uploads is None or not uploads.dropped:
        return Checkpoint.open(output)
    units = (plan or recorded_plan(output)).units
    gone = set(uploads.dropped)
    absent = {u.shard: (header_bytes(u.entries, SHARD_METADATA), u.bytes_out) for u in units if u.shard in gone}
    return Checkpoint(_PartlyHere(output, absent))
