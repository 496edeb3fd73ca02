"""Draft models in vLLM: which releases run which, and what --speculative-config is given."""

from __future__ import annotations

import json
from typing import Any

from packaging.version import InvalidVersion, Version

from ...families import Family
from ..device import CPU, Gpu
from ..drafts import DFLASH, DSPARK, EAGLE3, Draft

NAME = "vllm"
# The oldest release that is known to have the method: EAGLE3 by vLLM's recipe for M3 (0.24.0), the others by the source of 0.32.
FIRST = {EAGLE3: "0.24.0", DFLASH: "0.32.0", DSPARK: "0.32.0"}
# model_executor/models/registry.py of 0.32, after transformers_utils/configs/eagle.py has renamed them.
ARCHITECTURES = {
    EAGLE3: (
        "Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3", "Eagle3MiniMaxM2ForCausalLM", "Eagle3Qwen3ForCausalLM",
        "Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekV3ForCausalLM",
    ),
    DFLASH: ("DFlashDraftModel", "DFlash2DraftModel"),
    DSPARK: ("Qwen3DSparkModel",),
}  # fmt: skip
NEWEST_READ = "0.33.0"
STAGES = "0.32.0"  # models/minimax_m3/nvidia/model.py: supports_aux_hidden_states_over_pp


def refusal(draft: Draft, family: Family, gpu: Gpu, pp: int, release: str | None) -> str:
    """Why it is not run, and what to do; '' where it is. release: of the engine installed, None for the newest that was read."""
    known = _version(release)
    first = FIRST[draft.method]
    if known is not None and known < Version(first):
        return f"vLLM {release} is older than {first}, the first that is known to run {draft.title} drafts: install a newer one, or leave --draft out"
    newer = (known is None and release is not None) or (known is not None and known > Version(NEWEST_READ))
    if draft.architecture not in ARCHITECTURES[draft.method] and not newer:
        return (
            f"vLLM {release or f'up to {NEWEST_READ}'} does not run the draft {draft.where} ({draft.architecture}): it has "
            f"{', '.join(ARCHITECTURES[draft.method])} for {draft.title}; leave --draft out, or take another draft"
        )
    if gpu.name == CPU and draft.method != EAGLE3:
        return f"{draft.title} was not run on vLLM's CPU build, EAGLE3 was: leave --draft out, or take an EAGLE3 draft"
    if pp > 1 and not family.in_engine(NAME).draft_over_stages:
        return f"vLLM hands no hidden states of {family.model_type} over pipeline stages, which a draft reads: use --pp 1, or leave --draft out"
    if pp > 1 and known is not None and known < Version(STAGES):
        return f"vLLM {release} hands no hidden states over pipeline stages, which a draft reads: use --pp 1, or install {STAGES} or newer"
    return ""


def sampling_fault(gpu: Gpu) -> str:
    """utils/cpu_triton_utils.py of 0.32 and 0.33, `_expand_kernel_impl`: temperatures, top_k and top_p of a batch with guesses are written to a
    converted copy that nobody reads. tests/engine/test_draft_engine.py shows it."""
    if gpu.name != CPU:
        return ""
    return (
        "with a draft vLLM's CPU build (0.32, 0.33) loses each request's temperature, top_k and top_p: its answers are noise and it may stop, "
        "unless the request says temperature 0"
    )


def _version(release: str | None) -> Version | None:
    """None too for a build that numbers itself in its own way: another message says that it was not checked."""
    try:
        return None if release is None else Version(release)
    except InvalidVersion:
        return None


def speculative_config(draft: Draft, family: Family) -> str:
    """The value of --speculative-config (config/speculative.py)."""
    settings: dict[str, Any] = {"method": draft.method, "model": draft.where, "num_speculative_tokens": draft.tokens}
    if draft.revision:
        settings["revision"] = draft.revision
    return json.dumps({**settings, **family.in_engine(NAME).draft_settings})
