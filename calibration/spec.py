"""The description of a decoder layer, for modules that compute with it; families/spec.py has the types."""

from collections.abc import Mapping
from typing import Any

from m3quant.families import family_of
from m3quant.families.spec import LayerSpec, MoeSpec, layer_shapes

__all__ = ["LayerSpec", "MoeSpec", "layer_shapes", "layer_spec"]


def layer_spec(config: Mapping[str, Any], index: int) -> LayerSpec:
    """Layer `index` of what a config.json describes. Raises CheckpointError naming the key that is missing or not computed."""
    return family_of(config).layer(index)
