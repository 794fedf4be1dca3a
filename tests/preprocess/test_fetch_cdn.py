"""A CDN that misbehaves: each way ends as designed, within its time, and leaves nothing behind."""

import datetime
import email.utils
import gc
import gzip
import ipaddress
import ssl
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from fetch_runs import FetchRun
from odd_server import (
    BODY,
    body,
    changed_part,
    chunked,
    claims,
    cut,
    drip,
    drip_head,
    endless,
    odd_server,
    reset,
    silent,
    stall,
    status,
    until_close,
    whole,
    whole_whatever_is_asked,
)

from preprocess.config import CorpusConfig, FetchConfig
from preprocess.corpus.records import Record
from preprocess.fetch import fetcher as fetching
from preprocess.fetch.fetcher import Fetcher
from preprocess.fetch.hosts import AllowedHosts
from preprocess.fetch.transfer import FetchError, TransferStopped

SECRET = "?Expires=1&Signature=hush-hush&Key-Pair-Id=K"
GZIPPED = gzip.compress(BODY)
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html><title>Sorry</title>" + b" " * 2000


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(fetching, "BACKOFF_SECONDS", 0.01)


def moved(location):
    return status(302, Location=location)


@pytest.fixture
def fetch(tmp_path):
    return FetchRun(tmp_path / "scratch")


ONCE, THRICE = 1, 3  # attempts that are made: one where another cannot help
QUICK = {"timeout_seconds": 0.3}
SMALL = {"max_mib": 8, "min_kib_per_second": 0}
ENDS = {
    "429 without an end": ([status(429)], {}, "fetch-429", THRICE),
    "429, back in an hour": ([status(429, Retry_After="3600")], {}, "fetch-429", ONCE),
    "503, back in a century": ([status(503, Retry_After="9" * 400)], {}, "fetch-503", ONCE),
    "503 burst": ([status(503)], {}, "fetch-503", THRICE),
    "reset within the body": ([reset(50_000)], {}, "fetch-truncated", THRICE),
    "closed before the head": ([silent(0)], {}, "fetch-connection", THRICE),
    "not a byte of a head": ([silent(3)], QUICK, "fetch-timeout", THRICE),
    "a head that drips": ([drip_head(0.05)], {"deadline_seconds": 1.0}, "fetch-timeout", ONCE),
    "a body that stalls": ([stall(5000, 3)], QUICK, "fetch-timeout", THRICE),
    "a body that drips": ([drip(0.05)], QUICK, "fetch-too-slow", THRICE),
    "a drip that may": ([drip(0.05)], {"min_kib_per_second": 0, "deadline_seconds": 1.0}, "fetch-timeout", ONCE),
    "cut short of its length": ([cut(1000)], {}, "fetch-truncated", THRICE),
    "cut between its chunks": ([chunked(300_000, end=b"")], {}, "fetch-truncated", THRICE),
    "chunks that are none": ([chunked(300_000, end=b"zz\r\n\r\n")], {}, "fetch-truncated", THRICE),
    "an end that nothing tells": ([until_close(len(BODY))], {}, "fetch-no-length", THRICE),
    "a length beyond its body": ([claims(len(BODY) + 9)], QUICK, "fetch-timeout", THRICE),
    "two lengths": ([claims("1024000, 13")], {}, "fetch-bad-length", THRICE),
    "a negative length": ([claims(-5)], {}, "fetch-bad-length", THRICE),
    "an empty body": ([body(b"")], {}, "fetch-empty", THRICE),
    "an error page with 200": ([body(PAGE)], {}, "fetch-not-media", THRICE),
    "JSON with 200": ([body(b'{"error": "hush"}')], {}, "fetch-not-media", THRICE),
    "a page in chunks": ([chunked(0, end=b"5\r\n<html\r\n0\r\n\r\n")], {}, "fetch-not-media", THRICE),
    "gzip that nobody asked for": ([body(GZIPPED, Content_Encoding="gzip")], {}, "fetch-encoded", THRICE),
    "10 GB by its length": ([cut(10, length=10 << 30)], SMALL, "fetch-too-large", ONCE),
    "10 GB in truth": ([endless], SMALL, "fetch-too-large", ONCE),
    "to a foreign host": ([moved("http://foreign.example/?Signature=hush")], {}, "fetch-redirect-refused", ONCE),
    "to a file": ([moved("file:///etc/passwd")], {}, "fetch-redirect-refused", ONCE),
    "to a bucket": ([moved("s3://clips/a?X-Amz-Signature=hush")], {}, "fetch-redirect-refused", ONCE),
    "to a password": ([moved("http://u:hush@127.0.0.1/")], {}, "fetch-redirect-refused", ONCE),
    "to no URL": ([moved("http://[hush")], {}, "fetch-redirect-refused", ONCE),
    "to itself": ([moved("/a?Signature=hush")], {}, "fetch-redirect-loop", ONCE),
    "416 for ever": ([cut(5000), status(416)], {}, "fetch-truncated", THRICE),
}


