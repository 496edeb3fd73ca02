"""serve without an engine: decisions, refusals, the child process, pins, and the files it writes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from m3quant.cli import cli
from m3quant.engines import DEFAULT as VLLM
from m3quant.engines import Installed, Launch, engine_named
from m3quant.engines.vllm.log import parse_log
from m3quant.errors import (
    CheckpointError,
    DoesNotFit,
    EngineMissing,
    M3QuantError,
    NodeError,
    OptionError,
    RecipeError,
    ServeError,
)
from m3quant.recipe.recipe import recipe_folder, recipe_names
from m3quant.runtime.compose import compose_file
from m3quant.runtime.engine_notes import weight_notes
from m3quant.runtime.fit import Ask, Fit, assess
from m3quant.runtime.hardware import GIB, GPUS, parse_node
from m3quant.runtime.launch import EngineProcess, check_port
from m3quant.runtime.model import open_subject
from m3quant.runtime.pins import pin_key, pinned_bytes, read_pin, write_pin
from m3quant.runtime.serve import compare, importable, prepare, quick_check, start_options
from m3quant.runtime.serve_recipe import ServeRecipe, load_serve_recipe
from m3quant.runtime.this_machine import detect_node, gpu_called
from m3quant.runtime.units import systemd_unit
from tests.support.paths import TESTS

M3 = TESTS / "fixtures" / "tiny-m3"
M2 = TESTS / "fixtures" / "tiny-m2"
FLAGS = [
    "max-model-len",
    "max-num-seqs",
    "max-num-batched-tokens",
    "block-size",
    "gpu-memory-utilization",
    "tensor-parallel-size",
    "pipeline-parallel-size",
    "enable-expert-parallel",
    "kv-cache-dtype",
    "attention-config",
    "language-model-only",
    "tool-call-parser",
    "enable-auto-tool-choice",
    "reasoning-parser",
    "host",
    "port",
    "served-model-name",
    "kv-cache-memory-bytes",
    "middleware",
    "shutdown-timeout",
    "watermark",
    "enforce-eager",
]
NEW = Installed("vllm", "python-of-the-engine", "0.33.0", frozenset(FLAGS), True)


def fit_on(folder: Path, node: str, **ask: Any) -> Fit:
    return assess(open_subject(str(folder)).stored, parse_node(node), Ask(**ask))


def launched(fit: Fit, recipe: ServeRecipe, installed: Installed | None, api_key: str | None = None, pin: int | None = None,
             api_key_env: str | None = None) -> Launch:  # fmt: skip
    options = start_options("a-hub/model", recipe, api_key, api_key_env, pin)
    return engine_named(recipe.engine).launch(fit.serving, options, installed)


# --- the command ---


def test_the_command_holds_what_the_family_and_the_node_need() -> None:
    fit = fit_on(M3, "2xH100", context=4096, kv_dtype="fp8", index_dtype="fp8")
    launch = launched(fit, ServeRecipe(port=9000, served_name="m3", watermark=0.03), NEW, "secret")
    text = " ".join(launch.command)
    for part in ("--max-model-len 4096", "--block-size 128", "--kv-cache-dtype fp8", "--language-model-only", "--tensor-parallel-size 2",
                 "--tool-call-parser minimax_m3", "--reasoning-parser minimax_m3", "--enable-auto-tool-choice", "--port 9000", "--shutdown-timeout 60",
                 "--watermark 0.03", "--middleware m3quant.runtime.guard.Guard", "--served-model-name m3", '--attention-config {"indexer_kv_dtype": "fp8"}'):  # fmt: skip
        assert part in text, part
    assert (
        "secret" not in text
        and launch.env["VLLM_API_KEY"] == "secret"
        and launch.secret >= {"VLLM_API_KEY", "M3QUANT_GUARD_API_KEYS"}
    )
    line = launch.shown(str, "MY_KEY")
    assert "secret" not in line and "VLLM_API_KEY=$MY_KEY M3QUANT_GUARD_API_KEYS=$MY_KEY" in line
    with_vision = launched(fit_on(M3, "2xH100", vision=True), ServeRecipe(), NEW, pin=5)
    assert "--language-model-only" not in with_vision.command and "--kv-cache-memory-bytes" in with_vision.command


def test_an_older_engine_loses_optional_flags_with_a_word_and_needed_ones_with_an_error() -> None:
    fit = fit_on(M2, "1xH200")
    old = replace(NEW, version="0.26.0", flags=frozenset(FLAGS) - {"watermark"})
    launch = launched(fit, ServeRecipe(), old)
    assert "--watermark" not in launch.command and any("--watermark" in note for note in launch.notes)
    with pytest.raises(EngineMissing, match=r"0\.26\.0 does not know --middleware"):
        launched(fit, ServeRecipe(), replace(old, flags=old.flags - {"middleware"}))


@pytest.mark.parametrize(
    ("version", "warns"), [("0.32.0+cpu", False), ("0.26.0", False), ("0.40.1", True), ("dev-build", True)]
)
def test_unknown_versions_warn(version: str, warns: bool) -> None:
    subject = open_subject(str(M3))
    assert bool(VLLM.check_family(replace(NEW, version=version), subject.family)) == warns


def test_a_version_without_the_model_is_refused() -> None:
    subject = open_subject(str(M3))
    with pytest.raises(EngineMissing, match=r"0\.23\.0 does not have minimax_m3_vl: install 0\.24\.0"):
        VLLM.check_family(replace(NEW, version="0.23.0"), subject.family)


def test_an_fp8_index_cache_needs_a_release_that_has_it() -> None:
    fit = fit_on(M3, "1xH200", index_dtype="fp8")
    VLLM.check_index(NEW, fit.serving)
    VLLM.check_index(replace(NEW, version="0.26.0"), fit_on(M2, "1xH200", index_dtype="fp8").serving)
    with pytest.raises(EngineMissing, match=r"0\.26\.0 keeps M3's index keys in BF16"):
        VLLM.check_index(replace(NEW, version="0.26.0"), fit.serving)


def test_fp8_experts_of_m3_come_with_a_warning() -> None:
    subject = open_subject(str(TESTS / "data" / "minimax-m3"))
    models = {model.label: model for model in subject.precisions()[0]}
    config = {**subject.config, "quantization_config": {"quant_method": "compressed-tensors"}}
    fp8 = assess(replace(models["fp8"], config=config), parse_node("8xH200"), Ask())
    assert any("swiglu" in note for note in weight_notes(fp8))
    assert weight_notes(assess(models["awq"], parse_node("8xH200"), Ask())) == []


def test_sglang_gets_the_same_choices() -> None:
    fit = fit_on(M3, "2xH100", context=4096, kv_dtype="fp8", engine="sglang")
    launch = launched(fit, ServeRecipe(engine="sglang"), None, api_key_env="KEY")
    text = " ".join(launch.command)
    for part in (
        "sglang.launch_server",
        "--context-length 4096",
        "--tp-size 2",
        "--kv-cache-dtype fp8_e4m3",
        "--tool-call-parser minimax-m3",
    ):
        assert part in text
    assert any("no m3quant guard" in note for note in launch.notes) and any("KEY" in note for note in launch.notes)


# --- decisions and refusals ---


def silent(line: str) -> None:
    pass


def decide(src: Path, **recipe: Any) -> Any:
    return prepare(str(src), ServeRecipe(**recipe), None, None, None, True, False, silent)


def test_context_and_watermark_go_together(tmp_path: Path) -> None:
    """At admission vLLM keeps the blocks under the watermark free, so a request that needs them would wait for ever."""
    said: list[str] = []
    node = "cpu:1GiB"
    pool = fit_on(M2, node).pool.tokens
    folder = tmp_path / "long"
    shutil.copytree(M2, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10 * pool}))
    asked = prepare(str(folder), ServeRecipe(node=node, context=pool - 500), None, None, None, True, False, said.append)
    assert asked.recipe.watermark < 0.02 and any("watermark" in line for line in said)
    free = prepare(str(folder), ServeRecipe(node=node), None, None, None, True, False, said.append)
    assert free.recipe.watermark == 0.02 and free.fit.context <= 0.98 * pool


def test_what_does_not_fit_is_refused_with_the_change_that_helps() -> None:
    with pytest.raises(DoesNotFit, match=r"does not fit on 1xH200.*--context 8192 in place of 9000") as error:
        decide(M3, node="1xH200", context=9000)
    assert error.value.exit_code == 3


def test_a_checkpoint_with_a_short_shard_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(M2, folder)
    shards = {p.name: {"size": p.stat().st_size, "sha256": "0" * 64} for p in folder.glob("*.safetensors")}
    (folder / "m3quant.json").write_text(json.dumps({"shards": shards, "files": {}}))
    assert quick_check(str(folder), open_subject(str(folder))) == []
    manifest = json.loads((folder / "m3quant.json").read_text())
    name = next(iter(manifest["shards"]))
    manifest["shards"][name]["size"] += 1
    (folder / "m3quant.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="bytes were written: copy the checkpoint again"):
        quick_check(str(folder), open_subject(str(folder)))
    (folder / "m3quant.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        quick_check(str(folder), open_subject(str(folder)))


def test_an_interrupted_conversion_is_called_that(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / ".m3quant").mkdir(parents=True)
    shutil.copy(next(M2.glob("*.safetensors")), folder)
    with pytest.raises(CheckpointError, match="unfinished conversion: run the same convert command again"):
        decide(folder, node="1xH200")


def test_a_config_without_weights_cannot_be_served() -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        decide(TESTS / "data" / "minimax-m3", node="8xH200")


def test_shipped_serving_recipes_are_valid_and_no_conversion_recipes() -> None:
    files = sorted(path.stem for path in recipe_folder().glob("serve-*.yaml"))
    drafts = {"serve-m2.7-eagle3-1xh200": "MiniMax-M2.7-", "serve-m3-eagle3-2xh200": "MiniMax-M3-"}
    assert files == ["serve-1xh200", "serve-2xh100", *drafts] and not set(files) & set(recipe_names())
    for name in files:
        recipe = load_serve_recipe(name, {"port": 1234})
        assert (
            recipe.name == name
            and recipe.node
            and parse_node(recipe.node).name.lower() == name.rpartition("-")[2]
            and recipe.port == 1234
        )
    m2 = open_subject(str(TESTS / "data" / "minimax-m2.7"))
    awq = next(model for model in m2.precisions()[0] if model.label == "awq")
    for name in files:
        recipe = load_serve_recipe(name, {})
        assert drafts.get(name, "") in (recipe.draft or "") and bool(recipe.draft) == (name in drafts)
        assert recipe.node and assess(awq, parse_node(recipe.node), recipe.ask()).fits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conext: 5", "did you mean 'context'"),
        ("port: 0", "'port'"),
        ("utilization: 2", "'utilization'"),
        ("- a", "no mapping"),
        ("engine: x", "'engine'"),
        ("kv_offload: true", "'kv_offload' must be a whole number"),
        ("concurrency: yes", "'concurrency' must be a whole number"),
        ("draft: ''", "'draft' must not be empty"),
        ("host: a b", "'host': write one word, without white space"),
    ],
)
def test_bad_serving_recipes_are_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_serve_recipe(path, {})


@pytest.mark.parametrize(
    ("given", "message"),
    [({"api_keys": "sk-secret"}, "--api-key-env"), ({"API_KEYS": "sk-secret"}, "--api-key-env"),
     ({"max_bodi_bytes": 5}, "M3QUANT_GUARD_MAX_BODI_BYTES: the guard has no such setting"), ({"watchdog_s": -1}, "WATCHDOG_S")],
)  # fmt: skip
def test_guard_settings_are_checked_before_an_engine_is_loaded(given: dict[str, Any], message: str) -> None:
    with pytest.raises(M3QuantError, match=message) as refused:
        decide(M2, node="1xH200", guard_settings=given)
    assert "sk-secret" not in str(refused.value)
    assert "--middleware" not in decide(M2, node="1xH200", guard_settings=given, guard=False).launch.command


def test_the_rule_of_reservation_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(**recipe: Any) -> str:
        return decide(M2, node="1xH200", **recipe).launch.env["M3QUANT_GUARD_RESERVE"]

    assert shown() == "learned" and shown(guard_settings={"reserve": "all"}) == "all"
    monkeypatch.setenv("M3QUANT_GUARD_RESERVE", "all")
    assert shown() == "all"


@pytest.mark.parametrize(
    "extra", [["--api-key", "sk-1"], ["--enforce-eager", "--api_key=sk-1"], ["--api-ke", "sk-1"], ["--hf-token=sk-1"]]
)
def test_secrets_among_more_arguments_are_refused_and_not_repeated(extra: list[str]) -> None:
    with pytest.raises(RecipeError, match="would be printed") as refused:
        load_serve_recipe(None, {"extra": extra})
    assert "sk-1" not in str(refused.value)
    assert load_serve_recipe(None, {"extra": ["--api-server-count", "1", "--host"]}).extra


@pytest.mark.parametrize(
    "extra", [["--max-num-seqs", "5"], ["--seed", "7", "--max_num_seqs=5"], ["--watermark", "0.1"]]
)
def test_what_the_plan_gives_is_given_once(extra: list[str]) -> None:
    """An engine takes the last of two, and memory and guard would be planned for the first."""
    with pytest.raises(RecipeError, match="which the plan gives: leave it out there"):
        decide(M2, node="1xH200", extra=extra)
    assert decide(M2, node="1xH200", extra=["--seed", "7"]).launch.arguments[-2:] == ["--seed", "7"]


def test_a_draft_in_a_folder_with_a_space_and_a_tower_that_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "a draft"
    shutil.copytree(TESTS / "fixtures" / "tiny-m2-eagle3", folder)
    said = list[str]()
    made = prepare(str(M2), load_serve_recipe(None, {"node": "1xH200", "draft": str(folder), "vision": True}), None, None, None, True, False, said.append)  # fmt: skip
    assert json.loads(made.launch.arguments[made.launch.arguments.index("--speculative-config") + 1])["model"] == str(folder)  # fmt: skip
    assert any("has no vision tower: --vision changes nothing" in line for line in said)


def test_a_serving_recipe_that_does_not_exist_names_those_that_ship() -> None:
    with pytest.raises(
        RecipeError,
        match=r"nope does not exist: give a YAML file, or one of serve-1xh200, serve-2xh100, serve-m2.7-eagle3-1xh200, ",
    ):
        load_serve_recipe("nope", {})


def test_no_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NodeError, match="no GPU was found"):
        detect_node(False)
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA H100 80GB HBM3, 81559'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert detect_node(False).name == "2xH100"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert detect_node(False).name == "1xH100"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(NodeError, match="hides every GPU"):
        detect_node(False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA GB10, [N/A]'\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert detect_node(False).name == "1xGB10"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA L4, 23034'\n")
    for visible, order in ((None, None), ("0", None), ("0,1", "PCI_BUS_ID")):
        for variable, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
            monkeypatch.delenv(variable, raising=False) if value is None else monkeypatch.setenv(variable, value)
        with pytest.raises(NodeError, match=r"GPUs differ.*CUDA_DEVICE_ORDER=PCI_BUS_ID"):
            detect_node(False)
    for visible, found in (("0", "H100"), ("1", "NVIDIA L4")):  # what the refusal advises
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert detect_node(False).name == f"1x{found}"


def test_gpus_by_their_nvidia_smi_names() -> None:
    boards = {
        ("NVIDIA H100 80GB HBM3", 81559): "H100",
        ("NVIDIA H100 PCIe", 81559): "H100PCIe",
        ("NVIDIA H100 NVL", 95830): "H100NVL",
        ("NVIDIA H200", 143771): "H200",
        ("NVIDIA H200 NVL", 143771): "H200NVL",
        ("NVIDIA B200", 183359): "B200",
        ("NVIDIA A100-SXM4-80GB", 81920): "A100",
        ("NVIDIA A100 80GB PCIe", 81920): "A100PCIe",
        ("NVIDIA A100-SXM4-40GB", 40960): "A100SXM40GB",
        ("A100-SXM4-40GB", 40536): "A100SXM40GB",  # drivers before 470
        ("NVIDIA A100-PCIE-40GB", 40960): "A100PCIe40GB",
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887): "RTXPRO6000",
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887): "RTXPRO6000",
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887): "RTXPRO6000Server",
    }
    assert {(name, mib): gpu_called(name, mib).name for name, mib in boards} == boards
    # By NVIDIA's datasheets. Those of PCIe boards and of the Server Edition are lower than those of the boards that their names begin with.
    bandwidths = {
        "A100": 2039,
        "A100PCIe": 1935,
        "A100SXM40GB": 1555,
        "A100PCIe40GB": 1555,
        "RTXPRO6000Server": 1597,
        "RTXPRO6000": 1792,
    }
    assert all(
        abs(GPUS[name.lower()].bandwidth / 1e9 / gigabytes - 1) < 0.005 for name, gigabytes in bandwidths.items()
    )
    for name, mib in (
        ("NVIDIA GH200 144G HBM3e", 146831),  # about an H200's memory, another board
        ("NVIDIA GH200 480GB", 97871),
        ("NVIDIA GB200", 189471),
        ("NVIDIA H200", 97871),  # a part of one
        ("NVIDIA H100 80GB HBM2e", 81559),
        ("NVIDIA H100 CNX", 81559),
        ("NVIDIA H100-SXM-64GB", 65247),
        ("NVIDIA H20", 97871),
        ("NVIDIA H800", 81559),
        ("NVIDIA A800-SXM4-80GB", 81920),
        ("NVIDIA A100-SXM-64GB", 65536),
        ("NVIDIA A100X", 81920),
        ("NVIDIA A40", 46068),
        ("NVIDIA L40", 46068),
        ("NVIDIA RTX 6000 Ada Generation", 49140),
    ):
        other = gpu_called(name, mib)
        assert (other.name, other.bandwidth, other.chip) == (name, 0, "")
    other = gpu_called("NVIDIA L40S", 46068)
    assert gpu_called("NVIDIA GB10", None).name == "GB10"
    with pytest.raises(NodeError, match="does not tell the memory of NVIDIA L40S"):
        gpu_called("NVIDIA L40S", None)
    assert other.name == "NVIDIA L40S" and 0.99 * 46068 * 2**20 < other.total_bytes < 46068 * 2**20


def test_an_engine_that_is_not_installed() -> None:
    with pytest.raises(EngineMissing, match="has no sglang"):
        engine_named("sglang").find(sys.executable)
    with pytest.raises(EngineMissing, match="does not run"):
        VLLM.find("/nowhere/python")
    with pytest.raises(OptionError, match="no engine 'x': choose one of vllm, sglang"):
        engine_named("x")


def test_the_engine_gets_m3quant_alone_and_the_folder_goes() -> None:
    launch = launched(fit_on(M2, "1xH200"), ServeRecipe(), NEW)
    with importable(replace(NEW, has_m3quant=False), launch) as env:
        folder = Path(env["PYTHONPATH"].split(":")[0])
        assert [path.name for path in folder.iterdir()] == ["m3quant"]
        code = "import m3quant.runtime.hardware as h, sys; assert 'torch' not in sys.modules; print(h.__file__)"
        done = subprocess.run(
            [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {code}"],
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith(str(folder)), done.stderr
    assert not folder.exists()


# --- what the engine says ---

LOG = """INFO Initializing a V1 LLM engine (v0.32.0) with config: tensor_parallel_size=1, pipeline_parallel_size=1, kv_cache_dtype=auto
INFO Model loading took {weights:.2f} GiB memory and 3.0 seconds
INFO Available KV cache memory: {kv:.2f} GiB
INFO GPU KV cache size: {tokens:,} tokens, Maximum concurrency for 8,192 tokens per request: {concurrency:.2f}x
"""


def log_of(fit: Fit, share: float) -> str:
    """A start-up log of an engine whose pool is `share` of the promise."""
    rank = fit.prediction.ranks[0]
    tokens = int(share * fit.pool.engine_tokens(8192))
    kv = tokens * rank.bytes_per_token / GIB
    return LOG.format(weights=rank.weight_bytes / GIB, kv=kv, tokens=tokens, concurrency=tokens / 8192)


def test_a_pool_five_percent_below_the_plan_is_refused() -> None:
    prepared = decide(M2, node="1xH200")
    assert compare(prepared, log_of(prepared.fit, 0.96)).log.version == "0.32.0"
    with pytest.raises(ServeError, match=r"7% fewer than .* planned, and was stopped"):
        compare(prepared, log_of(prepared.fit, 0.93))
    with pytest.raises(ServeError, match="no KV cache size"):
        compare(prepared, "hello")


def test_pins_are_kept_by_what_changes_the_measurement(tmp_path: Path) -> None:
    fit = fit_on(M2, "1xH200")
    key = pin_key(fit, "0.33.0", ["--max-model-len", "8192"])
    assert read_pin(key, tmp_path) is None
    write_pin(key, 123, fit, tmp_path)
    assert read_pin(key, tmp_path) == 123
    for damaged in (
        b"[" * 50_000,
        b'{"kv_cache_memory_bytes": true}',
        b'{"kv_cache_memory_bytes": 1' + b" " * 70_000 + b"}",
        b"\xff",
        b"[1]",
    ):
        (tmp_path / f"{key}.json").write_bytes(damaged)
        assert read_pin(key, tmp_path) is None
    (tmp_path / f"{key}.json").unlink()
    os.mkfifo(tmp_path / f"{key}.json")  # reading it would wait for a writer
    assert read_pin(key, tmp_path) is None
    (tmp_path / f"{key}.json").unlink()
    assert (
        key
        != pin_key(fit, "0.32.0", ["--max-model-len", "8192"])
        != pin_key(fit, "0.33.0", ["--max-model-len", "4096"])
    )
    (tmp_path / f"{key}.json").write_text("{")
    assert read_pin(key, tmp_path) is None
    log = parse_log(
        "Available KV cache memory: 10.0 GiB\nReplace with `--kv-cache-memory=10500000000` (9.78 GiB) to fit into requested memory"
    )
    assert pinned_bytes(log) == 10500000000
    assert pinned_bytes(parse_log("Available KV cache memory: 10.0 GiB")) is None


def test_a_pin_is_for_one_set_of_the_recipes_own_arguments() -> None:
    """A draft model, for one, takes memory that the pinned cache would not leave."""
    plain, drafting = (decide(M2, node="1xH200", extra=extra) for extra in ([], ["--speculative-config", "{}"]))
    assert plain.pin_key != drafting.pin_key


@pytest.mark.parametrize(
    ("log", "part"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "ran out of memory"),
        ("OSError: [Errno 98] Address already in use", "port is in use"),
        ("RuntimeError: No CUDA GPUs are available", "finds no GPU"),
        ("ValueError: No available memory for the cache blocks. Try increasing", "no memory for the KV cache"),
        ("ValueError: To serve at least one request with the model's max seq len (196608), (23.25 GiB KV cache is needed, which is larger than the "
         "available KV cache memory (22.5 GiB). Based on the available memory, the estimated maximum model length is 190272.", "190,272 tokens would fit"),
        ("ValueError: Free memory on device cuda:0 (10.5/139.81 GiB) on startup is less than desired GPU memory utilization (0.92, 128.6 GiB).",
         "only 10.5 of 139.81 GiB"),
        ("KeyError: 'model.layers.0.block_sparse_moe.experts.w13_weight_packed'", "run m3quant verify"),
        ("vllm: error: unrecognized arguments: --watermark 0.02", "does not know the arguments --watermark 0.02"),
        ("Traceback (most recent call last):\n  File \"x\", line 1\nValueError: the reason itself", "ValueError: the reason itself"),
        ("", "it said nothing"),
    ],
)  # fmt: skip
def test_failures_are_named(log: str, part: str) -> None:
    found = VLLM.reason(log)
    assert part in found and "\n" not in found and "Traceback" not in found


# --- the process ---


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield int(probe.getsockname()[1])


def test_a_port_in_use_is_met_before_loading(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OptionError, match="choose another --port"):
            check_port("127.0.0.1", taken.getsockname()[1])


SERVER = """
import http.server, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("port", server.server_port, flush=True)
signal.signal(signal.SIGTERM, (lambda *a: sys.exit(0)) if sys.argv[1] == "polite" else signal.SIG_IGN)
server.serve_forever()
"""


def run_server(kind: str, tmp_path: Path) -> tuple[EngineProcess, int, int]:
    process = EngineProcess([sys.executable, "-u", "-c", SERVER, kind], {}, tmp_path / "log", None, VLLM.reason)
    deadline = time.monotonic() + 30
    while "port" not in process.text and time.monotonic() < deadline:
        time.sleep(0.02)
    words = process.text.split()
    return process, int(words[words.index("port") + 1]), int(words[words.index("child") + 1])


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(("kind", "code"), [("polite", 0), ("deaf", -signal.SIGKILL)])
def test_an_engine_and_its_workers_end(kind: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3quant.runtime.launch.KILL_GRACE_S", 0.3)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # an office's, which knows nothing of this machine
    process, port, child = run_server(kind, tmp_path)
    assert process.wait_ready(f"http://127.0.0.1:{port}/health", 30, threading.Event())
    assert process.stop(30 if code == 0 else 0.1) == code
    deadline = time.monotonic() + 10
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(child) and "port" in (tmp_path / "log").read_text()


def test_an_engine_that_ends_or_stalls_is_reported(tmp_path: Path) -> None:
    ended = EngineProcess(
        [sys.executable, "-c", "print('ValueError: No available memory for the cache blocks'); raise SystemExit(3)"],
        {},
        tmp_path / "a",
        None,
        VLLM.reason,
    )
    with pytest.raises(ServeError, match="exit code 3 before it was ready: weights and overhead"):
        ended.wait_ready("http://127.0.0.1:9/health", 30, threading.Event())
    stalled = EngineProcess(
        [sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "b", None, VLLM.reason
    )
    with pytest.raises(ServeError, match="not ready after 0 s"):
        stalled.wait_ready("http://127.0.0.1:9/health", 0.2, threading.Event())
    stopped = threading.Event()
    stopped.set()
    assert stalled.wait_ready("http://127.0.0.1:9/health", 30, stopped) is False
    stalled.stop(0)
    with pytest.raises(ServeError, match="cannot be started"):
        EngineProcess(["/nowhere/engine"], {}, tmp_path / "c", None, VLLM.reason)


def closed(line: str) -> None:
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_an_engine_is_read_on_though_its_words_have_nowhere_to_go(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else its pipe fills up, and it waits."""
    monkeypatch.setattr("m3quant.runtime.launch.KEPT_LINES", 100)
    talk = "for number in range(20_000): print('line', number)"
    process = EngineProcess([sys.executable, "-c", talk], {}, Path("/dev/full"), closed, VLLM.reason)
    process.process.wait(timeout=30)
    assert process.stop(0) == 0
    assert process.text.endswith("line 19999\n") and 100 <= process.text.count("\n") <= 200
    said = capfd.readouterr().err
    assert said.count("the log /dev/full ends here: No space left") == said.count("shown no more: Broken pipe") == 1


