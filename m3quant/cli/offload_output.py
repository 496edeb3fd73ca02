"""What `plan` and `serve` say of weights and cache in host memory."""

from __future__ import annotations

from typing import Any

from ..engines.device import GIB
from ..runtime.cost import Prices, load_prices
from ..runtime.fit import Fit
from ..runtime.offload import host_bytes, host_tokens
from ..runtime.offload_price import Comparison, compare


def _tokens(fit: Fit) -> int:
    per_token = [rank.bytes_per_token for rank in fit.prediction.ranks]
    return host_tokens(fit.setup.kv_offload, per_token, fit.setup.block_size, fit.setup.split)


def _host(fit: Fit) -> int:
    return host_bytes(fit.setup.kv_offload, [rank.moved for rank in fit.prediction.ranks], fit.setup.split)


def _compared(fit: Fit, prices: Prices | None) -> Comparison | None:
    return compare(fit, prices or load_prices()) if fit.setup.weight_offload and fit.longest_context else None


def offload_json(fit: Fit, prices: Prices | None = None) -> dict[str, Any] | None:
    """None where nothing is moved. Bytes; weights and pinned of one GPU, host of the machine."""
    if not (fit.setup.kv_offload or fit.setup.weight_offload):
        return None
    found = _compared(fit, prices)
    return {
        "kv_bytes": fit.setup.kv_offload,
        "kv_tokens": _tokens(fit),
        "weight_bytes": max(rank.moved.weights for rank in fit.prediction.ranks),
        "pinned_bytes": max(rank.moved.pinned for rank in fit.prediction.ranks),
        "host_bytes": _host(fit),
        "against_more_gpus": found and {
            "node": found.node.name, "context": found.context, "requests": found.requests, "tokens_per_s": found.speed,
            "slow_down": found.slow_down, "node_tokens_per_s": found.node_speed, "costs": found.costs,
            "sources": list(found.near.sources) if found.near else [], "other_gpus": list(found.near.others) if found.near else [],
        },
    }  # fmt: skip


def offload_lines(fit: Fit, prices: Prices | None = None) -> list[str]:
    """For display; empty where nothing is moved."""
    out, setup, link = list[str](), fit.setup, fit.node.gpu.link
    if setup.kv_offload:
        each = max(rank.bytes_per_token for rank in fit.prediction.ranks)
        back = f"; {32_768:,} tokens come back in {32_768 * each / link:.2f} s at least" if link else ""
        out.append(
            f"cache in host memory: {setup.kv_offload / GIB:.1f} GiB keep prefixes of {_tokens(fit):,} tokens that the GPU has dropped{back}; "
            "the pool of running requests stays as it is"
        )
    if setup.weight_offload:
        moved = max(rank.moved.weights for rank in fit.prediction.ranks)
        short = (
            f"; there are no more than that, {setup.weight_offload / GIB:.1f} GiB were asked for"
            if moved < setup.weight_offload
            else ""
        )
        out.append(
            f"weights in host memory: {moved / GIB:.1f} GiB of routed experts per GPU, read across the link in every step{short}"
        )
        if found := _compared(fit, prices):
            out.append(
                f"{found.sentence}; a step takes {found.slow_down:.1f} times as long as with all weights on such GPUs"
            )
    if out:
        rounded = ", where torch rounds each pinned tensor up to a power of two" if setup.weight_offload else ""
        out.append(f"host memory: {_host(fit) / GIB:.1f} GiB in all{rounded}")
    return out
