"""Who does the work changes no byte: one process, two, part by part; and a worker that is lost is told of."""

import json
import multiprocessing
import os
import signal
import threading
import time
import zlib

import numpy as np
import pytest
from click.testing import CliRunner
from engine_parts import served_after
from prep_runs import TINY, build, files_of, prep

from preprocess.build.work_queue import MAX_LOSSES, WorkQueue
from preprocess.cli.main import main
from preprocess.pipeline import Part, build_shards
from preprocess.plan.plan import open_plan
from shards.check.verify import verify
from shards.errors import UserError
from shards.format.commit import committed_units, read_commit
from shards.format.names import NULL_UNIT
from shards.storage import open_storage

TWO = {"engine": {"devices": ["cpu", "cpu"]}}


@pytest.fixture(scope="module")
def alone(demo_corpus, tmp_path_factory):
    """Three units of two candidates, built by one process; not to be written to."""
    output = tmp_path_factory.mktemp("alone") / "out"
    build(demo_corpus, output, **TINY)
    return output


def ledgers(root):
    from shards.format.ledger import read_ledger

    storage = open_storage(root)
    for unit in sorted(committed_units(storage, "latents")):
        for row in read_ledger(storage.get(read_commit(storage, "latents", unit).commit.ledger.name)):
            yield row.clip_id, row.status, row.reason, row.bytes


def test_a_dealer_deals_each_unit_once():
    dealer = WorkQueue([3, 5, 8])
    assert [dealer.next("a"), dealer.next("b"), dealer.next("a"), dealer.next("b")] == [3, 5, 8, None]
    dealer.done("a", 3)
    assert (dealer.num_waiting, dealer.num_out) == (0, 2)
    dealer.add([9, 10])
    assert dealer.num_waiting == 2 and [dealer.next("b"), dealer.next("a")] == [9, 10]


def test_what_a_lost_worker_had_is_dealt_again_first():
    dealer = WorkQueue(range(5))
    assert [dealer.next("a"), dealer.next("a"), dealer.next("b")] == [0, 1, 2]
    dealer.done("a", 0)
    dealer.next("a")
    assert dealer.lost("a") == [1, 3]
    assert dealer.lost("a") == []
    assert [dealer.next("b") for _ in range(4)] == [1, 3, 4, None]


def test_a_unit_that_kills_its_workers_is_given_up():
    dealer = WorkQueue([7, 8])
    for worker in range(MAX_LOSSES - 1):
        assert [dealer.next(worker), dealer.next(worker)] == [7, 8]
        assert dealer.lost(worker) == [7, 8]
    dealer.next("last")
    with pytest.raises(UserError, match="unit 7: 3 workers were lost"):
        dealer.lost("last")


def test_two_processes_write_the_same_bytes(alone, demo_corpus, tmp_path):
    build(demo_corpus, tmp_path / "two", **TINY, **TWO)
    assert files_of(tmp_path / "two", "**/*.tar") == files_of(alone, "**/*.tar")
    assert list(ledgers(tmp_path / "two")) == list(ledgers(alone))
    assert not list((tmp_path / "two").glob(".tmp*"))
    assert not multiprocessing.active_children()


def test_a_clip_that_is_slow_to_come_delays_its_own_unit_alone(alone, demo_corpus, tmp_path):
    """The other two units are committed while it is awaited, and all bytes are those of an undelayed build."""
    from preprocess.demo.corpus import BASE_URL

    output, until = tmp_path / "slow", threading.Event()
    first = open_plan(open_storage(alone)).unit(0)
    name = next(each.record.url for each in first if each.record.url).rpartition("/")[2]
    seen = []

    def watch():
        deadline = time.monotonic() + 50
        while len(seen) < 2 and time.monotonic() < deadline:
            seen[:] = sorted(int(path.stem[-6:]) for path in output.glob("latents/shard-*.json"))
            time.sleep(0.05)
        until.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with served_after(demo_corpus, lambda path: name not in path or until.wait(60)) as url:
        fetch = {"mirrors": {BASE_URL: url}, "timeout_seconds": 60.0}
        build_shards(prep(demo_corpus, output, **TINY, fetch=fetch), quiet=True)
    watcher.join()
    assert seen == [1, 2]
    assert files_of(output, "**/*.tar") == files_of(alone, "**/*.tar")


