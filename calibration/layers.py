"""The forward pass of one decoder layer, on tensors as stored.

Attention is `attention`; norms, router and experts are the functions of `ops`. Nothing is converted as a whole: a weight whose dtype is not the compute dtype
is converted for the one product that reads it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from m3quant.calibration import ops
from m3quant.calibration.attention import Attention, Rotary, rotary_embedding
from m3quant.calibration.inputs import Cache, Rounding, cache_scales
from m3quant.calibration.ops import Routing
from m3quant.calibration.spec import layer_spec
from m3quant.errors import CheckpointError
from m3quant.families.spec import INPUT_NORM, MLP_NORM, STACKS, Activation, LayerSpec, MoeSpec, SparseSpec, layer_shapes
from m3quant.quant.activations import round_activations
from m3quant.schemes import Scheme

__all__ = ["Layer", "LayerSpec", "LayerTensors", "MoeSpec", "SparseSpec", "layer_shapes", "layer_spec", "stack_experts"]

Tensors = Mapping[str, torch.Tensor]
O_PROJ = "self_attn.o_proj.weight"


def stack_experts(tensors: Tensors, spec: LayerSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New stacks w1 [E, I, H], w3 [E, I, H], w2 [E, H, I] in the stored dtype, on the tensors' device."""
    w1, w3, w2 = (torch.stack(_expert_list(tensors, spec, which)) for which in STACKS)
    return w1, w3, w2


def _expert_list(tensors: Tensors, spec: LayerSpec, which: str) -> list[torch.Tensor]:
    if spec.moe is None:
        raise CheckpointError(f"layer {spec.index} has no routed experts: config.json makes it a dense layer")
    return [tensors[spec.moe.expert_name(expert, which)] for expert in range(spec.moe.num_experts)]


class LayerTensors(dict[str, torch.Tensor]):
    """A layer's tensors by relative name on one device, those of routed experts being views of three stacks.

    stacks: "w1", "w3" [E, I, H] and "w2" [E, H, I]; moe: what the layer calls their experts, None for a dense layer
    without stacks. A Layer made of it computes from the stacks in place, and `set_weight` writes into them.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], stacks: Mapping[str, torch.Tensor], moe: MoeSpec | None
    ) -> None:
        super().__init__(tensors)
        self.stacks, self.moe = dict(stacks), moe
        for which, stack in stacks.items():
            self.update(zip(self.names(which), stack, strict=True))

    def names(self, which: str) -> list[str]:
        """The relative names of a stack's experts, in order. Raises ValueError for a layer without routed experts."""
        if self.moe is None:
            raise ValueError("stacks of experts need the layer's description of its routed experts")
        return [self.moe.expert_name(expert, which) for expert in range(len(self.stacks[which]))]


