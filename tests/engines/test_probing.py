"""m3quant.engines.probing without an engine: what is found, what is reported, and how a dying process is reported. No vLLM needed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3quant.engines import DEFAULT, engine_named, installed
from m3quant.engines.installed import ENGINE_PYTHON
from m3quant.engines.probing import Difference, difference, find_probed, run_probe
from m3quant.engines.vllm.probe import WeightLedger, account, empty_response, header_names, watch_writes
from m3quant.errors import EngineMissing, VerifyError
from m3quant.families import family_of
from tests.support.paths import FIXTURES

PROMPTS = [[1, 2, 3]]
TINY_M3 = FIXTURES / "tiny-m3"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(TINY_M3 / "config.json", folder)
    return folder


@pytest.fixture
def with_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace the probe by a script, run by this Python, which is given an empty package called vllm."""
    packages = tmp_path / "packages"
    (packages / "vllm").mkdir(parents=True)
    (packages / "vllm" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setenv(ENGINE_PYTHON, sys.executable)

    def put(script: str) -> None:
        path = tmp_path / "probe.py"
        path.write_text("import json, os, signal, sys, time\n" + script)
        assert DEFAULT.probe is not None
        monkeypatch.setattr(type(DEFAULT), "probe", replace(DEFAULT.probe, script=path))

    return put


def respond(**fields: object) -> str:
    """Script text that writes a response with these fields."""
    response = empty_response() | fields
    return f"open(sys.argv[2], 'w').write({json.dumps(json.dumps(response))})\n"


def test_no_vllm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE_PYTHON, raising=False)
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineMissing, match=r"vLLM is not installed.*--engine-python.*M3QUANT_ENGINE_PYTHON"):
        DEFAULT.find_python()


def test_a_python_that_does_not_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineMissing, match=r"--engine-python names .*nowhere, which does not run"):
        DEFAULT.find_python(str(tmp_path / "nowhere"))


def test_a_python_without_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE_PYTHON, sys.executable)
    with pytest.raises(EngineMissing, match=r"M3QUANT_ENGINE_PYTHON names .*, which has no vllm"):
        DEFAULT.find_python()


