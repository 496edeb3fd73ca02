"""Content of large files, sent by processes of their own (`running.workers`): plain LFS goes through a client in Python."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..running.retry import retry_after
from ..running.workers import Workers
from .failures import FailedApart, failure_of


def quiet_api(token: str) -> Any:
    """huggingface_hub's HfApi, which prints nothing."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging

    # Its warnings name pre-signed URLs, and two progress displays would overwrite each other.
    logging.set_verbosity_error()
    disable_progress_bars()
    return HfApi(token=token)


@dataclass(frozen=True)
class _Send:
    """One try of sending one file, in the process that does it."""

    repo: str
    token: str = field(repr=False)

    def __call__(self, tell: object, addition: Any, revision: str) -> tuple[dict[str, Any], FailedApart | None]:
        """What the client notes in the addition (its mode, its sha256, whether it is there), and what failed."""
        failed = None
        try:
            quiet_api(self.token).preupload_lfs_files(self.repo, [addition], revision=revision, free_memory=False)
        except Exception as error:
            failure = failure_of(error, self.token)
            if failure is None:
                raise
            failed = FailedApart(failure, retry_after(error))
        return vars(addition), failed


class Sender(Workers[[Any, str], tuple[dict[str, Any], FailedApart | None]]):
    """Sends files of one repo. Pauses and further tries are the caller's."""

    def __init__(self, repo: str, token: str) -> None:
        super().__init__(_Send(repo, token))

    def send(self, additions: Sequence[Any], revision: str, at_once: int) -> None:
        """As HfApi.preupload_lfs_files of files on the disk; what arrived stays noted where another file fails.

        Raises FailedApart, WorkerLost and WorkersEnded once no file is under way.
        """
        if len(additions) == 1:
            return self._one(additions[0], revision)
        with ThreadPoolExecutor(at_once) as pool:
            try:
                list(pool.map(lambda addition: self._one(addition, revision), additions))
            except (KeyboardInterrupt, SystemExit):  # the pool would wait for the other files
                self.end()
                raise

    def _one(self, addition: Any, revision: str) -> None:
        noted, failed = self.run(lambda count: None, addition, revision)
        vars(addition).update(noted)
        if failed is not None:
            raise failed
