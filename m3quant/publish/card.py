"""The model card: README.md with the Hub's metadata, NOTICE and SHA256SUMS, from an output's own files."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..artifact.output import read_manifest
from ..checkpoint import sha256_file, write_bytes_atomic
from ..checkpoint.bounded import MANIFEST_BYTES, TEXT_BYTES, read_bounded
from ..engines import DEFAULT
from ..errors import PublishError
from ..planning.plan import RECIPE_FILE
from ..running.words import human_bytes
from ..schemes import parse_scheme
from .base import Base
from .facts import CardFacts, Serving
from .files import CARD, CHECKSUMS, files_to_publish, notice_name
from .licences import Licence
from .results import figure

TEMPLATE = "card.md.jinja"
# The text between these two lines is the user's, and is kept when the card is written again.
NOTES_BEGIN = "<!-- notes: what you write between these two lines is kept when m3quant writes the card again -->"
NOTES_END = "<!-- end of notes -->"
NOT_ALWAYS = ("calibration", "heldout", "coverage", "report", "shard_checks")  # manifest keys of some runs
ROLES = {
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
    "dense_mlp": "dense MLP layers",
    "attention": "attention projections",
    "indexer": "sparse-attention index projections",
    "router": "router",
    "router_bias": "router bias",
    "norm": "norms",
    "embedding": "token embeddings",
    "lm_head": "output head",
    "vision": "vision tower",
    "projector": "multimodal projector",
    "mtp": "multi-token prediction",
    "unknown": "unknown to the architecture",
}


def write_card(out: Path, facts: CardFacts, left_out: Mapping[str, str]) -> Path:
    """Write NOTICE (with a licence), SHA256SUMS and README.md into `out`; returns README.md's path.

    left_out: file of the base -> why it is not here. Raises PublishError for a README.md that the user wrote.
    """
    kept = kept_notes(out / CARD, facts.manifest)
    if facts.licence and facts.base:
        write_bytes_atomic(out / notice_name(facts.manifest), notice(facts, facts.licence, facts.base).encode())
    checksums = checksum_lines(out, facts.manifest)
    write_bytes_atomic(out / CHECKSUMS, checksums.encode())
    text = render(facts, left_out, kept, sha256_file(out / CHECKSUMS))
    write_bytes_atomic(out / CARD, text.encode())
    return out / CARD


@contextlib.contextmanager
def card_kept(out: Path) -> Iterator[None]:
    """At the end the files that `write_card` writes are as they were at the beginning, or gone if they were not there."""
    paths = [out / name for name in (CARD, CHECKSUMS, notice_name(read_manifest(out)))]
    before = {p: read_bounded(p, MANIFEST_BYTES, error=PublishError) if _there(p) else None for p in paths}
    try:
        yield
    finally:
        for path, data in before.items():
            if data is None:
                path.unlink(missing_ok=True)
            elif read_bounded(path, MANIFEST_BYTES, error=PublishError) != data:
                write_bytes_atomic(path, data)


def _there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def render(facts: CardFacts, left_out: Mapping[str, str], notes: str = "", checksums_sha256: str = "") -> str:
    """The whole README.md: metadata block and text. Pure."""
    environment = Environment(
        loader=PackageLoader("m3quant.publish", ""),
        undefined=StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, from our own manifests
    )
    calibration = facts.manifest.get("calibration")
    body = environment.get_template(TEMPLATE).render(
        **{name: getattr(facts, name) for name in dir(facts) if not name.startswith("_") and name != "manifest"},
        manifest={**dict.fromkeys(NOT_ALWAYS), **facts.manifest},
        bytes=human_bytes,
        params=human_count,
        role=lambda name: ROLES.get(name, name),
        scheme=scheme_text,
        figure=figure,
        starved=lambda coverage: sum(map(len, coverage["starved"].values())),
        commands=commands(facts),
        plain_command=shlex.join(DEFAULT.plain_command(facts.download)),
        calibration_option="" if bundled(calibration) else " --calibration CORPUS",
        not_carried=left_out,
        recipe_file=RECIPE_FILE,
        notice_file=notice_name(facts.manifest),
        checksums_file=CHECKSUMS,
        checksums_sha256=checksums_sha256,
        notes_begin=NOTES_BEGIN,
        notes_end=NOTES_END,
        kept_notes=notes,
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n{body}"


def metadata(facts: CardFacts) -> ModelCardData:
    """The Hub's metadata block. Fields that are not known are left out, never filled in."""
    base, licence = facts.base, facts.licence
    routed = {parse_scheme(row["scheme"]) for row in facts.quantized if row["role"] == "routed_experts"}
    bits = [f"{width}-bit" for width in sorted({scheme.bits for scheme in routed if scheme.quantizes})]
    evals = facts.hub_evals
    return ModelCardData(
        base_model=base.repo if base else None,
        base_model_relation="quantized" if base else None,
        license=licence.identifier if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.file if licence and licence.identifier == "other" else None,
        library_name=DEFAULT.name,
        pipeline_tag="image-text-to-text" if facts.multimodal else "text-generation",
        tags=[
            "m3quant",
            DEFAULT.name,
            facts.recipe.format,
            facts.family.model_type,
            *(["moe"] if facts.family.moe else []),
            *bits,
        ],
        draft_models=[
            {"repo": draft.where, "revision": draft.revision, "license": draft.licence, "algorithm": draft.title}
            for draft in facts.drafts
        ]
        or None,
        model_name=facts.name if evals else None,
        eval_results=evals or None,
    )


