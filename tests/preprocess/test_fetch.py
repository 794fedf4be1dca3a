"""Downloads from a server that misbehaves: each ends as designed, and no secret is told."""

import base64
import gzip
import http.server
import io
import logging
import re
import threading
import time
from pathlib import Path

import pytest
from fetch_runs import FetchRun
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_server import BODY, body, cut, drip, odd_server, other_content, stall, status, whole, wrong_part
from urllib3.util import parse_url

from preprocess.config import CorpusConfig, FetchConfig
from preprocess.corpus.fields import SIGNED_URL, read_url
from preprocess.corpus.records import Record
from preprocess.corpus.url import cache_name, redact, spell_url, unsigned
from preprocess.fetch import fetcher as fetching
from preprocess.fetch.fetcher import Fetcher
from preprocess.fetch.hosts import AllowedHosts, HostLimits
from preprocess.fetch.http_download import HttpSource
from preprocess.fetch.transfer import ByteCounter, FetchError, Limits, Partial
from preprocess.rejection import ClipRejected, Rejection
from shards.errors import UserError

SECRET = "?Expires=1&Signature=hush-hush&Key-Pair-Id=K"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(fetching, "BACKOFF_SECONDS", 0.01)


@pytest.fixture
def fetch(tmp_path):
    return FetchRun(tmp_path / "scratch")


def test_a_good_server_is_asked_once(fetch):
    with odd_server(a=[whole]) as server:
        assert fetch(f"{server.url}/a{SECRET}") == BODY
        assert len(server.requests) == 1
        assert fetch.attempts == 1


@pytest.mark.parametrize(
    ("code", "attempts", "retryable"),
    [(404, 1, False), (410, 1, False), (403, 1, True), (401, 1, True), (418, 1, False), (500, 3, True), (503, 3, True)],
)
def test_each_status_has_its_reason(fetch, code, attempts, retryable):
    with odd_server(a=[status(code)]) as server:
        rejection, made = fetch.refused(f"{server.url}/a{SECRET}", attempts=3)
        assert (rejection.reason, made, rejection.retryable) == (f"fetch-{code}", attempts, retryable)
        assert len(server.requests) == attempts


def test_a_server_that_recovers_is_asked_again(fetch):
    with odd_server(a=[status(503), status(500), whole]) as server:
        assert fetch(f"{server.url}/a", attempts=3) == BODY
        assert fetch.attempts == 3


def test_retry_after_is_honoured(fetch):
    with odd_server(a=[status(429, Retry_After="1"), whole]) as server:
        start = time.monotonic()
        assert fetch(f"{server.url}/a") == BODY
        assert 1.0 <= time.monotonic() - start < 4


def test_retry_after_beyond_the_deadline_ends_at_once(fetch):
    with odd_server(a=[status(429, Retry_After="3600")]) as server:
        start = time.monotonic()
        rejection, attempts = fetch.refused(f"{server.url}/a")
        assert (rejection.reason, rejection.retryable, attempts) == ("fetch-429", True, 1)
        assert time.monotonic() - start < 3


def test_a_cut_download_goes_on_where_it_stopped(fetch):
    with odd_server(a=[cut(300_000), whole]) as server:
        assert fetch(f"{server.url}/a") == BODY
        asked = server.requests[1][1]
        assert asked["Range"] == "bytes=300000-" and asked["If-Range"] == '"v1"'


def test_a_download_that_is_always_cut_is_truncated(fetch):
    with odd_server(a=[cut(1000)]) as server:
        rejection, attempts = fetch.refused(f"{server.url}/a", attempts=2)
        assert (rejection.reason, rejection.retryable, attempts) == ("fetch-truncated", True, 2)
        assert "1,000 bytes" in rejection.detail


def test_content_that_changed_meanwhile_is_never_joined(fetch):
    with odd_server(a=[cut(300_000), other_content]) as server:
        assert fetch(f"{server.url}/a") == b"\0new" * 750


