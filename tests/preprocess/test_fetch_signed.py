"""Private distributions and buckets: signatures as CloudFront checks them, made anew, and never seen again."""

import contextlib
import io
import json
import logging
import os
import re
import sys
import time
from datetime import UTC, datetime

import pytest
import zstandard
from cloudfront_gate import KEY_PAIR_ID, Gate
from fetch_runs import FetchRun
from odd_server import BODY, cut, odd_server, status, whole
from prep_runs import files_of, prep
from s3_servers import BUCKET, serve

from preprocess.config import SigningConfig
from preprocess.corpus.fields import SIGNED_URL
from preprocess.corpus.records import parse_record
from preprocess.corpus.url import spell_url, unsigned
from preprocess.fetch import cloudfront
from preprocess.fetch import fetcher as fetching
from preprocess.fetch.cloudfront import KEY_PAIR_VARIABLE, KEY_VARIABLE, canonical_policy, open_signer
from preprocess.video.ffmpeg import run_killable
from shards.errors import UserError

MODES = ("url", "policy", "cookies")
LOCAL = ("127.0.0.1",)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(fetching, "BACKOFF_SECONDS", 0.01)


@pytest.fixture
def fetch(tmp_path):
    return FetchRun(tmp_path / "scratch")


@pytest.fixture(params=["rsa", "ec"])
def any_gate(request):
    return Gate(request.param)


@pytest.fixture
def gate(monkeypatch, tmp_path):
    """An RSA gate whose key is in the environment, as a file."""
    gate = Gate()
    monkeypatch.setenv(KEY_VARIABLE, str(gate.write_key(tmp_path / "key.pem")))
    monkeypatch.setenv(KEY_PAIR_VARIABLE, KEY_PAIR_ID)
    return gate


