"""Self-attention of one layer up to its heads' outputs, the same operations in the same order as transformers' modules.

Importing those takes seconds (they bring torch's compiler, SciPy, scikit-learn), which every conversion would wait for;
tests/calibration/test_layers.py and test_msa.py compare layers and attention with them.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from m3quant.calibration import ops
from m3quant.calibration.inputs import Cache, Inputs, Rounding
from m3quant.calibration.msa import block_sparse_attention, select_blocks
from m3quant.families.spec import LayerSpec, Rope, SparseSpec

Rotary = tuple[torch.Tensor, torch.Tensor]


class Attention:
    """Projections, head norms, rotary embedding and causal attention, sparse where the layer is.

    weights: the layer's dict by relative name, read at each call, so that a weight replaced there is used. rounding,
    cache: how inputs, keys and values are rounded; not at all until they are set.
    """

    def __init__(self, spec: LayerSpec, weights: Mapping[str, torch.Tensor]) -> None:
        self.spec, self._weights = spec, weights
        self.rounding, self.cache = Rounding(), Cache()

    def heads(self, normed: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """[S, L, H] -> the heads' outputs side by side, [S, L, num_heads * head_dim]. rotary: of `rotary_embedding`."""
        spec, inputs = self.spec, Inputs(normed)
        q, k = self._normed(inputs, "q", spec.head_dim), self._normed(inputs, "k", spec.head_dim)
        v = torch.unflatten(self._project(inputs, "v"), -1, (-1, spec.head_dim)).transpose(1, 2)
        q, k, v = rotate(q, rotary), self.cache.keys(rotate(k, rotary)), self.cache.values(v)
        scaling = spec.head_dim**-0.5
        blocks = self._blocks(inputs, rotary)
        if blocks is not None and spec.sparse is not None:
            out = block_sparse_attention(q, k, v, blocks, spec.sparse.block_size, scaling)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).flatten(2).contiguous()

    def _blocks(self, inputs: Inputs, rotary: Rotary) -> torch.Tensor | None:
        """The key blocks that every query attends to (`msa.select_blocks`), or None where it attends to all."""
        sparse: SparseSpec | None = self.spec.sparse
        if sparse is None or sparse.covers(inputs.x.shape[1]):
            return None
        turned = (rotary[0][..., : sparse.index_dim], rotary[1][..., : sparse.index_dim])
        q, k = (rotate(self._normed(inputs, f"index_{which}", sparse.index_dim), turned) for which in "qk")
        return select_blocks(self.cache.indices(q), self.cache.indices(k), sparse)

    def _project(self, inputs: Inputs, name: str) -> torch.Tensor:
        weight = f"self_attn.{name}_proj.weight"
        bias = self._weights[f"self_attn.{name}_proj.bias"] if f"{name}_proj" in self.spec.biased else None
        return ops.linear_with_bias(inputs.under(self.rounding.by_name.get(weight)), self._weights[weight], bias)

    def _normed(self, inputs: Inputs, name: str, head_dim: int) -> torch.Tensor:
        """One projection, normed as the layer does it (over each head, over all of them, or not), [S, heads, L, head_dim]."""
        spec, projected = self.spec, self._project(inputs, name)
        if spec.qk_norm == "whole":
            projected = ops.rms_norm(
                projected, self._weights[f"self_attn.{name}_norm.weight"], spec.eps, spec.norm_one_plus
            )
        projected = torch.unflatten(projected, -1, (-1, head_dim))
        if spec.qk_norm == "per_head":
            projected = ops.rms_norm(
                projected, self._weights[f"self_attn.{name}_norm.weight"], spec.eps, spec.norm_one_plus
            )
        return projected.transpose(1, 2)


def rotary_embedding(spec: LayerSpec, length: int, device: torch.device, dtype: torch.dtype) -> Rotary:
    """cos and sin [length, rope.size] for positions from 0, computed in float32."""
    angles = torch.arange(length, device=device)[:, None].float() * frequencies(spec.rope).to(device)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def frequencies(rope: Rope) -> torch.Tensor:
    """Angle per position of every pair of channels, [rope.size / 2] float32 on the CPU, whatever the device: another
    library's powers differ in the last bit. Formulas: transformers' modeling_rope_utils."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, rope.size, 2, dtype=torch.float32) / rope.size))
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    assert rope.kind == "llama3", f"no rotary embedding is called {rope.kind}"
    length = 2 * math.pi / plain
    longest, shortest = rope.original / rope.low, rope.original / rope.high
    scaled = torch.where(length > longest, plain / rope.factor, plain)
    share = (rope.original / length - rope.low) / (rope.high - rope.low)
    between = (1 - share) * scaled / rope.factor + share * scaled
    return torch.where((length >= shortest) & (length <= longest), between, scaled)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """x [S, heads, L, D]: pairs (i, i + size / 2) of the first `size` channels turned by their position's angle."""
    cos, sin = rotary
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat(((turned * cos) + (torch.cat((-second, first), dim=-1) * sin), kept), dim=-1)
