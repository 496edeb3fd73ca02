"""The families against the released models: counts, names, roles and geometry from the real config.json files."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

import pytest

from m3quant.errors import CheckpointError
from m3quant.families import KEPT, QUANTIZABLE, Family, family_of
from tests.support.paths import DATA


def config_of(model: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((DATA / model / "config.json").read_text(encoding="utf-8"))
    return config


def load(model: str) -> tuple[dict[str, Any], Family]:
    config = config_of(model)
    return config, family_of(config)


def parameters(model: str) -> Counter[str]:
    _config, family = load(model)
    counts: Counter[str] = Counter()
    for name, tensor in family.expected_tensors.items():
        counts[family.role(name).kind] += math.prod(tensor.shape)
    return counts


def test_parameters_of_m2() -> None:
    """Every number is an independent count of the published checkpoint (M2.7: 228,703,644,928 stored less the scales)."""
    counts = parameters("minimax-m2.7")
    assert counts.total() == 228_689_764_864
    assert counts["routed_experts"] == 224_680_476_672
    assert counts["attention"] == 2_730_491_904
    assert counts["router"] == 48_758_784
    assert counts["embedding"] + counts["lm_head"] == 1_229_193_216


def test_parameters_and_bytes_of_m3() -> None:
    _config, family = load("minimax-m3")
    counts = parameters("minimax-m3")
    assert counts.total() == 427_040_140_160
    assert counts["routed_experts"] == 413_122_166_784
    assert (counts["shared_experts"], counts["dense_mlp"]) == (3_227_516_928, 679_477_248)
    assert (counts["attention"], counts["indexer"]) == (6_417_285_120, 224_133_120)
    assert (counts["router"], counts["vision"]) == (44_826_624, 631_185_920)
    assert counts["projector"] == 45_625_344 + 188_755_968
    assert counts["embedding"] + counts["lm_head"] == 2_458_386_432
    expected = family.expected_tensors
    assert len(expected) == 23_416
    stored = sum(math.prod(t.shape) * (4 if t.float32 else 2) for t in expected.values())
    assert stored == 854_172_958_720


def test_fp8_tensor_count_of_m2() -> None:
    """96,103 tensors in the FP8 release: every linear of the layers has a scale."""
    _config, family = load("minimax-m2.7")
    expected = family.expected_tensors
    scaled = {n: t for n, t in expected.items() if family.role(n).kind in QUANTIZABLE}
    assert len(expected) + len(scaled) == 96_103
    scales = sum(math.ceil(t.shape[0] / 128) * math.ceil(t.shape[1] / 128) for t in scaled.values())
    assert scales == 13_880_064


def test_mxfp8_tensor_count_of_m3() -> None:
    _config, family = load("minimax-m3")
    expected = family.expected_tensors
    scaled = [t for n, t in expected.items() if family.role(n).kind in QUANTIZABLE]
    assert len(expected) + len(scaled) == 45_838
    elements = sum(math.prod(t.shape) for t in expected.values()) + sum(math.prod(t.shape) // 32 for t in scaled)
    assert elements == 440_279_845_760


def test_kv_bytes_per_token() -> None:
    _, family = load("minimax-m2.7")
    kv = family.kv_geometry
    assert (kv.bytes_per_token(2, 0), kv.bytes_per_token(1, 0), kv.index_layers) == (253_952, 126_976, 0)
    _config, family = load("minimax-m3")
    kv = family.kv_geometry
    assert (kv.bytes_per_token(2, 0), kv.bytes_per_token(1, 0)) == (122_880, 61_440)
    assert (kv.bytes_per_token(0, 2), kv.bytes_per_token(0, 1)) == (14_592, 7_296)
    assert kv.bytes_per_token(2, 2) == 137_472


@pytest.mark.parametrize("model", ["minimax-m2.7", "minimax-m3"])
def test_every_expected_tensor_has_a_known_role(model: str) -> None:
    _config, family = load(model)
    roles = {name: family.role(name) for name in family.expected_tensors}
    assert {r.kind for r in roles.values()} <= {*QUANTIZABLE, *KEPT} - {"unknown", "mtp"}
    layers = family.num_layers
    for name, role in roles.items():
        if role.layer is not None:
            assert name.startswith(family.layer_prefix(role.layer)) and role.layer < layers
        if role.kind in QUANTIZABLE:
            assert role.is_weight and role.part and role.layer is not None


@pytest.mark.parametrize("model", ["minimax-m2.7", "minimax-m3"])
def test_engine_modules_cover_every_quantizable_weight_once(model: str) -> None:
    _config, family = load(model)
    weights = [n.removesuffix(".weight") for n in family.expected_tensors if family.role(n).kind in QUANTIZABLE]
    members = [m for module in family.engine_modules() for m in module.members]
    assert sorted(members) == sorted(weights)


def test_the_indexer_is_fused_on_sparse_layers_only() -> None:
    _config, family = load("minimax-m3")
    modules = {m.fused_name.split(" ")[0]: m for m in family.engine_modules()}
    prefix = "language_model.model.layers"
    assert len(modules[f"{prefix}.2.self_attn.qkv_proj"].members) == 3
    assert len(modules[f"{prefix}.3.self_attn.qkv_proj"].members) == 5


@pytest.mark.parametrize(("name", "kind"), [
    ("model.layers.0.block_sparse_moe.experts.255.w2.weight", "routed_experts"),
    ("model.layers.0.block_sparse_moe.experts.255.w4.weight", "unknown"),
    ("model.layers.0.block_sparse_moe.experts.255.w2.bias", "routed_experts"),
    ("model.layers.0.self_attn.q_norm.weight", "norm"),
    ("model.layers.0.self_attn.qkv_proj.weight", "unknown"),
    ("xmodel.layers.0.self_attn.q_proj.weight", "unknown"),
    ("model.mtp.layers.0.self_attn.q_proj.weight", "mtp"),
    ("lm_head.weight", "lm_head"), ("lm_head.bias", "unknown"),
])  # fmt: skip
def test_roles_of_m2(name: str, kind: str) -> None:
    assert load("minimax-m2.7")[1].role(name).kind == kind


@pytest.mark.parametrize(("name", "kind"), [
    ("language_model.model.layers.5.self_attn.index_q_proj.weight", "indexer"),
    ("language_model.model.layers.5.self_attn.index_q_norm.weight", "norm"),
    ("language_model.model.layers.5.block_sparse_moe.shared_experts.up_proj.weight", "shared_experts"),
    ("language_model.model.layers.0.mlp.up_proj.weight", "dense_mlp"),
    ("language_model.model.layers.5.block_sparse_moe.gate.weight", "router"),
    ("language_model.model.layers.5.block_sparse_moe.gate.bias", "unknown"),
    ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "vision"),
    ("patch_merge_mlp.linear_1.bias", "projector"), ("model.layers.0.self_attn.q_proj.weight", "unknown"),
    ("language_model.model.mtp.0.w", "mtp"),
])  # fmt: skip
def test_roles_of_m3(name: str, kind: str) -> None:
    assert load("minimax-m3")[1].role(name).kind == kind


@pytest.mark.parametrize(("model", "keys"), [
    ("minimax-m2.7", ["hidden_size", "num_hidden_layers", "num_local_experts", "vocab_size", "intermediate_size"]),
    ("minimax-m3", ["text_config", "projector_hidden_size"]),
])  # fmt: skip
def test_a_config_without_a_needed_key_is_refused_by_its_name(model: str, keys: list[str]) -> None:
    for key in keys:
        config = config_of(model)
        del config[key]
        with pytest.raises(CheckpointError, match=f"has no '{key}'"):
            assert family_of(config).expected_tensors


def test_text_config_keys_are_named_where_they_are_missing() -> None:
    config = config_of("minimax-m3")
    del config["text_config"]["moe_layer_freq"]
    with pytest.raises(CheckpointError, match=r"has no 'text_config\.moe_layer_freq'"):
        family_of(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("num_local_experts", True, "num_local_experts"),
        ("num_local_experts", "256", "'256', not a whole number"),
        ("hidden_size", 0, "'hidden_size' is 0, not a whole number from 1"),
        ("head_dim", 10**40, "a number of 133 bits"),
        ("num_experts_per_tok", 257, "257 experts per token"),
        ("quantization_config", [], "'quantization_config' is [], not an object"),
    ],
)
def test_values_that_no_model_has_are_refused_by_name(key: str, value: object, message: str) -> None:
    config, family = load("minimax-m2.7")
    assert config["shared_intermediate_size"] == 0 and family_of(config).layers == family.layers
    with pytest.raises(CheckpointError, match=re.escape(message)):
        family_of({**config, key: value})


@pytest.mark.parametrize("value", [[1, 1], {"0": 1}, 4])
def test_lists_that_do_not_reach_every_layer_are_refused(value: object) -> None:
    config, _ = load("minimax-m3")
    with pytest.raises(CheckpointError, match=r"moe_layer_freq' is .*an entry for each layer"):
        family_of({**config, "text_config": {**config["text_config"], "moe_layer_freq": value}})


def test_a_text_config_or_architectures_of_the_wrong_kind_are_refused() -> None:
    config, _ = load("minimax-m3")
    with pytest.raises(CheckpointError, match="'text_config' is \\[1\\], not an object"):
        family_of({**config, "text_config": [1]})
    with pytest.raises(CheckpointError, match="'architectures' is no list of names"):
        family_of({**config, "architectures": {"a": 1}})


def test_a_number_of_shared_experts_is_a_count_that_may_be_none() -> None:
    config, _family = load("minimax-m3")
    for value in ("x", -1, 0.5):
        with pytest.raises(CheckpointError, match=r"n_shared_experts' is .*not a whole number from 0"):
            family_of({**config, "text_config": {**config["text_config"], "n_shared_experts": value}})
    none = family_of({**config, "text_config": {**config["text_config"], "n_shared_experts": 0}})
    assert none.moe is not None and not none.moe.has_shared
