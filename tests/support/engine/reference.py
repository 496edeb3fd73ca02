"""What a quantized checkpoint's numbers are, and what transformers computes with them in float32.

The stored formats are recognised by their tensors' names and shapes alone, and integers are unpacked by compressed-tensors: nothing of m3quant takes part.

    python reference.py REFERENCE.json PROMPTS.json FOLDER...      # for gpu_check.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an AutoAWQ word holds this column of 8


def dequantize(stored: Tensors) -> Tensors:
    """Float32 weights of all linears in `stored`, whatever their format; other tensors as they are."""
    plain: Tensors = {}
    for name, value in stored.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            plain[f"{module}.weight"] = _packed(stored, module)
        elif suffix == "qweight":
            plain[f"{module}.weight"] = _awq(stored, module)
        elif suffix == "weight" and value.dtype == torch.float8_e4m3fn:
            plain[name] = _fp8(value, stored.get(f"{module}.weight_scale", stored.get(f"{module}.weight_scale_inv")))
        elif suffix not in PARTS:
            plain[name] = value
    return plain


PARTS = {"weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point", "qzeros", "scales"}


def _packed(stored: Tensors, module: str) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    words, scale = stored[f"{module}.weight_packed"], stored[f"{module}.weight_scale"].float()
    other = module.replace("up_proj", "gate_proj")  # which states the shape where the two are joined
    shape = torch.Size(stored.get(f"{module}.weight_shape", stored.get(f"{other}.weight_shape")).tolist())
    bits = 32 * words.shape[1] // shape[1]
    codes = unpack_from_int32(words, bits, shape).float().unflatten(1, (scale.shape[1], -1))
    zero = stored.get(f"{module}.weight_zero_point")
    if zero is not None:
        codes = codes - unpack_from_int32(zero, bits, scale.shape, packed_dim=0).float().unsqueeze(-1)
    return (codes * scale.unsqueeze(-1)).flatten(1)


def _fp8(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    assert scale is not None, "an FP8 weight without its scale"
    rows, columns = weight.shape
    if tuple(scale.shape) != (rows, 1):
        scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return weight.float() * scale.float()


def _awq(stored: Tensors, module: str) -> torch.Tensor:
    def nibbles(words: torch.Tensor) -> torch.Tensor:
        codes = (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
        columns = torch.empty_like(codes)
        columns[..., list(AWQ_COLUMNS)] = codes
        return columns.flatten(-2).float()

    scale = stored[f"{module}.scales"].float()  # [groups, N]
    codes = nibbles(stored[f"{module}.qweight"]).unflatten(0, (scale.shape[0], -1))
    return ((codes - nibbles(stored[f"{module}.qzeros"]).unsqueeze(1)) * scale.unsqueeze(1)).flatten(0, 1).T


def write_dequantized(folder: Path, output: Path, dtype: torch.dtype | None = None) -> Path:
    """The checkpoint in `folder` as an unquantized one. Returns `output`.

    dtype: of the weights that were quantized, all else as it is stored; None: everything in float32.
    """
    stored: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        stored |= load_file(shard)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    output.mkdir(parents=True, exist_ok=True)
    tensors = dequantize(stored)
    for name, value in tensors.items():
        if dtype is None or value is not stored.get(name):
            tensors[name] = value.to(dtype or torch.float32).contiguous()
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    (output / "config.json").write_text(json.dumps(config))
    return output


@torch.no_grad()
def reference_logprobs(folder: Path, prompts: list[list[int]]) -> tuple[list[list[float]], list[list[int]]]:
    """(log-probs of tokens 1.., most likely ids) of each prompt under the unquantized checkpoint in `folder`, in float32."""
    import transformers

    sees = "vision_config" in json.loads((folder / "config.json").read_text())
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    logprobs, top1 = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        logprobs.append(scores.gather(-1, ids[0, 1:, None])[:, 0].tolist())
        top1.append(scores.argmax(-1).tolist())
    return logprobs, top1


def main(output: str, prompts_file: str, *folders: str) -> None:
    prompts = json.loads(Path(prompts_file).read_text())
    references = {}
    for folder in map(Path, folders):
        with tempfile.TemporaryDirectory() as scratch:
            logprobs, top1 = reference_logprobs(write_dequantized(folder, Path(scratch)), prompts)
        references[folder.name] = {"logprobs": logprobs, "top1": top1}
        print(folder.name, "tokens", sum(map(len, logprobs)))
    Path(output).write_text(json.dumps({"prompts": prompts, "references": references}))


if __name__ == "__main__":
    main(*sys.argv[1:])
