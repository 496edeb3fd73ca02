"""A checkpoint on the Hugging Face Hub: file list, config, index and shard headers; weights only while a cache is attached.

Works with huggingface_hub 1.x (on httpx) and 2.x (on httpx2), whose exceptions differ in their base class.
https://huggingface.co/docs/hub/api
"""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, StoppedError
from ..running.retry import TRANSIENT_STATUS, again
from .copying import hash_file
from .remote import RETRY_PAUSES_SECONDS, NotTheFile, RemoteStore, TransientError, passing
from .writer import sha256_file

SHA256_DIGITS = 64
TIMEOUT_SECONDS = 30.0
# huggingface_hub's words for a file of another size than the Hub said before
_INCONSISTENT = "Consistency check failed"
NO_ANSWER = "the Hub did not answer in full"


class HubStore(RemoteStore):
    """One commit of a Hub repo. `revision` (kept as `ref`) is resolved to that commit when the store is made.

    Raises CheckpointError, one sentence and a remedy, for a repo that is absent, private or gated, an unknown revision,
    a Hub that cannot be reached, or an answer that is not the file asked for.
    """

    kind = "the Hub"
    in_processes = True
    repo: str
    revision: str

    def __init__(self, repo: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi

        super().__init__(repo if revision is None else f"{repo}@{revision}")
        self.repo = repo
        self.ref = revision
        with self.errors("the file list"):
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        self.revision = info.sha or revision or "main"
        siblings = info.siblings or []
        self.sizes = {file.rfilename: file.size for file in siblings}
        # git's blob sha1 of a small file, the sha256 of a large one
        self.marks = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id or "" for file in siblings}

    @property
    def name(self) -> str:
        return self.repo.rpartition("/")[2]

    @property
    def pinned(self) -> str:
        return f"{self.repo}@{self.revision}"

    @property
    def remedy(self) -> str:
        return f"Download it first (m3quant pull {self.where} FOLDER) and give the folder."

    def sha256(self, name: str) -> str:
        """The sha256 (hex) that the Hub states of a large file. Raises CheckpointError where it states none."""
        if len(self.marks[name]) != SHA256_DIGITS:
            raise CheckpointError(
                f"The Hub states no sha256 of {self.path(name)}, so that what comes could not be told from a damaged file. "
                "Download it and give the folder."
            )
        return self.marks[name]

    def digest(self, name: str) -> str:
        return self.sha256(name)

    def _small_file(self, name: str) -> Path:
        for forced in (False, True):
            path = again(partial(self._cached, name, forced), passing, RETRY_PAUSES_SECONDS)
            if hash_file(path).has_etag(self.marks[name]):
                return path
        raise CheckpointError(
            f"{self.path(name)} was fetched twice and is not the file that the Hub lists. Try again later."
        )

    def _cached(self, name: str, forced: bool) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # they would be drawn over ours
        with self.errors(name):
            return Path(
                hf_hub_download(
                    self.repo, name, revision=self.revision, etag_timeout=TIMEOUT_SECONDS, force_download=forced
                )
            )

    def download(self, name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> None:
        """By huggingface_hub, through Xet where hf_xet is installed. fresh: nor does it come from the Hub's cache here."""
        from huggingface_hub import hf_hub_download

        # A cache of chunks beside the shards would lie on the disk twice (read when hf_xet is first used).
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        # Its own retries would be told between our bars; what it gives up on is told by `again`.
        logging.getLogger("huggingface_hub.file_download").setLevel(logging.ERROR)
        try:
            with self.errors(name):
                try:
                    hf_hub_download(
                        self.repo,
                        name,
                        revision=self.revision,
                        local_dir=folder,
                        force_download=fresh,
                        tqdm_class=_silent_bar(came),
                    )
                except OSError as error:
                    if str(error).startswith(_INCONSISTENT):
                        raise NotTheFile(str(error).splitlines()[0]) from None
                    raise
        except RuntimeError as error:  # what hf_xet raises
            if os.strerror(errno.ENOSPC) in str(error):
                raise StoppedError(
                    f"{self.path(name)} cannot be written into {folder}: {os.strerror(errno.ENOSPC)}. "
                    "Free space and run the same command again."
                ) from None
            raise TransientError(f"{self.path(name)} could not be fetched ({error}). Try again.", NO_ANSWER) from error

    def difference(self, name: str, path: Path, digest: str | None = None) -> str | None:
        wanted = self.sha256(name)
        if digest == wanted:
            return None
        digest = sha256_file(path)
        return f"its sha256 is {digest[:12]}..., not {wanted[:12]}..." if digest != wanted else None

    def _range_once(self, name: str, start: int, count: int, size: int) -> bytes:
        # Streamed, so that never more is read than was asked for, whatever the server sends.
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.revision)
        # 'identity': a compressed answer would not be the bytes asked for.
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        with self.errors(name), get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            # A server that ignores Range answers 200 with the whole file: usable only from the start.
            expected = f"bytes {start}-{start + count - 1}/{size}"
            found = response.headers.get("content-range")
            if (response.status_code == 206 and found != expected) or (response.status_code != 206 and start):
                raise CheckpointError(
                    f"The Hub answered the request for {expected} of {self.path(name)} with "
                    f"{found or response.status_code}. Try again, or download the checkpoint and give the folder."
                )
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= count:
                    break
        if len(data) < count:
            raise TransientError(
                f"The Hub sent {len(data)} of {count} bytes of {self.path(name)}. Try again.", NO_ANSWER
            )
        return bytes(data[:count])

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Put every failure of huggingface_hub and the network into a sentence."""
        from huggingface_hub import errors

        http_error: Any = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
        try:
            yield
        except CheckpointError:
            raise
        except (http_error, errors.HFValidationError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise StoppedError(
                    f"{what} of {self.where} cannot be written: {getattr(error, 'strerror', error)}. Free space and run the same command again."
                ) from None
            status = getattr(getattr(error, "response", None), "status_code", None)
            offline = isinstance(error, errors.OfflineModeIsEnabled)
            sentence = self._sentence(what, error, status)
            if status in TRANSIENT_STATUS and not offline:
                raise TransientError(sentence, f"the Hub answered {status}" if status else NO_ANSWER) from error
            raise CheckpointError(sentence) from error

    def _sentence(self, what: str, error: Exception, status: int | None) -> str:
        from huggingface_hub import errors

        start = f"{self.repo} is no folder here, and on the Hub"
        if isinstance(error, errors.GatedRepoError):
            return f"{start} it is gated: accept its terms on its page, log in with `hf auth login`, and try again."
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{start} it has no revision of that name ({self.where}): give a branch, tag or commit that exists."
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            return (
                f"{start} it does not exist or is not open to you ({status}): "
                f"check the name, or log in with `hf auth login`."
            )
        if status is not None:
            return f"The Hub answered {status} when asked for {what} of {self.where}: try again later."
        if isinstance(error, errors.OfflineModeIsEnabled):
            return f"{self.where} is no folder here, and HF_HUB_OFFLINE forbids asking the Hub: give a local folder."
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"{self.repo} is no folder here, and the Hub could not be asked for {what} of {self.where} ({reason}): "
            f"check the path, or the network."
        )


def _silent_bar(came: Callable[[int], None]) -> Any:
    """A progress bar class for huggingface_hub that draws nothing and tells `came` of bytes."""
    from tqdm.std import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **{**given, "disable": True})

        def update(self, n: float | None = 1) -> None:
            came(int(n or 0))

        # With these two, hf_xet's bytes on the network and on the disk come as one bar.
        def update_transfer(self, n: float | None = 1) -> None: ...

        def set_transfer_postfix_str(self, *_: object, **__: object) -> None: ...

    return Bar
