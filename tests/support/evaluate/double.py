"""A small OpenAI-compatible server with a toy language model, whose every answer can be computed by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

KEY = "sk-test-1234"


def toy_logprobs(ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """[vocabulary] natural log-probs after `ids`: pseudo-random in the last three of them, always the same."""
    rng = np.random.default_rng([7, *map(int, ids[-3:])])
    logits = rng.normal(0, 2, vocabulary)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


class Double:
    """What the server offers, what it was asked, and how it misbehaves.

    offers: of "token_ids", "prompt_logprobs", "echo", "ids_out". before(path, body, number) -> (status, message,
    headers) or None decides a failure for request `number`.
    """

    def __init__(self, tokenizer: Any, offers: set[str], key: str | None = None) -> None:
        self.tokenizer, self.offers, self.key = tokenizer, offers, key
        self.vocabulary = len(tokenizer)
        self.asked: list[dict[str, Any]] = []
        self.before: Callable[[str, dict[str, Any], int], tuple[int, str, dict[str, str]] | None] = lambda *_: None
        self.answers: list[int] = []  # the ids that the next generations answer, instead of the toy model's

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        elif "token_ids" in self.offers:
            ids = list(prompt)
        else:
            raise ValueError("prompt must be a string")
        asked_logprobs = body.get("prompt_logprobs") is not None
        if asked_logprobs and "prompt_logprobs" not in self.offers:
            asked_logprobs = False  # ignored, as servers do with options they do not know
        if body.get("echo") and "echo" not in self.offers:
            raise ValueError("echo is not supported")
        made: list[int] = []
        for number in range(body["max_tokens"]):
            given = self.answers[number : number + 1]
            made += given or [int(toy_logprobs(ids + made, self.vocabulary).argmax())]
        text = self.tokenizer.decode(made)
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
        if asked_logprobs:
            rows: list[Any] = [None]
            for place in range(1, len(ids)):
                row = toy_logprobs(ids[:place], self.vocabulary)
                best = int(row.argmax())
                rows.append({str(t): {"logprob": float(row[t]), "rank": 1} for t in dict.fromkeys((ids[place], best))})
            choice["prompt_logprobs"] = rows
        if body.get("echo"):
            own: list[Any] = [None]
            tops: list[Any] = [None]
            for place in range(1, len(ids) + len(made)):
                row = toy_logprobs((ids + made)[:place], self.vocabulary)
                own.append(float(row[(ids + made)[place]]))
                tops.append({"best": float(row.max()), "own": own[-1]})
            choice["logprobs"] = {"token_logprobs": own, "top_logprobs": tops, "tokens": ["?"] * len(own)}
        if body.get("return_token_ids") and "ids_out" in self.offers:
            choice["token_ids"] = made
        return {"id": "x", "choices": [choice]}


@contextmanager
def serving(double: Double) -> Iterator[str]:
    """The double on a free port of localhost; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self._answer({"data": [{"id": "toy"}]}, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            double.asked.append(body)
            self._answer(None, body)

        def _answer(self, value: Any, body: dict[str, Any]) -> None:
            if double.key and self.headers.get("Authorization") != f"Bearer {double.key}":
                return self._send(401, {"error": {"message": "bad key"}}, {})
            failure = double.before(self.path, body, len(double.asked))
            if failure:
                status, message, headers = failure
                return self._send(status, {"error": {"message": message}}, headers)
            try:
                self._send(200, value or double.complete(body), {})
            except ValueError as error:
                self._send(400, {"error": {"message": str(error)}}, {})

        def _send(self, status: int, value: Any, headers: dict[str, str]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
