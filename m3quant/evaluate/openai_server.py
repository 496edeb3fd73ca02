"""The client of an OpenAI-compatible server: what it offers, one request at a time, and its failures in one sentence each.

Only /v1/models and /v1/completions are used, over httpx2. Torch-free.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx2

from ..errors import EvaluationError
from ..running.retry import LONGEST_PAUSE_SECONDS, again, on_stderr, retry_after

PAUSES_SECONDS = (1.0, 2.0, 4.0)
TRIES = len(PAUSES_SECONDS) + 1
BODY_SHOWN = 300  # characters of a server's message
ERROR_BYTES = 65536  # of its body that are read
# Log-probs of a prompt of a million tokens, with the texts of two tokens at each place.
ANSWER_BYTES = 2**29


class Refused(Exception):
    """The server understood the request and does not serve it (a 4xx); the message is its own words."""


class _Answered(Exception):
    """The server's answer is no success; `said`: its own words."""

    def __init__(self, response: httpx2.Response, said: str) -> None:
        super().__init__(said)
        self.response, self.status, self.said = response, response.status_code, said
        self.passes = self.status == 429 or self.status >= 500


@dataclass(frozen=True)
class Offer:
    """What the server can do. token_ids: prompts as ids. logprobs: "prompt_logprobs", "echo" or None. ids_out: the ids of
    what it generates."""

    token_ids: bool
    logprobs: str | None
    ids_out: bool


