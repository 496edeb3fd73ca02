"""Draft models: what one is by its files, what is refused, its memory, and what an engine is given."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from m3quant.cli import cli
from m3quant.engines import DEFAULT as VLLM
from m3quant.engines import engine_named
from m3quant.engines.drafts import Draft
from m3quant.errors import CheckpointError, OptionError
from m3quant.families import Family
from m3quant.runtime.draft import draft_notes, open_draft, with_draft
from m3quant.runtime.fit import Ask, assess, remedies
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.model import open_subject
from m3quant.runtime.serve import prepare
from m3quant.runtime.serve_recipe import ServeRecipe
from tests.support.paths import FIXTURES
from tests.support.tiny_draft import HIDDEN, VOCABULARY, write_draft, write_eagle3

M2, M3 = FIXTURES / "tiny-m2", FIXTURES / "tiny-m3"
H200, CPU = parse_node("1xH200").gpu, parse_node("cpu:1GiB").gpu


@pytest.fixture(scope="module")
def family() -> Family:
    return open_subject(str(M2)).family


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eagle3(tmp_path_factory.mktemp("draft") / "eagle3")


@pytest.fixture(scope="module")
def draft(eagle3: Path, family: Family) -> Draft:
    return open_draft(str(eagle3), family)


def block(folder: Path, **config: Any) -> Path:
    """A DFlash or DSpark draft: what its config says; the weights are one matrix."""
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 64, "model_type": "qwen3"}  # fmt: skip
    named = (
        config.get("target_layer_ids")
        or config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
        or [0, 1]
    )
    return write_draft(
        folder, sizes | config, {"fc.weight": torch.zeros(HIDDEN, len(named) * HIDDEN, dtype=torch.bfloat16)}
    )


def test_an_eagle3_draft_is_read(draft: Draft, eagle3: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (draft.method, draft.architecture, draft.tokens, draft.taps) == ("eagle3", "LlamaForCausalLMEagle3", 3, 3)
    assert draft.where == str(eagle3) and draft.revision is None
    monkeypatch.chdir(eagle3.parent)  # a compose file mounts it, from wherever it is started
    assert open_draft(eagle3.name, family).where == str(eagle3)
    assert draft.kv_per_token(1, 2) == 2 * 1 * 2 * 64 * 2 and draft.kv_per_token(4, 1) == 2 * 1 * 1 * 64
    fc, norms, tables = 256 * 768 * 2, 4 * 256 * 2, 1024 * 8 + 2048
    kv = 2 * 128 * 512 * 2
    split = (256 * 512 + 256 * 256 + 3 * 512 * 256 + 1024 * 256) * 2
    assert (draft.whole_bytes, draft.kv_bytes, draft.split_bytes) == (fc + norms + tables, kv, split)
    assert draft.rank_bytes(4) == split // 4 + kv // 2 + fc + norms + tables


@pytest.mark.parametrize(
    ("config", "method", "architecture", "tokens", "taps"),
    [
        ({"architectures": ["DFlashDraftModel"], "block_size": 16, "num_target_layers": 3,
          "dflash_config": {"target_layer_ids": [0, 2], "mask_token_id": 5}}, "dflash", "DFlashDraftModel", 15, 2),
        ({"architectures": ["DFlash2DraftModel"], "block_size": 8}, "dflash", "DFlash2DraftModel", 7, 2),
        ({"architectures": ["Qwen3DSparkModel"], "block_size": 7, "target_layer_ids": [0, 1, 2]}, "dspark", "Qwen3DSparkModel", 7, 3),
        ({"architectures": ["DSparkDraftModel"], "dspark_block_size": 7}, "dspark", "Qwen3DSparkModel", 7, 2),
        ({"architectures": ["DSparkMiniMaxDraftModel"], "dspark_block_size": 6, "model_type": "minimax_m3_vl"}, "dspark",
         "DSparkMiniMaxDraftModel", 6, 2),
        ({"architectures": ["LlamaForCausalLM"], "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}, "eagle3",
         "Eagle3LlamaForCausalLM", 3, 3),
    ],
)  # fmt: skip
def test_the_algorithm_is_in_the_config(
    config: dict[str, Any], method: str, architecture: str, tokens: int, taps: int, tmp_path: Path, family: Family
) -> None:
    draft = open_draft(str(block(tmp_path, **config)), family)
    assert (draft.method, draft.architecture, draft.tokens, draft.taps) == (method, architecture, tokens, taps)
    assert open_draft(str(tmp_path), family, 4).tokens == 4


def test_the_speculators_format_is_read(tmp_path: Path, family: Family) -> None:
    inner = json.loads((block(tmp_path / "a", architectures=["x"]) / "config.json").read_text())
    config = {"speculators_model_type": "dflash", "transformer_layer_config": inner, "aux_hidden_state_layer_ids": [1, 2],
              "speculators_config": {"proposal_methods": [{"speculative_tokens": 8}]}}  # fmt: skip
    folder = write_draft(tmp_path / "b", config, {"norm.weight": torch.zeros(HIDDEN)})
    draft = open_draft(str(folder), family)
    assert (draft.method, draft.architecture, draft.tokens, draft.taps) == ("dflash", "DFlashDraftModel", 8, 2)
    assert draft.whole_bytes == 2 * HIDDEN  # float32 on disk, 16 bits in the engine
    write_draft(folder, config | {"speculators_model_type": "peagle"}, {"norm.weight": torch.zeros(HIDDEN)})
    with pytest.raises(CheckpointError, match="kind 'peagle' with 'qwen3' layers is not known"):
        open_draft(str(folder), family)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"], "draft_vocab_size": None}, "describes no draft"),
        ({"architectures": None, "draft_vocab_size": None}, "describes no draft"),
        ({"hidden_size": 512}, "for a target of hidden_size 512, but"),
        ({"target_hidden_size": 128}, "for a target of hidden_size 128, but"),
        ({"vocab_size": 32000}, "for a target of vocab_size 32,000, but"),
        ({"num_target_layers": 36}, "for a target of 36 layers, but"),
        ({"draft_vocab_size": 4096}, "draft_vocab_size 4,096 is more than the target's 2,048"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, not a whole number"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 99]}},
            "not an ascending list of different layers of the target, which has 3",
        ),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 1, 2]}},
            "not an ascending list of different layers",
        ),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 1, 0]}},
            "not an ascending list of different layers",
        ),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": []}}, "not an ascending list of different layers"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2**40]}}, "not an ascending list of different layers"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}},
            "fc.weight' reads 768 values of the target, which has 256 a layer, but config.json names 2 layers",
        ),
        ({"draft_vocab_size": 512}, r"has a table d2t of shape \[1024\]; one of 512 entries is needed"),
        ({"speculators_model_type": "medusa"}, "kind 'medusa'"),
        ({"architectures": ["x\x1b[2J" * 50]}, "not the name of a class"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide among 3 KV heads"),
    ],
)
def test_a_draft_of_another_model_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, family: Family
) -> None:
    write_eagle3(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        open_draft(str(tmp_path), family)


def test_a_draft_without_its_tables_is_refused(tmp_path: Path, family: Family) -> None:
    folder = write_eagle3(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    write_draft(tmp_path / "b", config, {"fc.weight": torch.zeros(HIDDEN, HIDDEN)})
    with pytest.raises(CheckpointError, match="guesses 1,024 of 2,048 tokens, but holds no table d2t"):
        open_draft(str(tmp_path / "b"), family)
    write_draft(tmp_path / "c", config, {"d2t": torch.zeros(1024, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=r"names no layers of the target .* holds no fc\.weight"):
        open_draft(str(tmp_path / "c"), family)
    with pytest.raises(CheckpointError, match="states no block_size: say with --draft-tokens"):
        open_draft(str(block(tmp_path / "d", architectures=["DFlashDraftModel"])), family)
    with pytest.raises(OptionError, match="--draft-tokens is of a draft"):
        with_draft(Ask(), family, None, 3)


def hostile(folder: Path, **tensors: torch.Tensor) -> Path:
    """An EAGLE3 draft with some tensors replaced."""
    made = write_eagle3(folder)
    stored = load_file(made / "model.safetensors")
    return write_draft(folder, json.loads((made / "config.json").read_text()), stored | tensors)


@pytest.mark.parametrize(
    ("place", "offset", "message"),
    [
        (1023, 1025, "entry 1,023 of 'd2t' is token 2,048, but the target has 2,048"),
        (0, -1, "entry 0 of 'd2t' is token -1"),
        (7, 2**62, "is token 4,611,686,018,427,387,911"),
        (5, 1, "'d2t' names token 6 twice"),
        (1023, 1, "'t2d' says of other tokens than 'd2t'"),
    ],
)
def test_a_table_of_tokens_that_an_engine_would_read_past_is_refused(
    place: int, offset: int, message: str, tmp_path: Path, family: Family
) -> None:
    table = torch.zeros(1024, dtype=torch.int64)
    table[place] = offset
    with pytest.raises(CheckpointError, match=message):
        open_draft(str(hostile(tmp_path, d2t=table)), family)


def test_tables_are_read_in_every_layout_and_random_ones_pass(tmp_path: Path, family: Family) -> None:
    tokens = torch.randperm(VOCABULARY)[:1024].sort().values
    table = tokens - torch.arange(1024)
    mask = torch.zeros(VOCABULARY, dtype=torch.bool).scatter(0, tokens, True)
    for number, (d2t, t2d) in enumerate(((table, mask), (table.to(torch.int32), mask.to(torch.int64)))):
        assert open_draft(str(hostile(tmp_path / str(number), d2t=d2t, t2d=t2d)), family).method == "eagle3"
    for number, (wrong, message) in enumerate([
        ({"d2t": table.float()}, "is F32, not a table of whole numbers"),
        ({"model.d2t": table.clone()}, "has 2 tables d2t"),
        ({"t2d": mask[:-1].clone()}, r"has a table t2d of shape \[2047\]"),
        ({"lm_head.weight": torch.zeros(1023, HIDDEN)}, "'lm_head.weight' has 1,023 rows, but config.json says 1,024 tokens"),
        ({"embed_tokens.weight": torch.zeros(1024, HIDDEN)}, "has 1,024 rows, but config.json says 2,048 tokens"),
        ({"fc.weight": torch.zeros(HIDDEN, 700)}, "reads 700 values of the target, which has 256 a layer, but a whole number of layers"),
    ]):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            open_draft(str(hostile(tmp_path / f"wrong{number}", **{"d2t": table, "t2d": mask} | wrong)), family)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
LINEARS = [
    *(f"midlayer.self_attn.{p}_proj" for p in "qkvo"),
    *(f"midlayer.mlp.{p}_proj" for p in ("gate", "up", "down")),
]


def packed(*ignore: str, targets: Sequence[str] = ("Linear",)) -> dict[str, Any]:
    group = {"targets": list(targets), "weights": WEIGHTS}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}, "ignore": list(ignore)}  # fmt: skip


def stored_as(folder: Path, kind: str, section: Any, *modules: str, key: str = "quantization_config") -> Path:
    """An EAGLE3 draft with these modules in FP8 or packed INT4, the rest in BF16, and that section."""
    made = write_eagle3(folder, **{key: section})
    tensors = load_file(made / "model.safetensors")
    for module in modules:
        weight = tensors.pop(f"{module}.weight")
        rows, columns = weight.shape
        if kind == "fp8":
            tensors |= {
                f"{module}.weight": weight.to(torch.float8_e4m3fn),
                f"{module}.weight_scale": torch.ones(rows, 1),
            }
        else:
            tensors |= {f"{module}.weight_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
                        f"{module}.weight_scale": torch.ones(rows, columns // 128)}  # fmt: skip
    return write_draft(folder, json.loads((made / "config.json").read_text()), tensors)


@pytest.mark.parametrize(
    ("kind", "section", "modules"),
    [
        ("fp8", FP8 | {"modules_to_not_convert": ["lm_head", "fc"]}, LINEARS),
        ("fp8", FP8, ["lm_head", *LINEARS]),  # fc and head may be plain or not: engines differ
        ("fp8", FP8 | {"modules_to_not_convert": ["midlayer.self_attn"]}, LINEARS[4:]),
        ("fp8", FP8 | {"ignored_layers": [f"model.layers.3.mlp.{p}_proj" for p in ("gate_up", "down")]}, LINEARS[:4]),
        ("fp8", FP8 | {"ignored_layers": LINEARS}, []),
        ("int4", packed("lm_head", "fc"), LINEARS),
        ("int4", packed(r"re:.*self_attn.*", r"re:.*layers\.0\.mlp\..*"), []),
        ("int4", packed(targets=[r"re:.*mlp\.(gate|up|down)_proj"]), LINEARS[4:]),
        ("int4", packed(targets=["model.layers.9.mlp.experts"]), []),
        ("int4", {"quant_method": "compressed-tensors", "config_groups": {}, "format": "dense"}, []),
        ("int4", {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["attn", "mlp"]}, []),
        ("fp8", {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["*self_attn*", "*mlp*"]}, []),
        ("fp8", {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, []),
        ("fp8", {"quant_method": "modelopt", "quantized_layers": {m: {"quant_algo": "FP8"} for m in LINEARS[:4]}}, LINEARS[:4]),
        ("fp8", {"quant_method": "bitsandbytes", "load_in_4bit": True}, []),  # quantizes what it loads
        ("fp8", {"quant_method": "quark"}, LINEARS[:1]),  # whose own lists are not read
    ],
)  # fmt: skip
def test_a_draft_whose_config_and_weights_agree_is_taken(
    kind: str, section: Any, modules: list[str], tmp_path: Path, family: Family
) -> None:
    made = open_draft(str(stored_as(tmp_path, kind, section, *modules)), family)
    assert made.method == "eagle3"


@pytest.mark.parametrize(
    ("kind", "section", "modules", "message"),
    [
        ("fp8", FP8, [], "'midlayer.mlp.down_proj.weight' is BF16, and 6 more like it, but .*config.json says that it is quantized .*'fp8'.* a plain draft, one without"),
        ("fp8", FP8, LINEARS[1:], "'midlayer.self_attn.q_proj.weight' is BF16, but .* says that it is quantized"),
        ("fp8", FP8 | {"modules_to_not_convert": ["gate", "midlayer.self_attn", "down_proj"]}, [], "'midlayer.mlp.gate_proj.weight' is BF16, and 1 more"),
        ("int4", packed("lm_head", "fc"), [], "'midlayer.mlp.down_proj.weight' is BF16, and 6 more"),
        ("int4", packed(targets=["model.layers.3.mlp.gate_up_proj"]), [], "'midlayer.mlp.gate_proj.weight' is BF16, and 1 more"),
        ("fp8", {"quant_method": "gptq", "bits": 4}, [], "is BF16, and 6 more like it, .*'gptq'"),
        ("fp8", None, ["midlayer.mlp.up_proj"], "'midlayer.mlp.up_proj.weight' is F8_E4M3, the codes .* but .*config.json has no quantization_config.* or a draft in BF16"),
        ("int4", None, LINEARS, "_packed' is I32, the codes of a quantized weight, but .*config.json has no quantization_config"),
        ("int4", packed("lm_head"), ["lm_head", *LINEARS], "'lm_head.weight_packed' is I32, .* says that 'lm_head' is not"),
        ("int4", packed(r"re:.*mlp.*"), LINEARS, "says that 'midlayer.mlp.down_proj' is not"),
        ("int4", packed(targets=["re:.*self_attn.*"]), LINEARS, "says that 'midlayer.mlp.down_proj' is not"),
        ("fp8", {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, LINEARS, "says that 'midlayer.mlp.down_proj' is not"),
        ("fp8", {"quant_method": "modelopt", "quantized_layers": {LINEARS[0]: {"quant_algo": "FP8"}}}, LINEARS[1:2], "says that 'midlayer.self_attn.k_proj' is not"),
        ("fp8", "fp8", [], "the quantization section is no object"),
        ("fp8", FP8 | {"ignored_layers": "lm_head"}, LINEARS, "'ignored_layers' of the quantization section is 'lm_head', no list of names"),
        ("int4", packed("re:("), LINEARS, "is not a regular expression"),
        ("fp8", FP8 | {"ignored_layers": ["*[a" * 400]}, LINEARS, "a pattern of 1,200 characters, .* more than 1,000"),
    ],
)  # fmt: skip
def test_a_draft_whose_config_and_weights_disagree_is_refused(
    kind: str, section: Any, modules: list[str], message: str, tmp_path: Path, family: Family
) -> None:
    folder = stored_as(tmp_path, kind, section, *modules)
    with pytest.raises(CheckpointError, match=message):
        open_draft(str(folder), family)


@pytest.mark.parametrize(
    ("kind", "ids", "taps"), [("fp8", None, 3), ("int4", None, 3), ("int4", [0, 2, 3], 3), ("int4", [1, 2], 2)]
)
def test_a_quantized_first_projection_is_read(
    kind: str, ids: list[int] | None, taps: int, tmp_path: Path, family: Family
) -> None:
    """FP8 has the shape of its values; of packed codes that is not known, and engines give a draft that names no layers three."""
    folder = stored_as(tmp_path, kind, FP8 if kind == "fp8" else packed(), "fc", *LINEARS)
    config = json.loads((folder / "config.json").read_text())
    config |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}} if ids else {}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_draft(str(folder), family).taps == taps
    if kind == "fp8":
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 2]}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"'fc\.weight' reads 768 values .* but config.json names 2 layers"):
            open_draft(str(folder), family)
    else:
        other = config | {"architectures": ["DFlashDraftModel"], "block_size": 8, "eagle_config": None}
        (folder / "config.json").write_text(json.dumps({key: value for key, value in other.items() if value}))
        with pytest.raises(CheckpointError, match=r"holds no fc\.weight whose width says how many"):
            open_draft(str(folder), family)


def test_fused_projections_that_are_left_out_by_their_parts_are_left_out(tmp_path: Path, family: Family) -> None:
    folder = write_eagle3(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    own = [tensors.pop(f"{module}.weight") for module in LINEARS[:3]]
    tensors["midlayer.self_attn.qkv_proj.weight"] = torch.cat(own)
    tensors |= {f"{module}.weight": tensors[f"{module}.weight"].to(torch.float8_e4m3fn) for module in LINEARS[3:]}
    config = json.loads((folder / "config.json").read_text())
    write_draft(folder, config | {"quantization_config": FP8 | {"ignored_layers": LINEARS[:3]}}, tensors)
    assert open_draft(str(folder), family).method == "eagle3"
    write_draft(folder, config | {"quantization_config": FP8 | {"ignored_layers": ["lm_head"]}}, tensors)
    with pytest.raises(CheckpointError, match=r"qkv_proj\.weight' is BF16, but .* says that it is quantized"):
        open_draft(str(folder), family)


@pytest.mark.parametrize("module", ["layers.0.self_attn", ".".join(["a"] * 3000)])
@pytest.mark.parametrize(
    "section",
    [
        FP8 | {"ignored_layers": [f"*{number}*y" for number in range(9_999)]},
        packed(*[f"re:.*x{number}" for number in range(3000)]),
        {"quant_method": "awq", "modules_to_not_convert": [f"x{number}" for number in range(400_000)]},
    ],
    ids=["globs", "regexes", "pieces"],
)
def test_lists_and_names_of_any_length_take_no_longer_than_the_limit(
    section: dict[str, Any], module: str, tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m3quant.runtime.draft_format.SECONDS", 0.2)
    folder = write_eagle3(tmp_path, quantization_config=section)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{module}.q_proj.weight"] = torch.zeros(2, 2, dtype=torch.bfloat16)
    write_draft(folder, json.loads((folder / "config.json").read_text()), tensors)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"config\.json: to compare its lists .* takes more than 0\.2 s"):
        open_draft(str(folder), family)
    assert time.monotonic() - began < 5


def test_the_section_is_read_wherever_an_engine_reads_it(tmp_path: Path, family: Family) -> None:
    folder = stored_as(tmp_path / "a", "fp8", FP8, key="compression_config")
    with pytest.raises(CheckpointError, match="says that it is quantized"):
        open_draft(str(folder), family)
    file = folder / "config.json"
    layer = json.loads(file.read_text())
    layer["quantization_config"] = layer.pop("compression_config")
    file.write_text(
        json.dumps({"speculators_model_type": "eagle3", "draft_vocab_size": 1024, "transformer_layer_config": layer})
    )
    with pytest.raises(CheckpointError, match="says that it is quantized"):
        open_draft(str(folder), family)
    folder = stored_as(tmp_path / "b", "fp8", None, *LINEARS)
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": ["fc"]}})
    )
    assert open_draft(str(folder), family).method == "eagle3"
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": [LINEARS[6]]}})
    )
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json says that 'midlayer.mlp.down_proj' is not"):
        open_draft(str(folder), family)


@pytest.mark.parametrize(
    ("section", "modules"),
    [({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, []), (FP8, LINEARS)],
)
def test_two_files_that_disagree_are_refused(
    section: dict[str, Any], modules: list[str], tmp_path: Path, family: Family
) -> None:
    folder = stored_as(tmp_path, "fp8", section, *modules)
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}})
    )
    with pytest.raises(
        CheckpointError,
        match=r"hf_quant_config\.json says nvfp4 .* is of another checkpoint\. Restore both from the release\.$",
    ):
        open_draft(str(folder), family)


def test_the_licence_is_said(tmp_path: Path, family: Family, draft: Draft) -> None:
    assert "it states no licence" in draft_notes(draft, VLLM, H200)[0]
    assert len(draft_notes(draft, VLLM, H200)) == 1 and "temperature 0" in draft_notes(draft, VLLM, CPU)[1]
    folder = write_eagle3(tmp_path)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: evaluation-only\n---\n")
    assert "the licence other evaluation-only" in draft_notes(open_draft(str(folder), family), VLLM, H200)[0]


def test_the_plan_counts_weights_cache_and_logits(draft: Draft) -> None:
    model, node = open_subject(str(M2)).stored, parse_node("2xH100")
    plain, with_it = assess(model, node, Ask(tp=2)), assess(model, node, Ask(tp=2, draft=draft))
    (before,), (after,) = plain.prediction.ranks, with_it.prediction.ranks
    assert after.weights == before.weights | {"draft": draft.rank_bytes(2)}
    assert after.bytes_per_token == before.bytes_per_token + 2 * 1 * 64 * 2
    logits = 4 * 32 * VOCABULARY * 4
    share = with_it.setup.memory.activation_range[1]
    more = share * (3 * logits + 3 * 8192 * HIDDEN * 2)
    assert after.activation.expected == pytest.approx(before.activation.expected + more, abs=2)
    assert after.graphs.expected > before.graphs.expected and with_it.pool.tokens < plain.pool.tokens


def test_the_draft_is_on_the_last_stage(draft: Draft) -> None:
    fit = assess(open_subject(str(M3)).stored, parse_node("2xH100"), Ask(tp=1, pp=2, draft=draft))
    first, last = fit.prediction.ranks
    assert fit.fits and "draft" not in first.weights and last.weights["draft"] == draft.rank_bytes(1)


@pytest.mark.parametrize(
    ("change", "node", "ask", "release", "message"),
    [
        ({}, "1xH200", {}, "0.24.0", ""),
        ({}, "1xH200", {}, "0.23.0", "older than 0.24.0, the first that is known to run EAGLE3 drafts"),
        ({"method": "dflash", "architecture": "DFlashDraftModel"}, "1xH200", {}, "0.26.0", "older than 0.32.0"),
        ({"method": "dspark", "architecture": "DSparkMiniMaxDraftModel"}, "1xH200", {}, None, "does not run the draft"),
        ({"method": "dspark", "architecture": "DSparkMiniMaxDraftModel"}, "1xH200", {}, "0.35.0", ""),
        ({}, "2xH100", {"tp": 1, "pp": 2}, None, "no hidden states of minimax_m2 over pipeline stages"),
        ({}, "cpu:1GiB", {}, None, ""),
        (
            {"method": "dflash", "architecture": "DFlashDraftModel"},
            "cpu:1GiB",
            {},
            None,
            "was not run on vLLM's CPU build",
        ),
        ({}, "1xH200", {"engine": "sglang"}, None, ""),
        ({"method": "dflash"}, "1xH200", {"engine": "sglang"}, None, "SGLang runs DFlash drafts on Blackwell"),
    ],
)
def test_what_an_engine_does_not_run_is_no_fit(
    draft: Draft, change: dict[str, Any], node: str, ask: dict[str, Any], release: str | None, message: str
) -> None:
    asked = Ask(**ask, draft=replace(draft, **change), release=release)
    fit = assess(open_subject(str(M2)).stored, parse_node(node), asked)
    assert fit.fits == (not message) and message in fit.why_not and fit.short == ("--draft" if message else "")
    changes = [remedy.change for remedy in remedies(fit)]
    assert fit.fits or "no --draft" in changes
    assert fit.fits or changes[0] == ("--tp 2 --pp 1" if fit.setup.split.pp > 1 else "no --draft")


def test_the_engine_is_given_the_draft(eagle3: Path, draft: Draft) -> None:
    def speculative(model: Path, **change: Any) -> dict[str, Any]:
        fit = assess(open_subject(str(model)).stored, parse_node("1xH200"), Ask(draft=replace(draft, **change)))
        words = VLLM.arguments(fit.serving)
        found: dict[str, Any] = json.loads(words[words.index("--speculative-config") + 1])
        return found

    plain = {"method": "eagle3", "model": str(eagle3), "num_speculative_tokens": 3}
    assert speculative(M2) == plain
    assert speculative(M3) == plain | {"attention_backend": "FLASH_ATTN"}
    assert speculative(M2, where="org/draft", revision="a" * 40) == plain | {"model": "org/draft", "revision": "a" * 40}
    sglang = assess(open_subject(str(M2)).stored, parse_node("1xH200"), Ask(draft=draft, engine="sglang")).serving
    text = " ".join(engine_named("sglang").arguments(sglang))
    assert f"--speculative-draft-model-path {eagle3} --speculative-num-steps 3" in text


def test_a_recipe_names_a_draft_and_the_context_leaves_its_slots(eagle3: Path, draft: Draft) -> None:
    def decided(node: str) -> Any:
        return prepare(
            str(M2),
            ServeRecipe(node=node, draft=str(eagle3), max_num_seqs=32),
            None,
            None,
            None,
            True,
            False,
            [].append,
        )

    (rank,) = assess(open_subject(str(M2)).stored, parse_node("1xH200"), Ask(draft=draft)).prediction.ranks
    cache = 5000 * 2**11  # of 2,048 bytes per token
    prepared = decided(f"1x{(rank.weight_bytes + rank.overhead.high + cache) / 0.92 / 2**30:.6f}GiB")
    assert "--speculative-config" in prepared.launch.command
    pool, needed = prepared.fit.pool, prepared.fit.context + prepared.fit.setup.draft_slots
    assert prepared.fit.context < 8192 and -(-needed // 128) + math.ceil(0.02 * pool.blocks) == pool.blocks - 1
    said: list[str] = []
    prepare(str(M2), ServeRecipe(node="cpu:1GiB", draft=str(eagle3)), None, None, None, True, False, said.append)
    assert any("unless the request says temperature 0" in line for line in said)


def test_plan_and_serve_take_a_draft(eagle3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M3QUANT_ENGINE_PYTHON", raising=False)
    words = ["serve", str(M2), "--on", "1xH200", "--draft", str(eagle3), "--dry-run", "--json"]
    decided = json.loads(CliRunner().invoke(cli, words, env={"M3QUANT_ENGINE_PYTHON": ""}).stdout)
    assert decided["draft"] == {"where": str(eagle3), "revision": None, "method": "eagle3", "tokens": 3, "licence": ""}
    done = CliRunner().invoke(cli, ["plan", str(M2), "--on", "1xH200", "--draft", str(eagle3), "--json"])
    shown = json.loads(done.stdout)
    assert shown["setup"]["draft"]["method"] == "eagle3" and "draft" in shown["ranks"][0]["weights"]
    done = CliRunner().invoke(cli, ["serve", str(M2), "--on", "1xH200", "--draft", str(eagle3), "--draft-tokens", "5", "--dry-run"])  # fmt: skip
    assert '"num_speculative_tokens": 5' in done.stdout and "it states no licence" in done.stderr
    wrong = CliRunner().invoke(cli, ["serve", str(M2), "--on", "1xH200", "--draft", str(M3), "--dry-run"])
    assert isinstance(wrong.exception, CheckpointError) and "describes no draft" in str(wrong.exception)
