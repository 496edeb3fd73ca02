"""llm-compressor recipes: what they become on M2 and M3, and the sentence that refuses what m3quant does not do."""

import copy
import re
import sys
from typing import Any

import pytest
import yaml
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.utils.match import match_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from m3quant.checkpoint import patterns
from m3quant.errors import RecipeError
from m3quant.families import family_of
from m3quant.planning.engine_config import compressed_tensors_group
from m3quant.recipe.llmcompressor import _Matcher, _Module, is_llmcompressor, translate
from m3quant.recipe.llmcompressor_schemes import PRESETS, group_scheme, preset_scheme
from m3quant.recipe.recipe import Recipe, build_recipe, named_recipe, recipe_names
from m3quant.schemes import KEEP, parse_scheme

M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "hidden_size": 256,
    "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "vocab_size": 512, "num_experts_per_tok": 2, "head_dim": 64, "rotary_dim": 32,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "use_routing_bias": True,
}  # fmt: skip
M3: dict[str, Any] = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"], "model_type": "minimax_m3_vl",
    "projector_hidden_size": 256,
    "vision_config": {
        "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128, "patch_size": 14, "num_channels": 3,
    },
    "text_config": {
        "hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 128, "shared_intermediate_size": 128,
        "n_shared_experts": 1, "dense_intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 128, "vocab_size": 512, "num_local_experts": 4, "moe_layer_freq": [0, 1, 1],
        "num_experts_per_tok": 2, "rotary_dim": 64, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "use_gemma_norm": True,
        "qk_norm_type": "per_head", "hidden_act": "swigluoai", "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
        "use_routing_bias": True, "routed_scaling_factor": 2.0,
        "sparse_attention_config": {
            "use_sparse_attention": True, "sparse_attention_freq": [0, 1, 1], "sparse_index_dim": 128,
            "sparse_num_index_heads": 2, "sparse_score_type": "max", "sparse_disable_index_value": [0, 1, 1],
            "sparse_block_size": 128, "sparse_topk_blocks": 2, "sparse_local_block": 1, "sparse_init_block": 0,
        },
    },
}  # fmt: skip
IGNORE_M2 = ["lm_head", "re:.*block_sparse_moe.gate$"]
IGNORE_M3 = ["lm_head", "re:.*mlp.gate$", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FP8 = PRESET_SCHEMES["FP8_DYNAMIC"]


def read(text: str, config: dict[str, Any]) -> Recipe:
    document = yaml.safe_load(text)
    assert is_llmcompressor(document)
    return build_recipe(translate(document, family_of(config), "/somewhere/mine.yaml"))


def quantization(config: dict[str, Any], **options: Any) -> Recipe:
    """A recipe of one QuantizationModifier."""
    options = {"ignore": IGNORE_M2 if config is M2 else IGNORE_M3, **options}
    return read(yaml.safe_dump({"quant_stage": {"quant_modifiers": {"QuantizationModifier": options}}}), config)


def refused(config: dict[str, Any] = M2, **options: Any) -> str:
    with pytest.raises(RecipeError) as error:
        quantization(config, **options)
    assert "/somewhere/mine.yaml" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "UNQUANTIZED"])
def test_a_preset_means_what_compressed_tensors_means(name: str) -> None:
    ours = QuantizationScheme(targets=["Linear"], **compressed_tensors_group(PRESETS[name]))
    theirs = QuantizationScheme(targets=["Linear"], **copy.deepcopy(PRESET_SCHEMES[name]))
    assert ours.weights == theirs.weights and ours.input_activations == theirs.input_activations
    dumped = theirs.model_dump(mode="json", exclude={"targets"})
    assert group_scheme(dumped, "recipe") == PRESETS[name], "the group that llm-compressor writes out"


@pytest.mark.parametrize("name", sorted(set(PRESET_SCHEMES) - set(PRESETS)))
def test_every_other_preset_is_refused_by_name_and_by_its_arguments(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} .*use ") as error:
        preset_scheme(name, "r.yaml")
    assert "did you mean" not in str(error.value)
    group = QuantizationScheme(targets=["Linear"], **copy.deepcopy(PRESET_SCHEMES[name]))
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        group_scheme(group.model_dump(mode="json", exclude={"targets"}), "r.yaml")


