"""One open dataset in many hands: threads, forks, pickles, spawned processes; and writing that refuses bad samples."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from shards_data import IDENTITY, PROVENANCE, write_dataset

from shards.errors import UserError
from shards.format.arrays import array_facts, encode_array
from shards.format.commit import is_committed, read_commit
from shards.format.keys import sample_key
from shards.format.ledger import read_ledger, write_ledger
from shards.format.sealed_json import canonical_json
from shards.read.dataset import Dataset, open_dataset
from shards.storage import open_storage
from shards.write.shard_writer import ShardWriter


def digest(dataset: Dataset, place: int) -> str:
    """One digest of a sample's latent and text, for a worker process."""
    found = hashlib.sha256(dataset.latent(place).tobytes())
    found.update(dataset.text(place).tobytes())
    return found.hexdigest()


def test_threads_share_a_dataset(tiny_shards: Path) -> None:
    dataset = open_dataset(tiny_shards)
    expected = [digest(open_dataset(tiny_shards), place) for place in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: digest(dataset, n % 24), range(480))) == expected * 20


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_share_a_dataset(tiny_shards: Path, method: str) -> None:
    dataset = open_dataset(tiny_shards)
    expected = [digest(dataset, place) for place in range(24)]  # files are open before the fork
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, context) as pool:
        assert list(pool.map(digest, [dataset] * 24, range(24))) == expected


def test_a_fork_while_another_thread_reads_does_not_hang(tiny_shards: Path) -> None:
    dataset = open_dataset(tiny_shards)
    storage = dataset.storage(dataset.shard(0))
    expected = digest(dataset, 0)
    with storage._lock:  # type: ignore[attr-defined] # as a thread does that opens a file at this instant
        child = os.fork()
        if child == 0:
            os._exit(0 if digest(dataset, 0) == expected else 3)
    waiter = threading.Timer(20, os.kill, (child, 9))
    waiter.start()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    waiter.cancel()


def test_a_pickle_holds_no_files(tiny_shards: Path) -> None:
    dataset = open_dataset(tiny_shards)
    dataset.latent(0)
    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own
    assert np.array_equal(again.latent(5), dataset.latent(5))
    assert again.revision == dataset.revision


def test_what_is_not_there_is_named(tiny_shards: Path) -> None:
    dataset = open_dataset(tiny_shards)
    for ask, named in (
        (lambda: dataset.latent("nope"), "nope"),
        (lambda: dataset.latent(24), "0 to 23"),
        (lambda: dataset.text(0, 5), "caption variant 5"),
        (lambda: dataset.null_text("other"), "empty or negative"),
        (lambda: open_dataset(tiny_shards, None).text(0), "without a text set"),
        (lambda: open_dataset([]), "no root"),
    ):
        with pytest.raises(UserError, match=named):
            ask()


ARRAY = np.zeros((2, 1, 2, 2), np.float16)
KEY = sample_key("a", 0, 1, 32, 32)
MEMBERS = {"json": canonical_json({"latent": array_facts(ARRAY)}), "latent.npy.zst": encode_array(ARRAY)}
SUMMARY = {
    "clip": "a", "start_ms": 0, "frames": 1, "height": 32, "width": 32, "source_media": "image", "category": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "members", "summary", "named"),
    [
        ("b.c", MEMBERS, SUMMARY, "not a valid key"),
        (sample_key("b", 0, 1, 32, 32), MEMBERS, SUMMARY, "its summary makes the key"),
        (KEY, {"json": MEMBERS["json"]}, SUMMARY, "expected: json and latent"),
        (KEY, {**MEMBERS, "text.npy.zst": b""}, SUMMARY, "expected: json and latent"),
        (KEY, {**MEMBERS, "Preview": b""}, SUMMARY, "member suffixes"),
        (KEY, {**MEMBERS, "json": b'{"a": 1}'}, SUMMARY, "not canonical"),
        (KEY, {**MEMBERS, "latent.npy.zst": b"junk"}, SUMMARY, "zstd"),
        (KEY, MEMBERS, {**SUMMARY, "frames": "1"}, "frames"),
        (KEY, MEMBERS, {**SUMMARY, "frame": 1}, "did you mean frames"),
    ],
)
def test_the_writer_refuses_what_the_reader_would(
    tmp_path: Path, key: str, members: dict, summary: dict, named: str
) -> None:
    with (
        ShardWriter(open_storage(tmp_path), "latents", 0, IDENTITY, tmp_path, PROVENANCE) as writer,
        pytest.raises(UserError, match=named),
    ):
        writer.add(key, members, summary)
    assert not is_committed(open_storage(tmp_path), "latents", 0)


def test_a_key_twice_in_a_unit_is_refused(tmp_path: Path) -> None:
    with ShardWriter(open_storage(tmp_path), "latents", 0, IDENTITY, tmp_path, PROVENANCE) as writer:
        writer.add(KEY, MEMBERS, SUMMARY)
        with pytest.raises(UserError, match="already"):
            writer.add(KEY, MEMBERS, SUMMARY)


def test_an_abandoned_writer_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with ShardWriter(open_storage(tmp_path / "root"), "latents", 0, IDENTITY, tmp_path / "s", PROVENANCE) as writer:
        writer.add(KEY, MEMBERS, SUMMARY)
    assert list((tmp_path / "s").iterdir()) == [] and not (tmp_path / "root").exists()


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a")
    write_dataset(tmp_path / "b", scratch=tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "a" / "scratch")
    names = sorted(str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert names == sorted(str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_ledger_comes_back(tiny_shards: Path) -> None:
    storage = open_storage(tiny_shards)
    ledger = read_commit(storage, "latents", 1).commit.ledger
    assert ledger is not None
    rows = list(read_ledger(storage.get(ledger.name)))
    assert [row.status for row in rows] == ["accepted"] * 8 + ["rejected"]
    assert write_ledger(rows) == storage.get(ledger.name)
    assert rows[-1].reason == "fetch-404" and rows[-1].retryable


def test_open_files_are_bounded(tmp_path: Path) -> None:
    write_dataset(tmp_path / "many", num_units=80, samples_per_unit=1, channels=1)
    dataset = open_dataset(tmp_path / "many")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for place in range(80):
        dataset.latent(place)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 64
