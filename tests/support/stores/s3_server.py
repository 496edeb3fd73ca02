"""S3 on localhost: moto's server (https://docs.getmoto.org), with the faults of a test before it."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.support.publish.hub_state import Fault
from tests.support.stores.objects import BUCKET, Objects, distorted

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
CODES = {403: "AccessDenied", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}


class S3(Objects):
    app: Any

    def put(self, name: str, data: bytes) -> None:
        self._call("PUT", f"/{BUCKET}/{name}", data)

    def remove(self, name: str) -> None:
        self._call("DELETE", f"/{BUCKET}/{name}")

    def create_bucket(self) -> None:
        self._call("PUT", f"/{BUCKET}")

    def _call(self, method: str, path: str, data: bytes = b"") -> None:
        """A request of the test's own: signed as one of S3 looks, so that moto knows the service."""
        seen: list[str] = []
        environ = {
            "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_HOST": "127.0.0.1", "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(data),
            "wsgi.errors": io.StringIO(), "CONTENT_LENGTH": str(len(data)),
            "HTTP_AUTHORIZATION": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0",
        }  # fmt: skip
        list(self.app(environ, lambda status, headers, info=None: seen.append(status)))
        assert seen[0][0] == "2", (method, path, seen)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.before(line)
        fault = self.fault_for(line)
        if fault is not None and not fault.body_fault:
            return _refusal(fault, start)
        told: list[Any] = []
        body = b"".join(self.app(environ, lambda *given: told.extend(given[:2])))
        if environ["REQUEST_METHOD"] == "GET" and told[0][0] == "2":
            self.sent.append((environ["PATH_INFO"], len(body)))
            if fault is not None:
                body = distorted(body, fault)
                told[1] = [(k, v) for k, v in told[1] if k.lower() != "content-length"]
                told[1].append(("Content-Length", str(len(body))))
        start(*told)
        return [body]


def _refusal(fault: Fault, start: Callable[..., Any]) -> Iterable[bytes]:
    code = CODES.get(fault.status or 0, "Other")
    body = ERROR.format(code=code, message=f"{code} by the test").encode()
    start(f"{fault.status} No", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextmanager
def running_s3() -> Iterator[S3]:
    store = S3("s3")
    store.app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Quiet)
    store.environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # botocore's own retries are silent, and slow down a test of ours
    }
    store.create_bucket()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
