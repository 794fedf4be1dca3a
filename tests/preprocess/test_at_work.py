"""Who is at work on an output: a second build waits, shares the units or refuses; status says how far and how fast."""

import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import yaml
from prep_runs import ROOT, TINY, build, files_of, prep, prep_values, start_build
from s3_servers import BUCKET, serve

from preprocess.build import scratch
from preprocess.build.progress import PassProgress
from preprocess.build.scratch import AtWork, builds_at_work, scratch_folder
from preprocess.build.summary import count_dataset, count_work, describe_build, describe_work
from preprocess.demo.corpus import BASE_URL
from preprocess.demo.server import served
from preprocess.encoders import encoders
from preprocess.pipeline import Part, build_shards
from preprocess.plan.freeze import freeze_plan
from preprocess.plan.plan import open_plan
from shards.check.orphans import sweep
from shards.errors import StorageFailure, StorageOutage, UserError
from shards.format.dataset_info import DatasetInfo, write_info
from shards.format.ledger import LedgerRow
from shards.storage import open_storage


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never came"
        time.sleep(0.02)


@pytest.fixture
def first_at_work(demo_corpus, tmp_path):
    """A build in a process of its own that is within its first units; yields it, its output and its config's values."""
    output = tmp_path / "output"
    sections = {**TINY, "corpus": {"limit": 12}, "engine": {"decoders": 1}}
    process = start_build(demo_corpus, output, tmp_path / "prep.yaml", **sections)
    until(lambda: builds_at_work(str(output)) and builds_at_work(str(output))[0]["open"])
    yield process, output, sections
    process.kill()
    process.communicate()


