"""An S3 prefix as a storage, by boto3: patient retries, own multipart, conditional puts where the server knows them.

Correctness does not rest on conditional puts: tars and ledgers carry their digest in their name, so the worst that a
race can do on a server that ignores `If-None-Match` is to make the second commit of a unit win, and its tar is there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import parse_qs, urlsplit

from shards.console import LOG
from shards.errors import MissingObject, ShardDamage, StorageFailure, UserError
from shards.storage.base import MAX_OBJECT_BYTES, Entry
from shards.storage.patience import Attempts

PART_BYTES = 32 * 2**20
_DENIED_PAUSE_SECONDS = 2.0
"""Before a refused request is repeated once with fresh credentials: servers refuse for a moment while keys change."""
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_ABSENT = {"404", "NoSuchKey", "NotFound"}
_TAKEN = {"412", "PreconditionFailed"}
_AGAIN = {"409", "ConditionalRequestConflict", "OperationAborted", "500", "502", "503", "504", "InternalError",
          "SlowDown", "ServiceUnavailable", "RequestTimeout", "408", "429", "Throttling",
          "ThrottlingException"}  # fmt: skip
_DENIED = {"400",  # of HEAD, whose answer has no body, all that tells of an expired token
           "401", "403", "AccessDenied", "Forbidden", "ExpiredToken", "ExpiredTokenException", "InvalidToken",
           "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestExpired", "TokenRefreshRequired"}  # fmt: skip
_NO_CONDITIONS = {"501", "NotImplemented"}
_BEYOND = {"416", "InvalidRange"}
_NO_UPLOADS = {"NoSuchUpload"}
_MARKS = {
    **dict.fromkeys(("head_object", "get_object", "put_object", "upload_part", "complete_multipart_upload"), "ETag"),
    "create_multipart_upload": "UploadId",
    "list": "IsTruncated",
}
"""What every S3 server's answer to an operation has, and the page of a proxy or of a captive network has not."""
_ROOT = "s3://bucket/prefix or s3://bucket/prefix?endpoint=URL"
_KEYS = "remove them; S3 reads keys from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from a profile: AWS_PROFILE"
_EXPECTING = {"put_object", "get_object", "complete_multipart_upload", "abort_multipart_upload", "list uploads"}
_MAX_REDIRECTS = 4
_REDIRECTS = threading.local()
"""How often a thread's operation was redirected."""
_FOR_THE_CALLER = _TAKEN | _NO_CONDITIONS | _BEYOND | _NO_UPLOADS
Result = TypeVar("Result")


class S3Root(NamedTuple):
    """Where an S3 root is."""

    bucket: str
    prefix: str
    """Empty, or ending in "/"."""
    endpoint: str | None
    """Another server's URL; None: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or AWS itself."""


class Upload(NamedTuple):
    """An open multipart upload: the object that it would make, and its number at the server."""

    name: str
    upload_id: str


def open_s3(root: str) -> S3Storage:
    """The storage of `s3://bucket/prefix[?endpoint=URL]`. Raises UserError on anything else."""
    try:
        parts = urlsplit(root)
    except ValueError:  # such as a [ without its ]; it may show a password
        raise UserError("the S3 root is not a URL", expected=_ROOT) from None
    options = parse_qs(parts.query)
    if any("@" in each for each in (parts.netloc, *options.get("endpoint", ()))):
        raise UserError("an S3 root that holds a user or a password", expected=_ROOT, fix=_KEYS)
    if not parts.netloc or parts.fragment or options.keys() - {"endpoint"}:
        raise UserError(f"{root}: not an S3 root", expected=_ROOT)
    prefix = parts.path.strip("/")
    return S3Storage(S3Root(parts.netloc, f"{prefix}/" if prefix else "", options.get("endpoint", [None])[0]))


