"""Everything that is checked before an output goes to the Hub: base, licence, completeness, card. One call for `publish` and for `card`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact.output import read_manifest
from ..artifact.partly import open_output
from ..checkpoint import Checkpoint
from ..checkpoint.bounded import TEXT_BYTES, read_text
from ..errors import PublishError
from ..planning.plan import Plan
from .base import Base, resolve_base
from .card import check_metadata, write_card
from .completeness import Findings, Shards, check_complete_for_publish, left_out_explained
from .facts import Serving, gather
from .files import PublishFile, files_left_out, files_to_publish
from .hub_benchmarks import read_benchmarks, registration_problems
from .licences import GivenLicence, Licence, obligations, resolve_licence
from .on_hub import base_problems
from .scan.allow import read_allowed, shipped

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What the user gives in addition to the folder. serving: rows of the serving table, None to compute them."""

    base_repo: str | None = None
    base_revision: str | None = None
    repo: str | None = None  # where it will be published: commands on the card name it
    source: str | None = None  # to compare with, file by file and tensor by tensor
    licence: GivenLicence = field(default_factory=GivenLicence)
    serving: Sequence[Serving] | None = None
    allow: Path | None = None  # a list of what the scan finds and is harmless, with reasons
    online: bool = False  # compare with the base on the Hub, file by file
    drafts: tuple[str, ...] = ()  # Hub repos of draft models that the card points to


@dataclass(frozen=True)
class Written:
    """A card that was written: what is known, and the sentences on what is not."""

    card_path: Path
    manifest: dict[str, Any]
    checkpoint: Checkpoint
    base: Base | None
    licence: Licence | None
    problems: list[str]
    obligations: list[str]


@dataclass(frozen=True)
class Prepared:
    """An output that may be sent. files: all of them; not_sent: what else is in the folder."""

    files: list[PublishFile]
    base: Base
    licence: Licence
    obligations: list[str]
    card_path: Path
    not_sent: list[str]


def make_card(out: Path, asked: Asked, plan: Plan | None = None) -> Written:
    """Write README.md, NOTICE and SHA256SUMS. What a gate refuses is stated as missing on the card and returned as a problem.

    plan: the conversion's, if it is at hand.

    Raises VerifyError or CheckpointError where `out` is no finished output, PublishError for an eval.json of another
    checkpoint or a README.md that the user wrote.
    """
    manifest = read_manifest(out)
    checkpoint = open_output(out, plan)
    unknown: dict[str, str] = {}
    base: Base | None = None
    licence: Licence | None = None
    try:
        base = resolve_base(manifest, asked.base_repo, asked.base_revision)
        licence = resolve_licence(out, manifest, checkpoint.config, base, asked.licence)
    except PublishError as error:
        unknown = {"base" if base is None else "licence": str(error)}
    sentences = {key: _sentence(text) for key, text in unknown.items()}
    if base is None:
        sentences["licence"] = "it depends on the base model, which is not stated."
    facts = gather(
        out, checkpoint, manifest, base, licence, sentences, asked.repo, _serving(out, checkpoint, asked), asked.drafts
    )
    path = write_card(out, facts, left_out_explained(out, manifest))
    told = obligations(licence, base) if licence and base else []
    return Written(path, manifest, checkpoint, base, licence, list(unknown.values()), told)


def check(out: Path, written: Written, asked: Asked, say: Say, shards: Shards = Shards.HERE) -> Findings:
    """Every gate on an output whose card was just written; the findings' problems are sentences.

    shards: where they are. Raises CheckpointError where asked.online and the Hub cannot be reached.
    """
    allowed = shipped() + read_allowed(asked.allow) if asked.allow else None
    from_hub = []
    if asked.online and written.base and written.licence:
        say(f"comparing with {written.base.repo} on the Hub ...")
        from_hub = base_problems(out, written.manifest, written.base, written.licence, shards is not Shards.PROMISED)
        from_hub += registration_problems(read_benchmarks(out))
    findings = check_complete_for_publish(out, written.manifest, asked.source, say, allowed, shards, written.checkpoint)
    findings.problems[:0] = [*written.problems, *from_hub]
    if not written.problems:
        findings.problems += check_metadata(read_text(written.card_path, TEXT_BYTES), out)
    return findings


def prepare(
    out: Path, asked: Asked, say: Say = lambda line: None, shards: Shards = Shards.HERE, plan: Plan | None = None
) -> Prepared:
    """Gate an output and write its card. Raises PublishError with the first problem in one sentence, before anything is sent.

    shards: where they are; plan: the conversion's, if it is at hand.
    """
    written = make_card(out, asked, plan)
    if not (written.base and written.licence):
        raise PublishError(written.problems[0])
    findings = check(out, written, asked, say, shards)
    if findings.problems:
        more = f" ({len(findings.problems) - 1} more: m3quant card {out} --check)" if len(findings.problems) > 1 else ""
        raise PublishError(findings.problems[0] + more)
    files = files_to_publish(out, written.manifest)
    return Prepared(
        files, written.base, written.licence, written.obligations, written.card_path, files_left_out(out, files)
    )


def _serving(out: Path, checkpoint: Checkpoint, asked: Asked) -> Sequence[Serving]:
    if asked.serving is not None:
        return asked.serving
    from ..runtime.serving_table import serving_table

    rows: Sequence[Serving] = serving_table(out, checkpoint)
    return rows


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
