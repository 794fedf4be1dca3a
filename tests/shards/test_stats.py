"""`wanshards stats`: what is planted is named, what is sound is left in peace, and no record is lost on the way."""

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from click.testing import CliRunner
from s3_servers import BUCKET, serve
from stats_data import CHANNELS, SAMPLES, clip_name, key_of, vae_like, write_latents

from shards.cli import main
from shards.errors import UserError
from shards.format.keys import clip_hash
from shards.read.units import read_units
from shards.stats import drift
from shards.stats import stats as stats_module
from shards.stats.counter import MAX_LABELS, OTHERS, Histograms
from shards.stats.drift import find_references
from shards.stats.duplicates import find_alike, find_equal
from shards.stats.features import MAX_ELEMENTS, as_float32, latent_features, row_step
from shards.stats.stats import dataset_stats
from shards.stats.unit import latent_unit, script_of
from shards.storage import open_storage


def _stats(tmp_path, plant=None, num_units=6, **options):
    root = tmp_path / "root"
    write_latents(root, num_units, plant, scratch=tmp_path / "scratch", **options)
    return dataset_stats(root)


def _codes(found, *severities):
    return [item["code"] for item in found["findings"] if not severities or item["severity"] in severities]


def test_a_sound_dataset_has_no_findings(tmp_path):
    found = _stats(tmp_path)
    assert found["findings"] == []
    assert found["latents"]["samples"] == 6 * SAMPLES
    assert all(abs(row["mean"]) < 0.2 and 0.8 < row["std"] < 1.2 for row in found["latents"]["channels"])


def test_a_channel_shifted_in_one_shard_is_named(tmp_path):
    def shift(unit, place, latent):
        if unit == 3:
            latent[17] += 1.0
        return latent

    found = _stats(tmp_path, shift, samples=24)
    (finding,) = found["findings"]
    assert finding["code"] == "shard-drift"
    assert "unit 3" in finding["what"]
    assert "mean of channel 17" in finding["what"]
    assert finding["where"][0].startswith("latents/shard-000003-")


@pytest.mark.parametrize("by", [1.3, 0.8])
def test_a_channel_shifted_everywhere_is_named(tmp_path, by):
    def shift(unit, place, latent):
        latent[5] += by
        return latent

    found = _stats(tmp_path, shift)
    assert _codes(found) == ["channel-off"]
    assert "channel 5 has mean" in found["findings"][0]["what"]
    assert found["findings"][0]["severity"] == "bad"


def test_a_wrong_deviation_everywhere_is_named_but_not_held_against_random_weights(tmp_path):
    found = _stats(tmp_path, lambda unit, place, latent: latent * 3, notes={"encoders": "random weights"})
    assert _codes(found) == ["channel-off"] * CHANNELS
    assert {item["severity"] for item in found["findings"]} == {"info"}


@pytest.mark.parametrize("by_channel", [False, True])
def test_ten_constant_latents_are_counted_and_named(tmp_path, by_channel):
    def flat(unit, place, latent):
        if place < 5 and unit in (1, 4):
            latent[:] = np.arange(CHANNELS)[:, None, None, None] / 10 if by_channel else 0.25
        return latent

    found = _stats(tmp_path, flat)
    finding = next(item for item in found["findings"] if item["code"] == "latent-constant")
    assert (finding["severity"], finding["num"]) == ("bad", 10)
    assert set(finding["where"]) <= {key_of(unit, place) for unit in (1, 4) for place in range(5)}
    assert found["duplicates"] == [], "constant latents have no pictures to be alike in"


def test_latents_that_are_not_finite_are_named(tmp_path):
    def broken(unit, place, latent):
        if (unit, place) == (2, 7):
            latent[40, 4, 11, 19] = np.inf
        return latent

    found = _stats(tmp_path, broken)
    assert _codes(found) == ["latent-not-finite"]
    assert found["findings"][0]["where"] == [key_of(2, 7)]


def test_a_shard_of_another_vae_is_named_whatever_its_identity_says(tmp_path):
    mix = np.linalg.qr(np.random.default_rng(9).standard_normal((CHANNELS, CHANNELS)))[0]

    def other(unit, place, latent):
        if unit != 4:
            return latent
        # Another space of the same size: other axes, other scales, less smooth; its identity is the dataset's.
        rng = np.random.default_rng(place)
        noise = 0.8 * rng.standard_normal(latent.shape)
        return (np.einsum("dc,cthw->dthw", mix, latent) + noise) * np.linspace(0.7, 1.6, CHANNELS)[:, None, None, None]

    found = _stats(tmp_path, other)
    (finding,) = [item for item in found["findings"] if item["severity"] == "bad"]
    assert finding["code"] == "other-vae"
    assert "unit 4" in finding["what"]


