"""Upload that shows nothing until everything is there: a private repo, a staging branch, one last commit on main.

    create (private) -> branch -> commits on the branch -> compare checksums -> one commit on main -> tag -> branch away -> public

The Hub has no server-side merge of branches. A pull request has, but it merges into whatever main is by then. A commit that
names its parent does not: it is made on exactly the state that was read, or refused (412). That last commit only refers
to content which the branch holds already (CommitOperationCopy), so it takes one request, and main is either what it was or whole.

No state is kept locally. Killed at any point, the same command reads the state of the Hub and does the rest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..checkpoint.bounded import read_bounded
from ..checkpoint.copying import hash_file
from ..errors import CheckpointError, HubError, PublishError
from ..running import steps
from ..running.progress import Progress
from .files import PublishFile
from .remote import Conflict, Remote, RemoteFile, RepoState, copies_between_repos, uses_xet

STAGING = "m3quant-staging"
DEFAULT_TAG = "v1"
TAG = re.compile(r"[A-Za-z0-9][\w.-]*")
# The Hub makes and edits this file itself, to say which files are large.
ATTRIBUTES = ".gitattributes"
# Sent as bytes that were hashed in memory; larger ones are streamed from the disk. The Hub keeps 10 MB and more as LFS.
SMALL_BYTES = 10_000_000
# One commit on the branch: a kill loses at most the commit, not the content that was sent.
GROUP_BYTES = 20_000_000_000
GROUP_SMALL_BYTES = 50_000_000
GROUP_FILES = 100
FILES_AT_ONCE = 4


@dataclass
class Published:
    """What is on the Hub now. commit: of main. sent: bytes of files that this run sent; copied: of those copied there."""

    repo: str
    url: str
    commit: str
    tag: str
    public: bool
    files: int
    bytes: int
    sent: int = 0
    copied: int = 0
    removed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """What a run wants: the files, the tag, who may see it, whether other files on main may go, and where the base's files are."""

    files: Sequence[PublishFile]
    tag: str = DEFAULT_TAG
    public: bool = False
    replace: bool | None = False  # None: the command has no --replace
    base: tuple[str, str] | None = None  # repo and revision, for copies on the Hub


def upload(repo: str, target: Target, progress: Progress) -> Published:
    """Publish `target` as `repo`, or continue a run that was stopped. Returns when main is whole and tagged.

    Raises HubError (exit 2), PublishError (1: a checksum differs, a file changed), StoppedError (4: run it again).
    """
    remote = Remote(repo, progress.say)
    check_tag(target.tag)
    steps.step(f"looking at {repo}")
    remote.check_token()
    state = made(remote)
    run = UploadRun(remote, target, progress)
    result = Published(
        repo, f"{remote.api.endpoint}/{repo}", state.main, target.tag, not state.private,
        len(target.files), sum(f.size for f in target.files),
    )  # fmt: skip
    main = remote.tree(state.main)
    if run.differing(main) or run.others(main):
        run.check_usable(state, main)
        staged = run.stage(state, result)
        steps.step("one commit on main")
        result.commit = run.merge(state, main, staged, result)
    else:
        progress.say(f"main of {repo} holds every file already")
    steps.step(f"tag {target.tag}")
    run.finish(_seen(remote), result)
    return result


def check_tag(tag: str) -> None:
    """Raise HubError for a name that the Hub would refuse, or confuse with a branch, when everything else is done."""
    if not TAG.fullmatch(tag) or tag in ("main", STAGING):
        raise HubError(f"--tag {tag!r} is no name for a tag: give letters, digits, '.', '_' and '-', such as v1.")


def made(remote: Remote) -> RepoState:
    """The repo's state; it is made, private, if there is none."""
    state = remote.state()
    if state is not None:
        return state
    remote.create()
    return _seen(remote)


def _seen(remote: Remote) -> RepoState:
    state = remote.state()
    if state is None:
        raise HubError(f"{remote.repo} was made and is gone again: somebody else removed it.")
    return state


