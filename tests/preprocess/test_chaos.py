"""Killed anywhere, over and over, a build ends as if nobody had disturbed it: same bytes, same rows, no leftover."""

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from chaos_builds import builds
from prep_runs import TINY, prep_values
from s3_servers import BUCKET, serve

from preprocess.demo.corpus import BASE_URL
from preprocess.demo.server import served
from shards.check.orphans import sweep
from shards.check.verify import verify
from shards.format.commit import committed_units, read_commit
from shards.format.ledger import read_ledger
from shards.format.names import parse_name
from shards.storage import open_storage

KILLED = -signal.SIGKILL
WORKERS = {"one": {"decoders": 2}, "several": {"decoders": 2, "devices": ["cpu", "cpu"]}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with builds(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def values_of(demo_corpus):
    """values_of(output, engine): a config of three units of two candidates, good and bad."""
    with served(demo_corpus) as url:

        def values(output, engine=WORKERS["one"]):
            return prep_values(demo_corpus, output, **TINY, fetch={"mirrors": {BASE_URL: url}}, engine=engine)

        yield values


@pytest.fixture(scope="module")
def undisturbed(server, values_of, tmp_path_factory):
    """Its output, and how many seconds it took; not to be written to."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    start = time.monotonic()
    assert server.run(values_of(output)) == 0, server.said()
    return output, time.monotonic() - start


def outcome(storage):
    """All that a build is to leave, without the seconds that it took."""
    files, rows = {}, []
    for entry in storage.list():
        name = re.sub(r"-[0-9a-f]{8}\.ledger", ".ledger", entry.name)
        what = parse_name(entry.name)
        assert name not in files
        files[name] = b"" if what and what.what != "tar" else storage.get(entry.name)
    for kind in ("latents", "text/default"):
        for unit in sorted(committed_units(storage, kind)):
            stored = read_commit(storage, kind, unit)
            files[f"{kind}/shard-{unit:06d}.json"] = stored.revision.encode()
            if ledger := stored.commit.ledger:
                rows += [row.model_dump(exclude={"seconds"}) for row in read_ledger(storage.get(ledger.name))]
    return files, rows


def check_undisturbed(output, undisturbed):
    storage = open_storage(output)
    assert outcome(storage) == outcome(open_storage(undisturbed[0]))
    assert not sweep(storage, 0.0, delete=False)
    assert not verify(storage, "deep").problems
    if isinstance(output, Path):
        assert not [path for path in output.rglob("*") if ".tmp-" in path.name]


POINTS = {
    "a tar is put": r"os\.rename latents/shard-\d+-.*tar",
    "its ledger is there, its commit is not": r"os\.link latents/shard-\d+\.json",
    "the commit is there, its temporary file too": r"os\.remove latents/\.tmp-put after latents/shard-\d+\.json",
    "text waits for its first shard": r"os\.link text/default/null\.json",
    "all is there but the sweep": r"os\.remove latents/shard-\d+\.ledger",
}


def test_killed_where_most_is_left_behind(server, values_of, undisturbed, tmp_path):
    """One build, killed once at each of a few points; the long tests take all of them."""
    values = values_of(tmp_path / "out")
    for what, pattern in POINTS.items():
        assert server.run(values, set(), pattern) == KILLED, what
        assert re.search(pattern, server.point())
    assert server.run(values) == 0, server.said()
    check_undisturbed(tmp_path / "out", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("engine", WORKERS)
def test_killed_at_every_point_of_its_output(server, values_of, undisturbed, tmp_path, engine):
    values, passed = values_of(tmp_path / "out", WORKERS[engine]), set()
    while (code := server.run(values, passed)) == KILLED:
        assert server.point() not in passed and len(passed) < 400
        passed.add(server.point())
    assert code == 0, server.said()
    assert len(passed) >= 50, passed
    for unit in range(3):  # among them the moments before each commit and after it
        for kind in ("latents", "text/default"):
            name = f"{kind}/shard-{unit:06d}.json"
            assert any(point.startswith(f"os.link {name}") for point in passed)
            # Of two workers one is killed with the other, and may have been just behind its commit.
            assert engine == "several" or any(point.endswith(f"after {name}") for point in passed)
    print(f"{len(passed)} kills")
    check_undisturbed(tmp_path / "out", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_killed_at_every_request_that_changes_its_bucket(server, values_of, undisturbed, tmp_path, kind, monkeypatch):
    """The whole build straight to S3; then the sweep, and nothing differs from the build to a folder."""
    for name, value in {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "x"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with serve(kind, tmp_path / "s3") as endpoint:
        output = f"s3://{BUCKET}/a/data?endpoint={endpoint}"
        values, passed = values_of(output), set()
        while (code := server.run(values, passed)) == KILLED:
            assert server.point() not in passed and len(passed) < 200
            passed.add(server.point())
        assert code == 0, server.said()
        assert len(passed) >= 20, passed
        assert not list((server.folder / "tmp").rglob(".tmp-*"))  # its scratch, swept by the last
        orphans = sweep(open_storage(output), -5.0, delete=True)
        assert {parse_name(orphan.name).what for orphan in orphans} == {"ledger"}
        check_undisturbed(output, undisturbed)
    print(f"{len(passed)} kills")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("engine", WORKERS)
def test_killed_at_random_instants(server, values_of, undisturbed, tmp_path, engine):
    """Whole, as a machine that goes down; of several workers every other time one alone, as memory that runs out."""
    draw = random.Random(7)
    num_kills = num_built = 0
    while num_kills < 30 or (tmp_path / f"out-{num_built}").exists():
        values = values_of(tmp_path / f"out-{num_built}", WORKERS[engine])
        group = server.start(values)
        if num_kills < 30:
            time.sleep(draw.uniform(0.0, undisturbed[1]))
            alone = _workers(group) if engine == "several" and num_kills % 2 else []
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(draw.choice(alone), signal.SIGKILL) if alone else os.killpg(group, signal.SIGKILL)
        code = server.end()
        assert code in (0, 2, KILLED), server.said()
        num_kills += code != 0
        if code == 0:
            check_undisturbed(tmp_path / f"out-{num_built}", undisturbed)
            num_built += 1
    assert "Traceback" not in server.said()
    print(f"{num_kills} kills, {num_built} builds")


def _workers(group):
    """The processes of a build's workers; decoders have a group of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(group).children()
        return [child.pid for child in children if os.getpgid(child.pid) == group]
    return []
