"""`m3quant eval` from the command line: limits on needles, renamed tasks, a server in place of the weights, a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from m3quant.artifact.eval_record import EVAL_FILE, EvalRecord
from m3quant.cli import cli
from m3quant.errors import CheckpointError, EvaluationError, StoppedError
from tests.support.evaluate.double import Double, serving
from tests.support.evaluate.long_context import tokenizer
from tests.support.evaluate.measuring import Plain, changed_copy, run, sequence
from tests.support.paths import FIXTURES

M2, M3 = FIXTURES / "tiny-m2", FIXTURES / "tiny-m3"
SHORT = "does not exercise MSA"
NEEDLES = {"task": "needle", "name": "codes", "lengths": [256], "depths": [0.5], "samples": 10}
WINDOWS = {"task": "perplexity-gptq", "name": "main", "window": 64, "max_windows": 2}


def suite(folder: Path, *tasks: dict[str, Any]) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "tasks": list(tasks)}))
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_limits_hold_tasks_of_any_name(tmp_path: Path) -> None:
    """A checkpoint far from its source breaks needle and ppl though the suite calls these tasks otherwise; its own copy does not."""
    broken = changed_copy(M3, tmp_path / "broken", 1.0)
    given = ("--suite", suite(tmp_path, NEEDLES, WINDOWS), "--device", "cpu", "--fail-over", "needle=-2%,ppl=+2%")
    done = invoke("eval", broken, "--source", M3, *given, "--report", tmp_path / "a")
    assert done.exit_code == 1, done.output
    assert "FAIL  needle=-2%: accuracy went from 1 to 0, -100.00 % (codes," in done.output
    assert "FAIL  ppl=+2%: perplexity went from" in done.output and "(main, gptq-windows-64)" in done.output
    done = invoke("eval", M3, "--source", M3, *given, "--report", tmp_path / "b", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["gate"] == {"limits": ["needle=-2%", "ppl=+2%"], "broken": []}
    # Another kind of task under the name is none: refused before anything is computed.
    named = suite(tmp_path, {**WINDOWS, "name": "needle"})
    done = invoke("eval", M3, "--suite", named, "--fail-over", "needle=0.9", "--report", tmp_path / "c")
    assert isinstance(done.exception, EvaluationError) and "the suite has no needle task" in str(done.exception)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_limits_without_a_source_are_refused_before_anything_is_read(tmp_path: Path, count: int) -> None:
    folders = [tmp_path / f"nowhere-{n}" for n in range(count)]
    given = ("--suite", suite(tmp_path, WINDOWS), "--fail-over", "ppl=+2%")
    done = invoke("eval", *folders, *given)
    assert isinstance(done.exception, EvaluationError) and "needs --source" in str(done.exception)


def test_short_tasks_are_labelled_once_streamed_or_served(tmp_path: Path) -> None:
    file = suite(tmp_path, NEEDLES, WINDOWS, {"task": "position", "length": 128, "windows": 1})
    assert invoke("eval", M3, "--suite", file, "--device", "cpu", "--report", tmp_path / "r").exit_code == 0
    with serving(Double(tokenizer("tiny-m3"), {"token_ids", "prompt_logprobs"})) as url:
        done = invoke("eval", M3, "--endpoint", url, "--suite", file, "--report", tmp_path / "s")
        assert done.exit_code == 0, done.output
    for folder in ("r", "s"):
        record = EvalRecord.model_validate_json((tmp_path / folder / EVAL_FILE).read_text())
        assert [r.kind for r in record.results] == ["needle", "perplexity-gptq", "position"]
        for result in record.results:
            assert " ".join([result.label, *result.notes]).count(SHORT) == 1, (folder, result)


@pytest.mark.parametrize("offers", [{"token_ids", "prompt_logprobs", "ids_out"}, {"token_ids", "ids_out"}])
def test_endpoint_with_and_without_log_probs(tmp_path: Path, offers: set[str]) -> None:
    """Without prompt log-probs perplexity is not run, not zero, and a limit on it is broken rather than passed."""
    file = suite(tmp_path, NEEDLES, WINDOWS)
    with serving(Double(tokenizer("tiny-m2"), offers)) as url:
        done = invoke("eval", M2, "--endpoint", url, "--suite", file, "--report", tmp_path, "--fail-over", "ppl=1e9")
        assert isinstance(invoke("eval", M2, "--endpoint", url, "--source", M2).exception, EvaluationError)
    record = EvalRecord.model_validate_json((tmp_path / EVAL_FILE).read_text())
    needles, windows = record.results
    assert needles.metrics["accuracy"] == 0 and needles.not_run is None  # the toy model knows no codes
    if "prompt_logprobs" in offers:
        assert done.exit_code == 0 and windows.metrics["perplexity"] > 1
    else:
        assert done.exit_code == 1 and "FAIL  ppl=1e9: perplexity of main was not measured" in done.output
        assert windows.metrics == {} and windows.not_run is not None and "no prompt log-probs" in windows.not_run
        assert "not run: the server offers no prompt log-probs" in done.output


def test_another_source_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = invoke("eval", M2, "--source", M3, "--report", tmp_path / "r", "--suite", suite(tmp_path, WINDOWS))
    assert isinstance(done.exception, EvaluationError) and "is a minimax_m2" in str(done.exception)
    fewer = tmp_path / "fewer"
    shutil.copytree(M2, fewer)
    config = json.loads((fewer / "config.json").read_text())
    (fewer / "config.json").write_text(json.dumps({**config, "vocab_size": 1024}))
    done = invoke("eval", M2, "--source", fewer, "--report", tmp_path / "r", "--suite", suite(tmp_path, WINDOWS))
    assert isinstance(done.exception, CheckpointError) and "config.json implies [1024, 256]" in str(done.exception)
    assert not (tmp_path / "r").exists()


def test_words_without_spaces_leave_word_perplexity_out_and_say_so(tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("".join((FIXTURES / "heldout.txt").read_text().split())[:4000])
    file = suite(tmp_path, {"task": "perplexity-lm-eval", "window": 512})
    done = invoke("eval", M2, "--suite", file, "--data", text, "--report", tmp_path, "--device", "cpu")
    assert done.exit_code == 0, done.output
    (result,) = EvalRecord.model_validate_json((tmp_path / EVAL_FILE).read_text()).results
    assert list(result.metrics) == ["byte_perplexity", "bits_per_byte"]
    assert result.notes == ["word_perplexity is beyond float64: the text is 1 words of 4,000 bytes"]


@pytest.mark.parametrize(("call", "place"), [("pwritev", "host"), ("pwritev", "disk"), ("posix_fallocate", "host")])
def test_a_disk_that_fills_stops_the_run_and_it_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, place: str
) -> None:
    task, calls, real = Plain([sequence(80)]), [], getattr(os, call)

    def full(*arguments: Any) -> Any:
        calls.append(call)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(StoppedError, match="No space left"):
            run(M2, None, [task], tmp_path / "full", states=place)
    assert not (tmp_path / "full" / EVAL_FILE).exists()
    continued = run(M2, None, [task], tmp_path / "full", states=place)
    assert continued.results == run(M2, None, [task]).results