class UploadRun:
    """One run of `upload`, or of the uploads beside a conversion (`shard_uploads`)."""

    def __init__(self, remote: Remote, target: Target, progress: Progress) -> None:
        self.remote, self.target, self.progress = remote, target, progress
        self.wanted = {f.path_in_repo: f for f in target.files}
        self._git_sha1: dict[str, str] = {}

    def check_usable(self, state: RepoState, main: dict[str, RemoteFile]) -> None:
        """Refuse, before anything is sent, a repo in which this upload would show or overwrite what it must not."""
        repo = self.remote.repo
        others = sorted(set(main) - {ATTRIBUTES})
        if others and not self.target.replace:
            remedy = ", or give --replace to replace them all in one commit" if self.target.replace is not None else ""
            raise HubError(
                f"{repo} exists and holds other files ({others[0]}{', ...' if len(others) > 1 else ''}): choose another name{remedy}."
            )
        if not state.private:
            raise HubError(
                f"{repo} is public, so that a half-done upload could be seen: choose another name, or make it private "
                "in its settings first."
            )
        if self.target.tag in state.tags:
            raise HubError(f"{repo} has a tag {self.target.tag} on another commit: give another --tag.")

    def stage(self, state: RepoState, result: Published) -> str:
        """Bring the staging branch to exactly the wanted files and return its commit."""
        self.begin_branch(state, [f.path_in_repo for f in self.target.files if f.dropped])
        staged = self.remote.tree(STAGING)
        missing = self.differing(staged)
        if lost := [f.path_in_repo for f in missing if f.dropped]:
            raise PublishError(
                f"{self.remote.repo}, branch {STAGING} lacks {lost[0]}, which was dropped from this disk after its upload: somebody "
                "removed it there; remove the output and convert again."
            )
        total = sum(f.size for f in self.target.files)
        self.progress.start(total, total - sum(f.size for f in missing))
        steps.step(f"sending to branch {STAGING}")
        missing = self._copy_from_base(missing, result)
        with self.remote.sending(sum(f.size for f in missing)):
            for group in groups(missing):
                self._send(group, result)
        steps.step("comparing what arrived")
        self._remove_others(staged)
        return self._verified_head()

    def begin_branch(self, state: RepoState, dropped: Sequence[str] = ()) -> None:
        """Make the staging branch from main, unless it is there. dropped: files that nobody has but the branch."""
        remote = self.remote
        if STAGING in state.branches:
            if state.main in remote.history(STAGING):
                return
            if dropped:
                raise PublishError(
                    f"main of {remote.repo} moved since {STAGING} was begun, and {len(dropped)} shards are on that branch alone: set main "
                    "back to where the branch began, or remove the output and convert again."
                )
            # It was begun on another state of main. The content sent for it stays in the repo's storage and is not sent again.
            remote.delete_branch(STAGING)
        remote.create_branch(STAGING, state.main)

    def differing(self, remote_files: dict[str, RemoteFile]) -> list[PublishFile]:
        """The wanted files that a tree lacks or holds with another content."""
        return [f for f in self.target.files if not self._same(f, remote_files.get(f.path_in_repo))]

    def _same(self, file: PublishFile, there: RemoteFile | None) -> bool:
        if there is None or there.size != file.size:
            return False
        if there.sha256 is not None:
            return there.sha256 == file.sha256
        if file.path_in_repo not in self._git_sha1:
            self._git_sha1[file.path_in_repo] = checked_git_sha1(file)
        return there.git_sha1 == self._git_sha1[file.path_in_repo]

    def _copy_from_base(self, missing: list[PublishFile], result: Published) -> list[PublishFile]:
        """Copy large files that the base holds with the same sha256 on the Hub itself; returns what is left to send."""
        candidates = {f.path_in_repo: f for f in missing if f.base_copy}
        if self.target.base is None or not candidates or not copies_between_repos():
            return missing
        from huggingface_hub import CommitOperationCopy

        base, revision = self.target.base
        try:
            there = self.remote.paths_of(base, revision, list(candidates))
            same = [
                f for n, f in candidates.items() if n in there and there[n].sha256 == f.sha256 and there[n].xet_hash
            ]
            if not same:
                return missing
            copies = [
                CommitOperationCopy(f.path_in_repo, f.path_in_repo, revision, src_repo_id=base, src_repo_type="model")
                for f in same
            ]
            self.remote.commit(copies, STAGING, f"Copy {len(same)} files of {base}@{revision}")
        except HubError as error:
            self.progress.say(f"files of {base} could not be copied on the Hub and are sent instead: {error}")
            return missing
        for file in same:
            result.copied += file.size
            self.progress.advance(file.size)
        return [f for f in missing if f not in same]

    def _send(self, group: list[PublishFile], result: Published) -> None:
        """Send the content of a group of files and commit it to the staging branch."""
        small = [f for f in group if f.size <= SMALL_BYTES]
        large = [f for f in group if f.size > SMALL_BYTES]
        operations = self.preupload(small)
        # Xet sends the parts of one file in parallel; plain LFS sends them one after another, but several files at once.
        at_once = 1 if uses_xet() else FILES_AT_ONCE
        for start in range(0, len(large), at_once):
            operations += self.preupload(large[start : start + at_once])
        self.remote.commit(operations, STAGING, f"Stage {len(group)} files")
        result.sent += sum(f.size for f in group)

    def preupload(self, files: list[PublishFile]) -> list[Any]:
        """Operations whose content is on the Hub, or small enough to go with the commit. Raises PublishError if a file changed."""
        from huggingface_hub import CommitOperationAdd

        operations, stamps = [], []
        for file in files:
            stamps.append(stamp(file))
            source: Any = checked_bytes(file) if file.size <= SMALL_BYTES else str(file.local_path)
            operations.append(CommitOperationAdd(file.path_in_repo, source))
            if file.hashed and not uses_xet():
                declare(operations[-1], file.sha256)
        if operations:
            self.remote.preupload(operations, STAGING, FILES_AT_ONCE)
        for file, before, operation in zip(files, stamps, operations, strict=True):
            # The digest is the client's own, taken as it read the file, unless it was told ours, which the Hub then compares.
            if stamp(file) != before or operation.upload_info.sha256.hex() != file.sha256:
                raise changed(file)
            self.progress.advance(file.size)
        return operations

    def _remove_others(self, staged: dict[str, RemoteFile]) -> None:
        from huggingface_hub import CommitOperationDelete

        others = self.others(staged)
        if others:
            self.remote.commit(
                [CommitOperationDelete(path, is_folder=False) for path in others],
                STAGING,
                f"Remove {len(others)} files",
            )

    def others(self, files: dict[str, RemoteFile]) -> list[str]:
        return sorted(set(files) - set(self.wanted) - {ATTRIBUTES})

    def _verified_head(self) -> str:
        """The staging branch's commit, after every file in it was compared with its sha256. Raises PublishError."""
        state = _seen(self.remote)
        if STAGING not in state.branches:
            raise Conflict(f"{self.remote.repo} lost its branch {STAGING} meanwhile: run the same command again.")
        head = state.branches[STAGING]
        self._verify(self.remote.tree(head), f"branch {STAGING}", "nothing was merged; run the same command again")
        return head

    def _verify(self, files: dict[str, RemoteFile], where: str, remedy: str) -> None:
        differing = [f.path_in_repo for f in self.differing(files)]
        others = self.others(files)
        if differing or others:
            what = f"another checksum for {differing[0]}" if differing else f"a file that was not sent, {others[0]}"
            more = len(differing) + len(others) - 1
            raise PublishError(
                f"{self.remote.repo}, {where}: the Hub has {what}{f' and {more} more' if more else ''}: {remedy}."
            )

    def merge(self, before: RepoState, main: dict[str, RemoteFile], staged: str, result: Published) -> str:
        """One commit on main, made on the state that was looked at first; its id. Raises Conflict if main has moved."""
        from huggingface_hub import CommitOperationCopy, CommitOperationDelete

        result.removed = self.others(main)
        operations: list[Any] = [CommitOperationDelete(path, is_folder=False) for path in result.removed]
        paths = [f.path_in_repo for f in self.differing(main)]
        attributes = self.remote.tree(staged).get(ATTRIBUTES)
        if attributes is not None and ATTRIBUTES not in self.wanted and attributes != main.get(ATTRIBUTES):
            paths.append(ATTRIBUTES)  # the Hub noted there which files are large
        operations += [CommitOperationCopy(path, path, staged) for path in paths]
        try:
            commit = self.remote.commit(operations, "main", "Publish with m3quant", parent=before.main)
        except Conflict as refused:
            commit = self._merged_after_all(before, refused)
        self._verify(self.remote.tree(commit), "main", "it is not tagged; look at it there")
        return commit

    def _merged_after_all(self, before: RepoState, refused: Conflict) -> str:
        """main's commit if it is this upload's (the answer to the first try was lost). Raises Conflict otherwise: `refused`, with
        what the Hub said, where main has not moved."""
        now = _seen(self.remote)
        if now.main != before.main and not self.differing(self.remote.tree(now.main)):
            return now.main
        if now.main == before.main:
            raise Conflict(
                f"{str(refused).rstrip('.')}. main is still at {now.main[:8]} and nothing was merged: run the same command again."
            )
        raise Conflict(
            f"main of {self.remote.repo} moved from {before.main[:8]} to {now.main[:8]} during the upload: somebody else "
            "committed to it, and nothing was merged. Look at it there, then run the same command again."
        )

    def finish(self, state: RepoState, result: Published) -> None:
        """Tag main, remove the staging branch, and only then open the repo, if that is wanted."""
        if state.main != result.commit:
            raise Conflict(
                f"main of {self.remote.repo} moved from {result.commit[:8]} to {state.main[:8]} after the upload was merged: "
                "somebody else committed to it; look at it there, then run the same command again."
            )
        tagged = state.tags.get(self.target.tag)
        if tagged is None:
            self.remote.tag(self.target.tag, result.commit)
        elif tagged != result.commit:
            raise HubError(
                f"{self.remote.repo} has a tag {self.target.tag} on another commit ({tagged[:8]}): give another --tag."
            )
        if STAGING in state.branches:
            self.remote.delete_branch(STAGING)
        if self.target.public and state.private:
            self.remote.make_public()
        result.public = self.target.public or not state.private


