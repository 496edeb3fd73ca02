"""The end of the model: final norm, lm_head, and what is measured on the next-token distributions.

Logits are never held for all tokens, nor for the whole vocabulary: a chunk of tokens is multiplied by a slice of the vocabulary at
a time, in float32, and log-sum-exp, KL divergence and top-1 are accumulated over the slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from m3quant.calibration.ops import linear, rms_norm
from m3quant.errors import CalibrationError
from m3quant.planning.calibration_text import WindowGroup

# Logits in flight: 2,048 tokens x 8,192 words in float32 are 64 MB; the slice's weights at hidden size 6,144, 192 MB.
CHUNK_TOKENS = 2048
_WORDS = 8192


class Windows(Protocol):
    """Hidden states [S, L, H] that can be read by window (`stream.HiddenStates`)."""

    groups: tuple[WindowGroup, ...]  # rows that attention treats as one window; (): each by itself

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


@dataclass(frozen=True)
class Scores:
    """What one model says of T tokens, each [T] on the CPU.

    nll: float32, nats. best: int64, the most likely token (lowest id among equals). kl: float32, KL(first || this) in
    nats over the whole vocabulary; None for the first model.
    """

    nll: torch.Tensor
    best: torch.Tensor
    kl: torch.Tensor | None


def score(heads: Sequence[Head], inputs: Sequence[torch.Tensor], target: torch.Tensor) -> list[Scores]:
    """Predictions of target [T] int64 by every model, each from its last hidden states [T, H], compared with the first.

    All tensors on one device. The peak is one slice of logits per model: call it with at most `CHUNK_TOKENS` rows.
    Raises CalibrationError if logits are not finite.
    """
    if len({tuple(head.weight.shape) for head in heads}) != 1:
        raise ValueError(f"heads differ: {[tuple(head.weight.shape) for head in heads]}")
    normed = [head.normed(x) for head, x in zip(heads, inputs, strict=True)]
    streams = [_Stream(x, target) for x in normed]
    first = streams[0]
    # per model: sum over words of exp(logit_first - peak_first) * (logit_first - logit_model), rescaled as the peak rises
    gaps = [torch.zeros_like(first.total) for _ in heads[1:]]
    for words in _words(heads[0]):
        logits = [linear(x, head.weight[words]) for x, head in zip(normed, heads, strict=True)]
        before = first.peak
        for stream, values in zip(streams, logits, strict=True):
            stream.add(values, words)
        if gaps:
            weights = torch.exp(logits[0] - first.peak[:, None].to(logits[0].dtype))
            shrink = torch.exp(before - first.peak)
            for gap, other in zip(gaps, logits[1:], strict=True):
                gap.mul_(shrink).add_((weights * (logits[0] - other)).sum(dim=-1, dtype=torch.float64))
    for stream in streams:
        if not bool(torch.isfinite(stream.total).all()):
            raise CalibrationError("the final norm or lm_head gives NaN or Inf; look for non-finite weights in them")
    # A divergence is never negative; rounding alone takes that of equal distributions below zero.
    divergences = [
        (gap / first.total - first.log_sum() + stream.log_sum()).clamp(min=0).float().cpu()
        for gap, stream in zip(gaps, streams[1:], strict=True)
    ]
    return [
        Scores(stream.nll().float().cpu(), stream.best.cpu(), kl)
        for stream, kl in zip(streams, [None, *divergences], strict=True)
    ]


def head_nll(head: Head, states: Windows, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats) of the next token: states [S, L, H], tokens [S, L] -> [S, L - 1] float32, CPU."""
    out = torch.empty(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.float32)
    for windows, rows in _chunks(out.shape[0], out.shape[1]):
        x, target = _inputs(head, states, tokens, windows, rows)
        out[windows, rows] = score([head], [x], target)[0].nll.view_as(out[windows, rows])
    return out


def compare_heads(
    source: Head, quant: Head, source_states: Windows, quant_states: Windows, tokens: torch.Tensor
) -> Comparison:
    """Compare two streams' predictions of tokens [S, L] from their last hidden states [S, L, H]; results on the CPU."""
    shape = (tokens.shape[0], tokens.shape[1] - 1)
    nll_source, nll_quant, kl = (torch.empty(shape, dtype=torch.float32) for _ in range(3))
    agree = torch.empty(shape, dtype=torch.bool)
    for place in _chunks(*shape):
        a_x, target = _inputs(source, source_states, tokens, *place)
        b_x, _ = _inputs(quant, quant_states, tokens, *place)
        a, b = score([source, quant], [a_x, b_x], target)
        assert b.kl is not None
        like = kl[place]
        nll_source[place], nll_quant[place], kl[place] = (v.view_as(like) for v in (a.nll, b.nll, b.kl))
        agree[place] = (a.best == b.best).view_as(like)
    return Comparison(nll_source, nll_quant, kl, agree)


class _Stream:
    """Running peak, sum of exponentials, target logit and best word over slices of the vocabulary; all [T].

    Sums are float64: log-sum-exps of two models are subtracted, and their difference can be as small as float32's step.
    """

    def __init__(self, x: torch.Tensor, target: torch.Tensor) -> None:
        self.peak = torch.full(target.shape, float("-inf"), dtype=torch.float64, device=x.device)
        self.total = torch.zeros_like(self.peak)
        self.best = torch.zeros_like(target)
        self._target = target
        self._target_logit = self.peak.clone()

    def add(self, logits: torch.Tensor, words: slice) -> None:
        peak, best = logits.max(dim=-1)
        wide = peak.double()
        # Strictly greater: among equal logits the lowest word id wins, as in argmax over the whole vocabulary.
        self.best = torch.where(wide > self.peak, best + words.start, self.best)
        wide = torch.maximum(wide, self.peak)
        sums = torch.exp(logits - wide[:, None].to(logits.dtype)).sum(dim=-1, dtype=torch.float64)
        self.total = self.total * torch.exp(self.peak - wide) + sums
        self.peak = wide
        local = self._target - words.start
        here = (local >= 0) & (local < logits.shape[1])
        picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].double()
        self._target_logit = torch.where(here, picked, self._target_logit)

    def log_sum(self) -> torch.Tensor:
        return self.peak + self.total.log()

    def nll(self) -> torch.Tensor:
        return self.log_sum() - self._target_logit


def _inputs(
    head: Head, states: Windows, tokens: torch.Tensor, windows: slice, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [T, H] of the chosen windows and positions, and the tokens [T] that follow them."""
    device = head.weight.device
    x = states.read(windows, device)[:, rows].flatten(0, 1)
    return x, tokens[windows, 1:][:, rows].flatten().to(device)


def _chunks(windows: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of at most CHUNK_TOKENS positions: several short windows, or a part of a long one."""
    several = max(1, CHUNK_TOKENS // max(1, length))
    for first in range(0, windows, several):
        for start in range(0, length, CHUNK_TOKENS):
            yield slice(first, min(first + several, windows)), slice(start, min(start + CHUNK_TOKENS, length))


def _words(head: Head) -> Iterator[slice]:
    size = head.weight.shape[0]
    return (slice(start, min(start + _WORDS, size)) for start in range(0, size, _WORDS))