def signing(mode, **more):
    return {"sign": {"mode": mode, "hosts": LOCAL, **more}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spelling", ["file", "pem", "one line"])
def test_each_mode_opens_the_gate_with_each_kind_of_key(fetch, any_gate, mode, spelling, monkeypatch, tmp_path):
    pem = any_gate.pem
    value = {"file": str(any_gate.write_key(tmp_path / "key.pem")), "pem": pem, "one line": pem.replace("\n", "\\n")}
    monkeypatch.setenv(KEY_VARIABLE, value[spelling])
    monkeypatch.setenv(KEY_PAIR_VARIABLE, KEY_PAIR_ID)
    with odd_server(a=[any_gate.guards(whole)]) as server:
        assert fetch(f"{server.url}/a", f"{server.url}/a?id=2", **signing(mode)) == BODY
        assert any_gate.verdicts == ["open", "open"]
        assert fetch.refused(f"{server.url}/a")[0].reason == "fetch-403"
        assert any_gate.verdicts[2:] == ["unsigned"]


def test_one_policy_opens_many_clips_and_no_others(fetch, gate):
    with odd_server(**{"clips/a": [gate.guards(whole)], "other/a": [gate.guards(whole)]}) as server:
        for mode in ("policy", "cookies"):
            gate.secrets.clear()
            options = signing(mode, resource=f"{server.url}/clips/*")
            fetch(f"{server.url}/clips/a", f"{server.url}/clips/a?x=1", **options)
            assert len(gate.secrets) == 3  # one policy, one signature, one key id for both
            rejection, _ = fetch.refused(f"{server.url}/other/a", **options)
            assert (rejection.reason, rejection.retryable) == ("fetch-403", True)
            assert "though signed twice" in rejection.detail
    assert gate.verdicts == ["open", "open", "elsewhere", "elsewhere"] * 2


def test_blanks_and_korean_letters_are_signed_as_they_are_asked_for(fetch, gate):
    path = "%EC%A0%9C%EC%A3%BC%20%EC%B6%95%EC%A0%9C/a%20b.mp4"
    with odd_server(**{path: [gate.guards(whole)]}) as server:
        for mode in MODES:
            assert fetch(f"{server.url}/제주 축제/a b.mp4?t=가 나", **signing(mode)) == BODY
    assert set(gate.verdicts) == {"open"}


def test_a_canned_signature_is_botocores(monkeypatch):
    from botocore.signers import CloudFrontSigner as Theirs

    gate = Gate()
    signer = open_signer(SigningConfig(mode="url"), {KEY_VARIABLE: gate.pem, KEY_PAIR_VARIABLE: KEY_PAIR_ID})
    monkeypatch.setattr(cloudfront.time, "time", lambda: 1_800_000_000.7)
    until = datetime.fromtimestamp(1_800_003_600, UTC)
    for url in ("https://d1.cloudfront.net/a.mp4", "https://d1.cloudfront.net/a%20b.mp4?id=1&t=2"):
        theirs = Theirs(KEY_PAIR_ID, signer._sign).generate_presigned_url(url, date_less_than=until)
        assert signer.sign(spell_url(url)).url.text == theirs
        assert canonical_policy(url, 1_800_003_600).decode() == Theirs("k", None).build_policy(url, until)
        assert gate.judge(theirs) == "open"


def test_another_host_sees_no_signature(fetch, gate):
    with odd_server(a=[whole]) as other, odd_server() as server:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        server.answers["/a"] = [gate.guards(status(302, Location=f"{elsewhere}/a"))]
        hosts = (*LOCAL, "localhost")
        for mode in MODES:
            assert fetch(f"{server.url}/a", allow_hosts=hosts, **signing(mode)) == BODY
        assert not [headers for _, headers in other.requests if "Cookie" in headers or "Referer" in headers]
    assert gate.verdicts == ["open"] * 3


@pytest.mark.parametrize("mode", ["policy", "cookies"])
def test_a_signature_that_expired_is_made_anew_at_once(fetch, gate, mode, monkeypatch):
    """The server's clock is ahead: what clips share has ended there while it still looks good from here."""
    start = time.time()
    now = [start]
    monkeypatch.setattr(cloudfront.time, "time", lambda: now[0])

    def later(handler):
        now[0], gate.clock_seconds = start + 1000, 3000
        whole(handler)

    with odd_server(a=[gate.guards(later)], b=[gate.guards(whole)]) as server:
        options = signing(mode, resource=f"{server.url}/*", valid_seconds=3600)
        assert fetch(f"{server.url}/a", f"{server.url}/b", attempts=1, **options) == BODY
        assert fetch.attempts == 1 and fetch.counts.num_again == 0
    assert gate.verdicts == ["open", "expired", "open"]


def test_a_shared_signature_is_made_anew_in_time(gate, monkeypatch):
    now = [time.time()]
    monkeypatch.setattr(cloudfront.time, "time", lambda: now[0])
    signer = open_signer(SigningConfig(mode="cookies", hosts=LOCAL, valid_seconds=100))
    first = signer.sign(spell_url("http://127.0.0.1/a")).headers
    now[0] += 49
    assert signer.sign(spell_url("http://127.0.0.1/b")).headers == first
    now[0] += 2
    assert signer.sign(spell_url("http://127.0.0.1/b")).headers != first


def test_an_expiry_between_two_attempts_loses_nothing(fetch, gate):
    """A cut, then a 403, then the rest: signed again, and what had arrived is not asked for again."""

    def closed(handler):
        handler.send_error(403)

    with odd_server(a=[gate.guards(cut(300_000)), closed, gate.guards(whole)]) as server:
        assert fetch(f"{server.url}/a", **signing("url")) == BODY
        assert fetch.attempts == 2 and len(server.requests) == 3
        assert server.requests[2][1]["Range"] == "bytes=300000-"


@pytest.mark.parametrize("mode", MODES)
def test_a_403_that_stays_is_a_row_that_may_be_tried_again(fetch, gate, mode):
    gate.clock_seconds = 1e9
    with odd_server(a=[gate.guards(whole)]) as server:
        rejection, attempts = fetch.refused(f"{server.url}/a", attempts=4, **signing(mode))
        assert (rejection.reason, rejection.retryable, attempts) == ("fetch-403", True, 1)
        assert gate.verdicts == ["expired"] * 2


def test_without_a_signer_a_signed_annotation_says_what_to_do(fetch, gate):
    with odd_server(a=[gate.guards(whole)]) as server:
        rejection, _ = fetch.refused(f"{server.url}/a", defects=(SIGNED_URL,))
        assert "set fetch.sign" in rejection.detail
        assert "set fetch.sign" not in fetch.refused(f"{server.url}/a")[0].detail


GOOD = {KEY_VARIABLE: "-----BEGIN hush", KEY_PAIR_VARIABLE: KEY_PAIR_ID}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, f"{KEY_VARIABLE} is not set"),
        ({KEY_VARIABLE: "hush"}, f"{KEY_PAIR_VARIABLE} is not set"),
        ({**GOOD, KEY_PAIR_VARIABLE: "hush&x=1"}, "not a key's id"),
        ({**GOOD, KEY_VARIABLE: "/nowhere/hush.pem"}, "neither PEM text nor a file: No such file"),
        ({**GOOD, KEY_VARIABLE: "hush" * 2000}, "neither PEM text nor a file"),
        ({**GOOD, KEY_VARIABLE: "hush\0"}, "neither PEM text nor a file"),
        (GOOD, "not the PEM of a private key"),
    ],
)
def test_a_key_that_cannot_be_used_is_said_without_repeating_it(environment, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        open_signer(SigningConfig(mode="url"), environment)
    assert "hush" not in str(caught.value)


def test_a_key_with_a_password_or_of_another_kind_is_refused():
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ed25519

    pem, pkcs8 = forms.Encoding.PEM, forms.PrivateFormat.PKCS8
    locked = Gate().key.private_bytes(pem, pkcs8, forms.BestAvailableEncryption(b"x")).decode()
    other = ed25519.Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, forms.NoEncryption()).decode()
    for key, words in ((locked, "it has a password"), (other, "a key type that CloudFront does not accept")):
        with pytest.raises(UserError, match=words):
            open_signer(SigningConfig(mode="url"), {KEY_VARIABLE: key, KEY_PAIR_VARIABLE: KEY_PAIR_ID})