def declare(operation: Any, sha256: str) -> None:
    """Tell the client the digest of a file that it would else read for it, where it can be told (huggingface_hub 2.x).

    Plain LFS names content by its sha256, and the server refuses other bytes under that name.
    https://github.com/git-lfs/git-lfs/blob/main/docs/api/basic-transfers.md
    """
    if getattr(operation.upload_info, "is_hashed", True) is False:
        operation.upload_info.sha256 = bytes.fromhex(sha256)


def groups(files: Sequence[PublishFile]) -> Iterator[list[PublishFile]]:
    """Files for one commit each, in their order, within the limits above."""
    group: list[PublishFile] = []
    size = small = 0
    for file in files:
        add = file.size if file.size <= SMALL_BYTES else 0
        full = size + file.size > GROUP_BYTES or small + add > GROUP_SMALL_BYTES or len(group) == GROUP_FILES
        if group and full:
            yield group
            group, size, small = [], 0, 0
        group.append(file)
        size, small = size + file.size, small + add
    if group:
        yield group


def checked_git_sha1(file: PublishFile) -> str:
    """git's sha1 of a file of any size. Raises PublishError if its bytes are not those that were checked."""
    try:
        found = hash_file(file.local_path)
    except CheckpointError as error:
        raise PublishError(str(error)) from None
    if found.sha256 != file.sha256:
        raise changed(file)
    return found.git_sha1


def checked_bytes(file: PublishFile) -> bytes:
    """A small file's bytes. Raises PublishError if they are not those that were checked."""
    data = read_bounded(file.local_path, SMALL_BYTES, error=PublishError)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise changed(file)
    return data


def stamp(file: PublishFile) -> tuple[int, int, int]:
    """What changes when a file is written to. Raises PublishError if the file is gone."""
    try:
        facts = os.lstat(file.local_path)
    except OSError as error:
        raise PublishError(f"{file.local_path} cannot be read: {error.strerror}.") from None
    if facts.st_size != file.size:
        raise changed(file)
    return facts.st_mtime_ns, facts.st_ino, facts.st_size


def changed(file: PublishFile) -> PublishError:
    return PublishError(
        f"{file.local_path} changed on the disk since it was checked: nothing was merged; verify the output, and publish again."
    )
