"""The forward pass of one decoder layer of an M2 or M3 checkpoint, on tensors as stored.

Attention is transformers' own module (projections, head norms, rotary embedding) with our weights put in; norms, router
and experts are the functions of `ops`. Nothing is converted as a whole: a weight whose dtype is not the compute dtype
is converted for the one product that reads it.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from m3quant.calibration import ops
from m3quant.calibration.msa import SparseSpec, block_sparse_attention, select_blocks
from m3quant.calibration.ops import Activation, Routing
from m3quant.calibration.spec import EXPERTS, LayerSpec, MoeSpec, layer_shapes, layer_spec, text_config
from m3quant.errors import CheckpointError

__all__ = ["Layer", "LayerSpec", "LayerTensors", "MoeSpec", "SparseSpec", "layer_shapes", "layer_spec", "stack_experts"]

Tensors = Mapping[str, torch.Tensor]

_ATTENTION = "m3quant"


def stack_experts(tensors: Tensors, spec: LayerSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New stacks w1 [E, I, H], w3 [E, I, H], w2 [E, H, I] in the stored dtype, on the tensors' device."""
    w1, w3, w2 = (torch.stack(_expert_list(tensors, spec, which)) for which in ("w1", "w3", "w2"))
    return w1, w3, w2


def _expert_list(tensors: Tensors, spec: LayerSpec, which: str) -> list[torch.Tensor]:
    if spec.moe is None:
        raise CheckpointError(f"layer {spec.index} has no routed experts: config.json makes it a dense layer")
    return [tensors[f"{EXPERTS}{expert}.{which}.weight"] for expert in range(spec.moe.num_experts)]


