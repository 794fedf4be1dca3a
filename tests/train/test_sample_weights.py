"""`data.weights`: how often a sample is seen, which samples a glob stands for, and what is said of it."""

import json
import logging
import math
import re
import shutil
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import zstandard
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from shards_data import write_dataset
from train_runs import make_config, read_metrics

from shards.console import LOG
from shards.errors import ShardDamage, UserError
from shards.read.dataset import open_dataset
from train.cli.main import main
from train.config.train import run_identity
from train.data.loader import select_samples
from train.data.sampler import START, Order, Position
from train.data.weights import expected_shares, make_order, sample_weights
from train.estimate.plan import read_sizes
from train.loop import fit
from train.report.page import summarise, write_run_report
from train.report.read_run import read_run


class Sample(NamedTuple):
    key: str
    frames: int
    height: int
    width: int


def samples(*counts: int) -> list[Sample]:
    return [Sample(f"c{size}-{n}", 17 + 4 * size, 96, 160) for size, count in enumerate(counts) for n in range(count)]


def walk(order: Order, num_epochs: int) -> list[tuple[int, tuple[int, ...]]]:
    position, batches = START, []
    while (chosen := order.batch(position)).epoch < num_epochs:
        batches.append((chosen.epoch, chosen.ordinals))
        position = order.next(position)
    return batches


decimals = st.integers(1, 50).map(lambda tenths: Fraction(tenths, 10))


@given(st.lists(st.integers(1, 25), min_size=1, max_size=3), st.data(), st.integers(1, 6), st.integers(0, 2**63 - 1))
@settings(max_examples=80, deadline=None)
def test_shares_are_exact_over_epochs(counts, data, global_batch, seed):
    """Floor or ceil of e·w uses after e epochs, whatever the sizes and weights; less than a batch waits."""
    items = samples(*counts)
    weights = [data.draw(st.sampled_from([Fraction(1), Fraction(5, 2), data.draw(decimals)])) for _ in items]
    if max(counts) < global_batch:
        return
    order = Order(items, seed, global_batch, weights)
    num_epochs = data.draw(st.integers(1, 12))
    batches = walk(order, num_epochs)
    assert all(len(batch) == global_batch for _, batch in batches)
    used = Counter(ordinal for _, batch in batches for ordinal in batch)
    for size, count in enumerate(counts):
        own = [ordinal for ordinal, item in enumerate(items) if item.frames == 17 + 4 * size]
        if count < global_batch:
            assert not any(used[ordinal] for ordinal in own)
            continue
        assert all(used[ordinal] <= math.ceil(num_epochs * weights[ordinal]) for ordinal in own)
        missing = sum(max(0, math.floor(num_epochs * weights[ordinal]) - used[ordinal]) for ordinal in own)
        assert missing < global_batch
    for step, position in enumerate(positions(order, 20), start=1):
        assert order.batch(order.position_of_step(step)) == order.batch(position)


def positions(order: Order, count: int) -> list[Position]:
    found = [START]
    while len(found) < count:
        found.append(order.next(found[-1]))
    return found


def test_each_epoch_has_a_sample_floor_or_ceil_times():
    order = Order(samples(40), 7, 1, [Fraction(5, 2)] * 20 + [Fraction(1, 4)] * 20)
    by_epoch = [Counter() for _ in range(8)]
    for epoch, batch in walk(order, 8):
        by_epoch[epoch].update(batch)
    for ordinal in range(20):
        assert {uses[ordinal] for uses in by_epoch} == {2, 3} and sum(uses[ordinal] for uses in by_epoch) == 20
        assert {uses[20 + ordinal] for uses in by_epoch} == {0, 1} and sum(uses[20 + ordinal] for uses in by_epoch) == 2
    assert len({by_epoch[0][ordinal] for ordinal in range(20)}) == 2, "by the sample's hash, not all at once"


