"""Work in processes of its own: what arrives of it, and that nothing is left of them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from m3quant.publish.failures import failure_of
from m3quant.running.workers import Tell, WorkerLost, Workers, WorkersEnded, WorkFailed, portable
from tests.support.paths import ROOT
from tests.support.workers import alive


def work(tell: Tell, what: str, folder: Path | None = None) -> Any:
    """A job of every kind; its value names the process."""
    if what == "odd":
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "odd")
    if what == "local":
        raise type("Local", (Exception,), {})("here alone")
    if what == "no value":
        return threading.Lock()
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "half":  # of an answer
        os.write(int(sys.argv[1]), pickle.dumps(("returned", "x" * 1000))[:500])
        os._exit(3)
    if what == "talks":
        print("a library prints")
    if what in ("stands", "waits"):
        assert folder is not None
        (folder / "part").write_text(str(os.getpid()))
        os.replace(folder / "part", folder / "pid")
        while what == "waits" and not (folder / "go on").exists():
            time.sleep(0.02)
        if what == "stands":
            time.sleep(60)
    threads = [threading.Thread(target=lambda: [tell(3) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return os.getpid()


earlier: list[Tell] = []


def late(tell: Tell, count: int) -> int:
    """A job that tells for those before it, too, as a thread of a library may."""
    earlier.append(tell)
    for each in earlier:
        each(count)
    return len(earlier)


def ignore(count: int) -> None: ...


def standing(folder: Path) -> int:
    """The number of the process that does "stands", once it does."""
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists():
        assert time.monotonic() < deadline, "no process is at it"
        time.sleep(0.02)
    return int((folder / "pid").read_text())


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_values_and_counts_arrive_and_a_process_is_used_again() -> None:
    told: list[int] = []
    with Workers(work) as workers:
        first = [workers.run(told.append, what) for what in ("a", "talks", "b")]
        with ThreadPoolExecutor(3) as pool:
            others = list(pool.map(lambda what: workers.run(told.append, what), ("c", "d", "e")))
    assert len(set(first)) == 1 and os.getpid() not in first
    assert sum(told) == 6 * 1200 and set(told) == {3}
    assert not any(alive(pid) for pid in {*first, *others})


def test_failures_arrive_as_they_were_raised_and_the_process_goes_on() -> None:
    with Workers(work) as workers:
        pid = workers.run(ignore, "a")
        with pytest.raises(UnicodeDecodeError, match="odd"):
            workers.run(ignore, "odd")
        with pytest.raises(WorkFailed, match="Local: here alone"):
            workers.run(ignore, "local")
        with pytest.raises(TypeError, match="pickle"):
            workers.run(ignore, "no value")
        assert workers.run(ignore, "b") == pid
        for what, code in (("dies", -signal.SIGKILL), ("half", 3)):
            with pytest.raises(WorkerLost) as lost:
                workers.run(ignore, what)
            assert lost.value.code == code and not alive(pid)
        assert workers.run(ignore, "c") != pid
    with pytest.raises(WorkersEnded):
        workers.run(ignore, "late")


def test_what_is_told_for_a_job_that_is_over_counts_for_no_other() -> None:
    told: list[int] = []
    with Workers(late) as workers:
        assert [workers.run(told.append, count) for count in (10, 20)] == [1, 2]
    assert told == [10, 20]


def test_a_job_that_cannot_be_sent_is_refused_here() -> None:
    with Workers(work) as workers:
        with pytest.raises(TypeError, match="pickle"):
            workers.run(ignore, threading.Lock())  # type: ignore[arg-type]
        assert workers.run(ignore, "a")


def test_counts_that_nobody_wants_any_more_end_the_process() -> None:
    def refuse(count: int) -> None:
        raise EOFError("unwanted")

    with Workers(work) as workers:
        pid = workers.run(ignore, "a")
        with pytest.raises(EOFError, match="unwanted"):
            workers.run(refuse, "b")
        assert not alive(pid)


def test_the_end_stops_what_is_under_way(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, Workers(work) as workers:
        under_way = pool.submit(workers.run, ignore, "stands", tmp_path)
        pid = standing(tmp_path)
        workers.end()
        assert isinstance(under_way.exception(), WorkersEnded)
    assert not alive(pid)


def test_an_error_that_no_other_process_could_build_arrives_as_its_words() -> None:
    class Local(Exception):
        pass

    error = portable(Local("here alone"))
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is WorkFailed and str(arrived) == "Local: here alone"
    assert failure_of(arrived, "token") is None, "a defect is told as one, not as a failure of the Hub"


def test_dead_processes_leave_no_descriptors() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Workers(work) as workers:
        for what in ("dies", "a", "dies"):
            with suppress(WorkerLost):
                workers.run(ignore, what)
        assert len(os.listdir("/proc/self/fd")) == before
        workers.run(ignore, "b")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_folder_at_hand_runs_nothing_and_prints_at_the_start_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile, site = tmp_path / "hostile", tmp_path / "site"
    hostile.mkdir()
    site.mkdir()
    (hostile / "pickle.py").write_text("open('ran', 'w')\n")
    (site / "sitecustomize.py").write_text("print('a greeting')\n")
    monkeypatch.chdir(hostile)
    monkeypatch.setattr(sys, "path", [str(site), *(os.path.abspath(path) for path in sys.path if path)])
    with Workers(work) as workers:
        workers.run(ignore, "a")
    assert not (hostile / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_is_for_the_first_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """Sent while Python loads, and while a job is under way."""
    (tmp_path / "sitecustomize.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with ThreadPoolExecutor(1) as pool, Workers(work) as workers:
        under_way = pool.submit(workers.run, ignore, "waits", tmp_path)
        pid = standing(tmp_path)
        os.kill(pid, number)
        (tmp_path / "go on").touch()
        assert under_way.result() == pid
    assert capfd.readouterr().err == ""
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_an_idle_process_that_was_killed_is_no_lost_job() -> None:
    with Workers(work) as workers:
        pid = workers.run(ignore, "a")
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # all its threads have ended
        assert workers.run(ignore, "b") != pid


def test_work_is_told_on_stdin_alone(tmp_path: Path) -> None:
    """What a job is given may be a secret."""
    with ThreadPoolExecutor(1) as pool, Workers(work) as workers:
        under_way = pool.submit(workers.run, ignore, "stands", tmp_path)
        process = Path(f"/proc/{standing(tmp_path)}")
        shown = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        assert str(tmp_path).encode() not in shown and b"stands" not in shown
        workers.end()
        assert under_way.exception()


def test_a_job_that_stands_still_ends_with_the_process_that_wanted_it(tmp_path: Path) -> None:
    program = (
        "import os, sys, threading\n"
        "from pathlib import Path\n"
        "from m3quant.running.workers import Workers\n"
        "from tests.running.test_workers import ignore, standing, work\n"
        "folder = Path(sys.argv[1])\n"
        "threading.Thread(target=Workers(work).run, args=(ignore, 'stands', folder)).start()\n"
        "standing(folder)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with Path(tmp_path / "err").open("w") as err:
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60, stderr=err, check=False)
    assert gone(standing(tmp_path))


def test_an_answer_that_nobody_waits_for_ends_the_process_without_a_word() -> None:
    """The reader was killed while the work was done, and the answer comes before the process sees that."""
    words = pickle.dumps(work) + pickle.dumps((("talks",), {}))
    program = (
        "import io, os; from m3quant.running.workers import serve; reader, writer = os.pipe(); os.close(reader); "
        f"serve(io.BytesIO({words!r}), os.fdopen(writer, 'wb'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
