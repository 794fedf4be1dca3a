"""Odd things among a dataset's files, and file systems that lack something: said, skipped or refused in one line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from shards_data import write_dataset

from preprocess.build.scratch import scratch_folder
from shards.check.orphans import sweep
from shards.cli import main
from shards.errors import MissingObject, ShardDamage
from shards.format.dataset_info import read_info, write_info
from shards.read.dataset import open_dataset
from shards.storage import local
from shards.storage.cache import CachedStorage
from shards.storage.local import LocalStorage


@pytest.fixture
def root(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "copy"))


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(local.LOG, "warning", lambda text, *values: found.append(text % values))
    local.warn_once.cache_clear()
    return found


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_odd_files_in_a_dataset_are_skipped_and_reported(root: Path, warnings: list[str]) -> None:
    latents = root / "latents"
    (latents / "nowhere").symlink_to(root / "gone")
    (latents / "itself").symlink_to(latents / "itself")
    (latents / "above").symlink_to(root)
    os.mkfifo(latents / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(latents / "socket"))
        names = {entry.name for entry in LocalStorage(root).list()}
        assert len(open_dataset(root)) == 24
        assert _run("verify", root, "--fast").exit_code == 0
    assert not any(name in names for name in ("latents/nowhere", "latents/fifo", "latents/itself", "latents/socket"))
    text = "\n".join(warnings)
    for name in ("nowhere", "itself", "above", "fifo", "socket"):
        assert f"latents/{name}: skipped" in text


@pytest.mark.parametrize("name", ["dataset.json", "latents/shard-000001.json", "index.jsonl.zst"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop", "dangling"])
def test_what_is_not_a_file_in_a_files_place_is_one_line(root: Path, name: str, kind: str) -> None:
    path = root / name
    path.unlink(missing_ok=True)
    make: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "dangling": lambda: path.symlink_to(root / "gone"),
    }
    make[kind]()
    command = [sys.executable, "-m", "shards.cli", "verify", str(root), "--fast"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in found.stderr
    if name != "index.jsonl.zst" or kind != "dangling":
        assert found.returncode in (1, 2) and name in found.stdout + found.stderr
    with pytest.raises(ShardDamage):
        LocalStorage(root).get(name)


def test_files_that_vanish_during_a_listing_are_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed between the reading of the folder and the look at the file."""
    real = os.scandir

    def scandir(path: Path) -> list[os.DirEntry[str]]:
        found = list(real(path))
        (root / "latents/notes.txt").unlink(missing_ok=True)
        return found

    (root / "latents/notes.txt").write_text("x")
    monkeypatch.setattr("shards.storage.local.os.scandir", scandir)
    names = [entry.name for entry in LocalStorage(root).list("latents/")]
    assert "latents/notes.txt" not in names and len(names) > 5


