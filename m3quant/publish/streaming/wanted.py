"""What a person wants published of a conversion that has yet to run."""

from __future__ import annotations

from dataclasses import dataclass

from ..gates import Asked
from ..upload import DEFAULT_TAG


@dataclass(frozen=True)
class Wanted:
    """repo: ORG/NAME; asked: of base and licence; drop: whether a shard leaves the disk once the Hub states its checksum."""

    repo: str
    asked: Asked
    drop: bool = False
    tag: str = DEFAULT_TAG
