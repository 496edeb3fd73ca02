"""bench without an engine: what is measured, what is refused before the start, and what is made of the load generator's results."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3quant.engines import DEFAULT as VLLM
from m3quant.engines.bench import BenchRun
from m3quant.engines.installed import ENGINE_PYTHON
from m3quant.errors import DoesNotFit, ServeError
from m3quant.families import Family
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.acceptance import measured_with
from m3quant.runtime.bench import SPARE, AtOnce, Load, held
from m3quant.runtime.draft import open_draft
from m3quant.runtime.fit import Ask, Fit, assess
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.model import open_subject
from m3quant.runtime.serve_recipe import ServeRecipe
from tests.support.cli.shell import Ran, Shell
from tests.support.engine.fake_vllm import write_fake_vllm
from tests.support.paths import DATA, FIXTURES
from tests.support.tiny_draft import write_eagle3

M2 = FIXTURES / "tiny-m2"
Bench = Callable[..., Ran]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def family() -> Family:
    return open_subject(str(M2)).family


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eagle3(tmp_path_factory.mktemp("draft") / "eagle3")


@pytest.fixture
def bench(shell: Shell, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """bench of tiny-m2 with an engine that behaves as `mode` says."""
    monkeypatch.setenv(ENGINE_PYTHON, sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setattr("m3quant.runtime.bench.POLL_S", 0.02)
    monkeypatch.setattr("m3quant.runtime.launch.POLL_S", 0.02)

    def run(mode: str, *options: object) -> Ran:
        write_fake_vllm(tmp_path / "packages", mode)
        words = ["--on=cpu:2GiB", f"--port={port}", f"--log={tmp_path / 'log'}", "--quiet", "--start-timeout=30"]
        return shell("bench", M2, *words, "--concurrency=1,4", "--context=256", "--output=8", *options)

    return run


def test_every_point_is_measured_and_the_server_ends(bench: Bench, port: int, tmp_path: Path) -> None:
    done = bench("", "--both", "--rounds=3", "--report", tmp_path / "page.html", "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert [(row["guard"], row["concurrency"], row["requests"]) for row in rows] == [
        (True, 1, 3), (True, 4, 12), (False, 1, 3), (False, 4, 12),
    ]  # fmt: skip
    assert rows[1]["decode_tokens_per_s"] == 200.0 and rows[1]["output_tokens_per_s"] == 48.0
    assert rows[0]["ttft_ms"] == {"50": 50.0, "90": 90.0, "99": 99.0} and rows[0]["acceptance_length"] is None
    assert done.json["engine"] == {"name": VLLM.name, "version": "0.33.0+cpu"} and done.json["not_measured"] == []
    assert "point 1 of 2: 3 requests of 232 + 8 tokens, 1 at once" in done.err
    assert (
        done.json["environment"]["M3QUANT_GUARD_RESERVE"] == "learned"
    )  # without which a figure through the guard says little
    ran = [line for line in (tmp_path / "log-client").read_text().splitlines() if line.startswith("load generator")]
    assert (
        len(ran) == 4 and len(set(ran)) == 2
    )  # one process for all points of a start: its imports take as long as many a point
    assert all(part in (tmp_path / "page.html").read_text() for part in ("200.0", "M3QUANT_GUARD_RESERVE=learned"))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("client fails", (), "exit code 1: its last word was: ValueError: the client is broken"),
        ("client raises", (), "exit code 1: its last word was: ValueError: the client is broken"),
        ("client is killed", (), "the load generator ended with exit code -9"),
        ("client hangs", ("--point-timeout=1",), "1 requests at once were not answered within 1 s"),
        ("server ends", (), "the engine ended while it was measured"),
        ("one is refused", (), "1 of 2 requests were answered at concurrency 1"),
        ("one is short", (), "2 answers have 15 tokens in place of 16"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_the_server_ends(
    bench: Bench, port: int, mode: str, options: tuple[str, ...], message: str
) -> None:
    done = bench(mode, "--no-guard", *options)
    assert done.code == 1 and message in done.err.splitlines()[-1], done.err
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_signal_ends_it_with_what_was_measured(bench: Bench, tmp_path: Path) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 30
        log = tmp_path / "log-client"
        while not (log.exists() and "hanging" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    done = bench("client hangs", "--no-guard")
    thread.join()
    assert done.code == 143 and "stopped by a signal after 0 of 2 points; the server has ended" in done.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--context=8k,16k",), 3, "config.json allows 8,192 tokens"),
        (("--context=100", "--output=90"), 2, "has no room for --output 90"),
        (("--concurrency=1,64", "--max-num-seqs=32"), 2, "--max-num-seqs 32 is less than --concurrency 64"),
        (("--concurrency=1,x",), 2, "'x' is no number of requests"),
        (("--concurrency=1k",), 2, "'1k' is no number of requests"),
        (("--concurrency=0,4",), 2, "'0' is not between 1 and 2,147,483,648 requests"),
        (("--context=1k,",), 2, "'' is no number of tokens"),
        (("--least-acceptance=0.5",), 2, "name that measurement with --acceptance-of"),
        (("--slow-offload",), 2, "say how many bytes with --weight-offload"),
        (("--engine=sglang", "--on=1xH200"), 2, "SGLang has another"),
        (("--report=/nowhere/page.html",), 2, "/nowhere/page.html cannot be written"),
        ((f"--concurrency={','.join(map(str, range(1, 66)))}",), 2, "65 measurements were asked for: at most 64"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    bench: Bench, tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    done = bench("", *options)
    assert done.code == code and message in done.err, done.err
    assert not (tmp_path / "log").exists()


def test_a_log_that_cannot_be_written_is_told_with_its_option(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = bench("", f"--log={tmp_path / 'file' / 'log'}")
    assert done.code == 2 and "cannot be written: Not a directory; name another with --log" in done.err


def test_a_taken_port_is_met_before_the_start(bench: Bench, port: int, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = bench("")
    assert done.code == 2 and "choose another --port" in done.err and not (tmp_path / "log").exists()


def test_a_dry_run_shows_the_points_and_needs_no_engine(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE_PYTHON, raising=False)
    done = shell("bench", M2, "--on=1xH200", "--concurrency=4,1", "--context=1k,500", "--dry-run", "--json")
    assert done.code == 0 and [(p["context"], p["concurrency"]) for p in done.json["points"]] == [
        (500, 1), (500, 4), (1024, 1), (1024, 4),
    ]  # fmt: skip
    (command,), (environment,) = done.json["commands"], done.json["environments"]
    words = shell("bench", M2, "--on=1xH200", "--concurrency=4,1", "--context=1k,500", "--dry-run").out
    assert environment and all(f"{name}=" in words.splitlines()[-1] for name in environment)
    assert command[command.index("--max-model-len") + 1] == "1024" and command[command.index("--max-num-seqs") + 1] == "4"  # fmt: skip


def test_points_beyond_the_pool_are_left_out_and_named() -> None:
    fit = assess(open_subject(str(M2)).stored, parse_node("cpu:1GiB"), Ask(context=8000))
    free = fit.pool.blocks - 1
    most = free // 63  # blocks of 128 that 8,000 tokens take
    load = Load((1, most, most + 1), (8000,), 16, 1)
    run, left = held(fit, ServeRecipe(watermark=0), load.points())
    assert [p.concurrency for p in run] == [1, most] and [one.point.concurrency for one in left] == [most + 1]
    assert left[0].why == f"the pool of a server for 32 at once, {fit.pool.tokens:,} tokens, does not hold them"
    assert run[0].prompt == 8000 - 16 - SPARE
    with pytest.raises(DoesNotFit, match=rf"{most + 1} request\(s\) of 8,000 tokens do not fit"):
        held(fit, ServeRecipe(watermark=0), Load((most + 1,), (8000,), 16, 1).points())
    assert held(fit, ServeRecipe(watermark=0.02), load.points())[0] == run[:1]


def planned_m27(seqs: int) -> tuple[Fit, ServeRecipe]:
    """M2.7's awq on an H200: 256 requests at once take 45,000 tokens of its pool."""
    model = open_subject(str(DATA / "minimax-m2.7")).converted(build_recipe(named_recipe("awq")))
    return assess(model, parse_node("1xH200"), Ask(1024, kv_dtype="fp8", max_num_seqs=seqs)), ServeRecipe()


