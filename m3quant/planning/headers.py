"""A checkpoint of which only the tensors' names, dtypes and shapes are known: for plans without the files.

Two uses: verify plans an output again from its manifest, and `plan config.json` answers before anything is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from ..checkpoint.bounded import CONFIG_BYTES, read_bounded
from ..checkpoint.strict_json import parse_object
from ..errors import CheckpointError
from ..families import family_of
from .source_format import file_format, stored_entries
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


def from_config(path: Path) -> HeaderSource:
    """The release that a config.json describes, for planning. Raises CheckpointError for another file or architecture."""
    raw = read_bounded(path, CONFIG_BYTES, follow=True)
    config = parse_object(raw, str(path), "Give the config.json of a release.", constants=True)
    family = family_of(config, str(path))
    stored = file_format(path, config)
    stored.required_kind()
    source = HeaderSource(str(path), config)
    for name, dtype, shape in stored_entries(family, stored):
        source.add(name, dtype, shape)
    source.warnings.append(
        "planned from config.json alone: sizes are those of the weights the config promises, without other files"
    )
    return source
