"""The end of a conversion that is published: card and gates on what is here, what is left to send, one commit on main, the tag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifact.uploads import UPLOADS, read_uploads
from ...checkpoint.writer import temporary_name
from ...planning.plan import Plan
from ...running import steps
from ...running.progress import Progress
from ..completeness import Shards
from ..gates import prepare
from ..upload import Published, Target, upload
from .shard_uploads import drop_published
from .wanted import Wanted


@dataclass(frozen=True)
class Settled:
    """What is on the Hub now, and what the licence asks of whoever published it."""

    published: Published
    obligations: list[str]
    dropped: bool

    def to_json(self) -> dict[str, Any]:
        return self.published.to_json() | {"obligations": self.obligations}


def settle(
    plan: Plan, output: Path, manifest: Mapping[str, Any], wanted: Wanted, progress: Progress, sent: int = 0
) -> Settled:
    """Publish a finished output. Shards that were uploaded while it was made are not read again; of one that was finished without
    --publish everything is checked and sent now. sent: bytes of shards that this run sent already. Raises as `prepare` and `upload`.
    """
    (output / temporary_name(UPLOADS)).unlink(missing_ok=True)  # killed while the record was written
    uploads = read_uploads(output)
    uploaded = (
        uploads is not None and uploads.repo == wanted.repo and uploads.shards.keys() >= manifest["shards"].keys()
    )
    steps.step("checking what is left to send")
    prepared = prepare(output, wanted.asked, progress.say, Shards.UPLOADED if uploaded else Shards.HERE, plan)
    base = (prepared.base.repo, prepared.base.revision)
    done = upload(wanted.repo, Target(prepared.files, wanted.tag, replace=None, base=base), progress)
    done.sent += sent
    if wanted.drop:
        drop_published(output, wanted.repo, manifest["shards"])
    return Settled(done, prepared.obligations, wanted.drop)
