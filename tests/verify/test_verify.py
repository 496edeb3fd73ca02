"""verify passes what convert wrote, and fails every tampering with the tensor's name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from m3quant.checkpoint import Checkpoint
from m3quant.cli import cli
from m3quant.errors import M3QuantError
from tests.support.convert.common import (
    config_of,
    make_plan_of,
    make_source,
    rewrite,
    run_convert,
    served_format,
    stored,
)
from tests.support.convert.sources import quantized_source
from tests.support.convert.tampering import edit_unsampled

Tensors = dict[str, torch.Tensor]
M2, M3 = "model.layers.1.", "language_model.model.layers.1."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources m2 and m3, and an awq and an int4 output of each. Their attention is INT4 so that its norm is folded too."""
    folder = tmp_path_factory.mktemp("verify")
    out = {}
    for family in ("m2", "m3"):
        out[family] = with_outliers(make_source(folder / f"{family}-plain", family), folder / family)
        run_convert(out[family], folder / f"{family}-awq", "awq-all-int4", rounding="awq", awq={"n_grid": 6})
        run_convert(out[family], folder / f"{family}-int4", "int4")
        out[f"{family}-awq"], out[f"{family}-int4"] = folder / f"{family}-awq", folder / f"{family}-int4"
    return out


def with_outliers(source: Path, folder: Path) -> Path:
    """The checkpoint with a few channels of every MoE norm made large, so that a scale search has something to find."""
    tensors = stored(source)
    for name in tensors:
        if name.endswith("post_attention_layernorm.weight"):
            tensors[name][:6] = 15.0
    return rewrite(folder, tensors, config_of(source))