HOLDER = """
import sys
from preprocess.build import scratch
from preprocess.build.progress import PassProgress
from preprocess.build.scratch import AtWork, scratch_folder
from shards.storage import open_storage
from shards.storage import local
if sys.argv[2:]:
    local._here = lambda: sys.argv[2]  # as on another machine
scratch.NOTE_SECONDS = scratch.BUCKET_NOTE_SECONDS = 0.5
output = sys.argv[1]
with scratch_folder(output) as folder, AtWork(open_storage(output), output, folder, {"latents"}, None) as at_work:
    at_work.begin("refuse")
    at_work.progress = PassProgress("latents", 6, 12).facts
    print(next(at_work.claim("latents", range(6))), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is at work as a build is, with unit 0 open, and encodes nothing; yields it and its output."""
    output = tmp_path / "held"
    command = [sys.executable, "-c", HOLDER, str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    yield process, output
    process.kill()
    process.communicate()


def test_a_second_build_says_who_is_at_work_and_waits(first_at_work, demo_corpus, caplog, monkeypatch):
    process, output, sections = first_at_work
    monkeypatch.setattr("preprocess.build.scratch.LOG.propagate", True)
    caplog.set_level("INFO", logger="wan")
    counts = build(demo_corpus, output, **sections)
    assert process.wait(60) == 0
    assert f"process {process.pid} on " in caplog.text and "waiting until it ends" in caplog.text
    assert caplog.text.count("waiting until") == 1
    assert "latents: all 6 units are done" in caplog.text  # nothing was done twice
    assert counts["waiting"] == 0 and not builds_at_work(str(output))


def test_two_builds_share_the_units_and_do_none_twice(demo_corpus, tmp_path, monkeypatch):
    """Each unit is claimed once; both end with everything done, and the latents are those of one build alone."""
    claims, claim, both = [], AtWork.claim, threading.Event()

    def counted(self, kind, units):
        for unit in claim(self, kind, units):
            claims.append((kind, unit, id(self)))
            if len({build for _, _, build in claims}) > 1:
                both.set()
            if len(claims) == 2:
                assert both.wait(120)  # the first goes on when the second has a unit
            yield unit

    lock = threading.Lock()

    def one_at_a_time(load):
        def loaded(*arguments):
            with lock:  # random weights come from the generator of the process: two threads must not draw at once
                return load(*arguments)

        return loaded

    for name in ("load_text_encoder", "load_vae_encoder"):
        monkeypatch.setattr(encoders, name, one_at_a_time(getattr(encoders, name)))
    sections = {**TINY, "corpus": {"limit": 8}}
    build(demo_corpus, tmp_path / "alone", **sections)  # first: two threads must not import the encoders at once
    monkeypatch.setattr(AtWork, "claim", counted)
    monkeypatch.setattr(scratch, "POLL_SECONDS", 0.05)
    output, results = tmp_path / "output", []
    with served(demo_corpus) as url:
        config = prep(demo_corpus, output, **{**sections, "fetch": {"mirrors": {BASE_URL: url}}})

        def run():
            try:
                results.append(build_shards(config, quiet=True, if_busy="share")["waiting"])
            except Exception as error:  # of a thread: it would be lost
                results.append(error)

        first = threading.Thread(target=run)
        first.start()
        until(lambda: claims)
        run()
        first.join()
    assert results == [0, 0]
    done = sorted((kind, unit) for kind, unit, _ in claims)
    assert done == sorted((kind, unit) for kind in ("latents", "text/default") for unit in range(4))
    assert files_of(output, "latents/*.tar") == files_of(tmp_path / "alone", "latents/*.tar")


def test_a_second_build_refuses_on_request(holder, demo_corpus):
    process, output = holder
    with pytest.raises(UserError, match=f"process {process.pid} on .*, builds the same units"):
        build_shards(prep(demo_corpus, output, **TINY), quiet=True, if_busy="refuse")
    assert process.poll() is None


def test_what_another_has_open_is_not_claimed_until_it_dies(holder, monkeypatch):
    process, output = holder
    monkeypatch.setattr(scratch, "POLL_SECONDS", 0.05)
    storage = open_storage(str(output))
    with scratch_folder(str(output)) as folder, AtWork(storage, str(output), folder, {"latents"}, None) as at_work:
        at_work.begin("share")
        assert list(at_work.claim("latents", range(3))) == [1, 2]
        threading.Timer(0.5, process.kill).start()
        at_work.wait_for_others("latents", [0])
        process.wait()
        assert list(at_work.claim("latents", [0])) == [0]


def test_parts_that_do_not_overlap_do_not_wait(tmp_path):
    storage = open_storage(str(tmp_path))
    with scratch_folder(str(tmp_path)) as one, scratch_folder(str(tmp_path)) as two:
        first = AtWork(storage, str(tmp_path), one, {"latents"}, (0, 3))
        with first:
            first.begin("refuse")
            for passes, units in (({"latents"}, (4, 7)), ({"text/default"}, None)):
                with AtWork(storage, str(tmp_path), two, passes, units) as other:
                    other.begin("refuse")
            for units in ((3, 5), None):
                overlapping = AtWork(storage, str(tmp_path), two, {"latents", "text/default"}, units)
                with overlapping, pytest.raises(UserError, match="builds the same units"):
                    overlapping.begin("refuse")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An output in a bucket, whose builds write and look often; an empty one."""
    for name, value in {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "x"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(scratch, "BUCKET_NOTE_SECONDS", 0.2)
    monkeypatch.setattr(scratch, "BUCKET_POLL_SECONDS", 0.1)
    with serve("moto", tmp_path / "s3") as endpoint:
        yield f"s3://{BUCKET}/data?endpoint={endpoint}"


def hold(output, *machine):
    """A process with unit 0 of a bucket's latents, on this machine or on another."""
    command = [sys.executable, "-c", HOLDER, output, *machine]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    return process


def kill(process):
    process.kill()
    process.communicate()


def in_bucket(output):
    return [entry.name for entry in open_storage(output).list()]


def test_a_build_of_another_machine_on_one_bucket_is_seen(bucket, monkeypatch):
    """It is named, its unit is not done here, and is taken over when its note has not been refreshed for long."""
    monkeypatch.setattr(scratch, "NOTE_SECONDS", 0.2)
    monkeypatch.setattr(scratch, "STALE_SECONDS", 3.0)
    storage, process = open_storage(bucket), hold(bucket, "0123abcd")
    with (
        scratch_folder(bucket) as folder, AtWork(storage, bucket, folder, {"latents"}, None) as at_work,
        pytest.raises(UserError, match=f"process {process.pid} on .*, builds the same units"),
    ):  # fmt: skip
        at_work.begin("refuse")
    assert [note["pid"] for note in builds_at_work(bucket)] == [process.pid]
    with scratch_folder(bucket) as folder, AtWork(storage, bucket, folder, {"latents"}, None) as at_work:
        at_work.begin("share")
        assert list(at_work.claim("latents", range(3))) == [1, 2]
        kill(process)
        start = time.monotonic()
        at_work.wait_for_others("latents", [0])
        assert 1.0 < time.monotonic() - start < 30
        assert list(at_work.claim("latents", [0])) == [0]
    assert not builds_at_work(bucket)


def test_a_killed_build_of_this_machine_on_a_bucket_is_gone_at_once(bucket):
    storage, process = open_storage(bucket), hold(bucket)
    kill(process)
    left = in_bucket(bucket)
    assert len(left) == 2 and not builds_at_work(bucket)
    with scratch_folder(bucket) as folder, AtWork(storage, bucket, folder, {"latents"}, None) as at_work:
        at_work.begin("refuse")
        assert list(at_work.claim("latents", range(2))) == [0, 1]
    assert not in_bucket(bucket)


def test_each_unit_of_a_bucket_is_claimed_once(bucket):
    """By eight builds that ask at the same time, after one that died with half of them."""
    storage, process = open_storage(bucket), hold(bucket)
    kill(process)
    with ExitStack() as stack:
        builds = []
        for _ in range(8):
            folder = stack.enter_context(scratch_folder(bucket))
            builds.append(stack.enter_context(AtWork(storage, bucket, folder, {"latents"}, None)))
        with ThreadPoolExecutor(8) as pool:
            claimed = list(pool.map(lambda each: list(each.claim("latents", range(6))), builds))
    assert sorted(unit for units in claimed for unit in units) == list(range(6))
    assert not in_bucket(bucket)


def test_what_killed_builds_left_in_a_bucket_is_swept(bucket):
    storage = open_storage(bucket)
    write_info(storage, DatasetInfo(identity={"vae": "x"}))
    process = hold(bucket, "0123abcd")
    kill(process)
    assert [orphan.name for orphan in sweep(storage, 3600.0, delete=True)] == []
    swept = [orphan.name for orphan in sweep(storage, -5.0, delete=True)]
    assert len(swept) == 2 and all(name.startswith(".tmp-build-") for name in swept)
    assert in_bucket(bucket) == ["dataset.json"]


def test_a_bucket_that_fails_costs_no_build_its_note(bucket, monkeypatch, caplog):
    """A refused note is said, and the build goes on; an outage of a later one is not even said."""
    monkeypatch.setattr("preprocess.build.scratch.LOG.propagate", True)
    storage = open_storage(bucket)
    put, denied = type(storage).put, []

    def refuse(self, name, data, **options):
        if name.endswith("at-work.json"):
            denied.append(name)
            raise StorageFailure("denied") if len(denied) == 1 else StorageOutage("put", "reset", 1.0)
        return put(self, name, data, **options)

    monkeypatch.setattr(type(storage), "put", refuse)
    monkeypatch.setattr(scratch, "NOTE_SECONDS", 0.05)
    with scratch_folder(bucket) as folder, AtWork(storage, bucket, folder, {"latents"}, None) as at_work:
        at_work.begin("refuse")
        assert list(at_work.claim("latents", range(2))) == [0, 1]
        until(lambda: len(denied) > 3)
    assert caplog.text.count("other machines cannot see that this build is at work: denied") == 1
    assert not in_bucket(bucket)


def test_a_dead_builds_note_counts_no_longer(holder):
    process, output = holder
    process.kill()
    process.wait()
    assert list(output.glob(".tmp-build-*/at-work.json")) and not builds_at_work(str(output))


def status(output, values, *options):
    config = output.parent / "status.yaml"
    config.write_text(yaml.safe_dump(values, allow_unicode=True))
    command = [sys.executable, "-m", "preprocess.cli", "status", str(config), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_status_of_a_build_at_work(holder, demo_corpus):
    process, output = holder
    values = prep_values(demo_corpus, output, **TINY)
    freeze_plan(open_storage(str(output)), prep(demo_corpus, output, **TINY))
    (folder,) = output.glob(".tmp-build-*")
    outage = {"host": "a.cloudfront.net", "reason": "fetch-503", "since": "2026-01-01T03:00:00+00:00"}
    (folder / "outage-1-a.json").write_text(json.dumps(outage))
    until(lambda: builds_at_work(str(output))[0]["progress"])
    said = status(output, values)
    assert f"at work  process {process.pid} on " in said and "latents: 0 of 6 units" in said
    assert "a.cloudfront.net has not answered since 2026-01-01T03:00:00+00:00 (fetch-503)" in said
    assert "stayed empty" not in said
    (note,) = json.loads(status(output, values, "--json"))["work"]["builds"]
    assert note["pid"] == process.pid and note["progress"]["of_units"] == 6 and note["outages"] == [outage]


def test_status_names_the_pool_that_limits_a_build_at_work():
    progress = PassProgress("latents", 6, 12)
    waiting = {"fetch": 6.0, "decode": 1.0, "encode": 3.0, "write": 0.0}
    row = {"candidate": 0, "clip_id": "0", "source": "", "status": "accepted", "attempts": 1, "windows": (), "bytes": 9}
    progress.row(LedgerRow(**row, stage=None, reason=None, detail=None, retryable=False, seconds={}), waiting)
    note = {"key": [0.0, 1], "pid": 1, "host": "here", "progress": progress.facts(), "outages": []}
    said = describe_work({"builds": [note], "units_left": 6})
    assert ", bound by fetch, " in said[1]
    assert (
        said[2] == "pools    encoder at work 30%, waiting 60% for fetch, 10% for decode, 0% for write: bound by fetch"
    )
    del note["progress"]["pools"], note["progress"]["bottleneck"]  # as an older release writes it
    assert len(describe_work({"builds": [note], "units_left": 6})) == 2


def test_status_of_an_unfinished_build_says_how_long_the_rest_takes(demo_corpus, tmp_path):
    build(demo_corpus, tmp_path, part=Part("latents", range(2)), **TINY)
    storage = open_storage(str(tmp_path))
    counts = count_dataset(storage, open_plan(storage), "default")
    work = count_work(storage, str(tmp_path), counts)
    assert work["units_left"] == 1 and abs(work["seconds_left"] - work["seconds_a_unit"]) <= 1
    said = "\n".join([*describe_build(counts), *describe_work(work)])
    assert "nobody: 1 unit of latents is left; at the pace of the last units" in said and "stayed empty" not in said


def test_a_build_that_was_refused_everything_says_a_fix_and_the_same_command_does_it(demo_corpus, tmp_path):
    output = tmp_path / "output"
    with served(demo_corpus) as url:
        fetch = {"mirrors": {BASE_URL: url}, "allow_hosts": ("nowhere.example",)}
        for _ in range(2):  # it tries again and says so again
            with pytest.raises(UserError, match=r"(?s)fetch/fetch-host-refused.*add the host to fetch\.allow_hosts"):
                build_shards(prep(demo_corpus, output, **{**TINY, "fetch": fetch}), quiet=True)
        fetch["allow_hosts"] = ("127.0.0.1",)
        counts = build_shards(prep(demo_corpus, output, **{**TINY, "fetch": fetch}), quiet=True)
    assert counts["accepted"] > 0 and counts["waiting"] == 0
    shutil.rmtree(output)
