"""`wanprep plan --probe N`: buckets by the files themselves."""

import json

import pytest
import yaml
from click.testing import CliRunner
from prep_runs import TINY, prep_values

from preprocess.cli.main import main
from preprocess.config import PrepConfig
from preprocess.demo.corpus import BASE_URL
from preprocess.demo.server import served
from preprocess.forecast.probe_some import can_forecast, describe_probe, probe_clips
from preprocess.plan.freeze import freeze_plan
from shards.config import validate_config
from shards.storage import open_storage

SIZES = [{"width": 832, "height": 480}, {"width": 480, "height": 832}]


@pytest.fixture
def values(demo_corpus, tmp_path):
    """values(max_upscale, …) -> a config over the demo corpus, which is served meanwhile; its encoders are not here."""
    with served(demo_corpus) as url:

        def write(max_upscale, sizes=SIZES, **sections):
            buckets = {"sizes": sizes, "max_upscale": max_upscale}
            sections = {"encoders": {"checkpoint": "/no/such"}, "fetch": {"mirrors": {BASE_URL: url}}, **sections}
            return prep_values(demo_corpus, tmp_path / "out", buckets=buckets, **sections)

        yield write


def test_every_clip_looked_at_has_an_outcome(values, tmp_path):
    config = validate_config(PrepConfig, values(4.0), origin="test")
    plan = freeze_plan(open_storage(tmp_path / "out"), config)
    (tmp_path / "scratch").mkdir()
    seen = probe_clips(plan, config, 10_000, tmp_path / "scratch", len)
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
    seen = probe_clips(plan, config, 3, tmp_path, len)
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


def test_what_each_stage_takes_here_is_measured_and_foretold(values, tmp_path):
    """The demonstration's small encoders are measured on the CPU; no GPU needs to be named then."""
    path = tmp_path / "prep.yaml"
    small = values(4.0, TINY["buckets"]["sizes"], encoders={}, engine={"decoders": 2}, window=TINY["window"])
    path.write_text(yaml.safe_dump(small), encoding="utf-8")
    found = json.loads(CliRunner().invoke(main, ["plan", str(path), "--probe", "50", "--json", "--quiet"]).output)
    measured = found["probed"]["measured"]
    assert measured["fetch"]["clips"] == 10 and measured["fetch"]["connections"] == 10
    assert measured["decode"]["decoders"] == 2 and measured["encode"]["windows"] == 3
    keys = (
        ("fetch", "seconds_a_clip"), ("fetch", "bytes_per_second"), ("decode", "probe_seconds_a_clip"),
        ("decode", "decode_seconds_a_window"), ("encode", "seconds_a_megapixel"), ("text", "seconds_a_caption"),
    )  # fmt: skip
    assert all(measured[stage][key] > 0 for stage, key in keys)
    assert found["forecast"]["gpu"] == "cpu" and found["forecast"]["gpus"] == 1
    told = CliRunner().invoke(main, ["plan", str(path), "--probe", "3", "--quiet"]).output
    for part in (
        "measured   on this machine:",
        "s a clip on each of",
        "s a megapixel",
        "s a caption on cpu",
        "1 × cpu",
    ):
        assert part in told, told


@pytest.mark.parametrize(
    ("encoders", "why"), [("/no/such", "encoders.checkpoint /no/such is not here"), (".", "this machine has no GPU")]
)
def test_what_cannot_be_measured_is_said(values, tmp_path, encoders, why):
    config = validate_config(PrepConfig, values(4.0, encoders={"checkpoint": encoders}), origin="test")
    plan = freeze_plan(open_storage(tmp_path / "out"), config)
    seen = probe_clips(plan, config, 2, tmp_path, len)
    assert why in seen["measured"]["encode"]["not_measured"] and "not measured: " in "\n".join(describe_probe(seen))
    assert not can_forecast(seen) and "not_measured" not in seen["measured"]["decode"]
