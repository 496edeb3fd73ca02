"""An object store on localhost for tests, whatever it speaks: what a test puts there, how it misbehaves, what was sent."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.support.publish.hub_state import Fault, due

BUCKET = "models"


@dataclass
class Objects(ABC):
    """scheme: of addresses; environment: what a process needs to speak with it. sent: (name, bytes) of every answer with content.
    before: called with "METHOD path" of every request; what asks for the content of an object is a GET, for its metadata a HEAD."""

    scheme: str
    environment: Mapping[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    sent: list[tuple[str, int]] = field(default_factory=list)
    before: Callable[[str], None] = lambda line: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @abstractmethod
    def put(self, name: str, data: bytes) -> None: ...

    def add(self, prefix: str, files: Mapping[str, bytes]) -> str:
        """Put files under a prefix; its address."""
        for name, data in files.items():
            self.put(f"{prefix}/{name}", data)
        return f"{self.scheme}://{BUCKET}/{prefix}"

    def fault_for(self, line: str) -> Fault | None:
        with self.lock:
            return due(self.faults, line)

    def bytes_of(self, suffix: str) -> int:
        """Bytes that were sent of objects whose names end so."""
        return sum(count for name, count in self.sent if name.endswith(suffix))


def distorted(data: bytes, fault: Fault | None) -> bytes:
    """The content that a fault sends in place of an object's: `wrong` in its last bit, or `cut` in the middle."""
    if fault is None or not data:
        return data
    return data[: len(data) // 2] if fault.body_fault == "cut" else data[:-1] + bytes([data[-1] ^ 1])
