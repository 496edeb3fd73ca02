"""A conversion that has no room on its GPU is refused before it begins; the default amount of text is what the GPU at hand has room for."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from m3quant.api import conversion
from m3quant.artifact.journal import Journal
from m3quant.convert.conversion import _check_room
from m3quant.convert.device_memory import check_device
from m3quant.convert.job import Settings
from m3quant.errors import StoppedError
from m3quant.planning.headers import from_config
from m3quant.planning.plan import Plan, make_plan
from m3quant.planning.resources import resources
from m3quant.recipe.recipe import build_recipe, named_recipe, with_data
from tests.support.convert.common import make_plan_of, make_source, run_plan
from tests.support.paths import DATA

GB = 10**9
GPU = torch.device("cuda", 0)


@cache
def plan_of(model: str, recipe: str) -> Plan:
    return make_plan(
        from_config(DATA / model / "config.json"), build_recipe(named_recipe(recipe), settings=(), format=None)
    )


def has(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    """A GPU, as far as its memory is asked for."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, total))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def refusal(plan: Plan) -> str:
    with pytest.raises(StoppedError) as raised:
        check_device(plan, GPU, resources(plan, on_gpu=True))
    return str(raised.value)


def test_what_has_room_passes_and_a_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("minimax-m2.7", "awq")
    need = resources(plan, on_gpu=True)
    has(monkeypatch, need.device, 85 * GB)
    check_device(plan, GPU, need)
    has(monkeypatch, 0, 0)
    check_device(plan, torch.device("cpu"), need)


def test_memory_that_others_use_is_told_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    small = plan_of("minimax-m2.7", "awq")
    large = make_plan(small.checkpoint, with_data(small.recipe, {"windows": 1152}))
    has(monkeypatch, 60 * GB, 85 * GB)
    words = refusal(large)
    assert "NVIDIA Test (cuda:0) has 60.00 GB free of 85.00 GB" in words and "end what else runs" in words
    tokens = int(words.partition("--calibration-tokens ")[2].split()[0])
    assert 65_536 < tokens < 589_824
    fewer = with_data(large.recipe, {"windows": tokens // 512})
    check_device(large, GPU, resources(make_plan(large.checkpoint, fewer), on_gpu=True))


def test_a_gpu_that_is_too_small_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 24 * GB, 25 * GB)
    words = refusal(plan_of("minimax-m3", "awq"))
    assert "larger GPU" in words and "--spill" in words and "--calibration-tokens" not in words
    assert "25.00 GB" in words and "Nothing was changed" in words
    has(monkeypatch, GB // 10, 25 * GB)
    assert "--spill" not in refusal(plan_of("minimax-m3", "fp8"))


def test_a_gpu_that_is_full_and_what_torch_keeps_of_an_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("minimax-m2.7", "awq")
    need = resources(plan, on_gpu=True)
    has(monkeypatch, 0, 85 * GB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: need.device + GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: GB)
    check_device(plan, GPU, need)

    def full(device: object = None) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    words = refusal(plan)
    assert "cuda:0 cannot be used (CUDA error: out of memory)" in words and "elsewhere" not in words
    with pytest.raises(StoppedError, match="--device"):
        conversion._with_enough_text(plan, "cuda")


def test_ways_are_those_that_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, GB // 10, 85 * GB)
    assert "end what else runs on it or give --device cpu. Nothing" in refusal(plan_of("minimax-m3", "fp8"))
    plan = plan_of("minimax-m2.7", "awq")
    with pytest.raises(StoppedError, match=r"of it: end what else runs on it\. Nothing"):
        check_device(plan, GPU, resources(plan, on_gpu=True), can_spill=False)


@pytest.mark.parametrize(
    ("recipe", "spill", "told"), [("awq", False, True), ("awq", True, False), ("int4", False, False)]
)
def test_memory_that_runs_out_names_a_way_that_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: str, spill: bool, told: bool
) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr("m3quant.convert.conversion._convert", fails)
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), recipe)
    with pytest.raises(StoppedError, match="and run the same command again") as raised:
        run_plan(plan, tmp_path / "out", spill=spill)
    assert ("--spill" in str(raised.value)) is told


@pytest.mark.parametrize(("engine", "asked"), [("local", True), ("ray", False)])
def test_units_on_ray_do_not_depend_on_the_gpu_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, asked: bool
) -> None:
    has(monkeypatch, 0, 85 * GB)
    monkeypatch.setattr("m3quant.planning.resources.shutil.disk_usage", lambda folder: SimpleNamespace(free=10**15))
    plan, settings = plan_of("minimax-m3", "fp8"), Settings(device="cuda", engine=engine)
    with pytest.raises(StoppedError) if asked else nullcontext():
        _check_room(plan, tmp_path / "out", settings, GPU, Journal(tmp_path / "out"))


@pytest.mark.parametrize(
    ("model", "h100", "h200"), [("minimax-m2.7", 589_824, 589_824), ("minimax-m3", 262_144, 786_432)]
)
def test_the_default_text_has_room_on_the_gpu_that_converts(
    monkeypatch: pytest.MonkeyPatch, model: str, h100: int, h200: int
) -> None:
    plan = plan_of(model, "awq")
    for total, tokens in ((85 * GB, h100), (150 * GB, h200)):
        has(monkeypatch, total - GB, total)
        chosen = conversion._with_enough_text(plan, "cuda")
        assert chosen.recipe.data.windows * chosen.recipe.data.window_length == tokens
        check_device(chosen, GPU, resources(chosen, on_gpu=True))
    assert conversion._with_enough_text(plan, "cpu") is plan
