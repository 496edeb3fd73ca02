"""The check in an engine: it loads the output, accounts for every weight, and agrees with the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibration.corpus import load_documents, load_tokenizer, tokenize_windows
from ..calibration.stream import nll
from ..checkpoint import Checkpoint
from ..engines import Engine
from ..engines.probing import EngineReport, run_probe
from ..errors import CalibrationError
from ..planning.plan import Plan
from ..quant.reading import ConvertedReader
from ..running.device import pick_device
from ..schemes import Scheme, rounded_activations
from .verification import Check

PROMPTS = 2
SHORT_PROMPT = 512
# Mean absolute difference of log-probs (nats) above which the engine does not compute this checkpoint. Seen: 0.003-0.07 for
# BF16 and INT4 against float32, up to 0.15 with FP8 activations (which do not agree token by token, docs/verify.md); an
# unloaded or misread weight gives 1 and more.
TOLERANCE = 0.25


def prompt_length(plan: Plan) -> int:
    """Tokens of a prompt: half as long again as M3's selected blocks, so that the indexer decides; 512 without MSA."""
    longest = plan.family.max_positions or 4096
    selected = plan.family.selected_tokens
    return min(longest - 1, max(SHORT_PROMPT, selected * 3 // 2))


def prompts(plan: Plan, folder: Path) -> torch.Tensor:
    """Token ids [PROMPTS, length] of the bundled text; random ids where the checkpoint has no tokenizer."""
    length = prompt_length(plan)
    try:
        tokenizer = load_tokenizer(folder)
    except CalibrationError:
        vocabulary = plan.family.vocab_size
        return torch.randint(0, vocabulary, (PROMPTS, length), generator=torch.Generator().manual_seed(0))
    windows = tokenize_windows(load_documents(None), tokenizer, PROMPTS, length, seed=1)
    return torch.from_numpy(windows.ids)


def layer_schemes(plan: Plan, layer: int) -> dict[str, Scheme]:
    """The schemes of a layer's quantized weights by relative name."""
    prefix = plan.family.layer_prefix(layer)
    tensors = [tensor for unit in plan.units if unit.layer == layer for tensor in unit.tensors]
    return {t.name.removeprefix(prefix): t.scheme for t in tensors if t.action == "quantize"}


def engine_check(
    engine: Engine, folder: Path, plan: Plan, python: str | None, say: Callable[[str], None], **options: Any
) -> tuple[Check, dict[str, Any]]:
    """Load `folder` in the engine and compare. options go to `run_probe`. Raises VerifyError if there is no engine or it crashes."""
    tokens = prompts(plan, folder)
    say(f"engine: {PROMPTS} prompts of {tokens.shape[1]} tokens ...")
    report = run_probe(engine, folder, tokens.tolist(), python=python, **options)
    facts: dict[str, Any] = {
        engine.name: report.version,
        "torch": report.torch,
        "device": report.device,
        "parameters": report.parameters,
        "tensors": report.tensors,
        "kernels": report.kernels,
        "notes": report.notes,
        "skipped": report.skipped,
        "seconds": report.seconds,
    }
    check = Check(
        "engine",
        f"{engine.title} {report.version} on {report.device}: {report.parameters} parameters",
        report.problems(),
    )
    if not check.problems:
        _compare(folder, plan, tokens, report, check, facts)
    return check, facts


def _compare(
    folder: Path, plan: Plan, tokens: torch.Tensor, report: EngineReport, check: Check, facts: dict[str, Any]
) -> None:
    reader = ConvertedReader(Checkpoint.open(folder), {t.name: t for t in plan.tensors}, plan.recipe.format)
    device = pick_device("auto")
    reference = -nll(reader, tokens, device, torch.float32, micro_batch=1, schemes=partial(layer_schemes, plan))
    found = report.compare(reference.tolist())
    facts["logprob_difference"] = {"tokens": found.tokens, "mean": found.mean, "p99": found.p99, "max": found.max}
    rounded = rounded_activations(tensor.scheme for tensor in plan.tensors)
    check.looked_at += f"; log-probs against the dequantized weights in float32, activations {rounded}: {found}"
    if found.mean > TOLERANCE:
        check.problems.append(
            f"the engine's log-probs differ by {found.mean:.3f} nats on average (allowed {TOLERANCE}): its kernels or its "
            "reading of this checkpoint are wrong; try another moe_backend or vLLM release"
        )
