"""The calls to the Hub that publishing needs of huggingface_hub 1.x (on httpx) and 2.x (on httpx2), every failure a sentence.

Only calls that both versions have are used; where they differ (copies between repos are new in 2.x) the feature is looked
for, never the version number. https://huggingface.co/docs/huggingface_hub/package_reference/hf_api
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..checkpoint.checkpoint import REPO_ID
from ..errors import HubError, M3QuantError, PublishError, StoppedError
from ..running import workers
from ..running.retry import TRANSIENT_STATUS, again, retry_after
from .failures import Failure, Kind, failure_of, status_of
from .sending import Sender, quiet_api

T = TypeVar("T")

# What the Hub answers to a commit whose parent is no longer the head of its branch.
MOVED_STATUS = 412
# The Hub takes at most 1,000 paths in one question.
PATHS_AT_ONCE = 500


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit. git_sha1: of the blob, or of the LFS pointer; sha256: of the content, None for a regular file."""

    path: str
    size: int
    git_sha1: str
    sha256: str | None
    xet_hash: str | None = None


@dataclass(frozen=True)
class RepoState:
    """What a repo's refs are. tags and branches: name -> commit."""

    private: bool
    main: str
    branches: dict[str, str]
    tags: dict[str, str]


class Conflict(HubError):
    """Somebody else changed what this request was about: the branch moved, or the thing exists."""


