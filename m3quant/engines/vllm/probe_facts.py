"""What the loading probe must know about a family, since it runs without m3quant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...families import Family
from .command import NAME

PROBE = Path(__file__).with_name("probe.py")


def probe_facts(family: Family) -> dict[str, Any]:
    """JSON-able. towers: prefixes of tensors outside the language model; unread: tensors that are never looked at."""
    own = family.in_engine(NAME)
    return {
        "arguments": dict(own.probe_arguments),
        "gemma_norm": own.probe_norm,
        "towers": list(family.towers),
        "layers": family.num_layers,
        "unread": [family.head_name] if family.tied else [],
    }
