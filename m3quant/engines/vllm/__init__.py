"""vLLM: the engine for which m3quant plans, which it serves with behind its guard, and which it uses to verify a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from packaging.version import InvalidVersion, Version

from ...errors import EngineMissing
from ...families import Family
from ...families.spec import SWIGLUOAI
from ...schemes import Scheme
from ..base import Capabilities, Engine, Launch, LoadingProbe, Serving, StartOptions, precedes
from ..bench import BenchRun, Measured
from ..device import CPU, Gpu
from ..drafts import Draft
from ..installed import Installed
from ..integers import is_narrow, names
from ..memory import MemoryModel
from ..offload import Offload
from ..stated import quantization_of
from . import bench, command, drafts
from .failures import KERNEL, NO_MEMORY, PREFIX, SENTENCES
from .log import VllmLog
from .lookup import lookup_problems
from .memory import memory_of
from .offload import refusal as refuse_offload
from .probe_facts import PROBE, probe_facts

NEWEST_READ = "0.33.0"


class Vllm(Engine):
    name = command.NAME
    title = "vLLM"
    argument_files = ("engine/arg_utils.py", "entrypoints/**/cli_args.py")
    # Widths that do not divide 32, and 2 bits, are read by one kernel library only, Humming (fused_moe/oracle/int_wna16.py,
    # kernels/linear/mixed_precision/humming.py). Read in the wheels of 0.26 to 0.33; 2, 3 and 4 bits were run with 0.33 on an H200.
    can: ClassVar[Capabilities] = Capabilities(
        read=("0.24.0", "0.34.0"),  # from the first with M3 to before the first whose source was not read
        narrow_integers="0.29.0",
        narrow_integers_by="on an NVIDIA GPU reads this width (by Humming's kernels, compiled at the first start)",
        fp8_index="0.32.0",  # the oldest release read that has it; 0.26 has not
        # vllm#44025 (Marlin only; 0.28.0rc2 still asserts for every other kernel), vllm#39980 (0.19.0)
        no_zero_points='vLLM without pull request 44025 (0.19 and 0.22.1 among them) stops at "Only symmetric quantization is supported '
        'for MoE"; 0.28 still does where Marlin is not used (other devices than NVIDIA GPUs, VLLM_BATCH_INVARIANT=1)',
    )
    sentences = SENTENCES
    log_prefix = PREFIX
    log = VllmLog()
    probe = LoadingProbe(PROBE, probe_facts, NO_MEMORY, KERNEL)
    has_guard = True
    takes_pin = True
    has_bench = True

    def memory_of(self, release: str | None) -> MemoryModel:
        return memory_of(release)

    def checkpoint_refusal(self, config: Mapping[str, Any], release: str | None) -> str:
        """quant_method mxfp8 makes its ModelOptMxFp8Config, which knows no moe_quant_algo: packed experts match no parameter."""
        section = quantization_of(config)
        experts = section.get("moe_quant_algo")
        if str(section.get("quant_method")).lower() != "mxfp8" or not experts or str(experts).upper() == "MXFP8":
            return ""
        try:
            newer = release is not None and Version(release) > Version(NEWEST_READ)
        except InvalidVersion:
            newer = True  # a build of its own: another message says that it was not checked
        if newer:
            return ""
        return (
            f"vLLM {release or f'up to {NEWEST_READ}'} does not load MXFP8 with {str(experts)[:40]} experts (moe_quant_algo; MiniMax-M3.1-Flash as "
            "released): convert it (--to native keeps its weights, --to awq makes it smaller), take a newer vLLM, or serve the release with SGLang 0.5.23 or newer"
        )

    def draft_refusal(self, draft: Draft, family: Family, gpu: Gpu, pp: int, release: str | None) -> str:
        return drafts.refusal(draft, family, gpu, pp, release)

    def batch_refusal(self, sequences: int, tokens: int) -> str:
        """config/scheduler.py: verify_max_model_len."""
        if tokens >= sequences:
            return ""
        return f"vLLM refuses more requests at once ({sequences:,}) than a step has tokens ({tokens:,}): give --max-num-batched-tokens {sequences} or more, or fewer requests"

    def offload_refusal(self, offload: Offload) -> str:
        return refuse_offload(offload)

    def draft_sampling_fault(self, draft: Draft, gpu: Gpu) -> str:
        return drafts.sampling_fault(gpu)

    def expert_refusal(self, scheme: Scheme) -> str:
        if not is_narrow(scheme) or scheme.group_size is not None:
            return ""
        asym = "" if scheme.symmetric else "-asym"
        return (
            f"routed_experts cannot be {scheme}: the engines' only MoE kernel for {scheme.bits} bits takes scales of groups, not of "
            f"rows; --set routed_experts=int{scheme.bits}-g128{asym}."
        )

    def expert_notes(self, experts: Collection[Scheme]) -> tuple[str, ...]:
        notes = []
        if symmetric := sorted((s for s in experts if is_narrow(s) and s.symmetric), key=str):
            notes.append(
                f"{names(symmetric)}: Humming 0.1.19, which vLLM 0.33 brings, unpacks a whole layer of symmetric experts while loading "
                "(24 GB more for a moment with M3's shapes, 3 GB with zero points): prefer "
                f"{', '.join(f'{scheme}-asym' for scheme in symmetric)}, or install Humming 0.1.20"
            )
        if rows := names(s for s in experts if s.kind == "int" and s.group_size is None):
            notes.append(
                f"{rows}: vLLM 0.32 and newer run integer experts on Hopper by Humming, whose MoE kernel takes no scales of rows: "
                "serve with --moe-backend marlin, or use groups"
            )
        return tuple(notes)

    def activation_notes(self, family: Family, experts: Collection[Scheme], fmt: str) -> tuple[str, ...]:
        swigluoai = family.moe is not None and family.moe.activation.kind == SWIGLUOAI
        if swigluoai and fmt == "compressed-tensors" and any(scheme.kind == "fp8" for scheme in experts):
            return (
                "FP8 routed experts of M3 need a vLLM that hands swiglu_alpha and swiglu_beta to its FP8 experts: 0.32 does, "
                "0.26 does not and answers with wrong numbers (docs/verify.md)",
            )
        return ()

    def lookup_problems(
        self, family: Family, quantization: Mapping[str, Any], modules: Mapping[str, Scheme]
    ) -> list[str]:
        return lookup_problems(family, quantization, modules)

    def check_index(self, installed: Installed, serving: Serving) -> None:
        asked = serving.family.kv_geometry.index_layers > 0 and serving.index_dtype != "bfloat16"
        if asked and (why := self.index_refusal(serving.gpu, installed.version)):
            raise EngineMissing(f"{why}.")

    def index_refusal(self, gpu: Gpu, release: str | None) -> str:
        """0.26's models/minimax_m3/common/indexer.py refuses FP8 index keys off SM100, 0.32's takes them wherever CUDA has FP8."""
        first = self.can.fp8_index
        if first is None or gpu.generation == "blackwell" or (gpu.name != CPU and not precedes(release, first)):
            return ""
        return f"vLLM {release or ''}".rstrip() + (
            f" keeps M3's index keys in BF16 on this device: leave --index-dtype out, or install {first} or newer on a GPU"
        )

    def plain_command(self, where: str) -> list[str]:
        return [*command.PROGRAM, where]

    def arguments(self, serving: Serving) -> list[str]:
        return command.arguments(serving)

    def launch(self, serving: Serving, options: StartOptions, installed: Installed | None) -> Launch:
        return command.launch(serving, options, installed)

    def bench_command(self, installed: Installed) -> list[str]:
        return bench.bench_command(installed.python)

    def bench_arguments(self, run: BenchRun) -> list[str]:
        return bench.bench_arguments(run)

    def bench_texts(self, texts: Sequence[str]) -> str:
        return bench.bench_texts(texts)

    def read_bench(self, document: Mapping[str, Any], run: BenchRun) -> Measured:
        return bench.read_bench(document, run)

    def image(self, release: str | None) -> str | None:
        """Tags are published for releases; the CPU's or CUDA's build of one (0.32.0+cpu) has the same number."""
        try:
            version = Version(release or NEWEST_READ)
        except InvalidVersion:
            return None
        return None if version.is_devrelease else f"vllm/vllm-openai:v{version.public}"
