"""`wanprep plan --probe N`: buckets by the files themselves."""

import json

import pytest
import yaml
from click.testing import CliRunner
from prep_runs import prep_values

from preprocess.cli.main import main
from preprocess.config import PrepConfig
from preprocess.demo.corpus import BASE_URL
from preprocess.demo.server import served
from preprocess.forecast.probe_some import describe_probe, probe_clips
from preprocess.plan.freeze import freeze_plan
from shards.config import validate_config
from shards.storage import open_storage

SIZES = [{"width": 832, "height": 480}, {"width": 480, "height": 832}]


@pytest.fixture
def values(demo_corpus, tmp_path):
    """values(max_upscale) -> a config over the demo corpus, which is served meanwhile."""
    with served(demo_corpus) as url:

        def write(max_upscale):
            buckets = {"sizes": SIZES, "max_upscale": max_upscale}
            return prep_values(demo_corpus, tmp_path / "out", buckets=buckets, fetch={"mirrors": {BASE_URL: url}})

        yield write


def test_every_clip_looked_at_has_an_outcome(values, tmp_path):
    config = validate_config(PrepConfig, values(4.0), origin="test")
    plan = freeze_plan(open_storage(tmp_path / "out"), config)
    (tmp_path / "scratch").mkdir()
    seen = probe_clips(plan, config, 10_000, tmp_path / "scratch")
    assert seen["clips"] == plan.num_candidates
    assert sum(seen["by_bucket"].values()) + sum(seen["refused_by"].values()) == seen["clips"]
    assert seen["estimate_by_bucket"] == seen["by_bucket"]
    assert seen["by_bucket"]["832×480"] > seen["by_bucket"]["480×832"] > 0
    assert {reason.split("/")[0] for reason in seen["refused_by"]} == {"fetch", "probe"}
    assert list((tmp_path / "scratch").iterdir()) == []
    assert "832×480" in "\n".join(describe_probe(seen))


def test_a_few_clips_are_scaled_to_the_plan(values, tmp_path):
    config = validate_config(PrepConfig, values(4.0), origin="test")
    plan = freeze_plan(open_storage(tmp_path / "out"), config)
    seen = probe_clips(plan, config, 3, tmp_path)
    assert seen["clips"] == 3
    total = sum(seen["estimate_by_bucket"].values()) + seen["estimate_refused"]
    assert abs(total - plan.num_candidates) <= 2


def test_what_the_limit_on_upscaling_excludes_is_seen(values, tmp_path):
    path = tmp_path / "prep.yaml"
    path.write_text(yaml.safe_dump(values(1.0)), encoding="utf-8")
    result = CliRunner().invoke(main, ["plan", str(path), "--probe", "50", "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    probed = json.loads(result.output)["probed"]
    assert probed["refused_by"]["bucket/too-small"] > 0
    assert sum(probed["by_bucket"].values()) < probed["clips"]
