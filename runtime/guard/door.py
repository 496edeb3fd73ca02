"""Access: API keys, and a name for each key that does not reveal it."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from typing import Any

from .replies import unauthorized
from .settings import GuardSettings


class Door:
    def __init__(self, keys: Iterable[str], open_paths: tuple[str, ...]) -> None:
        self.digests = [digest(key) for key in keys]
        self.open_paths = frozenset(open_paths)

    def class_of(self, name: str) -> str:
        """Under which name to remember what is learned about a caller: one for all whose keys are not verified, else anyone could make up names."""
        return name if self.digests else ""

    def check(self, path: str, method: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The name of the caller's key. Raises the 401 refusal; an open path and a CORS preflight need no key.

        Without keys of its own the guard names callers by what they present, unverified: enough for fairness, not for security.
        """
        given = presented(headers)
        if not self.digests:
            return digest(given).hex()[:16] if given else "anonymous"
        found = None
        if given is not None:
            mine = digest(given)
            for index, known in enumerate(self.digests):  # every key is compared, so the time says nothing
                if hmac.compare_digest(mine, known):
                    found = f"key-{index}"
        if found is None and method != "OPTIONS" and path not in self.open_paths:
            raise unauthorized()
        return found or "anonymous"


def presented(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key in `Authorization: Bearer` or, as Anthropic's clients send it, `x-api-key`."""
    other = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.decode("utf-8", "replace").partition(" ")
            if scheme.lower() == "bearer" and key.strip():
                return key.strip()
        elif name == b"x-api-key" and value:
            other = value.decode("utf-8", "replace")
    return other


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()


def known_keys(settings: GuardSettings, scope: dict[str, Any]) -> list[str]:
    """The guard's keys; without any, those that vLLM was started with, so that callers without a key cannot fill the queue."""
    if settings.api_keys:
        return [key.get_secret_value() for key in settings.api_keys]
    args = getattr(getattr(scope.get("app"), "state", None), "args", None)
    given = getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY") or []
    return [key for key in ([given] if isinstance(given, str) else given) if key]
