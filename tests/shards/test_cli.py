"""`wanshards` as a user types it: tables, --json, exit codes, messages without tracebacks."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

import preprocess.cli.main
import shards
import train.cli.main
from preprocess.build.scratch import scratch_folder
from shards.cli import main
from shards.console import echo_lines
from shards.format.dataset_info import read_info, write_info
from shards.read.dataset import open_dataset
from shards.storage import open_storage


@pytest.fixture
def root(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "copy"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_ls_says_what_is_there(tiny_shards: Path) -> None:
    dataset = open_dataset(tiny_shards)
    shown = run("ls", tiny_shards)
    assert shown.exit_code == 0
    for text in (dataset.identity_digest, dataset.revision, "latents", "text/default", "random arrays", "17"):
        assert text in shown.output
    found = json.loads(run("ls", tiny_shards, "--json").stdout)
    assert found["revision"] == dataset.revision and found["identity_sha256"] == dataset.identity_digest
    assert found["latents"]["samples"] == found["text_sets"]["default"]["samples"] == 24
    assert sum(bucket["samples"] for bucket in found["buckets"]) == 24
    keys = [sample.key for sample in dataset.samples]
    assert run("ls", tiny_shards, "--keys").stdout.split() == keys
    assert json.loads(run("ls", tiny_shards, "--keys", "--json").stdout) == keys


def named_commands() -> Iterator[tuple[str, list[str]]]:
    """Every command in backticks in the text of `shards/`: program and words; what a message fills in is `x`."""
    for path in sorted(Path(shards.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if id(node) in inner or not all(isinstance(part, ast.Constant | ast.FormattedValue) for part in parts):
                continue
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in parts)
            for program, words in re.findall(r"`(wanprep|wanshards|wantrain) ([^`]+)`", text):
                yield program, words.split()


def test_every_command_that_a_message_names_is_there() -> None:
    """With arguments it parses; without any, the command exists."""
    programs = {"wanprep": preprocess.cli.main.main, "wanshards": main, "wantrain": train.cli.main.main}
    found = list(named_commands())
    assert ("wanprep", ["recaption", "x", "CONFIG"]) in found and len(found) > 8
    for program, (name, *arguments) in found:
        group = programs[program]
        command = group.commands.get(name)
        assert command is not None, f"{program} {name}"
        if arguments:
            # Under its group: click keeps the help option that a command was first asked for, and other tests show it.
            parent = click.Context(group, info_name=program, **group.context_settings)
            command.make_context(name, arguments, parent=parent).close()


def test_show_tells_one_sample(tiny_shards: Path) -> None:
    key = open_dataset(tiny_shards).samples[1].key
    shown = run("show", tiny_shards, key)
    assert shown.exit_code == 0 and "caption 1 of clip-1" in shown.stdout
    found = json.loads(run("show", tiny_shards, key, "--json").stdout)
    assert found["latent"]["shape"] == [48, 5, 6, 10] and 0.9 < found["latent"]["std"] < 1.1
    assert found["text_sets"]["default"]["json"]["captions"][0] == "caption 0 of clip-1"


def test_a_sample_is_shown_while_text_is_not_there_yet(root: Path) -> None:
    samples = open_dataset(root).samples
    here, later = samples[0].key, samples[-1].key
    (root / "text/default/shard-000002.json").unlink()
    found = json.loads(run("show", root, here, "--json").stdout)
    assert found["text_sets"]["default"]["json"]["captions"]
    shown = run("show", root, later)
    assert shown.exit_code == 0 and "not there yet" in shown.stdout and "max_abs" in shown.stdout
    absent = run("cat", root, f"{later}.nope")
    assert absent.exit_code == 2 and "has no member 'nope'" in absent.stderr and "preview.jpg" in absent.stderr


def test_export_takes_the_default_text_set_if_there(root: Path, tmp_path: Path) -> None:
    assert "text set default" in run("export", "--plain", root, tmp_path / "with").stdout
    storage = open_storage(root)
    info = read_info(storage).model_copy(update={"text_sets": {}})
    (root / "dataset.json").unlink()
    write_info(storage, info)
    shown = run("export", "--plain", root, tmp_path / "without")
    assert shown.exit_code == 0 and shown.stdout.startswith("3 tars, 24 samples, no text")
    assert run("export", "--plain", root, tmp_path / "named", "--text-set", "default").exit_code == 2


def test_verify_by_exit_code(root: Path) -> None:
    for option in ((), ("--fast",), ("--deep", "--jobs", "2")):
        assert run("verify", root, *option).exit_code == 0
    (tar,) = (root / "latents").glob("shard-000001-*.tar")
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    assert run("verify", root, "--fast").exit_code == 0
    shown = run("verify", root)
    assert shown.exit_code == 1 and str(tar) in shown.stdout and "offset" in shown.stdout
    report = json.loads(run("verify", root, "--json").stdout)
    assert report["problems"][0]["file"] == str(tar) and report["problems"][0]["offset"] > 0
    tar.write_bytes(data[:4000])
    assert run("verify", root, "--fast").exit_code == 1


def test_index_makes_the_index(root: Path) -> None:
    assert run("index", root).stdout == "7 shards indexed\n"
    assert (root / "index.jsonl.zst").exists()


def test_cat_writes_members(tiny_shards: Path) -> None:
    dataset = open_dataset(tiny_shards)
    key = dataset.samples[1].key
    assert json.loads(run("cat", tiny_shards, f"{key}.json").stdout) == dataset.meta(key)
    assert json.loads(run("cat", tiny_shards, f"{key}.json", "--text-set", "default").stdout) == dataset.text_meta(key)
    assert run("cat", tiny_shards, f"{key}.preview.jpg").stdout_bytes.startswith(b"\xff\xd8")
    for member, array in (("latent", dataset.latent(key)), ("text1", dataset.text(key, 1))):
        data = run("cat", tiny_shards, f"{key}.{member}.npy.zst", "--npy").stdout_bytes
        assert np.array_equal(np.load(io.BytesIO(data)), array)
    missing = run("cat", tiny_shards, f"{key}.mp4")
    assert missing.exit_code == 2 and "one of json, latent.npy.zst, preview.jpg" in missing.stderr


def test_export_wants_a_form_and_an_empty_folder(tiny_shards: Path, tmp_path: Path) -> None:
    assert run("export", tiny_shards, tmp_path / "out").exit_code == 2
    assert run("export", "--plain", tiny_shards, tmp_path / "out").stdout.startswith("3 tars, 24 samples")
    again = run("export", "--plain", tiny_shards, tmp_path / "out")
    assert again.exit_code == 2 and "not an empty folder" in again.stderr


def test_sweep_lists_and_removes(root: Path) -> None:
    orphan = root / "latents" / "shard-000009-00000000.tar"
    orphan.write_bytes(b"half")
    temporary = root / "latents" / ".tmp-0123"
    temporary.write_bytes(b"x")
    assert run("sweep", root).stdout.startswith("0 orphans")
    listed = json.loads(run("sweep", root, "--older-than-hours", 0, "--json").stdout)
    assert {item["name"] for item in listed["orphans"]} == {"latents/shard-000009-00000000.tar", ".tmp-0123"}
    assert orphan.exists()
    assert run("sweep", root, "--older-than-hours", 0, "--delete").exit_code == 0
    assert not orphan.exists() and not temporary.exists()
    assert run("verify", root).exit_code == 0


def test_sweep_takes_a_dead_builds_scratch_folder_whole_and_leaves_a_live_ones(root: Path) -> None:
    dead = root / ".tmp-build-dead"
    with scratch_folder(str(root)) as live:
        (live / ".tmp-0123").write_bytes(b"x")
        (dead / "inner").mkdir(parents=True)
        (dead / "inner/.tmp-0123").write_bytes(b"12345")
        listed = json.loads(run("sweep", root, "--older-than-hours", 0, "--json").stdout)
        assert listed["orphans"] == [{"name": ".tmp-build-dead/", "size": 5}]
        assert dead.exists() and run("sweep", root, "--delete").exit_code == 0 and dead.exists()
        assert run("sweep", root, "--older-than-hours", 0, "--delete").exit_code == 0
        assert not dead.exists() and (live / ".tmp-0123").exists()
        assert not [entry for entry in open_storage(root).list() if ".tmp-" in entry.name]


def test_a_file_that_may_not_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "dataset.json"
    path.chmod(0)
    if os.access(path, os.R_OK):  # the superuser reads it all the same
        refused = PermissionError(errno.EACCES, "Permission denied", str(path))
        monkeypatch.setattr("shards.show.overview.read_info", lambda _: (_ for _ in ()).throw(refused))
    shown = run("ls", root)
    assert shown.exit_code == 2 and shown.stderr == f"error: {path}: Permission denied\n"


@pytest.mark.parametrize("command", [["ls"], ["show", "x"], ["verify"], ["index"], ["cat", "x.json"], ["sweep"]])
def test_no_dataset_is_a_users_error(tmp_path: Path, command: list[str]) -> None:
    result = run(command[0], tmp_path, *command[1:])
    assert result.exit_code == 2 and "no dataset here" in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(
    "text",
    [
        "[s3://b?endpoint=http://me:hush@h",
        "{a: http://me:hush-and-a-long@h",
        "{a: http://me:hush-and-a-long-password@h}?",
    ],
)
def test_no_message_about_an_override_holds_its_password(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text("data: {}\n")
    result = CliRunner().invoke(train.cli.main.main, ["fit", str(tmp_path / "a.yaml"), "-o", f"data.root={text}"])
    assert result.exit_code == 2 and "error: -o data.root=" in result.output and "hush" not in result.output


def test_what_a_server_answered_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    echo_lines(["404 \x1b[2J\r ü\x9b1A", "days       1"])
    assert capsys.readouterr().out == "404 \\x1b[2J\\r ü\\x9b1A\ndays       1\n"
