"""Is an output whole: verified, with every file of its source carried or its absence explained, and nothing in it that must not be published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ..artifact.journal import FOLDER
from ..artifact.manifest import MANIFEST
from ..artifact.output import read_config
from ..checkpoint import INDEX_NAME, Checkpoint, sha256_file
from ..checkpoint.bounded import CONFIG_BYTES, read_bounded
from ..checkpoint.links import require_regular
from ..errors import PublishError
from .files import CARD, CHECKSUMS, PublishFile, files_to_publish
from .scan import OF_A_MACHINE, Allowed, machine_strings, scan

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor.py",
    "video_preprocessor_config.json",
)


# Tens of megabytes of tensors' names and sums, all of m3quant's own making.
LISTS = (MANIFEST, INDEX_NAME, CHECKSUMS)


class Shards(Enum):
    """Where the shards of an output are: here; on the Hub, each checked before it was sent (`verify.one_shard`); or yet to be made."""

    HERE = "here"
    UPLOADED = "uploaded"
    PROMISED = "promised"


@dataclass
class Findings:
    """problems: sentences that forbid publishing; explained: name of a file that is not carried -> why that is right."""

    problems: list[str] = field(default_factory=list)
    explained: dict[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return not self.problems


def check_complete_for_publish(
    out: Path,
    manifest: Mapping[str, Any],
    source: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    allowed: Allowed | None = None,
    shards: Shards = Shards.HERE,
    converted: Checkpoint | None = None,
) -> Findings:
    """Run every check on a converted folder. source: a folder or Hub id, compared file by file and tensor by tensor.

    allowed: what the scan finds and the user knows to be harmless. shards: where they are, and so what is left to look at. converted: the
    output, if it is open already.
    """
    findings = Findings(problems=_verify(out, source, say, shards, converted))
    findings.problems += leftovers(out)
    check_carried(out, manifest, findings)
    check_needed(out, manifest, findings)
    say("looking for keys, machine paths, hosts and addresses ...")
    files = [f for f in files_to_publish(out, manifest) if not (shards is Shards.PROMISED and f.path_in_repo in LISTS)]
    findings.problems += secrets(out, files, manifest, allowed)
    return findings


def _verify(
    out: Path, source: str | None, say: Callable[[str], None], shards: Shards, converted: Checkpoint | None
) -> list[str]:
    if shards is Shards.PROMISED:
        return []
    from ..verify.one_shard import verify_streamed
    from ..verify.verification import verify

    checks = verify_streamed(out, say, converted) if shards is Shards.UPLOADED else verify(out, source, say)[0].checks
    problems = [f"verify, {check.name}: {problem}" for check in checks for problem in check.problems]
    return problems[:5] + ([f"verify: {len(problems) - 5} more problems"] if len(problems) > 5 else [])


def leftovers(out: Path) -> list[str]:
    """Sentences about a journal or temporary files, which mean that something is unfinished."""
    found = [FOLDER] if (out / FOLDER).exists() else []
    found += sorted(p.relative_to(out).as_posix() for p in out.rglob("*.tmp") if FOLDER not in p.parts)
    return [
        f"{out / name} is left of an interrupted run: finish it with the command it was begun with." for name in found
    ]


def left_out_explained(out: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """File -> why it is not in the output though the base has it, or an engine would like it. Reads no weights."""
    findings = Findings()
    check_carried(out, manifest, findings)
    check_needed(out, manifest, findings)
    return findings.explained


def check_carried(out: Path, manifest: Mapping[str, Any], findings: Findings) -> None:
    """Every file next to the source's weights is in the output with the same bytes, or its absence is explained."""
    record = manifest["source"].get("files")
    if record is None:
        findings.problems.append(
            "the manifest has no list of the source's files, because an older m3quant wrote it: convert again."
        )
        return
    expected = {name: facts["sha256"] for name, facts in record.items()}
    findings.explained |= manifest["source"].get("left_behind", {})
    for name, digest in expected.items():
        path = out / name
        if name == CARD:
            findings.explained[name] = "the model card is written anew; the base's own is at the base"
        elif not path.is_symlink() and not path.is_file():
            findings.problems.append(
                f"{name} of the source is missing from {out}: convert again, or copy it from the source."
            )
        elif problem := _not_plain(out, name):
            findings.problems.append(problem)
        elif sha256_file(path) != digest:
            findings.problems.append(f"{out / name} differs from the source's: copy it again, byte for byte.")


def _not_plain(out: Path, name: str) -> str | None:
    try:
        require_regular(out, name, PublishError)
    except PublishError as error:
        return str(error)
    return None


def check_needed(out: Path, manifest: Mapping[str, Any], findings: Findings) -> None:
    """Files that an engine needs: what the source lacks too is said, what config.json names must be there."""
    config = read_config(out)
    tokenizer = [name for name in TOKENIZERS if (out / name).is_file()]
    if not tokenizer:
        findings.problems.append(
            f"{out} has no tokenizer ({', '.join(TOKENIZERS)}): it cannot be served; copy the base's."
        )
    settings = out / "tokenizer_config.json"
    embedded = settings.is_file() and b'"chat_template"' in read_bounded(settings, CONFIG_BYTES, error=PublishError)
    if not embedded and not any((out / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        findings.explained["chat_template.jinja"] = (
            "the source has no chat template: chat requests need one given to the engine"
        )
    if not (out / "generation_config.json").is_file():
        findings.explained["generation_config.json"] = "the source has none: engines sample with their own defaults"
    vision = any(row["role"] == "vision" for row in manifest["roles"])
    if vision and not any((out / name).is_file() for name in PROCESSORS):
        findings.explained["preprocessor_config.json"] = (
            "the source has no image processor: serve text only (--language-model-only), or add the base's"
        )
    for module in custom_code(config):
        if not (out / module).is_file():
            findings.problems.append(
                f"config.json names the code {module}, which {out} lacks: copy it from the base, or it loads nowhere."
            )


def custom_code(config: Mapping[str, Any]) -> list[str]:
    """Python files that config.json's auto_map refers to in its own repo."""
    references = (config.get("auto_map") or {}).values()
    flat = [r for ref in references for r in (ref if isinstance(ref, list) else [ref]) if isinstance(r, str)]
    return sorted({f"{r.split('.')[0]}.py" for r in flat if "--" not in r and "." in r})


def secrets(
    out: Path, files: list[PublishFile], manifest: Mapping[str, Any], allowed: Allowed | None = None
) -> list[str]:
    """Sentences about keys, paths, hosts and people. All but keys are the base's affair in files that are the Hub's own bytes."""
    public = {name for name, facts in manifest["source"].get("files", {}).items() if facts["as_on_hub"]}
    found = [
        f
        for f in scan((f for f in files if not f.dropped), machine_strings(out), allowed)
        if not (f.kind in OF_A_MACHINE and f.file in public and f.file != CARD)
    ]
    remedy = "take it out before anything is sent, or give --allow FILE with the reason why it is harmless"
    return [f"{finding}: {remedy}." for finding in found]