class Server:
    """url: of the server, with or without /v1. model: a served name; the only one served if None. say: called for every wait.

    api_key_env: the environment variable that holds the key. Raises EvaluationError if nothing answers there, the key
    is refused, or the model is not served.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        api_key_env: str | None = None,
        timeout_s: float = 600.0,
        say: Callable[[str], None] = on_stderr,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.username or parts.password:
            raise EvaluationError(
                "--endpoint: take the user and password out of the URL; name a variable with --api-key-env."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or not _readable(parts):
            raise EvaluationError(f"--endpoint {url}: not a URL of a server; give one like http://localhost:8000.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._say = say
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **_authorization(api_key_env)}
        # A proxy for the outside world cannot reach this machine's own ports, and would be shown the key and the texts.
        own = {"http://": None, "https://": None} if _is_loopback(parts.hostname) else None
        try:
            self._client = httpx2.Client(headers=headers, timeout=timeout_s, mounts=own, follow_redirects=True)
        except (ImportError, ValueError, httpx2.InvalidURL) as error:  # of a proxy that a variable names
            raise EvaluationError(
                f"the proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used ({error}); correct or unset it."
            ) from error
        served = self._models()
        if model is None and len(served) != 1:
            raise EvaluationError(f"{self.url} serves {', '.join(served) or 'no model'}: say which with --model.")
        self.model = model or served[0]
        if served and self.model not in served:
            raise EvaluationError(f"{self.url} does not serve {self.model}; it serves {', '.join(served)}.")

    def _models(self) -> list[str]:
        try:
            answer = self._request("/v1/models", None)
        except Refused as error:
            raise EvaluationError(f"{self.url}/v1/models: {error}; is this an OpenAI-compatible server?") from error
        listed = answer.get("data")
        return (
            [str(one["id"]) for one in listed if isinstance(one, Mapping) and "id" in one]
            if isinstance(listed, list)
            else []
        )

    def complete(self, prompt: str | Sequence[int], **options: Any) -> dict[str, Any]:
        """The first choice of a completion at temperature 0. Raises Refused with the server's words for a 4xx."""
        body = {"model": self.model, "prompt": prompt if isinstance(prompt, str) else list(map(int, prompt))}
        answer = self._request("/v1/completions", {**body, "temperature": 0, **options})
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise EvaluationError(f"{self.url}/v1/completions answers without choices; is it OpenAI-compatible?")
        return {**choices[0], "prompt_logprobs": choices[0].get("prompt_logprobs") or answer.get("prompt_logprobs")}

    def offer(self, ids: Sequence[int], text: str) -> Offer:
        """Try out what the server takes, on a short prompt. Raises Refused if it takes none."""
        token_ids = True
        try:
            self.complete(ids, max_tokens=1)
        except Refused:
            token_ids = False
            self.complete(text, max_tokens=1)
        prompt = ids if token_ids else text
        logprobs = None
        for form, options in FORMS.items():
            try:
                choice = self.complete(prompt, **options)
            except Refused:
                continue
            if prompt_scores(choice, form) is not None:
                logprobs = form
                break
        ids_out = False
        with suppress(Refused):
            ids_out = generated_ids(self.complete(prompt, max_tokens=1, **IDS_OUT)) is not None
        return Offer(token_ids, logprobs, ids_out)

    def _request(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            return again(lambda: self._ask(path, body), self._passing, PAUSES_SECONDS, self._say)
        except _Answered as error:
            if error.status in (401, 403):
                raise EvaluationError(
                    f"{self.url} refuses the API key ({error.status}); set the key in a variable and name it with --api-key-env."
                ) from error
            if not error.passes:
                raise Refused(f"{error.status}: {error.said}") from error
            asked = retry_after(error) or 0.0
            how = f"and asks to wait {asked:.0f} s" if asked > LONGEST_PAUSE_SECONDS else f"{TRIES} times"
            raise EvaluationError(f"{self.url}{path} answered {error.status} {how}: {error.said}.") from error
        except httpx2.RemoteProtocolError as error:  # another protocol, or an answer that was cut short
            raise EvaluationError(
                f"{self.url} does not answer in HTTP ({type(error).__name__}); is this the server's port?"
            ) from error
        except httpx2.HTTPError as error:
            raise EvaluationError(f"{self.url} cannot be reached ({_why(error)}); is the server up?") from error

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """One request. Raises _Answered, or httpx2.HTTPError where there is no answer."""
        data = None if body is None else json.dumps(body).encode()
        method = "GET" if data is None else "POST"
        with self._client.stream(method, self.url + path, content=data) as response:
            if not response.is_success:
                raise _Answered(response, _message(_first_bytes(response, ERROR_BYTES), response.reason_phrase))
            return _json_object(_first_bytes(response, ANSWER_BYTES + 1), self.url + path)

    def _passing(self, error: Exception) -> str | None:
        """What happened, in words, if it may pass."""
        if isinstance(error, _Answered):
            return f"{self.url} answered {error.status}" if error.passes else None
        # Nothing listens there: waiting does not help. A timeout is a minute's work thrown away: not repeated.
        refused = any(isinstance(cause, ConnectionRefusedError) for cause in _behind(error))
        if refused or isinstance(error, httpx2.TimeoutException) or not isinstance(error, httpx2.HTTPError):
            return None
        return f"{self.url} did not answer ({_why(error)})"


FORMS: dict[str, dict[str, Any]] = {
    "prompt_logprobs": {"max_tokens": 1, "prompt_logprobs": 1},
    "echo": {"max_tokens": 1, "echo": True, "logprobs": 1},
}
# vLLM's options; servers that do not know them ignore or refuse them.
IDS_OUT: dict[str, Any] = {"logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True}


def prompt_scores(choice: Mapping[str, Any], form: str) -> list[tuple[float, int | None, bool] | None] | None:
    """Per prompt token (log-prob, best id if known, whether it is the best); None for the first, or if none were given.

    `prompt_logprobs` is vLLM's: a dict of the prompt's own token and the most likely one at each place. `echo` is the
    legacy OpenAI form, which names tokens by text: the best one is known only where it is the prompt's own.
    Raises EvaluationError for rows of another form.
    """
    try:
        return _scores(choice, form)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"the server answers {form} in a form that is not known here ({type(error).__name__}: {error}); leave out the tasks that need log-probs."
        ) from error


def _scores(choice: Mapping[str, Any], form: str) -> list[tuple[float, int | None, bool] | None] | None:
    if form == "prompt_logprobs":
        rows = choice.get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) < 2:
            return None
        return [_row(row) for row in rows]
    given = choice.get("logprobs")
    if not isinstance(given, Mapping) or len(given.get("token_logprobs") or []) < 2:
        return None
    own, tops = given["token_logprobs"], given.get("top_logprobs") or []
    if own[1] is None or len(tops) < len(own) - 1:
        return None
    # The generated token follows the prompt's.
    out: list[tuple[float, int | None, bool] | None] = []
    for value, top in zip(own[:-1], tops, strict=False):
        best = max(top.values()) if top else None
        out.append(None if value is None else (float(value), None, best is not None and float(value) >= float(best)))
    return out


