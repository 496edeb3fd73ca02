"""Forks a child for every job that comes as a line of JSON on stdin (see client.py).

Jobs: {"cli": [ARGUMENT, ...]} runs the m3quant command, with "system" as on another system (other_system.py), with "processes" with downloads and uploads in processes of their own; {"upload": FOLDER, "repo": ..., options} runs `upload` on the files
of a folder, without the gates of the command.
small_bytes: from how many on a file is sent from the disk. die_at: number of the
durable operation at which the process ends itself, 0 for none; operations: a file for the names of all of them.
"""

import hashlib
import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHORT_SLEEPS = Path(__file__).with_name("short_sleeps")


def upload_folder(job: dict[str, Any]) -> None:
    from m3quant.publish import upload as module
    from m3quant.publish.files import PublishFile

    module.GROUP_FILES = job.get("group_files", 2)
    root = Path(job["upload"])
    files = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append(PublishFile(path.relative_to(root).as_posix(), path, path.stat().st_size, digest, "base" in job))

    class Progress:
        def start(self, total_bytes: int, done_bytes: int, label: str = "") -> None:
            print(f"{done_bytes} of {total_bytes}", file=sys.stderr)

        def advance(self, count: int) -> None:
            print(f"+{count}", file=sys.stderr)

        def beside(self, label: str, total_bytes: int) -> Callable[[int], None]:
            raise AssertionError("an upload has one stream")

        def say(self, line: str) -> None:
            print(line, file=sys.stderr)

    names = ("tag", "public", "replace")
    options = {name: job[name] for name in names if name in job}
    base = tuple(job["base"]) if "base" in job else None
    result = module.upload(job["repo"], module.Target(files, base=base, **options), Progress())
    print(json.dumps(result.to_json()))


def child(job: dict[str, Any]) -> None:
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(job["environment"])
    os.environ["M3QUANT_TEST_PAUSES"] = job["pauses"]
    runpy.run_path(str(SHORT_SLEEPS / "sitecustomize.py"))
    from m3quant import cli
    from m3quant.publish import upload

    if "system" in job:
        runpy.run_path(str(Path(__file__).parents[1] / "other_system.py"))["become"](job["system"])
    if job.get("processes"):
        from m3quant.running import workers

        workers.WORTH_BYTES = 0
        sys.path.insert(0, str(SHORT_SLEEPS))  # theirs, too
    upload.SMALL_BYTES = job.get("small_bytes", 1000)
    if "upload" in job:

        def run(**_: object) -> None:
            upload_folder(job)

        cli.cli = run  # type: ignore[assignment]
    else:
        sys.argv = ["m3quant", *job["cli"]]
    with counted_operations(job):
        cli.main()


@contextmanager
def counted_operations(job: dict[str, Any]) -> Iterator[None]:
    if "die_at" not in job:
        yield
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from tests.support.convert.kill_driver import Counter, die

    counter = Counter(job["die_at"], die)
    counter.install()
    try:
        yield
    finally:
        Path(job["operations"]).write_text("\n".join(counter.names))


def main() -> None:
    import huggingface_hub.hf_api  # noqa: F401

    for module in ("m3quant.cli", "m3quant.cli.pull", "m3quant.publish.upload", *sys.argv[1:]):
        importlib.import_module(module)
    from m3quant.publish.remote import copies_between_repos

    # As at a terminal, also where whoever started the tests has the signal ignored (`nohup`, a shell's background).
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(json.dumps({"copies": copies_between_repos()}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            sys.stdin.readline()  # the test has noted our number
            code = 70
            try:
                child(json.loads(line))
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
