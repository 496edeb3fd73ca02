"""What a run of the scale and range search needs to know in addition to what a recipe sets."""

import torch
from pydantic import ConfigDict

from m3quant.calibration.experts import DEFAULT_MIN_EXPERT_TOKENS
from m3quant.calibration.ranks import ALONE, Ranks
from m3quant.recipe.recipe import AwqOptions


class AwqSettings(AwqOptions):
    """Settings of `awq.calibrate_layer`: the recipe's knobs, and those of the run.

    strict_coverage: fail instead of topping starved experts up. search_tokens: tokens (a seeded sample) on which candidates are compared; as many others, as far as there are,
    decide whether the winner is accepted. pair_tokens: tokens per expert for the w3 -> w2 search. second moments use
    all tokens. attention_tokens: the same cap for attention, which needs whole windows. batch_tokens: tokens per
    forward pass. scale_dtype: dtype in which integer scales will be stored (BF16 in compressed-tensors, F16 in
    AutoAWQ). ranks: the processes that search together, each a part of candidates and experts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    min_expert_tokens: int = DEFAULT_MIN_EXPERT_TOKENS
    strict_coverage: bool = False
    search_tokens: int = 8192
    attention_tokens: int = 8192
    pair_tokens: int = 512
    batch_tokens: int = 8192
    scale_dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    ranks: Ranks = ALONE

    def generator(self, layer: int, purpose: int) -> torch.Generator:
        """A CPU generator that depends on seed, layer and purpose only, so that a resumed run draws the same tokens."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + layer) * 16 + purpose)

    def split(self, total: int, cap: int, layer: int, purpose: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two sorted samples of range(total), at most `cap` each, disjoint once total >= 2 * cap: search, accept."""
        order = torch.randperm(total, generator=self.generator(layer, purpose))
        return order[:cap].sort().values, order[-cap:].sort().values
