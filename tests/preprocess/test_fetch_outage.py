"""A host that goes away is waited for: no attempt counts, no row is written, nothing is lost."""

import json
import threading
import time
from collections import defaultdict

import pytest
from fetch_runs import FetchRun
from odd_server import BODY, body, odd_server, status, whole
from outages import outage_server
from prep_runs import TINY, files_of, prep

from preprocess.config import CorpusConfig, FetchConfig
from preprocess.corpus.records import Record
from preprocess.demo.corpus import BASE_URL
from preprocess.fetch import fetcher as fetching
from preprocess.fetch import hosts as hosts_module
from preprocess.fetch.fetcher import Fetcher
from preprocess.pipeline import build_shards
from preprocess.rejection import ClipRejected
from shards.errors import TemporaryFailure


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(fetching, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(hosts_module, "FIRST_PAUSE_SECONDS", 0.05)


@pytest.fixture
def fetch(tmp_path):
    return FetchRun(tmp_path / "scratch")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    for name in ("a", "b"):
        (tmp_path / "files" / name).write_bytes(BODY)
    return tmp_path / "files"


@pytest.fixture
def fast_clock(monkeypatch):
    """An hour in four seconds, for the waits of a host."""

    class Clock:
        start = time.monotonic()

        def monotonic(self):
            return self.start + (time.monotonic() - self.start) * 900

    monkeypatch.setattr(hosts_module, "time", Clock())


@pytest.mark.parametrize("kind", ["reset", "503", "page"])
def test_an_outage_costs_no_attempt(fetch, folder, kind, caplog, monkeypatch):
    monkeypatch.setattr(hosts_module.LOG, "propagate", True)
    caplog.set_level("INFO", logger="wan")
    with outage_server(folder) as server:
        server.down_after, server.down_as = 1, kind
        timer = threading.Timer(1.5, lambda: setattr(server, "down", ""))
        threading.Thread(target=lambda: server.went_down.wait(20) and timer.start()).start()
        assert fetch(f"{server.url}a", f"{server.url}b", attempts=1, outage_minutes=1.0) == BODY
        assert fetch.attempts == 1 and fetch.counts.num_downloaded == 2
        assert 3 < server.num_refused < 40  # asked now and then, not hammered
    assert "127.0.0.1 does not answer" in caplog.text and "127.0.0.1 answers again after" in caplog.text


def test_a_host_that_never_answered_is_waited_for_too(fetch):
    with odd_server(**{"": [status(503)] * 3 + [status(404)], "a": [status(503)] * 2 + [whole]}) as server:
        assert fetch(f"{server.url}/a", attempts=1, outage_minutes=1.0) == BODY
        assert [path for path, _ in server.requests].count("/") >= 3


def test_a_clip_that_alone_fails_is_a_row_and_stops_nobody(fetch):
    """Its host answers for other clips: after one attempt more it is refused."""
    with odd_server(bad=[status(503)], good=[whole]) as server:
        rejection, _ = fetch.refused(f"{server.url}/good", f"{server.url}/bad", attempts=2, outage_minutes=60.0)
        assert rejection.reason == "fetch-503" and rejection.retryable
        assert [path for path, _ in server.requests] == ["/good", "/bad", "/bad", "/good", "/bad"]


def test_a_page_for_every_name_before_any_clip_came_is_an_outage(fetch, folder):
    """No clip of the host is known to be good: that it has a page for any name tells an outage from a missing clip."""
    with outage_server(folder) as server:
        server.down = "page"
        threading.Timer(1.0, lambda: setattr(server, "down", "")).start()
        assert fetch(f"{server.url}a", attempts=1, outage_minutes=1.0) == BODY
        assert server.num_refused > 3


def test_a_host_that_has_a_page_for_every_missing_clip_is_not_waited_for(tmp_path):
    """Another clip that is wanted at the time comes: the first one is missing, and the host answers."""
    page = body(b"<!doctype html>nothing here")
    go, good, rows = threading.Event(), [], []

    def missing(handler):
        go.set()
        page(handler)

    def late(handler):
        time.sleep(0.3)  # not yet known to be good when the other clip fails
        whole(handler)

    with odd_server(missing=[missing], good=[late]) as server:
        server.answers = defaultdict(lambda: [page], server.answers)
        config = FetchConfig(allow_hosts=("127.0.0.1",), attempts=1, outage_minutes=60.0)
        with Fetcher(config, CorpusConfig(location="nowhere"), tmp_path, threading.Event()) as fetcher:

            def fetch_good():
                go.wait(20)
                with fetcher.fetched(Record(clip_id="b", source="b.json", url=f"{server.url}/good")) as clip:
                    good.append(clip.path.read_bytes())

            thread = threading.Thread(target=fetch_good)
            thread.start()
            start = time.monotonic()
            try:
                with fetcher.fetched(Record(clip_id="a", source="a.json", url=f"{server.url}/missing")):
                    pass
            except ClipRejected as rejected:
                rows.append(rejected.rejection.reason)
            thread.join()
    assert rows == ["fetch-not-media"] and good == [BODY] and time.monotonic() - start < 10


def test_a_cdn_that_still_has_what_came_before_costs_few_rows(tmp_path):
    """Its origin is down and the clip that came before still comes: after eight rows it is waited for all the same."""
    down, rows = threading.Event(), []
    names = [f"clip-{number}" for number in range(12)]

    def cached_or_503(handler):
        (status(503) if down.is_set() else whole)(handler)

    with odd_server(first=[whole], **{name: [cached_or_503] for name in names}) as server:
        config = FetchConfig(allow_hosts=("127.0.0.1",), attempts=1, outage_minutes=60.0)
        with Fetcher(config, CorpusConfig(location="nowhere"), tmp_path, threading.Event()) as fetcher:
            for name in ["first", *names]:
                if len(rows) == 8:
                    threading.Timer(1.0, down.clear).start()
                try:
                    url = f"{server.url}/{name}"
                    with fetcher.fetched(Record(clip_id=name, source="a.json", url=url)) as clip:
                        assert clip.path.read_bytes() == BODY
                except ClipRejected as rejected:
                    rows.append(rejected.rejection)
                down.set() if name == "first" else None
    assert [row.reason for row in rows] == ["fetch-503"] * 8 and all(row.retryable for row in rows)


def test_an_outage_of_empty_bodies_is_waited_out(fetch):
    empty = status(200)
    with odd_server(a=[whole], b=[empty, whole]) as server:
        server.answers["/a"] = [whole, empty, empty, whole]
        assert fetch(f"{server.url}/a", f"{server.url}/b", attempts=1, outage_minutes=1.0) == BODY
        assert [path for path, _ in server.requests] == ["/a", "/b", "/a", "/a", "/a", "/b"]


@pytest.mark.usefixtures("fast_clock")
def test_after_an_hour_the_build_stops_with_75(fetch, folder):
    with outage_server(folder) as server:
        server.down = "503"
        start = time.monotonic()
        with pytest.raises(
            TemporaryFailure, match=r"127\.0\.0\.1 has not answered since .*60 min.*fetch-503"
        ) as stopped:
            fetch(f"{server.url}a", outage_minutes=FetchConfig().outage_minutes)
        assert 3.5 < time.monotonic() - start < 15
        assert stopped.value.exit_code == 75 and "resumes at the last unit" in str(stopped.value)


@pytest.mark.usefixtures("fast_clock")
def test_an_outage_of_fifty_minutes_is_waited_out(fetch, folder):
    with outage_server(folder) as server:
        server.down = "reset"
        threading.Timer(50 * 60 / 900, lambda: setattr(server, "down", "")).start()
        assert fetch(f"{server.url}a", outage_minutes=60.0) == BODY


def build_through(corpus, output, kind, seconds, watch=lambda: None, down_after=2):
    """A build during which the host is down for so long, after so many files; what `watch` gave meanwhile."""
    seen = []
    with outage_server(corpus) as server:
        server.down_after, server.down_as = down_after, kind

        def come_back():
            if server.went_down.wait(200):
                time.sleep(seconds)
                seen.append(watch())
                server.down = ""

        thread = threading.Thread(target=come_back)
        thread.start()
        fetch = {"attempts": 1, "outage_minutes": 10.0, "mirrors": {BASE_URL: server.url}}
        counts = build_shards(prep(corpus, output, fetch=fetch, **TINY), quiet=True)
        thread.join()
        assert server.num_refused > 0
    return counts, seen


def undisturbed(corpus, output):
    with outage_server(corpus) as server:
        fetch = {"attempts": 1, "mirrors": {BASE_URL: server.url}}
        return build_shards(prep(corpus, output, fetch=fetch, **TINY), quiet=True)


def same_tars(one, other):
    tars = files_of(one, "**/*.tar")
    assert tars == files_of(other, "**/*.tar") and len(tars) > 3


def test_a_build_through_an_outage_gives_the_same_tars(demo_corpus, tmp_path):
    def notes():
        return [json.loads(path.read_text()) for path in (tmp_path / "one").rglob("outage-*.json")]

    counts, (seen,) = build_through(demo_corpus, tmp_path / "one", "503", 2.0, notes)
    assert counts["rejected_by"] == undisturbed(demo_corpus, tmp_path / "two")["rejected_by"]
    assert seen and seen[0]["host"] == "127.0.0.1" and seen[0]["reason"] == "fetch-503"
    assert not list((tmp_path / "one").rglob("outage-*.json"))
    same_tars(tmp_path / "one", tmp_path / "two")


def test_an_outage_of_pages_that_begins_with_the_build(demo_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts_module, "MAX_PAUSE_SECONDS", 0.2)
    counts, _ = build_through(demo_corpus, tmp_path / "one", "page", 1.0, down_after=0)
    assert counts["rejected_by"] == undisturbed(demo_corpus, tmp_path / "two")["rejected_by"]
    same_tars(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["reset", "page"])
def test_a_minute_of_outage_in_a_build(demo_corpus, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(hosts_module, "MAX_PAUSE_SECONDS", 5.0)
    counts, _ = build_through(demo_corpus, tmp_path / "one", kind, 60.0)
    assert counts["rejected_by"] == undisturbed(demo_corpus, tmp_path / "two")["rejected_by"]
    same_tars(tmp_path / "one", tmp_path / "two")


@pytest.mark.usefixtures("fast_clock")
def test_a_build_that_gives_up_loses_nothing(demo_corpus, tmp_path):
    with outage_server(demo_corpus) as server:
        server.down_after = 2
        fetch = {"attempts": 1, "mirrors": {BASE_URL: server.url}}
        with pytest.raises(TemporaryFailure):
            build_shards(prep(demo_corpus, tmp_path / "one", fetch=fetch, **TINY), quiet=True)
        server.down = ""
        counts = build_shards(prep(demo_corpus, tmp_path / "one", fetch=fetch, **TINY), quiet=True)
    assert counts["rejected_by"] == undisturbed(demo_corpus, tmp_path / "two")["rejected_by"]
    same_tars(tmp_path / "one", tmp_path / "two")