def test_a_resource_that_nothing_reads_is_refused():
    with pytest.raises(ValueError, match="mode policy or cookies"):
        SigningConfig(mode="url", resource="https://a/*")


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://a/b?Expires=1&Signature=hush&Key-Pair-Id=K", "https://a/b"),
        ("https://a/b?id=7&Policy=hush&Signature=hush&Key-Pair-Id=K&t=1#x", "https://a/b?id=7&t=1#x"),
        (
            "https://a/b?X-Amz-Algorithm=A&X-Amz-Date=1&X-Amz-Signature=hush&x-id=GetObject",
            "https://a/b?x-id=GetObject",
        ),
        ("https://a/b?AWSAccessKeyId=hush&Signature=hush&Expires=3", "https://a/b"),
        ("https://a/b?Signatur%65=hush&expires=9", "https://a/b"),
        ("s3://a/b?versionId=3&X-Amz-Security-Token=hush", "s3://a/b?versionId=3"),
        ("https://a/b?Expires=1&Policy=p", "https://a/b?Expires=1&Policy=p"),
        ("https://a/b?", "https://a/b?"),
        ("https://a/Signature=1/c.mp4", "https://a/c.mp4"),
    ],
)
def test_a_record_keeps_no_signature(url, kept):
    record = parse_record(json.dumps({"source_data_info": {"clip_id": "a", "clip_proxy_url": url}}).encode(), "a.json")
    assert record.url == unsigned(url) == kept
    assert (SIGNED_URL in record.defects) == (kept != url)