class LayerTensors(dict[str, torch.Tensor]):
    """A layer's tensors by relative name on one device, those of routed experts being views of three stacks.

    stacks: "w1", "w3" [E, I, H] and "w2" [E, H, I]. A Layer made of it computes from the stacks where they lie, and
    `set_weight` writes into them.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], stacks: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.stacks = dict(stacks)
        for which, stack in stacks.items():
            self.update({f"{EXPERTS}{expert}.{which}.weight": part for expert, part in enumerate(stack)})


class Layer:
    """A decoder layer that computes from stored tensors.

    tensors: relative name -> tensor, as stored (see `layer_shapes`); extra names are ignored. dtype: compute dtype,
    float32 on the CPU and bfloat16 on a GPU if None. On the CPU the given tensors are used where they lie; on a GPU
    experts are copied into three stacks (unless they come as LayerTensors). `set_weight` never writes into a tensor
    that was passed in, those of LayerTensors apart.
    Inputs x are [S, L, H] windows from position 0; the residual stream keeps x's dtype. No method records gradients.

    Raises CheckpointError naming a tensor that is missing or has another shape than config.json implies.
    """

    def __init__(
        self,
        spec: LayerSpec,
        tensors: Tensors,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        _check(spec, tensors)
        self._weights = {
            name: tensors[name].to(self.device) for name in layer_shapes(spec) if not name.startswith(EXPERTS)
        }
        self._experts: dict[str, torch.Tensor | list[torch.Tensor]] = {}
        if spec.moe:
            for which in ("w1", "w3", "w2"):
                if isinstance(tensors, LayerTensors):
                    self._experts[which] = tensors.stacks[which]
                    continue
                parts = _expert_list(tensors, spec, which)
                self._experts[which] = parts if self.device.type == "cpu" else _to_stack(parts, self.device)
        self._attention = _attention_module(spec, self._weights)
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def weight(self, name: str) -> torch.Tensor:
        """The tensor in use under a relative name, on the layer's device, in its stored dtype."""
        if name.startswith(EXPERTS):
            expert, which = _expert_of(name)
            return self._experts[which][expert]
        return self._weights[name]

    def expert_stacks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """w1 [E, I, H], w3 [E, I, H], w2 [E, H, I] as in use, on a GPU; None without routed experts and on the CPU."""
        w1, w3, w2 = (self._experts.get(which) for which in ("w1", "w3", "w2"))
        if isinstance(w1, torch.Tensor) and isinstance(w3, torch.Tensor) and isinstance(w2, torch.Tensor):
            return w1, w3, w2
        return None

    def set_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Replace one weight. A routed expert on a GPU is rounded to its stack's dtype; every other keeps tensor's."""
        current = self.weight(name)
        if tensor.shape != current.shape:
            raise ValueError(f"{name} has shape {tuple(current.shape)}, not {tuple(tensor.shape)}")
        if name.startswith(EXPERTS):
            expert, which = _expert_of(name)
            stack = self._experts[which]
            if isinstance(stack, torch.Tensor):
                stack[expert].copy_(tensor)
            else:
                stack[expert] = tensor.to(self.device)
            return
        # The attention module reads the same dict, so one assignment reaches it too.
        self._weights[name] = tensor.to(self.device)

    @torch.no_grad()
    def attention_input(self, x: torch.Tensor) -> torch.Tensor:
        """input_layernorm(x) in the compute dtype: what q, k, v and the index projections read."""
        return self._norm(x, "input_layernorm.weight")

    @torch.no_grad()
    def heads(self, normed: torch.Tensor) -> torch.Tensor:
        """The attention heads' outputs side by side, [S, L, num_heads * head_dim]: what o_proj reads."""
        if self._rotary is None or self._rotary[0].shape[1] != normed.shape[1]:
            self._rotary = _rotary(self.spec, normed.shape[1], self.device, self.dtype)
        return self._attention(normed, position_embeddings=self._rotary, attention_mask=None)[0]

    @torch.no_grad()
    def attention(self, normed: torch.Tensor) -> torch.Tensor:
        """The attention block's contribution to the residual stream, from `attention_input`'s [S, L, H]."""
        return ops.linear(self.heads(normed), self._weights["self_attn.o_proj.weight"])

    @torch.no_grad()
    def mlp_input(self, x: torch.Tensor) -> torch.Tensor:
        """post_attention_layernorm(x) in the compute dtype: what the router, the experts and the dense MLP read."""
        return self._norm(x, "post_attention_layernorm.weight")

    @torch.no_grad()
    def routing(self, normed: torch.Tensor) -> Routing:
        """The experts chosen for every token of `mlp_input`'s [S, L, H] (or [T, H]); MoE layers only."""
        moe = self.spec.moe
        if moe is None:
            raise ValueError(f"layer {self.spec.index} is dense: it has no router")
        bias = self._weights["block_sparse_moe.e_score_correction_bias"] if moe.use_bias else None
        gate = self._weights["block_sparse_moe.gate.weight"]
        return ops.route(normed.flatten(0, -2), gate, bias, moe.top_k, moe.routed_scaling)

    @torch.no_grad()
    def mlp(self, normed: torch.Tensor) -> torch.Tensor:
        """The MLP's or MoE block's contribution to the residual stream, from `mlp_input`'s [S, L, H]."""
        moe = self.spec.moe
        if moe is None:
            return self._glu(normed, "mlp.", self.spec.activation)
        routed = ops.experts_forward(
            normed.flatten(0, -2),
            self.routing(normed),
            self._experts["w1"],
            self._experts["w3"],
            self._experts["w2"],
            moe.activation,
        ).view(normed.shape)
        return (
            routed + self._glu(normed, "block_sparse_moe.shared_experts.", moe.activation) if moe.has_shared else routed
        )

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The whole layer: x [S, L, H] on the layer's device -> [S, L, H] in x's dtype."""
        x = x + self.attention(self.attention_input(x)).to(x.dtype)
        return x + self.mlp(self.mlp_input(x)).to(x.dtype)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return ops.rms_norm(x, self._weights[name], self.spec.eps, self.spec.norm_one_plus).to(self.dtype)

    def _glu(self, x: torch.Tensor, prefix: str, act: Activation) -> torch.Tensor:
        gate, up, down = (self._weights[f"{prefix}{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj"))
        return ops.glu_mlp(x, gate, up, down, act)


def _expert_of(name: str) -> tuple[int, str]:
    expert, which = name.removeprefix(EXPERTS).split(".")[:2]
    return int(expert), which


def _to_stack(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """One stack on the device, filled matrix by matrix so that no second copy of it exists."""
    stack = torch.empty(len(parts), *parts[0].shape, dtype=parts[0].dtype, device=device)
    for row, part in zip(stack, parts, strict=True):
        row.copy_(part)
    return stack


def _check(spec: LayerSpec, tensors: Tensors) -> None:
    for name, shape in layer_shapes(spec).items():
        if name not in tensors:
            raise CheckpointError(
                f"layer {spec.index} lacks tensor {name}, which config.json implies; the checkpoint is incomplete or "
                "its config.json belongs to another model"
            )
        found = tuple(tensors[name].shape)
        if found != shape:
            raise CheckpointError(
                f"layer {spec.index}: tensor {name} has shape {found}, but config.json implies {shape}; one of the two "
                "belongs to another model"
            )


class _Linear(nn.Module):
    """A projection of transformers' module, reading its weight from the layer's dict at each call."""

    def __init__(self, weights: dict[str, torch.Tensor], name: str) -> None:
        super().__init__()
        self._source, self._name = weights, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self._source[self._name])


class _Norm(nn.Module):
    def __init__(self, weights: dict[str, torch.Tensor], name: str, spec: LayerSpec) -> None:
        super().__init__()
        self._source, self._name, self._spec = weights, name, spec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self._source[self._name], self._spec.eps, self._spec.norm_one_plus)


class _Indexer(nn.Module):
    """Stands where transformers' indexer stands; chooses blocks chunk by chunk, or None where all would be chosen."""

    def __init__(self, weights: dict[str, torch.Tensor], spec: LayerSpec, sparse: SparseSpec, rotate: Any) -> None:
        super().__init__()
        self.sparse, self._rotate = sparse, rotate
        self.q_proj = _Linear(weights, "self_attn.index_q_proj.weight")
        self.k_proj = _Linear(weights, "self_attn.index_k_proj.weight")
        self.q_norm = _Norm(weights, "self_attn.index_q_norm.weight", spec)
        self.k_norm = _Norm(weights, "self_attn.index_k_norm.weight", spec)

    def forward(
        self, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], *unused: Any
    ) -> torch.Tensor | None:
        if self.sparse.covers(hidden.shape[1]):
            return None
        dim = self.sparse.index_dim
        q = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, dim))).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden).unflatten(-1, (1, dim))).transpose(1, 2)
        cos, sin = (part[..., :dim] for part in position_embeddings)
        q, k = self._rotate(q, k, cos, sin)
        return select_blocks(q, k, self.sparse)


