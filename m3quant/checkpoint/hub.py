"""A checkpoint on the Hugging Face Hub: file list, config, index and shard headers; no weight byte is fetched.

Headers come by HTTP range requests and go through the same strict parser as local files. Works with huggingface_hub 1.x
(on httpx) and 2.x (on httpx2), whose exceptions differ in their base class. https://huggingface.co/docs/hub/api
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..running.retry import TRANSIENT_STATUS, again, causes
from .bounded import read_bounded, too_large
from .header import PREFIX_BYTES, header_length
from .listing import Listing, classify

# Headers of MiniMax shards take 20-120 KB: one request for most of them.
FIRST_BYTES = 128 * 1024
REQUESTS_AT_ONCE = 8
TIMEOUT_SECONDS = 30.0
RETRY_PAUSES_SECONDS = (1.0, 3.0)


class TransientError(CheckpointError):
    """A failure that may be gone at the next try."""

    exit_code = 4


def passing(error: Exception) -> str | None:
    """What happened, in words, where a TransientError says that it may pass."""
    if not isinstance(error, TransientError):
        return None
    answers = (getattr(link, "response", None) for link in causes(error))
    status = next((answer.status_code for answer in answers if answer is not None), None)
    return f"the Hub answered {status}" if status else "the Hub did not answer in full"


class HubStore:
    """One commit of a Hub repo. `revision` is resolved to that commit when the store is made.

    Raises CheckpointError, one sentence and a remedy, for a repo that is absent, private or gated, an unknown revision,
    a Hub that cannot be reached, or an answer that is not the file asked for.
    """

    def __init__(self, repo: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi

        self.repo = repo
        self.where = repo if revision is None else f"{repo}@{revision}"
        with self.errors("the file list"):
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        self.revision: str = info.sha or revision or "main"
        siblings = info.siblings or []
        self.sizes: dict[str, int | None] = {file.rfilename: file.size for file in siblings}
        # git's blob sha1 of a small file, the sha256 of a large one
        self.etags: dict[str, str] = {
            file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id or "" for file in siblings
        }

    def path(self, name: str) -> str:
        return f"{self.where}/{name}"

    def listing(self) -> Listing:
        return classify(self.sizes, self.where)

    def file_size(self, name: str) -> int:
        return self.sizes[name] or 0

    def file(self, name: str, limit: int) -> bytes:
        """A file of at most `limit` bytes, through huggingface_hub's own cache. A larger one is not downloaded."""
        from huggingface_hub import hf_hub_download

        size = self.sizes[name]
        if size is None or size > limit:
            raise CheckpointError(self._no_size(name) if size is None else too_large(self.path(name), size, limit))
        with self.errors(name):
            path = hf_hub_download(self.repo, name, revision=self.revision, etag_timeout=TIMEOUT_SECONDS)
            return read_bounded(Path(path), limit)

    def headers(self, names: list[str]) -> dict[str, tuple[bytes, bytes, int]]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return dict(zip(names, pool.map(self._header, names), strict=True))

    def _header(self, name: str) -> tuple[bytes, bytes, int]:
        size = self.sizes[name]
        if size is None:
            raise CheckpointError(self._no_size(name))
        first = self._range(name, 0, min(size, FIRST_BYTES), size) if size else b""
        length = header_length(first, size, self.path(name))
        raw = first[PREFIX_BYTES : PREFIX_BYTES + length]
        if len(raw) < length:
            raw += self._range(name, PREFIX_BYTES + len(raw), length - len(raw), size)
        return first[:PREFIX_BYTES], raw, size

    def _no_size(self, name: str) -> str:
        return f"The Hub states no size for {self.path(name)}. Download it and give the folder."

    def _range(self, name: str, start: int, count: int, size: int) -> bytes:
        """`count` bytes of a file from `start` on; a busy server or a dropped connection is asked again."""
        return again(lambda: self._range_once(name, start, count, size), passing, RETRY_PAUSES_SECONDS)

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
            raise TransientError(f"The Hub sent {len(data)} of {count} bytes of {self.path(name)}. Try again.")
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
            status = getattr(getattr(error, "response", None), "status_code", None)
            offline = isinstance(error, errors.OfflineModeIsEnabled)
            kind = TransientError if status in TRANSIENT_STATUS and not offline else CheckpointError
            raise kind(self._sentence(what, error, status)) from error

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