def test_a_preset_of_a_newer_library_is_looked_up_there(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = PRESET_SCHEMES["W4A16"]["weights"].model_dump() | {"group_size": 64}
    monkeypatch.setitem(PRESET_SCHEMES, "W4A16_G64", {"weights": QuantizationArgs(**arguments)})
    monkeypatch.setitem(PRESET_SCHEMES, "W4A4_NEW", PRESET_SCHEMES["W4A4"])
    assert preset_scheme("w4a16_g64", "r.yaml") == parse_scheme("int4-g64")
    recipe = quantization(M2, scheme={"W4A16_G64": ["Linear"]})
    assert recipe.schemes["routed_experts"] == "int4-g64"
    with pytest.raises(RecipeError, match=r"r\.yaml: scheme W4A4_NEW\.input_activations: .*use W4A16"):
        preset_scheme("W4A4_NEW", "r.yaml")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(RecipeError, match="unknown scheme 'W4A16_G64': did you mean 'W4A16"):
        preset_scheme("W4A16_G64", "r.yaml")


def test_a_modern_awq_recipe_on_m2() -> None:
    recipe = read(
        """
        default_stage:
          default_modifiers:
            AWQModifier: {n_grid: 12, duo_scaling: false, offload_device: null, requires_calibration_data: true}
            QuantizationModifier:
              targets: [Linear]
              ignore: [lm_head, 're:.*block_sparse_moe.gate$', 're:.*vision.*', 're:.*mlp.gate$']
              scheme: W4A16
        """,
        M2,
    )
    assert recipe.name == "mine (llm-compressor)"
    assert (recipe.calibration, recipe.format) == ("awq", "compressed-tensors")
    assert recipe.schemes == {"routed_experts": "int4-g128", "attention": "int4-g128"}
    assert (recipe.awq.n_grid, recipe.awq.duo_scaling, recipe.awq.range_search) == (12, False, True)


def test_an_old_awq_recipe_carries_its_own_groups() -> None:
    recipe = read(
        """
        quant_stage:
          quant_modifiers:
            AWQModifier:
              config_groups:
                group_0:
                  targets: ['re:.*experts.*']
                  weights: {num_bits: 4, type: int, symmetric: false, strategy: group, group_size: 32, dynamic: false,
                            actorder: null, block_structure: null, observer: minmax, observer_kwargs: {}}
                  input_activations: null
                  output_activations: null
                  format: null
              ignore: []
        """,
        M2,
    )
    assert recipe.schemes == {"routed_experts": "int4-g32-asym"}
    assert recipe.calibration == "awq" and recipe.awq.range_search, "a filled-in minmax asks for nothing"


def test_mixed_groups_on_m3_leave_router_head_and_vision_alone() -> None:
    recipe = read(
        r"""
        AWQModifier: {}
        QuantizationModifier:
          config_groups:
            experts:
              targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']
              weights: {num_bits: 4, group_size: 128}
            rest:
              targets: ['re:.*self_attn.*_proj$', 're:.*shared_experts.*', 're:.*\.mlp\.(gate_up|down)_proj$']
              weights: {num_bits: 8, type: float, strategy: channel}
              input_activations: {num_bits: 8, type: float, strategy: token, dynamic: true}
          ignore: [lm_head, 're:.*mlp.gate$', 're:.*vision_tower.*']
        """,
        M3,
    )
    rest = dict.fromkeys(["shared_experts", "dense_mlp", "attention"], "fp8-channel")
    assert recipe.schemes == {"routed_experts": "int4-g128", **rest}
    assert recipe.scheme("indexer").name == "fp8-channel"


@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "fp8_block", "W8A16", "W4A16_ASYM"])
def test_linear_with_the_usual_ignores_covers_all_roles_of_m3_without_calibration(preset: str) -> None:
    recipe = quantization(M3, scheme=preset, targets="Linear")
    assert recipe.calibration == "none"
    assert set(recipe.schemes) == {"routed_experts", "shared_experts", "dense_mlp", "attention"}
    assert set(recipe.schemes.values()) == {PRESETS[preset.upper()].name}


def test_ignored_roles_are_kept() -> None:
    assert quantization(M2, scheme="W4A16", ignore=[*IGNORE_M2, "re:.*self_attn.*"]).schemes == {
        "routed_experts": "int4-g128"
    }
    kept = quantization(
        M3,
        scheme={"W4A16": ["Linear"]},
        ignore=[*IGNORE_M3, "re:.*self_attn", "re:.*mlp.gate_up_proj$", "re:.*layers.0.mlp.down_proj", "re:.*shared"],
    )
    assert kept.schemes == {"routed_experts": "int4-g128"}


