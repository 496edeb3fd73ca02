"""Self-attention of one layer up to its heads' outputs, the same operations in the same order as transformers' modules.

Importing those takes seconds (they bring torch's compiler, SciPy, scikit-learn), which every conversion would wait for;
tests/calibration/test_layers.py and test_msa.py hold layers and attention against them.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from m3quant.calibration import ops
from m3quant.calibration.msa import SparseSpec, block_sparse_attention, select_blocks
from m3quant.calibration.spec import LayerSpec

Rotary = tuple[torch.Tensor, torch.Tensor]


class Attention:
    """Projections, head norms, rotary embedding and causal attention, sparse where the layer is.

    weights: the layer's dict by relative name, read at each call, so that a weight replaced there is used.
    """

    def __init__(self, spec: LayerSpec, weights: Mapping[str, torch.Tensor]) -> None:
        self.spec, self._weights = spec, weights

    def heads(self, normed: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """[S, L, H] -> the heads' outputs side by side, [S, L, num_heads * head_dim]. rotary: of `rotary_embedding`."""
        spec = self.spec
        q, k = self._normed(normed, "q", spec.head_dim), self._normed(normed, "k", spec.head_dim)
        v = self._project(normed, "v").unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        scaling = spec.head_dim**-0.5
        blocks = self.blocks(normed, rotary)
        if blocks is not None and spec.sparse is not None:
            out = block_sparse_attention(q, k, v, blocks, spec.sparse.block_size, scaling)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).flatten(2).contiguous()

    def blocks(self, normed: torch.Tensor, rotary: Rotary) -> torch.Tensor | None:
        """The key blocks that every query attends to (`msa.select_blocks`), or None where it attends to all."""
        sparse: SparseSpec | None = self.spec.sparse
        if sparse is None or sparse.covers(normed.shape[1]):
            return None
        turned = (rotary[0][..., : sparse.index_dim], rotary[1][..., : sparse.index_dim])
        q, k = (rotate(self._normed(normed, f"index_{which}", sparse.index_dim), turned) for which in "qk")
        return select_blocks(q, k, sparse)

    def _project(self, normed: torch.Tensor, name: str) -> torch.Tensor:
        return ops.linear(normed, self._weights[f"self_attn.{name}_proj.weight"])

    def _normed(self, normed: torch.Tensor, name: str, head_dim: int) -> torch.Tensor:
        """One projection, normed over each head (M3) or over all of them (M2), [S, heads, L, head_dim]."""
        projected, weight = self._project(normed, name), self._weights[f"self_attn.{name}_norm.weight"]
        if self.spec.qk_norm_per_head:
            projected = projected.unflatten(-1, (-1, head_dim))
        out = ops.rms_norm(projected, weight, self.spec.eps, self.spec.norm_one_plus)
        return (out if self.spec.qk_norm_per_head else out.unflatten(-1, (-1, head_dim))).transpose(1, 2)


def rotary_embedding(spec: LayerSpec, length: int, device: torch.device, dtype: torch.dtype) -> Rotary:
    """cos and sin [length, rotary_dim] for positions from 0, computed in float32."""
    size = spec.rotary_dim
    # Powers are taken on the CPU, whatever the device: another library's powers differ in the last bit.
    frequencies = 1.0 / (spec.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    angles = torch.arange(length, device=device)[:, None].float() * frequencies.to(device)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """x [S, heads, L, D]: pairs (i, i + rotary_dim / 2) of the first rotary_dim channels turned by their position's angle."""
    cos, sin = rotary
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat(((turned * cos) + (torch.cat((-second, first), dim=-1) * sin), kept), dim=-1)
