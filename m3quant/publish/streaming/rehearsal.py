"""The gates of publishing before the first layer is converted, on everything that the output will hold beside its shards.

What is refused at the end for a licence, a base, a missing tokenizer or a path of this machine is refused here, before any hour is
spent. Left for the end is what is not known yet, the report and the figures of the conversion itself, and what m3quant makes of names.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

from ...artifact.manifest import MANIFEST
from ...artifact.source_record import SourceRecord
from ...artifact.uploads import UploadedShard, Uploads, write_uploads
from ...checkpoint import Checkpoint
from ...errors import PublishError
from ...planning.plan import Plan
from ...running.progress import Silent
from ..base import resolve_base
from ..completeness import Shards
from ..gates import check, make_card
from ..remote import Remote
from ..upload import Target, UploadRun, check_tag, made
from .wanted import Wanted

Say = Callable[[str], None]


def check_base(checkpoint: Checkpoint, output: Path, wanted: Wanted) -> None:
    """Raise PublishError or OptionError where the base is not known, or not the one that is given. Asks nothing of the Hub."""
    if _is_finished(output):
        return
    origin = SourceRecord(checkpoint).origin
    source = {"source": {"repo": origin.repo, "revision": origin.revision}}
    try:
        resolve_base(source, wanted.asked.base_repo, wanted.asked.base_revision)
    except PublishError as error:
        raise PublishError(f"{error} Nothing was converted.") from None


def _is_finished(output: Path) -> bool:
    """Whether it has its manifest, which states the base, and config.json, which comes last."""
    return (output / MANIFEST).exists() and (output / "config.json").exists()


def check_beforehand(plan: Plan, output: Path, wanted: Wanted, write: Callable[[Path], None], say: Say) -> None:
    """Raise what would end this publication, before anything is converted; what the licence asks of the sender is said.

    write: puts what the output will hold beside its shards into a folder (`convert.conversion.rehearse`). At the end the repo exists, private, with a staging branch: a token that may not write is known now. Raises HubError,
    PublishError, OptionError, CheckpointError or StoppedError.
    """
    check_tag(wanted.tag)
    remote = Remote(wanted.repo, say)
    remote.check_token()
    if _is_finished(output):  # `settle` runs every gate on it
        return
    told = _rehearse_gates(plan, output, wanted, write, say)
    state = made(remote)
    run = UploadRun(remote, Target([], wanted.tag, replace=None), Silent())
    run.check_usable(state, remote.tree(state.main))
    say(f"{wanted.repo} is private until you open it. The licence of the base asks of you:")
    for line in told:
        say(f"  {line}")


def _rehearse_gates(plan: Plan, output: Path, wanted: Wanted, write: Callable[[Path], None], say: Say) -> list[str]:
    """The licence's obligations. Raises PublishError with the first problem that a gate finds, after saying all of them."""
    asked = dataclasses.replace(wanted.asked, serving=())
    with tempfile.TemporaryDirectory(prefix="m3quant-") as folder:
        out = Path(folder) / "rehearsal"
        out.mkdir()
        write(out)
        # Every shard counts as one that was uploaded and dropped: nothing of it is looked for here.
        shards = {u.shard: UploadedShard(size=u.bytes_out, sha256="0" * 64, dropped=True) for u in plan.units}
        write_uploads(out, Uploads(repo=wanted.repo, shards=shards))
        say("checking base, licence and files before anything is converted ...")
        written = make_card(out, asked, plan)
        problems = [
            text.replace(str(out), str(output)) for text in check(out, written, asked, say, Shards.PROMISED).problems
        ]
    for problem in problems[1:]:
        say(f"also: {problem}")
    if problems:
        more = f" ({len(problems) - 1} more above)" if len(problems) > 1 else ""
        raise PublishError(f"{problems[0].rstrip('.')}{more}. Nothing was converted.")
    return written.obligations