def test_a_part_that_was_not_asked_for_is_never_joined(fetch):
    with odd_server(a=[cut(300_000), wrong_part, whole]) as server:
        assert fetch(f"{server.url}/a") == BODY


def test_a_length_that_is_too_long_is_a_truncation(fetch):
    with odd_server(a=[cut(len(BODY), length=len(BODY) + 7)]) as server:
        rejection, _ = fetch.refused(f"{server.url}/a", attempts=2)
        assert rejection.reason == "fetch-truncated"


def test_a_length_of_many_digits_is_no_length(fetch):
    digits = "9" * 5000
    with odd_server(a=[cut(10, length=digits)]) as server:
        rejection, attempts = fetch.refused(f"{server.url}/a", attempts=2)
        assert (rejection.reason, rejection.retryable, attempts) == ("fetch-bad-length", True, 2)
    rest = status(206, Content_Range=f"bytes 300000-{digits}/{digits}")
    with odd_server(a=[cut(300_000), rest]) as server:
        assert fetch.refused(f"{server.url}/a", attempts=2)[0].reason == "fetch-bad-range"


def test_a_stall_is_a_timeout(fetch):
    with odd_server(a=[stall(1000, 3)]) as server:
        rejection, attempts = fetch.refused(f"{server.url}/a", attempts=2, timeout_seconds=0.3)
        assert (rejection.reason, rejection.retryable, attempts) == ("fetch-timeout", True, 2)


def test_a_drip_meets_the_deadline(fetch):
    with odd_server(a=[drip(0.05)]) as server:
        start = time.monotonic()
        rejection, _ = fetch.refused(f"{server.url}/a", deadline_seconds=0.5)
        assert rejection.reason == "fetch-timeout"
        assert time.monotonic() - start < 4


def test_a_body_beyond_the_limit_is_not_read(fetch):
    with odd_server(a=[cut(10, length=10 << 30)]) as server:
        rejection, attempts = fetch.refused(f"{server.url}/a", max_mib=1)
        assert (rejection.reason, rejection.retryable, attempts) == ("fetch-too-large", False, 1)


def test_redirects_stay_within_the_allowed_hosts(fetch):
    with odd_server(a=[status(302, Location="/b")], b=[whole]) as server:
        assert fetch(f"{server.url}/a") == BODY
    with odd_server(a=[status(302, Location="http://foreign.example/x?Signature=hush")]) as server:
        rejection, _ = fetch.refused(f"{server.url}/a")
        assert rejection.reason == "fetch-redirect-refused"
        assert "foreign.example" in rejection.detail
    with odd_server(a=[status(302, Location="file:///etc/passwd")]) as server:
        assert fetch.refused(f"{server.url}/a")[0].reason == "fetch-redirect-refused"
    with odd_server(a=[status(302, Location="/a")]) as server:
        assert fetch.refused(f"{server.url}/a")[0].reason == "fetch-redirect-loop"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"http://foreign.example/a{SECRET}", "fetch-host-refused"),
        (f"http://127.0.0.1.foreign.example/a{SECRET}", "fetch-host-refused"),
        (f"s3://secret-bucket/a{SECRET}", "fetch-host-refused"),
        ("file:///etc/passwd", "fetch-outside-corpus"),
        ("ftp://127.0.0.1/a", "fetch-bad-url"),
        ("http://user:hush@127.0.0.1/a", "fetch-bad-url"),
        ("http://127.0.0.1:port/a", "fetch-bad-url"),
        ("nonsense", "fetch-bad-url"),
        (None, "no-source"),
    ],
)
def test_what_may_not_be_asked_is_refused(fetch, url, reason):
    assert fetch.refused(url)[0].reason == reason


_PIECES = st.sampled_from([*"aB0-_~é %.?#=&[|\\", "/", "%2f", "%2F", "%zz", "%5C", "..", "/./"])


@settings(max_examples=500)
@given(st.lists(_PIECES, max_size=8).map("".join))
def test_a_target_is_encoded_as_urllib3_encodes_it(rest):
    rest = f"/{rest}"
    assert spell_url(f"http://127.0.0.1{rest}").target == parse_url(f"http://127.0.0.1{rest}").request_uri


