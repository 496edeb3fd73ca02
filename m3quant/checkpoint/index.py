"""model.safetensors.index.json: which shard holds which tensor, checked against the shards' own headers."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import CheckpointError
from .header import TensorInfo
from .strict_json import described, parse_object, shown

INDEX_NAME = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})\.safetensors", re.ASCII)
_REMEDY = "Copy or download the index and its shards again."


@dataclass(frozen=True)
class Index:
    """weight_map: tensor name -> shard file name; total_size: bytes of all tensors, if the index states it."""

    weight_map: dict[str, str]
    total_size: int | None

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


def parse_index(raw: bytes, where: str) -> Index:
    """Parse and validate an index; `where` names it in errors. Raises CheckpointError."""
    parsed = parse_object(raw, where, _REMEDY)
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map from tensor names to shard files. {_REMEDY}")
    plain: set[str] = set()  # few names for many tensors: each is looked at once
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or (shard not in plain and not _is_plain_file_name(shard)):
            raise CheckpointError(
                f"{where} puts tensor {shown(tensor)} into {described(shard, 160)}, which is not the plain name of a "
                f".safetensors file next to the index. {_REMEDY}"
            )
        plain.add(shard)
    metadata = parsed.get("metadata")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total_size, bool) or not isinstance(total_size, int):
        total_size = None
    return Index(weight_map, total_size)


def _is_plain_file_name(name: str) -> bool:
    # A path separator or '..' could lead out of the checkpoint's folder; a hidden file is never a shard.
    return name.endswith(".safetensors") and name.isprintable() and name[0] != "." and not set(name) & set("/\\")


def check_shard_files(index: Index, present: Iterable[str], where: str, index_where: str) -> None:
    """Every shard of the index is there, and no other .safetensors file is. Raises CheckpointError."""
    found = set(present)
    absent = [shard for shard in index.shards if shard not in found]
    if absent:
        tensor = next(name for name, shard in index.weight_map.items() if shard == absent[0])
        raise CheckpointError(
            f"{index_where} names {_several(absent, 'shard')}, absent from {where} (tensor {shown(tensor)} "
            f"should be in {absent[0]}). Download what is missing, or the whole checkpoint again."
        )
    unnamed = sorted(found.difference(index.shards))
    if unnamed:
        raise CheckpointError(
            f"{where} holds {_several(unnamed, 'shard')} which {index_where} does not name, so that its tensors "
            f"would be lost. Move it out of the folder, or bring the index that belongs to it."
        )


def check_numbering(shards: Iterable[str], where: str) -> None:
    """Without an index, shards numbered 'x-00001-of-00003' must all be there, from 1 on or (MiniMax M2.x) from 0 on.

    Which of the two it is, is known where the first or the last of the count is there. Raises CheckpointError.
    """
    found: dict[tuple[str, str], set[int]] = {}
    for shard in shards:
        match = _NUMBERED.fullmatch(shard)
        if match:
            found.setdefault((match["stem"], match["count"]), set()).add(int(match["number"]))
    for (stem, digits), numbers in found.items():
        count, width = int(digits), len(digits)

        def name(number: int, stem: str = stem, digits: str = digits, width: int = width) -> str:
            return f"{stem}-{number:0{width}d}-of-{digits}.safetensors"

        if max(numbers) > count or {0, count} <= numbers:
            last = max(numbers)
            raise CheckpointError(
                f"{where} has no {INDEX_NAME}, and {name(last)} is one of {len(numbers)} shards numbered {min(numbers)} to {last}, "
                f"where the names promise {count}. Bring the index, or move out of the folder what belongs to another download."
            )
        absent = sorted(set(range(count + 1)) - numbers)  # one is absent of a whole set, which begins at 0 or at 1
        if len(absent) == 1 and absent[0] in (0, count):
            continue
        if 0 in numbers or count in numbers:
            absent.remove(count if 0 in numbers else 0)
            which = f"first {name(absent[0])}"
        else:
            absent.remove(0)
            which = f"{name(0)} or {name(count)}" + (f" and {name(absent[0])}" if len(absent) > 1 else "")
        raise CheckpointError(
            f"{where} has no {INDEX_NAME}, and of {count} numbered shards {len(absent)} {'is' if len(absent) == 1 else 'are'} "
            f"absent: {which}. Download what is missing, or bring the index if there never were more shards."
        )


def check_tensors(index: Index, tensors: Mapping[str, TensorInfo], where: str, index_where: str) -> list[str]:
    """Index and headers agree on every tensor and its shard. Returns warnings; raises CheckpointError."""
    for name, shard in index.weight_map.items():
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{index_where} says that tensor {shown(name)} is in {shard}, but no shard of {where} has it. {_REMEDY}"
            )
        if info.shard != shard:
            raise CheckpointError(
                f"{index_where} says that tensor {shown(name)} is in {shard}, but it is in {info.shard}. {_REMEDY}"
            )
    unnamed = [name for name in tensors if name not in index.weight_map]
    if unnamed:
        raise CheckpointError(
            f"{index_where} does not name {_several(unnamed, 'tensor')}, which {tensors[unnamed[0]].shard} holds. "
            f"{_REMEDY}"
        )
    stored = sum(info.nbytes for info in tensors.values())
    if index.total_size is not None and index.total_size != stored:
        # Published indexes are off now and then, and no loader reads this number: worth a word, not a refusal.
        return [f"{INDEX_NAME} states total_size {index.total_size}, but the tensors take {stored} bytes."]
    return []


def _several(names: list[str], noun: str) -> str:
    text = ", ".join(shown(name) for name in names[:3])
    if len(names) == 1:
        return f"the {noun} {text}"
    return f"{len(names)} {noun}s ({text}{', ...' if len(names) > 3 else ''})"
