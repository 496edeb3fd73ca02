"""What an upload takes from the Python beside it: `python -m tests.benchmarks.upload_interpreter --files 3 --size 1GB --rounds 3`.

A thread counts while the same process sends files to a Hub on localhost that throws them away: with nothing sent, with the files sent by
threads, and by processes of their own. Turn about, in one run. Between two counts it calls what gives the interpreter away for microseconds,
as work on a GPU and files does; each time it must get it back. Also the seconds of CPU that the server takes for a gigabyte
that comes in, and for one that goes out to a reader that throws it away. --rate bounds the upload.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.publish.synthetic_hub import Started, rate, started

CONFIG = ROOT / "tests" / "fixtures" / "tiny-m2" / "config.json"
CALLED = bytes(4096)  # from 2 KiB on, hashlib gives the interpreter away meanwhile
TICKS = os.sysconf("SC_CLK_TCK")
PIECE_BYTES = 4 * 2**20


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / TICKS


@dataclass(frozen=True)
class Beside:
    """What a counting thread got beside some work. counts: a second; waited: the part of the time in which it had neither a core nor a
    place in the queue for one, so that it waited for the interpreter; user: seconds of CPU in user mode that the other threads of this
    process took, most of them with the interpreter; seconds: of the work."""

    counts: float
    waited: float
    user: float
    seconds: float


def user_seconds(whose: int) -> float:
    return resource.getrusage(whose).ru_utime


def counted(work: Callable[[], Any]) -> Beside:
    number, times = 0, [0.0, 0.0, 0.0]
    over = threading.Event()

    def count() -> None:
        nonlocal number
        began = time.perf_counter()
        while not over.is_set():
            hashlib.sha256(CALLED)
            number += 1
        seconds = time.perf_counter() - began
        # nanoseconds on a core and in the queue: https://docs.kernel.org/scheduler/sched-stats.html
        ran, queued, _ = map(int, Path("/proc/thread-self/schedstat").read_text().split())
        times[:] = [seconds, 1 - (ran + queued) / 1e9 / seconds, user_seconds(resource.RUSAGE_THREAD)]

    thread = threading.Thread(target=count)
    began, before = time.perf_counter(), user_seconds(resource.RUSAGE_SELF)
    thread.start()
    work()
    seconds = time.perf_counter() - began
    over.set()
    thread.join()
    user = user_seconds(resource.RUSAGE_SELF) - before - times[2]
    return Beside(number / times[0], times[1], user, seconds)


def made(folder: Path, number: int, size: int) -> list[Path]:
    paths = [folder / f"model-{n}.safetensors" for n in range(number)]
    for path in paths:
        piece = os.urandom(PIECE_BYTES)
        with path.open("wb") as file:
            for start in range(0, size, PIECE_BYTES):
                file.write(start.to_bytes(8) + piece[8 : min(PIECE_BYTES, size - start)])
    return paths


class Uploads:
    """The same files, each time to another repo. digests: what the conversion knows of its shards."""

    def __init__(self, paths: list[Path]) -> None:
        from m3quant.checkpoint import sha256_file

        self.paths, self.digests, self._repos = paths, [sha256_file(path) for path in paths], 0

    def send(self, processes: bool) -> Beside:
        """`counted` of one upload, the start of its processes included."""
        from huggingface_hub import CommitOperationAdd

        from m3quant.publish.remote import Remote
        from m3quant.publish.upload import declare
        from m3quant.running import workers

        self._repos += 1
        remote = Remote(f"someone/sent{self._repos}")
        remote.create()
        workers.WORTH_BYTES = 0
        operations = [CommitOperationAdd(path.name, str(path)) for path in self.paths]
        for operation, digest in zip(operations, self.digests, strict=True):
            declare(operation, digest)

        def work() -> None:
            if processes:
                with remote.sending(1):
                    remote.preupload(operations, "main", len(operations))
            else:
                remote.preupload(operations, "main", len(operations))

        return counted(work)


def read_all(hub: Started, wanted: int) -> int:
    """Read at least `wanted` bytes of the server's shards, over and over; how many came."""
    with urllib.request.urlopen(f"{hub.url}/api/models/{hub.repo}") as answer:
        names = [file["rfilename"] for file in json.load(answer)["siblings"]]
    buffer, came = memoryview(bytearray(PIECE_BYTES)), 0
    while came < wanted:
        for name in names:
            with urllib.request.urlopen(f"{hub.url}/{hub.repo}/resolve/main/{name}") as answer:
                while got := answer.readinto(buffer):
                    came += got
    return came


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--size", type=rate, default=1e9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", default=None, help="bytes a second that the server takes: 200MB")
    parser.add_argument("--work", type=Path, default=None, help="folder for the files; in memory is best")
    parser.add_argument("--config", type=Path, default=CONFIG)
    asked = parser.parse_args()
    total = asked.files * int(asked.size)
    with tempfile.TemporaryDirectory(dir=asked.work) as name:
        beside = Path(name) / "beside"
        beside.mkdir()
        with started(asked.config, "base/read", None, asked.rate, beside) as hub:
            os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET="1")
            os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1")
            uploads = Uploads(made(Path(name), asked.files, int(asked.size)))
            found: dict[str, list[Beside]] = {"alone": [], "threads": [], "processes": []}
            for _ in range(asked.rounds):
                found["alone"].append(counted(lambda: time.sleep(3)))
                for how in ("threads", "processes"):
                    before = cpu_seconds(hub.process.pid)
                    beside_it = uploads.send(how == "processes")
                    found[how].append(beside_it)
                    server = (cpu_seconds(hub.process.pid) - before) / total * 1e9
                    print(
                        f"{how}: {beside_it.counts / found['alone'][-1].counts:.2f} of the counts alone, waited for the interpreter "
                        f"{beside_it.waited:.0%} of the time, "
                        f"{beside_it.user / total * 1e9:.2f} s of CPU in Python a GB, {total / beside_it.seconds / 1e9:.2f} GB/s, server {server:.2f} s of CPU a GB",
                        flush=True,
                    )
            before = cpu_seconds(hub.process.pid)
            came = read_all(hub, total)
            print(f"going out: server {(cpu_seconds(hub.process.pid) - before) / came * 1e9:.2f} s of CPU a GB")
        counts = {how: statistics.median(one.counts for one in kept) for how, kept in found.items()}
        waited = {how: round(statistics.median(one.waited for one in kept), 3) for how, kept in found.items()}
        user = {how: round(statistics.median(one.user for one in kept) / total * 1e9, 3) for how, kept in found.items()}
        shares = {how: round(n / counts["alone"], 3) for how, n in counts.items()}
        print(json.dumps({"counts": shares, "waited": waited, "user_seconds_per_GB": user}))


if __name__ == "__main__":
    main()
