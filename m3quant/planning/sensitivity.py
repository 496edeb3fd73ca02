"""What each scheme costs each part of each layer, as `m3quant.convert.measure` found it: `sensitivity.json`.

Per layer, role and candidate scheme: the error of the layer's output on held-out rows, and the KL divergence that this
error alone would cause at the end of the model. A recipe's estimate is the sum over its layers and roles. Errors that
are combined in one model do not quite add up (later layers compensate errors of earlier ones, and a large divergence saturates),
so whole recipes were measured too, the pilots: `kl_of` takes a sum to a divergence that fits these measurements. It rises
with the sum, so that the recipe with the least sum is the one with the least predicted divergence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..checkpoint import Checkpoint
from ..checkpoint.bounded import read_bounded
from ..checkpoint.strict_json import parse_object
from ..errors import CheckpointError, OptionError
from ..families import QUANTIZABLE
from ..families.config import MAX_LAYERS
from ..running.complaints import complaint, key_of
from ..schemes import parse_scheme
from .kl_estimate import kl_through

SCHEMA = 1
MOST_BYTES = 64 * 2**20  # of a file that is read: 1,024 layers with 4 roles of 100 candidates take 40 MB
# Roles that get a scheme of their own in a layer; the indexer shares attention's, into which engines fuse it.
ROLES = tuple(role for role in QUANTIZABLE if role != "indexer")

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Candidate(_Model):
    """error: squared norm of the change of the layer's output over that of the output, on held-out rows.
    kl: what that error alone does to the next-token distribution, nats."""

    error: Amount
    kl: Amount


class Probe(_Model):
    """One error that was carried to the end of the model by itself, and the KL divergence it arrived as."""

    scheme: str
    error: Amount
    kl: Amount


class LayerSensitivity(_Model):
    layer: int = Field(ge=0, lt=MAX_LAYERS)
    candidates: dict[str, dict[str, Candidate]]  # role -> scheme
    probes: dict[str, list[Probe]]

    @field_validator("candidates")
    @classmethod
    def _known(cls, candidates: dict[str, dict[str, Candidate]]) -> dict[str, dict[str, Candidate]]:
        if unknown := sorted(candidates.keys() - set(ROLES)):
            raise ValueError(f"role '{unknown[0][:40]}' is none of {', '.join(ROLES)}")
        for own in candidates.values():
            for name in own:
                parse_scheme(name)
        return candidates


class Pilot(_Model):
    """A whole recipe that was measured: the sum of its estimates, and its KL divergence on the held-out windows.

    layers: role -> scheme, of every layer.
    """

    layers: list[dict[str, str]]
    estimate: Amount
    kl: Amount


class SourceIdentity(_Model):
    """fingerprint: Checkpoint.fingerprint(). config: sha256 of config.json's content in canonical form."""

    model_type: str
    fingerprint: str
    config: str


class TextIdentity(_Model):
    """Which text was read, and how much of it: windows to calibrate on and windows held out, of so many tokens.

    sha256: over the documents of all its sources and their shares, however many of them were read.
    """

    source: str
    sha256: str
    tokenizer_sha256: str
    windows: int = Field(ge=1)
    heldout_windows: int = Field(ge=1)
    window_length: int = Field(ge=2)


class Sensitivity(_Model):
    schema_version: Literal[1]
    m3quant: str
    source: SourceIdentity
    text: TextIdentity
    rounding: str
    options: dict[str, Any]  # of the rounding
    device: str
    others_left: Amount  # what the estimates outside the bulk of the weights were multiplied by: see convert.measure
    layers: list[LayerSensitivity]
    pilots: list[Pilot]

    def estimate(self, layer: int, role: str, scheme: str) -> float:
        return self.layers[layer].candidates[role][scheme].kl

    def schemes(self, role: str) -> list[str]:
        """Every scheme measured for a role in any layer, in the order of the file."""
        return list(dict.fromkeys(s for layer in self.layers for s in layer.candidates.get(role, {})))

    def total(self, schemes: Mapping[int, Mapping[str, str]]) -> float:
        """The sum of estimates of a recipe, given as layer -> role -> scheme. Raises KeyError for what was not measured."""
        return sum(self.estimate(layer, role, s) for layer, roles in schemes.items() for role, s in roles.items())

    def kl_of(self, total: float) -> float:
        """The predicted KL divergence, in nats a token, of a recipe whose estimates sum up to `total`."""
        return kl_through([(pilot.estimate, pilot.kl) for pilot in self.pilots], total)

    def dump(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()


def config_sha256(config: Mapping[str, Any]) -> str:
    """sha256 of a config.json's content: the same however the file is laid out."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def source_identity(checkpoint: Checkpoint, model_type: str) -> SourceIdentity:
    return SourceIdentity(
        model_type=model_type, fingerprint=checkpoint.fingerprint(), config=config_sha256(checkpoint.config)
    )


def load_sensitivity(path: Path) -> Sensitivity:
    """Raises OptionError with the file's name for one that cannot be read or does not hold what it should."""
    again = "Measure again with m3quant fit SRC --measure, or give another file."
    try:
        document = parse_object(read_bounded(path, MOST_BYTES, follow=True), str(path), again)
    except CheckpointError as error:
        raise OptionError(f"sensitivity file: {error}") from None
    if document.get("schema_version") != SCHEMA:
        raise OptionError(
            f"{path} has schema_version {str(document.get('schema_version'))[:20]}, this m3quant reads {SCHEMA}. {again}"
        )
    try:
        found = Sensitivity.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = key_of(first)[:120]
        raise OptionError(f"{path}: {complaint(where, first)[:280]}. {again}") from None
    if [layer.layer for layer in found.layers] != list(range(len(found.layers))):
        raise OptionError(f"{path} does not list every layer once, in order. {again}")
    return found


def check_source(found: Sensitivity, path: Path, checkpoint: Checkpoint, model_type: str) -> None:
    """Raise OptionError unless the file was measured on this checkpoint; of a config.json alone its content is compared."""
    own = source_identity(checkpoint, model_type)
    same = found.source.config == own.config and (not own.fingerprint or own.fingerprint == found.source.fingerprint)
    if not same:
        raise OptionError(
            f"{path} was measured on another source than {checkpoint.root}: its config.json or its tensors' headers "
            f"differ (there {found.source.model_type} {found.source.fingerprint[:12]}, here {own.model_type} "
            f"{own.fingerprint[:12] or own.config[:12]}). Leave --sensitivity out, or measure this source with "
            "m3quant fit SRC --measure."
        )


def check_text(found: Sensitivity, path: Path, sha256: str, tokenizer_sha256: str, source: str) -> None:
    """Raise OptionError unless the file was measured on these documents with this tokenizer."""
    for what, there, here in (
        ("text", found.text.sha256, sha256),
        ("tokenizer", found.text.tokenizer_sha256, tokenizer_sha256),
    ):
        if there != here:
            raise OptionError(
                f"{path} was measured with another {what} (there {found.text.source}, {there[:12]}; here {source}, "
                f"{here[:12]}): errors are weighted by the text's rows. Give the same --calibration, or measure again."
            )
