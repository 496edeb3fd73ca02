"""vLLM's memory in addition to the weights: what all releases share, and the sets of memory.yaml, which has those that releases change."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any

from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field

from ...checkpoint.bounded import read_yaml
from ..device import GIB, MIB
from ..memory import Estimate, MemoryModel, Range, gib

CONSTANTS = Path(__file__).with_name("memory.yaml")

# Bytes of one cached element by --kv-cache-dtype (vLLM 0.33 config/cache.py). 'auto' is resolved first, from the checkpoint.
KV_BYTES = {"bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}
INDEX_BYTES = {"bfloat16": 2, "fp8": 1}
# Spellings of command lines, logs and torch.
_KV_ALIASES = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float8_e4m3fn": "fp8_e4m3", "fp8_e4m3fn": "fp8_e4m3", "e4m3": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2", "e5m2": "fp8_e5m2",
}  # fmt: skip
_INDEX_ALIASES = {
    **_KV_ALIASES,
    "auto": "bfloat16",
    "none": "bfloat16",
    "fp8_e4m3": "fp8",
    "fp8_e4m3fn": "fp8",
    "float8_e4m3fn": "fp8",
}
# Caches that engines have and whose bytes are not modelled: their scales are next to the codes, or their layout is of other models.
UNMODELLED_CACHES = (
    "fp8_ds_mla", "nvfp4", "nvfp4_4over6", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head", "mxfp4", "turboquant_*",
)  # fmt: skip
DEFAULT_UTILIZATION = 0.92  # vLLM 0.26 to 0.33 config/cache.py
DEFAULT_BATCHED_TOKENS = 8192  # what vLLM's API server takes on H100 and H200 (engine/arg_utils.py)
DEFAULT_NUM_SEQS = 32  # m3quant's own: vLLM's 1024 reserve graphs and sampler memory that one node's KV cannot use
BLOCK_SIZE = 128  # M3's kernels accept no other; M2 takes it too

LARGE_GPU = (
    160 * GIB
)  # from here vLLM captures up to 1024 sequences and takes 16,384 tokens per step (engine/arg_utils.py)
HIDDEN_COPIES = 4  # residual, normed input, attention output and MoE output of one layer
SAMPLER_COPIES = 4  # float32 logits, their sorted copy, probabilities and a mask
VISION_COPIES = 4  # residual, normed input, attention output and one more of a vision layer
VISION_RANGE = (0.4, 1.0, 2.5)
VISION_TOKENS = 8192  # a video's: the encoder's budget is at least one item (log of M3 on two B200)
CAPTURED, CAPTURED_LARGE = 512, 1024

# Humming, which alone runs widths other than 4 and 8, keeps a zero point in so many bits at least (humming/utils/smem.py: zp_bits).
LEAST_ZERO_POINT_BITS = 4


class _Range(BaseModel):
    model_config = ConfigDict(extra="forbid")

    gib: Range
    evidence: str

    @property
    def estimate(self) -> Estimate:
        return gib(*self.gib, self.evidence)


class _Workspace(BaseModel):
    model_config = ConfigDict(extra="forbid")

    per_token_kib: Annotated[int, Field(ge=0)]
    evidence: str


class _Graphs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    base_gib: float
    per_size_mib: tuple[float, float]
    evidence: str


class _Activation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    factors: Range
    evidence: str


class _Release(BaseModel):
    """One set of the file, completed by those before it."""

    model_config = ConfigDict(extra="forbid")

    first: str
    non_torch_one: _Range
    non_torch_many: _Range
    non_torch_wide: _Range
    workspace: _Workspace
    graphs: _Graphs
    activation: _Activation

    @property
    def model(self) -> MemoryModel:
        return MemoryModel(
            kv_bytes=KV_BYTES,
            index_bytes=INDEX_BYTES,
            kv_aliases=_KV_ALIASES,
            index_aliases=_INDEX_ALIASES,
            unmodelled_caches=UNMODELLED_CACHES,
            utilization=DEFAULT_UTILIZATION,
            batched_tokens=DEFAULT_BATCHED_TOKENS,
            num_seqs=DEFAULT_NUM_SEQS,
            block_size=BLOCK_SIZE,
            least_zero_point_bits=LEAST_ZERO_POINT_BITS,
            non_torch_one=self.non_torch_one.estimate,
            non_torch_many=self.non_torch_many.estimate,
            non_torch_wide=self.non_torch_wide.estimate,
            non_torch_per_token=self.workspace.per_token_kib * 1024,
            non_torch_per_token_evidence=self.workspace.evidence,
            graphs_base=int(self.graphs.base_gib * GIB),
            graphs_per_size=int(self.graphs.per_size_mib[0] * MIB),
            graphs_per_size_most=int(self.graphs.per_size_mib[1] * MIB),
            graphs_evidence=self.graphs.evidence,
            large_gpu=LARGE_GPU,
            captured=CAPTURED,
            captured_large=CAPTURED_LARGE,
            activation_range=self.activation.factors,
            activation_evidence=self.activation.evidence,
            hidden_copies=HIDDEN_COPIES,
            sampler_copies=SAMPLER_COPIES,
            vision_copies=VISION_COPIES,
            vision_range=VISION_RANGE,
            vision_tokens=VISION_TOKENS,
        )


@cache
def memory_models() -> tuple[tuple[Version, MemoryModel], ...]:
    """(first release, constants), oldest first."""
    known, models = dict[str, Any](), list[tuple[Version, MemoryModel]]()
    for stated in read_yaml(CONSTANTS, "memory constants")["releases"]:
        known |= stated
        release = _Release.model_validate(known)
        models.append((Version(release.first), release.model))
    return tuple(models)


def memory_of(release: str | None) -> MemoryModel:
    """The constants of a release: None, one newer than all, or a build without a number of its own has the newest set; one older than all the oldest."""
    models = memory_models()
    try:
        version = Version(release) if release is not None else models[-1][0]
    except InvalidVersion:
        version = models[-1][0]
    # A release candidate or a build (0.32.0rc1, 0.32.0+cpu) counts as its release.
    return next((model for first, model in reversed(models) if first <= Version(version.base_version)), models[0][1])
