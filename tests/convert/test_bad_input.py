"""Bad input through the real command: one sentence with file, tensor and remedy, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m3quant import cli
from tests.support.convert.common import (
    FEW,
    add_tokenizer,
    bits,
    config_of,
    files,
    make_plan_of,
    make_source,
    rewrite,
    stored,
)

Run = Callable[..., tuple[int, str, str]]
SHORT = ("--windows", str(FEW["windows"]), "--window-length", str(FEW["window_length"]), "--device", "cpu")


@pytest.fixture
def m3quant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program in this process: (exit code, stdout, stderr). Anything but a clean exit fails the test."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["m3quant", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    return {family: add_tokenizer(make_source(folder / family, family)) for family in ("m2", "m3")}


def refused(result: tuple[int, str, str], *words: str, code: int = 2) -> str:
    """Assert one refusal line on stderr with these words in it, and no word on stdout."""
    status, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("m3quant: ")]
    assert (status, out, len(lines)) == (code, "", 1), (status, out, err)
    missing = [word for word in words if word not in lines[0]]
    assert not missing, (missing, lines[0])
    return lines[0]


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    tensors = stored(source)
    change(tensors)
    return add_tokenizer(rewrite(folder, tensors, {**config_of(source), **config}))


def poison(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return change


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [
    EXPERT, "model.layers.1.self_attn.k_proj.weight", "model.layers.1.block_sparse_moe.gate.weight",
    "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight",
])  # fmt: skip
def test_a_weight_that_is_not_finite_is_refused_and_what_was_written_stays(
    m3quant: Run, made: dict[str, Path], tmp_path: Path, name: str, value: float
) -> None:
    source, out = changed(made["m2"], tmp_path / "src", poison(name, value)), tmp_path / "out"
    refused(m3quant("convert", source, out, "--to", "int4"), name)
    assert not (out / "config.json").exists() and not [n for n in files(out) if n.endswith(".tmp")]
    if ".1." in name:
        whole = tmp_path / "whole"
        assert m3quant("convert", made["m2"], whole, "--to", "int4")[0] == 0
        first = "model-00001-of-00003.safetensors"
        assert (out / first).read_bytes() == (whole / first).read_bytes()


@pytest.mark.parametrize("name", [EXPERT, "model.layers.1.self_attn.k_proj.weight", "model.layers.1.block_sparse_moe.gate.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"])  # fmt: skip
def test_a_calibrated_run_refuses_weights_that_are_not_finite(
    m3quant: Run, made: dict[str, Path], tmp_path: Path, name: str
) -> None:
    source, out = changed(made["m2"], tmp_path / "src", poison(name, float("nan"))), tmp_path / "out"
    refused(
        m3quant("convert", source, out, *SHORT), name.removeprefix("model.layers.1.").removeprefix("model.layers.0.")
    )
    assert not (out / "config.json").exists() and not [n for n in files(out) if n.endswith(".tmp")]


BIAS = "model.layers.0.block_sparse_moe.e_score_correction_bias"


@pytest.mark.parametrize("to", ["int4", "awq"])
def test_an_expert_may_be_switched_off_by_minus_infinity(
    m3quant: Run, made: dict[str, Path], tmp_path: Path, to: str
) -> None:
    source, out = changed(made["m2"], tmp_path / "src", poison(BIAS, float("-inf"))), tmp_path / "out"
    code, _, said = m3quant("convert", source, out, *(("--to", "int4") if to == "int4" else SHORT))
    assert code == 0 and said.count("switched off by a routing bias of -inf (layer 0: 1)") == 1, said
    assert bits(stored(out)[BIAS]) == bits(stored(source)[BIAS])
    assert m3quant("verify", out, "--source", source)[0] == 0


def test_a_bias_that_leaves_too_few_experts_or_is_no_number_is_refused(
    m3quant: Run, made: dict[str, Path], tmp_path: Path
) -> None:
    def few(tensors: dict[str, torch.Tensor]) -> None:
        tensors[BIAS] = torch.full_like(tensors[BIAS], float("-inf"))
        tensors[BIAS][0] = 0.0

    source = changed(made["m2"], tmp_path / "few", few)
    refused(m3quant("convert", source, tmp_path / "out", "--to", "int4"), BIAS, "is -inf for 3 of 4 experts", "needs 2")
    for number, value in enumerate((float("nan"), float("inf"))):
        source = changed(made["m2"], tmp_path / f"src{number}", poison(BIAS, value))
        out = tmp_path / f"out{number}"
        refused(m3quant("convert", source, out, "--to", "int4"), "e_score_correction_bias", "not finite")


def test_a_group_that_does_not_divide(m3quant: Run, made: dict[str, Path], tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", "m2", intermediate_size=96)
    refused(
        m3quant("convert", source, tmp_path / "out", "--to", "int4"),
        "experts.0.w2.weight",
        "96",
        "--set routed_experts=",
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours(m3quant: Run, made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    refused(m3quant("convert", made["m2"], out, "--to", "int4"), "thesis.tex", "choose another folder")
    assert files(out) == {"thesis.tex": b"years of work"}
    refused(m3quant("convert", made["m2"], out / "thesis.tex", "--to", "int4"), "is a file")
    refused(m3quant("convert", made["m2"], out / "thesis.tex" / "deep", "--to", "int4"), "cannot be created")


def test_source_and_output_inside_one_another(m3quant: Run, made: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "a" / "src"
    shutil.copytree(made["m2"], source)
    before = files(tmp_path)
    for out in (source / "out", source, tmp_path / "a", source / ".." / "src" / "x"):
        refused(m3quant("convert", source, out, "--to", "int4"), "lie inside one another")
    (tmp_path / "link").symlink_to(source)
    refused(m3quant("convert", source, tmp_path / "link" / "out", "--to", "int4"), "lie inside one another")
    assert files(tmp_path) == before | files(tmp_path)
    assert {n for n in files(tmp_path) if not n.startswith("link")} == set(before)


def test_too_little_calibration_text(m3quant: Run, made: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("only a few words")
    line = refused(m3quant("convert", made["m2"], tmp_path / "out", "--calibration", text, "--device", "cpu"))
    assert "tokens" in line and "windows" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "words"), [
    ("schemes: {routed_exprts: int4-g128}", ["routed_exprts", "did you mean 'routed_experts'"]),
    ("schemes: {routed_experts: int4-g100}", ["int4-g100", "did you mean 'int4-g"]),
    ("schemes: {router: int4-g128}", ["router", "float32", "Leave it out"]),
    ("schemes: {routed_experts: 4}", ["schemes.routed_experts"]),
    ("schemes: [routed_experts]", ["'schemes'", "routed_experts: int4-g128"]),
    ("schems: {routed_experts: int4-g128}", ["schems", "did you mean 'schemes'"]),
    ("awq: {n_gird: 3}", ["awq.n_gird", "did you mean 'n_grid'"]),
    ("data: {windows: 0}", ["data.windows", "must be at least 1"]),
    ("calibration: gptq", ["calibration", "'awq'"]),
    ("format: gguf", ["format", "compressed-tensors"]),
    ("name: nothing", ["quantizes nothing", "--set routed_experts=int4-g128"]),
    ("calibration: awq\nschemes: {routed_experts: fp8-channel}", ["integers", "--to fp8"]),
    ("- a list", ["no mapping"]),
    ("a: [unclosed", ["not YAML", "line 1"]),
    ("", ["no mapping"]),
])  # fmt: skip
def test_a_recipe_that_is_wrong(
    m3quant: Run, made: dict[str, Path], tmp_path: Path, text: str, words: list[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    refused(m3quant("convert", made["m3"], tmp_path / "out", "--recipe", recipe), *words)
    refused(m3quant("plan", made["m3"], "--recipe", recipe), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "words"), [
    (["--to", "awk"], ["no recipe called 'awk'", "did you mean --to awq"]),
    (["--recipe", "absent.yaml"], ["absent.yaml", "does not exist", "--to"]),
    (["--to", "int4", "--set", "routed_experts"], ["role=scheme"]),
    (["--to", "int4", "--set", "expert=int4-g32"], ["expert", "did you mean 'routed_experts'"]),
    (["--to", "int4", "--set", "attention=int4g32"], ["int4g32", "did you mean 'int4-g32'"]),
    (["--to", "int4", "--format", "autoawq"], ["autoawq", "int4 only", "--set"]),
    (["--to", "fp8", "--format", "fp8"], ["128x128", "fp8-block"]),
    (["--to", "int4", "--set", "indexer=keep"], ["self_attn.qkv_proj", "index_q", "one scheme"]),
])  # fmt: skip
def test_options_that_are_wrong(
    m3quant: Run, made: dict[str, Path], tmp_path: Path, options: list[str], words: list[str]
) -> None:
    refused(m3quant("convert", made["m3"], tmp_path / "out", *options), *words)
    refused(m3quant("plan", made["m3"], *options), *words)


@pytest.mark.parametrize(("options", "words"), [
    (["--to", "awq", "--recipe", "x.yaml"], ["--to and --recipe", "one recipe"]),
    (["--to", "int4", "--windows", "4"], ["uses no calibration data", "--to awq"]),
    (["--to", "fp8", "--calibration", "x.txt"], ["uses no calibration data"]),
    (["--to", "int4", "--strict-coverage"], ["uses no calibration data"]),
    (["--to", "int4", "--device", "gpu"], ["--device gpu", "cpu, cuda"]),
    (["--to", "int4", "--device", "meta"], ["--device meta", "cpu, cuda"]),
    (["--to", "int4", "--device", "cuda:99"], ["--device cuda:99", "GPU"]),
])  # fmt: skip
def test_run_options_that_are_wrong(
    m3quant: Run, made: dict[str, Path], tmp_path: Path, options: list[str], words: list[str]
) -> None:
    refused(m3quant("convert", made["m2"], tmp_path / "out", *options), *words)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there(m3quant: Run, tmp_path: Path) -> None:
    refused(m3quant("convert", tmp_path / "absent", tmp_path / "out"), "There is no folder", "absent")
    (tmp_path / "empty").mkdir()
    refused(m3quant("convert", tmp_path / "empty", tmp_path / "out"), "no config.json")
    refused(m3quant("verify", tmp_path / "absent"), "no folder", "convert")
    refused(m3quant("verify", tmp_path / "empty"), "m3quant.json")


def test_a_missing_tokenizer(m3quant: Run, tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", "m2")
    refused(m3quant("convert", source, tmp_path / "out", *SHORT), "no tokenizer", "--to int4")
    assert not (tmp_path / "out").exists()


def drop(*parts: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if any(part in n for part in parts)]:
            del tensors[name]

    return change


@pytest.mark.parametrize("part", ["layers.1.block_sparse_moe.experts.3.w2", "layers.1.self_attn.index_k_proj", "vision_model.encoder.layers.1.mlp.fc1.bias", "patch_merge_mlp.linear_1", "lm_head", "shared_experts.up_proj", "e_score_correction_bias"])  # fmt: skip
def test_a_missing_tensor(m3quant: Run, made: dict[str, Path], tmp_path: Path, part: str) -> None:
    source = changed(made["m3"], tmp_path / "src", drop(part))
    line = refused(m3quant("convert", source, tmp_path / "out", "--to", "int4"), part, "fetch the missing shards")
    assert str(source) in line and not (tmp_path / "out").exists()


def test_a_router_that_was_rounded_is_one_note_a_role_and_dtype(made: dict[str, Path], tmp_path: Path) -> None:
    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(("gate.weight", "e_score_correction_bias")):
                tensors[name] = tensors[name].bfloat16()

    notes = make_plan_of(changed(made["m2"], tmp_path / "src", rounded), "int4").notes
    assert [note.split(":")[0] for note in notes] == [
        "2 router tensors (first model.layers.0.block_sparse_moe.gate.weight)",
        "2 router_bias tensors (first model.layers.0.block_sparse_moe.e_score_correction_bias)",
    ]
    assert all("stored as BF16, in the official releases as F32; copied as stored" in note for note in notes)


def test_a_text_only_copy_is_a_note(m3quant: Run, made: dict[str, Path], tmp_path: Path) -> None:
    gone = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")
    source = changed(made["m3"], tmp_path / "src", drop(*gone))
    status, out, _ = m3quant("plan", source, "--to", "int4")
    assert status == 0 and "note: the source has no vision tensors" in out and "text-only" in out
    assert m3quant("convert", source, tmp_path / "out", "--to", "int4")[0] == 0
    assert m3quant("verify", tmp_path / "out", "--source", source)[0] == 0


@pytest.mark.parametrize(("config", "words"), [
    ({"vocab_size": 513}, ["embed_tokens.weight", "[512, 256]", "[513, 256]"]),
    ({"num_hidden_layers": 3}, ["attn_type_list", "an entry for each layer"]),
    ({"num_hidden_layers": 3, "attn_type_list": [1, 1, 1]}, ["lacks", "model.layers.2."]),
    ({"num_local_experts": 5}, ["experts.4.w1.weight"]),
    ({"hidden_size": None}, ["hidden_size"]),
    ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, ["mamba", "write a file in m3quant/families"]),
    ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["which this architecture does not"]),
    ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "MiniMaxM2ForCausalLM"]),
    ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "quantized already"]),
])  # fmt: skip
def test_a_config_that_does_not_fit_the_weights(
    m3quant: Run, made: dict[str, Path], tmp_path: Path, config: dict[str, Any], words: list[str]
) -> None:
    source = changed(made["m2"], tmp_path / "src", lambda t: None, **config)
    refused(m3quant("convert", source, tmp_path / "out", "--to", "int4"), *words)
    refused(m3quant("plan", source), *words)
    assert not (tmp_path / "out").exists()


def test_a_truncated_shard(m3quant: Run, made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["m2"], tmp_path / "src")
    shard = tmp_path / "src" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(m3quant("convert", tmp_path / "src", tmp_path / "out", "--to", "int4"), str(shard), "truncated")
    assert not (tmp_path / "out").exists()


def begin(m3quant: Run, monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, *options: object) -> dict[str, bytes]:
    """A conversion that a signal stopped in the second unit."""
    from m3quant.running import stopping

    seen: list[int] = []

    def check(self: stopping.StopFlag) -> None:
        seen.append(1)
        if (out / ".m3quant" / "units.jsonl").exists():
            raise stopping.InterruptedRun(2, "stopped by SIGINT")

    with monkeypatch.context() as patch:
        patch.setattr(stopping.StopFlag, "check", check)
        assert m3quant("convert", source, out, *options)[0] == 130
    return files(out)


def test_a_resume_with_something_else_is_refused_by_name(
    m3quant: Run, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begun = begin(m3quant, monkeypatch, made["m2"], out, "--to", "awq-fp8", *SHORT)
    other = changed(made["m2"], tmp_path / "other", poison(EXPERT, 0.5), rms_norm_eps=1e-5)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i) % 23) for i in range(4000)))
    refused(
        m3quant("convert", made["m2"], out, "--to", "awq-g32", *SHORT),
        "recipe.schemes.routed_experts was 'int4-g128', now 'int4-g32'",
        "int4-g32",
        "another folder",
    )
    refused(
        m3quant("convert", made["m2"], out, "--to", "int4"),
        "recipe.calibration was 'text', now 'none'",
    )
    refused(m3quant("convert", other, out, "--to", "awq-fp8", *SHORT), "another source")
    refused(m3quant("convert", made["m2"], out, "--to", "awq-fp8", *SHORT, "--calibration", text), "calibration was")
    refused(
        m3quant("convert", made["m2"], out, "--to", "awq-fp8", "--windows", 3, *SHORT[2:]),
        "recipe.data.windows was",
        "now 3)",
    )
    with monkeypatch.context() as patch:
        patch.setattr("m3quant.convert.conversion.__version__", "99.0")
        refused(m3quant("convert", made["m2"], out, "--to", "awq-fp8", *SHORT), "version was", "99.0")
    assert files(out) == begun
    assert m3quant("convert", made["m2"], out, "--to", "awq-fp8", *SHORT)[0] == 0
    # A finished one is protected as well, and of the recipe only what differs is named.
    said = refused(
        m3quant("convert", made["m2"], out, "--to", "int4"),
        "complete and was made with other settings",
        "recipe.name was 'awq-fp8', now 'int4'",
    )
    assert "schemes" not in said and "device" not in said and "continue" not in said


@pytest.mark.parametrize("text", [b"5\n", b"{}\n", b'{"unit": "x"}\n', b"[]\n", b"\xff\n", b"{\n"])
@pytest.mark.parametrize("name", ["units.jsonl", "job.json", "m3quant.json"])
def test_damaged_records_are_named(
    m3quant: Run, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: bytes
) -> None:
    out = tmp_path / "out"
    if name == "m3quant.json":
        assert m3quant("convert", made["m2"], out, "--to", "int4")[0] == 0
        path = out / name
    else:
        begin(m3quant, monkeypatch, made["m2"], out, "--to", "int4")
        path = out / ".m3quant" / name
    path.write_bytes(text)
    said = refused(m3quant("convert", made["m2"], out, "--to", "int4"), str(out))
    assert f"{path} is damaged" in said


@pytest.mark.parametrize("left", [None, 100])
def test_hidden_states_that_are_not_what_was_saved_say_what_to_remove(tmp_path: Path, left: int | None) -> None:
    from m3quant.calibration.boundary import Streams
    from m3quant.errors import CalibrationError

    if left is not None:
        (tmp_path / "boundary-00001-source.states").write_bytes(bytes(left))
    with pytest.raises(CalibrationError, match=r"cannot go on from its last layer; remove the output and start again"):
        Streams.restored(tmp_path / "boundary-00001", (2, 3, 4), torch.float32, torch.device("cpu"), None)


def test_strict_coverage_holds_for_layers_that_are_finished(
    m3quant: Run, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 tokens to 2 of 4 experts each: some expert has fewer than 60 of them."""
    from m3quant.running import stopping

    out, asked = tmp_path / "out", ("--to", "awq", *SHORT, "--min-expert-tokens", 60)

    def check(self: stopping.StopFlag) -> None:
        units = out / ".m3quant" / "units.jsonl"
        if units.exists() and '"ledger": {' in units.read_text():
            raise stopping.InterruptedRun(2, "stopped by SIGINT")

    with monkeypatch.context() as patch:
        patch.setattr(stopping.StopFlag, "check", check)
        assert m3quant("convert", made["m2"], out, *asked)[0] == 130
    refused(m3quant("convert", made["m2"], out, *asked, "--strict-coverage"), "topped up (layer ")
    assert m3quant("convert", made["m2"], out, *asked)[0] == 0
    refused(m3quant("convert", made["m2"], out, *asked, "--strict-coverage"), "finished layers", "--strict-coverage")
    assert m3quant("convert", made["m2"], out, *asked)[0] == 0


def test_json_is_json(m3quant: Run, made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments in (
        ["plan", made["m3"]], ["plan", made["m3"], "--to", "awq"], ["convert", made["m3"], out, "--dry-run"],
        ["convert", made["m3"], out, *SHORT], ["convert", made["m3"], out, *SHORT], ["verify", out, "--source", made["m3"]],
    ):  # fmt: skip
        status, text, _ = m3quant(*arguments, "--json")
        assert status == 0
        assert isinstance(json.loads(text), dict), arguments
    assert json.loads(m3quant("verify", out, "--json")[1])["holds"] is True


def test_plan_for_people_names_what_is_kept_and_why(m3quant: Run, made: dict[str, Path]) -> None:
    status, text, _ = m3quant("plan", made["m3"], "--to", "awq")
    assert status == 0
    for words in ("router: copy, because", "vision: copy", "free disk", "bits per quantized weight"):
        assert words in text