def check(output: Path, source: Path | None = None, *options: str) -> tuple[int, str]:
    """Exit code of `m3quant verify` and everything it said."""
    arguments = ["verify", str(output), *(["--source", str(source)] if source else []), *options]
    result: Result = CliRunner().invoke(cli, arguments)
    if isinstance(result.exception, M3QuantError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def digest(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def fix_hashes(output: Path) -> None:
    """Make the manifest agree with the files as they are now, as a careful forger would."""
    path = output / "m3quant.json"
    manifest = json.loads(path.read_text())
    manifest["shards"] = {shard: digest(output / shard) for shard in manifest["shards"]}
    manifest["files"] = {name: digest(output / name)["sha256"] for name in manifest["files"]}
    path.write_text(json.dumps(manifest))


def tamper(output: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of `output` whose tensors went through `change`, index and hashes made to fit."""
    shutil.copytree(output, folder)
    weight_map = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            metadata = file.metadata()
        before = load_file(shard)
        after = dict(before)
        change(after)
        if after.keys() != before.keys() or any(after[name] is not before[name] for name in after):
            save_file({name: tensor.clone() for name, tensor in after.items()}, shard, metadata=metadata)
        weight_map.update(dict.fromkeys(after, shard.name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fix_hashes(folder)
    return folder


@pytest.mark.parametrize("which", ["m2-awq", "m3-awq", "m2-int4", "m3-int4"])
def test_what_convert_wrote_passes(made: dict[str, Path], which: str) -> None:
    status, said = check(made[which], made[which[:2]])
    assert status == 0, said
    assert "verified" in said and "FAIL" not in said and "against the source" in said
    assert check(made[which])[0] == 0
    result = json.loads(check(made[which], made[which[:2]], "--json")[1].split("...\n")[-1])
    assert result["holds"] and len(result["worst"]) == 10
    assert result["sqnr_db_by_scheme"]["int4-g128"]["least"] > 10


@pytest.mark.parametrize("to", ["fp8", "fp8-block", "awq-g32", "awq-attn-bf16"])
def test_other_recipes_pass(made: dict[str, Path], tmp_path: Path, to: str) -> None:
    for family in ("m2", "m3"):
        run_convert(made[family], tmp_path / family, to, format=served_format(family, to, None))
        status, said = check(tmp_path / family, made[family])
        assert status == 0, said


@pytest.mark.parametrize(("family", "kind", "to"), [
    ("m2", "fp8", "fp8-block"), ("m2", "fp8", "awq"), ("m3", "mxfp8", "int4"), ("m3", "mxfp8", "awq-attn-bf16"),
])  # fmt: skip
def test_outputs_of_quantized_sources_pass(
    made: dict[str, Path], tmp_path: Path, family: str, kind: str, to: str
) -> None:
    source, _ = quantized_source(made[family], tmp_path, kind, scales_apart=True)
    run_convert(source, tmp_path / "out", to)
    for status, said in (check(tmp_path / "out", source), check(tmp_path / "out")):
        assert status == 0, said


def test_a_source_that_names_its_quantization_inside_text_config(made: dict[str, Path], tmp_path: Path) -> None:
    """The output must not carry the source's own quantization there: an engine might believe it."""
    source, _ = quantized_source(made["m3"], tmp_path, "mxfp8", scales_apart=False)

    def move(config: dict[str, Any]) -> None:
        config["text_config"]["quantization_config"] = config.pop("quantization_config")

    edit_json(source / "config.json", move)
    run_convert(source, tmp_path / "out", "int4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "quantization_config" not in config["text_config"]
    for status, said in (check(tmp_path / "out", source), check(tmp_path / "out")):
        assert status == 0, said


def test_passed_through_tensors_pass_whatever_they_hold_and_fail_when_changed(
    made: dict[str, Path], tmp_path: Path
) -> None:
    extras = {
        "model.mtp.norm": torch.tensor([float("nan"), 1.0]),
        "model.step": torch.tensor(2**53 + 1),
        f"{M2}self_attn.note": torch.tensor([True, False]),
    }
    source = rewrite(tmp_path / "src", {**stored(made["m2"]), **extras}, config_of(made["m2"]))
    run_convert(source, tmp_path / "out", "awq")
    status, said = check(tmp_path / "out", source)
    assert status == 0, said
    for name, value in (("model.step", torch.tensor(2**53)), (f"{M2}self_attn.note", torch.tensor([True, True]))):
        bad = tamper(tmp_path / "out", tmp_path / name, lambda t, n=name, v=value: t.update({n: v} if n in t else {}))
        status, said = check(bad, source)
        assert status == 1 and f"'{name}'" in said, said


def remove(part: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if part in n]:
            del tensors[name]

    return change


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def set_values(name: str, value: float, where: int | slice = 5) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        if name in tensors:
            changed = tensors[name].clone()
            changed.view(-1)[where] = value
            tensors[name] = changed

    return change


def exchange(left: str, right: str) -> Callable[[Tensors], None]:
    """Swap every tensor of two modules."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if left in n and n.replace(left, right) in tensors]:
            other = name.replace(left, right)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return change


def restore(source: Path, name: str) -> Callable[[Tensors], None]:
    """Put the source's tensor back, as a tool that forgets to compensate a reader would."""

    def change(tensors: Tensors) -> None:
        if name in tensors:
            tensors[name] = stored(source)[name].clone()

    return change


STRUCTURE = [
    ("m3", remove(f"{M3}self_attn.index_q_proj"), rf"tensor '{M3}self_attn.index_q_proj.weight_packed' is missing"),
    ("m3", remove("index_k_norm"), f"tensor '{M3}self_attn.index_k_norm.weight' is missing"),
    (
        "m2",
        rename(".experts.3.", ".experts.03."),
        f"tensor '{M2}block_sparse_moe.experts.3.w1.weight_packed' is missing",
    ),
    ("m2", rename("block_sparse_moe", "mlp"), "block_sparse_moe.e_score_correction_bias' is missing"),
    ("m2", rename("w1.weight_scale", "w1.scale"), "w1.scale' is not in the plan"),
]
VALUES = [
    ("m2", set_values(f"{M2}block_sparse_moe.experts.2.w3.weight_scale", 0.0), "experts.2.w3.weight_scale' holds a zero"),
    ("m2", set_values(f"{M2}block_sparse_moe.experts.2.w3.weight_scale", float("nan")), "experts.2.w3.weight_scale' holds NaN"),
    ("m3", set_values(f"{M3}input_layernorm.weight", float("inf")), "input_layernorm.weight' holds NaN or Inf"),
    ("m3", set_values("language_model.lm_head.weight", float("nan")), "language_model.lm_head.weight' holds NaN"),
]  # fmt: skip
AGAINST_SOURCE = [
    ("m2", exchange(".experts.0.w1.", ".experts.1.w1."), f"tensor '{M2}block_sparse_moe.experts.0.w1.weight' (int4-g128) differs"),
    ("m3", exchange(".experts.0.", ".experts.3."), f"tensor '{M3}block_sparse_moe.experts.3.w2.weight' (int4-g128) differs"),
    ("m3", exchange("gate_proj", "up_proj"), "gate_proj.weight' (int4-g128) differs"),
    ("m2", set_values("model.embed_tokens.weight", 1.0), "'model.embed_tokens.weight' should be a byte-for-byte copy"),
    ("m2", set_values("model.norm.weight", 9.0, slice(None)), "'model.norm.weight' (keep) differs"),
    ("m2", set_values(f"{M2}self_attn.q_norm.weight", 9.0, slice(0, 50)), "self_attn.q_norm.weight' (keep) differs"),
    ("m3", set_values(f"{M3}block_sparse_moe.e_score_correction_bias", 2.0, 0), "e_score_correction_bias' (keep) differs"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change", "sentence"), STRUCTURE + VALUES)
def test_tampering_seen_without_the_source(
    made: dict[str, Path], tmp_path: Path, family: str, change: Callable[[Tensors], None], sentence: str
) -> None:
    bad = tamper(made[f"{family}-awq"], tmp_path / "bad", change)
    for source in (None, made[family]):
        status, said = check(bad, source)
        assert status == 1 and sentence in said, said


@pytest.mark.parametrize(("family", "change", "sentence"), AGAINST_SOURCE)
def test_tampering_seen_against_the_source(
    made: dict[str, Path], tmp_path: Path, family: str, change: Callable[[Tensors], None], sentence: str
) -> None:
    status, said = check(tamper(made[f"{family}-awq"], tmp_path / "bad", change), made[family])
    assert status == 1 and sentence in said, said


def folded(made: dict[str, Path], family: str) -> tuple[str, str]:
    """Prefix of a layer whose mlp norm the awq run folded, and that norm's name."""
    before, after = stored(made[family]), stored(made[f"{family}-awq"])
    for name in before:
        if name.endswith("post_attention_layernorm.weight") and not torch.equal(before[name], after[name]):
            prefix = name.removesuffix("post_attention_layernorm.weight")
            if f"{prefix}block_sparse_moe.gate.weight" in before:
                return prefix, name
    pytest.fail(f"the awq output of {family} folded no MoE norm: the fixture proves nothing")


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_a_router_that_was_not_compensated(made: dict[str, Path], tmp_path: Path, family: str) -> None:
    prefix, _ = folded(made, family)
    name = f"{prefix}block_sparse_moe.gate.weight"
    status, said = check(tamper(made[f"{family}-awq"], tmp_path / "bad", restore(made[family], name)), made[family])
    assert status == 1 and f"tensor '{name}' (keep) differs" in said, said


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_a_norm_put_back(made: dict[str, Path], tmp_path: Path, family: str) -> None:
    """The readers then carry a scale that nothing undoes: the router shows it most sharply."""
    prefix, norm = folded(made, family)
    status, said = check(tamper(made[f"{family}-awq"], tmp_path / "bad", restore(made[family], norm)), made[family])
    assert status == 1 and f"tensor '{prefix}block_sparse_moe.gate.weight' (keep) differs" in said, said


def test_a_norm_replaced(made: dict[str, Path], tmp_path: Path) -> None:
    for which, name in (("m2-awq", "block_sparse_moe."), ("m2-int4", "post_attention_layernorm.weight")):
        bad = tamper(
            made[which], tmp_path / which, set_values(f"{M2}post_attention_layernorm.weight", 0.1, slice(0, 128))
        )
        status, said = check(bad, made["m2"])
        assert status == 1 and f"tensor '{M2}{name}" in said, said


def test_a_down_projection_that_was_not_compensated(made: dict[str, Path], tmp_path: Path) -> None:
    """M2's w3 -> w2 fold: w3's rows are divided by 4, w2 stays as it was."""

    def change(tensors: Tensors) -> None:
        name = f"{M2}block_sparse_moe.experts.1.w3.weight_scale"
        if name in tensors:
            tensors[name] = tensors[name] / 4

    status, said = check(tamper(made["m2-awq"], tmp_path / "bad", change), made["m2"])
    assert status == 1 and f"tensor '{M2}block_sparse_moe.experts.1.w2.weight' (int4-g128) differs" in said, said


def each(name: str, change: Callable[[torch.Tensor], torch.Tensor], *suffixes: str) -> Callable[[Tensors], None]:
    """Put `change` of them in place of the tensors `name` + suffix."""

    def apply(tensors: Tensors) -> None:
        for full in (name + suffix for suffix in suffixes or ("",)):
            if full in tensors:
                tensors[full] = change(tensors[full].clone())

    return apply


def swap_rows(tensor: torch.Tensor) -> torch.Tensor:
    tensor[[3, 4]] = tensor[[4, 3]]
    return tensor


def first_row_times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.cat([tensor[:1] * factor, tensor[1:]])


PACKED = ("weight_packed", "weight_scale")
EXPERT = f"{M2}block_sparse_moe.experts.1."
# Each is too small to move the SQNR of its tensor by as much as honest rounding varies.
HIDDEN_IN_THE_AVERAGE = [
    ("m2-awq", each(f"{EXPERT}w1.", swap_rows, *PACKED), f"tensor '{EXPERT}w1.weight' has"),
    ("m2-awq", each(f"{EXPERT}w3.", swap_rows, *PACKED), f"tensor '{EXPERT}w3.weight' has"),
    ("m2-awq", each(f"{EXPERT}w2.", swap_rows, *PACKED), f"tensor '{EXPERT}w2.weight' has"),
    ("m2-awq", each(f"{EXPERT}w1.weight_scale", first_row_times(-1)), f"tensor '{EXPERT}w1.weight' has"),
    ("m2-awq", each(f"{EXPERT}w3.weight_scale", first_row_times(-1)), f"tensor '{EXPERT}w3.weight' has"),
    ("m2-awq", each(f"{EXPERT}w1.weight_scale", first_row_times(1.5)), f"tensor '{EXPERT}w1.weight' has"),
    ("m2-awq", each(f"{EXPERT}w3.weight_scale", first_row_times(1.5)), f"tensor '{EXPERT}w2.weight' has"),
    ("m2-int4", each(f"{EXPERT}w3.weight_scale", first_row_times(1.5)), f"tensor '{EXPERT}w3.weight' has"),
    ("m2-int4", each(f"{M2}self_attn.o_proj.", swap_rows, "weight", "weight_scale"), "self_attn.o_proj.weight' (fp8-channel) differs"),
    ("m3-awq", each(f"{M3}self_attn.index_k_proj.", swap_rows, *PACKED), "self_attn.index_k_proj.weight' has"),
    ("m2-awq", each(f"{M2}block_sparse_moe.gate.weight", lambda t: t.bfloat16().float()), "gate.weight' is not the source's weight times"),
    ("m3-awq", each(f"{M3}block_sparse_moe.e_score_correction_bias", lambda t: t.bfloat16().float()), "bias' should be a byte-for-byte copy"),
    ("m2-awq", set_values(f"{M2}post_attention_layernorm.weight", 0.0), "post_attention_layernorm.weight' (keep) differs"),
    ("m3-awq", set_values(f"{M3}post_attention_layernorm.weight", -1.0), "post_attention_layernorm.weight' (keep) differs"),
]  # fmt: skip


@pytest.mark.parametrize(("which", "change", "sentence"), HIDDEN_IN_THE_AVERAGE)
def test_what_an_average_hides(
    made: dict[str, Path], tmp_path: Path, which: str, change: Callable[[Tensors], None], sentence: str
) -> None:
    status, said = check(tamper(made[which], tmp_path / "bad", change), made[which[:2]])
    assert status == 1 and sentence in said, said


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_an_integer_reader_that_was_not_compensated(made: dict[str, Path], tmp_path: Path, family: str) -> None:
    """One expert's w1 as a data-free run stores it, behind a folded norm."""
    prefix, _ = folded(made, family)
    module = f"{prefix}block_sparse_moe.experts.2.w1"
    plain = stored(made[f"{family}-int4"])

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(module)]:
            tensors[name] = plain[name].clone()

    status, said = check(tamper(made[f"{family}-awq"], tmp_path / "bad", change), made[family])
    assert status == 1 and f"tensor '{module}.weight'" in said, said


def test_one_flipped_byte(made: dict[str, Path], tmp_path: Path) -> None:
    for position in (-1, -1000, 20_000):
        bad = tmp_path / str(position)
        shutil.copytree(made["m2-awq"], bad)
        shard = bad / "model-00002-of-00003.safetensors"
        data = bytearray(shard.read_bytes())
        data[position] ^= 1
        shard.write_bytes(data)
        status, said = check(bad)
        assert status == 1 and f"{shard.name}: sha256 differs" in said, said


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


CONFIGS = [
    ("m3", lambda c: c["quantization_config"]["config_groups"]["group_0"]["targets"].pop(0), "experts"),
    ("m2", lambda c: c["quantization_config"]["ignore"].append("re:.*self_attn.*"), "ignore has 're:.*self_attn.*', which"),
    ("m2", lambda c: c["quantization_config"]["ignore"].append("re:(([a-z.]+)+)+\\d$x"), "which the recipe does not give"),
    ("m2", lambda c: c["quantization_config"]["ignore"].append("re:("), "which the recipe does not give"),
    ("m2", lambda c: c["quantization_config"].update(config_groups=[1]), "config_groups is [1], not {"),
    ("m2", lambda c: c["quantization_config"]["config_groups"]["group_0"].pop("targets"), "group_0.'targets' is missing"),
    ("m2", lambda c: c["quantization_config"].update(ignore={"a": [[]]}), "ignore is {'a': [[]]}, not ["),
    ("m2", lambda c: c["quantization_config"].update({"a\x1b[31m": 1}), "is too many"),
    ("m2", lambda c: c.update(quantization_config=[]), "quantization_config is [], not {"),
    ("m2", lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=8), "weights.num_bits is 8, not 4"),
    ("m2", lambda c: c.update(rope_theta=10000), "config.json differs from the source's in rope_theta"),
    ("m3", lambda c: c["text_config"].update(swiglu_limit=1.0), "config.json differs from the source's in text_config"),
    ("m2", lambda c: c.pop("quantization_config"), "quantization_config is not the one"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change", "words"), CONFIGS)
def test_an_edited_config(
    made: dict[str, Path], tmp_path: Path, family: str, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(made[f"{family}-awq"], bad)
    edit_json(bad / "config.json", change)
    status, said = check(bad)
    assert status == 1 and "config.json: sha256 differs" in said, said
    fix_hashes(bad)
    status, said = check(bad, made[family])
    assert status == 1 and words in said, said


def test_an_edited_recipe(made: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(made["m2-int4"], bad)
    text = (bad / "recipe.yaml").read_text()
    (bad / "recipe.yaml").write_text(text.replace("fp8-channel", "fp8-block"))
    assert check(bad)[0] == 1 and "differs from the recipe recorded" in check(bad)[1]
    (bad / "recipe.yaml").write_text("schemes: [1")
    assert check(bad)[0] == 1 and "cannot be read as a recipe" in check(bad)[1]


def test_an_edited_tokenizer(made: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(made["m2"], source)
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("a card")
    run_convert(source, tmp_path / "out", "int4")
    (tmp_path / "out" / "README.md").write_text("another card")
    assert check(tmp_path / "out", source)[0] == 0
    (tmp_path / "out" / "tokenizer.json").write_text('{"a": 1}')
    status, said = check(tmp_path / "out", source)
    assert status == 1 and "tokenizer.json: sha256 differs" in said


def test_a_wrong_source(made: dict[str, Path], tmp_path: Path) -> None:
    status, said = check(made["m2-awq"], made["m3"])
    assert status == 2 and "give the source that this output was made from" in said
    other = tmp_path / "other"  # of the same headers, as another seed or a further trained model would be
    shutil.copytree(made["m2"], other)
    shard = other / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-200_000:] = data[-200_000:][::-1]
    shard.write_bytes(data)
    status, said = check(made["m2-int4"], other)
    assert status == 1 and "differs from the source" in said, said
    changed = make_source(tmp_path / "changed", "m2", rope_theta=10000)
    status, said = check(made["m2-int4"], changed)
    assert status == 1 and "made from another source" in said and "rope_theta" in said, said


def test_one_bit_of_the_source_that_no_error_shows_is_another_source(made: dict[str, Path], tmp_path: Path) -> None:
    """The lowest bit of one weight: rounded codes are the same, or one apart."""
    other = shutil.copytree(made["m2"], tmp_path / "other")
    infos = Checkpoint.open(other).tensors
    info = next(infos[n] for n in infos if ".layers.0." in n and n.endswith("w1.weight"))
    edit_unsampled(other, info.shard, info.name)
    status, said = check(made["m2-int4"], other)
    assert status == 1 and f"(layer 0) was made of other tensors than {info.shard} of {other} holds" in said, said
    assert "(layer 1)" not in said
    assert check(made["m2-int4"], shutil.copytree(made["m2"], tmp_path / "copy"))[0] == 0


def test_a_file_beside_the_source_s_weights_that_was_edited_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(made["m2"], tmp_path / "other")
    out = tmp_path / "out"
    (other / "tokenizer.json").write_text("{}")
    (other / "README.md").write_text("# a card")
    run_convert(other, out, "int4")
    (other / "README.md").write_text("# edited, as people do")
    assert check(out, other)[0] == 0
    (other / "tokenizer.json").write_text('{"a": 1}')
    status, said = check(out, other)
    assert status == 1 and f"{other / 'tokenizer.json'} is not the file that was carried over" in said
    (other / "tokenizer.json").unlink()
    status, said = check(out, other)
    assert status == 1 and "tokenizer.json was carried over, but" in said


def test_folders_that_are_no_finished_output(made: dict[str, Path], tmp_path: Path) -> None:
    status, said = check(made["m2"])
    assert status == 2 and "was not written by m3quant convert" in said
    unfinished = tmp_path / "unfinished"
    shutil.copytree(made["m2-int4"], unfinished)
    (unfinished / "config.json").unlink()
    (unfinished / ".m3quant").mkdir()
    status, said = check(unfinished)
    assert status == 2 and "unfinished conversion" in said and "same convert command" in said
    damaged = tmp_path / "damaged"
    shutil.copytree(made["m2-int4"], damaged)
    (damaged / "m3quant.json").write_text("{")
    assert check(damaged)[0] == 1 and "damaged" in check(damaged)[1]
    (damaged / "m3quant.json").write_text("{}")
    status, said = check(damaged)
    assert status == 1 and "m3quant.json" in said


@pytest.mark.parametrize("where", ["shards", "files"])
def test_what_the_manifest_does_not_list_is_a_problem(made: dict[str, Path], tmp_path: Path, where: str) -> None:
    """It would be neither hashed nor published."""
    folder = tmp_path / "out"
    shutil.copytree(made["m2-int4"], folder)
    manifest = json.loads((folder / "m3quant.json").read_text())
    own = [name for name in manifest[where] if where == "shards" or name in ("config.json", "recipe.yaml")]
    for name in own:
        rest = {key: value for key, value in manifest[where].items() if key != name}
        (folder / "m3quant.json").write_text(json.dumps({**manifest, where: rest}))
        status, said = check(folder)
        assert status == 1 and f"m3quant.json does not list {name}" in said


@pytest.mark.parametrize("changes", [{"shards": []}, {"source": 5}, {"shards": {"a": 5}}, {"shards": {"a": {}}}])
def test_a_manifest_of_wrong_types_is_damaged(made: dict[str, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "out"
    shutil.copytree(made["m2-int4"], folder)
    manifest = json.loads((folder / "m3quant.json").read_text())
    (folder / "m3quant.json").write_text(json.dumps({**manifest, **changes}))
    status, said = check(folder)
    assert status == 1 and "damaged" in said


def test_the_plan_rebuilt_from_the_manifest_is_the_plan(made: dict[str, Path], tmp_path: Path) -> None:
    from m3quant.artifact.output import output_plan, read_manifest

    for which, to in (("m2-int4", "int4"), ("m3-int4", "int4")):
        plan = make_plan_of(made[which[:2]], to)
        again = output_plan(Checkpoint.open(made[which]), read_manifest(made[which]), None)
        assert again.index_bytes == plan.index_bytes and again.config_bytes == plan.config_bytes
        assert [u.bytes_out for u in again.units] == [u.bytes_out for u in plan.units]
