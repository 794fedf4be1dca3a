"""The cache of clips: bounded, least recently used first, safe from other processes and from their sudden deaths."""

import contextlib
import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from cache_hammer import BOUND, KIB, content_of, hammer
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_server import BODY, odd_server, whole
from prep_runs import ROOT

from preprocess.fetch import cache as clip_cache
from preprocess.fetch.cache import ClipCache
from shards.errors import UserError


def gib(num_bytes):
    return num_bytes / 2**30


@pytest.fixture
def put(tmp_path):
    """put(cache, name, size): a downloaded clip of that name, kept and then let go."""

    def run(cache, name, num_bytes=KIB, hold=False):
        path = tmp_path / f"download-{name}"
        path.write_bytes(content_of(name, num_bytes))
        cache.keep(name, path)
        if not hold:
            path.unlink()
        return path

    return run


def got(cache, name, folder, num_bytes=KIB):
    target = folder / "taken"
    if not cache.take(name, target):
        return False
    assert target.read_bytes() == content_of(name, num_bytes)
    target.unlink()
    return True


def bytes_in(folder):
    total = 0
    for path in folder.glob("*.clip"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.fixture(params=["links", "copies"])
def way(request, monkeypatch):
    """With hard links, and on a file system that has none between the folders."""
    if request.param == "copies":

        def no_link(self, target):
            if not Path(target).exists():
                raise FileNotFoundError(errno.ENOENT, "no such file")
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(Path, "hardlink_to", no_link)
    return request.param


@given(
    steps=st.lists(st.tuples(st.sampled_from("kkt"), st.integers(0, 7)), max_size=40),
    sizes=st.lists(st.integers(1, 5 * KIB), min_size=8, max_size=8),
)
@settings(max_examples=60)
def test_the_least_recently_used_go_first(steps, sizes):
    """Against a plain model of the rule: an ordered list, evicted from its old end to 95 % of the bound."""
    bound = 8 * KIB
    clock = iter(range(1, 10_000))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        # File times of one instant would make the order a matter of luck.
        utime = os.utime
        patch.setattr(os, "utime", lambda path: utime(path, ns=(0, next(clock) * 1000)))
        folder, cache = Path(name), ClipCache(Path(name) / "cache", gib(bound))
        model: dict[str, int] = {}
        for step, number in steps:
            clip, size = str(number), sizes[number]
            if step == "t":
                assert got(cache, clip, folder, size) == (clip in model)
                if clip in model:
                    model[clip] = model.pop(clip)
                continue
            path = folder / "download"
            path.write_bytes(content_of(clip, size))
            cache.keep(clip, path)
            path.unlink()
            if clip in model:
                continue
            if sum(model.values()) + size > bound:
                aim = max(0, int(bound * clip_cache.KEPT_SHARE) - size)
                while sum(model.values()) > aim:
                    del model[next(iter(model))]
            model[clip] = size
            assert bytes_in(folder / "cache") == sum(model.values()) <= bound


def test_what_is_in_use_is_never_evicted(put, tmp_path, way):
    cache = ClipCache(tmp_path / "cache", gib(4 * KIB))
    put(cache, "used")
    assert cache.take("used", tmp_path / "mine")
    for number in range(10):
        put(cache, f"other-{number}")
        assert bytes_in(tmp_path / "cache") <= 4 * KIB
    assert (tmp_path / "mine").read_bytes() == content_of("used", KIB)
    assert got(cache, "used", tmp_path) == (way == "links")  # a copy in use needs no entry
    (tmp_path / "mine").unlink()
    for number in range(10):
        put(cache, f"more-{number}")
    assert not got(cache, "used", tmp_path)


def test_when_all_is_in_use_nothing_more_is_kept(put, tmp_path):
    cache = ClipCache(tmp_path / "cache", gib(2 * KIB))
    held = [put(cache, name, hold=True) for name in ("a", "b", "c")]
    assert bytes_in(tmp_path / "cache") == 2 * KIB
    assert not got(cache, "c", tmp_path)
    for path in held:
        path.unlink()
    put(cache, "c")
    assert got(cache, "c", tmp_path)


def test_a_clip_above_the_bound_costs_no_other(put, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(clip_cache.LOG, "propagate", True)
    monkeypatch.setattr(clip_cache.LOG, "handlers", [])  # other tests set the one logger up
    caplog.set_level("WARNING", logger=clip_cache.LOG.name)
    cache = ClipCache(tmp_path / "cache", gib(4 * KIB))
    put(cache, "a")
    for name in ("giant", "giant too"):
        put(cache, name, 5 * KIB)
        assert not got(cache, name, tmp_path, 5 * KIB)
    assert got(cache, "a", tmp_path)
    assert caplog.text.count("above fetch.cache_gib") == 1


def test_a_smaller_bound_holds_from_the_start(put, tmp_path):
    cache = ClipCache(tmp_path / "cache", gib(10 * KIB))
    for number in range(8):
        put(cache, str(number))
    ClipCache(tmp_path / "cache", gib(4 * KIB))
    assert 0 < bytes_in(tmp_path / "cache") <= 4 * KIB


@pytest.mark.parametrize("total", [b"", b"-5", b"nonsense", b"\xff\xfe", b"9" * 40, None])
def test_a_count_that_cannot_be_read_is_counted_anew(put, tmp_path, total):
    cache = ClipCache(tmp_path / "cache", gib(4 * KIB))
    put(cache, "a")
    place = tmp_path / "cache/total"
    place.unlink() if total is None else place.write_bytes(total)
    for number in range(6):
        put(cache, str(number))
        assert bytes_in(tmp_path / "cache") <= 4 * KIB


def test_a_full_disk_keeps_nothing_and_says_so_once(put, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(clip_cache.LOG, "propagate", True)
    monkeypatch.setattr(clip_cache.LOG, "handlers", [])  # other tests set the one logger up
    caplog.set_level("WARNING", logger=clip_cache.LOG.name)
    cache = ClipCache(tmp_path / "cache", gib(4 * KIB))

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(clip_cache, "_sync", full)
    for name in ("a", "b"):
        put(cache, name)
        assert not got(cache, name, tmp_path)
    assert caplog.text.count("no space left") == 1


def test_a_folder_that_cannot_be_is_the_users(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"fetch\.cache"):
        ClipCache(tmp_path / "file", 1.0)


def test_a_dead_process_copy_is_swept_and_a_living_one_is_not(tmp_path, monkeypatch):
    import fcntl

    folder = tmp_path / "cache"
    ClipCache(folder, 1.0)
    (folder / "tmp-dead").write_bytes(b"half")
    living = (folder / "tmp-living").open("wb")
    fcntl.flock(living, fcntl.LOCK_EX)
    ClipCache(folder, 1.0)
    assert not (folder / "tmp-dead").exists() and (folder / "tmp-living").exists()
    living.close()


@pytest.mark.parametrize("copies", [False, True], ids=["links", "copies"])
def test_processes_share_it_and_die_in_it(tmp_path, copies):
    """Three at work, each killed now and then at any instant: no wrong byte, the bound holds throughout."""
    folder, scratch = tmp_path / "cache", tmp_path / "scratch"
    scratch.mkdir()
    context = multiprocessing.get_context("spawn")  # a fork of pytest, which has threads, might hang
    draw = random.Random(5)

    def start(seed):
        process = context.Process(target=hammer, args=(folder, scratch, seed, copies))
        process.start()
        while not (scratch / f"at-work-{seed}").exists():
            assert process.exitcode is None
            time.sleep(0.005)
        return process

    steady = [start(seed) for seed in (0, 1)]
    for number in range(8):
        victim = start(100 + number)
        time.sleep(draw.uniform(0.05, 0.25))
        assert bytes_in(folder) <= BOUND
        assert victim.exitcode is None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    (scratch / "end").touch()
    for process in steady:
        process.join()
        assert process.exitcode == 0
    shutil.rmtree(scratch)
    ClipCache(folder, gib(BOUND))
    assert not list(folder.glob("tmp-*"))
    assert bytes_in(folder) <= BOUND
    for path in folder.glob("*.clip"):
        assert any(
            path.name == f"{hashlib.sha256(str(number).encode()).hexdigest()}.clip"
            and path.read_bytes() == content_of(str(number), (number % 8 + 1) * KIB)
            for number in range(40)
        )


def test_two_runs_at_once_download_a_clip_from_the_cache_of_the_other(tmp_path):
    """Whole fetchers in two processes over one cache: every byte right, at most a download each."""
    script = """
import sys, threading
from pathlib import Path
from preprocess.config import CorpusConfig, FetchConfig
from preprocess.fetch.fetcher import Fetcher
from preprocess.corpus.records import Record
url, cache, scratch = sys.argv[1:]
config = FetchConfig(allow_hosts=("127.0.0.1",), cache=cache, cache_gib=0.01)
with Fetcher(config, CorpusConfig(location="x"), Path(scratch), threading.Event()) as fetcher:
    for number in [*range(6), *range(6)]:
        with fetcher.fetched(Record(clip_id="a", source="a", url=f"{url}/{number}?Signature=x{scratch}")) as clip:
            assert clip.path.read_bytes() == bytes(range(256)) * 4000
    assert fetcher.counts.num_cached >= 6, fetcher.counts
"""
    scratches = [tmp_path / "one", tmp_path / "two"]
    with odd_server(**{str(number): [whole] for number in range(6)}) as server:
        runs = []
        for scratch in scratches:
            scratch.mkdir()
            command = [sys.executable, "-c", script, server.url, str(tmp_path / "cache"), str(scratch)]
            runs.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        for run in runs:
            _, said = run.communicate(timeout=100)
            assert run.returncode == 0, said
        assert 6 <= len(server.requests) <= 12
    assert bytes_in(tmp_path / "cache") == 6 * len(BODY)
    assert not [path for scratch in scratches for path in scratch.iterdir()]
