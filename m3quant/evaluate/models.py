"""The checkpoints that are measured: opened as dense tensors, and checked to be of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact.conversion_eval import output_fingerprint
from ..artifact.eval_record import Measured
from ..artifact.manifest import MANIFEST
from ..artifact.output import output_plan, read_manifest
from ..artifact.uploads import refuse_dropped
from ..calibration.corpus import load_tokenizer
from ..checkpoint import Checkpoint, TensorInfo
from ..checkpoint.bounded import TOKENIZER_BYTES, read_bounded
from ..errors import EvaluationError
from ..families import Family, family_of
from ..planning.source_format import source_format
from ..planning.source_layouts import FP8_BLOCK, FP8_CHANNEL
from ..planning.source_tensors import check_complete
from ..planning.unit import nbytes
from ..quant.reading import ConvertedReader, SourceReader
from ..schemes import Scheme

# Files that decide which ids a text has.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")


_FP8_SOURCES = {FP8_BLOCK: Scheme("fp8", bits=8, block=True), FP8_CHANNEL: Scheme("fp8", bits=8)}


@dataclass(frozen=True)
class Model:
    """A checkpoint opened for measuring. label: "checkpoint" or "source", as reports call it; folder: of its small files."""

    label: str
    folder: Path
    reader: SourceReader | ConvertedReader
    family: Family
    manifest: dict[str, Any] | None

    @property
    def config(self) -> dict[str, Any]:
        return self.reader.config

    @property
    def name(self) -> str:
        return self.reader.checkpoint.name

    @property
    def where(self) -> str:
        """The folder or repo, for messages."""
        return self.reader.checkpoint.root

    def layer_names(self, layer: int) -> list[str]:
        prefix = self.family.layer_prefix(layer)
        return [name for name in self.reader.tensors if name.startswith(prefix)]

    def schemes(self, layer: int) -> dict[str, Scheme]:
        """The schemes of one layer's quantized weights, by name relative to it.

        Of a source, its FP8 in blocks and rows, which engines read with rounded activations; whether they round those of
        MXFP8 weights depends on the GPU, so that here they are kept.
        """
        prefix, names = self.family.layer_prefix(layer), self.layer_names(layer)
        if isinstance(self.reader, SourceReader):
            found = {n.removeprefix(prefix): self.reader.tensors[n].kind for n in names}
            return {n: _FP8_SOURCES[kind] for n, kind in found.items() if kind in _FP8_SOURCES}
        planned = {n.removeprefix(prefix): self.reader.tensors[n] for n in names}
        return {n: t.scheme for n, t in planned.items() if t.action == "quantize"}

    def stored_infos(self, layer: int) -> list[TensorInfo]:
        """What is read from the disk for one layer; for the first the embeddings too."""
        return self.infos(self.layer_names(layer) + ([self.family.embedding_name] if layer == 0 else []))

    def infos(self, names: Sequence[str]) -> list[TensorInfo]:
        """What is read from the disk for these tensors."""
        if isinstance(self.reader, SourceReader):
            stored = [part for n in names for part in self.reader.tensors[n].names]
        else:
            stored = [o.name for n in names for o in self.reader.tensors[n].outputs]
        return [self.reader.checkpoint.tensors[name] for name in stored]

    def stored_bytes(self, layer: int) -> int:
        """Bytes that reading one layer takes from the disk."""
        if isinstance(self.reader, SourceReader):
            return sum(self.reader.tensors[n].stored_bytes for n in self.layer_names(layer))
        return sum(nbytes(o) for n in self.layer_names(layer) for o in self.reader.tensors[n].outputs)

    def dense_bytes(self, layer: int) -> int:
        """Bytes of one layer in memory: BF16, whatever the disk holds."""
        if isinstance(self.reader, SourceReader):
            return sum(2 * self.reader.tensors[n].numel for n in self.layer_names(layer))
        return sum(2 * self.reader.tensors[n].source.numel for n in self.layer_names(layer))

    def fingerprint(self) -> str:
        """What distinguishes this checkpoint from others: headers and config, and for an output of m3quant its shards' hashes."""
        if self.manifest is None:
            return self.reader.checkpoint.fingerprint()
        return output_fingerprint(self.reader.checkpoint, self.manifest)

    def measured(self) -> Measured:
        stored = self.manifest["recipe"]["name"] if self.manifest else source_format(self.reader.checkpoint).label
        return Measured(name=self.name, fingerprint=self.fingerprint(), stored=stored)


def open_model(path: str | Path, label: str = "checkpoint") -> Model:
    """A source (in a layout of `planning.source_layouts`) or an output of m3quant. Raises CheckpointError, VerifyError or EvaluationError."""
    refuse_dropped(path)
    checkpoint = Checkpoint.open(path)
    folder = checkpoint.files()
    family = family_of(checkpoint.config, f"{path}/config.json")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _check_listed(checkpoint, manifest)
        plan = output_plan(checkpoint, manifest, None)
        converted = ConvertedReader(checkpoint, {t.name: t for t in plan.tensors}, plan.recipe.format)
        return Model(label, folder, converted, family, manifest)
    reader = SourceReader(checkpoint)
    check_complete(checkpoint, family, reader.tensors)
    return Model(label, folder, reader, family, None)


def _check_listed(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> None:
    """Raise EvaluationError where a repo's shards are not those that its manifest lists; those of an object store are compared as
    they come."""
    store = checkpoint.remote
    if store is None:
        return
    listed = {name: facts["sha256"] for name, facts in manifest["shards"].items()}
    if store.repo is None:
        store.expected.update(listed)
        return
    for name, sha256 in listed.items():
        if store.marks.get(name) != sha256:
            raise EvaluationError(f"{checkpoint.root}/{name} is not the file that its manifest lists: do not use it.")


def check_same_model(checkpoint: Model, source: Model) -> None:
    """Raise EvaluationError unless both are of one architecture, shape and vocabulary, with tokenizers that agree."""
    if checkpoint.family.model_type != source.family.model_type:
        raise EvaluationError(
            f"{checkpoint.where} is a {checkpoint.family.model_type}, {source.where} a {source.family.model_type}: "
            "give the source that this checkpoint was made from."
        )
    ours, theirs = _size(checkpoint.family), _size(source.family)
    for key, value in ours.items():
        if theirs[key] != value:
            raise EvaluationError(
                f"{checkpoint.where} has {key} {value}, {source.where} {theirs[key]}: they are not one model; "
                "give the source that this checkpoint was made from."
            )
    _check_tokenizers(checkpoint, source)


def _size(family: Family) -> dict[str, int]:
    experts = family.moe.num_experts if family.moe else 0
    return {
        "vocab_size": family.vocab_size,
        "num_hidden_layers": family.num_layers,
        "hidden_size": family.hidden_size,
        "routed experts": experts,
    }


def _check_tokenizers(checkpoint: Model, source: Model) -> None:
    differing = [name for name in _TOKENIZER_FILES if _bytes(checkpoint, name) != _bytes(source, name)]
    if not differing:
        return
    # The same tokenizer can be written in two ways: what counts is what it does.
    cores = [_core(load_tokenizer(model.folder)) for model in (checkpoint, source)]
    if cores[0] != cores[1]:
        raise EvaluationError(
            f"{differing[0]} of {checkpoint.where} and of {source.where} make different tokens, so the two models would "
            "not read one text: copy the source's tokenizer files."
        )


def _bytes(model: Model, name: str) -> bytes | None:
    path = model.folder / name
    return read_bounded(path, TOKENIZER_BYTES) if path.exists() else None


def _core(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
