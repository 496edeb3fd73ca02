"""What went wrong when the Hub was asked for something: read from the exceptions of huggingface_hub 1.x (on httpx) and 2.x (on httpx2).

A `Failure` holds all that is told of it, and can be pickled: exceptions of the HTTP library cannot, nor does what caused them survive that.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..errors import M3QuantError
from ..running.retry import causes
from ..running.workers import WorkerLost


class Kind(Enum):
    """HUB: an answer of the Hub that is no success, or a network that does not carry. OFFLINE: HF_HUB_OFFLINE. FILE: one to send
    cannot be read. REFUSED: the client's own check, or an answer that refuses a part. XET: its failures have no kinds."""

    HUB = "hub"
    OFFLINE = "offline"
    FILE = "file"
    REFUSED = "refused"
    XET = "xet"


@dataclass(frozen=True)
class Failure:
    """status: of the answer, None if there was none. said: what the Hub says of it, else what is known; without the token.
    name: what it was where there was no answer."""

    kind: Kind
    said: str = ""
    status: int | None = None
    name: str = ""


class FailedApart(Exception):
    """A request that failed in another process. pause_seconds: what the Hub asks to wait (`running.retry.retry_after`)."""

    def __init__(self, failure: Failure, pause_seconds: float | None) -> None:
        super().__init__(failure, pause_seconds)
        self.failure, self.pause_seconds = failure, pause_seconds


def failure_of(error: Exception, token: str) -> Failure | None:
    """What failed; None for a sentence of ours and for a defect, which are to be raised as they are. token: hidden in what is said."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, FailedApart):
        return error.failure
    if any(isinstance(e, OfflineModeIsEnabled) for e in causes(error)):
        return Failure(Kind.OFFLINE)
    root = _root(error)
    if root is not None:
        name = str(root) if isinstance(root, WorkerLost) else type(root).__name__
        return Failure(Kind.HUB, reason_of(error, token), status_of(error), name)
    if isinstance(error, M3QuantError):
        return None
    local = next((e for e in causes(error) if isinstance(e, OSError)), None)
    if local is not None:
        return Failure(Kind.FILE, f"{local.filename or 'A file to send'} cannot be read: {local.strerror or local}.")
    text = " ".join(str(error).split()).replace(token, "***")[:300]
    if isinstance(error, ValueError):
        return Failure(Kind.REFUSED, text)
    if isinstance(error, RuntimeError):  # Xet has no exceptions of its own
        return Failure(Kind.XET, text)
    return None


def _http_error() -> type[Exception]:
    """Base of all exceptions of the HTTP library under huggingface_hub: httpx or httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _root(error: Exception) -> BaseException | None:
    """The answer or the network behind a failure, None for any other."""
    kinds = (_http_error(), ConnectionError, TimeoutError)
    return next((e for e in causes(error) if isinstance(e, kinds)), None)


def status_of(error: BaseException) -> int | None:
    """HTTP status of the answer that a failure is about, None if there was none."""
    for link in causes(error):
        response = getattr(link, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


# A reason is a sentence; an HTML page of a proxy is none.
REASON_BYTES, REASON_CHARACTERS = 64 * 1024, 300


def reason_of(error: BaseException, token: str) -> str:
    """What the Hub itself says of a refusal: the header X-Error-Message, or `error` or `message` of a JSON answer; "" for neither.

    One line, cut, without the token and without what follows the ? of an address. https://huggingface.co/docs/hub/api
    """
    response = next((r for link in causes(error) if (r := getattr(link, "response", None)) is not None), None)
    if response is None:
        return ""
    said = response.headers.get("X-Error-Message") or _json_reason(response)
    said = re.sub(r"(https?://[^\s?\"']+)\?[^\s\"']*", r"\1", " ".join(said.split()))
    if token:
        said = said.replace(token, "***")
    said = "".join(c for c in said if c.isprintable()).rstrip(". ")
    return said if len(said) <= REASON_CHARACTERS else said[: REASON_CHARACTERS - 3] + "..."


def _json_reason(response: Any) -> str:
    try:
        content = response.content
        answer = json.loads(content) if len(content) <= REASON_BYTES else None
    except (ValueError, RuntimeError, RecursionError):  # no JSON; RuntimeError: a streamed answer that was not read
        return ""
    found = (answer.get("error") or answer.get("message")) if isinstance(answer, dict) else None
    return found if isinstance(found, str) else ""