@pytest.mark.parametrize(
    ("asked", "seqs"),
    [
        ((1, 64, 80, 200), 80),  # the pool of 200 holds 64 of them, that of 80 holds 80
        ((64, 8192), 64),  # 8,192 leave no pool at all
        ((4, 8), 8),
        ((7,), 7),
        ((150, 300), 150),  # of which none is held
    ],
)
def test_the_server_is_for_the_most_requests_that_it_holds(asked: tuple[int, ...], seqs: int) -> None:
    at_once, tried = AtOnce(Load(asked, (1024,), 128, 1).points()), list[int]()

    def planned(number: int) -> tuple[Fit, ServeRecipe]:
        tried.append(number)
        return planned_m27(number)

    assert at_once(planned) == seqs
    assert tried == [n for n in sorted(asked, reverse=True) if n >= seqs and n != min(asked)]
    assert sorted(at_once.why) == [n for n in asked if n > seqs]
    fit, recipe = planned_m27(seqs)
    if seqs == 150:
        with pytest.raises(DoesNotFit, match=r"150 request\(s\) of 1,024 tokens do not fit"):
            held(fit, recipe, at_once.points, at_once.why)
        return
    run, left = held(fit, recipe, at_once.points, at_once.why)
    assert [point.concurrency for point in run] == [n for n in asked if n <= seqs]
    assert [one.point.concurrency for one in left] == [n for n in asked if n > seqs]