class S3Storage:
    """An S3 prefix. The client is made lazily, once a process; it may be used by several threads."""

    def __init__(self, root: S3Root, part_bytes: int = PART_BYTES) -> None:
        self._root, self._part_bytes = root, part_bytes
        self._client: Any = None
        self._pid = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self._root, "part_bytes": self._part_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"], state["part_bytes"])  # type: ignore[misc]

    def put(self, name: str, data: bytes | Path, *, if_absent: bool = False, patient: bool = True) -> bool:
        """See Storage. Larger than a part: multipart, aborted when it fails. `patient`: see Attempts."""
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        if size > self._part_bytes:
            return self._put_parts(name, data, size, condition)
        body = data.read_bytes() if isinstance(data, Path) else data
        return self._finish_put(
            name, size, lambda extra: self._call("put_object", name, patient=patient, Body=body, **extra), condition
        )

    def get(self, name: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
        """See Storage."""
        size = self.size(name)
        if size > max_bytes:
            raise ShardDamage(self.url(name), f"larger than {max_bytes:,} bytes")
        return self.get_range(name, 0, size)

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """See Storage."""
        length = min(length, max(0, self.size(name) - offset)) if length > self._part_bytes else length
        buffer = bytearray(length)
        return bytes(memoryview(buffer)[: self.read_into(name, offset, memoryview(buffer))])

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """See Storage. A read that breaks off continues where it broke off."""
        done = 0
        with Attempts(f"{self.url(name)}: read") as attempts:
            while done < len(buffer):
                try:
                    got = self._read_once(name, offset + done, buffer[done:])
                except _connection_errors() as error:
                    attempts.failed(error)
                    continue
                if got == 0:
                    break
                done += got
                if done < len(buffer):
                    attempts.failed(f"the body broke off after {got} bytes", progressed=True)
        return done

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See Storage."""
        where = {"Bucket": self._root.bucket, "Prefix": self._root.prefix + prefix}
        while True:
            page = self._retry("list", prefix, lambda client: client.list_objects_v2(**where))
            for item in page.get("Contents", ()):
                yield Entry(item["Key"].removeprefix(self._root.prefix), item["Size"])
            if not page.get("IsTruncated"):
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def exists(self, name: str) -> bool:
        """See Storage."""
        try:
            self._call("head_object", name)
        except MissingObject:
            return False
        return True

    def size(self, name: str) -> int:
        """See Storage."""
        return int(self._call("head_object", name)["ContentLength"])

    def modified(self, name: str) -> float:
        """See Storage."""
        return float(self._call("head_object", name)["LastModified"].timestamp())

    def delete(self, name: str, *, patient: bool = True) -> None:
        """See Storage."""
        self._call("delete_object", name, patient=patient)

    def url(self, name: str = "") -> str:
        """See Storage."""
        return f"s3://{self._root.bucket}/{self._root.prefix}{name}"

    def address(self) -> str:
        """See Storage."""
        return f"{self.url()}?endpoint={self._root.endpoint}" if self._root.endpoint else self.url()

    def uploads(self, older_than: float) -> Iterator[Upload]:
        """The open multipart uploads under the root that were begun before `older_than` (seconds since 1970)."""
        from botocore.exceptions import ClientError

        where = {"Bucket": self._root.bucket, "Prefix": self._root.prefix}
        while True:
            try:
                page = self._retry(
                    "list uploads",
                    "",
                    lambda client: client.list_multipart_uploads(**where),  # noqa: B023 - called at once
                )
            except ClientError as error:
                if _code(error) in _NO_UPLOADS:  # what rclone answers for an empty list
                    return
                raise self._failure("list uploads", "", error) from None
            for upload in page.get("Uploads", ()):
                if upload["Initiated"].timestamp() < older_than:
                    yield Upload(upload["Key"].removeprefix(self._root.prefix), upload["UploadId"])
            if not page.get("IsTruncated"):
                return
            where |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_upload(self, upload: Upload, *, patient: bool = True) -> None:
        """Abort an open upload, with the parts that it holds; one that is gone already is no error."""
        from botocore.exceptions import ClientError

        try:
            self._call("abort_multipart_upload", upload.name, patient=patient, UploadId=upload.upload_id)
        except MissingObject:
            return
        except ClientError as error:
            if _code(error) not in _NO_UPLOADS:
                raise self._failure("abort upload", upload.name, error) from None

    def _put_parts(self, name: str, data: bytes | Path, size: int, condition: dict[str, str]) -> bool:
        upload = self._call("create_multipart_upload", name)["UploadId"]
        try:
            parts = []
            for number, offset in enumerate(range(0, size, self._part_bytes), 1):
                body = _slice(data, offset, self._part_bytes)
                answer = self._call("upload_part", name, UploadId=upload, PartNumber=number, Body=body)
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            wanted = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
            done = self._finish_put(
                name, size, lambda extra: self._call("complete_multipart_upload", name, **wanted, **extra), condition
            )
        except BaseException:
            self._abort(name, upload)
            raise
        if not done:
            self._abort(name, upload)
        return done

    def _finish_put(
        self, name: str, size: int, send: Callable[[dict[str, str]], Any], condition: dict[str, str]
    ) -> bool:
        from botocore.exceptions import ClientError

        try:
            send(condition)
        except ClientError as error:
            if condition and _code(error) in _TAKEN:
                return False
            if _code(error) in _NO_UPLOADS and not condition and self.exists(name) and self.size(name) == size:
                return True  # an earlier attempt completed it, and its answer was lost
            if not (condition and _code(error) in _NO_CONDITIONS):
                raise self._failure("put", name, error) from None
            LOG.warning("%s: this server knows no conditional put; a second writer would win", self.url(name))
            if self.exists(name):
                return False
            return self._finish_put(name, size, send, {})
        return True

    def _abort(self, name: str, upload: str) -> None:
        try:
            self.abort_upload(Upload(name, upload), patient=False)
        except UserError as error:  # the first failure is the one to report; `sweep` aborts what is left
            LOG.warning("%s: its multipart upload could not be aborted: %s", self.url(name), error.problem)

    def _read_once(self, name: str, offset: int, buffer: memoryview) -> int:
        from botocore.exceptions import ClientError

        try:
            answer = self._call("get_object", name, Range=f"bytes={offset}-{offset + len(buffer) - 1}")
        except ClientError as error:
            if _code(error) in _BEYOND:
                return 0
            raise self._failure("read", name, error) from None
        body = answer["Body"]
        try:
            # A server may answer the whole object to a range: what comes before is read and dropped.
            skip = offset if _is_whole(answer, offset) else 0
            while skip:
                skip -= len(body.read(min(skip, 2**20))) or skip
            return _fill(body, buffer)
        finally:
            body.close()

    def _call(self, operation: str, name: str, **arguments: Any) -> Any:
        patient = arguments.pop("patient", True)
        arguments |= {"Bucket": self._root.bucket, "Key": self._root.prefix + name}
        return self._retry(operation, name, lambda client: getattr(client, operation)(**arguments), patient)

    def _retry(self, operation: str, name: str, send: Callable[[Any], Result], patient: bool = True) -> Result:
        """Send, and again while errors are such that pass. ClientErrors that have a meaning go to the caller."""
        from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, MetadataRetrievalError
        from botocore.parsers import ResponseParserError

        denied = False
        with Attempts(f"{self.url(name)}: {operation}", patient=patient) as attempts:
            while True:
                client, _REDIRECTS.number = self._s3(), 0
                try:
                    answer = send(client)
                    if _MARKS.get(operation, "") in ("", *cast("dict[str, Any]", answer)):
                        return answer
                    attempts.failed("an answer with status 200 that is not an S3 server's")
                except ClientError as error:
                    code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                    if code in _ABSENT:
                        raise MissingObject(self.url(name)) from None
                    if code in _FOR_THE_CALLER and operation in _EXPECTING:
                        raise
                    if (code in _DENIED or status in (401, 403)) and not denied:
                        denied = True
                        self._forget_client(client)
                        continue
                    passes = code in _AGAIN or status >= 500 or status in (408, 429)
                    if not passes or code in _FOR_THE_CALLER:
                        raise self._failure(operation, name, error) from None
                    attempts.failed(error)
                except (ResponseParserError, RecursionError) as error:
                    attempts.failed(f"an answer that is not an S3 server's: {error}")
                except _connection_errors() as error:
                    if "CERTIFICATE_VERIFY_FAILED" in str(error):
                        raise self._failure(operation, name, error) from None
                    attempts.failed(error)
                except BotoCoreError as error:  # no credentials, a bucket's name that cannot be: no server was asked
                    if denied or not isinstance(error, CredentialRetrievalError | MetadataRetrievalError):
                        raise self._failure(operation, name, error) from None
                    denied = True
                    self._forget_client(client)

    def _failure(self, operation: str, name: str, error: Exception | str) -> StorageFailure:
        return StorageFailure(
            f"{self.url(name)}: {operation} refused: {error}",
            fix="check the bucket, the credentials (AWS_…) and what they permit, and the endpoint (?endpoint= or "
            "AWS_ENDPOINT_URL)",
        )

    def _forget_client(self, client: Any) -> None:
        """Pause, and let the next request make a new client, which reads the credentials again."""
        time.sleep(_DENIED_PAUSE_SECONDS)
        with self._lock:
            if self._client is client:
                self._client = None

    def _s3(self) -> Any:
        if self._pid != os.getpid():  # after a fork: neither its sockets nor its lock are ours
            self._client, self._lock, self._pid = None, threading.Lock(), os.getpid()
        with self._lock:
            if self._client is None:
                self._client = _make_client(self._root.endpoint)
            return self._client


def _make_client(endpoint: str | None) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    settings: dict[str, Any] = {
        # This module retries; two layers would multiply.
        "retries": {"total_max_attempts": 1},
        "connect_timeout": _CONNECT_SECONDS,
        "read_timeout": _READ_SECONDS,
        "max_pool_connections": 32,
    }
    if endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        # Other servers may know neither buckets as host names nor the newer checksums.
        settings["request_checksum_calculation"] = "when_required"
        settings["response_checksum_validation"] = "when_required"
        settings["s3"] = {"addressing_style": "path"}
    try:
        client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=Config(**settings))
    except (BotoCoreError, ValueError) as error:  # an endpoint that is no URL is a ValueError
        what = "not a URL" if "@" in str(error) else error
        raise UserError(
            f"no S3 client{f' for endpoint {endpoint!r}' if endpoint else ''}: {what}",
            expected="an endpoint such as http://host:9000, and a profile that ~/.aws/config has",
            fix="check ?endpoint=, AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_PROFILE and AWS_DEFAULT_REGION",
        ) from None
    if "@" in client.meta.endpoint_url:  # messages name it, and so would the log
        raise UserError("the S3 endpoint holds a user or a password", fix=_KEYS)
    client.meta.events.register("before-call.s3.HeadBucket", _count_redirect)
    return client


def _count_redirect(**_: object) -> None:
    """boto3 follows a redirect by asking for the bucket's region, and a redirect of that answer in the same way."""
    _REDIRECTS.number += 1
    if _REDIRECTS.number > _MAX_REDIRECTS:
        raise RecursionError("redirected without end")


def _connection_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import ConnectionError as BotoConnectionError
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    return (BotoConnectionError, HTTPClientError, IncompleteReadError, HTTPError, ConnectionError, TimeoutError)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _is_whole(answer: Any, offset: int) -> bool:
    """Whether an answer to a range holds the object from its start."""
    content_range = answer.get("ContentRange", "")
    if content_range:
        return not content_range.startswith(f"bytes {offset}-")
    return answer["ResponseMetadata"]["HTTPStatusCode"] == 200


def _fill(body: Any, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        try:
            part = body.read(min(len(buffer) - done, 2**20))
        except _connection_errors():
            if done == 0:
                raise
            break  # what came before the break is kept
        if not part:
            break
        buffer[done : done + len(part)] = part
        done += len(part)
    return done


def _slice(data: bytes | Path, offset: int, length: int) -> bytes:
    if isinstance(data, Path):
        with data.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    return data[offset : offset + length]