def test_the_same_pictures_under_two_ids_are_found(tmp_path):
    def copies(unit, place, latent):
        if (unit, place) == (5, 2):
            return vae_like(np.random.default_rng([0, 3]))  # byte for byte clip 0-3
        if (unit, place) == (4, 4):
            noise = np.random.default_rng(1).standard_normal(latent.shape)
            return vae_like(np.random.default_rng([1, 1])) + 0.1 * noise  # clip 1-1, compressed again
        return latent

    found = _stats(tmp_path, copies)
    assert _codes(found) == ["duplicate", "duplicate"]
    equal, near = found["duplicates"]
    assert equal["what"] == "the same latent"
    assert equal["clips"] == [clip_name(0, 3), clip_name(5, 2)]
    assert near["what"] == "nearly the same latent"
    assert near["clips"] == [clip_name(1, 1), clip_name(4, 4)]
    assert 0 < near["difference"] < 0.04


def test_a_sample_far_from_all_others_is_named(tmp_path):
    def odd(unit, place, latent):
        if (unit, place) == (0, 0):
            latent[30] *= 12
        return latent

    found = _stats(tmp_path, odd)
    (finding,) = found["findings"]
    assert (finding["code"], finding["where"]) == ("sample-outlier", [key_of(0, 0)])
    assert "channel 30" in finding["what"]


def test_every_record_is_somewhere_while_a_build_still_writes(tmp_path):
    root = tmp_path / "root"
    write_latents(root, 2, planned_units=5, scratch=tmp_path / "scratch")
    found = dataset_stats(root, cache=tmp_path / "cache")
    funnel = found["funnel"]
    assert funnel["records"] == 5 * 13 == funnel["accepted"] + funnel["rejected"] + funnel["waiting"]
    assert (funnel["accepted"], funnel["rejected"], funnel["samples"]) == (24, 2, 24)
    assert found["reasons"] == [
        {"stage": "fetch", "reason": "fetch-404", "count": 2, "retryable": 2,
         "examples": ["lost-1: HTTP 404", "lost-0: HTTP 404"]}
    ]  # fmt: skip
    write_latents(root, 5, first_unit=2, scratch=tmp_path / "scratch")
    assert dataset_stats(root, cache=tmp_path / "cache")["funnel"]["waiting"] == 0


def test_no_record_is_lost_from_sight_while_units_come_in(tmp_path):
    root, stop = tmp_path / "root", threading.Event()
    write_latents(root, 1, planned_units=9, scratch=tmp_path / "scratch")
    write_latents(tmp_path / "whole", 9, scratch=tmp_path / "scratch")
    # A build as readers see it: whole files only, each unit's commit last.
    whole = (tmp_path / "whole/latents").glob("shard-*")
    late = sorted(whole, key=lambda path: (path.name[:12], path.suffix == ".json"))

    def build():
        for path in late:
            if not (root / "latents" / path.name).exists():
                hidden = root / "latents" / f".tmp-{path.name}"
                hidden.write_bytes(path.read_bytes())
                hidden.replace(root / "latents" / path.name)
                stop.wait(0.02)

    writer, seen = threading.Thread(target=build), []
    writer.start()
    while not seen or seen[-1]["samples"] < 9 * SAMPLES:
        found = dataset_stats(root, cache=tmp_path / "cache")
        funnel = found["funnel"]
        assert funnel["records"] == 9 * 13 == funnel["accepted"] + funnel["rejected"] + funnel["waiting"]
        assert funnel["accepted"] == funnel["samples"] == found["latents"]["samples"]
        assert found["findings"] == []
        seen.append(funnel)
    stop.set(), writer.join()
    assert len({funnel["samples"] for funnel in seen}) > 2, "some were looked at while units came in"


def test_what_was_read_is_not_read_again_and_changes_nothing(tmp_path, monkeypatch):
    root, cache = tmp_path / "root", tmp_path / "cache"
    write_latents(root, 4, scratch=tmp_path / "scratch")
    plain = dataset_stats(root)
    read = []
    once = stats_module.latent_unit

    def counting(storage, commit, wanted=None):
        if len(read) == 2:
            raise KeyboardInterrupt  # stopped half way
        read.append(commit.unit)
        return once(storage, commit, wanted)

    monkeypatch.setattr(stats_module, "latent_unit", counting)
    with pytest.raises(KeyboardInterrupt):
        dataset_stats(root, cache=cache)
    read.clear()
    assert dataset_stats(root, cache=cache) == plain
    assert read == [2, 3]
    for path in sorted(cache.rglob("*.npz"))[:1]:
        path.write_bytes(b"no longer an archive")
    read.clear()
    assert dataset_stats(root, cache=cache, jobs=3) == plain
    assert len(read) == 1