_HOSTS = st.sampled_from(
    ["a.cloudfront.net", "A.CloudFront.NET.", "203.0.113.9", "[::1]", "[::ffff:10.0.0.1]", "bücher.cloudfront.net",
     "xn--bcher-kva.cloudfront.net", "2130706433", "0x7f.1", "010.0.0.1", "a..cloudfront.net", "evil.example"]
)  # fmt: skip
_MARKS = st.sampled_from(
    [*"\\/@:?#;%[]\t\n\r \x00.・／", "%5C", "%40", "%2F", "user:hush@", ":80", ":0", ":99999", "//"]
)
_URLS = st.one_of(
    st.tuples(st.sampled_from(["http://", "https://", "HTTP:\\\\", "http:/", "//", "http://user@"]),
              st.lists(st.one_of(_HOSTS, _MARKS), max_size=6).map("".join)).map("".join),
    st.text(max_size=40),
    st.text(max_size=20).map("http://{}".format),
    st.text(max_size=20).map("https://a.cloudfront.net{}".format),
)  # fmt: skip


class _Asked(Exception):
    pass


def host_that_is_asked(url, patterns):
    """(the host that the list of hosts judged, the host that the connection would be opened to), or the refusal."""
    judged, opened = [], []

    class Hosts(AllowedHosts):
        def allows(self, host):
            judged.append(host)
            return super().allows(host)

    source = HttpSource(Hosts(patterns), HostLimits(1, 0, Path()), None, 1, "test")

    def connection_from_host(*place, pools=source.transport._pools.connection_from_host):
        connection = pools(*place)._new_conn()
        opened.append((connection.host, connection.port))
        raise _Asked

    source.transport._pools.connection_from_host = connection_from_host
    limits = Limits(time.monotonic() + 60, 1.0, 1 << 20, 0.0, lambda: False)
    try:
        source.attempt(url, Partial(io.BytesIO(), ByteCounter()), limits)
    except _Asked:
        return judged[-1], opened[-1][0]
    except FetchError as error:
        assert error.reason in ("fetch-bad-url", "fetch-host-refused")
        assert not opened and not ("hush" in str(error) and re.match("https?://u:hush@", url))
        return None
    finally:
        source.transport.close()


@settings(max_examples=500)
@given(_URLS, st.sampled_from([("*.cloudfront.net",), ("*",), ("203.0.113.9", "::1")]))
@example("http://203.0.113.9\\.cloudfront.net/x", ("*.cloudfront.net",))
@example("http://203.0.113.9%5C.cloudfront.net/x", ("*.cloudfront.net",))
@example("http://203.0.113.9\t.cloudfront.net/x", ("*.cloudfront.net",))
@example("http://203.0.113.9\\@a.cloudfront.net/x", ("*.cloudfront.net",))
@example("http://203.0.113.9#@a.cloudfront.net/x", ("*.cloudfront.net",))
@example("http://[::1].cloudfront.net/x", ("*.cloudfront.net",))
def test_the_host_that_is_judged_is_the_host_that_is_asked_for(url, patterns):
    """What urllib3 or http.client make of a URL never matters: they are given the judged host."""
    asked = host_that_is_asked(url, patterns)
    if asked is not None:
        judged, opened = asked
        assert judged == opened and AllowedHosts(patterns).allows(opened)
        assert re.fullmatch(r"[a-z0-9.-]+|[0-9a-f:.]+", opened)


def test_good_hosts_are_asked_for():
    for url, host in (
        ("https://A.CloudFront.net./x", "a.cloudfront.net"),
        ("http://[::1]:8080/x", "::1"),
        ("http://127.0.0.1:080", "127.0.0.1"),
        ("http://xn--bcher-kva.example/?a=@b", "xn--bcher-kva.example"),
    ):
        assert host_that_is_asked(url, ("*",)) == (host, host)


