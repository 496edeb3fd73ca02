"""A draft model for speculative decoding, as an engine and the memory model see it."""

from __future__ import annotations

from dataclasses import dataclass

EAGLE3, DFLASH, DSPARK = METHODS = ("eagle3", "dflash", "dspark")
TITLES = {EAGLE3: "EAGLE3", DFLASH: "DFlash", DSPARK: "DSpark"}


@dataclass(frozen=True)
class Draft:
    """where: a folder or Hub id; revision: the Hub commit that was read. method: one of METHODS; architecture: as vLLM resolves it.

    tokens: guessed in a step. taps: hidden states of the target that it reads. Bytes as an engine holds them: split_bytes are divided
    over tensor-parallel ranks, kv_bytes at most over the KV heads, whole_bytes are on every rank. licence: as its card states it, '' if
    it states none. fingerprint: `Checkpoint.fingerprint`, by which a measurement's draft is known again.
    """

    where: str
    revision: str | None
    method: str
    architecture: str
    tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    taps: int
    split_bytes: int
    kv_bytes: int
    whole_bytes: int
    licence: str
    fingerprint: str = ""

    @property
    def title(self) -> str:
        return TITLES[self.method]

    def rank_bytes(self, tp: int) -> int:
        """Weights on one rank."""
        return -(-self.split_bytes // tp) + -(-self.kv_bytes // min(tp, self.kv_heads)) + self.whole_bytes

    def kv_per_token(self, tp: int, element: int) -> int:
        """Bytes of cache that one rank keeps for one token; element: bytes of one value. Engines keep it in the target's dtype."""
        return 2 * self.layers * max(1, self.kv_heads // tp) * self.head_dim * element
