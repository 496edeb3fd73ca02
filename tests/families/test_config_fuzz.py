"""Mutated configs: whatever a value is replaced by, a family is made of it or one sentence says what is wrong."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m3quant.errors import CheckpointError, M3QuantError
from m3quant.families import family_of
from m3quant.planning.headers import from_config
from m3quant.planning.source_format import config_format, stored_entries
from m3quant.planning.source_layouts import COMPANIONS
from m3quant.runtime.model import open_subject
from tests.support.paths import DATA

MODELS = ("minimax-m2.7", "minimax-m3")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1.5, 10**9, 10**30, -(10**400), float("nan"), float("inf"), -0.0, "", "x", "8", "9" * 4400,
    "\ud800", "a\x1b[31m", [], [1], [None] * 70, [[]], ["\udfff"], {}, {"a": 1}, {"\ud800": 1}, {"type": 5}, {"rope_type": []},
    {"a" * 5000: {}}, ["sparse"] * 60, [2] * 62, [[[[[[]]]]]],
)  # fmt: skip


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    if isinstance(value, dict):
        for key, part in value.items():
            yield from paths(part, (*here, key))
    elif isinstance(value, list):
        for index in range(min(3, len(value))):
            yield from paths(value[index], (*here, index))


def changed(config: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    out = copy.deepcopy(config)
    if not path:
        return out
    part: Any = out
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    return out


def small(model: str) -> dict[str, Any]:
    """The release's config with few layers and experts, so that a mutation costs little."""
    config: dict[str, Any] = json.loads((DATA / model / "config.json").read_text())
    text = config.get("text_config", config)
    text.update(num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=2)
    return config


SHARED = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "vocab_size": 1000, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, **SHARED}
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "sliding_window": None,
    "max_window_layers": 4, **SHARED,
}  # fmt: skip


def use(config: dict[str, Any]) -> None:
    family = family_of(config)
    assert family.expected_tensors and list(family.engine_modules())
    assert family.kv_geometry.bytes_per_token() > 0
    for name in family.expected_tensors:
        family.role(name)


@pytest.mark.parametrize("model", MODELS)
def test_any_one_value_may_be_anything(model: str) -> None:
    config = small(model)
    refused = 0
    for path in list(paths(config))[1:]:
        for value in VALUES:
            try:
                use(changed(config, path, value))
            except CheckpointError as error:
                assert len(str(error)) < 700 and str(error).isprintable(), str(error)
                refused += 1
    assert refused > 1000


def test_several_values_at_once_through_the_commands(tmp_path: Path) -> None:
    """plan of a config.json and of a node, from the file's own bytes."""
    draw, file = random.Random(0), tmp_path / "config.json"
    bases = [*map(small, MODELS), LLAMA, QWEN]
    for base in bases:  # each as it is must do
        file.write_text(json.dumps(base))
        from_config(file)
        open_subject(str(file))
    for _ in range(240):
        config = draw.choice(bases)
        everywhere = list(paths(config))[1:]
        for _ in range(draw.choice((1, 1, 2, 4))):
            try:
                config = changed(config, draw.choice(everywhere), draw.choice(VALUES))
            except (TypeError, KeyError, IndexError):  # the place went with another value
                continue
        file.write_text(json.dumps(config))
        for opened in (from_config, lambda path: open_subject(str(path))):
            try:
                opened(file)
            except M3QuantError as error:
                str(error).encode()


SECTIONS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate", "lm_head"]},
    "mxfp8": {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"], "moe_quant_algo": "MXFP8", "kv_cache_quant_algo": "FP8"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["*gate"], "group_size": 16},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*gate"], "config_groups": {"g": {"targets": ["Linear"]}}},
    "m3.1": {"quant_method": "mxfp8", "moe_quant_algo": "NVFP4", "moe_quant_format": "nvfp4-pack-quantized", "group_size": 16, "ignored_layers": ["lm_head"]},
    "mixed": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.0.self_attn.q_proj": {"quant_algo": "NVFP4", "group_size": 16}}},
    "nvfp4": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}}}},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
}  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_any_value_of_a_quantization_section_may_be_anything(section: str) -> None:
    config = small("minimax-m2.7")
    family = family_of(config)
    for place in ("quantization_config", "compression_config", "hf_quant_config"):
        for path in paths(SECTIONS[section]):
            for value in (*VALUES, "*a" * 40 + "b", ["*a" * 40 + "b"], ["re:("], "x" * 100_000, [0] * 100_000):
                changed_section = changed(SECTIONS[section], path, value) if path else value
                if place == "hf_quant_config":
                    given = {**config, "quantization_config": None}, {"quantization": changed_section}
                else:
                    given = {**config, "quantization_config": None, place: changed_section}, None
                found = config_format(given[0], "config.json", given[1])
                assert (
                    len(found.refused) < 700
                    and len(found.label) < 200
                    and f"{found.label}{found.refused}".isprintable()
                )
                if path in [("modules_to_not_convert",), ("ignored_layers",)] and not found.refused:
                    try:
                        entries = [
                            name
                            for name, _, _ in stored_entries(family, found)
                            if name.rpartition(".")[2] not in COMPANIONS
                        ]
                        assert len(entries) == len(family.expected_tensors)
                    except CheckpointError as error:
                        assert "m3quant does not evaluate" in str(error)


@pytest.mark.parametrize("value", [5, "gate", {"gate": 1}, ["gate", 5], True])
def test_kept_modules_that_are_no_list_of_names_are_refused(value: Any) -> None:
    section = {**SECTIONS["fp8"], "modules_to_not_convert": value}
    found = config_format({"quantization_config": section}, "config.json")
    assert not found.kind and "'modules_to_not_convert' of the quantization section is" in found.refused


@pytest.mark.parametrize("name", [
    f"model.layers.{'1' * 4400}.self_attn.q_proj.weight", "model.layers.²3.self_attn.q_proj.weight", "model.layers.007.x",
    f"model.layers.0.{'.'.join('a' * 20000)}", "\ud800.weight", "model.layers.0.block_sparse_moe.experts.99999999999.w1.weight",
    "model.layers..weight", "model.layers.-1.input_layernorm.weight", "",
])  # fmt: skip
def test_any_name_has_a_role(name: str) -> None:
    assert family_of(small("minimax-m2.7")).role(name).kind == "unknown"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 1024, "num_local_experts": 8192, "attn_type_list": None},
            r"promise up to 25,\d+,\d+ tensors, more than any model has",
        ),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan, which is no number"),
        ({"extra": 10**30}, "'extra' is a number of 100 bits"),
        ({"extra": "\ud800"}, "is not text"),
        ({"rope_theta": 10**80}, "'rope_theta' is a number of 266 bits"),
    ],
)
def test_values_that_no_computation_takes_are_named(change: dict[str, Any], message: str) -> None:
    config = json.loads((DATA / "minimax-m2.7" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        family_of({**config, **change})