# --- the command line ---


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["serve", *arguments])


def test_a_dry_run_prints_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M3QUANT_ENGINE_PYTHON", raising=False)
    done = invoke(str(M3), "--dry-run", "--recipe", "serve-2xh100", "--context", "4096", "--no-guard")
    assert done.exit_code == 0, done.output
    assert "vllm serve" in done.output and "--max-model-len 4096" in done.output and "--middleware" not in done.output
    anywhere = invoke(str(M3), "--dry-run")
    assert anywhere.exit_code == 0 and "this is the command for 1xH200" in anywhere.output
    decided = json.loads(invoke(str(M3), "--dry-run", "--on", "1xH200", "--json").stdout)
    assert decided["event"] == "decided" and decided["node"] == "1xH200" and decided["command"][:2] == ["vllm", "serve"]


def test_files_for_other_managers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M3QUANT_ENGINE_PYTHON", raising=False)
    monkeypatch.setattr(
        sys, "argv", ["m3quant", "serve", str(M3), "--on", "1xH200", "--write-systemd", "u", "--api-key-env", "K"]
    )
    compose, unit = tmp_path / "compose.yaml", tmp_path / "m3quant.service"
    done = invoke(
        str(M3), "--on", "1xH200", "--api-key-env", "K", "--write-compose", str(compose), "--write-systemd", str(unit)
    )
    assert done.exit_code == 0, done.output
    service = yaml.safe_load(compose.read_text())["services"]["m3quant"]
    assert service["command"][0] == service["volumes"][0]["source"] == str(M3.resolve())
    assert (
        service["environment"]["VLLM_API_KEY"] == "${K:?}"
        and service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 1
    )
    text = unit.read_text()
    line = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert f"WorkingDirectory={Path.cwd()}\n" in text  # what was given as a relative path is found from there
    assert "--write-systemd" not in line and "-m m3quant serve" in line and "TimeoutStopSec=90" in text and "K=" in text