def test_a_file_system_without_hard_links_gets_a_warning(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    storage = LocalStorage(tmp_path)
    assert storage.put("a/x", b"1", if_absent=True) and not storage.put("a/x", b"2", if_absent=True)
    assert storage.get("a/x") == b"1" and [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
    write_dataset(tmp_path / "root", num_units=1)
    assert len(open_dataset(tmp_path / "root")) == 8
    assert sum("no hard links" in text for text in warnings) == len({text for text in warnings if "hard" in text})


def test_a_file_system_without_locks_is_used_where_that_is_safe(
    root: Path, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with scratch_folder(str(root)) as first, scratch_folder(str(root)):
        assert first.is_dir()  # the second removed nothing whose process it cannot know
        assert sweep(LocalStorage(root), -60, delete=True) == [] and first.is_dir()
    name = next(entry.name for entry in LocalStorage(root).list("latents/") if entry.name.endswith(".tar"))
    cached = CachedStorage(LocalStorage(root), tmp_path / "cache", 2**30)
    assert cached.read_into(name, 0, memoryview(bytearray(512))) == 512 and not list(tmp_path.glob("cache/*/*.tar"))
    assert any("no locks" in text and "flock" in text for text in warnings)


def test_an_error_of_the_disk_is_one_line_with_path_and_cause(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("shards.storage.local.os.pread", fail)
    result = _run("ls", root)
    assert result.exit_code == 75 and f"{root}/dataset.json: Input/output error" in result.output
    monkeypatch.undo()
    (root / "dataset.json").unlink()
    with pytest.raises(MissingObject):
        LocalStorage(root).get("dataset.json")


def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes

    def write(self: Path, data: bytes) -> int:
        real(self, data[:1])
        with Path("/dev/full").open("wb", buffering=0) as full:
            return full.write(data)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OSError, match="No space left") as found:
        LocalStorage(tmp_path).put("a", b"12")
    assert str(tmp_path) in found.value.filename and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["[v2]", "[/red]", "[bold]x"])
def test_a_path_that_looks_like_markup_is_shown_as_it_is(tiny_shards: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(tiny_shards, tmp_path / name))
    (root / "latents/shard-000001.json").unlink()
    for command in (["ls"], ["verify", "--fast"], ["stats", "--no-cache"], ["show"]):
        key = [next(iter(open_dataset(root, None).samples)).key] if command == ["show"] else []
        result = _run(command[0], root, *key, *command[1:])
        assert result.exit_code in (0, 1), result.output
        assert name in result.output, command


def test_text_beyond_ascii_is_printed_under_the_plain_locale(tiny_shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_shards, tmp_path / "영상 é"))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    info, key = read_info(LocalStorage(root)), open_dataset(root, None).samples[0].key
    write_info(LocalStorage(root), info.model_copy(update={"notes": {"설명": "480×832"}}))
    for arguments in (
        ["ls", str(root)],
        ["show", str(root), key],
        ["show", str(root), "없음"],
        ["ls", str(root / "없음")],
    ):
        command = [sys.executable, "-m", "shards.cli", *arguments]
        found = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
        assert b"Traceback" not in found.stderr and b"UnicodeEncodeError" not in found.stderr
        assert found.returncode == (2 if "없음" in arguments[-1] else 0), found.stderr


def test_a_clip_id_beyond_ascii_is_found_under_the_plain_locale(tmp_path: Path) -> None:
    write_dataset(tmp_path / "root", num_units=1, prefix="한국-é", scratch=tmp_path / "scratch")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "shards.cli", "show", str(tmp_path / "root"), "한국-é-0-gone", "--json"]
    found = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
    assert found.returncode == 0 and json.loads(found.stdout)["attempts"][0]["reason"] == "fetch-404", found.stderr


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_sealed_number_that_is_not_finite_is_one_line(root: Path, number: float) -> None:
    body = json.loads((root / "dataset.json").read_bytes())
    del body["seal"]
    body["identity"]["dtype"] = number
    head = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()[:-1] + b","
    for text in (head, head.replace(b":Infinity", b":1e999")):
        seal = hashlib.sha256(text).hexdigest().encode()
        (root / "dataset.json").write_bytes(text + b'"seal":"' + seal + b'"}\n')
        for command in (["ls"], ["verify"], ["show", "clip-0"]):
            result = _run(command[0], root, *command[1:])
            assert result.exit_code in (1, 2) and "a number that is not finite" in result.output, result.output


@pytest.mark.parametrize(
    "place",
    [
        "s3://me:hush@b/p", "s3://b/p?endpoint=http://me:hush@127.0.0.1:1x", "s3://[b/me:hush@p",
        "s3://b/p?endpoint=http%3A%2F%2Fme%3Ahush%40127.0.0.1%3A1&more=1", "http://me:hush@127.0.0.1:1", "me:hush@127",
    ],
)  # fmt: skip
def test_no_message_about_an_s3_root_holds_its_password(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    if not place.startswith("s3:"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", place)
        place = "s3://b/p"
    result = _run("ls", place)
    assert result.exit_code == 2 and result.output.startswith("error: ") and "hush" not in result.output