@pytest.mark.parametrize("mark", ["\\", "%5C", "\t", "@", "\\@", "%00"])
def test_a_backslash_reaches_no_host_behind_the_list(fetch, mark):
    """Directly, by a redirect and by a mirror: the server that stands before the mark is never connected to."""
    with odd_server(x=[whole]) as inner:
        odd = f"http://127.0.0.1{mark}.cloudfront.net:{inner.server_address[1]}/x"
        assert fetch.refused(odd, allow_hosts=("*.cloudfront.net",))[0].reason == "fetch-bad-url"
        mirrors = {"https://cdn.example/": odd.removesuffix("x")}
        options = {"allow_hosts": ("*.cloudfront.net",), "mirrors": mirrors}
        assert fetch.refused("https://cdn.example/x", **options)[0].reason == "fetch-bad-url"
        with odd_server(a=[status(302, Location=odd)]) as server:
            own = ("*.cloudfront.net", "localhost")
            url = f"{server.url}/a".replace("127.0.0.1", "localhost")
            assert fetch.refused(url, allow_hosts=own)[0].reason == "fetch-redirect-refused"
        assert inner.num_connections == 0


@pytest.mark.parametrize(
    ("signed", "kept"),
    [
        ("https://a.example/c.mp4?hdnts=exp=1~acl=/*~hmac=hush", "https://a.example/c.mp4"),
        ("https://a.example/c.mp4?id=7&sv=2024-01-01&sr=b&se=2026&sp=r&sig=hush%3D", "https://a.example/c.mp4?id=7"),
        ("https://a.example/c.mp4?token=hush&exp=12", "https://a.example/c.mp4"),
        ("https://a.example/c.mp4?authz=exp=1~hmac=hush&id=7", "https://a.example/c.mp4?id=7"),
        ("https://a.example/c.mp4?t=eyJhbGciOiJI.eyJzdWIiOiIx.hush", "https://a.example/c.mp4"),
        ("https://a.example/v/c.mp4;Signature=hush;Expires=1", "https://a.example/v/c.mp4"),
        ("https://a.example/hdntl=exp=1~hmac=hush/v/c.mp4?id=7", "https://a.example/v/c.mp4?id=7"),
        ("https://a.example/c.mp4#Signature=hush", "https://a.example/c.mp4"),
        ("https://a.example/c.mp4?id=7;%53ignature=hush", "https://a.example/c.mp4?id=7"),
        ("https://a.example/c.mp4?X-Goog-Signature=hush&X-Goog-Date=1", "https://a.example/c.mp4"),
        (
            "https://a.example/token/auth/c.mp4?st=3&policy=x#t=3",
            "https://a.example/token/auth/c.mp4?st=3&policy=x#t=3",
        ),
        ("s3://bucket/token=1/c.mp4", "s3://bucket/token=1/c.mp4"),
        ("https://a.example/c.mp4?access-token=hush&accessToken=hush&Signature[]=hush", "https://a.example/c.mp4"),
        ("https://a.example/c.mp4?X-Plex-Token=hush&signature_v2=hush&id=7", "https://a.example/c.mp4?id=7"),
        ("https://a.example/c.mp4%3FSignature=hush%26Expires=1", "https://a.example/c.mp4%26Expires=1"),
        ("https://a.example/v%3BSignature=hush/c.mp4", "https://a.example/v/c.mp4"),
        ("https://a.example/c.mp4?id=7%26sig%3Dhush", "https://a.example/c.mp4?id=7"),
        ("https://a.example/c.mp4?id=7%2526sig%253Dhush", "https://a.example/c.mp4?id=7"),
        (
            "https://a.example/g?url=https%3A%2F%2Fb%2Fc.mp4%3Fsig%3Dhush",
            "https://a.example/g?url=https%3A%2F%2Fb%2Fc.mp4",
        ),
        ("https://a.example/c.mp4?hdnts%3Dexp%3D1~hmac%3Dhush", "https://a.example/c.mp4"),
        ("https://a.example/c.mp4?md5=hush&expires=1700000000&id=7", "https://a.example/c.mp4?id=7"),
        ("https://a.example/c.mp4?st=hush&e=1700000000", "https://a.example/c.mp4"),
        ("https://a.example/c.mp4?verify=1700000000-hush", "https://a.example/c.mp4"),
        ("https://a.example/c.mp4?st=1&e=5&md5=x&verify=yes", "https://a.example/c.mp4?st=1&e=5&md5=x&verify=yes"),
        ("https://a.example/a%26b=c/c.mp4?q=50%25", "https://a.example/a%26b=c/c.mp4?q=50%25"),
    ],
)
def test_no_signature_of_any_kind_stays(signed, kept):
    assert unsigned(signed) == kept == unsigned(kept)
    assert "hush" not in redact(signed) and "hush" not in cache_name(signed)
    defects = set()
    assert read_url(signed, defects) == kept and (SIGNED_URL in defects) == (signed != kept)