def test_files_for_other_managers_hold_names_as_they_are(tmp_path: Path) -> None:
    """Both managers replace what looks like a variable, systemd also its specifiers."""
    folder = tmp_path / "a$b%n"
    shutil.copytree(M2, folder)
    prepared = decide(folder, node="1xH200", served_name="x$y")
    command = prepared.launch.command[2:]
    text = compose_file(
        command, {"V": "1$2"}, frozenset(), prepared.fit, prepared.recipe, "vllm/vllm-openai:v0.33.0", None
    )
    service = yaml.safe_load(text)["services"]["m3quant"]
    assert service["volumes"][0]["target"] == service["command"][0] == f"{tmp_path.resolve()}/a$$b%n"
    assert service["environment"]["V"] == "1$$2" and "x$$y" in service["command"]
    unit = systemd_unit(["m3quant", "serve", str(folder)], prepared.fit, prepared.recipe, None, {})
    assert '/a$$b%%n"\n' in unit and "/a$b%%n on 1xH200\n" in unit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--on", "2xH900", "--dry-run"), "did you mean"),
        (("--on", "1xH200", "--api-key-env", "M3QUANT_UNSET_VARIABLE"), "this variable is not set"),
        (("--on", "1xH200", "--context", "9000", "--dry-run"), "does not fit"),
        (("--on", "1xH200", "--engine-python", "/nowhere/python"), "does not run"),
        (("--on", "cpu", "--write-compose", "x"), "--write-compose is for releases of vLLM on GPUs"),
    ],
)
def test_refusals_are_one_sentence(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M3QUANT_ENGINE_PYTHON", raising=False)
    done = invoke(str(M3), *arguments)
    assert (
        isinstance(done.exception, M3QuantError) and message in str(done.exception) and "\n" not in str(done.exception)
    )


def test_serve_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'transformers'): sys.modules[name] = None\n"
        "from m3quant.cli import cli\n"
        f"sys.exit(cli(['serve', {str(M2)!r}, '--on', '1xH200', '--dry-run', '--no-guard'], standalone_mode=False))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr


def test_the_reasoning_parser_needs_its_markers(tmp_path: Path) -> None:
    folder = tmp_path / "m3"
    shutil.copytree(M3, folder)
    plain = decide(folder, node="1xH200").launch
    assert "--reasoning-parser" not in plain.command and any("<mm:think>" in note for note in plain.notes)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [{"id": 10**6, "content": "<mm:think>"}, {"id": 10**6 + 1, "content": "</mm:think>"}]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    marked = decide(folder, node="1xH200").launch
    assert "--reasoning-parser minimax_m3" in " ".join(marked.command) and not any(
        "mm:think" in note for note in marked.notes
    )
