"""Values of config.json that no model has, refused by name before they reach arithmetic or a loop. Torch-free.

A key that is absent is not named here but where it is needed: not every use of a config needs them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

# Far above any release, far below what a loop or a float could not take.
LIMITS = {
    "num_hidden_layers": 1024,
    "num_local_experts": 8192,
    "num_experts_per_tok": 8192,
    "n_shared_experts": 8192,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2**16),
    **dict.fromkeys(("hidden_size", "intermediate_size", "shared_intermediate_size", "dense_intermediate_size", "head_dim"), 2**24),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 2**31),
    **dict.fromkeys(("patch_size", "num_channels", "projector_hidden_size"), 2**16),
    **dict.fromkeys(("sparse_index_dim", "sparse_num_index_heads", "sparse_topk_blocks", "sparse_block_size"), 2**24),
}  # fmt: skip
NONE_OF_IT = {"shared_intermediate_size", "n_shared_experts"}  # M2's configs say 0: no shared expert
PER_LAYER = ("moe_layer_freq", "sparse_attention_freq")
# More than any layer has beside its experts, so that what a config promises can be bounded without listing it.
TENSORS_PER_LAYER, TENSORS_PER_EXPERT, TENSORS_PER_VISION_LAYER, TENSORS_OUTSIDE = 64, 3, 32, 64
# Listing a million takes seconds and some 300 MB; M3 has 24,000.
MAX_TENSORS = 1_000_000
# What is promised and absent is told name by name, in so far as it can be a faulty copy of this model at all.
TIMES_HELD, SPARE_TENSORS = 4, 10_000
REMEDY = "copy the original config.json of the release beside the weights"


def check_counts(part: Mapping[str, Any], layers: Any, where: str) -> None:
    """Raise CheckpointError for a count that is no whole number up to its limit, or a list that does not reach every layer."""
    for key, limit in LIMITS.items():
        value, least = part.get(key), 0 if key in NONE_OF_IT else 1
        if value is not None and (type(value) is not int or not least <= value <= limit):
            raise CheckpointError(
                f"{where}: '{key}' is {_shown(value)}, not a whole number from {least} to {limit:,}: {REMEDY}."
            )
    for key in PER_LAYER:
        value = part.get(key)
        if value is not None and (not isinstance(value, list) or (type(layers) is int and len(value) < layers)):
            raise CheckpointError(
                f"{where}: '{key}' is {_shown(value)}, not a list with an entry for each layer: {REMEDY}."
            )


def check_config(config: Mapping[str, Any], text: Mapping[str, Any], where: str) -> None:
    """`check_counts` on all parts of a config. text: the part that describes the language model. Raises CheckpointError."""
    layers = text.get("num_hidden_layers")
    check_counts(text, layers, where)
    for part, key in ((text, "sparse_attention_config"), (text, "quantization_config"), (config, "quantization_config"), (config, "vision_config")):  # fmt: skip
        value = part.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise CheckpointError(f"{where}: '{key}' is {_shown(value)}, not an object: {REMEDY}.")
    check_counts(text.get("sparse_attention_config") or {}, layers, where)
    check_counts(config.get("vision_config") or {}, None, f"{where}, vision_config")
    check_counts({"projector_hidden_size": config.get("projector_hidden_size")}, None, where)
    check_promised(config, text, where)
    experts, chosen = text.get("num_local_experts"), text.get("num_experts_per_tok")
    if experts is not None and chosen is not None and chosen > experts:
        raise CheckpointError(f"{where}: {chosen} experts per token of {experts} in all cannot be: {REMEDY}.")


def check_promised(config: Mapping[str, Any], text: Mapping[str, Any], where: str, held: int | None = None) -> None:
    """Raise CheckpointError for counts that promise far more tensors than the headers hold, before anything loops over them.

    held: tensors in the headers; None for a config alone. Counts are those that `check_counts` let pass.
    """
    counts = {
        "num_hidden_layers": text.get("num_hidden_layers") or 0,
        "num_local_experts": text.get("num_local_experts") or 0,
        "vision_config.num_hidden_layers": (config.get("vision_config") or {}).get("num_hidden_layers") or 0,
    }
    layers, experts, vision = counts.values()
    promised = layers * (TENSORS_PER_LAYER + TENSORS_PER_EXPERT * experts) + vision * TENSORS_PER_VISION_LAYER
    promised += TENSORS_OUTSIDE
    limit = MAX_TENSORS if held is None else min(MAX_TENSORS, TIMES_HELD * held + SPARE_TENSORS)
    if promised > limit:
        named = ", ".join(f"{key} {value}" for key, value in counts.items() if value)
        known = "than any model has" if held is None else f"than the {held:,} in its shards allow"
        raise CheckpointError(f"{where}: {named} promise up to {promised:,} tensors, more {known}: {REMEDY}.")


def _shown(value: Any) -> str:
    text = repr(value) if type(value) is not int or abs(value) < 2**63 else f"a number of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:60]}..."