def test_nobody_listening_is_a_connection_error(fetch):
    rejection, attempts = fetch.refused(f"http://127.0.0.1:9/a{SECRET}", attempts=2)
    assert (rejection.reason, rejection.retryable, attempts) == ("fetch-connection", True, 2)


def test_no_secret_is_logged(fetch, caplog):
    logger = logging.getLogger("wan")
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="wan")  # a command line run before may have raised it
    logger.propagate = True
    with odd_server(a=[status(503), cut(10), whole]) as server:
        fetch(f"{server.url}/a{SECRET}")
    assert "fetch-503" in caplog.text  # it is logged,
    ours = "".join(record.getMessage() for record in caplog.records if record.name == "wan")
    assert "hush" not in ours  # without the query


def test_redaction_keeps_host_and_path_only():
    assert redact(f"https://user:pw@host.example:8443/a/b.mp4{SECRET}#f") == "https://host.example:8443/a/b.mp4"
    assert redact("http://[broken") == "(not a URL)"


def test_wildcards_match_whole_labels(fetch):
    rejection, _ = fetch.refused("https://evilcloudfront.net/a", allow_hosts=("*.cloudfront.net",))
    assert rejection.reason == "fetch-host-refused"


def test_a_mirror_replaces_the_prefix(fetch):
    with odd_server(b=[whole]) as server:
        assert fetch("https://cdn.example/clips/b", mirrors={"https://cdn.example/clips/": f"{server.url}/"}) == BODY


def test_the_file_beside_the_json_comes_first(fetch, tmp_path):
    folder = tmp_path / "corpus" / "video"
    folder.mkdir(parents=True)
    (folder / "a.mov").write_bytes(b"beside")
    assert fetch("http://foreign.example/a", location=tmp_path / "corpus") == b"beside"
    assert (folder / "a.mov").exists()


def test_the_file_beside_the_json_is_of_the_records_kind(fetch, tmp_path):
    folder = tmp_path / "corpus" / "video"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"thumbnail")
    with odd_server(a=[whole]) as server:
        assert fetch(f"{server.url}/a", location=tmp_path / "corpus") == BODY
    (folder / "a.MP4").write_bytes(b"beside")
    assert fetch("http://foreign.example/a", location=tmp_path / "corpus") == b"beside"


def test_the_cache_is_shared_and_bounded(fetch, tmp_path):
    cache = tmp_path / "cache"
    with odd_server(a=[whole], b=[whole], c=[whole]) as server:
        one = 1_100_000 / 2**30
        for name in ("a", "a", "b", "a", "c"):
            assert fetch(f"{server.url}/{name}{SECRET}", cache=str(cache), cache_gib=2 * one) == BODY
            time.sleep(0.02)
        assert [path for path, _ in server.requests] == ["/a", "/b", "/c"]
        kept = list(cache.glob("*.clip"))
        assert len(kept) == 2 and sum(path.stat().st_size for path in kept) == 2 * len(BODY)
        assert fetch(f"{server.url}/a{SECRET}", cache=str(cache), cache_gib=2 * one) == BODY  # b went: least recent
        assert len(server.requests) == 3