@pytest.mark.parametrize("decoders", [1, "auto"])
def test_times_with_a_heavy_tail_change_no_byte(alone, demo_corpus, tmp_path, decoders):
    """Lognormal times: clips come in another order than that of the plan, and the tars are those of an even server."""
    from preprocess.demo.corpus import BASE_URL

    came = []

    def wait(path):
        time.sleep(min(2.0, float(np.random.default_rng(zlib.crc32(path.encode())).lognormal(-1.5, 1.5))))
        came.append(path.rpartition("/")[2])

    with served_after(demo_corpus, wait) as url:
        config = prep(demo_corpus, tmp_path, **TINY, fetch={"mirrors": {BASE_URL: url}}, engine={"decoders": decoders})
        build_shards(config, quiet=True)
    plan = open_plan(open_storage(tmp_path))
    planned = [each.record.url.rpartition("/")[2] for each in plan.candidates() if each.record.url]
    assert sorted(set(came)) == sorted(planned) and came != planned
    assert files_of(tmp_path, "**/*.tar") == files_of(alone, "**/*.tar")
    assert list(ledgers(tmp_path)) == list(ledgers(alone))


def test_clips_are_fetched_while_the_encoder_is_loaded(alone, demo_corpus, tmp_path, monkeypatch):
    from preprocess.demo.corpus import BASE_URL
    from preprocess.encoders import encoders

    came, load = threading.Event(), encoders.load_vae_encoder

    def load_late(config):
        assert came.wait(60), "no clip was asked for before the encoder was there"
        return load(config)

    monkeypatch.setattr(encoders, "load_vae_encoder", load_late)
    with served_after(demo_corpus, lambda path: came.set()) as url:
        build_shards(prep(demo_corpus, tmp_path, **TINY, fetch={"mirrors": {BASE_URL: url}}), quiet=True)
    assert files_of(tmp_path, "**/*.tar") == files_of(alone, "**/*.tar")


@pytest.mark.parametrize("part", ["load", "load_tokenizer", "load_vae_encoder"])
def test_an_encoder_that_cannot_be_loaded_ends_the_build_at_once(demo_corpus, tmp_path, monkeypatch, part):
    """Clips are being fetched and decoded meanwhile; none of them waits for the encoder for ever."""
    from preprocess.build.worker import UnitWorker
    from preprocess.demo.corpus import BASE_URL
    from preprocess.encoders import encoders

    came = threading.Event()

    def fail(config):
        came.wait(60)
        time.sleep(0.5)
        raise UserError("no such weights")

    monkeypatch.setattr(UnitWorker if part == "load" else encoders, part, fail)
    threads = threading.active_count()
    with served_after(demo_corpus, lambda path: came.set()) as url:
        config = prep(demo_corpus, tmp_path, **TINY, fetch={"mirrors": {BASE_URL: url}})
        with pytest.raises(UserError, match="no such weights"):
            build_shards(config, quiet=True)
    assert threading.active_count() == threads
    assert not list(tmp_path.glob(".tmp*")) and not list(tmp_path.glob("latents/*"))


def test_the_text_pass_uses_every_device_and_writes_the_same_bytes(alone, demo_corpus, tmp_path, monkeypatch):
    """A process each, one caption at a time; the null embeddings are handed out as a unit, once."""
    from preprocess.build import text_pass

    output, ran = tmp_path / "text", []
    real = text_pass.run_processes

    def run_processes(config, devices, units, *arguments, **handlers):
        units = list(units)
        ran.append((tuple(devices), units))
        real(config, devices, units, *arguments, **handlers)

    monkeypatch.setattr(text_pass, "run_processes", run_processes)
    build(demo_corpus, output, part=Part("latents"), **TINY)
    build(demo_corpus, output, part=Part("text"), **TINY, **TWO)
    assert ran == [(("cpu", "cpu"), [NULL_UNIT, 0, 1, 2])]
    assert files_of(output, "**/*.tar") == files_of(alone, "**/*.tar")
    assert not multiprocessing.active_children()


def test_a_text_set_is_continued_in_the_precision_it_was_begun_in(demo_corpus, tmp_path, monkeypatch):
    """On a V100 `auto` would be fp32, and half a set of each is no set."""
    output = tmp_path / "out"
    build(demo_corpus, output, part=Part("latents"), **TINY)
    build(demo_corpus, output, part=Part("text", range(1)), **TINY)
    monkeypatch.setattr("preprocess.encoders.encoders.computes_bf16", lambda device: False)
    build(demo_corpus, output, part=Part("text"), **TINY)
    identity = json.loads((output / "dataset.json").read_text())["text_sets"]["default"]["identity"]
    assert identity["text_encoder"]["precision"] == "bf16"
    assert not verify(open_storage(output), "deep").problems


