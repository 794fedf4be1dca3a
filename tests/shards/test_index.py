"""The index: the same dataset with it, without it, and when it lies; 160,000 samples open quickly with it."""

from __future__ import annotations

import logging
import os
import pty
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peak import PEAK_KIB
from shards_data import write_dataset
from shards_scale import write_commits

from shards.errors import ShardDamage
from shards.format.commit import read_commit
from shards.format.ledger import read_ledger_lines
from shards.read.dataset import Dataset, open_dataset
from shards.read.index import write_index
from shards.read.table import TableBuilder, pack, unit_columns, unpack
from shards.storage import open_storage


@pytest.fixture
def root(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "copy"))


def state(dataset: Dataset) -> Any:
    arrays = [dataset.latent(place).tobytes() for place in range(len(dataset))]
    return (
        dataset.revision,
        list(dataset.samples),
        arrays,
        [dataset.text(place).tobytes() for place in range(len(dataset))],
    )


def test_with_and_without_index_are_one_dataset(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = state(open_dataset(root))
    assert write_index(open_storage(root)) == 7
    # With it no commit is read.
    monkeypatch.setattr("shards.read.index.parse_commit", None)
    assert state(open_dataset(root)) == without


def test_a_stale_index_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_dataset(root, num_units=2)
    write_index(open_storage(root))
    stale = (root / "index.jsonl.zst").read_bytes()
    shutil.rmtree(root / "latents")
    shutil.rmtree(root / "text")
    (root / "dataset.json").unlink()
    write_dataset(root, num_units=3, seed=5)  # other tars under the same units, and one unit more
    fresh = state(open_dataset(root))
    (root / "index.jsonl.zst").unlink()
    assert state(open_dataset(root)) == fresh
    (root / "index.jsonl.zst").write_bytes(stale)
    assert state(open_dataset(root)) == fresh
    (root / "text/default/shard-000002.json").unlink()
    (root / "latents/shard-000002.json").unlink()
    assert len(open_dataset(root)) == 16


def test_a_unit_made_anew_with_a_commit_of_the_same_size_is_read_from_its_commit(tmp_path: Path) -> None:
    """The old tar lies there still, so only the number of tars gives the stale line away."""
    root = tmp_path / "root"
    write_dataset(root, num_units=2, samples_per_unit=2)
    write_index(open_storage(root))
    size = (root / "latents/shard-000000.json").stat().st_size
    for seed in range(1, 20):
        other = tmp_path / f"other-{seed}"
        write_dataset(other, num_units=1, samples_per_unit=2, seed=seed)
        if (other / "latents/shard-000000.json").stat().st_size == size:
            break
    else:
        pytest.fail("no seed gives a commit of the same size")
    (tar,) = (other / "latents").glob("shard-000000-*.tar")
    shutil.copy(tar, root / "latents")
    shutil.copy(other / "latents/shard-000000.json", root / "latents")
    assert len(list((root / "latents").glob("shard-000000-*.tar"))) == 2
    with_index = open_dataset(root)
    (root / "index.jsonl.zst").unlink()
    assert with_index.shard(0).tar == f"latents/{tar.name}"
    assert state(with_index) == state(open_dataset(root))


def test_index_lines_are_the_commits_columns(root: Path) -> None:
    from shards.format.sealed_json import parse_json

    storage = open_storage(root)
    write_index(storage)
    lines = [parse_json(line, "index") for line in read_ledger_lines(storage.get("index.jsonl.zst"), "index")]
    assert lines[0] == {"format_version": 1, "num_units": 7}
    for line in lines[1:]:
        assert line == unit_columns(read_commit(storage, line["kind"], line["unit"]))


def test_a_damaged_index_is_said_and_passed_over(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = open_dataset(root).revision
    write_index(open_storage(root))
    path = root / "index.jsonl.zst"
    good = path.read_bytes()
    logging.getLogger("wan").propagate = True
    for bad in (good[: len(good) // 2], good[:-3], b"junk", good[:200] + bytes(20) + good[220:]):
        path.write_bytes(bad)
        caplog.clear()
        assert open_dataset(root).revision == expected
        assert "wanshards index" in caplog.text


def changed(value: Any) -> st.SearchStrategy[Any]:
    """Any other value; for packed numbers also the same with one of them changed."""
    junk = st.none() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
    try:
        words = unpack(value).tolist()
    except (TypeError, ValueError):
        return junk
    if not words:
        return junk
    number = st.integers(-(2**63), 2**63 - 1) | st.integers(-2000, 2_000_000)

    def with_one(place: int, other: int) -> str:
        return pack((other if index == place else word) % 2**64 for index, word in enumerate(words))

    return junk | st.builds(with_one, st.integers(0, len(words) - 1), number)


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_lying_index_gives_the_right_bytes_or_a_typed_error(root: Path, data: st.DataObject) -> None:
    """Any value of a well-formed index replaced or removed: what is read is what was written, or a named error."""
    from shards.errors import UserError
    from shards.format.sealed_json import canonical_json, parse_json

    storage = open_storage(root)
    path = root / "index.jsonl.zst"
    path.unlink(missing_ok=True)
    whole = open_dataset(root)
    expected = [(sample.key, whole.latent(sample.key).tobytes()) for sample in whole.samples]
    write_index(storage)
    lines = [parse_json(line, "index") for line in read_ledger_lines(path.read_bytes(), "index")]
    line = lines[data.draw(st.integers(1, len(lines) - 1))]
    place: Any = line
    while isinstance(place, dict | list) and place:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        parent, key = place, data.draw(st.sampled_from(keys))
        place = place[key]
    if data.draw(st.integers(0, 3)):
        parent[key] = data.draw(changed(place))
    else:
        del parent[key]
    text = b"".join(canonical_json(value) + b"\n" for value in lines)
    path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(text))
    try:
        dataset = open_dataset(root, pin=whole.pin() if data.draw(st.booleans()) else None)
        for sample in dataset.samples:
            found = (sample.key, dataset.latent(sample.key).tobytes())
            assert found in expected
    except UserError:
        pass


@pytest.mark.parametrize(
    ("column", "value"), [(0, -512), (0, 0), (0, 2**63 - 1), (1, -1), (1, 2**40), (3, 99), (3, -1)]
)
def test_a_place_outside_its_tar_is_refused_at_opening(root: Path, column: int, value: int) -> None:
    columns = unit_columns(read_commit(open_storage(root), "latents", 1))
    words = unpack(columns["arrays"][column]).tolist()
    columns["arrays"][column] = pack(word % 2**64 for word in [*words[:-1], value])
    builder = TableBuilder("latents")
    with pytest.raises(ShardDamage, match=r"outside its tar|do not fit"):
        builder.add(0, columns, "index")
        builder.table("index")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_archive_opens_in_bounded_memory(tmp_path: Path) -> None:
    """160,000 samples in 2,500 units with the index: under 300 MB. How long it takes is bench_shards_open.py's."""
    root = tmp_path / "archive"
    write_commits(root)
    write_index(open_storage(root))
    code = (
        f"import sys; from shards.read.dataset import open_dataset; print(len(open_dataset(sys.argv[1])), {PEAK_KIB})"
    )
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True)
    num_samples, kib = map(int, done.stdout.split())
    assert num_samples == 160_000 and kib * 1024 < 300e6


def test_an_index_of_a_few_bytes_asks_for_little_memory(root: Path) -> None:
    """A line that zstd makes of a kilobyte: refused by its length, and the commits are read."""
    lines = [b'{"format_version":1,"num_units":1}', b"[" + b"[]," * 5_000_000 + b"[]]"]
    data = zstandard.ZstdCompressor(write_checksum=True).compress(b"\n".join([*lines, b""]))
    assert len(data) < 4096
    (root / "index.jsonl.zst").write_bytes(data)
    tracemalloc.start()
    assert len(open_dataset(root)) == 24
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_reading_many_commits_is_reported(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal by a bar, elsewhere by lines; nothing where the index has them."""
    lines: list[str] = []
    monkeypatch.setattr("shards.read.index._MANY_COMMITS", 3)
    monkeypatch.setattr("shards.console.REPORT_SECONDS", 0.0)
    monkeypatch.setattr("shards.console.LOG.info", lambda text, *values: lines.append(text % values))
    open_dataset(tiny_shards)
    assert "reading commits" in lines[0] and lines[-1].endswith("7 of 7")
    leader, follower = pty.openpty()
    code = "from shards.read import index; index._MANY_COMMITS = 3; from shards.cli import main; main()"
    command = [sys.executable, "-c", code, "ls", str(tiny_shards)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=follower, timeout=60, check=True)
    assert b"reading commits" in os.read(leader, 4096)
    os.close(leader), os.close(follower)