def test_the_cache_tells_clips_apart_by_their_query_but_not_by_their_signature(fetch, tmp_path):
    cache = str(tmp_path / "cache")
    with odd_server(get=[whole, other_content]) as server:
        assert fetch(f"{server.url}/get?id=1", cache=cache) == BODY
        assert fetch(f"{server.url}/get?id=2", cache=cache) == b"\0new" * 750
        assert fetch(f"{server.url}/get?id=1&X-Amz-Signature=hush&Expires=2#f", cache=cache) == BODY
        assert len(server.requests) == 2
    assert cache_name(f"http://a/b{SECRET}") == cache_name("http://a/b") != cache_name("http://a/b?id=1")
    assert not [path for path in (tmp_path / "cache").rglob("*id=*")]


def test_stopping_interrupts_a_wait(tmp_path):
    stop = threading.Event()
    record = Record(clip_id="a", source="a.json", url="http://127.0.0.1:9/a")
    config = FetchConfig(allow_hosts=("127.0.0.1",), attempts=5)
    stop.set()
    with (
        Fetcher(config, CorpusConfig(location="nowhere"), tmp_path, stop) as fetcher,
        pytest.raises(fetching.TransferStopped),
        fetcher.fetched(record),
    ):
        pass
    assert not list(Path(tmp_path).iterdir())


