"""Typed reading of config.json: a value is what it must be, or a CheckpointError names the key and says what to do. Torch-free.

A key whose value is null counts as absent, as in transformers. What is absent and has no default is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint.strict_json import described
from ..errors import CheckpointError
from .spec import Rope

REMEDY = "copy the original config.json of the release next to the weights"
# Far above any release, far below what a loop or a float could not take.
MAX_LAYERS, MAX_EXPERTS, MAX_HEADS, MAX_SIZE, MAX_VOCABULARY = 1024, 8192, 2**16, 2**24, 2**31
_MAX_DEPTH, _MAX_VALUES = 64, 1_000_000

# Keys that say nothing of the forward pass of a released model: bookkeeping, tokens, generation, training.
_HARMLESS = re.compile(
    r"_.*|architectures|auto_map|model_type|d?type|torch_dtype|(transformers|torch|unsloth|hf)[\w.]*"
    r"|quantization_config|compression_config|.*token_(id|ids|index)|.*_dropout|dropout|initializer_range"
    r"|use_cache|cache_implementation|max_position_embeddings|model_max_length|name_or_path|base_model\w*|license\w*"
    r"|router_(aux_loss_coef|jitter_noise|z_loss_coef)|output_\w+|return_dict\w*|torchscript|use_bfloat16|tf_legacy_loss"
    r"|pruned_heads|chunk_size_feed_forward|is_(encoder_)?decoder|cross_attention_hidden_size|add_cross_attention"
    r"|tie_encoder_decoder|finetuning_task|id2label|label2id|num_labels|problem_type|task_specific_params|prefix|decoder"
    r"|encoder|bad_words_ids|suppress_tokens|begin_suppress_tokens|do_sample|early_stopping|min_length|max_length"
    r"|num_beams|num_beam_groups|diversity_penalty|temperature|top_[kp]|typical_p|repetition_penalty|length_penalty"
    r"|no_repeat_ngram_size|encoder_no_repeat_ngram_size|num_return_sequences|remove_invalid_values|forced_\w+_token_id"
    r"|exponential_decay_length_penalty|pretraining_tp|use_mtp|num_mtp_modules|mtp_transformer_layers"
    r"|num_nextn_predict_layers|max_window_layers|num_reward_heads"
)


def check_values(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for what no JSON writer or float could take: half characters, NaN, endless numbers or nesting."""
    pending: list[tuple[str, Any, int]] = [("", config, 0)]
    seen = 0
    while pending:
        path, value, depth = pending.pop()
        seen += 1
        if depth > _MAX_DEPTH or seen > _MAX_VALUES:
            raise CheckpointError(f"{where} is nested or filled beyond any config.json: {REMEDY}.")
        if isinstance(value, str):
            _check_text(value, path, where)
        elif isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{where}: '{path}' is {value}, which is no number: {REMEDY}.")
        elif isinstance(value, int) and abs(value) >= 2**64:
            raise CheckpointError(f"{where}: '{path}' is {shown(value)}, beyond any config.json: {REMEDY}.")
        elif isinstance(value, Mapping):
            for key, part in value.items():
                _check_text(str(key), path, where)
                pending.append((f"{path}.{shown_key(key)}" if path else shown_key(key), part, depth + 1))
        elif isinstance(value, list):
            pending.extend((path, part, depth + 1) for part in value)


