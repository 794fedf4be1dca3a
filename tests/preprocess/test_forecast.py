"""What `wanprep plan --gpu` foretells: the references' figures, what bounds a build, and what would shorten it."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from prep_runs import prep, prep_values

from preprocess.cli.main import main
from preprocess.config import PrepConfig
from preprocess.forecast.forecast import count_plan, describe_forecast, forecast
from preprocess.forecast.hardware import Hardware, find_hardware
from preprocess.plan.plan import Plan
from shards.config import validate_config
from shards.errors import UserError
from shards.gpus import GPUS, find_gpu, vae_encode_tflop


def a_plan(num_candidates, seconds_each=10.0, size=(1920, 1080)):
    """A plan of which only the counts are read."""

    declared = SimpleNamespace(width=size[0], height=size[1], count=num_candidates)
    generation = SimpleNamespace(
        num_candidates=num_candidates, declared_sizes=(declared,), declared_seconds=num_candidates * seconds_each,
        num_refused=0, num_beyond_limit=0, num_units=0, refused_by={}, superseded_by={}, frame_bytes=(),
        retried=(), num_new=num_candidates,
    )  # fmt: skip
    return Plan(None, (generation,))


def a_config(**sections):
    values = {
        "output": "out", "corpus": {"location": "corpus"},
        "buckets": {"sizes": [{"width": 1280, "height": 704}], "max_upscale": 1.0}, "window": {"num_frames": 49},
    }  # fmt: skip
    return validate_config(PrepConfig, {**values, **sections}, origin="test")


def foretell(plan, config, gpu="v100-32gb", gpus=2, mbit=1000.0, cores=8, probed=None, settled=None):
    counts = count_plan(plan, config) | ({"probed": probed} if probed else {})
    return forecast(plan, config, counts, Hardware(find_gpu(gpu), gpus, mbit, cores), len, settled)


@pytest.mark.parametrize(
    ("width", "height", "num_frames", "tflop"),
    [(1280, 704, 1, 4.2), (1280, 704, 17, 54.7), (1280, 704, 49, 155.6), (1280, 704, 121, 382.6), (832, 480, 49, 68.9)],
)
def test_the_closed_form_gives_the_counted_flops(width, height, num_frames, tflop):
    assert vae_encode_tflop(width, height, num_frames) == pytest.approx(tflop, rel=0.003)


def test_the_closed_form_is_what_the_real_architecture_takes():
    """Counted on the published sizes, on the meta device: nothing is computed."""
    import torch
    from diffusers import AutoencoderKLWan
    from torch.utils.flop_counter import FlopCounterMode

    from preprocess.encoders.vae_config import vae_arguments

    with torch.device("meta"):
        vae = AutoencoderKLWan(**vae_arguments())
        pixels = torch.empty(1, 3, 9, 480, 832)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(pixels)
    assert vae_encode_tflop(832, 480, 9) == pytest.approx(counter.get_total_flops() / 1e12, rel=0.005)


def test_160_000_clips_on_two_v100s_in_fp32_are_12_to_14_days():
    found = foretell(a_plan(160_000), a_config())
    assert found["samples"] == 160_000 and found["vae_mode"] == "fp32" and found["bound"] == "encode"
    assert 12 <= found["days"]["encode"] <= 14
    assert 4 <= found["encode_days_by_mode"]["fast"] <= 5.5  # 5 s a clip in fp16
    assert any("vae_precision=auto" in line for line in found["shorter"])
    assert found["disk_bytes"]["latents"] / 160_000 == pytest.approx(0.919 * 4.39e6, rel=0.03)


def test_text_is_forecast_as_it_is_done():
    """In fp32 where bf16 is emulated, and one caption at a time: never faster than its weights can be read."""
    plan = a_plan(160_000)
    auto = a_config(encoders={"text_precision": "auto"})
    assert foretell(plan, auto)["text_mode"] == "fp32" and foretell(plan, auto, gpu="h100")["text_mode"] == "bf16"
    # No caption is read from this plan: what is left is the weights, 5.68e9 of 2 bytes at 3.35e12 bytes a second.
    assert foretell(plan, auto, gpu="h100", gpus=1)["text_days"] == pytest.approx(160_000 * 3.39e-3 / 86_400, rel=0.1)
    assert foretell(plan, auto, gpus=4)["text_days"] == pytest.approx(
        foretell(plan, auto, gpus=2)["text_days"] / 2, 0.1
    )


def test_a_card_is_described_by_hand_or_by_what_differs():
    """The one table of GPUs serves both stages; a card that it does not know is described by three figures."""
    own = find_gpu("auto", memory_gib=48.0, tflops=312.0, bandwidth_gb=2039.0)
    assert (own.memory_gib, own.bandwidth_gb) == (48.0, 2039.0) and own.gemm_tflops == GPUS["a100-80gb"].gemm_tflops
    half = find_gpu("h100", tflops=989 / 2)
    assert half.vae_fast_tflops == GPUS["h100"].vae_fast_tflops / 2 and half.memory_gib == GPUS["h100"].memory_gib
    with pytest.raises(UserError, match="needs all of"):
        find_gpu("auto", tflops=100.0)


@pytest.mark.parametrize(
    ("options", "bound", "told"),
    [
        ({"mbit": 1.0}, "fetch", "fetch.mirrors"),
        ({"gpu": "h100", "gpus": 8, "cores": 1}, "decode", "more cores"),
        ({"gpu": "h100", "gpus": 1, "cores": 64}, "encode", "more GPUs"),
    ],
)
def test_what_bounds_it_is_named_with_what_helps(options, bound, told):
    found = foretell(a_plan(10_000), a_config(), **options)
    assert found["bound"] == bound == max(found["days"], key=found["days"].get)
    assert any(told in line for line in found["shorter"])


def test_a_settled_or_given_mode_is_what_is_foretold():
    plan = a_plan(1000)
    auto = a_config(encoders={"vae_precision": "auto"})
    assert foretell(plan, auto)["vae_mode"] == "fp32"
    assert foretell(plan, auto, settled="fp16")["days"]["encode"] < foretell(plan, auto)["days"]["encode"] / 2
    given = foretell(plan, a_config(encoders={"vae_precision": "fp16"}))
    assert given["vae_mode"] == "fp16" and not any("vae_precision" in line for line in given["shorter"])


def test_windows_unknown_sizes_and_probed_clips_are_counted():
    tiled = a_config(window={"num_frames": 49, "policy": "tile", "max_windows": 8})
    assert foretell(a_plan(100), tiled)["samples"] == 400  # 10 s hold four windows of 2.04 s
    assert foretell(a_plan(100, size=(0, 0)), a_config())["samples"] == 100
    assert foretell(a_plan(100, size=(640, 360)), a_config())["samples"] == 0  # too small for 1280×704
    probed = {"estimate_by_bucket": {"1280×704": 60}, "estimate_download_gib": 2.0}
    found = foretell(a_plan(100), a_config(), probed=probed)
    assert found["samples"] == 60 and found["download_bytes"] == 2 * 2**30
    assert "probed" in found["assumed"][0]


def test_an_unknown_gpu_is_named_before_the_corpus_is_read(tmp_path):
    told = CliRunner().invoke(main, ["plan", str(tmp_path / "none.yaml"), "--gpu", "v100-32"])
    assert told.exit_code == 2 and "did you mean v100-32gb?" in told.output
    with pytest.raises(UserError, match="not known"):
        foretell(a_plan(1), a_config(), gpu="abacus")


def test_the_command_says_it_to_people_and_to_programs(demo_corpus, tmp_path):
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(prep_values(demo_corpus, tmp_path / "out"), allow_unicode=True))
    asked = ["plan", str(path), "--gpu", "v100-32gb", "--gpus", "2", "--quiet"]
    told = CliRunner().invoke(main, asked)
    assert told.exit_code == 0, told.output
    for part in ("11 candidates", "download", "on disk", "2 × v100-32gb, bound by", "shorter", "assumed"):
        assert part in told.output
    found = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    assert found["candidates"] == 11 and found["forecast"]["gpus"] == 2
    assert 20 < found["forecast"]["caption_tokens"] <= 160
    assert describe_forecast(found["forecast"])[0].split()[2] == str(found["forecast"]["samples"])


def test_the_forecast_reads_connections_and_decoders_from_the_config():
    """10,000 clips of 3.75 MB, 0.7 s each on a connection of 50 Mbit/s; 0.85 s each on a core."""
    plan = a_plan(10_000)
    few = foretell(plan, a_config(fetch={"per_host": 2}), gpu="h100", gpus=1, cores=64)
    assert few["days"]["fetch"] == pytest.approx(10_000 * 0.7 / 2 / 86_400, rel=0.02) and few["connections"] == 2
    assert "network" in foretell(plan, a_config(fetch={"per_host": 64}), mbit=100.0)["fetch_bound_by"]
    decoding = foretell(plan, a_config(engine={"decoders": 1}), gpu="h200", gpus=4, cores=64)
    assert decoding["days"]["decode"] == pytest.approx(10_000 * 0.85 / 4 / 86_400, rel=0.02)
    auto = foretell(plan, a_config(), gpu="h200", gpus=4, cores=64)
    assert (auto["decoders"], auto["days"]["decode"]) == (15, pytest.approx(10_000 * 0.85 / 60 / 86_400, abs=6e-4))
    many = foretell(plan, a_config(engine={"decoders": 64}), gpu="h200", gpus=4, cores=64)
    assert many["days"]["decode"] == pytest.approx(10_000 * 0.85 / 64 / 86_400, abs=6e-4)


@pytest.mark.parametrize(
    ("sections", "options", "told"),
    [
        (
            {"fetch": {"per_host": 1}, "encoders": {"vae_precision": "fp16"}},
            {"gpu": "b200", "gpus": 1, "cores": 64},
            "fetch.per_host=4: 1 connections",
        ),
        (
            {"engine": {"decoders": 1}, "encoders": {"vae_precision": "fp16"}},
            {"gpu": "b200", "gpus": 1, "cores": 64},
            "engine.decoders=64",
        ),
    ],
)
def test_a_setting_that_bounds_the_build_is_what_is_suggested(sections, options, told):
    assert any(told in line for line in foretell(a_plan(10_000), a_config(**sections), **options)["shorter"])


def test_the_forecast_reads_the_devices_from_the_config():
    gpu = find_gpu("v100-32gb")
    two = a_config(engine={"devices": ["cuda:0", "cuda:3"]})
    assert find_hardware(two, gpu, False, None, None, 1000.0)[1:4] == (2, 1000.0, 8)
    with pytest.raises(UserError, match=r"--gpus 4, but the config encodes on cuda:0, cuda:3"):
        find_hardware(two, gpu, False, 4, None, 1000.0)
    assert find_hardware(a_config(encoders={"device": "cuda:1"}), gpu, False, None, 6, 1.0)[1:4] == (1, 1.0, 6)
    assert find_hardware(a_config(), gpu, False, 3, None, 1.0).num_gpus == 3
    # Ray spreads latents over the cluster; captions are embedded where the driver is.
    ray = a_config(engine={"kind": "ray", "ray": {"num_workers": 8}})
    hardware = find_hardware(ray, gpu, False, 16, None, 1000.0)
    assert (hardware.num_gpus, hardware.num_text_gpus) == (8, 1)
    found = forecast(a_plan(1000), ray, count_plan(a_plan(1000), ray), hardware, len)
    local = foretell(a_plan(1000), a_config(), gpus=8)
    assert found["text_days"] == pytest.approx(8 * local["text_days"], rel=0.05) and found["text_gpus"] == 1


MEASURED = {
    "fetch": {"seconds_a_clip": 4.0}, "decode": {"probe_seconds_a_clip": 0.1, "decode_seconds_a_window": 0.2},
    "encode": {"device": "cuda:0", "seconds_a_megapixel": 0.1}, "text": {"seconds_a_caption": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("gpu", [None, "h100"])
def test_what_was_measured_on_this_machine_takes_the_place_of_what_is_assumed(gpu):
    plan, config = a_plan(1000), a_config(captions={"variants": ["{object}"]})
    probed = {"estimate_by_bucket": {"1280×704": 1000}, "estimate_download_gib": 1.0, "measured": MEASURED}
    counts = count_plan(plan, config) | {"probed": probed}
    card = find_gpu(gpu) if gpu else None
    found = forecast(plan, config, counts, Hardware(card, 1, 1000.0, 3, is_here=True), len)
    decoders = 2 if card else 1  # without a GPU its cores are the encoder's
    assert found["days"] == {
        "fetch": pytest.approx(1000 * 4.0 / 16 / 86_400, abs=6e-4),
        "decode": pytest.approx(1000 * 0.3 / decoders / 86_400, abs=6e-4),
        "encode": pytest.approx(1000 * 1280 * 704 * 49 / 1e6 * 0.1 / 86_400, abs=6e-4),
    }
    assert found["text_days"] == pytest.approx(1000 * 2 * 2.0 / 86_400, abs=6e-4)
    assert found["gpu"] == (gpu or "cuda:0") and "measured on this machine" in found["assumed"][1]
    assert "4 s a clip, measured" in found["assumed"][0] and describe_forecast(found)


def test_another_card_is_not_taken_to_encode_as_this_machine_does():
    plan, config = a_plan(1000), a_config()
    probed = {"estimate_by_bucket": {"1280×704": 1000}, "estimate_download_gib": 1.0}
    before = foretell(plan, config, gpu="h100", probed=probed)
    found = foretell(plan, config, gpu="h100", probed=probed | {"measured": MEASURED})
    assert found["days"]["encode"] == before["days"]["encode"] and found["text_days"] == before["text_days"]
    assert found["days"]["decode"] < before["days"]["decode"] and "estimates, not measured" in found["assumed"][1]
    here = {**MEASURED, "fetch": {"not_measured": "no clip came over the network"}}
    assert (
        foretell(plan, config, probed=probed | {"estimate_download_gib": 0.0, "measured": here})["days"]["fetch"] == 0
    )


def test_without_gpu_nothing_is_foretold(demo_corpus, tmp_path):
    assert "forecast" not in count_plan(a_plan(3), prep(demo_corpus, tmp_path))