@contextlib.contextmanager
def everything_logged():
    """All loggers of the process at debug level, as one text."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root, ours = logging.getLogger(), logging.getLogger("wan")
    before = root.level, ours.level, ours.propagate
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    ours.setLevel(logging.DEBUG)
    ours.propagate = True
    try:
        yield text
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        ours.setLevel(before[1])
        ours.propagate = before[2]


def unpacked(data):
    """A file as it is, and what zstd packed into it."""
    with contextlib.suppress(zstandard.ZstdError):
        return data + zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    return data


@pytest.mark.parametrize("mode", ["url", "cookies"])
def test_a_signed_build_leaves_no_secret_anywhere(demo_corpus, tmp_path, gate, mode, capfd):
    """Pre-signed annotations, a gate that checks; a clip cut, one missing, one shut off: then look everywhere."""
    from preprocess.pipeline import build_shards

    corpus, output, cache = tmp_path / "corpus", tmp_path / "out", tmp_path / "cache"
    (corpus / "video").mkdir(parents=True)
    good, missing, late = "3338987", "3338999", "3338988"
    film = (demo_corpus / f"media/{good}.mp4").read_bytes()

    def send(content):
        def answer(handler):
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(film)))
            handler.end_headers()
            handler.wfile.write(content)
            handler.close_connection = len(content) < len(film)

        return answer

    media = {
        f"media/{good}.mp4": [gate.guards(send(film[:1000])), gate.guards(send(film))],
        f"media/{missing}.mp4": [gate.guards(status(404))],
        f"media/{late}.mp4": [gate.guards(send(film[:1000])), gate.guards(status(403))],
    }
    for clip in (good, missing, late):
        record = json.loads((demo_corpus / f"video/batch_0001/{good}.json").read_text())
        record["file_id"] = record["source_data_info"]["clip_id"] = clip
        query = "?Expires=1900000000&Signature=hush-annotation&Key-Pair-Id=hush-pair"
        record["source_data_info"]["clip_proxy_url"] = f"http://127.0.0.1:8765/media/{clip}.mp4{query}"
        (corpus / f"video/{clip}.json").write_text(json.dumps(record))
    with odd_server(**media) as server, everything_logged() as logged:
        mirrors = {"http://127.0.0.1:8765/": f"{server.url}/"}
        fetch = {"mirrors": mirrors, "attempts": 2, "cache": str(cache), "allow_hosts": LOCAL, **signing(mode)}
        config = prep(corpus, output, fetch=fetch, engine={"decoders": 1})
        counts = build_shards(config)
    assert counts["samples"] == 1 and counts["rejected_by"] == {"fetch/fetch-403": 1, "fetch/fetch-404": 1}
    assert "fetch-truncated" in logged.getvalue()  # debug lines did come
    key_lines = [line for line in gate.pem.splitlines() if not line.startswith("-----")]
    secrets = {"hush", KEY_PAIR_ID, *gate.secrets, *key_lines}
    assert len(gate.secrets) >= 2
    said = capfd.readouterr()
    places = {"log": logged.getvalue().encode(), "stdout": said.out.encode(), "stderr": said.err.encode()}
    for root in (output, cache):
        for name, data in files_of(root).items():
            places[name] = name.encode() + unpacked(data)
    assert any(name.endswith(".clip") for name in places) and any("plan/" in name for name in places)
    for name, data in places.items():
        for secret in secrets:
            assert secret.encode() not in data, name
    plan = b"".join(data for name, data in places.items() if name.startswith("plan/"))
    assert f"media/{good}.mp4".encode() in plan and SIGNED_URL.encode() in plan


@pytest.fixture(params=["moto", "rclone"])
def bucket(request, tmp_path, monkeypatch):
    """An S3 server with one clip in it, reached by the environment; its endpoint."""
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with serve(request.param, tmp_path / "s3") as endpoint:
        client = boto3.client("s3", endpoint_url=endpoint)
        client.put_object(Bucket=BUCKET, Key="한글/a b.mp4", Body=BODY)
        yield request.param, endpoint
        client.close()


def test_buckets_by_endpoint_and_by_environment(fetch, bucket, monkeypatch):
    allowed = {"allow_hosts": (f"s3://{BUCKET}",), "attempts": 2}
    kind, endpoint = bucket
    with everything_logged() as logged:
        assert fetch(*[f"s3://{BUCKET}/한글/a b.mp4"] * 3, s3_endpoint=endpoint, **allowed) == BODY
        assert fetch.counts.num_connections == (1 if kind == "rclone" else 3)  # moto closes after each answer
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert fetch(f"s3://{BUCKET}/%ED%95%9C%EA%B8%80/a%20b.mp4?X-Amz-Signature=hush", **allowed) == BODY
        rejection, attempts = fetch.refused(f"s3://{BUCKET}/no.mp4", **allowed)
        assert (rejection.reason, rejection.retryable, attempts) == ("fetch-404", False, 1)
    assert "AWS4-HMAC" not in logged.getvalue() and "hush" not in logged.getvalue()
    for url in (f"s3://{BUCKET}", f"s3://{BUCKET}/a?endpoint=http://127.0.0.1:1/"):
        assert fetch.refused(url, **allowed)[0].reason == "fetch-bad-url"
    assert fetch.refused("s3://other/a.mp4", **allowed)[0].reason == "fetch-host-refused"


def test_no_credentials_is_said_once_and_to_the_user(fetch, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="s3://clips: Unable to locate credentials"):
        fetch("s3://clips/a", allow_hosts=("s3://clips",))


def s3_answer(body, code=200, etag='"v1"', **headers):
    def answer(handler):
        handler.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "ETag": etag, **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def s3_error(code, name):
    return s3_answer(f"<Error><Code>{name}</Code><Message>hush</Message></Error>".encode(), code)


def s3_rest(handler):
    start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    told = {"Content_Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"}
    s3_answer(BODY[start:], 206, **told)(handler)


@pytest.mark.parametrize(
    ("answers", "outcome", "num_requests"),
    [
        pytest.param([cut(300_000), s3_rest], BODY, 2, id="cut, then the rest"),
        pytest.param([cut(300_000), s3_answer(BODY)], BODY, 2, id="cut, and a server without ranges"),
        pytest.param([cut(300_000), s3_error(412, "PreconditionFailed"), s3_answer(BODY)], BODY, 3, id="changed"),
        pytest.param([s3_error(503, "SlowDown"), s3_answer(BODY)], BODY, 2, id="slow down"),
        pytest.param([s3_error(403, "AccessDenied")], ("fetch-403", True), 1, id="not allowed"),
        pytest.param([s3_error(400, "ExpiredToken")], ("fetch-403", True), 1, id="a session that ended"),
        pytest.param([s3_error(500, "InternalError")], ("fetch-500", True), 3, id="broken"),
        pytest.param([cut(10, length=10 << 30)], ("fetch-too-large", False), 1, id="10 GB"),
    ],
)
def test_a_bucket_that_misbehaves(fetch, monkeypatch, answers, outcome, num_requests):
    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "hush", "AWS_DEFAULT_REGION": "x"}.items():
        monkeypatch.setenv(name, value)
    with odd_server(**{"clips/a": answers}) as server:
        options = {"s3_endpoint": server.url, "allow_hosts": ("s3://clips",), "attempts": 3, "max_mib": 64}
        if isinstance(outcome, bytes):
            assert fetch("s3://clips/a", **options) == outcome
        else:
            rejection, _ = fetch.refused("s3://clips/a", **options)
            assert (rejection.reason, rejection.retryable) == outcome
        asked = [headers for _, headers in server.requests]
        assert len(asked) == num_requests
        if num_requests > 1 and outcome == BODY and "Range" in asked[1]:
            assert (asked[1]["Range"], asked[1]["If-Match"]) == ("bytes=300000-", '"v1"')


def test_a_bucket_that_drips_meets_the_same_limits(fetch, monkeypatch):
    from odd_server import drip, drip_head

    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "hush", "AWS_DEFAULT_REGION": "x"}.items():
        monkeypatch.setenv(name, value)
    with odd_server(**{"clips/a": [drip(0.05)], "clips/b": [drip_head(0.05)]}) as server:
        options = {"s3_endpoint": server.url, "allow_hosts": ("s3://clips",), "attempts": 1}
        start = time.monotonic()
        assert fetch.refused("s3://clips/a", timeout_seconds=0.4, **options)[0].reason == "fetch-too-slow"
        assert fetch.refused("s3://clips/b", deadline_seconds=0.6, **options)[0].reason == "fetch-timeout"
        assert time.monotonic() - start < 5


def test_programs_that_read_clips_see_no_key(monkeypatch):
    """ffmpeg and the inspector read hostile files: nothing worth stealing is in their environment."""
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "hush", "AWS_SESSION_TOKEN": "hush", "AWS_PROFILE": "hush", KEY_VARIABLE: "hush",
        KEY_PAIR_VARIABLE: "hush", "HF_TOKEN": "hush", "MY_API_KEY": "hush", "PGPASSWORD": "hush",
        "GOOGLE_APPLICATION_CREDENTIALS": "hush", "SOMETHING": "-----BEGIN PRIVATE KEY-----hush",
        "AWS_ENDPOINT_URL": "https://u:hush@s3.example", "MIRROR": "https://u:hush@hub.example", "https_proxy": "hush",
    }  # fmt: skip
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HARMLESS", "kept")
    show = [sys.executable, "-c", "import os; print(dict(os.environ))"]
    for environment in (None, os.environ | {"OMP_NUM_THREADS": "1"}):
        result = run_killable(show, timeout_seconds=30, max_stdout_bytes=1 << 20, environment=environment)
        shown = result.stdout.decode()
        assert "hush" not in shown and not [name for name in secrets if f"'{name}'" in shown]
        assert "'HARMLESS': 'kept'" in shown and "'PATH'" in shown


def test_an_endpoint_with_a_password_is_refused_and_not_repeated(fetch, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with pytest.raises(UserError, match="carries a user name or password") as refused:
        fetch("s3://clips/a", allow_hosts=("s3://clips",), s3_endpoint="http://user:hush@127.0.0.1:9")
    assert "hush" not in str(refused.value)