class Layer:
    """A decoder layer that computes from stored tensors.

    tensors: relative name -> tensor, as stored (see `layer_shapes`); extra names are ignored. dtype: compute dtype,
    float32 on the CPU and bfloat16 on a GPU if None. On the CPU the given tensors are used in place; on a GPU
    experts are copied into three stacks (unless they come as LayerTensors). `set_weight` never writes into a tensor
    that was passed in, those of LayerTensors apart.
    Inputs x are [S, L, H] windows from position 0; the residual stream keeps x's dtype. No method records gradients.
    Activations, keys and values are not rounded, until `round_activations` and `round_cache` say how an engine does it.

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
            name: tensors[name].to(self.device) for name in layer_shapes(spec) if self._expert_of(name) is None
        }
        self._experts: dict[str, torch.Tensor | list[torch.Tensor]] = {}
        if spec.moe:
            for which in STACKS:
                if isinstance(tensors, LayerTensors):
                    self._experts[which] = tensors.stacks[which]
                    continue
                parts = _expert_list(tensors, spec, which)
                self._experts[which] = parts if self.device.type == "cpu" else _to_stack(parts, self.device)
        self._attention = Attention(spec, self._weights)
        self._rotary: Rotary | None = None
        self._rounding = Rounding()
        self._scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale")}

    def round_activations(self, schemes: Mapping[str, Scheme]) -> None:
        """From now on, round what every product reads as an engine does for a weight of its scheme; {}: round nothing.

        schemes: by weight name. Raises CalibrationError as `Rounding.of`.
        """
        self._rounding = self._attention.rounding = Rounding.of(self.spec, schemes)

    @contextmanager
    def rounding(self, schemes: Mapping[str, Scheme]) -> Iterator[None]:
        """`round_activations(schemes)` within this block."""
        before = self._rounding
        self.round_activations(schemes)
        try:
            yield
        finally:
            self._rounding = self._attention.rounding = before

    def round_cache(self, kv: bool, index: bool) -> None:
        """From now on, round keys and values, or index keys, as an FP8 cache does, under the scales among the layer's tensors.

        Raises CalibrationError as `cache_scales`.
        """
        scales = {name: scale.to(self.device) for name, scale in cache_scales(self.spec, self._scales).items()}
        self._attention.cache = Cache(kv, index, **scales)

    def read_by(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x as the product of this weight (no routed expert's) reads it."""
        return round_activations(x, self._rounding.by_name.get(name))

    def weight(self, name: str) -> torch.Tensor:
        """The tensor in use under a relative name, on the layer's device, in its stored dtype."""
        if routed := self._expert_of(name):
            expert, which = routed
            return self._experts[which][expert]
        return self._weights[name]

    def expert_stacks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """w1 [E, I, H], w3 [E, I, H], w2 [E, H, I] as in use, on a GPU; None without routed experts and on the CPU."""
        w1, w3, w2 = (self._experts.get(which) for which in STACKS)
        if isinstance(w1, torch.Tensor) and isinstance(w3, torch.Tensor) and isinstance(w2, torch.Tensor):
            return w1, w3, w2
        return None

    def set_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Replace one weight. A routed expert on a GPU is rounded to its stack's dtype; every other keeps tensor's."""
        current = self.weight(name)
        if tensor.shape != current.shape:
            raise ValueError(f"{name} has shape {tuple(current.shape)}, not {tuple(tensor.shape)}")
        if routed := self._expert_of(name):
            expert, which = routed
            stack = self._experts[which]
            if isinstance(stack, torch.Tensor):
                stack[expert].copy_(tensor)
            else:
                stack[expert] = tensor.to(self.device)
            return
        # Attention reads the same dict, so one assignment reaches it too.
        self._weights[name] = tensor.to(self.device)

    @torch.no_grad()
    def attention_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input norm of x in the compute dtype: what q, k, v and the index projections read."""
        return self._norm(x, INPUT_NORM)

    @torch.no_grad()
    def heads(self, normed: torch.Tensor) -> torch.Tensor:
        """The attention heads' outputs side by side, [S, L, num_heads * head_dim]: what o_proj reads."""
        if self._rotary is None or len(self._rotary[0]) != normed.shape[1]:
            self._rotary = rotary_embedding(self.spec, normed.shape[1], self.device, self.dtype)
        return self._attention.heads(normed, self._rotary)

    @torch.no_grad()
    def attention(self, normed: torch.Tensor) -> torch.Tensor:
        """The attention block's contribution to the residual stream, from `attention_input`'s [S, L, H]."""
        return self.output(self.heads(normed), self._weights[O_PROJ])

    def output(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the attention block adds, from the heads' outputs [S, L, K] and an o_proj weight [H, K]; its bias is the layer's."""
        bias = self._weights["self_attn.o_proj.bias"] if "o_proj" in self.spec.biased else None
        return ops.linear_with_bias(self.read_by(O_PROJ, heads), weight, bias)

    @torch.no_grad()
    def mlp_input(self, x: torch.Tensor) -> torch.Tensor:
        """The second norm of x in the compute dtype: what the router, the experts and the dense MLP read."""
        return self._norm(x, MLP_NORM)

    @torch.no_grad()
    def routing(self, normed: torch.Tensor) -> Routing:
        """The experts chosen for every token of `mlp_input`'s [S, L, H] (or [T, H]); MoE layers only."""
        moe = self._routed()
        bias = self._weights[moe.bias_name] if moe.use_bias else None
        gate = self._weights[moe.router_name]
        return ops.route(
            normed.flatten(0, -2), gate, bias, moe.top_k, moe.routed_scaling, kind=moe.router, normalise=moe.normalise
        )

    @torch.no_grad()
    def router_scores(self, normed: torch.Tensor) -> torch.Tensor:
        """The router's scores of every expert, [T, E] float32, for `mlp_input`'s [S, L, H] (or [T, H]); MoE layers only."""
        moe = self._routed()
        return ops.router_scores(normed.flatten(0, -2), self._weights[moe.router_name], moe.router)

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
            self._rounding.experts,
        ).view(normed.shape)
        return routed + self._glu(normed, moe.shared_prefix, moe.activation) if moe.has_shared else routed

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The whole layer: x [S, L, H] on the layer's device -> [S, L, H] in x's dtype."""
        x = x + self.attention(self.attention_input(x)).to(x.dtype)
        return x + self.mlp(self.mlp_input(x)).to(x.dtype)

    def _routed(self) -> MoeSpec:
        if self.spec.moe is None:
            raise ValueError(f"layer {self.spec.index} is dense: it has no router")
        return self.spec.moe

    def _expert_of(self, name: str) -> tuple[int, str] | None:
        """(expert, stack) of a routed expert's weight, None for another name."""
        return self.spec.moe.expert_of(name) if self.spec.moe else None

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return ops.rms_norm(x, self._weights[name], self.spec.eps, self.spec.norm_one_plus).to(self.dtype)

    def _glu(self, x: torch.Tensor, prefix: str, act: Activation) -> torch.Tensor:
        names = [f"{prefix}{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = (self._weights[name] for name in names)
        return ops.glu_mlp(self.read_by(names[0], x), gate, up, down, act, self._rounding.by_name.get(names[2]))


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