@pytest.fixture
def proxy(monkeypatch):
    """An HTTP proxy that gives BODY for any URL; it opens no tunnel. What it was asked for is in `asked`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.server.asked.append((self.path, self.headers))
            whole(self)

        def do_CONNECT(self):
            self.server.asked.append((f"CONNECT {self.path}", self.headers))
            self.send_error(502)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name.lower(), raising=False)
            monkeypatch.setenv(name, f"http://user:hush@127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()
        thread.join()


def test_a_proxy_of_the_environment_is_used_and_said(fetch, proxy, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("wan"), "propagate", True)
    caplog.set_level("INFO", logger="wan")
    wild = {"allow_hosts": ("*.cloudfront.net",)}
    assert fetch("http://a.cloudfront.net/x?id=1", user_agent="archive/1.0", **wild) == BODY
    ((path, headers),) = proxy.asked
    assert path == "http://a.cloudfront.net/x?id=1" and headers["Host"] == "a.cloudfront.net"
    assert headers["User-Agent"] == "archive/1.0"
    assert headers["Proxy-Authorization"] == "Basic " + base64.b64encode(b"user:hush").decode()
    assert "is not checked" in caplog.text and "hush" not in caplog.text
    rejection, _ = fetch.refused("https://a.cloudfront.net/x", attempts=1, **wild)
    assert rejection.reason == "fetch-connection" and "its proxy does not answer" in rejection.detail
    assert proxy.asked[1][0] == "CONNECT a.cloudfront.net:443"
    assert fetch.refused("http://evil.example/x", **wild)[0].reason == "fetch-host-refused"
    assert len(proxy.asked) == 2  # the list of hosts holds behind a proxy too


def test_no_proxy_is_honoured(fetch, proxy, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,.internal")
    with odd_server(a=[whole]) as server:
        assert fetch(f"{server.url}/a") == BODY
        assert len(server.requests) == 1 and not proxy.asked


def test_a_proxy_of_a_kind_that_is_not_supported_is_refused(fetch, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1080")
    with pytest.raises(UserError, match="HTTPS_PROXY: a proxy of kind socks5://"):
        fetch("https://a.cloudfront.net/x")


@pytest.mark.parametrize("address", ["http://u:hush@proxy:99999", "http://pro xy:80", "http://[::1", "http://"])
def test_a_proxy_that_is_no_url_is_refused(fetch, monkeypatch, address):
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", address)
    with pytest.raises(UserError, match=r"(?s)HTTP_PROXY: .*expected: http://HOST:PORT") as caught:
        fetch("http://a.cloudfront.net/x")
    assert "hush" not in str(caught.value)


def test_a_proxy_that_wants_another_password_costs_no_clip(fetch, monkeypatch):
    """It is an outage: the clips are waited for, and are no rows for good."""
    with odd_server(x=[status(407), status(407), whole]) as server:
        server.answers = {
            "http://a.cloudfront.net/x": server.answers["/x"],
            "http://a.cloudfront.net/": [status(407), whole],
        }
        monkeypatch.delenv("http_proxy", raising=False)
        monkeypatch.setenv("HTTP_PROXY", server.url)
        monkeypatch.setattr("preprocess.fetch.hosts.FIRST_PAUSE_SECONDS", 0.05)
        assert (
            fetch("http://a.cloudfront.net/x", allow_hosts=("a.cloudfront.net",), attempts=1, outage_minutes=1.0)
            == BODY
        )
        assert fetch.attempts == 1


PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(range(256))


@pytest.mark.parametrize(
    "answer",
    [
        body(b"Not found, sorry"), body(b"[1, 2, 3]"), body(PDF), body(b"PK\x03\x04" + bytes(600)),
        body(b"PK\x05\x06" + bytes(18)), body(b"#EXTM3U\n#EXT-X-KEY:\x00\x01"), body(b"SQLite format 3\x00\x10\x00"),
        body(b"a.mp4" + bytes(252) + b"ustar\x0000" + bytes(248)),
        body("찾을 수 없습니다".encode("euc-kr")), body("찾을 수 없습니다".encode("utf-16")), body(gzip.compress(b"x")),
        body(b"\x00\x01\x02\x03", Content_Type="text/html; charset=utf-8"),
        body(b"\x00\x01\x02\x03", Content_Type="application/problem+json"),
    ],
    ids=[
        "text", "array", "pdf", "zip", "no-zip", "m3u8", "sqlite", "tar", "euc-kr", "utf-16", "gzip", "html-type",
        "json-type",
    ],
)  # fmt: skip
def test_no_document_is_a_clip_or_enters_the_cache(fetch, tmp_path, answer):
    cache = str(tmp_path / "cache")
    with odd_server(a=[answer, whole]) as server:
        rejection, _ = fetch.refused(f"{server.url}/a", attempts=1, cache=cache)
        assert (rejection.reason, rejection.retryable) == ("fetch-not-media", True)
        assert not list((tmp_path / "cache").glob("*.clip"))
        assert fetch(f"{server.url}/a", cache=cache) == BODY


def test_a_clip_under_a_wrong_type_is_a_clip(fetch):
    mp4 = b"\0\0\0\x20ftypisom" + bytes(range(256))
    with odd_server(a=[body(mp4, Content_Type="text/plain")]) as server:
        assert fetch(f"{server.url}/a") == mp4


@pytest.mark.parametrize(("stage", "reason", "keeps"), [
    ("probe", "cannot-open", False), ("decode", "decode-errors", False), ("probe", "too-short", True),
    ("caption", "no-caption", True),
])  # fmt: skip
def test_a_body_that_is_refused_leaves_the_cache_and_is_retryable_once(tmp_path, stage, reason, keeps):
    config = FetchConfig(allow_hosts=("127.0.0.1",), cache=str(tmp_path / "cache"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def refuse(is_retry):
        with pytest.raises(ClipRejected) as refused, fetcher.fetched(record, is_retry=is_retry):
            raise ClipRejected(Rejection(stage, reason, "by a test"))
        return refused.value.rejection.retryable

    with (
        odd_server(a=[whole]) as server,
        Fetcher(config, CorpusConfig(location="nowhere"), scratch, threading.Event()) as fetcher,
    ):
        record = Record(clip_id="a", source="a.json", url=f"{server.url}/a")
        assert refuse(False) is not keeps
        assert bool(list((tmp_path / "cache").glob("*.clip"))) == keeps
        assert refuse(True) is False
        assert len(server.requests) == (1 if keeps else 2)
        with fetcher.fetched(record):
            pass
        assert list((tmp_path / "cache").glob("*.clip"))  # proven: it stays
        refuse(False)
        assert bool(list((tmp_path / "cache").glob("*.clip"))) == keeps  # refused after all: a bad entry heals