class Remote:
    """One model repo, seen with the user's token. Every method raises HubError or StoppedError, one sentence."""

    def __init__(self, repo: str, say: Callable[[str], None] = lambda line: None) -> None:
        check_repo_id(repo)
        from huggingface_hub import get_token

        self.repo = repo
        self._say = say
        token = get_token()
        if token is None:
            raise HubError("There is no Hub token: log in with `hf auth login`, or set HF_TOKEN, and run again.")
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise HubError(
                "The Hub token holds a space or another character that no token has: log in again with `hf auth login`, or mend HF_TOKEN."
            )
        self._token: str = token
        self.api = quiet_api(token)
        self._sender: Sender | None = None

    def check_token(self) -> str:
        """The user's name. Raises HubError for a token that is unknown or can only read."""
        facts = self.call("who the token belongs to", self.api.whoami)
        role = ((facts.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise HubError(
                "The Hub token can only read: make one with write permission at https://huggingface.co/settings/tokens."
            )
        return str(facts.get("name"))

    def state(self) -> RepoState | None:
        """None if there is no such repo, or none that the token can see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def ask() -> Any:
            try:
                return self.api.model_info(self.repo)
            except RepositoryNotFoundError:
                return None

        info = self.call("its state", ask)
        if info is None:
            return None
        if info.id.lower() != self.repo.lower():
            raise HubError(f"{self.repo} was renamed to {info.id} on the Hub: publish under that name.")
        refs = self.call("its branches", lambda: self.api.list_repo_refs(self.repo))
        branches = {b.name: b.target_commit for b in refs.branches}
        if "main" not in branches:
            raise HubError(f"{self.repo} has no branch main on the Hub: make one there, or choose another name.")
        return RepoState(bool(info.private), branches["main"], branches, {t.name: t.target_commit for t in refs.tags})

    def create(self) -> None:
        """Make the repo, private."""
        self.call("to create it", lambda: self.api.create_repo(self.repo, private=True, exist_ok=True))

    def tree(self, revision: str) -> dict[str, RemoteFile]:
        """Every file of a revision, by path."""

        def ask() -> list[Any]:
            return list(self.api.list_repo_tree(self.repo, recursive=True, revision=revision))

        entries = self.call("its file list", ask)
        return {e.path: remote_file(e) for e in entries if hasattr(e, "blob_id")}

    def history(self, revision: str) -> list[str]:
        """Commits of a revision, the newest first."""
        commits = self.call("its history", lambda: self.api.list_repo_commits(self.repo, revision=revision))
        return [c.commit_id for c in commits]

    @contextmanager
    def sending(self, count: int) -> Iterator[None]:
        """While the block runs, files on the disk are sent by processes of their own, if `count` bytes are worth it.

        Not over Xet, whose client is native and does not hold the interpreter.
        """
        self._sender = None
        if uses_xet() or count < workers.WORTH_BYTES:
            yield
            return
        # It stays when it has ended: a thread that comes late must not send in this process what nobody waits for.
        with Sender(self.repo, self._token) as self._sender:
            yield

    def preupload(self, additions: list[Any], revision: str, threads: int) -> None:
        """Send the content of large files; what the Hub has already is not sent. threads: files that are sent at once.

        Raises WorkersEnded where `sending` has ended, meanwhile or before, on another thread.
        """
        sender = self._sender
        here, apart = additions, []
        if sender is not None:
            apart = [a for a in additions if isinstance(a.path_or_fileobj, str)]
            here = [a for a in additions if not isinstance(a.path_or_fileobj, str)]

        def send() -> None:
            if here:
                self.api.preupload_lfs_files(self.repo, here, revision=revision, free_memory=False, num_threads=threads)
            if sender is not None and apart:
                sender.send(apart, revision, threads)

        self.call("to take files", send)

    def commit(self, operations: list[Any], revision: str, title: str, parent: str | None = None) -> str:
        """One commit; its id. Raises Conflict if `parent` is given and no longer the head."""
        info = self.call(
            f"to commit to {revision}",
            lambda: self.api.create_commit(
                self.repo, operations, commit_message=title, revision=revision, parent_commit=parent
            ),
        )
        return str(info.oid)

    def create_branch(self, name: str, start: str) -> None:
        self.call(
            f"to make branch {name}",
            lambda: self.api.create_branch(self.repo, branch=name, revision=start, exist_ok=True),
        )

    def delete_branch(self, name: str) -> None:
        def delete() -> None:
            try:
                self.api.delete_branch(self.repo, branch=name)
            except Exception as error:
                if status_of(error) != 404:  # the answer to an earlier try was lost
                    raise

        self.call(f"to remove branch {name}", delete)

    def tag(self, name: str, commit: str) -> None:
        """Raises Conflict if the tag exists on another commit."""
        self.call(
            f"to set tag {name}", lambda: self.api.create_tag(self.repo, tag=name, revision=commit, exist_ok=True)
        )

    def make_public(self) -> None:
        self.call("to make it public", lambda: self.api.update_repo_settings(self.repo, private=False))

    def paths_of(self, repo: str, revision: str, paths: list[str]) -> dict[str, RemoteFile]:
        """The files of another repo that exist among `paths`."""
        found: dict[str, RemoteFile] = {}
        for start in range(0, len(paths), PATHS_AT_ONCE):
            batch = paths[start : start + PATHS_AT_ONCE]
            entries = self.call(
                f"about files of {repo}",
                lambda batch=batch: self.api.get_paths_info(repo, batch, revision=revision),  # type: ignore[misc]
            )
            found |= {e.path: remote_file(e) for e in entries if hasattr(e, "blob_id")}
        return found

    def call(self, what: str, request: Callable[[], T]) -> T:
        """`request()`, tried again after a pause where the failure may pass; other failures become sentences.

        The library repeats some requests by itself (which, differs between 1.x and 2.x) before it comes to that.
        """

        def words(error: Exception) -> str | None:
            failure = failure_of(error, self._token)
            if failure is None or failure.kind is not Kind.HUB or failure.status not in TRANSIENT_STATUS:
                return None
            return f"the Hub answered {failure.status or 'nothing'} when asked {what}"

        try:
            return again(request, words, say=self._say)
        except Exception as error:
            failure = failure_of(error, self._token)
            if failure is None:
                raise
            raise self._explained(failure, what, retry_after(error)) from None

    def _explained(self, failure: Failure, what: str, asked: float | None) -> M3QuantError:
        """The sentence for a failure. asked: seconds that the Hub asks to wait.

        Never the library's own text about an answer, which may hold a signed URL or a header.
        """
        if failure.kind is Kind.OFFLINE:
            return HubError("HF_HUB_OFFLINE forbids asking the Hub: unset it.")
        if failure.kind is Kind.FILE:
            return PublishError(failure.said)
        if failure.kind is Kind.REFUSED:
            return HubError(f"The Hub refuses what it was asked, {what} ({self.repo}): {failure.said}")
        if failure.kind is Kind.XET:
            return StoppedError(
                f"The Hub was asked {what} ({self.repo}) and failed ({failure.said}): run the same command again."
            )
        status, said = failure.status, failure.said
        start = f"The Hub answered {status} when asked {what} ({self.repo})" + (f" and says: {said}" if said else "")
        if status == 401:
            return HubError(f"{start}: the token is not valid; log in again with `hf auth login`, or mend HF_TOKEN.")
        if status in (402, 403):
            if said:
                return HubError(f"{start}.")
            told = "the token may not do this, or the quota is used up"
            return HubError(f"{start}: {told}; give a token with write permission for {self.repo.split('/')[0]}.")
        if status == 404:
            return HubError(f"{start}: it does not exist or the token cannot see it; check the name and the token.")
        if status in (409, MOVED_STATUS):
            return Conflict(f"{start}." if said else f"{start}: it exists, or was changed meanwhile; look at it there.")
        if status == 413:
            return HubError(f"{start}" + ("." if said else ": it is too large for the Hub; check its size limits."))
        if status is not None and status not in TRANSIENT_STATUS:
            return HubError(f"{start}." if said else f"{start} and gave no reason.")
        come_back = "run the same command again" + (f" in {asked:.0f} s" if asked else " later") + "; it continues"
        if status is not None:
            return StoppedError(f"{start}, and again after each pause: {come_back}.")
        return StoppedError(
            f"The Hub could not be asked {what} ({self.repo}, {failure.name}): check the network and {come_back}."
        )


def check_repo_id(repo: str) -> None:
    """Raise HubError unless `repo` is ORG/NAME."""
    if not REPO_ID.fullmatch(repo):
        raise HubError(f"{repo!r} is no name of a Hub repo: give it as ORG/NAME.")


def remote_file(entry: Any) -> RemoteFile:
    lfs = entry.lfs
    return RemoteFile(
        entry.path,
        lfs.size if lfs else entry.size,
        entry.blob_id,
        lfs.sha256 if lfs else None,
        getattr(entry, "xet_hash", None),
    )


def copies_between_repos() -> bool:
    """True if this huggingface_hub can copy large files from one repo to another on the Hub (2.x)."""
    from huggingface_hub import CommitOperationCopy

    return "src_repo_id" in {f.name for f in dataclasses.fields(CommitOperationCopy)}


def uses_xet() -> bool:
    """True if large files go through Xet, which sends the parts of one file in parallel itself."""
    from huggingface_hub.utils._runtime import is_xet_available

    return bool(is_xet_available())
