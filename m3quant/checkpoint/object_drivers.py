"""fsspec's file systems for object stores: how each is opened, what tells a changed object, and what its failures mean.

https://filesystem-spec.readthedocs.io, https://s3fs.readthedocs.io, https://gcsfs.readthedocs.io
"""

from __future__ import annotations

import base64
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from ..extras import need
from ..running.retry import causes

FORBIDDEN, ABSENT = 403, 404


class Driver(ABC):
    """One kind of store. scheme: of addresses, and of the extra that installs its file system; kind: in messages; access: how to be let in."""

    scheme: str
    kind: str
    access: str

    def open(self) -> Any:
        """The file system, which caches no listings. Raises PackageMissing."""
        need(self.scheme, f"A source under {self.scheme}://")
        import fsspec

        return fsspec.filesystem(self.scheme, use_listings_cache=False, skip_instance_cache=True)

    @abstractmethod
    def level(self, files: Any, folder: str, most: int) -> list[dict[str, Any]]:
        """The objects and folders right below BUCKET/PREFIX, as fsspec describes them; of more than `most` at least one more, and then no further
        page is asked for. Raises FileNotFoundError where there are none."""

    @abstractmethod
    def mark(self, info: Mapping[str, Any]) -> str:
        """What changes with the content of an object."""

    def md5(self, mark: str) -> str | None:
        """The md5 (hex) that a mark states, None where it states none."""
        return None

    @abstractmethod
    def status(self, error: BaseException) -> int | None:
        """The HTTP status of one error of the file system, itself or as it stands for; None where there was no answer."""

    def failure(self, error: BaseException) -> int | None:
        """The status behind a failure and its causes; None where there was no answer."""
        return next((status for link in _links(error) if (status := self.status(link)) is not None), None)


class S3(Driver):
    scheme, kind = "s3", "S3"
    access = "give credentials as for the aws command (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or for a public bucket set FSSPEC_S3_ANON=true"

    def level(self, files: Any, folder: str, most: int) -> list[dict[str, Any]]:
        """Page by page (ListObjectsV2): `ls` asks for all of them."""
        bucket, _, prefix = folder.partition("/")
        asked: dict[str, Any] = {
            "Bucket": bucket,
            "Prefix": f"{prefix}/" if prefix else "",
            "Delimiter": "/",
        } | files.req_kw
        found: list[dict[str, Any]] = []
        while True:
            page = files.call_s3("list_objects_v2", **asked)
            for below in page.get("CommonPrefixes", ()):
                found.append({"name": f"{bucket}/{below['Prefix']}", "type": "directory", "size": 0})
            for item in page.get("Contents", ()):
                found.append({**item, "name": f"{bucket}/{item['Key']}", "type": "file", "size": item["Size"]})
            if len(found) > most or not page.get("IsTruncated"):
                break
            asked["ContinuationToken"] = page["NextContinuationToken"]
        if not found:
            raise FileNotFoundError(folder)
        return found

    def mark(self, info: Mapping[str, Any]) -> str:
        """The ETag: no checksum of an object that was sent in parts or is encrypted, but it changes with the content."""
        return str(info.get("ETag") or info.get("LastModified") or "").strip('"')

    def status(self, error: BaseException) -> int | None:
        from botocore.exceptions import ClientError, CredentialRetrievalError, NoCredentialsError, ParamValidationError

        if isinstance(error, ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("SlowDown", "ServiceUnavailable", "RequestTimeout"):
                return 503
            found = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return found if isinstance(found, int) else None
        if isinstance(error, NoCredentialsError | CredentialRetrievalError):
            return FORBIDDEN
        return 400 if isinstance(error, ParamValidationError) else _of_python(error)


class GoogleStorage(Driver):
    scheme, kind = "gs", "Google Cloud Storage"
    access = "log in with `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS, or for a public bucket set FSSPEC_GS_TOKEN=anon"

    def open(self) -> Any:
        # Else it asks over gRPC for the kind of every bucket, for up to a minute where only HTTPS passes (read at the import).
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        # It logs every failure with a traceback before it raises it.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        return super().open()

    def level(self, files: Any, folder: str, most: int) -> list[dict[str, Any]]:
        # Releases of gcsfs before it had this list all pages all the same.
        found: list[dict[str, Any]] = files.ls(folder, detail=True, max_results=most + 1)
        return found

    def mark(self, info: Mapping[str, Any]) -> str:
        """The md5, which composed objects lack, or the crc32c, or the number that a write gives."""
        found = next((key for key in ("md5Hash", "crc32c", "generation") if info.get(key)), "etag")
        return f"{found}:{info.get(found, '')}"

    def md5(self, mark: str) -> str | None:
        kind, _, value = mark.partition(":")
        return base64.b64decode(value).hex() if kind == "md5Hash" else None

    def status(self, error: BaseException) -> int | None:
        from google.auth.exceptions import GoogleAuthError

        code = getattr(error, "code", None)  # of gcsfs.retry.HttpError, as a number or its text
        if isinstance(code, int) or (isinstance(code, str) and code.isdigit()):
            return int(code)
        if isinstance(error, GoogleAuthError) or (isinstance(error, OSError) and str(error).startswith("Forbidden")):
            return FORBIDDEN
        return 400 if isinstance(error, ValueError) else _of_python(error)


DRIVERS: Mapping[str, Driver] = {driver.scheme: driver for driver in (S3(), GoogleStorage())}


def _links(error: BaseException) -> Iterator[BaseException]:
    """The causes first: a file system puts Python's own errors in place of what the store answered."""
    yield from reversed(list(causes(error)))


def _of_python(error: BaseException) -> int | None:
    if isinstance(error, FileNotFoundError):
        return ABSENT
    return FORBIDDEN if isinstance(error, PermissionError) else None
