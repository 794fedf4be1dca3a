"""The Ray engine: the local build's bytes, whoever dies meanwhile; clear words where a cluster is not as it must be."""

import os
import signal
import sys

import psutil
import pytest
from prep_runs import TINY, build, files_of, prep

from preprocess.build.ray_engine import place_workers
from preprocess.pipeline import Part
from shards.check.verify import verify
from shards.errors import UserError
from shards.storage import open_storage

pytestmark = pytest.mark.timeout(900)  # a worker imports torch, two at a time, beside whatever else the machine does
ONE_EACH = {**TINY, "corpus": {"limit": 10}, "shards": {"unit_size": 1}}


def _add_node(cluster, **options):
    """Ray gives a node 30 seconds to start, which a machine that does much else may need more than once."""
    for _ in range(3):
        try:
            return cluster.add_node(**options)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    raise RuntimeError("no node of Ray's starts on this machine")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine, with room for one worker each; the driver is on neither's list of workers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 100 * 2**20}
    cluster = Cluster()
    _add_node(cluster, num_cpus=0, include_dashboard=False, **store)
    nodes = [_add_node(cluster, num_cpus=3, **store) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="ERROR")
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def ray_build(corpus, output, /, **sections):
    return build(corpus, output, engine={"kind": "ray"}, **sections)


def test_ray_writes_the_local_builds_bytes(cluster, demo_corpus, tmp_path):
    """By one worker; the long proofs below have two, and their deaths."""
    small = {**TINY, "corpus": {"limit": 3}}
    build(demo_corpus, tmp_path / "local", part=Part("latents"), **small)
    engine = {"kind": "ray", "ray": {"num_workers": 1}}
    counts = build(demo_corpus, tmp_path / "ray", part=Part("latents"), engine=engine, **small)
    assert files_of(tmp_path / "ray", "**/*.tar") == files_of(tmp_path / "local", "**/*.tar")
    assert counts["accepted"] + counts["rejected"] == counts["records"] and counts["waiting"] == 0
    assert not list((tmp_path / "ray").glob(".tmp*"))


def workers_of(node):
    """The processes on a node that run an actor of ours."""
    (raylet,) = node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children(recursive=True)
    return [each for each in children if "ray::Worker" in " ".join(each.cmdline())]


@pytest.mark.slow
def test_an_actor_then_a_node_killed_half_way_change_nothing(cluster, demo_corpus, tmp_path, monkeypatch, caplog):
    from preprocess.build.progress import PassProgress

    cluster, nodes = cluster
    build(demo_corpus, tmp_path / "local", **ONE_EACH)
    real, done, left = PassProgress.unit, [], list(nodes)

    def with_deaths(progress, unit):
        """The node that goes is the one whose actor was not killed: it does the units between."""
        real(progress, unit)
        if progress.title == "latents":
            done.append(unit)
            if len(done) == 2:
                struck = next(node for node in nodes if workers_of(node))
                os.kill(workers_of(struck)[0].pid, signal.SIGKILL)
                left.remove(struck)
            if len(done) == 5:
                cluster.remove_node(left.pop(), allow_graceful=False)

    monkeypatch.setattr(PassProgress, "unit", with_deaths)
    counts = ray_build(demo_corpus, tmp_path / "ray", **ONE_EACH)
    assert counts["waiting"] == 0 and sorted(done) == list(range(10))
    assert files_of(tmp_path / "ray", "**/*.tar") == files_of(tmp_path / "local", "**/*.tar")
    assert not verify(open_storage(tmp_path / "ray"), "deep").problems
    assert caplog.text.count("is lost") >= 2  # a replacement that was about to start on the dead node is a third


@pytest.mark.slow
def test_a_driver_that_is_stopped_is_started_again(cluster, demo_corpus, tmp_path, monkeypatch):
    from preprocess.build.progress import PassProgress

    build(demo_corpus, tmp_path / "local", part=Part("latents"), **ONE_EACH)
    real = PassProgress.unit

    def stop(progress, unit):
        real(progress, unit)
        raise KeyboardInterrupt

    monkeypatch.setattr(PassProgress, "unit", stop)
    with pytest.raises(KeyboardInterrupt):
        ray_build(demo_corpus, tmp_path / "ray", part=Part("latents"), **ONE_EACH)
    assert not list((tmp_path / "ray").glob(".tmp*"))
    before = files_of(tmp_path / "ray", "latents/*.json")
    assert 1 <= len(before) < 10
    monkeypatch.setattr(PassProgress, "unit", real)
    ray_build(demo_corpus, tmp_path / "ray", part=Part("latents"), **ONE_EACH)
    assert files_of(tmp_path / "ray", "**/*.tar") == files_of(tmp_path / "local", "**/*.tar")
    assert before.items() <= files_of(tmp_path / "ray", "latents/*.json").items()


def test_an_output_that_a_worker_does_not_see_is_refused(cluster, demo_corpus, tmp_path, monkeypatch):
    """The driver's mark is elsewhere, as where each machine has a folder of that name of its own."""
    from contextlib import contextmanager

    from preprocess.build import ray_engine

    @contextmanager
    def elsewhere(storage):
        yield ".tmp-ray-of-another-folder"

    monkeypatch.setattr(ray_engine, "_marked", elsewhere)
    with pytest.raises(UserError, match="does not see what the driver wrote") as caught:
        ray_build(demo_corpus, tmp_path / "out", corpus={"limit": 1})
    assert "s3://" in str(caught.value)


@pytest.mark.slow
def test_what_the_user_must_fix_on_a_worker_reaches_the_driver(cluster, demo_corpus, tmp_path):
    with pytest.raises(UserError, match=r"encoders\.checkpoint: '/no/such/folder'"):
        ray_build(demo_corpus, tmp_path / "out", corpus={"limit": 1}, encoders={"checkpoint": "/no/such/folder"})


def test_without_ray_it_says_what_to_install(demo_corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="Ray is not installed") as caught:
        ray_build(demo_corpus, tmp_path / "out", corpus={"limit": 1})
    assert "[prep,ray]" in str(caught.value)


def test_a_worker_goes_to_each_gpu_or_to_the_cores_where_there_is_none(tmp_path):
    config = prep(tmp_path, tmp_path)
    assert place_workers(config, [{"GPU": 4.0, "CPU": 20.0}, {"GPU": 1.0, "CPU": 44.0}]) == (5, 1, 5, "cuda")
    assert place_workers(prep(tmp_path, tmp_path, engine={"decoders": 2}), [{"GPU": 5.0, "CPU": 64.0}])[2] == 3
    assert place_workers(config, [{"CPU": 60.0}, {"CPU": 4.0}]) == (21, 0, 3, "cpu")
    on_cpu = prep(tmp_path, tmp_path, encoders={"device": "cpu"}, engine={"ray": {"num_cpus": 8, "num_workers": 3}})
    assert place_workers(on_cpu, [{"GPU": 5.0, "CPU": 64.0}]) == (3, 0, 8, "cpu")
    with pytest.raises(UserError, match="no machine of the Ray cluster has a GPU"):
        place_workers(prep(tmp_path, tmp_path, encoders={"device": "cuda"}), [{"CPU": 64.0}])
    with pytest.raises(UserError, match="a worker takes 3 cores, and the cluster has 2"):
        place_workers(config, [{"CPU": 2.0}])
