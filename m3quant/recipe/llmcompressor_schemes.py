"""Schemes as llm-compressor and compressed-tensors write them: preset names and `weights` / `input_activations` groups.

What they mean is compressed-tensors' `quant_scheme.PRESET_SCHEMES` and `quant_args.QuantizationArgs` (0.20). A form
that m3quant cannot write is refused with the reason; nothing is ignored.

The table is here and not only in the library because planning works without torch, which compressed-tensors imports;
tests/recipe holds it to the library's. A name that it lacks (a newer release's) is looked up in the installed library.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from ..extras import installed
from ..schemes import FP8_BLOCK, GROUP_SIZES, INT_BITS, KEEP, Scheme, parse_scheme

PRESETS: Mapping[str, Scheme] = {
    "UNQUANTIZED": KEEP,
    **{f"W{bits}A16": parse_scheme(f"int{bits}-g128") for bits in INT_BITS},
    "W4A16_ASYM": parse_scheme("int4-g128-asym"),
    "FP8_DYNAMIC": parse_scheme("fp8-channel"),
    "FP8_BLOCK": parse_scheme("fp8-block"),
}

_HAVE = "m3quant has W2A16 to W8A16, W4A16_ASYM, FP8_DYNAMIC and FP8_BLOCK"
_FP4 = f"stores weights in FP4, which m3quant does not write: {_HAVE}; for 4 bits use W4A16"
_MX = (
    f"is a microscaling format (E8M0 scales), which m3quant reads but does not write: {_HAVE}; for 8 bits use FP8_BLOCK"
)
_INT_ACTIVATIONS = (
    f"rounds activations to integers, which m3quant does not write: {_HAVE}; use W4A16 or W8A16 for integer weights, "
    "or FP8_DYNAMIC for 8-bit activations"
)
_STATIC = (
    "needs per-tensor FP8 scales, and for activations static ones: m3quant writes one weight scale per channel or "
    "128x128 block with activations rounded at run time; use FP8_DYNAMIC or FP8_BLOCK"
)
_REFUSED = (
    (r"NVFP4.*", _FP4),
    (r"MXFP4.*", _FP4),
    (r"MX.*", _MX),
    (r"W8A8|INT8|W\dA4|W\dA8", _INT_ACTIVATIONS),
    (r"W4AFP8", f"rounds activations to FP8 with INT4 weights, which m3quant does not write: {_HAVE}; use W4A16"),
    (r"FP8", _STATIC),
)

_GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGUMENTS = (
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
    "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
)  # fmt: skip
_FORMATS = {"int": "pack-quantized", "fp8": "float-quantized"}


def is_preset(name: str) -> bool:
    """Whether compressed-tensors has, or m3quant refuses by name, a preset called `name` (in any case)."""
    if name.upper() in PRESETS or any(re.fullmatch(pattern, name.upper()) for pattern, _ in _REFUSED):
        return True
    return name not in _GROUP_KEYS and _library_preset(name) is not None


def _library_preset(name: str) -> dict[str, Any] | None:
    """The config group of a preset that the installed compressed-tensors has; None without the library or the preset."""
    if not installed("compressed_tensors"):
        return None
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    found = PRESET_SCHEMES.get(name.upper())
    if found is None:
        return None
    group: dict[str, Any] = QuantizationScheme(targets=[], **copy.deepcopy(found)).model_dump(mode="json")
    return {key: value for key, value in group.items() if key != "targets"}


def preset_scheme(name: object, where: str) -> Scheme:
    """The scheme of a preset. Raises RecipeError with the reason and the nearest preset that m3quant has."""
    if not isinstance(name, str):
        raise RecipeError(f"{where}: scheme {name!r} is not a preset's name; {_HAVE}.")
    if name.upper() in PRESETS:
        return PRESETS[name.upper()]
    for pattern, reason in _REFUSED:
        if re.fullmatch(pattern, name.upper()):
            raise RecipeError(f"{where}: scheme {name} {reason}.")
    if (group := _library_preset(name)) is not None:
        return group_scheme(group, f"{where}: scheme {name}")
    near = difflib.get_close_matches(name.upper(), PRESETS, n=1, cutoff=0.0)[0]
    raise RecipeError(f"{where}: unknown scheme '{name}': did you mean '{near}'? {_HAVE}.")


def group_scheme(group: Mapping[str, Any], where: str) -> Scheme:
    """The scheme of a config group. Raises RecipeError for anything in it that m3quant does not write."""
    _known(group, _GROUP_KEYS, where)
    if group.get("output_activations"):
        raise RecipeError(f"{where}: output_activations are not quantized by m3quant; remove them.")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None:
        if inputs:
            raise RecipeError(f"{where}: input_activations without weights: give the group weights, or remove it.")
        return KEEP
    scheme = _weights(_arguments(weights, f"{where}.weights"), f"{where}.weights")
    _check_inputs(scheme, inputs, f"{where}.input_activations")
    stored = group.get("format")
    if stored not in (None, _FORMATS[scheme.kind]):
        raise RecipeError(f"{where}: {scheme} is stored as {_FORMATS[scheme.kind]}, not {stored}; remove 'format'.")
    return scheme


def weight_observer(group: Mapping[str, Any]) -> str | None:
    """The observer that a config group names for its weights."""
    weights = group.get("weights")
    return weights.get("observer") if isinstance(weights, Mapping) else None


def _arguments(given: object, where: str) -> dict[str, Any]:
    """QuantizationArgs with its defaults filled in and the strategy inferred as compressed-tensors infers it."""
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where} is {given!r}: write a mapping with num_bits, type, strategy and so on.")
    _known(given, _ARGUMENTS, where)
    if given.get("observer_kwargs"):
        raise RecipeError(
            f"{where}: observer_kwargs {dict(given['observer_kwargs'])} have no counterpart in m3quant; remove them."
        )
    arguments = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    arguments |= {key: value for key, value in given.items() if value is not None}
    for key in ("type", "strategy"):
        if key in arguments:
            arguments[key] = str(arguments[key]).lower()
    if "strategy" not in arguments:
        size = arguments.get("group_size")
        arguments["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    return arguments


def _weights(arguments: Mapping[str, Any], where: str) -> Scheme:
    bits, kind, strategy = arguments["num_bits"], arguments["type"], arguments["strategy"]
    if arguments.get("actorder"):
        raise RecipeError(f"{where}: actorder reorders columns for GPTQ, which m3quant does not do; remove it.")
    if arguments["dynamic"]:
        raise RecipeError(f"{where}: weights are rounded once, when they are written; set dynamic: false.")
    if arguments.get("scale_dtype"):
        raise RecipeError(f"{where}: scale_dtype is fixed in m3quant (BF16 for integers, F32 for FP8); remove it.")
    if strategy == "tensor":
        remedy = "use strategy group or channel" if kind == "int" else "use FP8_DYNAMIC (channel) or FP8_BLOCK"
        raise RecipeError(
            f"{where}: one scale for the whole tensor loses too much and is not written by m3quant; {remedy}."
        )
    if kind == "int":
        return _integer(arguments, where)
    if kind != "float":
        raise RecipeError(f"{where}: type '{kind}' is unknown; it is int or float.")
    if bits == 4:
        raise RecipeError(f"{where}: num_bits 4 with type float {_FP4}.")
    if bits != 8:
        raise RecipeError(
            f"{where}: num_bits {bits} with type float is not written by m3quant; floats have 8 bits (E4M3)."
        )
    if not arguments["symmetric"]:
        raise RecipeError(f"{where}: FP8 weights have no zero point; set symmetric: true.")
    if strategy == "channel":
        return PRESETS["FP8_DYNAMIC"]
    if strategy == "block":
        if arguments.get("block_structure") not in ([FP8_BLOCK, FP8_BLOCK], f"{FP8_BLOCK}x{FP8_BLOCK}"):
            raise RecipeError(
                f"{where}: block_structure {arguments.get('block_structure')}: FP8 blocks are [128, 128]."
            )
        return PRESETS["FP8_BLOCK"]
    raise RecipeError(f"{where}: 8-bit floats with strategy {strategy} {_MX}.")


def _integer(arguments: Mapping[str, Any], where: str) -> Scheme:
    bits, strategy, symmetric = arguments["num_bits"], arguments["strategy"], arguments["symmetric"]
    if bits not in INT_BITS:
        raise RecipeError(
            f"{where}: num_bits {bits} is not written by m3quant: integers have {INT_BITS[0]} to {INT_BITS[-1]} bits."
        )
    if arguments.get("zp_dtype", "torch.int8") not in ("torch.int8", "int8"):
        raise RecipeError(f"{where}: zp_dtype is int8 in m3quant, not {arguments['zp_dtype']}; remove it.")
    if strategy not in ("group", "channel"):
        raise RecipeError(
            f"{where}: integers with strategy {strategy} are not written by m3quant; use group or channel."
        )
    if strategy == "channel" and arguments.get("group_size", -1) != -1:
        raise RecipeError(f"{where}: strategy channel has no group_size; remove one of them.")
    if strategy == "group" and not isinstance(arguments.get("group_size"), int):
        raise RecipeError(f"{where}: strategy group needs a group_size, for example 128.")
    columns = f"g{arguments['group_size']}" if strategy == "group" else "channel"
    try:
        return parse_scheme(f"int{bits}-{columns}" + ("" if symmetric else "-asym"))
    except RecipeError:
        raise RecipeError(
            f"{where}: group_size {arguments['group_size']} is not one of {', '.join(map(str, GROUP_SIZES))}."
        ) from None


def _check_inputs(scheme: Scheme, inputs: object, where: str) -> None:
    """Integers do not change activations; FP8 rounds them at run time, per token or per 128 columns of a token."""
    if inputs is None:
        if scheme.kind == "fp8":
            name = "FP8_BLOCK" if scheme.block else "FP8_DYNAMIC"
            raise RecipeError(
                f"{where} is missing: FP8 weights with BF16 activations are not written by m3quant; use {name}, whose "
                "activations are rounded at run time."
            )
        return
    arguments = _arguments(inputs, where)
    if scheme.kind == "int":
        raise RecipeError(
            f"{where}: a group with INT{scheme.bits} weights and quantized activations {_INT_ACTIVATIONS}."
        )
    if not arguments["dynamic"]:
        raise RecipeError(f"{where}: static activation scales are not measured by m3quant; set dynamic: true.")
    wanted = ("group", FP8_BLOCK) if scheme.block else ("token", None)
    found = (arguments["strategy"], arguments.get("group_size"))
    if (
        (arguments["num_bits"], arguments["type"]) != (8, "float")
        or found != wanted
        or arguments["dynamic"] is not True
    ):
        raise RecipeError(
            f"{where}: {scheme} goes with 8-bit float activations, dynamic, strategy {wanted[0]}"
            + (f", group_size {wanted[1]}" if wanted[1] else "")
            + f"; write scheme {'FP8_BLOCK' if scheme.block else 'FP8_DYNAMIC'} instead."
        )


def _known(given: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]
            raise RecipeError(f"{where} has an unknown key '{key}': did you mean '{near}'?")
