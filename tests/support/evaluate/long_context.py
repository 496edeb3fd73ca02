"""What the long-context tests share: the fixtures' tokenizers and texts, and predictions from transformers."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from m3quant.calibration.corpus import load_tokenizer
from m3quant.evaluate.task import Predictions, ScoredSequence
from tests.support.paths import FIXTURES

TEXT = (FIXTURES / "heldout.txt").read_text()


@cache
def config(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "config.json").read_text())


@cache
def tokenizer(name: str) -> Any:
    return load_tokenizer(FIXTURES / name)


@cache
def model(name: str) -> Any:
    """The fixture in transformers, float32, eager attention."""
    kind = AutoModelForCausalLM if name == "tiny-m2" else AutoModelForImageTextToText
    return kind.from_pretrained(FIXTURES / name, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def teacher_forced(name: str, sequences: list[ScoredSequence]) -> list[Predictions]:
    """One forward pass per sequence, whole logits: the plain reference of what the streaming pass hands to tasks."""
    out = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.ids.copy())[None]
        logits = model(name)(input_ids=ids).logits[0, torch.from_numpy(sequence.scored) - 1].float()
        truth = ids[0, torch.from_numpy(sequence.scored)]
        nll = torch.nn.functional.cross_entropy(logits, truth, reduction="none")
        out.append(Predictions(nll.numpy(), logits.argmax(-1).numpy().astype(np.int64)))
    return out


@torch.no_grad()
def generated(name: str, prompt: np.ndarray, count: int) -> list[int]:
    """transformers' own greedy decoding with its cache: `count` tokens after the prompt."""
    ids = torch.from_numpy(prompt)[None]
    # eos_token_id None: an end-of-text token must not cut the comparison short.
    done = model(name).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return done[0, len(prompt) :].tolist()