def _attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    block_indices: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules call between the rotary embedding and o_proj -> [S, L, heads, head_dim]."""
    if block_indices is not None:
        out = block_sparse_attention(query, key, value, block_indices, module.indexer.sparse.block_size, scaling)
    else:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@lru_cache(maxsize=4)
def _transformers_config(config_json: str) -> Any:
    """The text model's transformers config, built once per checkpoint from the original dict."""
    from transformers import AttentionInterface
    from transformers.models.minimax_m2.configuration_minimax_m2 import MiniMaxM2Config
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig

    values = json.loads(config_json)
    values.pop("quantization_config", None)
    text = text_config(values)
    # transformers 5.17 ignores M2's rotary_dim and rotates whole heads (5.23 reads it); both read this key.
    text.setdefault("partial_rotary_factor", text["rotary_dim"] / text["head_dim"])
    AttentionInterface.register(_ATTENTION, _attention_function)
    m2 = values["model_type"] == "minimax_m2"
    config: Any = MiniMaxM2Config.from_dict(values) if m2 else MiniMaxM3VLConfig.from_dict(values).text_config
    config._attn_implementation = _ATTENTION
    return config


def import_modeling(spec: LayerSpec) -> None:
    """Import transformers' code for this architecture, which takes seconds, before a layer needs it."""
    _modeling(spec)


def _modeling(spec: LayerSpec) -> tuple[Any, type[nn.Module], type[nn.Module]]:
    """transformers' modeling module, attention class and rotary embedding class of the layer's architecture."""
    if spec.model_type == "minimax_m2":
        from transformers.models.minimax_m2 import modeling_minimax_m2 as m2

        return m2, m2.MiniMaxM2Attention, m2.MiniMaxM2RotaryEmbedding
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

    return m3, m3.MiniMaxM3VLAttention, m3.MiniMaxM3VLRotaryEmbedding


def _attention_module(spec: LayerSpec, weights: dict[str, torch.Tensor]) -> nn.Module:
    modeling, attention_class, _ = _modeling(spec)
    with torch.device("meta"):
        module: Any = attention_class(_transformers_config(json.dumps(spec.config)), spec.index)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(module, name, _Linear(weights, f"self_attn.{name}.weight"))
    for name in ("q_norm", "k_norm"):
        setattr(module, name, _Norm(weights, f"self_attn.{name}.weight", spec))
    # `Layer.attention` applies o_proj itself, so that its input can be had.
    module.o_proj = nn.Identity()
    if spec.model_type == "minimax_m3_vl":
        module.indexer = _Indexer(weights, spec, spec.sparse, modeling.apply_rotary_pos_emb) if spec.sparse else None
    return module.eval()


def _rotary(
    spec: LayerSpec, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, length, rotary_dim] of transformers' rotary embedding, for positions from 0."""
    _, _, rotary_class = _modeling(spec)
    rotary = rotary_class(_transformers_config(json.dumps(spec.config))).to(device)
    positions = torch.arange(length, device=device)[None]
    cos, sin = rotary(torch.empty(0, dtype=dtype, device=device), positions)
    if cos.shape[-1] != spec.rotary_dim:
        raise CheckpointError(
            f"config.json says rotary_dim = {spec.rotary_dim}, but its other rotary settings rotate {cos.shape[-1]} "
            "dimensions of a head; take config.json from the original model repository"
        )
    return cos, sin
