"""Experts against one another (Qwen3-MoE, Mixtral): a token's scores sum to 1 over all experts."""

import torch


def scores(logits: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits, dim=-1)
