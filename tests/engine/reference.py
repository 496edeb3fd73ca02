"""Log-probs of prompts from transformers in float32: what an engine's numbers are compared with."""

from __future__ import annotations

import json
from pathlib import Path

import torch


@torch.no_grad()
def reference_logprobs(folder: Path, prompts: list[list[int]]) -> tuple[list[list[float]], list[list[int]]]:
    """(log-probs of tokens 1.., most likely ids) of each prompt under the unquantized checkpoint in `folder`."""
    import transformers

    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    kind = transformers.AutoModelForCausalLM if model_type == "minimax_m2" else transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    logprobs, top1 = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        logprobs.append(scores.gather(-1, ids[0, 1:, None])[:, 0].tolist())
        top1.append(scores.argmax(-1).tolist())
    return logprobs, top1
