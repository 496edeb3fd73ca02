"""The KV cache guard: ASGI middleware for vLLM's own server (docs/guard.md)."""

from .middleware import Guard
from .settings import GuardSettings, read_settings

__all__ = ["Guard", "GuardSettings", "read_settings"]
