"""The benchmark of full-size models: what it serves, which points, what a kill leaves, and the tables made of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from m3quant.engines.installed import ENGINE_PYTHON
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.fit import Ask, assess
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.measured import MeasuredSet
from m3quant.runtime.model import open_subject
from tests.benchmarks import bench_gpu, bench_gpu_table
from tests.benchmarks.bench_gpu import CELLS, PRESETS, points_of
from tests.benchmarks.bench_gpu_table import flags_table, grid_table, is_grid, measured_set, merged, tables, with_tables
from tests.support.engine.fake_vllm import write_fake_vllm
from tests.support.hollow import write_hollow
from tests.support.paths import ROOT


def run(tmp_path: Path, *options: str, mode: str = "") -> tuple[int, dict[str, Any], str]:
    """The command with an engine that behaves as `mode` says: exit code, result, and what was printed."""
    write_fake_vllm(tmp_path / "packages", mode)
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--preset=tiny-m2", f"--out={out}", *options],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "packages"), ENGINE_PYTHON: sys.executable}, cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    return done.returncode, json.loads(out.read_text()) if out.exists() else {}, done.stdout + done.stderr


def test_every_point_is_measured_through_the_guard_and_without(tmp_path: Path) -> None:
    code, result, said = run(tmp_path, "--through=guard,engine")
    assert code == 0, said
    assert [start["name"] for start in result["starts"]] == ["guard", "engine"]
    for start in result["starts"]:
        first, *rows = start["rows"]
        assert first["rehearsal"] and not any(row["rehearsal"] for row in rows)
        assert [(row["concurrency"], row["context"]) for row in rows] == [(1, 1024), (1, 2048), (4, 2048), (4, 1024)]
        assert (
            start["pool_tokens"] == 1_398_016 and not start["not_measured"] and not any(row["queued"] for row in rows)
        )
        assert start["memory"].keys() == set(bench_gpu.MEMORY)
        assert "--load-format dummy" in start["command"]
        assert ("--middleware" in start["command"]) == (start["name"] == "guard")
        assert rows[0]["steady_tokens_per_s"] == 20.0  # one request, 50 ms between two tokens
    assert "| 4 | 2,048 | 80 |  | 80 | 50 | 50.0 | 99.0 |" in grid_table(result)


def test_flags_are_a_start_each(tmp_path: Path) -> None:
    code, result, said = run(tmp_path, "--flags=base,batched-2048,sync")
    assert code == 0, said
    commands = {start["name"]: start["command"] for start in result["starts"]}
    assert "--max-num-batched-tokens 2048" in commands["batched-2048"]
    assert "--no-async-scheduling" in commands["sync"] and "--no-async-scheduling" not in commands["base"]
    text = tables([result])
    assert not is_grid(result) and "| sync | 1,398,016 | " in text and "| 20, 50 | 80, 50 |" in text


def test_a_failure_is_in_the_result_and_the_next_start_is_made(tmp_path: Path) -> None:
    code, result, _ = run(tmp_path, "--through=guard,engine", mode="client fails")
    assert code == 1 and len(result["starts"]) == 2
    for start in result["starts"]:
        assert "the client is broken" in start["error"] and start["rows"] == [] and len(start["not_measured"]) == 4


def test_a_start_that_is_refused_does_not_keep_the_others_from_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starts: dict[str, dict[str, Any]] = {"too long": {"context": 10**6}, "unknown dtype": {"kv_dtype": "int1"}}
    figures = bench_gpu.Figures(tmp_path / "out.json", {"machine": {}})
    preset = PRESETS["tiny-m2"]
    folder = write_hollow(tmp_path / "hollow", preset.source, preset.recipe)
    assert not bench_gpu.run_starts(preset, starts, CELLS, figures, folder, time.monotonic() + 60)
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written["refused"]) == set(starts) and written["starts"] == []
    said = capsys.readouterr().out
    assert all(f"{name}: refused: " in said for name in starts)


def test_the_time_that_is_given_is_kept(tmp_path: Path) -> None:
    code, result, _ = run(tmp_path, "--seconds=25", "--through=guard,engine", mode="client hangs")
    assert code == 1 and result["starts"][0]["seconds"] < 40 and len(result["starts"][0]["not_measured"]) == 4


def test_an_unknown_flag_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    code, result, said = run(tmp_path, "--flags=bse")
    assert code == 2 and not result and "bse" in said and "batched-16384" in said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--flags=base", "--through=engine"), "give them without --through"), (("--flags=",), "unknown: ''"), (("--through=guard,",), "unknown: ''"),
        (("--seconds=-5",), "--seconds"), (("--seconds=nan",), "--seconds"), (("--out=.",), "is a folder"),
    ],
)  # fmt: skip
def test_arguments_that_say_nothing_are_refused(tmp_path: Path, options: tuple[str, ...], told: str) -> None:
    code, result, said = run(tmp_path, *options)
    assert code == 2 and not result and told in said


@pytest.mark.parametrize("name", ["m2.7-awq", "m3-fit-1xh200"])
def test_points_are_those_that_the_largest_pool_holds(name: str) -> None:
    preset = PRESETS[name]
    model = open_subject(str(preset.source / "config.json")).converted(build_recipe(named_recipe(preset.recipe)))
    fit = assess(model, parse_node("1xH200"), Ask(kv_dtype="fp8", max_num_seqs=64))
    points = points_of(fit, CELLS)
    assert [(p.concurrency, p.context) for p in points][:4] == [(1, 1024), (16, 1024), (64, 1024), (1, 8192)]
    assert (1, fit.context) in {(p.concurrency, p.context) for p in points}  # the longest, in place of 128k
    held = fit.prediction.pool("low").tokens
    assert all(p.concurrency * p.context <= held and p.prompt > 0 for p in points) and len(points) == len(set(points))
    assert len(points_of(assess(model, parse_node("8xH200"), Ask(kv_dtype="fp8", max_num_seqs=64)), CELLS)) > len(
        points
    )


def test_a_hollow_output_has_the_sizes_of_a_real_one(tmp_path: Path) -> None:
    source = PRESETS["tiny-m2"].source
    folder = write_hollow(tmp_path / "hollow", source, "awq")
    stored = open_subject(str(folder)).stored
    assert stored.stored_bytes == open_subject(str(source)).converted(build_recipe(named_recipe("awq"))).stored_bytes
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > stored.stored_bytes
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_random_ids_survive_being_written_as_text(tmp_path: Path) -> None:
    folder = write_hollow(tmp_path / "hollow", PRESETS["tiny-m2"].source, "awq")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [random.randrange(tokenizer.vocab_size) for _ in range(500)]
    assert len(tokenizer) == 2048 and tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    start = {
        "name": "guard",
        "kv_dtype": "fp8",
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 64,
        "pool_tokens": 118_528,
        "rows": rows,
    }
    machine = {"node": "1xH200", "engine": "0.33.0"}
    return {"preset": "m2.7-awq", "recipe": "awq", "measured": "2026-11-29", "machine": machine, "starts": [start]}  # fmt: skip


def row(requests: int, context: int, speed: float, **changes: Any) -> dict[str, Any]:
    times = {"50": 1000 * requests / speed, "90": 30.0, "99": 40.0}
    return {
        "guard": True, "concurrency": requests, "context": context, "prompt": context - 144, "steady_tokens_per_s": speed, "bound_tokens_per_s": 600.0,
        "ttft_ms": times, "itl_ms": times, "queued": False, "rehearsal": False, **changes,
    }  # fmt: skip


def test_a_set_for_the_plan_has_neither_rehearsals_nor_points_that_waited() -> None:
    rows = [
        row(1, 1024, 90.0, rehearsal=True),
        row(16, 8192, 700.0, queued=True),
        row(16, 1024, 900.0),
        row(1, 1024, 150.0),
    ]
    found = MeasuredSet.model_validate(measured_set(document(rows)))
    assert [figure[:3] for figure in found.figures] == [(1, 880, 150.0), (16, 880, 900.0)]
    assert found.stored_bytes == 121_279_934_336 and all(speed < bound for _, _, speed, bound in found.figures)
    text = "\n".join(grid_table(document(rows)))
    assert "118,528 KV tokens" in text and "| 1 | 1,024 | 150 | 25% |" in text and "90" not in text.split("|---")[0]


def test_what_was_measured_without_the_guard_alone_is_in_the_table_and_in_no_set() -> None:
    alone = document([row(1, 1024, 150.0)])
    alone["starts"][0]["name"] = "engine"
    assert "| 1 | 1,024 |  |  | 150 | 7 | 6.7 | 40.0 |" in grid_table(alone)
    both = document([row(1, 1024, 120.0)])
    both["starts"].append(alone["starts"][0] | {"rows": [row(1, 1024, 150.0), row(4, 1024, 400.0)]})
    assert [line.split(" | ")[:5] for line in grid_table(both)[-2:]] == [
        ["| 1", "1,024", "120", "20%", "150"],
        ["| 4", "1,024", "", "", "400"],
    ]
    for empty in (alone, document([]), document([row(1, 1024, 90.0, rehearsal=True)])):
        with pytest.raises(ValueError, match="has no figure through the guard: measure it with --through guard"):
            measured_set(empty)


def named(found: dict[str, Any], name: str) -> dict[str, Any]:
    return {**found, "starts": [{**start, "name": name} for start in found["starts"]]}


def test_files_of_one_preset_are_one_table_and_one_set_in_which_the_later_point_counts() -> None:
    first = document([row(1, 1024, 90.0, rehearsal=True), row(1, 1024, 150.0), row(16, 1024, 900.0)])
    later = document([row(1, 1024, 160.0), row(1, 8192, 140.0)]) | {"measured": "2026-11-30"}
    (whole,) = merged([first, document([]) | {"starts": []}, later])
    assert [figure[:3] for figure in measured_set(whole)["figures"]] == [
        [1, 880, 160.0],
        [16, 880, 900.0],
        [1, 8048, 140.0],
    ]
    assert measured_set(whole)["source"].startswith("vLLM 0.33.0, 2026-11-30")
    assert len(first["starts"][0]["rows"]) == 3  # what was read stays as it was


def test_the_point_measured_later_counts_whatever_the_files_are_called() -> None:
    new = document([row(1, 1024, 160.0)]) | {"measured": "2026-12-02"}
    old = document([row(1, 1024, 150.0), row(16, 1024, 900.0)]) | {"measured": "2026-11-30"}
    for documents in ([new, old], [old, new]):
        (whole,) = merged(documents)
        assert [figure[2] for figure in measured_set(whole)["figures"]] == [160.0, 900.0]
        assert whole["measured"] == "2026-12-02"


def test_a_start_that_failed_stands_in_no_others_way() -> None:
    """It has neither a cache nor a row; the first of two or the second, and alone it is a table without a line."""
    good, bad = document([row(1, 1024, 150.0)]), document([])
    bad["starts"] = [{name: value for name, value in bad["starts"][0].items() if name != "pool_tokens"}]
    bad["starts"][0]["error"] = "the engine did not start"
    for documents in ([bad, good], [good, bad], [bad, good, bad]):
        (whole,) = merged(documents)
        assert measured_set(whole)["figures"][0][2] == 150.0 and whole["starts"][0]["pool_tokens"]
    assert grid_table(merged([bad])[0])[-1].startswith("|---")


def test_flags_are_compared_with_the_points_of_their_preset_where_none_was_unchanged() -> None:
    points = document([row(1, 1024, 150.0), row(1, 8192, 140.0)])
    flags = named(document([row(1, 1024, 140.0)]), "sync")
    grid, changed = merged([points, flags])
    assert is_grid(grid) and [start["name"] for start in changed["starts"]] == ["base", "sync"]
    assert [line.split(" | ")[0] for line in flags_table(changed)[-2:]] == ["| base", "| sync"]
    assert all(
        len(line.split("|")) == 6 for line in flags_table(changed)[-2:]
    )  # 8,192 tokens are no point of the flags
    own = merged([points, flags, named(document([row(1, 1024, 130.0)]), "base")])[1]
    assert [start["name"] for start in own["starts"]] == ["sync", "base"]


def test_files_of_one_preset_that_are_of_different_servers_are_not_merged() -> None:
    one, other = document([row(1, 1024, 150.0)]), document([row(1, 1024, 150.0)])
    for key, value in (
        ("pool_tokens", 1),
        ("kv_dtype", "bfloat16"),
        ("max_num_seqs", 7),
        ("max_num_batched_tokens", 7),
    ):
        other["starts"][0] = {**one["starts"][0], key: value}
        with pytest.raises(ValueError, match="start guard: measured with different caches or limits"):
            merged([one, other])
    with pytest.raises(ValueError, match="recipe awq and int4: give one file"):
        merged([one, {**one, "recipe": "int4"}])
    with pytest.raises(ValueError, match=r"0.33.0.*0.34.0.*give one file"):
        merged([one, {**one, "machine": {"node": "1xH200", "engine": "0.34.0"}}])


@pytest.mark.parametrize("text", ["{}", "[]", "{", None])
def test_a_file_that_is_no_result_is_one_sentence(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    if text is not None:
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_gpu_table", "--yaml", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "give what" in done.stderr and "Traceback" not in done.stderr


def test_the_page_has_the_tables_of_the_figures() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    documents = [json.loads(path.read_text()) for path in bench_gpu_table.figure_files()]
    assert with_tables(page, tables(documents)) == page, (
        "python -m tests.benchmarks.bench_gpu_table --into docs/serving.md"
    )
    with pytest.raises(ValueError, match="needs the lines"):
        with_tables("no marks", "text")


def test_every_preset_has_its_release() -> None:
    for preset in PRESETS.values():
        assert (preset.source / "config.json").is_file() and named_recipe(preset.recipe)
    assert set(bench_gpu.ROUNDS) == {requests for requests, _ in CELLS}
