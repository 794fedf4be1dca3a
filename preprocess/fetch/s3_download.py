"""One attempt at one `s3://` clip.

boto3 finds the credentials, the region and the endpoint, and signs; the bytes come over our own connections and under
the same limits as over HTTP: botocore's reads would wait for a server that drips.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from preprocess.corpus.url import HttpUrl, redact, unsigned
from preprocess.fetch.hosts import AllowedHosts, HostLimits
from preprocess.fetch.http_download import accept, refusal
from preprocess.fetch.transfer import FetchError, Limits, Partial
from preprocess.fetch.transport import Transport, chunks_of
from shards.errors import UserError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

_STATUS_OF_CODE = {"NoSuchKey": 404, "NoSuchBucket": 404, "NoSuchVersion": 404, "AccessDenied": 403, "SlowDown": 503,
                   "InvalidAccessKeyId": 403, "SignatureDoesNotMatch": 403, "RequestTimeout": 503,
                   "ExpiredToken": 403, "InvalidToken": 403, "TokenRefreshRequired": 403,
                   "RequestTimeTooSkewed": 403}  # fmt: skip
_CHANGED = {"PreconditionFailed", "InvalidRange"}


class S3Source:
    """Downloads from the buckets in `fetch.allow_hosts`."""

    def __init__(self, hosts: AllowedHosts, host_limits: HostLimits, endpoint: str | None, parallel: int) -> None:
        self._hosts = hosts
        self._host_limits = host_limits
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._client: Any = None
        self._current = threading.local()
        # The user chose the endpoint: its address is not checked.
        self.transport = Transport(parallel)

    def attempt(self, url: str, partial: Partial, limits: Limits) -> None:
        """One attempt to complete `partial` from `url`. Raises FetchError, TransferStopped, UserError without S3."""
        request = self._request(url)
        if partial.resumable:
            request |= {"Range": f"bytes={partial.num_bytes}-", "IfMatch": partial.validator}
        else:
            partial.restart()
        with (
            self._host_limits.slot(f"s3://{request['Bucket']}", limits),
            self.transport.watching(f"s3://{request['Bucket']}", limits),
        ):
            response = self._ask("get_object", request, partial, limits)
            try:
                accept(response, partial, limits)
                partial.append(chunks_of(response, limits), limits)
            finally:
                response.close()

    def answers(self, url: str, limits: Limits) -> bool:
        """Whether the server of the bucket answers: a refusal is an answer. Raises TransferStopped, UserError."""
        bucket = urlsplit(url).netloc
        try:
            with self.transport.watching(f"s3://{bucket}", limits):
                self._ask("list_objects_v2", {"Bucket": bucket, "MaxKeys": 1}, None, limits).close()
        except FetchError as error:
            return not error.again
        return True

    def _request(self, url: str) -> dict[str, Any]:
        """Bucket, key and version of a URL that may be requested."""
        parts = urlsplit(unsigned(url))
        bucket, key = parts.netloc, unquote(parts.path.lstrip("/"))
        if not self._hosts.allows(f"s3://{bucket}"):
            raise FetchError("fetch-host-refused", f"s3://{bucket} is not in fetch.allow_hosts", retryable=True)
        options = parse_qs(parts.query, keep_blank_values=True)
        if not bucket or not key or options.keys() - {"versionId"}:
            raise FetchError("fetch-bad-url", f"{redact(url)}: expected s3://bucket/key or s3://bucket/key?versionId=…")
        version = {"VersionId": options["versionId"][0]} if options else {}
        return {"Bucket": bucket, "Key": key, **version}

    def _ask(self, call: str, request: dict[str, Any], partial: Partial | None, limits: Limits) -> BaseHTTPResponse:
        """The response to a call of the client; of `get_object` its body is unread."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
        from botocore.parsers import ResponseParserError

        client = self._s3()
        self._current.limits = limits
        try:
            answer = getattr(client, call)(**request)
        except ClientError as error:
            raise _refusal(error, partial) from None
        except (NoCredentialsError, PartialCredentialsError) as error:
            fix = "AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role of the machine"
            raise UserError(f"s3://{request['Bucket']}: {error}", fix=fix) from None
        except (BotoCoreError, ResponseParserError) as error:
            detail = f"s3://{request['Bucket']}: {type(error).__name__}"
            raise FetchError("fetch-s3", detail, again=True) from None
        if call == "list_objects_v2" and "IsTruncated" not in answer:
            raise FetchError("fetch-s3", f"s3://{request['Bucket']}: the answer is not an S3 server's", again=True)
        response: BaseHTTPResponse = self._current.response
        return response

    def _s3(self) -> Any:
        """The client, made at first use; its own retries are off, and `_send` is its transport."""
        import boto3
        from botocore.config import Config as BotoConfig
        from botocore.exceptions import BotoCoreError

        with self._lock:
            if self._client is None:
                options = BotoConfig(
                    retries={"total_max_attempts": 1},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                )
                try:
                    session = boto3.session.Session()
                    client = session.client("s3", endpoint_url=self._endpoint, config=options)
                except (BotoCoreError, ValueError) as error:
                    raise UserError(f"fetch from s3://: {error}", expected="a profile, region and endpoint") from None
                if "@" in urlsplit(client.meta.endpoint_url).netloc:
                    fix = "remove it from fetch.s3_endpoint or AWS_ENDPOINT_URL; S3 reads keys from the AWS variables"
                    raise UserError("the S3 endpoint carries a user name or password", fix=fix)
                client.meta.events.register("before-send.s3", self._send)
                self._client = client
            return self._client

    def _send(self, request: Any, **_: object) -> Any:
        """Send what boto3 has signed. Called by botocore, in the thread of `_ask`."""
        from botocore.awsrequest import AWSResponse

        parts = urlsplit(request.url)  # an endpoint may have any name that the user's network resolves
        url = HttpUrl(parts.scheme, str(parts.hostname), parts.port, request.url.split(parts.netloc, 1)[1])
        response = self.transport.send(url, dict(request.headers), self._current.limits)
        self._current.response = response
        return AWSResponse(request.url, response.status, response.headers, response)

    def close(self) -> None:
        """Close the client and its connections."""
        self.transport.close()
        if self._client is not None:
            self._client.close()


def _refusal(error: Any, partial: Partial | None) -> FetchError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code in _CHANGED and partial is not None:
        partial.restart()
        return FetchError("fetch-changed", "the object changed while it was read", again=True)
    status = _STATUS_OF_CODE.get(code) or error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return refusal(int(status))