def test_names_beat_regexes_and_regexes_beat_classes_as_in_compressed_tensors() -> None:
    recipe = quantization(M2, scheme={"W4A16": "Linear", "FP8_DYNAMIC": ["re:.*self_attn.*"]})
    assert recipe.schemes == {"routed_experts": "int4-g128", "attention": "fp8-channel"}


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from(["Linear", "a.q", "b.q", "re:a", "re:.*q", "re:b.*k$", "re:.*", "Embedding"]), unique=True
    ),
    st.sampled_from(["a.q", "a.k", "b.q", "b.k"]),
)
def test_the_winning_target_is_the_one_that_compressed_tensors_puts_first(targets: list[str], name: str) -> None:
    theirs = match_targets(name, nn.Linear(2, 2), targets)
    assert _Matcher(targets, "the recipe").first(_Module(name, "attention", None, (name,), "Linear")) == (
        theirs[0] if theirs else None
    )


def test_a_later_modifier_beats_an_earlier_one_where_it_matches() -> None:
    recipe = read(
        """
        first_stage_0:
          quant_modifiers: {QuantizationModifier: {scheme: FP8_DYNAMIC, ignore: [lm_head, 're:.*gate$']}}
        first_stage_1:
          quant_modifiers: {QuantizationModifier: {scheme: W4A16, targets: ['re:.*experts.*', 're:.*o_proj'], ignore: ['re:.*o_proj']}}
        """,
        M2,
    )
    assert recipe.schemes == {"routed_experts": "int4-g128", "attention": "fp8-channel"}


def test_an_observer_that_a_person_asks_for_decides_the_range_search() -> None:
    def awq(**options: Any) -> Recipe:
        quantizer = {"scheme": "W4A16", "ignore": IGNORE_M2, **options}
        return read(yaml.safe_dump({"modifiers": [{"AWQModifier": None}, {"QuantizationModifier": quantizer}]}), M2)

    assert awq(weight_observer="mse").awq.range_search
    assert not awq(weight_observer="memoryless_minmax").awq.range_search
    assert not awq(observer={"weights": "minmax"}).awq.range_search


def test_our_own_recipes_are_not_taken_for_theirs() -> None:
    assert not any(is_llmcompressor(named_recipe(name)) for name in recipe_names())
    assert is_llmcompressor({"default_stage": {}})


@pytest.mark.parametrize(
    ("config", "ignore", "phrase"),
    [
        (M2, ["re:.*gate$"], r"lm_head \(lm_head\) would become int4-g128.*Add 're:.*lm_head' to 'ignore'"),
        (M2, ["lm_head"], r"gate \(router\).*float32.*Add 're:.*block_sparse_moe.*gate\$' to 'ignore'"),
        (M3, ["re:.*mlp.gate$", "re:.*vision.*", "re:.*projector.*"], r"language_model.lm_head.*Add 're:.*lm_head'"),
        (M3, ["lm_head", "re:.*mlp.gate$", "re:.*projector.*"], r"\(vision\).*Add 're:.*vision_tower.*'"),
        (M3, ["lm_head", "re:.*mlp.gate$", "re:.*vision.*"], r"\(projector\).*Add 're:.*multi_modal_projector.*'"),
        (M2, [*IGNORE_M2, "re:.*k_proj$"], r"'attention' gets two schemes: .*q_proj is int4-g128 and .*k_proj is keep"),
        (M3, [*IGNORE_M3, "re:.*index_.*"], r"'attention' gets two.*index_q_proj is keep.*engines fuse q, k, v and the index"),
        (M2, [*IGNORE_M2, "re:.*experts.3.w2"], r"'routed_experts' gets two .*0.w1 is int4.*3.w2 is keep.*one scheme"),
        (M2, ["lm_head", "gate"], r"'gate' ignores nothing.*layers.0.*gate would be quantized; write 're:\(\.\*\\.\)\?gate\$'"),
        (M2, [*IGNORE_M2, "self_attn"], r"'self_attn' ignores nothing.*q_proj would be quantized; write 're:.*self_attn\\..*'"),
        (M2, [*IGNORE_M2, "re:(.*"], r"ignore: '\(\.\*' is not a regular expression"),
        (M2, [*IGNORE_M2, 3], "list of names, classes or 're:' regexes"),
    ],
)  # fmt: skip
def test_targets_that_m3quant_cannot_follow_are_refused(config: dict[str, Any], ignore: list[Any], phrase: str) -> None:
    with pytest.raises(RecipeError, match=phrase):
        quantization(config, scheme="W4A16", ignore=ignore)


