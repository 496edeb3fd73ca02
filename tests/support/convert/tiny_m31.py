"""A tiny MiniMax-M3.1-Flash, or a tiny nvidia/MiniMax-M3-NVFP4, made of the trained tiny-m3 in a few seconds.

    python -m tests.support.convert.tiny_m31 OUT [--layout native|modelopt]

native: as MiniMax releases M3.1: routed experts in NVFP4 under compressed-tensors' names, the other linears of the language model in MXFP8, an
indexer in every layer, a draft in dspark/. modelopt: as nvidia writes M3: the same mixture under ModelOpt's names, M3's layers.
An indexer that is not there is made of the attention's own projections: its queries are the mean of a group's query heads, its key is the
mean of the key heads, so that it chooses the blocks that attention looks at. The same OUT has the same bytes every time.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.convert.common import config_of, stored
from tests.support.convert.fp4_sources import mxfp8, nvfp4_modelopt, nvfp4_packed
from tests.support.convert.sources import is_linear, write_parts
from tests.support.paths import FIXTURES

TINY_M3 = FIXTURES / "tiny-m3"
BODY = "language_model.model.layers."
LICENCE = "Licence text of a tiny model made for tests. It is carried over as it is.\n"
Tensors = dict[str, torch.Tensor]


def make(folder: Path, layout: str = "native", source: Path = TINY_M3) -> tuple[Path, Path]:
    """Write the checkpoint, and next to it (FOLDER-dense) the BF16 one with the same values. Returns both folders."""
    tensors, config = stored(source), config_of(source)
    if layout == "native":
        tensors, config = with_indexers(tensors, config)
    experts = nvfp4_packed if layout == "native" else nvfp4_modelopt
    parts: dict[str, Tensors] = {"a": {}, "b": {}, "experts": {}}
    dense: Tensors = {}
    listed: dict[str, dict[str, Any]] = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        module = name.removesuffix(".weight")
        if not is_linear(name):
            parts["ab"[number % 2]][name] = dense[name] = tensor
        elif ".experts." in name:
            made, dense[name] = experts(module, tensor)
            parts["experts"] |= made
            listed[module] = {"quant_algo": "NVFP4", "group_size": 16}
        else:
            made, dense[name] = mxfp8(module, tensor)
            parts["ab"[number % 2]] |= made
            listed[module] = {"quant_algo": "MXFP8"}
    section = native_section(config) if layout == "native" else modelopt_section(listed)
    write_parts(folder, {**config, "quantization_config": section}, parts)
    plain = write_parts(folder.with_name(f"{folder.name}-dense"), config, {"all": dense})
    for path in source.iterdir():
        if (
            path.suffix in (".jinja", ".json")
            and path.name not in ("config.json", "figures.json")
            and "index" not in path.name
        ):
            shutil.copy(path, folder / path.name)
            shutil.copy(path, plain / path.name)
    if layout == "native":
        (folder / "LICENSE").write_text(LICENCE, encoding="utf-8")
        write_draft(folder / "dspark", config)
    else:
        document = {"producer": {"name": "modelopt"}, "quant_method": "modelopt", "quantization": section}
        (folder / "hf_quant_config.json").write_text(json.dumps(document), encoding="utf-8")
    return folder, plain


def with_indexers(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Sparse attention in every layer."""
    text = {**config["text_config"]}
    layers, heads, groups = text["num_hidden_layers"], text["num_attention_heads"], text["num_key_value_heads"]
    sparse = {**text["sparse_attention_config"]}
    sparse["sparse_attention_freq"] = sparse["sparse_disable_index_value"] = [1] * layers
    text["sparse_attention_config"] = sparse
    found, dim, hidden = dict(tensors), sparse["sparse_index_dim"], text["hidden_size"]
    for layer in range(layers):
        own = f"{BODY}{layer}.self_attn."
        if f"{own}index_q_proj.weight" in found:
            continue
        queries = tensors[f"{own}q_proj.weight"].float().view(groups, heads // groups, dim, hidden).mean(1)
        keys = tensors[f"{own}k_proj.weight"].float().view(groups, dim, hidden).mean(0)
        found[f"{own}index_q_proj.weight"] = queries.reshape(groups * dim, hidden).bfloat16()
        found[f"{own}index_k_proj.weight"] = keys.bfloat16()
        for which in "qk":
            found[f"{own}index_{which}_norm.weight"] = tensors[f"{own}{which}_norm.weight"].clone()
    return found, {**config, "text_config": text}


def native_section(config: dict[str, Any]) -> dict[str, Any]:
    freq = config["text_config"]["moe_layer_freq"]
    gates = [f"{BODY}{layer}.block_sparse_moe.gate" for layer, moe in enumerate(freq) if moe]
    return {
        "quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32], "moe_quant_algo": "NVFP4",
        "moe_quant_format": "nvfp4-pack-quantized", "group_size": 16, "kv_cache_quant_algo": "FP8", "attention_quant_algo": "FP8",
        "index_k_quant_type": "nvfp4",
        "ignored_layers": ["lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp", *gates],
    }  # fmt: skip


def modelopt_section(listed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "quant_algo": "MIXED_PRECISION", "quant_method": "modelopt", "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp"],
        "quantized_layers": listed,
    }  # fmt: skip


def write_draft(folder: Path, config: dict[str, Any]) -> None:
    """What stands for a DSpark draft: its config and one file of weights, which nothing here reads."""
    folder.mkdir()
    hidden = config["text_config"]["hidden_size"]
    draft = {
        "architectures": ["DSparkMiniMaxDraftModel"],
        "dspark_block_size": 8,
        "quantization_config": {"quant_method": "mxfp8"},
    }
    (folder / "config.json").write_text(json.dumps(draft), encoding="utf-8")
    weights = torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(31)).bfloat16()
    save_file(
        {"language_model.model.dspark.fc.weight": weights}, folder / "model.safetensors", metadata={"format": "pt"}
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for one another
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=("native", "modelopt"), default="native")
    arguments = parser.parse_args()
    for made in make(arguments.out, arguments.layout):
        print(made)