def test_weights_of_one_change_nothing_and_keys_decide_not_places():
    items = samples(20, 9)
    assert walk(Order(items, 3, 4, [Fraction(1)] * 29), 4) == walk(Order(items, 3, 4), 4)
    weights = [Fraction(n % 5 + 1, 2) for n in range(29)]
    forwards, backwards = Order(items, 3, 4, weights), Order(items[::-1], 3, 4, weights[::-1])
    for (_, ours), (_, theirs) in zip(walk(forwards, 4), walk(backwards, 4), strict=True):
        assert [items[ordinal].key for ordinal in ours] == [items[::-1][ordinal].key for ordinal in theirs]


def test_uses_of_a_sample_are_apart_in_an_epoch():
    order = Order(samples(50), 1, 1, [Fraction(4)] * 50)
    line = [int(each) for each in order._permutation(0, 3)]
    quarters = [Counter(line[start : start + 50]) for start in range(0, 200, 50)]
    near = sum(abs(uses[ordinal] - 1) for uses in quarters for ordinal in range(50))
    assert near < 40  # at random it is 126


def test_an_epoch_without_a_batch_is_passed_over():
    order = Order(samples(4), 5, 4, [Fraction(1, 10)] * 4)
    found = positions(order, 5)
    epochs = [order.batch(position).epoch for position in found]
    assert epochs[0] < 10 and [later - earlier for earlier, later in pairwise(epochs)] == [10] * 4
    assert all(sorted(order.batch(position).ordinals) == [0, 1, 2, 3] for position in found)


# --- globs over a real dataset --------------------------------------------------------------------------------------


def plan_lines(tags: dict[str, list[str]]) -> bytes:
    """A plan's object as stage 1 writes it: frames of lines."""
    records = (
        {"clip_id": clip, "source": "s"} | ({"keywords": words} if words else {}) for clip, words in tags.items()
    )
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return b"".join(compressor.compress(b"".join(part)) for part in (lines[:5], lines[5:]))


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tagged")
    tags = {f"clip-{n}": ["mood=calm", "sea"] if n % 4 == 0 else [] for n in range(24)}
    write_dataset(root, scratch=tmp_path_factory.mktemp("scratch"), plan=plan_lines(tags))
    return root


def test_globs_mean_clips_categories_and_tags_and_multiply(tagged: Path):
    dataset = open_dataset(tagged)
    ordinals = list(range(len(dataset)))
    weights = {"category:new*": 2.0, "tag:mood=c?lm": 0.5, "clip-1*": 3.0, "clip:clip-0": 0.1}
    for ordinal, weight in zip(ordinals, sample_weights(dataset, ordinals, weights), strict=True):
        sample = dataset.samples[ordinal]
        expected = Fraction(1)
        expected *= 2 if sample.category == "news" else 1
        expected *= Fraction(1, 2) if int(sample.clip_id[5:]) % 4 == 0 else 1
        expected *= 3 if sample.clip_id.startswith("clip-1") else 1
        expected *= Fraction(1, 10) if sample.clip_id == "clip-0" else 1
        assert weight == expected


def test_a_glob_that_matches_nothing_is_named_with_what_is_there(tagged: Path):
    dataset = open_dataset(tagged)
    for glob, near in (("category:mews", "'news'"), ("tag:see", "'sea'"), ("clap-1", "'clip-1'")):
        with pytest.raises(UserError, match=f"{glob}.* matches none of 24 samples to train on") as caught:
            sample_weights(dataset, range(24), {glob: 2.0})
        assert near in str(caught.value)
    with pytest.raises(UserError, match=r"is 0\.0001"):
        sample_weights(dataset, range(24), {"category:news": 0.01, "*": 0.01})


def test_zero_leaves_samples_out_of_the_training_alone(tagged: Path, tmp_path: Path):
    config = make_config(tagged, tmp_path, data__weights={"category:news": 0.0, "tag:sea": 2.0})
    dataset = open_dataset(tagged)
    every, held_out = select_samples(dataset, make_config(tagged, tmp_path).data)
    ordinals, same = select_samples(dataset, config.data)
    assert same == held_out
    assert ordinals == [ordinal for ordinal in every if dataset.samples[ordinal].category != "news"]
    with pytest.raises(UserError, match="leave none"):
        select_samples(dataset, make_config(tagged, tmp_path, data__weights={"*": 0.0}).data)
    order = make_order(dataset, ordinals, config)
    shares = {share.glob: share for share in expected_shares(dataset, ordinals, order, config.data.weights)}
    assert shares["category:news"].seen == 0
    sea = shares["tag:sea"]
    assert sea.seen == pytest.approx(2 * sea.samples / (1 + sea.samples))


