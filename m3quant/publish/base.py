"""Which model an output was made from: the Hub repo and the exact commit. Recorded by the download or given by the user, never guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError, PublishError

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Base:
    """repo: "org/name"; revision: 40 hex digits; recorded: whether the download itself recorded the revision."""

    repo: str
    revision: str
    recorded: bool

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo}/tree/{self.revision}"


def resolve_base(manifest: Mapping[str, Any], repo: str | None, revision: str | None) -> Base:
    """The base from what convert recorded and what is given. Raises PublishError where it is unknown, OptionError where the two disagree."""
    source = manifest["source"]
    recorded_repo, recorded_revision = source.get("repo"), source.get("revision")
    if repo is not None and not _REPO.fullmatch(repo):
        raise OptionError(f"--base-repo {repo} is no Hub repo: give it as org/name.")
    if repo and recorded_repo and repo.lower() != recorded_repo.lower():
        raise OptionError(
            f"--base-repo {repo} is given, but the source came from {recorded_repo}: leave the option out."
        )
    if revision is not None and not _COMMIT.fullmatch(revision):
        raise OptionError(
            f"--base-revision {revision} is no commit: branches and tags move, so give the 40 hex digits of the commit."
        )
    if revision and recorded_revision and revision != recorded_revision:
        raise OptionError(
            f"--base-revision {revision} is given, but the download recorded {recorded_revision}: leave the option out."
        )
    name, commit = recorded_repo or repo, recorded_revision or revision
    if not name:
        raise PublishError(
            "the base model is unknown, because the source was a folder: give --base-repo ORG/NAME, the Hub repo it came from."
        )
    if not commit:
        raise PublishError(
            f"the revision of {name} is unknown, because the source has no record of its download "
            "(.cache/huggingface, left by hf download --local-dir): give --base-revision COMMIT."
        )
    return Base(name, commit, recorded_revision is not None)