def _check_text(text: str, path: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        near = f"near '{path}'" if path else "at its top"
        raise CheckpointError(f"{where} holds {shown(text)} {near}, which is not text: {REMEDY}.") from None


class ConfigPart:
    """One object of config.json. name: the dotted path of the object, '' for the whole."""

    def __init__(self, values: Mapping[str, Any], where: str, name: str = "") -> None:
        self.values, self.where, self.name = values, where, name
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        self._asked.add(key)
        return self.values.get(key) is not None

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as parsed, or `default` where it is absent."""
        return self.values[key] if self.has(key) else default

    def need(self, key: str) -> Any:
        if not self.has(key):
            raise CheckpointError(f"{self.where} has no '{self.path(key)}': {REMEDY}.")
        return self.values[key]

    def part(self, key: str) -> ConfigPart | None:
        """An object inside this one, or None."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, value, "an object")
        return ConfigPart(value, self.where, self.path(key))

    def needed_part(self, key: str) -> ConfigPart:
        self.need(key)
        part = self.part(key)
        assert part is not None
        return part

    def count(self, key: str, most: int = MAX_SIZE, *, least: int = 1, default: int | None = None) -> int:
        """A whole number from `least` to `most`; needed where no default is given."""
        value = self.need(key) if default is None else self.raw(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, value, f"a whole number from {least} to {most:,}")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.need(key) if default is None else self.raw(key, default)
        if not is_positive(value):
            raise self.wrong(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.need(key) if default is None else self.raw(key, default)
        if value not in (True, False):  # 0 and 1 too
            raise self.wrong(key, value, "true or false")
        return bool(value)

    def per_layer(self, key: str, layers: int) -> list[Any]:
        """A list with an entry for each layer."""
        value = self.need(key)
        if not isinstance(value, list) or len(value) < layers:
            raise self.wrong(key, value, "a list with an entry for each layer")
        return value

    def flags(self, key: str, layers: int) -> list[bool]:
        values = self.per_layer(key, layers)
        for value in values:
            if value not in (True, False):
                raise self.wrong(key, values, "a list of 0 and 1")
        return [bool(value) for value in values]

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value that the forward pass does not compute; absence is one of the allowed values if None is."""
        found = self.raw(key)
        if found is None and None not in allowed:
            self.need(key)
        if not any(type(found) is type(value) and found == value for value in allowed):
            computed = " or ".join(repr(value) for value in allowed if value is not None) or "absent"
            raise CheckpointError(
                f"{self.where} says {self.path(key)} = {shown(found)}, but only {computed} is implemented for this architecture; "
                "a model that differs needs its own file in m3quant/families"
            )

    def refuse_unknown(self, harmless: re.Pattern[str] = _HARMLESS) -> None:
        """Refuse every key that was not read and that may change the forward pass: an unset or switched-off one does not."""
        for key, value in self.values.items():
            off = value is None or value is False or value == 0 or value in ("", [], {})
            if off or key in self._asked or harmless.fullmatch(key) or _HARMLESS.fullmatch(key):
                continue
            raise CheckpointError(
                f"{self.where} says {self.path(shown_key(key))} = {shown(value)}, which m3quant does not know for this "
                "architecture and which may change what the model computes: take the key out if it does not, or "
                f"{REMEDY}."
            )

    def path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def wrong(self, key: str, value: Any, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: '{self.path(key)}' is {shown(value)}, not {what}: {REMEDY}.")


def heads_of(text: ConfigPart, *, kv_needed: bool = True) -> tuple[int, int]:
    """(query heads, KV heads), the first a multiple of the second; as many of both where the second may be left out."""
    heads = text.count("num_attention_heads", MAX_HEADS)
    kv_heads = text.count("num_key_value_heads", MAX_HEADS, default=None if kv_needed else heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{text.where}: {heads} attention heads do not divide among {kv_heads} KV heads: {REMEDY}."
        )
    return heads, kv_heads


def top_k_of(text: ConfigPart, experts: int) -> int:
    chosen = text.count("num_experts_per_tok", MAX_EXPERTS)
    if chosen > experts:
        raise CheckpointError(f"{text.where}: {chosen} experts per token of {experts} in all cannot be: {REMEDY}.")
    return chosen


def full_attention_only(text: ConfigPart, layers: int, *, switch: bool) -> None:
    """Refuse sliding windows. switch: `use_sliding_window` decides whether `sliding_window` means anything."""
    if text.has("layer_types") and text.per_layer("layer_types", layers)[:layers] != ["full_attention"] * layers:
        text.expect("layer_types", ["full_attention"] * layers)
    if switch:
        text.expect("use_sliding_window", False, None)
        text.raw("sliding_window")
    else:
        text.expect("sliding_window", None)


def read_rope(
    text: ConfigPart, head_dim: int, *, kinds: Iterable[str] = ("default",), theta: float | None = None, partial: bool
) -> Rope:
    """Rotary embedding in the spelling of transformers 4 (`rope_theta`, `rope_scaling`, `rotary_dim`) or 5 (`rope_parameters`).

    theta: the default, where releases leave it out. partial: how many channels are turned must be stated somewhere;
    otherwise all are, and nothing may say less. Raises CheckpointError where two spellings disagree.
    """
    nested, scaling = text.part("rope_parameters"), text.part("rope_scaling")
    said = [part for part in (nested, scaling) if part is not None]
    thetas = [part.number("rope_theta") for part in (text, *said) if part.has("rope_theta")]
    if not thetas and theta is None:
        text.need("rope_theta")
    shares = [part.number("partial_rotary_factor") for part in (text, *said) if part.has("partial_rotary_factor")]
    sizes = [int(head_dim * share) for share in shares]
    if text.has("rotary_dim"):
        sizes.insert(0, text.count("rotary_dim"))
    if not sizes and partial:
        text.need("rotary_dim")
    if len(set(thetas)) > 1 or len(set(sizes)) > 1:
        raise CheckpointError(
            f"{text.where}: the rotary settings of '{text.path('rope_theta')}', 'rotary_dim', 'partial_rotary_factor' and "
            f"'rope_parameters' contradict one another (thetas {thetas}, rotated channels {sizes}): {REMEDY}."
        )
    size = sizes[0] if sizes else head_dim
    if size % 2 or not 0 < size <= head_dim or (not partial and size != head_dim):
        raise CheckpointError(
            f"{text.where} rotates {size} channels of a head's {head_dim} ('{text.path('rotary_dim')}' or "
            f"'partial_rotary_factor'), which this architecture does not: {REMEDY}."
        )
    scaled = _scaling(text, [part for part in said if _rope_kind(part) != "default"], tuple(kinds))
    return Rope(size, thetas[0] if thetas else float(theta or 0), **scaled)


def _rope_kind(part: ConfigPart) -> str:
    kind = part.raw("rope_type", part.raw("type", "default"))
    return kind if isinstance(kind, str) else described(kind)


def _scaling(text: ConfigPart, parts: list[ConfigPart], kinds: tuple[str, ...]) -> dict[str, Any]:
    if not parts:
        return {}
    part, kind = parts[0], _rope_kind(parts[0])
    if kind not in kinds:
        raise CheckpointError(
            f"{text.where} says {part.name} = {shown(part.values)}, but of scaled rotary embeddings "
            f"{', '.join(k for k in kinds if k != 'default') or 'none'} is implemented for this architecture."
        )
    found: dict[str, Any] = {"kind": kind, "factor": part.number("factor")}
    if kind == "llama3":
        found |= {"low": part.number("low_freq_factor"), "high": part.number("high_freq_factor")}
        found["original"] = part.count("original_max_position_embeddings", MAX_VOCABULARY)
        if found["low"] >= found["high"]:
            raise part.wrong("high_freq_factor", found["high"], "above low_freq_factor")
    return found


def is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 2**64


def shown(value: Any) -> str:
    """A value of config.json in a sentence, of bounded length."""
    if type(value) is int and abs(value) >= 2**63:
        return f"a number of {value.bit_length()} bits"
    return described(value, 60)


def shown_key(key: str) -> str:
    """A key of config.json in a sentence: cut, and escaped where a terminal would not print it."""
    cut = key if len(key) <= 60 else f"{key[:60]}..."
    return cut if cut.isprintable() else ascii(cut)
