"""Kills `convert --publish --drop-uploaded` with SIGKILL again and again, each time elsewhere, and continues it.

    python -m tests.support.publish.kill_convert --points 50 [--to awq] [--from-hub]

Half of the points are durable operations of the process (`convert.kill_driver`), half are requests that change something on the
Hub, before and after the Hub carries them out; both are spread evenly over a whole run. After each kill it is looked at what a
stranger and the owner of the repo see and what lies on the disk; then the same command runs to its end, which must be the end
of the undisturbed run. Prints one row a kill.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from m3quant.artifact.uploads import read_uploads
from m3quant.recipe.recipe import build_recipe, named_recipe
from tests.support.convert.common import COARSE, FEW
from tests.support.publish.client import TOKEN, Client, running_client
from tests.support.publish.converting import BASE, IMPORTED, REPO, STAGING, command, hub_with, shards, small_source
from tests.support.publish.hub_server import running_hub
from tests.support.publish.hub_state import ATTRIBUTES, Hub

# Requests that change nothing, though they are no GETs.
QUESTIONS = ("/preupload/", "/paths-info/", "/objects/batch", "/validate-yaml", "/verify")


def changes(line: str) -> bool:
    return not line.startswith(("GET", "HEAD")) and not any(part in line for part in QUESTIONS)


@dataclass(frozen=True)
class Point:
    """Where to die: at a durable operation of the process (1-based), or at a change on the Hub (0-based), before or after it."""

    operation: int = 0
    change: int = -1
    after: bool = False


@dataclass
class Seen:
    """What was there after a kill. problems: what must not have been."""

    where: str
    stranger: str
    owner: str
    here: str
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"| {self.where} | {self.stranger} | {self.owner} | {self.here} |"


class Killer:
    """One source and one Hub; `at` kills and continues a conversion. whole: what main holds at the end of an undisturbed run."""

    def __init__(self, hub: Hub, client: Client, source: Path | str, folder: Path, to: str) -> None:
        self.hub, self.client, self.folder, self.out = hub, client, folder, folder / "converted"
        recipe = folder / "quick.yaml"
        document = named_recipe(to)
        if build_recipe(document).calibrated:
            document = {**document, "rounding": "awq", "data": FEW, "awq": COARSE}
        recipe.write_text(yaml.safe_dump(document))
        self.job = command(source, self.out, "--drop-uploaded", to=None)
        self.job["cli"] += ["--recipe", str(recipe)]
        self.job["operations"] = str(folder / "operations")
        lines: list[str] = []
        hub.after = lambda line: lines.append(line) if changes(line) else None
        done = self._run(0)
        assert done == 0, client.seen[-1]
        self.changes = lines
        self.operations = (folder / "operations").read_text().split()
        self.whole = self._main()

    def _run(self, die_at: int, started: Any = None) -> int:
        return self.client.run(self.job | {"die_at": die_at}, started=started).code

    def _main(self) -> dict[str, bytes]:
        repo = self.hub.repos.get(REPO)
        return {n: e.data for n, e in repo.tree().items() if n != ATTRIBUTES} if repo else {}

    def points(self, count: int) -> list[Point]:
        """`count` of them, spread evenly over both kinds."""
        first = [Point(operation=1 + n) for n in spread(len(self.operations), count - count // 2)]
        second = [Point(change=n // 2, after=bool(n % 2)) for n in spread(2 * len(self.changes), count // 2)]
        return first + second

    def at(self, point: Point) -> Seen:
        """Begin anew, die at `point`, look, continue to the end."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.hub.repos.pop(REPO, None)
        partial: list[str] = []
        where = self._killed(point, partial)
        seen = self._look(where)
        self.hub.after = lambda line: self._watch(line, partial)
        if self._run(0):
            seen.problems.append(f"the same command did not continue: {self.client.seen[-1].splitlines()[-1:]}")
        self.hub.after = lambda line: None
        seen.problems += [*partial, *self._end()]
        return seen

    def _killed(self, point: Point, partial: list[str]) -> str:
        """Run until the point; what was going on there."""
        process: list[int] = []
        begun: list[int] = []  # threads of the changes, in the order in which they began
        struck: list[str] = []
        lock = threading.Lock()

        def strike(line: str) -> None:
            struck.append(line)
            os.kill(process[0], signal.SIGKILL)

        def before(line: str) -> bool | None:
            with lock:
                if struck:
                    return False
                if changes(line):
                    begun.append(threading.get_ident())
                    if len(begun) == point.change + 1 and not point.after:
                        strike(line)
                        return False
                return None

        def after(line: str) -> None:
            self._watch(line, partial)
            with lock:
                mine = 0 <= point.change < len(begun) and begun[point.change] == threading.get_ident()
                if point.after and changes(line) and mine and not struck:
                    strike(line)

        self.hub.before, self.hub.after = before, after
        code = self._run(point.operation, process.append)
        self.hub.before = lambda line: None
        if point.operation:
            where = (
                f"operation {point.operation} of {len(self.operations)}, about {self.operations[point.operation - 1]}"
            )
        else:
            place = struck[0].replace(REPO, "REPO") if struck else "not reached"
            where = f"{'after' if point.after else 'before'} {'/'.join(p[:12] for p in place.split('/'))}"
        # Threads take turns otherwise in every run: a point near the end may lie behind the end of this one.
        return where if code == -signal.SIGKILL else f"{where}: not reached"

    def _watch(self, line: str, partial: list[str]) -> None:
        if self.hub.public_view(REPO) is not None:
            partial.append(f"a stranger sees the repo at {line}")
        if (main := self._main()) and main.keys() != self.whole.keys():
            partial.append(f"main holds {len(main)} of {len(self.whole)} files at {line}")

    def _look(self, where: str) -> Seen:
        repo = self.hub.repos.get(REPO)
        staged = {n: e.data for n, e in repo.tree(STAGING).items() if n != ATTRIBUTES} if repo else {}
        main = "no repo" if repo is None else "main whole" if self._main() else "main empty"
        uploads = read_uploads(self.out) if self.out.exists() else None
        dropped = uploads.dropped if uploads else []
        there = {**staged, **self._main()}
        problems = [
            f"{name} is neither here nor whole on the Hub" for name in dropped if there.get(name) != self.whole[name]
        ]
        here = shards(self.out) if self.out.exists() else []
        problems += [f"{name} is half" for name in here if (self.out / name).read_bytes() != self.whole[name]]
        if (self.out / "config.json").exists() and set(here) | set(dropped) != self._shard_names():
            problems.append("config.json before the rest")
        owner = f"{main}, {len(staged)} files on the branch" if staged else main
        stranger = "nothing" if self.hub.public_view(REPO) is None else "the repo"
        return Seen(where, stranger, owner, f"{len(here)} shards here, {len(dropped)} dropped", problems)

    def _shard_names(self) -> set[str]:
        return {name for name in self.whole if name.endswith(".safetensors")}

    def _end(self) -> Iterator[str]:
        main, repo = self._main(), self.hub.repos[REPO]
        if main.keys() != self.whole.keys():
            yield f"main holds other files: {sorted(main.keys() ^ self.whole.keys())}"
        # README, manifest and the sums of both hold times.
        timed = {"README.md", "m3quant.json", "SHA256SUMS", "eval.json"}
        for name in sorted((main.keys() & self.whole.keys()) - timed):
            if main[name] != self.whole[name] and not name.startswith("m3quant-report/"):
                yield f"{name} holds other bytes than in the undisturbed run"
        if list(repo.branches) != ["main"] or repo.tags != {"v1": repo.head}:
            yield f"branches {list(repo.branches)}, tags {repo.tags}"
        if shards(self.out):
            yield f"{len(shards(self.out))} shards were not dropped"


def spread(count: int, wanted: int) -> Sequence[int]:
    """`wanted` of range(count), evenly; all of them if there are fewer."""
    wanted = min(count, wanted)
    return [(2 * n + 1) * count // (2 * wanted) for n in range(wanted)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--to", default="int4")
    parser.add_argument("--from-hub", action="store_true", help="convert the base on the Hub, not its folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, running_hub() as hub:
        folder = Path(name)
        hub.users = {TOKEN: ("someone", "write")}
        source = small_source(folder / "source", layers=4)
        with hub_with(hub, source), running_client(hub.url, folder, *IMPORTED) as client:
            killer = Killer(hub, client, BASE if asked.from_hub else source, folder, asked.to)
            failed = 0
            print(f"{len(killer.operations)} durable operations, {len(killer.changes)} changes on the Hub")
            print("| killed at | a stranger sees | the owner sees | on the disk |\n|---|---|---|---|")
            for point in killer.points(asked.points):
                seen = killer.at(point)
                print(seen, flush=True)
                failed += bool(seen.problems)
                for problem in seen.problems:
                    print(f"PROBLEM: {problem}")
            print(f"{asked.points} kills, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