def test_a_crash_shows_the_last_lines(checkpoint: Path, with_probe: Callable[[str], None]) -> None:
    with_probe("print('the engine began', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(VerifyError, match=r"crashed on .* with exit code -11.*\n.*the engine began"):
        run_probe(DEFAULT, checkpoint, PROMPTS)


def test_a_killed_process_is_out_of_memory(checkpoint: Path, with_probe: Callable[[str], None]) -> None:
    with_probe("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(VerifyError, match="ran out of memory"):
        run_probe(DEFAULT, checkpoint, PROMPTS)


def test_an_engines_own_out_of_memory_is_recognised(checkpoint: Path, with_probe: Callable[[str], None]) -> None:
    error = {"type": "OutOfMemoryError", "message": "CUDA out of memory. Tried to allocate 20 GiB", "trace": []}
    with_probe(respond(status="failed", error=error) + "sys.exit(1)")
    with pytest.raises(VerifyError, match=r"ran out of memory .*Tried to allocate 20 GiB"):
        run_probe(DEFAULT, checkpoint, PROMPTS)


def test_a_refusal_gives_the_engines_words(checkpoint: Path, with_probe: Callable[[str], None]) -> None:
    error = {"type": "ValueError", "message": "Only swigluoai is supported.", "trace": ["File model.py"]}
    with_probe(respond(status="failed", error=error) + "sys.exit(1)")
    with pytest.raises(VerifyError, match=r"refused .*Only swigluoai is supported"):
        run_probe(DEFAULT, checkpoint, PROMPTS)


def test_a_silent_engine_is_ended_in_time(checkpoint: Path, with_probe: Callable[[str], None], tmp_path: Path) -> None:
    with_probe("print('loading', flush=True)\ntime.sleep(600)")
    with pytest.raises(VerifyError, match=r"did not finish within 2 s"):
        run_probe(DEFAULT, checkpoint, PROMPTS, timeout_s=2, log=tmp_path / "engine.log")


def test_an_incomplete_load_that_then_fails_is_still_a_report(
    checkpoint: Path, with_probe: Callable[[str], None]
) -> None:
    """Garbage weights may crash the scoring; the names of what is missing matter more."""
    error = {"type": "RuntimeError", "message": "probability tensor contains nan", "trace": []}
    fields = {
        "status": "failed",
        "error": error,
        "tensors": 3,
        "parameters": 9,
        "unexpected": ["a.w1.weight"],
        "version": "0",
    }
    with_probe(respond(**fields) + "sys.exit(1)")
    report = run_probe(DEFAULT, checkpoint, PROMPTS)
    assert not report.complete and report.score_error == "RuntimeError: probability tensor contains nan"
    assert "a.w1.weight" in report.problems()[0]


def test_prompts_and_folder_are_checked_first(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"no config\.json"):
        run_probe(DEFAULT, tmp_path, PROMPTS)
    with pytest.raises(VerifyError, match="at least two tokens"):
        run_probe(DEFAULT, checkpoint, [[1]])


def test_the_first_engine_that_is_there_is_asked(
    monkeypatch: pytest.MonkeyPatch, with_probe: Callable[[str], None]
) -> None:
    assert find_probed() == (DEFAULT, sys.executable)
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(EngineMissing, match="which has no vllm"):
        find_probed()


def test_an_engine_without_a_probe_is_named(checkpoint: Path) -> None:
    with pytest.raises(VerifyError, match="SGLang has no loading probe"):
        run_probe(engine_named("sglang"), checkpoint, PROMPTS)


def test_difference_of_logprobs() -> None:
    found = difference([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]], [[1, 2], [3]], [[1, 2], [4]])
    assert found == Difference(tokens=3, mean=0.5, median=0.5, p99=1.0, max=1.0, top1_agreement=2 / 3)
    with pytest.raises(VerifyError, match="not finite"):
        difference([[float("nan")]], [[0.0]])
    with pytest.raises(VerifyError, match="not of the same prompts"):
        difference([[0.0]], [[0.0, 0.0]])


# ---- the accounting ---------------------------------------------------------------------------------------------------


class Fused(torch.nn.Module):
    """A fused parameter of two halves, one per-expert parameter, one that no checkpoint fills, and two that engines fill themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Parameter(torch.zeros(8, 4), requires_grad=False)
        self.experts = torch.nn.Parameter(torch.zeros(3, 2, 4), requires_grad=False)
        self.alone = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
        self.attn = torch.nn.Module()
        self.attn.k_scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)
        self.w13_weight_g_idx = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.int32), requires_grad=False)
        self.register_buffer("bias", torch.zeros(2))


def test_ledger_sees_partial_fusions_and_unused_tensors() -> None:
    model = Fused()
    ledger = WeightLedger(model)
    halves = {"q": model.qkv.data[:4], "k": model.qkv.data[4:]}
    tensors = {"q": torch.ones(4, 4), "bias": torch.ones(2), "strange": torch.ones(2)}
    tensors |= {f"experts.{index}": torch.ones(2, 4) for index in range(3)}
    with watch_writes(ledger):
        for name, value in ledger.watch(iter(tensors.items())):
            if name in halves:
                halves[name].copy_(value)
                halves[name].copy_(value)  # a second write of one region fills nothing more
            elif name.startswith("experts."):
                model.experts.data[int(name[-1])].copy_(value.to(torch.float64))
            elif name == "bias":
                model.bias[:] = value
            else:
                value.clone().mul_(2)  # a write elsewhere is not a use
    report = ledger.report()
    assert report["missing"] == ["alone"]
    assert report["partial"] == [{"name": "qkv", "written": 16, "elements": 32}]
    assert set(report["read"]) - set(report["taken"]) == {"strange"}


def test_account_separates_defects_from_what_a_text_engine_leaves_out(tmp_path: Path) -> None:
    names = ["vision_tower.a", "model.mtp.layers.0.b", "model.layers.2.c", "model.layers.1.lost", "model.layers.0.used"]
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert header_names(tmp_path) == set(names)
    reports = {
        "parameters": 1, "missing": [], "partial": [], "engine_check": None, "notes": [],
        "read": set(), "taken": {"model.layers.0.used"},
    }  # fmt: skip
    facts = DEFAULT.probe.facts(family_of(json.loads((TINY_M3 / "config.json").read_text()))) | {"layers": 2}
    found = account(reports, tmp_path, facts)
    assert found["unexpected"] == found["never_read"] == ["model.layers.1.lost"]
    assert found["skipped"] == {"mtp": 2, "vision": 1}
    assert found["tensors"] == 5
