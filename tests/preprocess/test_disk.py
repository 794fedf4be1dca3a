"""A disk that is full, read-only, or goes away: one clear error, what is committed is whole, then on with it."""

import os
import shutil
import subprocess
import threading
import time

import pytest
from prep_runs import TINY, build, files_of

from shards.check.verify import verify
from shards.errors import UserError
from shards.format.commit import committed_units
from shards.storage import open_storage
from shards.write.shard_writer import ShardWriter


@pytest.fixture(scope="module")
def whole(demo_corpus, tmp_path_factory):
    """The same build on a disk that stays; not to be written to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    build(demo_corpus, output, **TINY)
    return output


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root and a kernel that lets it")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


@pytest.fixture
def after_the_first_unit(monkeypatch):
    """after_the_first_unit(action): called once, when the build has committed its first unit of latents."""

    def arrange(action):
        real, done = ShardWriter.seal, []

        def seal(writer, *arguments):
            commit = real(writer, *arguments)
            if not done:
                done.append(commit)
                action()
            return commit

        monkeypatch.setattr(ShardWriter, "seal", seal)

    return arrange


@pytest.fixture
def before_the_second_unit(monkeypatch):
    """before_the_second_unit(action): called once, when the build is about to open its second shard."""

    def arrange(action):
        real, opened = ShardWriter.__init__, []

        def open_writer(writer, *arguments, **options):
            opened.append(arguments)
            if len(opened) == 2:
                action()
            real(writer, *arguments, **options)

        monkeypatch.setattr(ShardWriter, "__init__", open_writer)

    return arrange


def check_stopped(output):
    """Some units are there and whole, some are not, and no scratch is."""
    storage = open_storage(output)
    committed = committed_units(storage, "latents")
    assert committed and committed < {0, 1, 2}, "units are committed as they are complete, in any order"
    assert not [each for each in verify(storage, "deep").problems if "not built yet" not in each.what]
    assert not [path for path in output.rglob("*") if ".tmp-" in path.name]


def test_a_full_disk(disk, demo_corpus, whole, after_the_first_unit):
    output, filler = disk / "out", disk / "filler"

    full, over = threading.Event(), threading.Event()

    def keep_full():
        with filler.open("wb", buffering=0) as file:
            while not over.is_set():
                try:
                    file.write(bytes(4096))
                except OSError:  # what the build removes meanwhile is filled too
                    full.set()
                    time.sleep(0.0005)

    keeper = threading.Thread(target=keep_full)
    after_the_first_unit(lambda: (keeper.start(), full.wait()))
    with pytest.raises(UserError, match="no space left while writing") as caught:
        build(demo_corpus, output, **TINY)
    over.set()
    keeper.join()
    assert "run the same command" in str(caught.value)
    check_stopped(output)
    filler.unlink()
    build(demo_corpus, output, **TINY)
    assert files_of(output, "**/*.tar") == files_of(whole, "**/*.tar")


def test_a_disk_that_cannot_be_written(disk, demo_corpus, whole):
    shutil.copytree(whole, disk / "out")
    (disk / "out/latents/shard-000001.json").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = files_of(disk)
    for name in ("new", "out"):
        with pytest.raises(UserError, match="Read-only file system"):
            build(demo_corpus, disk / name, **TINY)
    assert files_of(disk) == before


@pytest.mark.parametrize("moment", ["after_the_first_unit", "before_the_second_unit"])
def test_a_disk_that_goes_away(disk, demo_corpus, whole, moment, request, tmp_path):
    """Unmounted under the build, as a network file system is; then it is there again, with what was committed."""
    kept = tmp_path / "kept"
    kept.mkdir()
    subprocess.run(["mount", "--bind", str(disk), str(kept)], check=True)
    try:
        request.getfixturevalue(moment)(lambda: subprocess.run(["umount", "-l", str(disk)], check=True))
        with pytest.raises(UserError, match="the disk under it is gone") as caught:
            build(demo_corpus, disk / "out", **TINY)
        assert "run the same command" in str(caught.value)
        assert not list(disk.iterdir()), "nothing is written where the disk is not"
        build(demo_corpus, kept / "out", **TINY)
        assert files_of(kept / "out", "**/*.tar") == files_of(whole, "**/*.tar")
        assert not verify(open_storage(kept / "out"), "deep").problems
        assert not [path for path in kept.rglob("*") if ".tmp-" in path.name]
    finally:
        subprocess.run(["umount", "-l", str(kept)], check=True)


def test_open_shards_are_dropped_on_a_full_disk(disk):
    """Every file is closed and removed, though closing one means writing what its buffer holds."""
    writers = [ShardWriter(open_storage(disk / "out"), "latents", unit, {"a": 1}, disk, {}) for unit in range(2)]
    with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    for writer in writers:
        writer.close()
    assert [path.name for path in disk.iterdir()] == ["filler"]
    assert all(writer._file.closed for writer in writers)