def _row(row: Any) -> tuple[float, int | None, bool] | None:
    """vLLM lists the prompt's own token first, then the most likely ones; equal ones are decided for the lower id."""
    if not row:
        return None
    entries = [(int(token), float(entry["logprob"])) for token, entry in row.items()]
    own, value = entries[0]
    best = min(entries, key=lambda entry: (-entry[1], entry[0]))[0]
    return value, best, best == own


def generated_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """Ids of the generated tokens, where the server gives them."""
    ids, given = choice.get("token_ids"), choice.get("logprobs")
    if not isinstance(ids, list):
        tokens = given.get("tokens") if isinstance(given, Mapping) else None
        marked = [str(token).partition("token_id:") for token in tokens] if isinstance(tokens, list) else []
        ids = [
            number if not before and mark else "" for before, mark, number in marked
        ]  # without the mark they are texts
    texts = [str(token) for token in ids] if ids else []
    return [int(text) for text in texts] if texts and all(t.isdecimal() and len(t) < 19 for t in texts) else None


def finite(value: float) -> bool:
    # vLLM writes -9999 for a log-prob that JSON cannot hold.
    return math.isfinite(value) and value > -9999


def _readable(parts: urllib.parse.SplitResult) -> bool:
    """Whether the HTTP library accepts it, and the port, if there is one, is valid."""
    try:
        httpx2.URL(parts.geturl())
        return parts.port != 0
    except (ValueError, httpx2.InvalidURL):
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise EvaluationError(f"--api-key-env {variable}: that variable is not set; export it with the server's key.")
    if not key.isascii() or not key.isprintable():  # the HTTP client's own refusal would show the key
        raise EvaluationError(
            f"--api-key-env {variable}: that variable holds a line break or another character that no key has."
        )
    return {"Authorization": f"Bearer {key}"}


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > ANSWER_BYTES:
        raise EvaluationError(
            f"{where} answers with more than {ANSWER_BYTES:,} bytes; is this an OpenAI-compatible server?"
        )
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where} does not answer in JSON; is this an OpenAI-compatible server?") from error
    if not isinstance(value, dict):
        raise EvaluationError(f"{where} does not answer with an object; is this an OpenAI-compatible server?")
    return value


def _message(body: bytes, reason: str) -> str:
    """The server's own words, shortened: `error.message` of an OpenAI error, else the body, else HTTP's `reason`."""
    said = body.decode("utf-8", "replace").strip()
    try:
        value = json.loads(said)
        inner = value.get("error", value)
        text = str(inner.get("message", said) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError, RecursionError):
        text = said
    return (text or reason or "no message")[:BODY_SHOWN]


def _first_bytes(response: httpx2.Response, limit: int) -> bytes:
    """At most `limit` bytes of the body as they come: never more is read, whatever the server sends."""
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) >= limit:
            break
    return bytes(data[:limit])


def _behind(error: BaseException) -> Iterator[BaseException]:
    """A failure and all that it came from; the HTTP library chains some by `from` and some by context."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _why(error: httpx2.HTTPError) -> str:
    return str(error) or type(error).__name__