@pytest.mark.parametrize("name", ENDS)
def test_each_misbehaviour_ends_as_designed(fetch, name):
    answers, settings, reason, attempts = ENDS[name]
    with odd_server(a=answers) as server:
        start = time.monotonic()
        rejection, made = fetch.refused(f"{server.url}/a{SECRET}", attempts=3, **settings)
        assert time.monotonic() - start < 8
        assert (rejection.reason, made) == (reason, attempts)
        assert rejection.retryable == (reason != "fetch-too-large")
        assert fetch.counts.num_again == attempts - 1


@pytest.mark.parametrize("name", ["two lengths", "a negative length", "gzip that nobody asked for"])
def test_a_refused_head_leaves_no_socket_open(fetch, name):
    """Not even one for the garbage collector, which would close it at any later time, with a warning."""
    with odd_server(a=ENDS[name][0]) as server:
        gc.collect()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fetch.refused(f"{server.url}/a", attempts=2)
            gc.collect()
        assert not told


GOOD_ENDS = [
    ("a 503 burst that ends", [status(503), status(503), whole], 3, None),
    ("a reset, then the rest", [reset(300_000), whole], 2, "bytes="),
    ("a stall, then the rest", [stall(300_000, 2), whole], 2, "bytes=300000-"),
    ("chunks", [chunked()], 1, None),
    ("chunks beside a length", [chunked(Content_Length="12")], 1, None),
    ("cut between chunks, then the rest", [chunked(300_000, end=b""), whole], 2, "bytes=300000-"),
    ("no ranges known", [cut(300_000), whole_whatever_is_asked], 2, "bytes=300000-"),
    ("416, then the whole", [cut(300_000), status(416), whole], 3, None),
    ("a part of other content", [cut(300_000), changed_part, whole], 3, None),
    ("an error page, then the clip", [body(PAGE), whole], 2, None),
    ("gzip, then as asked", [body(GZIPPED, Content_Encoding="gzip"), whole], 2, None),
]


@pytest.mark.parametrize(
    ("answers", "attempts", "last_range"), [pytest.param(*each[1:], id=each[0]) for each in GOOD_ENDS]
)
def test_what_recovers_is_whole_to_the_byte(fetch, answers, attempts, last_range):
    with odd_server(a=answers) as server:
        assert fetch(f"{server.url}/a{SECRET}", timeout_seconds=1.0) == BODY
        assert fetch.attempts == attempts == len(server.requests)
        asked = server.requests[-1][1].get("Range")
        assert asked is None if last_range is None else asked.startswith(last_range)


def test_ten_gigabytes_are_not_read_to_their_end(fetch):
    with odd_server(a=[endless]) as server:
        fetch.refused(f"{server.url}/a", max_mib=8)
        assert 8 << 20 < fetch.counts.num_bytes < 10 << 20
        assert server.num_sent < 64 << 20


def test_a_body_longer_than_its_length_spoils_no_other_clip(fetch):
    with odd_server(a=[claims(len(BODY) - 5000)], b=[whole]) as server:
        assert fetch(f"{server.url}/a", f"{server.url}/b") == BODY


