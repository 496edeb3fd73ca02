"""One layer of a random tiny model, and hidden states with a few salient channels, for tests of scales and ranges."""

from typing import Any

import torch

from m3quant.calibration.spec import LayerSpec, layer_spec
from m3quant.schemes import Scheme, parse_scheme
from tests.support.calibration import tiny

Tensors = dict[str, torch.Tensor]


def tiny_layer(
    family: str, index: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **overrides: Any
) -> tuple[LayerSpec, Tensors]:
    """(spec, tensors by relative name) of one layer of a tiny "m2" or "m3"."""
    if family == "m2":
        config, prefix = tiny.m2_config(**overrides), f"model.layers.{index}."
        tensors = tiny.m2_tensors(config, seed, dtype)
    else:
        config, prefix = tiny.m3_config(**overrides), f"language_model.model.layers.{index}."
        tensors = tiny.m3_tensors(config, seed, dtype)
    return layer_spec(config, index), {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def linears(tensors: Tensors) -> list[str]:
    """Names of the weights that a recipe may quantize (not the router, not norms)."""
    return [name for name, t in tensors.items() if t.ndim == 2 and name != "block_sparse_moe.gate.weight"]


def all_int(tensors: Tensors, scheme: str = "int4-g128") -> dict[str, Scheme]:
    return {name: parse_scheme(scheme) for name in linears(tensors)}


def salient(*shape: int, seed: int = 0, outliers: int = 4, factor: float = 15.0) -> torch.Tensor:
    """Normal values [..., K] whose channels differ in size, log-normally, and `outliers` of them by `factor` more."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.randn(shape[-1], generator=generator) * 0.7)
    size[torch.randperm(shape[-1], generator=generator)[:outliers]] *= factor
    return torch.randn(*shape, generator=generator) * size
