"""Several checkpoints of one source in one pass: the figures of each alone, the source read once; and the page of them side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from m3quant.api import compare
from m3quant.artifact.eval_record import EVAL_FILE, EvalRecord
from m3quant.cli import cli
from m3quant.errors import EvaluationError, OutputError
from m3quant.evaluate.evaluation import JOURNAL, Settings, evaluate_all
from m3quant.evaluate.models import open_model
from m3quant.reports.comparison_html import Compared, of_comparison, page
from tests.support.calibration import tiny
from tests.support.convert.common import Silent, add_tokenizer
from tests.support.evaluate.measuring import Plain, StopAfter, changed_copy, run, sequence
from tests.support.evaluate.sample_record import sample_comparison
from tests.support.paths import FIXTURES

SETTINGS = Settings(device="cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A source and two models that are a little and more off it."""
    folder = tmp_path_factory.mktemp("models")
    source = add_tokenizer(tiny.make_tiny_m3(folder / "source", seed=4, num_hidden_layers=2, num_local_experts=4))
    return [source, changed_copy(source, folder / "near", 0.01), changed_copy(source, folder / "far", 0.1)]


def together(
    models: list[Path], task: Plain, folder: Path | None = None, progress: Silent | None = None
) -> list[EvalRecord]:
    source, *others = models
    opened = [open_model(other, f"checkpoint-{n}") for n, other in enumerate(others, 1)]
    written = [folder / other.name if folder else None for other in others]
    origin = open_model(source, "source")
    return evaluate_all(opened, origin, [task], "test", folder, written, SETTINGS, progress or Silent())


def test_one_pass_gives_each_checkpoint_the_figures_of_a_pass_of_its_own(models: list[Path]) -> None:
    source, *others = models
    texts = [sequence(300), sequence(40, [3, 30])]
    joint, progress, kept = Plain(texts, noise=[0]), Silent(), []
    joint.results = lambda *given: kept.append(given) or Plain.results(joint, *given)  # type: ignore[method-assign]
    records = together(models, joint, progress=progress)
    read = 0
    for other, record, (found, _) in zip(others, records, kept, strict=True):
        alone, own = Plain(texts, noise=[0]), Silent()
        expected = run(other, source, [alone], progress=own)
        assert record.results == expected.results and record.layers == expected.layers
        assert record.checkpoint == expected.checkpoint and record.source == expected.source
        for one, same in zip(found, alone.checkpoint, strict=True):
            assert np.array_equal(one.nll, same.nll) and np.array_equal(one.kl, same.kl)
        assert np.array_equal(joint.noise[0].kl, alone.noise[0].kl)
        read += own.total
    assert records[0].results != records[1].results and records[1].layers[0]["relative_error"] > 0
    source_bytes = sum(open_model(source).stored_bytes(layer) for layer in range(2))
    assert progress.total == progress.done == read - source_bytes, "the source is read once"
    assert any(line.startswith("layer 1: stream error") and line.endswith("(far)") for line in progress.lines)


