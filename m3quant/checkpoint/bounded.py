"""Small text files: bounded in size before they are read, and YAML bounded in depth and in what its aliases expand to.

A config of 3 GB, or 300 bytes of YAML whose aliases stand for 10^9 nodes, must cost no more than a refusal.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import CheckpointError, M3QuantError
from .reader import open_file, open_followed
from .strict_json import parse_object

MIB = 2**20
# M3's config.json has 10 kB; one that lists every expert's modules as kept has 3 MB.
CONFIG_BYTES = 16 * MIB
# 190,000 tensors of an NVFP4 release take 25 MB. As much as safetensors allows a header (MAX_HEADER_BYTES).
INDEX_BYTES = 100_000_000
# m3quant.json describes every source tensor; SHA256SUMS, eval.json and reports are far smaller.
MANIFEST_BYTES = 256 * MIB
# M3's tokenizer.json has 10 MB.
TOKENIZER_BYTES = 128 * MIB
# Model cards, licence texts, notes, chat templates, small settings of a tokenizer.
TEXT_BYTES = 8 * MIB
YAML_BYTES = MIB
YAML_DEPTH = 64
# Counted with every alias expanded, as whatever prints or copies the value would.
YAML_NODES = 20_000
YAML_CHARACTERS = 8 * MIB
# PyYAML adds up 1:30:00 in base 60 with arithmetic that is quadratic in its length.
YAML_NUMBER_CHARACTERS = 64
_NUMBERS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def read_bounded(path: Path, limit: int, *, error: type[M3QuantError] = CheckpointError, follow: bool = False) -> bytes:
    """The content of a file of at most `limit` bytes. follow: also through a link, for files that the user names.

    Raises `error` for a larger file (without reading it), a link, a device, or one that cannot be read.
    """
    try:
        with (open_followed if follow else open_file)(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size <= limit:
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    data = file.read(size + 1)  # a buffer of this size is made before the first byte is read
                size = len(data)  # it may have grown
            if size > limit:
                raise CheckpointError(too_large(str(path), size, limit))
    except CheckpointError as refusal:
        raise refusal if error is CheckpointError else error(str(refusal)) from None
    return data


def check_size(path: Path, limit: int) -> None:
    """Raise CheckpointError for a file of more than `limit` bytes, a link, or one that cannot be read: for files that others read."""
    with open_file(path) as descriptor:
        size = os.fstat(descriptor).st_size
    if size > limit:
        raise CheckpointError(too_large(str(path), size, limit))


def too_large(where: str, size: int, limit: int) -> str:
    return (
        f"{where} has {size:,} bytes, more than the {limit:,} that such a file may have. Replace it by the right file."
    )


def read_text(path: Path, limit: int, *, error: type[M3QuantError] = CheckpointError, follow: bool = False) -> str:
    """As `read_bounded`, decoded as UTF-8; raises `error` also for what is not UTF-8."""
    try:
        return read_bounded(path, limit, error=error, follow=follow).decode("utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not UTF-8 text (byte {fault.start}). Replace it by the right file.") from None


def read_json(
    path: Path, limit: int, remedy: str, *, error: type[M3QuantError] = CheckpointError, follow: bool = False
) -> dict[str, Any]:
    """The JSON object in a file, its keys unique. Raises `error` as `read_bounded`, and for what is no such object."""
    raw = read_bounded(path, limit, error=error, follow=follow)
    try:
        return parse_object(raw, str(path), remedy)
    except CheckpointError as refusal:
        raise error(str(refusal)) from None


def parse_yaml(text: str | bytes, what: str, *, error: type[M3QuantError] = CheckpointError) -> Any:
    """The value of a YAML document (PyYAML's safe types). what: names the file in the error.

    Raises `error`, one sentence, for more than YAML_BYTES, for deeper nesting, more nodes or longer text than the bounds
    above (aliases expanded), for an alias inside its own anchor, and for what is not YAML.
    """
    beyond = ExpansionError if error is CheckpointError else error
    if len(text) > YAML_BYTES:
        raise beyond(too_large(what, len(text), YAML_BYTES))
    try:
        return yaml.load(text, _BoundedLoader)
    except _Beyond as fault:
        raise beyond(f"{what} is no YAML that is read here: {fault}. Write it plainly.") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError, KeyError, IndexError) as fault:
        # The last ones are PyYAML's on values such as !!int "" or !!timestamp "x"; ValueError also holds bad UTF-8.
        raise error(f"{what} is not YAML: {' '.join(str(fault).split())[:300]}.") from None


def read_yaml(path: Path, kind: str, *, error: type[M3QuantError] = CheckpointError, follow: bool = True) -> Any:
    """The value in a YAML file. kind: what the file is, for the error ("recipe"). Raises as `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, YAML_BYTES, error=error, follow=follow), f"{kind} {path}", error=error)


def front_matter(text: str) -> str | None:
    """The YAML between the two '---' lines at the top of a model card, or None."""
    match = _FRONT_MATTER.match(text)
    return match[1] if match else None


class ExpansionError(CheckpointError):
    """YAML beyond the bounds on size, depth or expansion: malicious, or not the file that it should be."""


class _Beyond(yaml.YAMLError):
    """One of the bounds, inside the loader."""


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, refusing while it composes nodes, before any value is made."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._nodes = 0

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _check_expansion(node)
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._nodes += 1
        if self._depth > YAML_DEPTH:
            raise _Beyond(f"it is nested more than {YAML_DEPTH} levels deep")
        if self._nodes > YAML_NODES:
            raise _Beyond(f"it has more than {YAML_NODES:,} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > YAML_NUMBER_CHARACTERS:
            raise _Beyond(f"a number of {len(node.value):,} characters")
        return node


def _check_expansion(root: yaml.Node) -> None:
    """Raise YAMLError where `root` with its aliases expanded is beyond the bounds. Linear in the nodes as written."""
    # A node that is met again while it is being counted is an alias inside its own anchor: it expands without end.
    sizes: dict[int, tuple[int, int] | None] = {}

    def count(node: yaml.Node) -> tuple[int, int]:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise _Beyond("an alias refers to the value that it is part of")
            return known
        sizes[id(node)] = None
        nodes, characters = 1, len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        if not isinstance(node, yaml.ScalarNode):
            children = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
            for child in children:
                more = count(child)  # at most YAML_DEPTH deep as written, so that this recursion is bounded
                nodes, characters = nodes + more[0], characters + more[1]
                if nodes > YAML_NODES or characters > YAML_CHARACTERS:
                    raise _Beyond(
                        f"its aliases expand to more than {YAML_NODES:,} values or {YAML_CHARACTERS:,} characters"
                    )
        sizes[id(node)] = (nodes, characters)
        return nodes, characters

    count(root)