def test_a_sample_of_n_is_n_the_same_ones_and_counts_all_records(tmp_path):
    root = tmp_path / "root"
    write_latents(root, 5, scratch=tmp_path / "scratch")
    found = dataset_stats(root, sample=20)
    assert found["sampled"] == {"asked": 20, "read": 20, "of": 60}
    assert found["latents"]["samples"] == 20
    assert found["funnel"]["samples"] == 60
    assert dataset_stats(root, sample=20) == found
    assert dataset_stats(root, sample=1000)["sampled"]["read"] == 60


def test_a_sample_of_none_is_refused(tmp_path):
    write_latents(tmp_path / "root", 1, scratch=tmp_path / "scratch")
    with pytest.raises(UserError, match="--sample 0"):
        dataset_stats(tmp_path / "root", sample=0)


def test_the_reference_is_of_the_same_samples_in_whatever_order_units_come(tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "REFERENCE_SAMPLES", 10)
    write_latents(tmp_path / "root", 4, scratch=tmp_path / "scratch")
    storage = open_storage(tmp_path / "root")
    units = [latent_unit(storage, stored.commit) for stored in read_units(storage, "latents", range(4))]
    rows = {key: row for unit in units for key, row in zip(unit.keys, unit.features, strict=True)}
    first = sorted(rows, key=lambda key: clip_hash(key, "stats"))[:10]
    expected = np.median([rows[key] for key in first], axis=0)
    for order in (units, units[::-1]):
        reference = find_references(order)[False]
        assert reference.num_samples == 10
        np.testing.assert_array_equal(reference.median, expected)


def test_damage_is_a_finding_and_the_rest_is_counted(tmp_path):
    root = tmp_path / "root"
    write_latents(root, 3, scratch=tmp_path / "scratch")
    tar = next((root / "latents").glob("shard-000001-*.tar"))
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    next((root / "latents").glob("shard-000002-*.tar")).unlink()
    found = dataset_stats(root)
    assert all(code.startswith("latent-damaged") for code in _codes(found, "bad"))
    assert sum(item["num"] for item in found["findings"]) == 13
    assert found["latents"]["samples"] == 23


def test_the_text_is_counted(tiny_shards):
    found = dataset_stats(tiny_shards)
    captions = found["captions"]
    assert sum(captions["tokens"]["counts"]) == sum(int(row["label"]) * row["count"] for row in captions["variants"])
    assert captions["scripts"][0]["label"] == "Latin"
    assert found["funnel"]["samples_with_text"] == 24
    words = CliRunner().invoke(main, ["stats", str(tiny_shards), "--no-cache"]).output
    first = next(place for place, count in enumerate(captions["tokens"]["counts"]) if count)
    edges = captions["tokens"]["edges"]
    assert f"{edges[first]} to {edges[first + 1]} tokens" in words


