"""Suites, limits, texts and the command: what is accepted, what is refused and in which words."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from m3quant.artifact.eval_record import EvalRecord, Measured, Result
from m3quant.calibration.corpus import load_documents, load_tokenizer
from m3quant.cli import cli
from m3quant.errors import CalibrationError, EvaluationError, M3QuantError
from m3quant.evaluate.gate import broken, check_limits, parse_limits
from m3quant.evaluate.models import open_model
from m3quant.evaluate.suites import load_suite, make_tasks, suite_names
from m3quant.evaluate.texts import BUNDLED_PATH, PUBLIC, load_texts
from tests.support.calibration import tiny
from tests.support.paths import FIXTURES

M2 = FIXTURES / "tiny-m2"
CONFIG: dict[str, Any] = json.loads((M2 / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(M2)


def suite_file(folder: Path, **document: Any) -> str:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", **document}))
    return str(path)


def test_shipped_suites_make_tasks_within_the_context(tokenizer: Any) -> None:
    assert suite_names() == ["full", "quick"]
    for name in suite_names():
        tasks, _ = make_tasks(load_suite(name), tokenizer, CONFIG)
        assert len({task.name for task in tasks}) == len(tasks) >= 5
        longest = max(int(s.scored[-1]) for task in tasks for s in task.sequences())
        assert longest <= CONFIG["max_position_embeddings"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"tasks": [{"task": "perplexty-gptq"}]}, "no task 'perplexty-gptq': did you mean 'perplexity-gptq'"),
        ({"tasks": [{"task": "perplexity-gptq", "windw": 3}]}, "unknown key 'windw': did you mean 'window'"),
        ({"tasks": [{"task": "perplexity-gptq", "window": 1}]}, "key 'window'.*must be at least 2"),
        ({"tasks": [{"task": "divergence"}], "taks": []}, "unknown key 'taks': did you mean 'tasks'"),
        ({"tasks": []}, "key 'tasks'"),
        ({"beyond_context": "leave-out", "tasks": [{"task": "needle", "lengths": 512}]}, "lengths must be a list"),
        (
            {"beyond_context": "leave-out", "tasks": [{"task": "position", "length": "long"}]},
            "length must be a whole number",
        ),
        ({"tasks": [{"task": "divergence"}] * 2}, "divergence twice"),
        ({"tasks": [{"task": "perplexity-gptq", "window": 500_000}]}, "less than one window of 500000"),
    ],
)
def test_wrong_suites_are_refused_with_what_was_meant(
    tmp_path: Path, tokenizer: Any, document: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        make_tasks(load_suite(suite_file(tmp_path, **document)), tokenizer, CONFIG)


def test_a_suite_that_is_not_there_or_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="did you mean --suite quick"):
        load_suite("quik")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(EvaluationError, match="is not YAML"):
        load_suite(str(tmp_path / "bad.yaml"))


def test_data_replaces_the_text_of_every_task(tmp_path: Path, tokenizer: Any) -> None:
    tasks, _ = make_tasks(load_suite("quick"), tokenizer, CONFIG, data=str(FIXTURES / "heldout.txt"))
    plain, _ = make_tasks(load_suite("quick"), tokenizer, CONFIG)
    assert all(
        a.sequences()[0].ids.tolist() != b.sequences()[0].ids.tolist() for a, b in zip(tasks, plain, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("text.txt", b"", CalibrationError, "is empty"),
        ("text.txt", b"  \n", CalibrationError, "only white space"),
        ("text.txt", b"caf\xe9", CalibrationError, "is not UTF-8"),
        ("text.jsonl", rb'{"text": "a \ud800 b"}', CalibrationError, "line 1 holds half of a surrogate pair"),
        ("text.txt", b"short", EvaluationError, "less than one window of 2048"),
        ("text.bin", b"x", CalibrationError, "this kind of file is not read"),
    ],
)
def test_unusable_text_is_refused(
    tmp_path: Path, tokenizer: Any, name: str, data: bytes, error: type[M3QuantError], message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        make_tasks(load_suite("quick"), tokenizer, CONFIG, data=str(tmp_path / name))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_sets_without_a_network_are_an_error_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, name: str
) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(EvaluationError, match=r"cannot be loaded \(Couldn't reach the Hub\).*--data FILE"):
        load_texts(name, tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvaluationError, match="pip install 'm3quant"):
        load_texts(name, tokenizer)


def test_public_sets_are_read_from_their_column(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options["split"]))
        column = {"Salesforce/wikitext": "text", "EleutherAI/wikitext_document_level": "page"}.get(name, "text")
        return [{column: f" a @-@ b {i} , c ", "other": 1} for i in range(12)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_texts("wikitext-2", tokenizer).shown[1] == " a @-@ b 1 , c "
    pages = load_texts("wikitext-2-documents", tokenizer)
    assert (pages.shown[1], pages.documents[1]) == (" a-b 1, c ", " a @-@ b 1 , c ")
    assert len(load_texts("pg19", tokenizer).documents) == 10
    assert asked[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")


def shingles(text: str) -> set[str]:
    plain = " ".join(text.split())
    return {plain[i : i + 50] for i in range(len(plain) - 49)}


def test_the_bundled_texts_share_nothing_with_the_calibration_corpus() -> None:
    """No 50 characters in common after white space is normalised."""
    calibration: set[str] = set()
    for document in load_documents(None):
        calibration |= shingles(document.text if document.text is not None else document.content_bytes().decode())
    texts = [json.loads(line) for line in BUNDLED_PATH.read_text(encoding="utf-8").splitlines()]
    shared = [t["source"] for t in texts if not calibration.isdisjoint(shingles(t["text"]))]
    assert shared == []
    assert len(calibration) > 400_000 and len(texts) == 45


def test_the_bundled_texts_state_their_licences() -> None:
    texts = [json.loads(line) for line in BUNDLED_PATH.read_text(encoding="utf-8").splitlines()]
    readme = (BUNDLED_PATH.parent / "README.md").read_text(encoding="utf-8")
    assert {t["licence"] for t in texts} == {"public-domain", "Apache-2.0", "BSD-3-Clause", "MIT", "ISC"}
    assert f"{len(texts)} documents, {round(BUNDLED_PATH.stat().st_size / 1000)} kB" in readme
    assert not any(t["kind"] == "text" and t["lang"] != "en" for t in texts[:20])


def record(
    metrics: dict[str, float], source: dict[str, float] | None = None, task: str = "perplexity-gptq"
) -> EvalRecord:
    result = Result(task="renamed", kind=task, convention="c", label="l", metrics=metrics, source_metrics=source)
    return EvalRecord(
        m3quant="0", finished="", seconds=0, device="cpu", versions={}, checkpoint=Measured(name="x"), suite="s", results=[result]
    )  # fmt: skip


def test_limits_absolute_and_relative() -> None:
    ppl = record({"perplexity": 10.3}, {"perplexity": 10.0})
    assert broken(parse_limits("ppl=+4%"), ppl) == []
    assert "from 10 to 10.3, +3.00 %" in broken(parse_limits("ppl=+2%"), ppl)[0]
    assert broken(parse_limits("ppl=10.4"), ppl) == [] and len(broken(parse_limits("ppl=10.2"), ppl)) == 1
    assert "source's perplexity was not measured" in broken(parse_limits("ppl=+2%"), record({"perplexity": 1.0}))[0]
    kl = record({"kl_mean": 0.06, "top1_agreement": 0.9}, task="divergence")
    assert [bool(broken(parse_limits(t), kl)) for t in ("kld=0.05", "kld=0.07", "top1=0.95", "top1=0.85")] == [
        True, False, True, False,
    ]  # fmt: skip
    assert "kl_mean was not measured" in broken(parse_limits("kld=1"), ppl)[0]
    assert "accuracy is nan" in broken(parse_limits("needle=0.5"), record({"accuracy": math.nan}, task="needle"))[0]
    two = record({"accuracy": 1.0}, {"accuracy": 1.0}, task="needle")
    assert broken(parse_limits("needle=-2%"), two) == []
    two.results += record({"accuracy": 0.9}, {"accuracy": 1.0}, task="needle").results
    assert "from 1 to 0.9, -10.00 % (renamed" in broken(parse_limits("needle=-2%"), two)[0]
    two.results[1] = Result(task="long", kind="needle", convention="-", label="l", not_run="the server refused")
    assert broken(parse_limits("needle=0.5"), two) == ["needle=0.5: accuracy of long was not measured"]
    floor = record({"kl_mean": 9.0}, task="divergence")
    floor.results[0].convention = "noise-floor-windows-2048"
    floor.results += kl.results
    assert broken(parse_limits("kld=0.07"), floor) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kdl=1", "did you mean 'kld'"),
        ("ppl=2%", r"write the worst change allowed with its sign, as ppl=\+2%"),
        ("top1=+2%", "as top1=-2%"),
        ("ppl=high", "write ppl=NUMBER"),
        ("kld=nan", "write kld=NUMBER"),
        ("", "names no limit"),
    ],
)
def test_limits_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        parse_limits(text)


def test_limits_on_what_is_not_measured_are_refused_before_the_run() -> None:
    tasks = ["perplexity-gptq", "divergence"]
    check_limits(parse_limits("kld=1,ppl=+2%"), tasks, source=True)
    check_limits(parse_limits("ppl=20"), tasks, source=False)
    for text in ("kld=1", "ppl=+2%"):
        with pytest.raises(EvaluationError, match="needs --source"):
            check_limits(parse_limits(text), tasks, source=False)
    with pytest.raises(EvaluationError, match="the suite has no needle task"):
        check_limits(parse_limits("needle=0.9"), tasks, source=True)


def few(folder: Path) -> str:
    tasks = [
        {"task": "perplexity-gptq", "window": 128, "max_windows": 2},
        {"task": "divergence", "window": 128, "max_windows": 2, "noise_windows": 1},
    ]
    return suite_file(folder, tasks=tasks)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_convert_eval_json_gate_and_exit_code(tmp_path: Path) -> None:
    """convert --eval, then eval by itself: the same figures, written where said, and the gate's exit code."""
    out = tmp_path / "out"
    done = invoke("convert", M2, out, "--to", "int4", "--device", "cpu", "--eval", few(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout)["evaluation"]
    stored = EvalRecord.model_validate_json((out / "eval.json").read_text())
    assert [r.metrics for r in stored.results] == [r["metrics"] for r in first["results"]]
    assert (stored.checkpoint.stored, stored.source and stored.source.stored) == ("int4", "bf16")
    assert len(stored.layers) == 3 and stored.results[1].metrics["kl_mean"] > stored.results[2].metrics["kl_mean"] > 0
    gate = ("--fail-over", "kld=0.000001,ppl=+50%")
    done = invoke(
        "eval", out, "--source", M2, "--suite", few(tmp_path), "--device", "cpu", "--report", tmp_path / "r", *gate
    )
    assert done.exit_code == 1
    assert "FAIL  kld=0.000001: kl_mean is" in done.output and "FAIL  ppl" not in done.output
    assert "[gptq-windows-128]" in done.output and "noise floor" in done.output
    again = EvalRecord.model_validate_json((tmp_path / "r" / "eval.json").read_text())
    assert again.results == stored.results
    refused = invoke("eval", out, "--suite", few(tmp_path), "--fail-over", "kld=1", "--report", tmp_path / "r")
    assert isinstance(refused.exception, EvaluationError) and "needs --source" in str(refused.exception)


def test_a_calibrated_conversion_writes_its_own_figures(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tiny.make_tiny_m2(source, vocab_size=CONFIG["vocab_size"], num_hidden_layers=1, num_local_experts=4)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(M2 / name, source / name)
    done = invoke(
        "convert", source, out, "--to", "awq", "--device", "cpu", "--windows", 2, "--window-length", 32, "--json"
    )
    assert done.exit_code == 0, done.output
    manifest = json.loads((out / "m3quant.json").read_text())
    assert json.loads(done.stdout)["heldout"] == manifest["heldout"]
    found = EvalRecord.model_validate_json((out / "eval.json").read_text())
    assert found.suite == "conversion" and found.results[0].convention == "m3quant-heldout-32"
    assert found.results[0].metrics["kl_mean"] == manifest["heldout"]["kl_mean"]
    assert found.checkpoint.fingerprint == open_model(out).fingerprint()
    assert len(found.layers) == 1 and found.coverage == manifest["coverage"]
    done = invoke("eval", out, "--source", source, "--suite", few(tmp_path), "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    assert [r["task"] for r in results] == ["perplexity-gptq", "divergence", "divergence", "conversion-heldout"]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(M2, other)
    document = json.loads((other / "tokenizer.json").read_text())
    assert document["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(document))
    done = invoke("eval", other, "--source", M2, "--suite", few(tmp_path), "--report", tmp_path / "r")
    assert isinstance(done.exception, EvaluationError) and "make different tokens" in str(done.exception)
    # The same tokenizer written in another way is the same.
    (other / "tokenizer.json").write_text(json.dumps(json.loads((M2 / "tokenizer.json").read_text()), indent=3))
    assert invoke("eval", other, "--source", M2, "--suite", few(tmp_path), "--report", tmp_path / "r").exit_code == 0