def test_parts_of_a_build_make_the_whole(alone, demo_corpus, tmp_path):
    """As a Slurm array and a second machine would: latents by ranges, in any order, then text, then nothing is left."""
    output = tmp_path / "parts"
    for units in (range(2, 9), range(2)):
        counts = build(demo_corpus, output, part=Part("latents", units), **TINY)
        assert counts["units"]["latents"] == len(committed_units(open_storage(output), "latents"))
    assert not (output / "text").exists()
    assert "accepted" not in (output / "dataset.json").read_text()  # no process of an array knows the totals
    build(demo_corpus, output, part=Part("text", range(1, 2)), **TINY)
    assert committed_units(open_storage(output), "text/default") == {1}
    build(demo_corpus, output, **TINY)
    assert files_of(output, "**/*.tar") == files_of(alone, "**/*.tar")
    assert not verify(open_storage(output), "deep").problems


def test_text_before_latents_and_units_beyond_the_plan_are_refused(alone, demo_corpus, tmp_path):
    with pytest.raises(UserError, match="no finished latents"):
        build(demo_corpus, tmp_path / "out", part=Part("text"), **TINY)
    with pytest.raises(UserError, match=r"--unit-range 3:9: no unit") as caught:
        build(demo_corpus, tmp_path / "out", part=Part(None, range(3, 9)), **TINY)
    assert "A < 3" in str(caught.value)


@pytest.mark.parametrize("text", ["5", "5:", ":5", "5:5", "6:5", "-1:3", "a:b"])
def test_a_bad_range_is_named(text):
    told = CliRunner().invoke(main, ["build-shards", "config.yaml", "--unit-range", text])
    assert told.exit_code == 2 and "expected A:B" in told.output


def test_an_unknown_device_of_a_list_is_the_users_error(demo_corpus, tmp_path):
    with pytest.raises(UserError, match=r"abacus"):
        build(demo_corpus, tmp_path / "out", **TINY, engine={"devices": ["abacus", "cpu"]})
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_that_is_killed_is_told_and_costs_its_open_units(alone, demo_corpus, tmp_path):
    """SIGKILL, as the kernel does when memory runs out, of a process that has work; the same command then resumes."""
    from preprocess.build import processes

    output, killed = tmp_path / "out", threading.Event()
    config = prep(demo_corpus, output, **TINY, **TWO)

    def kill(clip):
        """At the first row. Who wrote it cannot be done: it waits for a clip that is sent afterwards."""
        for child in multiprocessing.active_children():
            if not killed.is_set():
                os.kill(child.pid, signal.SIGKILL)
        killed.set()

    from preprocess.build.dataset_info import grow_info
    from preprocess.build.worker import UnitWorker
    from preprocess.demo.corpus import BASE_URL
    from preprocess.plan.freeze import ensure_plan

    storage = open_storage(output)
    plan = ensure_plan(storage, config)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    withheld = [each.record.url for unit in range(3) for each in plan.unit(unit) if each.record.url]
    name = withheld[-1].rpartition("/")[2]
    with (
        served_after(demo_corpus, lambda path: name not in path or killed.wait(60)) as url,
        pytest.raises(UserError, match="on cpu was ended by SIGKILL"),
    ):
        mirrored = config.model_copy(update={"fetch": config.fetch.model_copy(update={"mirrors": {BASE_URL: url}})})
        processes.run_processes(
            mirrored, ["cpu", "cpu"], range(3), scratch, UnitWorker,
            on_description=lambda about: grow_info(storage, plan, identity=about.identity, config=config, note=None),
            on_row=kill, on_unit=lambda unit: None,
        )  # fmt: skip
    assert not multiprocessing.active_children()
    build(demo_corpus, output, **TINY, **TWO)
    assert files_of(output, "**/*.tar") == files_of(alone, "**/*.tar")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_build(demo_corpus, tmp_path, number):
    """SIGTERM ends the children cleanly; after a SIGKILL they notice by themselves that nobody asks any more."""
    import psutil
    from prep_runs import start_build

    output = tmp_path / "out"
    process = start_build(demo_corpus, output, tmp_path / "config.yaml", **TINY, **TWO)
    deadline = time.monotonic() + 400
    while not list(output.glob("latents/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    said, _ = process.communicate(timeout=100)
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=60)
    assert children and not alive
    if number == signal.SIGTERM:
        assert process.returncode == 143 and not list(output.glob(".tmp*"))