def test_a_plan_that_is_not_the_frozen_one_is_damage(tagged: Path, tmp_path: Path):
    root = tmp_path / "copy"
    shutil.copytree(tagged, root)
    (root / "plan" / "gen-000.jsonl.zst").write_bytes(plan_lines({"clip-1": ["sea"]}))
    with pytest.raises(ShardDamage, match="sha256"):
        sample_weights(open_dataset(root), range(24), {"tag:sea": 2.0})


def test_an_unset_weight_is_in_no_identity(tiny_shards: Path, tmp_path: Path):
    plain = make_config(tiny_shards, tmp_path)
    assert "weights" not in run_identity(plain)["data"]
    weighted = make_config(tiny_shards, tmp_path, data__weights={"*": 2.0})
    assert run_identity(weighted)["data"].pop("weights") == {"*": 2.0}
    with pytest.raises(UserError, match="weights"):
        make_config(tiny_shards, tmp_path, data__weights={"*": -1.0})


def test_a_weighted_run_resumes_exactly_and_says_its_shares(tagged: Path, tmp_path: Path, caplog):
    changes = {"data__weights": {"category:news": 3.0, "tag:sea": 0.5}, "data__validation_fraction": 0.0}
    with caplog.at_level(logging.INFO, LOG.name):  # as the command does
        fit(make_config(tagged, tmp_path / "whole", max_steps=30, **changes))
    log = (tmp_path / "whole" / "logs" / "rank-0.log").read_text()
    assert re.search(r"data\.weights: category:news × 3: .* of the training expected\n", log)
    fit(make_config(tagged, tmp_path / "parts", max_steps=11, **changes))
    fit(make_config(tagged, tmp_path / "parts", max_steps=30, data__workers=3, **changes))
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")
    with pytest.raises(UserError, match="weights"):
        other = changes | {"data__weights": {"category:news": 2.0, "tag:sea": 0.5}}
        fit(make_config(tagged, tmp_path / "parts", max_steps=31, **other))

    run = read_run(tmp_path / "whole")
    seen = Counter(key for line in read_metrics(tmp_path / "whole") for key in line["keys"])
    dataset = open_dataset(tagged)
    news = sum(uses for key, uses in seen.items() if dataset.samples[dataset.ordinal(key)].category == "news")
    result = CliRunner().invoke(main, ["report", str(tmp_path / "whole"), "--json"], catch_exceptions=False)
    share = json.loads(result.output)["weights"][0]
    assert share["glob"] == "category:news" and share["real"] == pytest.approx(news / sum(seen.values()))
    assert share["real"] == pytest.approx(share["expected"], abs=0.06) and share["expected"] > share["samples"] + 0.1
    write_run_report(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "category:news" in page and f"{100 * share['real']:.1f} %" in page
    assert summarise(run, _levels(run))["weights"] is None  # without the dataset
    # Held-out clips have no weight: globs that mean nothing in another dataset do not matter there.
    write_dataset(tmp_path / "other", prefix="other", scratch=tmp_path / "scratch")
    arguments = ["evaluate", str(tmp_path / "whole"), str(tmp_path / "other"), "-o", "data.validation_fraction=0.2"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def _levels(run):
    from train.report.curves import look_up_levels

    return look_up_levels(run.steps, run.config)


def test_the_plan_counts_sizes_by_weight(tagged: Path, tmp_path: Path):
    """Images are the samples of one frame; `clip-3` and `clip-7` are of them."""
    plain, _, _ = read_sizes(make_config(tagged, tmp_path), ())
    weighted, _, _ = read_sizes(make_config(tagged, tmp_path, data__weights={"category:news": 5.0}), ())
    assert sum(size.share for size in weighted) == pytest.approx(1) == sum(size.share for size in plain)
    assert [size.bucket for size in weighted] == [size.bucket for size in plain] and weighted != plain