def test_an_interrupted_pass_continues_with_all_of_them(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        together(models, Plain([sequence(80)]), tmp_path, StopAfter(3))  # in the second layer
    assert (tmp_path / JOURNAL).is_dir() and not (tmp_path / "near" / EVAL_FILE).exists()
    with pytest.raises(OutputError, match="streams was"):
        together(models[:2], Plain([sequence(80)]), tmp_path)
    progress = Silent()
    resumed = together(models, Plain([sequence(80)]), tmp_path, progress)
    assert "continuing: 1 of 2 layers are finished" in progress.lines
    assert [one.results for one in resumed] == [one.results for one in together(models, Plain([sequence(80)]))]
    assert [len(one.layers) for one in resumed] == [2, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["far", "near"], "the state is gone, eval.json is there"


SUITE = {
    "name": "mine",
    "tasks": [
        {"task": "perplexity-gptq", "window": 64, "max_windows": 2},
        {"task": "divergence", "window": 64, "max_windows": 2, "noise_windows": 1},
    ],
}


def invoke(tmp_path: Path, *arguments: object) -> Any:
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump(SUITE))
    text = FIXTURES / "heldout.txt"
    given = ("eval", *arguments, "--suite", file, "--data", text, "--device", "cpu", "--report", tmp_path / "r")
    return CliRunner().invoke(cli, [str(a) for a in given])


def test_the_command_measures_all_and_writes_one_page(models: list[Path], tmp_path: Path) -> None:
    source, near, far = models
    done = invoke(tmp_path, near, far, "--source", source, "--fail-over", "kld=1e9", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [one["name"] for one in told["evaluations"]] == ["near", "far"]
    for one in told["evaluations"]:
        written = json.loads((tmp_path / "r" / one["name"] / EVAL_FILE).read_text())
        assert one["bytes"] > 1e5 and written.items() <= one.items() and one["gate"]["broken"] == []
        assert (tmp_path / "r" / one["name"] / "eval.html").exists()
    assert told["verdict"]["headline"].startswith(("near is both", "near is the closest", "No conclusion"))
    html = Path(told["page"]).read_text()
    assert told["page"] == str(tmp_path / "r" / "compare.html") and "<h1>near / far</h1>" in html
    done = invoke(tmp_path, near, far, "--source", source, "--fail-over", "kld=1e-12")
    assert done.exit_code == 1 and "FAIL  far: kld=1e-12" in done.output and "side by side:" in done.output


def test_without_a_source_they_are_measured_one_after_another(models: list[Path], tmp_path: Path) -> None:
    _, near, far = models
    done = invoke(tmp_path, near, far, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert "how far each is from its source was not measured" in told["verdict"]["headline"]
    perplexity = [one["results"][0]["metrics"]["perplexity"] for one in told["evaluations"]]
    assert perplexity[0] != perplexity[1] and (tmp_path / "r" / "far" / EVAL_FILE).exists()


def test_what_cannot_be_compared_is_refused_before_it_is_measured(models: list[Path], tmp_path: Path) -> None:
    source, near, _ = models
    with pytest.raises(EvaluationError, match="is given twice"):
        compare([near, near.parent / "x" / ".." / "near"], source, report=tmp_path / "r")
    with pytest.raises(EvaluationError, match="two checkpoints or more"):
        compare([near], source)
    with pytest.raises(EvaluationError, match=r"is a minimax_m2, .* a minimax_m3_vl"):
        compare([near, FIXTURES / "tiny-m2"], source, report=tmp_path / "r", device="cpu")
    assert not (tmp_path / "r").exists()
    done = invoke(tmp_path, near, source, "--endpoint", "http://localhost:1")
    assert isinstance(done.exception, EvaluationError) and "a server of one checkpoint" in str(done.exception)


def test_folders_of_one_name_keep_apart(models: list[Path], tmp_path: Path) -> None:
    source, near, _ = models
    changed_copy(source, tmp_path / "near", 0.05)
    found = compare(
        [near, tmp_path / "near"],
        source,
        report=tmp_path / "r",
        data=str(FIXTURES / "heldout.txt"),
        suite=_suite(tmp_path),
        device="cpu",
    )
    names = [one.name for one in found.compared]
    assert len(set(names)) == 2 and all(name.endswith("-near") for name in names)
    assert [own.written.parent.name for own in found.evaluations] == names


def _suite(folder: Path) -> str:
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(SUITE))
    return str(file)


def changed(one: Compared, nbytes: int, kl: float, error: float) -> Compared:
    assert one.divergence is not None
    one.divergence.metrics |= {"kl_mean": kl, "kl_mean_error": error}
    return Compared(one.name, nbytes, one.record)


def test_the_verdict_names_the_closest_the_smallest_and_what_is_beaten() -> None:
    fp8, awq, int4 = sample_comparison()
    verdict = of_comparison([fp8, awq, int4])
    assert verdict.headline == "M3-fp8 is the closest to the source, M3-awq the smallest."
    meanings = {finding.label: finding.meaning for finding in verdict.findings}
    assert "M3-awq is smaller and closer." in meanings["M3-int4"]
    assert "smaller and closer" not in meanings["M3-fp8"] + meanings["M3-awq"]
    assert "Stands out: needle grid" in meanings["M3-fp8"] and "430.88 GB, KL 0.00410" in verdict.findings[0].value
    best = of_comparison([fp8, changed(awq, 100, 0.001, 1e-5)])
    assert best.headline == "M3-awq is both the smallest and the closest to the source."
    # Two that their standard errors do not tell apart: the smaller beats the larger only if it is not further off.
    same = of_comparison([changed(fp8, 400, 0.0200, 0.001), changed(awq, 200, 0.0201, 0.001)])
    assert same.headline.endswith("M3-awq cannot be told from M3-fp8 by their divergence.")
    assert "smaller and closer" not in same.findings[0].meaning


def test_the_page_shows_sizes_and_divergences_and_keeps_conventions_apart() -> None:
    compared = sample_comparison()
    html = page(compared)
    assert not re.search(r"https?://|src=|@import|url\(|<script|<link", html)
    body = html[html.index("<body>") :]
    pictures = [found.start() for found in re.finditer('<svg|class="heat"', body)]
    tables = [found.start() for found in re.finditer('<table class="(?:few|many|pairs)"', body)]
    assert body.index('class="verdict"') < min(pictures) and max(pictures) < min(tables)
    chart = re.findall(r"<svg.*?</svg>", body, re.S)[0]
    assert chart.count("<circle") == 3 and "M3-awq: 230.58 GB, KL 0.02134 nats a token" in chart
    (line, floor) = re.findall(r'<polyline class="line( c1)?" points="(.*?)"', chart)
    assert len(line[1].split()) == 2, "the line joins fp8 and awq; int4 is beaten"
    assert floor[0] == " c1" and len(floor[1].split()) == 2
    charts = re.findall(r"(<p class=\"soft key\">[^\n]*\n)<figure>", body)
    assert len(charts) == body.count("<svg") >= 4 and all("chip" in key for key in charts)
    for result in compared[0].run:
        if not result.convention.startswith("noise"):
            assert f"<h3>{result.label.replace('<', '&lt;').replace('>', '&gt;')}</h3>" in body
    assert "11.37 (+1.73 %)" in body
