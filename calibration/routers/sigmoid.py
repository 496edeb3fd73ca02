"""Each expert by itself (MiniMax M2 and M3, DeepSeek-V3)."""

import torch


def scores(logits: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(logits)
