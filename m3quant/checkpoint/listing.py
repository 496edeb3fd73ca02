"""What a checkpoint's folder or repo holds: shards, other files, and what is left out, with the reason."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from .index import INDEX_NAME
from .links import cache_blob, is_regular, link_refusal
from .strict_json import shown

CONFIG_NAME = "config.json"
# A draft model for speculative decoding that a release keeps next to its shards, outside the index: it is carried over whole. SGLang
# looks for MiniMax-M3.1's there (srt/arg_groups/speculative_hook.py).
DRAFT_FOLDERS = frozenset({"dspark"})
OTHER_WEIGHT_SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".tflite"}
)


@dataclass
class Listing:
    """Relative names with '/'. shards: *.safetensors at the top; other: files to carry over, a draft's among them; skipped: name -> reason.

    config.json and the index are in neither list: a converter writes its own, last.
    """

    shards: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    has_config: bool = False
    has_index: bool = False


def classify(names: Iterable[str], where: str, skipped: dict[str, str] | None = None) -> Listing:
    """Sort relative file names into a Listing. Raises CheckpointError for a name that leads out of the folder."""
    listing = Listing(skipped=dict(skipped or {}))
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not name or not name.isprintable() or "\\" in name:
            raise CheckpointError(
                f"{where} lists a file named {shown(name)}, which is no usable name. Remove or rename it."
            )
        top = len(path.parts) == 1
        if any(part.startswith(".") for part in path.parts):
            listing.skipped[name] = "hidden file"
        elif not top and path.parts[0] in DRAFT_FOLDERS:
            listing.other.append(name)
        elif path.suffix == ".safetensors":
            if top:
                listing.shards.append(name)
            else:
                listing.skipped[name] = "safetensors file in a subfolder: not part of this checkpoint"
        elif top and name == CONFIG_NAME:
            listing.has_config = True
        elif top and name == INDEX_NAME:
            listing.has_index = True
        elif name.endswith(".safetensors.index.json"):
            listing.skipped[name] = f"an index other than {INDEX_NAME}"
        elif path.suffix.lower() in OTHER_WEIGHT_SUFFIXES:
            listing.skipped[name] = f"weights or state in another format ({path.suffix})"
        else:
            listing.other.append(name)
    listing.skipped = dict(sorted(listing.skipped.items()))
    return listing


def list_folder(root: Path) -> Listing:
    """List a local folder. Raises CheckpointError if it cannot be listed, or for a file that is a link but the Hub cache's own."""
    names: list[str] = []
    skipped: dict[str, str] = {}

    def refuse(error: OSError) -> None:
        raise CheckpointError(f"{error.filename} cannot be listed: {error.strerror}. Check its permissions.") from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        base = Path(folder).relative_to(root)
        for name in list(folders):
            path = base / name
            reason = _folder_skip_reason(root / path, name)
            if reason:
                folders.remove(name)
                skipped[path.as_posix() + "/"] = reason
        for name in files:
            path = base / name
            linked = (root / path).is_symlink()
            if linked and not name.startswith(".") and cache_blob(root / path) is None:
                raise CheckpointError(link_refusal(root / path))
            if linked or is_regular(root / path) or (name.endswith(".safetensors") and len(path.parts) == 1):
                # A shard that is a device is refused when it is opened, never passed over.
                names.append(path.as_posix())
            else:
                skipped[path.as_posix()] = "not a regular file"
    return classify(names, str(root), skipped)


def _folder_skip_reason(path: Path, name: str) -> str | None:
    if name.startswith("."):
        return "hidden folder"
    if name == "__pycache__":
        return "compiled Python"
    if path.is_symlink():
        return "link to a folder"
    return None
