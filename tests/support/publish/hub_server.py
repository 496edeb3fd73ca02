"""A Hub on localhost for tests: the routes that huggingface_hub 1.x and 2.x call to read, upload and settle a model repo.

Its state (hub_state.py) is there for tests to look at: they count the bytes that came in, make the server misbehave
(`Fault`), act at a chosen request (`Hub.before`, `Hub.after`), and see what the public sees (`Hub.public_view`).
"""

import base64
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.publish.hub_state import ATTRIBUTES, Commit, Discarded, Entry, Fault, Hub, Repo
from tests.support.publish.streams import Sink


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    sink: Sink
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: without this, the second waits 40 ms

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content_Type": "application/json", **headers}
        self.hub.after(self.line)
        if self.lost is not None:
            return self.misbehave(self.lost)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                # The client has read as much as it wanted, and hung up.
                self.close_connection = True

    def misbehave(self, fault: Fault) -> None:
        self.lost = None
        if fault.status is None:
            self.close_connection = True
            return
        self.answer(fault.status, fault.body, **fault.headers)

    def handle_any(self) -> None:
        self.lost: Fault | None = None
        self.distortion: Fault | None = None
        self.streaming: Callable[[], None] | None = None
        self.line = f"{self.command} {unquote(urlsplit(self.path).path)}"
        try:
            received = self.receive()
            if self.hub.before(self.line) is False:
                self.close_connection = True
                return
            with self.hub.lock:
                fault = self.hub.fault_for(self.line)
                if fault is not None and fault.body_fault:
                    fault, self.distortion = None, fault
                if fault is not None and not fault.after:
                    return self.misbehave(fault)
                self.lost = fault
                self.hub.log.append((self.line, received))
                self.route()
            if self.streaming is not None:  # without the lock: files go out side by side
                self.streaming()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def receive(self) -> int:
        """Take the request's body into `self.body`, or into the sink; its bytes."""
        count = int(self.headers.get("Content-Length") or 0)
        parts = self.line.split(" ", 1)[1].strip("/").split("/")
        if self.hub.discards and self.command == "PUT" and parts[0] == "lfs":
            self.body = b""
            number = int(parts[4]) if len(parts) > 4 else 1
            self.sink.take("/".join(parts[1:3]), parts[3], number, cast("BinaryIO", self.rfile), count, self.hub.up)
            return count
        self.body = self.rfile.read(count)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self.read_chunks()
        if self.command == "PUT":
            self.hub.up.take(len(self.body))
        return len(self.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    # -- who asks, and what for --

    @property
    def user(self) -> tuple[str, str] | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, name: str) -> bool:
        user = self.user
        return user is not None and user[1] != "read" and name.split("/")[0] in (user[0], *self.hub.organizations)

    def refused(self, repo: Repo | None, write: bool = False) -> bool:
        if repo is None or (repo.private and self.user is None):
            status = 404 if self.user else 401
            self.answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif write and not self.may_write(repo.name):
            self.answer(403, {"error": "Forbidden"}, X_Error_Message="no write permission")
        elif repo.status != 200:
            code = {"X_Error_Code": repo.error_code} if repo.error_code else {}
            self.answer(repo.status, b"<html>no</html>", **code)
        else:
            return False
        return True

    def no_revision(self) -> None:
        self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")

    def route(self) -> None:
        raw = urlsplit(self.path).path.strip("/").split("/")
        parts = [unquote(part) for part in raw]
        line = self.command, *parts[:2]
        if parts[:2] == ["api", "whoami-v2"]:
            self.whoami()
        elif parts[:3] == ["api", "repos", "create"]:
            self.create_repo(json.loads(self.body))
        elif parts[:2] == ["api", "validate-yaml"]:
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[:2] == ["api", "models"]:
            self.model("/".join(parts[2:4]), parts[4] if len(parts) > 4 else "", parts[5:])
        elif parts[0] == "lfs":
            self.lfs_content("/".join(parts[1:3]), parts[3], parts[4:])
        elif parts[2:5] == ["info", "lfs", "objects"]:
            self.lfs_batch("/".join(parts[:2]).removesuffix(".git"))
        elif parts[0] == "cdn":
            self.content(self.hub.repos["/".join(parts[1:3])], "main", "/".join(parts[3:]))
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve(self.hub.repos.get("/".join(parts[:2])), parts[3], "/".join(parts[4:]))
        else:
            raise AssertionError(f"the test server has no route for {line}")

    def whoami(self) -> None:
        if self.user is None:
            return self.answer(401, {"error": "Invalid"}, X_Error_Message="Invalid credentials in Authorization header")
        name, role = self.user
        self.answer(200, {"name": name, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create_repo(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or (self.user or ('?',))[0]}/{wanted['name']}"
        if not self.may_write(name):
            return self.answer(403 if self.user else 401, {"error": "You don't have the rights"})
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.hub.add(name, {ATTRIBUTES: b"*.safetensors filter=lfs\n"}, private=private)
        self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def model(self, name: str, verb: str, rest: list[str]) -> None:
        repo = self.hub.repos.get(name)
        writes = verb in ("commit", "branch", "tag", "settings", "preupload")
        if self.refused(repo, writes):
            return
        assert repo is not None
        revision = rest[0] if rest else "main"
        if verb == "refs":
            return self.refs(repo)
        if verb == "settings":
            wanted = json.loads(self.body)
            repo.private = wanted.get("private", wanted.get("visibility") == "private")
            return self.answer(200, {})
        if verb == "branch":
            return self.branch(repo, revision)
        if verb == "lfs-files":
            return self.duplicate(repo, json.loads(self.body))
        commit = repo.find(revision)
        if commit is None:
            return self.no_revision()
        getattr(self, {"": "repo_info", "revision": "repo_info", "paths-info": "paths_info"}.get(verb, verb))(
            repo, revision, commit
        )

    # -- reading --

    def repo_info(self, repo: Repo, revision: str, commit: Commit) -> None:
        siblings = []
        for path, entry in commit.tree.items():
            facts = {"rfilename": path, "size": repo.sizes.get(path, entry.size), "blobId": entry.git_sha1}
            if entry.lfs:
                facts["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
            siblings.append(facts)
        info = {"_id": "1", "id": repo.name, "modelId": repo.name, "sha": commit.oid, "private": repo.private}
        self.answer(200, info | {"siblings": siblings})

    def refs(self, repo: Repo) -> None:
        def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in refs.items()]

        self.answer(
            200, {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []}
        )

    def tree(self, repo: Repo, revision: str, commit: Commit) -> None:
        folders = {path.rsplit("/", 1)[0] for path in commit.tree if "/" in path}
        entries = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]
        self.answer(200, entries + [e.facts(p) for p, e in commit.tree.items()])

    def paths_info(self, repo: Repo, revision: str, commit: Commit) -> None:
        asked = parse_qs(self.body.decode())["paths"]
        self.answer(200, [commit.tree[p].facts(p) for p in asked if p in commit.tree])

    def commits(self, repo: Repo, revision: str, commit: Commit) -> None:
        out, oid = [], commit.oid
        while oid is not None:
            found = repo.commits[oid]
            date = "2026-01-01T00:00:00.000Z"
            out.append({"id": oid, "title": found.title, "message": "", "date": date, "authors": [{"user": "u"}]})
            oid = found.parent
        self.answer(200, out)

    def resolve(self, repo: Repo | None, revision: str, path: str) -> None:
        if self.refused(repo):
            return
        assert repo is not None
        commit = repo.find(revision)
        if commit is None:
            self.no_revision()
        elif repo.files_status:
            self.answer(repo.files_status, b"", **({"X_Error_Code": repo.error_code} if repo.error_code else {}))
        elif path not in commit.tree:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        elif repo.redirects and path.endswith(".safetensors"):
            self.answer(302, b"", Location=f"/cdn/{repo.name}/{path}", X_Repo_Commit=commit.oid)
        else:
            self.content(repo, revision, path)

    def content(self, repo: Repo, revision: str, path: str) -> None:
        commit = repo.find(revision)
        assert commit is not None
        entry = commit.tree[path]
        etag = entry.sha256 if entry.lfs else entry.git_sha1
        common = {"ETag": f'"{etag}"', "X_Repo_Commit": commit.oid, "Accept_Ranges": "bytes"}
        asked = self.headers.get("Range")
        if repo.failures and path.endswith(".safetensors"):
            return self.answer(repo.failures.pop())
        if asked is None or repo.ignores_range:
            self.hub.sent.append((repo.name, path, entry.size if self.command == "GET" else 0))
            return self.send_file(200, entry, 0, entry.size, common)
        first, last = asked.removeprefix("bytes=").split("-")
        end = min(int(last) + 1, entry.size) if last else entry.size
        stop = end if repo.cuts is None else min(end, int(first) + repo.cuts)
        self.hub.sent.append((repo.name, path, stop - int(first)))
        self.send_file(
            206, entry, int(first), stop, common | {"Content_Range": f"bytes {first}-{end - 1}/{entry.size}"}
        )

    def send_file(self, status: int, entry: Entry, first: int, end: int, headers: dict[str, str]) -> None:
        """Bytes of a file, once the lock is free, as slowly as the server is asked to, and distorted if a fault says so."""
        fault, half = self.distortion, (end - first) // 2

        def stream() -> None:
            self.hub.after(self.line)
            if self.lost is not None:
                return self.misbehave(self.lost)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(end - first))
            self.end_headers()
            if self.command == "HEAD":
                return
            done = 0
            for piece in self.hub.down.cut(entry.pieces(first, end)):
                if fault and fault.body_fault != "wrong" and done + piece.nbytes > half >= done:
                    self.wfile.write(piece[: half - done])
                    if fault.body_fault == "cut":
                        self.close_connection = True
                        return self.connection.shutdown(socket.SHUT_RDWR)
                    time.sleep(fault.seconds)
                    self.wfile.write(piece[half - done :])
                elif fault and fault.body_fault == "wrong" and first + done + piece.nbytes == end:
                    self.wfile.write(bytes([*piece[:-1], piece[-1] ^ 1]))
                else:
                    self.wfile.write(piece)
                done += piece.nbytes

        self.streaming = stream

    # -- writing --

    def preupload(self, repo: Repo, revision: str, commit: Commit) -> None:
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["size"] >= self.hub.lfs_from or file["path"].endswith(".safetensors") else "regular"
            here = commit.tree.get(file["path"])
            oid = None if here is None else here.sha256 if here.lfs else here.git_sha1
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def commit(self, repo: Repo, revision: str, commit: Commit) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != commit.oid:
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        tree = dict(commit.tree)
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                tree[path] = Entry(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "lfsFile":
                data = repo.lfs.get(line["value"]["oid"])
                if data is None:
                    return self.answer(400, {"error": f"LFS object {line['value']['oid']} is not there"})
                tree[path] = data if isinstance(data, Discarded) else Entry(data, True)
                noted = tree.get(ATTRIBUTES, Entry(b"")).data
                if not path.endswith(".safetensors") and path.encode() not in noted:
                    tree[ATTRIBUTES] = Entry(noted + f"{path} filter=lfs\n".encode())
            else:
                del tree[path]
                continue
            tree[path] = self.hub.corrupts(path, tree[path])
        oid = repo.commit(tree, lines[0]["value"]["summary"], revision)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{oid}"})

    def branch(self, repo: Repo, name: str) -> None:
        if self.command == "DELETE":
            found = repo.branches.pop(name, None)
            return self.answer(200 if found else 404, {})
        if name in repo.branches:
            return self.answer(409, {"error": "exists"})
        start = repo.find(json.loads(self.body).get("startingPoint") or "main")
        if start is None:
            return self.no_revision()
        repo.branches[name] = start.oid
        self.answer(200, {})

    def tag(self, repo: Repo, revision: str, commit: Commit) -> None:
        name = json.loads(self.body)["tag"]
        if name in repo.tags:
            return self.answer(409, {"error": "exists"})
        repo.tags[name] = commit.oid
        self.answer(200, {})

    def duplicate(self, source: Repo, wanted: dict[str, Any]) -> None:
        target = self.hub.repos[wanted["target"]["name"]]
        have = {e.sha256: e.data for c in source.commits.values() for e in c.tree.values() if e.lfs and e.data}
        target.lfs |= {f["sha256"]: have[f["sha256"]] for f in wanted["files"]}
        self.answer(200, {"failed": []})

    def lfs_batch(self, name: str) -> None:
        repo = self.hub.repos.get(name)
        if self.refused(repo, write=True):
            return
        assert repo is not None
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in repo.lfs:
                url = f"{self.hub.url}/lfs/{name}/{oid}"
                upload: dict[str, Any] = {"href": url}
                if size > self.hub.part_bytes:
                    count = -(-size // self.hub.part_bytes)
                    links = {str(i + 1): f"{url}/{i + 1}?signature=secret" for i in range(count)}
                    upload = {"href": f"{url}/complete", "header": {"chunk_size": str(self.hub.part_bytes), **links}}
                found["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
            objects.append(found)
        self.answer(200, {"objects": objects, "transfer": "multipart"})

    def lfs_content(self, name: str, oid: str, rest: list[str]) -> None:
        repo = self.hub.repos[name]
        if rest and rest[0].isdigit():
            if not self.hub.discards:
                repo.parts[oid, int(rest[0])] = self.body
            return self.answer(200, b"", ETag=f'"{hashlib.md5(self.body).hexdigest()}"')
        if rest == ["verify"]:
            return self.answer(200 if oid in repo.lfs else 400, {})
        if self.hub.discards:
            found, size = self.sink.end(name, oid)
            if found != oid:
                return self.answer(400, {"error": "the content has another sha256"})
            repo.lfs[oid] = Discarded(digest=found, count=size)
            return self.answer(200, {})
        data = self.body
        if rest == ["complete"]:
            data = b"".join(repo.parts.pop((oid, part["partNumber"])) for part in json.loads(self.body)["parts"])
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400, {"error": "the content has another sha256"})
        repo.lfs[oid] = data
        self.answer(200, {})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed resets its connections; anything else is a defect of this server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server on a free port of localhost."""

    class BoundHandler(Handler):
        pass

    with Server(("127.0.0.1", 0), BoundHandler) as http:
        BoundHandler.hub = Hub(f"http://127.0.0.1:{http.server_port}")
        BoundHandler.sink = Sink()
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield BoundHandler.hub
        finally:
            http.shutdown()
            thread.join()
