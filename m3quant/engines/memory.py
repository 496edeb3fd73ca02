"""What an engine takes of a rank's memory in addition to the weights: the constants that `runtime.memory` computes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from .device import GIB


@dataclass(frozen=True)
class Estimate:
    """A quantity that no header states: bytes expected, and the least and most seen or thought possible."""

    low: int
    expected: int
    high: int
    source: str

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.low + other.low,
            self.expected + other.expected,
            self.high + other.high,
            f"{self.source}; {other.source}",
        )

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def gib(low: float, expected: float, high: float, source: str) -> Estimate:
    return Estimate(int(low * GIB), int(expected * GIB), int(high * GIB), source)


Range = tuple[float, float, float]  # low, expected, high


@dataclass(frozen=True)
class MemoryModel:
    """An engine's own constants. Sizes in bytes; each value's source is a comment in the engine's file.

    kv_bytes, index_bytes: bytes of one cached element by the name of its dtype; *_aliases: other spellings of those names.
    unmodelled_caches: patterns of dtypes that the engine has and whose bytes are not known here.
    utilization, batched_tokens, num_seqs, block_size: the engine's settings by default.
    least_zero_point_bits: of one zero point of routed experts as the engine keeps it, where the checkpoint has fewer.
    non_torch_*: buffers in addition to torch's tensors, on one rank, on up to four and on more; per_token: for each token of a step above
    batched_tokens.
    graphs_*: CUDA graphs, by captured batch sizes; captured, captured_large: the most of them, the latter from large_gpu on.
    *_copies: tensors of a step alive at once; *_range: factors on their sum. vision_tokens: of one video.
    """

    kv_bytes: Mapping[str, int]
    index_bytes: Mapping[str, int]
    kv_aliases: Mapping[str, str]
    index_aliases: Mapping[str, str]
    unmodelled_caches: tuple[str, ...]
    utilization: float
    batched_tokens: int
    num_seqs: int
    block_size: int
    least_zero_point_bits: int
    non_torch_one: Estimate
    non_torch_many: Estimate
    non_torch_wide: Estimate
    non_torch_per_token: int
    non_torch_per_token_evidence: str
    graphs_base: int
    graphs_per_size: int
    graphs_per_size_most: int
    graphs_evidence: str
    large_gpu: int
    captured: int
    captured_large: int
    activation_range: Range
    activation_evidence: str
    hidden_copies: int
    sampler_copies: int
    vision_copies: int
    vision_range: Range
    vision_tokens: int

    def kv_name(self, text: str) -> str:
        """The name in kv_bytes of a KV dtype as an engine, torch or a user spells it; itself where it has none."""
        return _known(text, self.kv_aliases)

    def index_name(self, text: str) -> str:
        """The same for the index keys' dtype, in index_bytes."""
        return _known(text, self.index_aliases)

    def unmodelled(self, name: str) -> bool:
        """Whether the engine has a cache of this dtype, whose bytes are not known here."""
        return any(fnmatch(name, pattern) for pattern in self.unmodelled_caches)


def _known(text: str, aliases: Mapping[str, str]) -> str:
    name = text.strip().lower().removeprefix("torch.")
    return aliases.get(name, name)