def test_lists_of_any_length_have_one_limit_on_time(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"layers.{n}.nothing" for n in range(1000)]
    assert quantization(M2, scheme="W4A16", ignore=[*IGNORE_M2, *names]).schemes
    monkeypatch.setattr(patterns, "LIST_SECONDS", 0.01)
    words = r"^/somewhere/mine.yaml: to compare its lists .* takes more than 0\.01 s\. Write fewer targets"
    with pytest.raises(RecipeError, match=words):
        quantization(M2, scheme="W4A16", ignore=[*IGNORE_M2, *(f"re:.*{name}" for name in names)])
    stages = {f"s{n}_stage": {"quant_modifiers": {"QuantizationModifier": {"scheme": "W4A16"}}} for n in range(1000)}
    with pytest.raises(RecipeError, match=words):
        translate(stages, family_of(M2), "/somewhere/mine.yaml")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"scheme": "W4A17"}, "unknown scheme 'W4A17': did you mean 'W4A16'"),
        ({"scheme": "W4A16", "targets": ["MiniMaxM2Attention"]}, "target 'MiniMaxM2Attention' matches no linear"),
        ({"scheme": "W4A16", "config_groups": {"a": {}}}, "both 'scheme' and 'config_groups'"),
        ({"targets": ["Linear"]}, "gives neither 'scheme' nor 'config_groups'"),
        ({"scheme": "W4A16", "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme needs KV-cache scales"),
        ({"scheme": "W4A16", "input_observer": "mse"}, "input_observer is without meaning"),
        ({"scheme": "W4A16", "observer": {"input": "mse"}}, "with the key 'weights' only"),
        ({"scheme": "W4A16", "weight_observer": "mse"}, "'mse' searches ranges.*add an AWQModifier"),
        ({"scheme": "W4A16", "weight_observer": "magic"}, "observer 'magic' is unknown"),
        (
            {"scheme": "W4A16", "dampening_frac": 0.1},
            "an option 'dampening_frac' that m3quant does not know; remove it",
        ),
        ({"scheme": "W4A16", "ignored": ["x"]}, "'ignored' that m3quant does not know: did you mean 'ignore'"),
        ({"config_groups": {"a": {"weights": W4}}}, "QuantizationModifier.a has no targets"),
    ],
)
def test_options_that_m3quant_lacks_are_refused(options: dict[str, Any], phrase: str) -> None:
    assert re.search(phrase, refused(**options))


