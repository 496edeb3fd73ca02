"""The check in transformers: it loads the output with compressed-tensors, and computes the same as m3quant.

Weights are compared through the forward pass, in float32 and with more tokens than M3's block selection reads; activations are not rounded on either side.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.stream import nll
from ..checkpoint import Checkpoint
from ..planning.engine_kept import PASSED_THROUGH
from ..planning.plan import Plan
from ..planning.unit import PlannedTensor
from ..quant.reading import ConvertedReader
from .engine import prompts
from .verification import Check, Report

# Mean absolute difference of log-probs (nats). Two float32 passes over the same weights differ by 1e-6 to 1e-5 in the fixtures; an index
# projection that is left at its initial values makes 0.1 and more.
TOLERANCE = 1e-3
_COPIES = 2.5  # of the float32 weights in memory: the model, experts while they are joined, a layer of ours


class TransformersReader(ConvertedReader):
    """An output's weights as transformers holds them: integers of routed experts, which it decompresses with their BF16 scales, in BF16."""

    def _dense(self, planned: PlannedTensor, raw: Any) -> Tensor:
        dense = super()._dense(planned, raw)
        rounded = planned.scheme.kind == "int" and planned.role.kind == "routed_experts"
        return dense.bfloat16().float() if rounded else dense


def limits(plan: Plan) -> list[str]:
    """What transformers 5.24 does not read of such an output, one sentence each (integrations/compressed_tensors.py)."""
    if plan.recipe.format != "compressed-tensors":
        needs = "gptqmodel" if plan.recipe.format == "autoawq" else "its FP8 kernels, and a GPU for them"
        return [f"transformers reads format '{plan.recipe.format}' with {needs}: use --engine for this output"]
    if plan.recipe.native:
        return ["transformers has no NVFP4 for the joined experts of this model: use --engine for this output"]
    if not plan.quantization:
        return []
    found = []
    experts = {t.scheme for t in plan.tensors if t.role.kind == "routed_experts" and t.role.is_weight}
    if len(experts) > 1:
        found.append(f"routed experts in {len(experts)} schemes: transformers takes the first one's for all layers")
    for scheme in experts:
        if scheme.block:
            found.append(f"routed experts in {scheme}: transformers multiplies their FP8 by one scale a row")
        if scheme.kind == "int" and not scheme.symmetric:
            found.append(f"routed experts in {scheme}: transformers drops their zero points")
    for role in ("shared_experts", "dense_mlp"):
        joined = {t.scheme for t in plan.tensors if t.role.kind == role and t.role.joined}
        if any(not s.quantizes for s in joined) and any(s.kind == "int" for s in experts):
            found.append(
                f"{role} unquantized with integer experts: transformers looks for packed gate and up weights there"
            )
        if odd := [s for s in joined if s.block or (s.kind == "int" and not s.symmetric)]:
            found.append(f"{role} in {odd[0]}: transformers joins gate and up by rows, and what goes with them wrongly")
    return [f"{sentence}; use --engine for this output" for sentence in found]


def transformers_check(folder: Path, plan: Plan, say: Report) -> tuple[Check, dict[str, Any]]:
    """Load `folder` and compare log-probs of `engine.prompts`. What transformers does not read, or cannot hold here, is a problem."""
    import transformers

    title = f"transformers {transformers.__version__}"
    if problems := [*limits(plan), *_memory(plan)]:
        return Check("transformers", title, problems), {}
    tokens = prompts(plan, folder)
    say(f"transformers: {len(tokens)} prompts of {tokens.shape[1]} tokens ...")
    try:
        model, info = _load(folder)
    except (
        Exception
    ) as error:  # whatever transformers and compressed-tensors raise for a checkpoint that they cannot take
        sentence = " ".join(str(error).split())[:400]
        return Check("transformers", title, [f"it does not load the output ({type(error).__name__}: {sentence})"]), {}
    check = Check("transformers", title, list(_loading_problems(info, plan)))
    found = torch.cat([_logprobs(model, row) for row in tokens])
    del model
    reader = TransformersReader(
        Checkpoint.open(folder), {t.name: t for t in plan.tensors}, plan.recipe.format, torch.float32
    )
    ours = -nll(reader, tokens, "cpu", torch.float32, micro_batch=1)
    difference = (found - ours).abs()
    facts = {"tokens": difference.numel(), "mean": float(difference.mean()), "max": float(difference.max())}
    check.looked_at += f": log-probs of {facts['tokens']} tokens in float32, mean difference {facts['mean']:.2g} nats, largest {facts['max']:.2g}"
    if not facts["mean"] <= TOLERANCE:
        check.problems.append(
            f"its log-probs differ from the stored weights' by {facts['mean']:.3g} nats on average (allowed {TOLERANCE:g}): it reads "
            "something of this checkpoint wrongly"
        )
    return check, facts


def _memory(plan: Plan) -> list[str]:
    needed = _COPIES * 4 * sum(t.source.numel for t in plan.tensors)
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= held:
        return []
    return [
        f"in float32 the model needs about {needed / 1e9:,.0f} GB of memory here, and this machine has {held / 1e9:,.0f} GB: check a smaller "
        "model of the family, and this one with --engine"
    ]


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers

    sees = "vision_config" in Checkpoint.open(folder).config
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model: Any
    loaded: Any = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    model, info = loaded
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            scheme.input_activations = None
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.long))  # decompresses, in the dtypes of the scales
    return torch.nn.Module.float(model), info  # its own method refuses quantized models


def _loading_problems(info: dict[str, Any], plan: Plan) -> Iterable[str]:
    """Weights that it misses, does not know or finds misshapen; those that it drops by design are passed through for others."""
    passed = {t.module for t in plan.tensors if t.role.kind in PASSED_THROUGH}
    for key, what in (
        ("missing_keys", "misses"),
        ("unexpected_keys", "does not know"),
        ("mismatched_keys", "finds misshapen"),
    ):
        names = sorted(str(name) for name in info.get(key) or ())
        if key == "unexpected_keys":
            names = [name for name in names if name.rpartition(".")[0] not in passed and ".mtp." not in f".{name}"]
        if names:
            yield f"it {what} {len(names)} weights, first {names[0]}"


@torch.no_grad()
def _logprobs(model: Any, row: Tensor) -> Tensor:
    """Log-probs [1, L - 1] of the tokens 1.. of one prompt [L]."""
    scores: Tensor = model(input_ids=row[None]).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(-1, row[1:, None].to(torch.long)).T
