"""The benchmark's peer: which program it is, when it is refused, and what is said of a run that is stopped or fails."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import peers
from tests.support.convert.common import make_plan_of, make_source

PATHS = [Path("source"), Path("output"), Path("answer.json")]
STARTED = (
    "import json, pathlib, subprocess, sys, time; progress = pathlib.Path(sys.argv[1]).with_suffix('.progress.json')"
)
HANGS = f"""{STARTED}
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
progress.with_name('child').write_text(str(child.pid))
progress.write_text(json.dumps(dict(started=time.time(), stage='oneshot', mapping=12, mappings=258)))
child.wait()
"""


def script(text: str, answer: Path) -> list[str]:
    return [sys.executable, "-c", text, str(answer)]


def alive(pid: int, patience: float = 10.0) -> bool:
    """Whether the process still runs after `patience` seconds; one that has ended may wait for its new parent to collect it.

    A process that was killed is gone only once the kernel has taken it down, which a busy machine does late.
    """
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.05)
    return True


def test_a_calibrated_recipe_is_compared_with_llm_compressors_awq_and_never_with_round_to_nearest() -> None:
    free = peers.command("python", "none", PATHS, "cpu", [128, 512, 8])
    awq = peers.command("python", "awq", PATHS, "cuda", [128, 512, 8])
    assert free[:2] == awq[:2] == ["python", "-m"]
    assert [line[2] for line in (free, awq)] == ["tests.benchmarks.peer_llmcompressor", "tests.benchmarks.peer_awq"]
    assert free[3:] == ["source", "output", "answer.json", "cpu", str(peers.WORKERS)]
    assert awq[3:] == ["source", "output", "answer.json", "cuda", "128", "512", "8"]
    assert all(importlib.util.find_spec(line[2]) for line in (free, awq))


@pytest.mark.parametrize(
    ("calibration", "device", "reason"),
    [
        ("awq", "cuda:1", "CUDA_VISIBLE_DEVICES"),
        ("gptq", "cpu", "'gptq'"),
        ("awq", "cuda", None),
        ("awq", "cuda:0", None),
        ("awq", "cpu", None),
        ("none", "cuda:1", None),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_with_its_reason(
    calibration: str, device: str, reason: str | None
) -> None:
    refused = peers.refusal(calibration, device)
    assert refused is None if reason is None else refused is not None and reason in refused


def test_the_benchmark_refuses_before_it_makes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benchmarks import convert

    work = tmp_path / "work"
    line = ["convert", "--to", "int4,awq", "--device", "cuda:1", "--against", "llm-compressor"]
    monkeypatch.setattr(convert, "pick_device", torch.device)  # this machine may have no second GPU
    monkeypatch.setattr(sys, "argv", [*line, "--work", str(work)])
    with pytest.raises(
        SystemExit, match=r"--to awq: llm-compressor's AWQ takes the first GPU that it sees, not cuda:1"
    ):
        convert.main()
    assert not work.exists()


def test_a_run_past_its_limit_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    began = time.perf_counter()
    row = peers.run(script(HANGS, tmp_path / "answer.json"), tmp_path / "answer.json", limit=3)
    assert time.perf_counter() - began < 3 + peers.GRACE
    assert not alive(int((tmp_path / "child").read_text()))
    assert 0 < row["stopped"] < row["process_seconds"]
    assert peers.outcome(row) == f"stopped after {row['process_seconds']:.0f} s, at mapping 12 of 258 (in oneshot)"
    assert peers.ratio([{"seconds": row["stopped"] / 4}], [row]) == "more than 4.00 times as fast as the peer"


def test_a_run_that_ignores_the_request_to_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "GRACE", 1)
    deaf = (
        f"{STARTED}; import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "progress.with_name('child').write_text(str(os.getpid())); time.sleep(600)"
    )
    row = peers.run(script(deaf, tmp_path / "answer.json"), tmp_path / "answer.json", limit=2)
    assert not alive(int((tmp_path / "child").read_text()))
    assert (row["stopped"], row["progress"]) == (0.0, {})
    assert peers.outcome(row).endswith("before its imports were done")


def test_what_an_earlier_run_had_got_to_is_not_this_ones(tmp_path: Path) -> None:
    (tmp_path / "answer.progress.json").write_text(json.dumps({"started": 0, "stage": "oneshot"}))
    row = peers.run(script("import time; time.sleep(600)", tmp_path / "answer.json"), tmp_path / "answer.json", limit=1)
    assert row["progress"] == {}


def test_a_failed_run_is_reported_with_its_last_words_and_has_no_ratio(tmp_path: Path) -> None:
    row = peers.run(script("raise SystemExit('no such layer')", tmp_path / "answer.json"), tmp_path / "answer.json")
    assert peers.outcome(row) == "failed: no such layer\n"
    assert peers.ratio([{"seconds": 1.0}], [row]) is None


def test_a_finished_run_is_reported_with_its_parts(tmp_path: Path) -> None:
    answer = {
        "seconds": 6.0, "split": {"load": 1.0, "oneshot": 4.5, "save": 0.5},
        "mappings": 10, "packed": 24, "batch": 8, "cache": "cpu",
    }  # fmt: skip
    writes = f"import pathlib, sys; pathlib.Path(sys.argv[1]).write_text({json.dumps(answer)!r})"
    row = peers.run(script(writes, tmp_path / "answer.json"), tmp_path / "answer.json", limit=60)
    assert peers.outcome(row).startswith(
        "6.00 s: load 1.00 s, oneshot 4.50 s, save 0.50 s (10 mappings, 24 INT4 tensors"
    )
    slower, failed = {"seconds": 8.0}, {"failed": "no memory"}
    assert peers.ratio([{"seconds": 2.0}], [row, slower, failed]) == "3.50 times as fast as the peer"


def test_the_peer_quantizes_what_we_do_but_m3s_shared_expert_by_the_scheme_of_the_routed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.benchmarks.peer_awq import groups

    layer = {"m2": "model.layers.0", "m3": "model.language_model.layers.0"}  # transformers' names
    bits = {
        "m2": {"mlp.experts.3.up_proj": 4, "self_attn.q_proj": 8, "mlp.gate": None},
        "m3": {
            "mlp.experts.3.up_proj": 4, "mlp.shared_experts.gate_up_proj": 4, "mlp.shared_experts.down_proj": 4,
            "self_attn.q_proj": 8, "self_attn.indexer.k_proj": 8, "mlp.gate": None,
        },
    }  # fmt: skip
    for shape, wanted in bits.items():
        found = groups(make_plan_of(make_source(tmp_path / shape, shape), "awq").quantization)
        assert {name: _bits(found, f"{layer[shape]}.{name}") for name in wanted} == wanted


def _bits(groups: dict[str, Any], name: str) -> int | None:
    """Weight bits of the module called `name`, by the first group with a target that matches it."""
    for group in groups.values():
        if any(re.match(target.removeprefix("re:"), name) for target in group["targets"]):
            return int(group["weights"]["num_bits"])
    return None
