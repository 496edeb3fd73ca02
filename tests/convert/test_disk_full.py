"""A disk that fills up: refused beforehand where it can be known, and a clean, resumable stop where it cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from m3quant.convert import calibrated
from m3quant.convert import conversion as run_module
from m3quant.errors import StoppedError
from m3quant.planning.plan import Plan
from m3quant.planning.resources import check_disk, hidden_state_bytes, resources
from tests.support.convert.common import files, make_plan_of, make_source, quickly_calibrated, run_plan, same_output
from tests.support.convert.kill_driver import OTHERS, WRITES, Counter

CAN_FILL = ("write", "pwritev", "fsync", "posix_fallocate")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def full(name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Half of a write fits, then nothing does."""
    if name == "write":
        call(args[0], memoryview(args[1])[: len(args[1]) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def counted(plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch, at: int = 0, **how: Any) -> list[str]:
    """Run with the disk filling up at operation `at`; the names of all operations until then."""
    counter = Counter(at, full)
    with monkeypatch.context() as patch:
        for name in (*WRITES, *OTHERS):
            patch.setattr(os, name, counter._counted(name, getattr(os, name)))
        if at:
            with pytest.raises(StoppedError) as stopped:
                run_plan(plan, output, **how)
            assert stopped.value.exit_code == 4
            assert "run the same command again" in str(stopped.value)
        else:
            run_plan(plan, output, **how)
    return list(counter.names)


@pytest.mark.parametrize(("family", "recipe", "spill", "count"), [
    ("m2", "int4", False, 40), ("m3", "awq", False, 14), ("m3", "awq", True, 14),
], ids=["data-free", "calibrated", "spilled"])  # fmt: skip
def test_enospc_anywhere_stops_cleanly_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, recipe: str, spill: bool, count: int
) -> None:
    source = make_source(tmp_path / "src", family, num_local_experts=2, num_experts_per_tok=1)
    plan = make_plan_of(source, recipe, **quickly_calibrated(recipe))
    names = counted(plan, tmp_path / "whole", monkeypatch, spill=spill)
    places = [number for number, name in enumerate(names, start=1) if name in CAN_FILL]
    # every kind of operation, and otherwise evenly over the run
    chosen = {places[i * len(places) // count] for i in range(count)}
    chosen |= {1 + names.index(kind) for kind in CAN_FILL if kind in names}
    for at in sorted(chosen):
        output = tmp_path / f"out-{at}"
        counted(plan, output, monkeypatch, at, spill=spill)
        left = files(output)
        assert "config.json" not in left
        assert not [name for name in left if name.endswith(".tmp")], at
        run_plan(plan, output, spill=spill)
        assert same_output(tmp_path / "whole", output) == [], (at, names[at - 1])


def test_the_program_ends_with_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from m3quant import cli

    source = make_source(tmp_path / "src", "m2")
    monkeypatch.setattr(sys, "argv", ["m3quant", "convert", str(source), str(tmp_path / "out"), "--to", "int4"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", Counter(20, full)._counted("write", os.write))
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 4
    error = capsys.readouterr().err
    assert "No space left on device" in error and "run the same command again" in error and "Traceback" not in error
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m3"), "awq")
    need = resources(plan, on_gpu=False).disk
    assert need >= plan.output_bytes
    usage = monkeypatch.setattr
    usage("m3quant.planning.resources.shutil.disk_usage", lambda folder: Usage(need * 2, need + 1, need - 1))
    with pytest.raises(StoppedError, match=r"GB free, but the output needs .* GB more: free .* Nothing was changed"):
        run_plan(plan, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
    usage("m3quant.planning.resources.shutil.disk_usage", lambda folder: Usage(need * 2, need, need))
    run_plan(plan, tmp_path / "deep" / "out")


def test_spilled_streams_are_part_of_the_disk_that_is_needed(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m3"), "awq")
    streams = 2 * hidden_state_bytes(plan, 4)
    assert resources(plan, on_gpu=False, spill=True).disk == resources(plan, on_gpu=False).disk + streams > streams


@pytest.mark.parametrize(
    ("recipe", "does_it", "remedy"),
    [
        ("int4", (run_module, "convert_units"), r"free memory on it and"),  # which has no hidden states to keep elsewhere
        ("awq", (calibrated, "convert_calibrated"), r"free memory on it, or keep hidden states on the disk with --spill, and"),
    ],
)  # fmt: skip
def test_a_full_gpu_is_a_resumable_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, does_it: tuple[Any, str], remedy: str
) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), recipe)

    def exhausted(*arguments: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    with monkeypatch.context() as patch:
        patch.setattr(*does_it, exhausted)
        with pytest.raises(StoppedError, match=rf"CUDA out of memory.*{remedy} run the same command again") as stopped:
            run_plan(plan, tmp_path / "out")
    assert stopped.value.exit_code == 4
    run_plan(plan, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_finished_output_needs_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "int4")
    run_plan(plan, tmp_path / "out")
    monkeypatch.setattr("m3quant.planning.resources.shutil.disk_usage", lambda folder: Usage(1, 1, 0))
    run_plan(plan, tmp_path / "out")


def test_what_an_interrupted_run_holds_already_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished shards, saved hidden states and the torn shard of a kill are not asked for twice."""
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "int4")
    need, output = resources(plan, on_gpu=False), tmp_path / "out"
    (output / ".m3quant").mkdir(parents=True)
    held = {
        "model-00001-of-00003.safetensors": 1000,
        ".model-00002-of-00003.safetensors.tmp": 500,
        ".m3quant/b.states": 70,
    }
    for name, size in held.items():
        (output / name).write_bytes(bytes(size))
    for short, refused in ((1, True), (0, False)):
        free = need.disk - sum(held.values()) - short
        monkeypatch.setattr("m3quant.planning.resources.shutil.disk_usage", lambda folder, f=free: Usage(f, 0, f))
        if refused:
            with pytest.raises(StoppedError):
                check_disk(plan, output, need)
        else:
            check_disk(plan, output, need)
    assert run_module.check_disk is check_disk