@pytest.mark.parametrize(
    ("group", "phrase"),
    [
        ({"weights": W4 | {"actorder": "weight"}}, "actorder reorders columns for GPTQ"),
        ({"weights": W4 | {"dynamic": True}}, "weights are rounded once"),
        ({"weights": W4 | {"num_bits": 9}}, "num_bits 9 is not written by m3quant: integers have 2 to 8 bits"),
        ({"weights": W4 | {"num_bits": 1}}, "num_bits 1 is not written"),
        ({"weights": W4 | {"group_size": 48}}, "group_size 48 is not one of"),
        ({"weights": W4 | {"strategy": "channel"}}, "strategy channel has no group_size"),
        ({"weights": W4 | {"strategy": "tensor_group"}}, "integers with strategy tensor_group"),
        ({"weights": W4 | {"scale_dtype": "torch.float16"}}, "scale_dtype is fixed"),
        ({"weights": W4 | {"observer_kwargs": {"maxshrink": 0.2}}}, "observer_kwargs .* no counterpart"),
        ({"weights": W4 | {"colour": 1}}, "unknown key 'colour'"),
        ({"weights": {"num_bits": 8}}, "one scale for the whole tensor"),
        ({"weights": "W4A16"}, "write a mapping"),
        ({"weights": W4, "output_activations": {"num_bits": 8}}, "output_activations are not quantized"),
        ({"weights": W4, "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"}}, "INT4 weights and quantized activations"),
        ({"weights": W4, "format": "marlin-24"}, "stored as pack-quantized, not marlin-24"),
        ({"input_activations": {"num_bits": 8}}, "input_activations without weights"),
        ({"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}, "input_activations is missing.*FP8_DYNAMIC"),
        ({"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64]}}, r"\[128, 128\]"),
        ({"weights": FP8["weights"].model_dump(), "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor"}}, "static activation scales"),
        ({"weights": FP8["weights"].model_dump(), "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}}, "strategy token; write scheme FP8_DYNAMIC"),
    ],
)  # fmt: skip
def test_groups_that_m3quant_cannot_write_are_refused(group: dict[str, Any], phrase: str) -> None:
    with pytest.raises(RecipeError, match=phrase) as error:
        group_scheme(group, "r.yaml: group_0")
    assert str(error.value).startswith("r.yaml: group_0")


@pytest.mark.parametrize(
    "name", ["GPTQModifier", "SmoothQuantModifier", "SparseGPTModifier", "SpinQuantModifier", "REAPPruningModifier"]
)
def test_other_modifiers_are_refused(name: str) -> None:
    document = {"s_stage": {"m_modifiers": {name: {"scheme": "W4A16"}, "QuantizationModifier": {"scheme": "W4A16"}}}}
    with pytest.raises(RecipeError, match=f"r.yaml: {name} is not something m3quant does: .*(use|take)"):
        translate(document, family_of(M2), "r.yaml")


@pytest.mark.parametrize(
    ("modifiers", "phrase"),
    [
        ({"AWQModifier": {}}, "gives no scheme: AWQModifier only transforms"),
        ({"AWQModifier": {"scheme": "W4A16", "mappings": [{"smooth_layer": "x"}]}}, "remove 'mappings'.*exact set"),
        ({"AWQModifier": {"scheme": "W4A16", "duo_scaling": "both"}}, "duo_scaling 'both' searches two grids"),
        ({"AWQModifier": {"ignore": ["lm_head"]}, "QuantizationModifier": {"scheme": "W4A16"}}, "move 'ignore' to"),
        ({"AWQModifier": [], "QuantizationModifier": {"scheme": "W4A16"}}, "write a mapping of its options"),
    ],
)
def test_awq_options_that_differ_from_ours_are_refused(modifiers: dict[str, Any], phrase: str) -> None:
    for options in modifiers.values():
        if isinstance(options, dict) and "scheme" in options:
            options["ignore"] = IGNORE_M2
    with pytest.raises(RecipeError, match=phrase):
        translate({"quant_stage": {"quant_modifiers": modifiers}}, family_of(M2), "r.yaml")


def test_keys_beside_the_stages_are_refused() -> None:
    stage = {"quant_modifiers": {"QuantizationModifier": {"scheme": "W4A16", "ignore": IGNORE_M2}}}
    for extra in ({"schemes": {"attention": "keep"}}, {"format": "fp8"}):
        with pytest.raises(RecipeError, match=f"key '{next(iter(extra))}' is no stage"):
            translate({"quant_stage": stage, **extra}, family_of(M2), "r.yaml")
    with pytest.raises(RecipeError, match="'args' are not substituted"):
        translate({"args": {"bits": 4}, "quant_stage": stage}, family_of(M2), "r.yaml")
    assert translate({"version": "1.1", "args": {}, "quant_stage": stage}, family_of(M2), "r.yaml")["schemes"]


def test_layers_may_differ() -> None:
    recipe = quantization(
        M2,
        scheme={"W2A16": ["Linear"], "W3A16": [r"re:.*layers\.(4|6|1\d)\..*experts.*"], "W8A16": ["re:.*self_attn.*"]},
        ignore=[*IGNORE_M2, r"re:.*layers\.5\.self_attn.*"],
    )
    assert recipe.schemes == {"routed_experts": "int2-g128", "attention": "int8-g128"}
    assert recipe.layers == {"4,6,10-11": {"routed_experts": "int3-g128"}, "5": {"attention": "keep"}}
    assert {n for n in range(12) if recipe.scheme("routed_experts", n).bits == 3} == {4, 6, 10, 11}


def test_the_unquantized_preset_keeps_what_it_targets() -> None:
    assert PRESETS["UNQUANTIZED"] == KEEP
    recipe = quantization(M2, scheme={"W4A16": ["Linear"], "UNQUANTIZED": ["re:.*self_attn.*"]})
    assert recipe.schemes == {"routed_experts": "int4-g128"}
