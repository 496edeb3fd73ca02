"""Greedy answers of checkpoints with and without a draft, in vLLM's own Python. Run as a script by test_draft_engine.py:

    with_draft.py REQUEST.json ANSWER.json

REQUEST: draft, guesses, output (tokens of an answer), prompts (token ids), checkpoints. ANSWER: for each checkpoint the answers both ways,
and what vLLM's counters say of the steps with the draft.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def answers(checkpoint: str, request: dict[str, Any], draft: bool) -> tuple[list[list[int]], dict[str, int]]:
    guesses = {"method": "eagle3", "model": request["draft"], "num_speculative_tokens": request["guesses"]}
    llm = LLM(checkpoint, dtype="float32", max_model_len=512, max_num_seqs=8, block_size=128, enforce_eager=True, disable_log_stats=False,
              kv_cache_memory_bytes=2**27,
              speculative_config=guesses if draft else None)  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=request["output"], ignore_eos=True)
    found = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling)
    counters = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode") and hasattr(metric, "value")
    }
    llm.llm_engine.engine_core.shutdown()
    return [list(one.outputs[0].token_ids) for one in found], counters


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for checkpoint in request["checkpoints"]:
        plain, _ = answers(checkpoint, request, draft=False)
        guessed, counters = answers(checkpoint, request, draft=True)
        found[checkpoint] = {"plain": plain, "guessed": guessed, "counters": counters}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
