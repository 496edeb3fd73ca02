"""SGLang: serves as planned. Its log is not compared with the plan, and it has no guard and no loading probe here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...families import Family
from ...schemes import Scheme
from ..base import Capabilities, Engine, Launch, Serving, StartOptions
from ..device import Gpu
from ..drafts import EAGLE3, Draft
from ..failures import ARCHITECTURE, ARGUMENTS, CHECKPOINT, NO_GPU, OUT_OF_MEMORY, PORT, QUANTIZATION, SETTINGS
from ..installed import Installed
from ..integers import is_narrow
from ..memory import MemoryModel
from ..vllm.memory import memory_models
from . import experts

_KV_DTYPES = {"fp8": "fp8_e4m3"}  # where SGLang's name differs


class SGLang(Engine):
    name = "sglang"
    title = "SGLang"
    argument_files = ("srt/server_args.py",)
    # What 0.5.17 and 0.5.23 find for every module of m3quant's outputs: docs/engines.md; zero points: sglang#27690.
    can: ClassVar[Capabilities] = Capabilities(no_zero_points="SGLang without its pull request 27690 stops at them too")
    sentences = (OUT_OF_MEMORY, PORT, NO_GPU, ARCHITECTURE, QUANTIZATION, CHECKPOINT, SETTINGS, ARGUMENTS)

    def memory_of(self, release: str | None) -> MemoryModel:
        """Not measured: vLLM's widest."""
        return memory_models()[0][1]

    def checkpoint_refusal(self, config: Mapping[str, Any], release: str | None) -> str:
        return experts.refusal(config)

    def expert_refusal(self, scheme: Scheme) -> str:
        return (
            f"routed_experts cannot be {scheme}: SGLang reads integers of 4 and 8 bits only."
            if is_narrow(scheme)
            else ""
        )

    def draft_refusal(self, draft: Draft, family: Family, gpu: Gpu, pp: int, release: str | None) -> str:
        """0.5.23 asks for a Blackwell before DFlash and DSpark (arg_groups/speculative_hook.py)."""
        if draft.method == EAGLE3:
            return (
                ""
                if pp == 1
                else "SGLang is not given a draft over pipeline stages here: use --pp 1, or leave --draft out"
            )
        return f"SGLang runs {draft.title} drafts on Blackwell GPUs alone, and was not tried: leave --draft out, or use --engine vllm"

    def plain_command(self, where: str) -> list[str]:
        return [*_program(None), "--model-path", where]

    def arguments(self, serving: Serving) -> list[str]:
        """The pool is set by --mem-fraction-static, which counts weights and cache but no activations."""
        out = ["--context-length", str(serving.context)]
        out += ["--tp-size", str(serving.tp), "--max-running-requests", str(serving.max_num_seqs)]
        out += ["--chunked-prefill-size", str(serving.max_num_batched_tokens)]
        out += ["--mem-fraction-static", f"{serving.static_fraction:.3f}"]
        if serving.pp > 1:
            out += ["--pp-size", str(serving.pp)]
        if serving.expert_parallel:
            out += ["--ep-size", str(serving.tp)]
        if serving.kv_dtype.startswith("fp8"):
            out += ["--kv-cache-dtype", _KV_DTYPES.get(serving.kv_dtype, serving.kv_dtype)]
        if serving.draft is not None:
            out += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", serving.draft.where]
            out += ["--speculative-num-steps", str(serving.draft.tokens), "--speculative-eagle-topk", "1"]
            out += ["--speculative-num-draft-tokens", str(serving.draft.tokens + 1)]
            if serving.draft.revision:
                out += ["--speculative-draft-model-revision", serving.draft.revision]
        return [*out, *experts.flags(serving.config), *serving.family.in_engine(self.name).flags]

    def launch(self, serving: Serving, options: StartOptions, installed: Installed | None) -> Launch:
        arguments = ["--model-path", serving.where, *self.arguments(serving)]
        arguments += ["--host", options.host, "--port", str(options.port), *options.extra]
        notes = ["SGLang has no m3quant guard: put a limit on prompt and max_tokens in front of it, or use vLLM"]
        if options.api_key_env:
            notes.append(
                f"SGLang takes its API key only as an argument: add --api-key with the value of {options.api_key_env}, where other users cannot list processes"
            )
        if serving.index_dtype != "bfloat16":
            notes.append("SGLang's index cache dtype was not set: its flag is not known here")
        return Launch(_program(installed), arguments, {}, frozenset(), notes)


def _program(installed: Installed | None) -> list[str]:
    return [installed.python if installed else "python3", "-m", "sglang.launch_server"]