def test_connections_are_kept_and_counted(fetch):
    with odd_server(a=[whole], b=[status(302, Location="/a")], c=[status(503), chunked()], d=[status(404)]) as server:
        fetch(*[f"{server.url}/{name}" for name in "abcabc"])
        fetch.refused(f"{server.url}/a", f"{server.url}/d")
        assert len(server.requests) == 11
        assert server.num_connections == 2  # one a Fetcher: redirects and refusals keep theirs too
        assert fetch.counts.num_connections == 1
    with odd_server(a=[cut(1000), whole]) as server:
        fetch(f"{server.url}/a")
        assert server.num_connections == fetch.counts.num_connections == 2


def run_together(tmp_path, urls, workers, **config):
    options = {"allow_hosts": ("127.0.0.1", "localhost"), "deadline_seconds": 30.0, **config}
    stop = threading.Event()

    def one(url):
        with fetcher.fetched(Record(clip_id="a", source="a.json", url=url)) as clip:
            return clip.path.read_bytes() == BODY

    with (
        Fetcher(FetchConfig(**options), CorpusConfig(location="nowhere"), tmp_path, stop, workers) as fetcher,
        ThreadPoolExecutor(workers) as pool,
    ):
        assert all(pool.map(one, urls))
        return fetcher.counts


def slowly(handler):
    time.sleep(0.03)
    whole(handler)


def test_a_host_is_asked_by_so_many_at_a_time(tmp_path):
    with odd_server(a=[slowly]) as server:
        counts = run_together(tmp_path, [f"{server.url}/a"] * 24, 8, per_host=3)
        assert server.most_busy == 3
        assert server.num_connections == counts.num_connections <= 8
        assert counts.num_downloaded == 24 and counts.num_bytes == 24 * len(BODY)
    with odd_server(a=[slowly]) as server:
        elsewhere = server.url.replace("127.0.0.1", "localhost")
        run_together(tmp_path, [f"{server.url}/a", f"{elsewhere}/a"] * 12, 8, per_host=3)
        assert 3 < server.most_busy <= 6  # so many each


def test_a_pause_that_a_host_asks_for_holds_for_all(tmp_path):
    asked_at = {}
    told = threading.Event()

    def busy(handler):
        status(429, Retry_After="1")(handler)
        asked_at["busy"] = time.monotonic()
        told.set()

    def other(handler):
        asked_at["other"] = time.monotonic()
        whole(handler)

    config = FetchConfig(allow_hosts=("127.0.0.1",))

    def one(name):
        with fetcher.fetched(Record(clip_id="a", source="a.json", url=f"{server.url}/{name}")) as clip:
            return clip.attempts

    with (
        odd_server(a=[busy, whole], b=[other]) as server,
        Fetcher(config, CorpusConfig(location="x"), tmp_path, threading.Event(), 2) as fetcher,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(one, "a")
        assert told.wait(5)
        time.sleep(0.1)  # for the answer to arrive
        assert one("b") == 1 and first.result() == 2
    assert asked_at["other"] - asked_at["busy"] > 0.9


def test_retry_after_as_a_date(fetch):
    when = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2), usegmt=True)
    with odd_server(a=[status(503, Retry_After=when), whole]) as server:
        start = time.monotonic()
        assert fetch(f"{server.url}/a") == BODY
        assert 0.9 < time.monotonic() - start < 5
    with odd_server(a=[status(503, Retry_After="soon"), status(503, Retry_After="Mon, 99 Foo"), whole]) as server:
        assert fetch(f"{server.url}/a") == BODY


def test_a_stop_ends_a_silence_at_once(tmp_path):
    for answers in ([silent(20)], [stall(5000, 20)], [drip_head(0.5)], [status(429, Retry_After="15")]):
        stop = threading.Event()
        config = FetchConfig(allow_hosts=("127.0.0.1",), timeout_seconds=30)
        with odd_server(a=answers) as server, Fetcher(config, CorpusConfig(location="x"), tmp_path, stop) as fetcher:
            threading.Timer(0.3, stop.set).start()
            start = time.monotonic()
            with (
                pytest.raises(TransferStopped),
                fetcher.fetched(Record(clip_id="a", source="a.json", url=f"{server.url}/a")),
            ):
                pass
            assert time.monotonic() - start < 3
        assert not list(tmp_path.iterdir())


