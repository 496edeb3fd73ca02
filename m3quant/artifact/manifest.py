"""m3quant.json of a finished output: what it was made from and of, and the sha256 of every file. Torch-free.

Schema 1 recorded neither `source.identity` nor `source.read`; such outputs are read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checkpoint import DTYPE_BYTES, write_json_atomic
from ..checkpoint.bounded import MANIFEST_BYTES, read_bounded
from ..checkpoint.strict_json import shown
from ..errors import CheckpointError
from ..planning.integer_kinds import KIND
from ..planning.source_layouts import KINDS, PLAIN, SourceTensor, stored_parts
from ..running.complaints import complaint, key_of
from ..schemes import NOT_ROUNDED
from .identity import SourceIdentity

MANIFEST = "m3quant.json"
MANIFEST_SCHEMA = 2
MAX_BYTES = MANIFEST_BYTES  # a checkpoint of a million tensors takes half of it

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0)]
StoredDtype = Annotated[str, Field(pattern=f"^({'|'.join(DTYPE_BYTES)})$")]
StoredShape = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**48)], ...], Field(max_length=8)]


class _Part(BaseModel):
    """Unknown keys are ignored: a later minor version may add some."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class Shard(_Part):
    size: Size
    sha256: Sha256


class CarriedFile(_Part):
    """A file of the source that was carried over. as_on_hub: whether its bytes are those the Hub sent, None if unknown."""

    size: Size
    sha256: Sha256
    as_on_hub: bool | None


class SourceTensorFacts(_Part):
    """A source tensor: the dtype of it or its codes, its own shape, its layout, the dtype of its scale; and, where a quantized one is not
    stored as releases store that kind, every part of it by leaf, with dtype and shape."""

    dtype: StoredDtype
    shape: StoredShape
    kind: Annotated[str, Field(pattern=f"^({'|'.join(KINDS)}|{KIND.pattern})$")]
    scale: StoredDtype | None = None
    parts: dict[str, tuple[StoredDtype, StoredShape]] | None = Field(default=None, max_length=8)


def tensor_facts(source: SourceTensor) -> dict[str, Any]:
    """`SourceTensorFacts` of a tensor, as plain values."""
    facts: dict[str, Any] = {"dtype": source.info.dtype, "shape": list(source.shape), "kind": source.kind}
    if source.kind == PLAIN or source.scale is None:
        return facts
    facts["scale"] = source.scale.dtype
    held = {part.name: (part.dtype, part.shape) for part in source.stored}
    usual = {
        n: (dtype, shape)
        for n, dtype, shape in stored_parts(source.kind, source.name, source.shape, source.scale.dtype)
    }
    if held != usual:
        facts["parts"] = {name.rpartition(".")[2]: (dtype, list(shape)) for name, (dtype, shape) in held.items()}
    return facts


class ManifestSource(_Part):
    """What the output was made from.

    identity: what was known of it before it was read; read: output shard -> source shard -> digest of the tensors that were
    read for it.
    quantization: the source's own quantization section, None of an unquantized one.
    files, left_behind, card: not in outputs that are older than the record.
    """

    fingerprint: str
    bytes: Size
    tensors: dict[str, SourceTensorFacts]
    identity: SourceIdentity | None = None
    read: dict[str, dict[str, str]] = Field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    repo: str | None = None
    revision: str | None = None
    files: dict[str, CarriedFile] = Field(default_factory=dict)
    left_behind: dict[str, str] = Field(default_factory=dict)
    card: dict[str, Any] | None = None


class RoleRow(_Part):
    role: str
    action: str
    scheme: str
    tensors: int
    bytes_in: int
    bytes_out: int
    reason: str


class CalibrationFacts(_Part):
    """The text that was calibrated on (`calibration.corpus.Windows.record`)."""

    model_config = ConfigDict(extra="allow")

    sha256: str
    source: str
    corpus_sha256: str
    tokenizer_sha256: str
    kind_tokens: dict[str, int]


class Heldout(_Part):
    """Figures of the windows that calibration never saw (`convert.quality`).

    activations: how the quantized stream rounded them; manifests without the key are of a time when it did not.
    """

    windows: int
    window_length: int
    tokens: int
    activations: str = NOT_ROUNDED
    perplexity_source: float
    perplexity_quantized: float
    kl_mean: float
    kl_median: float
    kl_max: float
    top1_agreement: float


class Coverage(_Part):
    """How well the text covered the experts. starved: layer -> experts below the floor."""

    experts: int
    floor: int
    least_tokens: int
    starved: dict[str, list[int]]
    sentence: str


class JobFacts(_Part):
    """What the output's bytes depend on, as the journal kept it; recipe: JSON. None: they do not depend on it."""

    model_config = ConfigDict(extra="allow")

    source: str
    recipe: str
    version: str
    calibration: str | None
    device: str | None
    torch: str | None
    transformers: str | None


class Sums(_Part):
    """The recorded bytes of an output: size and sha256 of every shard, sha256 of other files."""

    shards: dict[str, Shard]
    files: dict[str, Sha256]


class Manifest(Sums):
    """The content of m3quant.json. shard_checks: what each shard passed before it was uploaded, where that was done while others were made."""

    schema_version: int = Field(alias="schema")
    m3quant: str
    finished: str
    fingerprint: str
    source: ManifestSource
    recipe: dict[str, Any]
    output_bytes: Size
    bits_per_weight: float | None
    roles: list[RoleRow]
    passed_through: list[str]
    notes: list[str]
    job: JobFacts
    seconds: float
    calibration: CalibrationFacts | None = None
    heldout: Heldout | None = None
    coverage: Coverage | None = None
    stream_error: dict[str, float] = Field(default_factory=dict)
    rounding_error: dict[str, float] = Field(default_factory=dict)
    report: str | None = None
    shard_checks: list[str] = Field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As it is written: keys that were not set are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


View = TypeVar("View", bound=Sums)


def parse_manifest(data: bytes, where: str, kind: type[View]) -> View:
    """The manifest in `data`, or the part of it that `kind` describes. Raises ValueError: a clause that begins with `where`."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{where} has more than {MAX_BYTES} bytes: it is no manifest of m3quant")
    try:
        manifest = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = shown(key_of(first)) if first["loc"] else "it"
        raise ValueError(f"{where} is damaged ({complaint(place, first)[:300]})") from None
    if isinstance(manifest, Manifest) and manifest.schema_version > MANIFEST_SCHEMA:
        raise ValueError(f"{where} was written by a newer m3quant (schema {manifest.schema_version})")
    return manifest


def load_manifest(path: Path, kind: type[View]) -> View:
    """The manifest at `path`. Raises ValueError as `parse_manifest`."""
    try:
        data = read_bounded(path, MAX_BYTES)
    except CheckpointError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return parse_manifest(data, str(path), kind)


def write_manifest(output: Path, manifest: Manifest) -> None:
    write_json_atomic(output / MANIFEST, manifest.to_json())