def test_over_s3_it_is_the_same(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with serve("moto", tmp_path / "server") as endpoint:
        root = f"s3://{BUCKET}/data?endpoint={endpoint}"
        write_latents(root, 2, scratch=tmp_path / "scratch")
        write_latents(tmp_path / "root", 2, scratch=tmp_path / "scratch")
        here, there = dataset_stats(tmp_path / "root"), dataset_stats(root, jobs=4)
    here.pop("root"), there.pop("root")
    assert here == there


def test_the_command_says_it_in_words_and_in_json(tmp_path):
    root = tmp_path / "root"
    write_latents(root, 4, lambda unit, place, latent: latent * (1 + 2 * (unit == 2)), scratch=tmp_path / "scratch")
    options = ["stats", str(root), "--cache", str(tmp_path / "cache")]
    words = CliRunner().invoke(main, options)
    assert words.exit_code == 0, words.output
    assert "records    52 = 52 candidates + 0 refused" in words.output
    assert "fetch/fetch-404" in words.output
    assert "other-vae" in words.output
    value = json.loads(CliRunner().invoke(main, [*options, "--json"]).stdout)
    assert value["funnel"]["records"] == 52
    assert CliRunner().invoke(main, [*options, "--check"]).exit_code == 1
    nothing = CliRunner().invoke(main, ["stats", str(tmp_path / "none"), "--no-cache"])
    assert nothing.exit_code == 2
    assert "no dataset here" in nothing.output
    unknown = CliRunner().invoke(main, [*options, "--text-set", "other"])
    assert unknown.exit_code == 2
    assert "text set 'other' is not in the dataset" in unknown.output


def test_stats_needs_neither_torch_nor_pillow(tmp_path):
    root = tmp_path / "root"
    write_latents(root, 1, scratch=tmp_path / "scratch")
    code = (
        f"from shards.stats.stats import dataset_stats; import sys; dataset_stats({str(root)!r});"
        "assert not {'torch', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_features_are_the_plain_formulas():
    rng = np.random.default_rng(0)
    latent = (rng.standard_normal((6, 3, 8, 10)) * 2 + 1).astype(np.float16)
    plain = latent.astype(np.float64)
    mean, std, smooth = latent_features(latent).values
    np.testing.assert_allclose(mean, plain.mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(std, plain.std((1, 2, 3)), rtol=1e-4)
    centred = plain - plain.mean((1, 2, 3), keepdims=True)
    expected = (centred[..., :-1] * centred[..., 1:]).mean((1, 2, 3)) / plain.var((1, 2, 3))
    np.testing.assert_allclose(smooth, expected, atol=1e-4)
    bits = (latent.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_allclose(latent_features(bits).values[0], mean, rtol=0.02)


def test_every_float16_is_read_as_what_it_is():
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert np.array_equal(as_float32(finite), finite.astype(np.float32))
    assert (np.abs(as_float32(every[~np.isfinite(every)])) >= 2**16).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_one_value_that_is_no_number_is_seen_in_every_type(value, dtype):
    latent = np.random.default_rng(0).standard_normal((4, 9, 50, 60)).astype(np.float32)
    stored = {"bfloat16": lambda x: (x.view(np.uint32) >> 16).astype(np.uint16)}.get(dtype, lambda x: x.astype(dtype))
    assert latent_features(stored(latent)).is_finite
    latent[3, 7, 41, 59] = value
    found = latent_features(stored(latent))
    assert not found.is_finite
    assert np.isfinite(found.values).all()


@pytest.mark.parametrize("frames", [1, 5, 13, 31])
@pytest.mark.parametrize(("height", "width"), [(30, 52), (52, 30), (44, 80), (80, 44), (6, 10)])
def test_rows_of_all_heights_are_looked_at(frames, height, width):
    elements = 48 * frames * height * width
    step = row_step(frames * height, height, elements)
    rows = range(0, frames * height, step)
    assert elements / MAX_ELEMENTS <= step <= 5 + 1.5 * elements / MAX_ELEMENTS
    counts = np.bincount([row % height * 4 // height for row in rows], minlength=4)
    assert counts.min() >= max(1, len(rows) // 8), "each quarter of the picture has its part"


def test_at_the_real_size_a_copy_compressed_again_is_near_and_strangers_are_far():
    first, other = (vae_like(np.random.default_rng(seed), (48, 13, 30, 52)) for seed in (1, 2))
    copy = first + 0.1 * np.random.default_rng(3).standard_normal(first.shape)
    prints = [latent_features(latent.astype(np.float16)).fingerprint for latent in (first, copy, other)]
    bits = np.unpackbits(prints, axis=1).reshape(3, 48, 4, 4)
    assert 0 < (bits[0] != bits[1]).mean() < 0.04
    assert 0.4 < (bits[0] != bits[2]).mean() < 0.6
    assert (np.abs(bits[0].mean(axis=(0, 2)) - 0.5) < 0.2).all(), "no quarter of the picture is left out"


def test_fingerprints_are_searched_without_pairs_and_find_what_pairs_find():
    rng = np.random.default_rng(3)
    prints = rng.integers(0, 256, (5000, 96), np.uint8)
    prints[4000] = prints[7]
    prints[4001] = prints[8]
    prints[4001, :3] ^= 7
    prints[4002] = 0
    prints[4003] = 0
    groups = find_alike(prints, [f"c{place}" for place in range(5000)])
    assert [group.members for group in groups] == [[7, 4000], [8, 4001]]
    assert find_alike(prints, ["one clip"] * 5000) == []
    assert find_equal(["a", "", "a", "", "b"], list("vwxyz"))[0].members == [0, 2]


def test_a_tally_stays_small_and_survives_json():
    tally = Histograms()
    for place in range(3 * MAX_LABELS):
        tally.add("many", place, f"example {place}")
    counts = tally.counts("many")
    assert len(counts) == MAX_LABELS + 1
    assert counts[OTHERS] == 2 * MAX_LABELS
    assert tally.total("many") == 3 * MAX_LABELS
    assert Histograms.of(json.loads(json.dumps(tally.plain()))).plain() == tally.plain()


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("바닷가를 걷는 사람", "Hangul"),
        ("A man in 서울", "Latin"),
        ("海边 人", "Han"),
        ("12 34", "no letters"),
        (" ", "empty"),
    ],
)
def test_the_script_of_a_caption(text, script):
    assert script_of(text) == script


def test_a_dataset_without_a_sample_is_counted_too(tmp_path):
    root = tmp_path / "root"
    write_latents(root, 1, planned_units=2, scratch=tmp_path / "scratch")
    shutil.rmtree(root / "latents")
    found = dataset_stats(root)
    assert (found["funnel"]["samples"], found["funnel"]["waiting"]) == (0, 26)
    assert list(open_storage(root).list("latents/")) == []