def test_a_wildcard_reaches_no_private_address(fetch):
    with odd_server(a=[whole]) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        rejection, attempts = fetch.refused(f"{url}/a", allow_hosts=("*host",))
        assert (rejection.reason, rejection.retryable, attempts) == ("fetch-address-refused", True, 1)
        assert not server.requests  # connected, and not a byte asked
        assert fetch(f"{url}/a", allow_hosts=("*host", "localhost")) == BODY


@pytest.mark.parametrize(
    ("patterns", "host", "address", "fits"),
    [
        (["*.example"], "a.example", "93.184.216.34", True),
        (["*.example"], "a.example", "10.1.2.3", False),
        (["*.example"], "a.example", "::1", False),
        (["*.example"], "a.example", "::ffff:192.168.0.1", False),
        (["*.example"], "a.example", "fd00:ec2::254", False),
        (["a.example"], "A.example.", "10.1.2.3", True),
        (["a.example"], "a.example", "169.254.169.254", False),
        (["169.254.169.254"], "169.254.169.254", "169.254.169.254", False),
        (["a.example"], "a.example", "fe80::1%eth0", False),
        (["a.example"], "a.example", "fd00:ec2::254", False),
        (["a.example"], "a.example", "100.100.100.200", False),
        (["a.example"], "a.example", "64:ff9b::a9fe:a9fe", False),
        (["*.example"], "a.example", "64:ff9b::10.1.2.3", False),
        (["*.example"], "a.example", "2002:a01:203::1", False),
        (["*.example"], "a.example", "64:ff9b::93.184.216.34", True),
        (["*.example"], "a.example", "2606:2800:220:1::1", True),
    ],
)
def test_which_addresses_may_be_asked(patterns, host, address, fits):
    hosts = AllowedHosts(patterns)
    if fits:
        hosts.check_address(host, address)
    else:
        with pytest.raises(FetchError, match="fetch-address-refused"):
            hosts.check_address(host, address)


@pytest.fixture
def tls(tmp_path, monkeypatch):
    """A server's context for 127.0.0.1, whose certificate this process trusts."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = tmp_path / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    return context


def over_tls(server):
    return server.url.replace("http:", "https:")


def test_tls_is_checked_and_never_left(fetch, tls, monkeypatch):
    with odd_server(a=[whole]) as plain, odd_server(tls, a=[whole, cut(300_000), whole]) as server:
        server.answers["/b"] = [status(302, Location=f"{plain.url}/a?Signature=hush")]
        assert fetch(*[f"{over_tls(server)}/a"] * 2) == BODY  # a cut one too
        assert server.num_connections == fetch.counts.num_connections == 2
        rejection, _ = fetch.refused(f"{over_tls(server)}/b")
        assert rejection.reason == "fetch-redirect-refused" and "https down to http" in rejection.detail
        assert not plain.requests
        monkeypatch.delenv("SSL_CERT_FILE")
        rejection, attempts = fetch.refused(f"{over_tls(server)}/a{SECRET}")
        assert (rejection.reason, rejection.retryable, attempts) == ("fetch-tls", True, 1)


def test_the_watchdog_ends_a_drip_over_tls(fetch, tls):
    with odd_server(tls, a=[drip_head(0.1)], b=[stall(5000, 5)]) as server:
        for name in "ab":
            start = time.monotonic()
            rejection, _ = fetch.refused(f"{over_tls(server)}/{name}", deadline_seconds=0.6)
            assert rejection.reason == "fetch-timeout"
            assert time.monotonic() - start < 3


def test_the_counts_can_be_read_while_it_runs(tmp_path):
    config = FetchConfig(allow_hosts=("127.0.0.1",))
    with (
        odd_server(a=[stall(300_000, 0.6), whole]) as server,
        Fetcher(config, CorpusConfig(location="x"), tmp_path, threading.Event()) as fetcher,
        ThreadPoolExecutor(1) as pool,
    ):
        fetched = fetcher.fetched(Record(clip_id="a", source="a.json", url=f"{server.url}/a"))
        entered = pool.submit(fetched.__enter__)
        time.sleep(0.4)
        assert fetcher.counts.num_bytes == 300_000 and not entered.done()
        assert entered.result().attempts == 2
        assert fetcher.counts.num_bytes == len(BODY)
        fetched.__exit__(None, None, None)
