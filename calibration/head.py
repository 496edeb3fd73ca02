"""The end of the model: final norm, lm_head, and what is measured on the next-token distributions.

Logits are never held for all tokens, nor for the whole vocabulary: a chunk of tokens meets a slice of the vocabulary at
a time, in float32, and log-sum-exp, KL divergence and top-1 are accumulated over the slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from m3quant.calibration.ops import linear, rms_norm

# Logits in flight: 2,048 tokens x 8,192 words in float32 are 64 MB; the slice's weights at hidden size 6,144, 192 MB.
_TOKENS = 2048
_WORDS = 8192


class Windows(Protocol):
    """Hidden states [S, L, H] that can be read by window (`stream.HiddenStates`)."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def read(self, windows: slice, device: torch.device | str | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class Head:
    """Final norm [H] and output weight [V, H] as stored, on the device where logits are computed."""

    norm: torch.Tensor
    weight: torch.Tensor
    eps: float
    one_plus: bool

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm of x [..., H] in float32 (float64 for float64 x)."""
        wide = x if x.dtype == torch.float64 else x.float()
        return rms_norm(wide, self.norm, self.eps, self.one_plus)


@dataclass(frozen=True)
class Comparison:
    """Two models' next-token predictions on the same tokens, each [S, L - 1]; entry t is about token t + 1.

    nll_source, nll_quant and kl in nats, float32: kl is KL(source || quant) over the whole vocabulary. agree: whether
    both find the same token most likely.
    """

    nll_source: torch.Tensor
    nll_quant: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor


def head_nll(head: Head, states: Windows, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats) of the next token: states [S, L, H], tokens [S, L] -> [S, L - 1] float32, CPU."""
    out = torch.empty(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.float32)
    for windows, rows in _chunks(out.shape[0], out.shape[1]):
        x, target = _inputs(head, states, tokens, windows, rows)
        stream = _Stream(x, target)
        for words in _words(head):
            stream.add(linear(x, head.weight[words]), words)
        out[windows, rows] = stream.nll().float().cpu().view_as(out[windows, rows])
    return out


def compare_heads(
    source: Head, quant: Head, source_states: Windows, quant_states: Windows, tokens: torch.Tensor
) -> Comparison:
    """Compare two streams' predictions of tokens [S, L] from their last hidden states [S, L, H]; results on the CPU."""
    if source.weight.shape != quant.weight.shape:
        raise ValueError(f"heads differ: {tuple(source.weight.shape)} and {tuple(quant.weight.shape)}")
    shape = (tokens.shape[0], tokens.shape[1] - 1)
    nll_source, nll_quant, kl = (torch.empty(shape, dtype=torch.float32) for _ in range(3))
    agree = torch.empty(shape, dtype=torch.bool)
    for windows, rows in _chunks(*shape):
        a_x, target = _inputs(source, source_states, tokens, windows, rows)
        b_x, _ = _inputs(quant, quant_states, tokens, windows, rows)
        a, b = _Stream(a_x, target), _Stream(b_x, target)
        # sum over words of exp(logit_a - peak_a) * (logit_a - logit_b), rescaled whenever a's peak rises.
        gap = torch.zeros_like(a.total)
        for words in _words(source):
            a_logits, b_logits = linear(a_x, source.weight[words]), linear(b_x, quant.weight[words])
            before = a.peak
            a.add(a_logits, words)
            b.add(b_logits, words)
            gap = gap * torch.exp(before - a.peak)
            gap += (torch.exp(a_logits - a.peak[:, None]) * (a_logits - b_logits)).sum(dim=-1)
        divergence = gap / a.total - a.log_sum() + b.log_sum()
        place = (windows, rows)
        nll_source[place] = a.nll().float().cpu().view_as(kl[place])
        nll_quant[place] = b.nll().float().cpu().view_as(kl[place])
        # A divergence is never negative; rounding alone takes that of equal distributions below zero.
        kl[place] = divergence.clamp(min=0).float().cpu().view_as(kl[place])
        agree[place] = (a.best == b.best).cpu().view_as(agree[place])
    return Comparison(nll_source, nll_quant, kl, agree)


class _Stream:
    """Running peak, sum of exponentials, target logit and best word over slices of the vocabulary; all [T]."""

    def __init__(self, x: torch.Tensor, target: torch.Tensor) -> None:
        self.peak = x.new_full(x.shape[:1], float("-inf"))
        self.total = torch.zeros_like(self.peak)
        self.best = torch.zeros_like(target)
        self._target = target
        self._target_logit = self.peak.clone()

    def add(self, logits: torch.Tensor, words: slice) -> None:
        peak, best = logits.max(dim=-1)
        # Strictly greater: among equal logits the lowest word id wins, as in argmax over the whole vocabulary.
        self.best = torch.where(peak > self.peak, best + words.start, self.best)
        peak = torch.maximum(peak, self.peak)
        self.total = self.total * torch.exp(self.peak - peak) + torch.exp(logits - peak[:, None]).sum(dim=-1)
        self.peak = peak
        local = self._target - words.start
        here = (local >= 0) & (local < logits.shape[1])
        picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self._target_logit = torch.where(here, picked, self._target_logit)

    def log_sum(self) -> torch.Tensor:
        return self.peak + self.total.log()

    def nll(self) -> torch.Tensor:
        return self.log_sum() - self._target_logit


def _inputs(
    head: Head, states: Windows, tokens: torch.Tensor, windows: slice, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed states [T, H] of the chosen windows and positions, and the tokens [T] that follow them."""
    device = head.weight.device
    x = head.normed(states.read(windows, device)[:, rows]).flatten(0, 1)
    return x, tokens[windows, 1:][:, rows].flatten().to(device)


def _chunks(windows: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of at most _TOKENS positions: several short windows, or a part of a long one."""
    several = max(1, _TOKENS // max(1, length))
    for first in range(0, windows, several):
        for start in range(0, length, _TOKENS):
            yield slice(first, min(first + several, windows)), slice(start, min(start + _TOKENS, length))


def _words(head: Head) -> Iterator[slice]:
    size = head.weight.shape[0]
    return (slice(start, min(start + _WORDS, size)) for start in range(0, size, _WORDS))
