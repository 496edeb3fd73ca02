"""A checkpoint of which only the tensors' names, dtypes and shapes are known: for plans without the files.

Two uses: verify plans an output again from its manifest, and `plan config.json` answers before anything is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from ..checkpoint.bounded import CONFIG_BYTES, read_bounded
from ..checkpoint.strict_json import parse_object
from ..errors import CheckpointError
from ..families import Family, family_of
from ..families.spec import LayerSpec, layer_tensors
from .source_format import KeptModules, file_format, stored_entries
from .source_layouts import PLAIN, stored_parts


class HeaderSource(Checkpoint):
    """Stands in for a Checkpoint where only headers are asked for; reading a tensor raises CheckpointError."""

    def __init__(self, root: str, config: Mapping[str, Any]) -> None:
        self.root = root
        self.config = dict(config)
        self.revision = None
        self.tensors: dict[str, TensorInfo] = {}
        self.shards = {}
        self.other_files: list[str] = []
        self.skipped_files: dict[str, str] = {}
        self.warnings: list[str] = []

    def add(
        self, name: str, dtype: str, shape: tuple[int, ...], kind: str = PLAIN, scale_dtype: str | None = None
    ) -> None:
        """A tensor of that dtype, or of a quantized kind what releases store of it. shape: of the tensor in the model."""
        if kind == PLAIN:
            self._put(name, dtype, shape)
            return
        for part, part_dtype, part_shape in stored_parts(kind, name, shape, scale_dtype):
            self._put(part, part_dtype, part_shape)

    def add_parts(self, name: str, parts: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """What is stored of the weight `name` by leaf: dtype and shape."""
        for leaf, (dtype, shape) in parts.items():
            self._put(f"{name.removesuffix('weight')}{leaf}", dtype, shape)

    def _put(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.tensors[name] = TensorInfo(name, dtype, shape, self.root, 0, DTYPE_BYTES[dtype] * math.prod(shape))

    @property
    def local(self) -> bool:
        return False

    def fingerprint(self) -> str:
        return ""

    def read_many(self, names: Any) -> Any:
        raise CheckpointError(f"{self.root} has no weights: only names and shapes are known.")


class ConfigSource(HeaderSource):
    """The release that a config.json describes. `tensors` are listed when they are read; a plan reads one layer of each kind."""

    def __init__(self, path: str, config: Mapping[str, Any]) -> None:
        """Raises CheckpointError for another file or architecture, and for what config.json alone does not tell."""
        super().__init__(path, config)
        del self.tensors
        self._family = family_of(config, path)
        self._stored = file_format(Path(path), config)
        self._stored.required_kind()
        self._keeps = KeptModules(self._stored.kept, self._family, self._stored.file)
        next(stored_entries(self._family, self._stored, (), self._keeps))
        self.warnings.append(
            "planned from config.json alone: sizes are those of the weights the config promises, without other files"
        )

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:  # type: ignore[override]  # listed when it is read
        return self.some(self._family.layers).tensors

    def some(self, layers: Iterable[LayerSpec]) -> HeaderSource:
        """Some layers of the release, and what belongs to no layer."""
        found = HeaderSource(self.root, self.config)
        for name, dtype, shape in stored_entries(self._family, self._stored, layers, self._keeps):
            found.add(name, dtype, shape)
        return found

    def layer_kinds(self) -> list[int]:
        """For every layer the first one that stores the same under names of the same length."""
        family, keeps = self._family, self._keeps
        if self._stored.stated.modules or keeps.names_experts:
            return list(range(family.num_layers))
        first: dict[object, int] = {}
        return [first.setdefault(_kind_of(family, spec, keeps), spec.index) for spec in family.layers]


def _kind_of(family: Family, spec: LayerSpec, keeps: KeptModules) -> object:
    prefix = family.layer_prefix(spec.index)
    one_expert = replace(spec, moe=replace(spec.moe, num_experts=1)) if spec.moe else spec
    kept = tuple(f"{prefix}{name}" in keeps for name in layer_tensors(one_expert))
    return len(prefix), replace(spec, index=0), kept


def from_config(path: Path) -> ConfigSource:
    """The release that a config.json describes, for planning. Raises CheckpointError for another file or architecture."""
    raw = read_bounded(path, CONFIG_BYTES, follow=True)
    return ConfigSource(str(path), parse_object(raw, str(path), "Give the config.json of a release.", constants=True))
