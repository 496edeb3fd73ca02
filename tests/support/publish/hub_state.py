"""What the Hub on localhost holds (hub_server.py): a small git per repo, with an LFS store, and faults to come."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tests.support.publish.streams import Throttle

ATTRIBUTES = ".gitattributes"


@dataclass(frozen=True)
class Entry:
    """A file of a commit. claimed: a sha256 that the server states in place of the true one."""

    data: bytes
    lfs: bool = False
    claimed: str | None = None

    @property
    def size(self) -> int:
        return len(self.data)

    def pieces(self, first: int, end: int) -> Iterator[memoryview]:
        """The bytes from `first` to before `end`."""
        yield memoryview(self.data)[first:end]

    @cached_property
    def sha256(self) -> str:
        return self.claimed or hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_sha1(self) -> str:
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return lines.encode()

    def facts(self, path: str) -> dict[str, Any]:
        out: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.git_sha1}
        if self.lfs:
            out["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
            out["xetHash"] = hashlib.sha256(f"xet {self.sha256}".encode()).hexdigest()
        return out


@dataclass(frozen=True)
class Discarded(Entry):
    """A large file that came, was hashed and is kept no longer (`Hub.discards`)."""

    data: bytes = b""
    lfs: bool = True
    digest: str = ""
    count: int = 0

    @property
    def size(self) -> int:
        return self.count

    @cached_property
    def sha256(self) -> str:
        return self.claimed or self.digest

    def pieces(self, first: int, end: int) -> Iterator[memoryview]:
        raise AssertionError("the server has thrown this file away")


@dataclass
class Commit:
    oid: str
    parent: str | None
    tree: dict[str, Entry]
    title: str


@dataclass
class Repo:
    """What the server has under one name. The fields from `status` on say how reading from it misbehaves."""

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes | Discarded] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    status: int = 200
    error_code: str | None = None
    ignores_range: bool = False
    redirects: bool = False
    sizes: dict[str, int | None] = field(default_factory=dict)
    cuts: int | None = None
    failures: list[int] = field(default_factory=list)
    files_status: int | None = None

    def commit(self, tree: dict[str, Entry], title: str, branch: str = "main", oid: str | None = None) -> str:
        parent = self.branches.get(branch)
        facts = [parent, title, len(self.commits), sorted((p, e.git_sha1) for p, e in tree.items())]
        oid = oid or hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, tree, title)
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def tree(self, revision: str = "main") -> dict[str, Entry]:
        found = self.find(revision)
        return found.tree if found else {}

    @property
    def head(self) -> str:
        return self.branches["main"]


@dataclass
class Fault:
    """Answer requests whose "METHOD path" matches with `status` (None: drop the connection), `times` times.

    after: the request is carried out first, and only its answer is lost. skip: so many matching requests pass before.
    body_fault: of a file that is read, the status is not touched but its bytes: "cut" (the connection drops half-way), "wrong" (the last
    bit is another), "stall" (nothing more comes for `seconds`, half-way).
    """

    pattern: str
    status: int | None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False
    skip: int = 0
    body: bytes = b'{"error":"fault"}'
    body_fault: str = ""
    seconds: float = 0.0


def due(faults: Iterable[Fault], line: str) -> Fault | None:
    """The fault of a request, if one is due; it is counted. Not for several threads at once."""
    for fault in faults:
        if fault.times and re.search(fault.pattern, line):
            if fault.skip:
                fault.skip -= 1
                continue
            fault.times -= 1
            return fault
    return None


@dataclass
class Hub:
    """users: token -> (name, role); a user may write to repos under the own name and under `organizations`.

    down, up: limits on the bytes of files that are read and of large files that are sent, all connections together. discards: large
    files that are sent are checked and thrown away.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    users: dict[str, tuple[str, str]] = field(default_factory=dict)
    organizations: tuple[str, ...] = ("org",)
    lfs_from: int = 1000
    part_bytes: int = 4000
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, int]] = field(default_factory=list)
    sent: list[tuple[str, str, int]] = field(default_factory=list)
    before: Callable[[str], bool | None] = lambda line: None  # False: the request is not carried out
    after: Callable[[str], None] = lambda line: None  # it was carried out, its answer is not sent yet
    down: Throttle = field(default_factory=Throttle)
    up: Throttle = field(default_factory=Throttle)
    discards: bool = False
    corrupts: Callable[[str, Entry], Entry] = lambda path, entry: entry
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(
        self, name: str, files: dict[str, bytes], large: bool = False, oid: str | None = None, **facts: Any
    ) -> Repo:
        repo = self.repos[name] = Repo(name, **facts)
        tree = {path: Entry(data, large and len(data) >= self.lfs_from) for path, data in files.items()}
        repo.commit(tree, "initial", oid=oid)
        return repo

    def fault_for(self, line: str) -> Fault | None:
        return due(self.faults, line)

    def shard_bytes(self, repo: str) -> int:
        """Bytes of all answers to requests for this repo's shards."""
        return sum(count for name, file, count in self.sent if name == repo and file.endswith(".safetensors"))

    def received(self, pattern: str = r"PUT /lfs/") -> int:
        """Bytes of all bodies of requests that match: by default, content of large files."""
        return sum(count for line, count in self.log if re.search(pattern, line))

    def public_view(self, name: str) -> dict[str, Any] | None:
        """What is visible of a repo without a token: None, or branches, tags and the files of main."""
        repo = self.repos.get(name)
        if repo is None or repo.private:
            return None
        return {
            "branches": dict(repo.branches),
            "tags": dict(repo.tags),
            "files": sorted(set(repo.tree()) - {ATTRIBUTES}),
        }
