"""Google Cloud Storage on localhost, as far as gcsfs reads: lists, metadata, and content by range.

https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.stores.objects import BUCKET, Objects, distorted

PAGE = 5  # objects in one answer to a list, so that lists have several pages


class GoogleStorage(Objects):
    data: dict[str, bytes]

    def put(self, name: str, data: bytes) -> None:
        self.data[name] = data

    def remove(self, name: str) -> None:
        del self.data[name]

    def facts(self, name: str) -> dict[str, Any]:
        data = self.data[name]
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        return {"kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(data)), "md5Hash": md5}

    def listed(self, prefix: str, delimiter: str, page: int) -> dict[str, Any]:
        below = sorted(name for name in self.data if name.startswith(prefix))
        folders = {
            prefix + n[len(prefix) :].split("/")[0] + "/" for n in below if delimiter and "/" in n[len(prefix) :]
        }
        items = [n for n in below if not (delimiter and "/" in n[len(prefix) :])]
        found: dict[str, Any] = {"kind": "storage#objects", "items": [self.facts(n) for n in items[page : page + PAGE]]}
        if page == 0:
            found["prefixes"] = sorted(folders)
        return found | ({"nextPageToken": str(page + PAGE)} if page + PAGE < len(items) else {})


class Handler(BaseHTTPRequestHandler):
    store: GoogleStorage
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes | dict[str, Any], **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        method = "GET" if query.get("alt") == "media" else "HEAD" if re.search(r"/o/.", path) else "LIST"
        self.store.before(f"{method} {path}")
        fault = self.store.fault_for(f"{method} {path}")
        if fault is not None and not fault.body_fault:
            assert fault.status is not None
            return self.answer(fault.status, {"error": {"code": fault.status, "message": "by the test"}})
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        assert found, path
        bucket, name = found.groups()
        if bucket != BUCKET or (name is not None and name not in self.store.data):
            return self.answer(404, {"error": {"code": 404, "message": "Not Found"}})
        if name is None:
            page = int(query.get("pageToken", "0"))
            return self.answer(200, self.store.listed(query.get("prefix", ""), query.get("delimiter", ""), page))
        if query.get("alt") != "media":
            return self.answer(200, self.store.facts(name))
        data = self.store.data[name]
        first, last = 0, len(data) - 1
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            first, last = int(asked[1]), min(last, int(asked[2] or last))
        part = data[first : last + 1]
        self.store.sent.append((name, len(part)))
        self.answer(206, distorted(part, fault), Content_Range=f"bytes {first}-{last}/{len(data)}")


@contextmanager
def running_gs() -> Iterator[GoogleStorage]:
    store = GoogleStorage("gs")
    store.data = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"store": store}))
    store.environment = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.server_address[1]}",
        "FSSPEC_GS_TOKEN": "anon",
    }
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