def test_every_context_keeps_a_point(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server for 64 at once holds 64 short requests, and none of the long points; one for 36 holds 36 of both."""
    monkeypatch.delenv(ENGINE_PYTHON, raising=False)
    words = ("bench", M2, "--on=1x3GiB", "--context=500,8k", "--dry-run", "--json")
    found = shell(*words, "--concurrency=36,64").json
    assert [(p["context"], p["concurrency"]) for p in found["points"]] == [(500, 36), (8192, 36)]
    (why,) = {one["why"] for one in found["not_measured"] if one["concurrency"] == 64}
    assert why.startswith("the pool of a server for 64 at once, ")
    assert why.endswith(" does not hold a point of 8,192 tokens: measure them without that context")
    assert "--max-num-seqs 36 " in " ".join(found["commands"][0])
    both = shell(*words, "--concurrency=2,36,64").json
    assert "--max-num-seqs 64 " in " ".join(both["commands"][0]) and len(both["points"]) == 4


def test_a_server_is_started_for_no_more_than_is_measured(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE_PYTHON, raising=False)
    words = ("bench", M2, "--on=1x3GiB", "--context=500,1k", "--dry-run")
    done = shell(*words, "--concurrency=1,32,256,10000", "--json")
    assert done.code == 0, done.err
    (command,) = done.json["commands"]
    assert command[command.index("--max-num-seqs") + 1] == "32"
    assert [(p["context"], p["concurrency"]) for p in done.json["points"]] == [(500, 1), (500, 32), (1024, 1), (1024, 32)]  # fmt: skip
    left = {(one["context"], one["concurrency"]): one["why"] for one in done.json["not_measured"]}
    assert list(left) == [(500, 256), (500, 10000), (1024, 256), (1024, 10000)]
    assert "a server for 256 at once does not fit: weights take" in left[500, 256]
    assert "not measured: 10000 at once of 1,024 tokens: a server for 10,000 at once does not fit" in done.err
    given = shell(*words, "--concurrency=1,32", "--max-num-seqs=40", "--json")
    assert given.json["commands"][0][given.json["commands"][0].index("--max-num-seqs") + 1] == "40"
    assert shell(*words, "--concurrency=1,32", "--max-num-seqs=256").code == 3


RUN = BenchRun("http://127.0.0.1:1", "m", "n", 2, 4, 100, 8, 1, Path("result.json"))


@pytest.mark.parametrize(
    "change", [{"mean_tpot_ms": 0}, {"p99_itl_ms": None}, {"duration": "x"}, {"output_throughput": {}}]
)
def test_a_result_without_its_figures_is_refused(change: dict[str, Any]) -> None:
    document = {"completed": 4, "total_output_tokens": 32, "duration": 1.0, "output_throughput": 32.0, "mean_tpot_ms": 10.0,
                **{f"p{p}_{name}_ms": 1.0 for p in (50, 90, 99) for name in ("ttft", "itl")}}  # fmt: skip
    measured = VLLM.read_bench({**document, "spec_decode_acceptance_length": 2.5}, RUN)
    assert measured.decode_tokens_per_s == 200.0 and measured.acceptance_length == 2.5
    with pytest.raises(ServeError, match="lacks a figure"):
        VLLM.read_bench({**document, **change}, RUN)


def lines(path: Path, *prompts: object) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path


def test_texts_are_prompts_and_none_is_used_twice(bench: Bench, tmp_path: Path) -> None:
    texts = lines(tmp_path / "texts.jsonl", *(f"text number {n} of ten" for n in range(10)))
    done = bench("", "--texts", texts, "--context=1100", "--rounds=2", "--no-guard", "--json")
    assert done.code == 0, done.err
    assert done.json["texts"] == str(texts) and [row["bound_tokens_per_s"] for row in done.json["rows"]] == [None, None]
    used = json.loads((tmp_path / "packages" / "vllm" / "entrypoints" / "cli" / "used.json").read_text())
    assert used == [f"text number {n} of ten" for n in range(2, 10)]  # of the second point; the first had two


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["four words are enough"], (), "has 1 prompts, but 10 are needed"),
        (["too few words"], (), "line 1: 'prompt' must be a text of at least 4 words"),
        (["a b c " + "d" * 1000], (), "at most 1,000 bytes"),
        ([5], (), "line 1: 'prompt' must be a text"),
        (None, (), "t.jsonl, line 1"),
        (["one two three four"], ("--context=1000",), "give --context 1024 or more"),
        (["one two three four"], ("--context=2k,4k",), "give one --context"),
    ],
)
def test_texts_that_would_be_left_out_are_refused(
    bench: Bench, tmp_path: Path, prompts: list[object] | None, options: tuple[str, ...], message: str
) -> None:
    texts = lines(tmp_path / "t.jsonl", *prompts or ())
    if prompts is None:
        texts.write_text("{")
    done = bench("", "--texts", texts, "--context=1100", *options)
    assert done.code == 2 and message in done.err, done.err


def test_acceptance_is_held_against_the_source(bench: Bench, tmp_path: Path, eagle3: Path) -> None:
    texts = lines(tmp_path / "texts.jsonl", *(f"text number {n} of ten" for n in range(10)))
    options = ("--texts", texts, "--context=1100", "--no-guard", "--json", f"--draft={eagle3}", "--temperature=0")
    source = bench("accepts 2.0", *options)
    assert source.code == 0, source.err
    assert source.json["measured_with"]["draft"]["tokens"] == 3 and source.json["acceptance_of"] is None
    assert source.json["rows"][0]["acceptance_by_guess"] == [0.7, 0.5, 0.3]
    assert "temperature 0\n" in (tmp_path / "log-client").read_text()
    file = tmp_path / "source.json"
    file.write_text(source.out)
    page = tmp_path / "page.html"
    near = bench("accepts 1.875", *options, f"--acceptance-of={file}", "--report", page)
    assert near.code == 0 and [row["acceptance_share"] for row in near.json["rows"]] == [0.9375, 0.9375], near.err
    assert "93.8%" in page.read_text() and "below what was asked" not in page.read_text()
    far = bench("accepts 1.875", *options, f"--acceptance-of={file}", "--least-acceptance=0.95", "--report", page)
    sentence = f"1 at once of 1,100 tokens: a step with the draft gives 1.88 tokens, 93.8% of the 2.00 with '{M2}', less than 95%"
    assert far.code == 1 and f"warning: {sentence}" in far.err and far.json["acceptance_of"]["below"][0] == sentence
    assert "Acceptance below what was asked for" in page.read_text()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, (), "name it with --draft"),
        ({}, ("--draft", "--temperature=1"), "unless the request says temperature 0: measure with --temperature 0"),
        ({}, ("--draft", "--temperature=0", "--draft-tokens=4"), "was measured with another number of guessed tokens"),
        ({"temperature": 1.0}, ("--draft", "--temperature=0"), "was measured with another temperature"),
        ({"texts_sha256": "00"}, ("--draft", "--temperature=0"), "was measured with another file of prompts"),
        ({"draft": None}, ("--draft", "--temperature=0"), "is no bench with a draft"),
        ({}, ("--draft", "--temperature=0", "--rounds=3"), "has no acceptance for 3 requests, 1 at once, of 256 tokens"),
        ({"rows": [{"concurrency": True}]}, ("--draft", "--temperature=0"), "has a row without its figures"),
        ({"rows": [7]}, ("--draft", "--temperature=0"), "has a row without its figures"),
        ({"length": -1}, ("--draft", "--temperature=0"), "has an acceptance_length that is no number of at least 1"),
        ({"length": 1e-320}, ("--draft", "--temperature=0"), "has an acceptance_length that is no number of at least 1"),
    ],
)  # fmt: skip
def test_another_measurement_is_no_baseline(
    bench: Bench,
    tmp_path: Path,
    eagle3: Path,
    family: Family,
    change: dict[str, Any],
    options: tuple[str, ...],
    message: str,
) -> None:
    load = Load((1, 4), (256,), 8, 2, None, 0.0)
    made = measured_with(open_draft(str(eagle3), family), load)
    rows = [{"concurrency": n, "context": 256, "output": 8, "requests": 2 * n, "acceptance_length": change.get("length", 2.0)} for n in (1, 4)]  # fmt: skip
    file = tmp_path / "source.json"
    file.write_text(json.dumps({"measured_with": made | change, "rows": change.get("rows", rows)}))
    words = [f"--draft={eagle3}" if word == "--draft" else word for word in options]
    done = bench("", f"--acceptance-of={file}", *words)
    assert done.code == 2 and message in done.err and not (tmp_path / "log").exists(), done.err