def check_metadata(text: str, out: Path) -> list[str]:
    """What the Hub would refuse or misread in a card, found offline. https://huggingface.co/docs/hub/model-cards"""
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    except (ValueError, KeyError, TypeError) as error:
        return [f"{CARD}: the metadata cannot be read: {error}"]
    problems = []
    if not data.get("base_model") or data.get("base_model_relation") != "quantized":
        problems.append(f"{CARD} names no base model, or not as quantized")
    if not data.get("license"):
        problems.append(f"{CARD} states no licence")
    elif data["license"] == "other" and not (data.get("license_name") and data.get("license_link")):
        problems.append(f"{CARD}: license other needs license_name and license_link")
    link = data.get("license_link")
    if link and "://" not in link and not (out / link).is_file():
        problems.append(f"{CARD} links to the licence {link}, which is not in {out}")
    return problems


def notice(facts: CardFacts, licence: Licence, base: Base) -> str:
    """NOTICE: the sentence that the licence prescribes, where it does, and the statement of what was changed."""
    lines = [licence.notice, ""] if licence.notice else []
    lines += [
        f"These files derive from {base.repo} at revision {base.revision},",
        f"under the {licence.title} ({licence.file}).",
        "",
        "CHANGED by quantization with m3quant "
        + facts.manifest["m3quant"]
        + f" (recipe {facts.recipe.name}, recipe.yaml):",
        "- every *.safetensors file: weights of the roles below are stored in other formats, tensors are in other files;",
        *[f"  {ROLES.get(row['role'], row['role'])}: {scheme_text(row)}" for row in facts.quantized],
        "- model.safetensors.index.json: names the new files;",
        "- config.json: quantization_config added or replaced, nothing else;",
        f"- {CARD}: written anew.",
        "",
        "NOT CHANGED: all other files that the base has too are copies, byte for byte.",
        "",
    ]
    return "\n".join(lines)


def checksum_lines(out: Path, manifest: Mapping[str, Any]) -> str:
    """SHA256SUMS of every published file but README.md, which users edit, and itself. As sha256sum writes and reads it."""
    files = [f for f in files_to_publish(out, manifest) if f.path_in_repo not in (CARD, CHECKSUMS)]
    return "".join(f"{file.sha256}  {file.path_in_repo}\n" for file in files)


def kept_notes(card: Path, manifest: Mapping[str, Any]) -> str:
    """A person's notes in a card that m3quant wrote. Raises PublishError for a card that it did not write."""
    if not _there(card):
        return ""
    text = read_bounded(card, TEXT_BYTES, error=PublishError).decode("utf-8", errors="replace")
    if NOTES_BEGIN in text and NOTES_END in text:
        return text.split(NOTES_BEGIN, 1)[1].split(NOTES_END, 1)[0].strip()
    carried = manifest["source"].get("files", {}).get(CARD, {})
    if sha256_file(card) == carried.get("sha256"):
        return ""
    raise PublishError(
        f"{card} was not written by m3quant and is not the base's: move it away, run this again, and put your text between the two comment lines at its end."
    )


def commands(facts: CardFacts) -> list[dict[str, str]]:
    """The first row that fits of every node with the longest context, its command naming the repo instead of a folder."""
    best: dict[str, Serving] = {}
    for row in facts.serving:
        if row.fits and (row.node not in best or row.longest_context > best[row.node].longest_context):
            best[row.node] = row
    out = []
    for row in best.values():
        command = shlex.join(DEFAULT.command_for(shlex.split(row.command), facts.download))
        out.append({"node": row.node, "kv_dtype": row.kv_dtype, "command": command})
    return out


def scheme_text(row: Mapping[str, Any]) -> str:
    if row["action"] == "dequantize":
        return "BF16 (dequantized)"
    where = f" in layers {row['layers']}" if "layers" in row else ""
    return f"{row['scheme']}{where}" + (" (the base's own, byte for byte)" if row["action"] == "copy" else "")


def bundled(calibration: Mapping[str, Any] | None) -> bool:
    """Whether the calibration text is m3quant's own, so that no option is needed to get it again."""
    return calibration is None or str(calibration["source"]).startswith("bundled corpus")


def human_count(count: float) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
