"""The loader: what a batch holds, and the traps that train wrong in silence."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from shards_data import flip_a_latent, write_dataset
from train_runs import make_config, read_metrics

from shards.console import LOG
from shards.errors import UserError
from shards.format.arrays import to_float32
from shards.read.dataset import open_dataset
from train.config.train import slots_per_rank
from train.data import loader as loader_module
from train.data.batch import pad_texts
from train.data.draws import draw_noise
from train.data.loader import Loader, plan_step, select_samples
from train.data.sampler import START, Order
from train.loop import fit

TEXT_LEN = 32


def open_loader(config, **position):
    dataset = open_dataset(config.data.root)
    ordinals, _ = select_samples(dataset, config.data)
    order = Order([dataset.samples[ordinal] for ordinal in ordinals], config.seed, config.data.global_batch)
    return dataset, order, ordinals, Loader(dataset, order, ordinals, config, text_len=TEXT_LEN, **position)


def take(config, count, **position):
    loader = open_loader(config, **position)[-1]
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def same(first, second) -> bool:
    fields = ("latent_BCTHW", "noise_BCTHW", "text_BSE", "sigma_quantile_B", "image_first_B", "dropout_key_B")
    return first.keys == second.keys and all(getattr(first, name).equal(getattr(second, name)) for name in fields)


def test_a_batch_is_what_the_dataset_and_the_draws_say(tiny_shards, tmp_path):
    config = make_config(tiny_shards, tmp_path, data__caption_dropout=0.5)
    dataset, order, ordinals, loader = open_loader(config)
    for step in range(1, 5):
        batch, after = next(loader)
        assert batch.step == step and after == order.position_of_step(step + 1)
        places = [ordinals[place] for place in order.batch(order.position_of_step(step)).ordinals]
        plans = plan_step(config, dataset, places, step, range(4))
        for row, plan in enumerate(plans):
            assert batch.keys[row] == dataset.samples[plan.ordinal].key
            expected = to_float32(dataset.latent(plan.ordinal))
            assert (batch.latent_BCTHW[row].numpy() == expected).all()
            assert (batch.noise_BCTHW[row].numpy() == draw_noise(config.seed, step, row, expected.shape)).all()
            draws = plan.draws
            text = dataset.null_text("empty") if draws.drop_caption else dataset.text(plan.ordinal, draws.caption)
            bits = batch.text_BSE[row].view(torch.uint16).numpy()
            assert (bits[: len(text)] == text).all() and not bits[len(text) :].any() and len(bits) == TEXT_LEN
            assert batch.image_first_B[row].item() == draws.image_to_video
    loader.close()


def test_prefetch_and_workers_change_nothing_and_any_position_is_reached(tiny_shards, tmp_path):
    one = take(make_config(tiny_shards, tmp_path, data__workers=1, data__prefetch_steps=1), 9)
    many = take(make_config(tiny_shards, tmp_path, data__workers=4, data__prefetch_steps=6), 9)
    assert all(same(first[0], second[0]) and first[1] == second[1] for first, second in zip(one, many, strict=True))
    resumed = take(make_config(tiny_shards, tmp_path), 4, step=6, position=one[4][1])
    assert all(same(first[0], second[0]) for first, second in zip(one[5:], resumed, strict=True))


def test_the_first_batch_is_read_before_it_is_asked_for(tiny_shards, tmp_path, monkeypatch):
    """While a run still takes its first held-out loss."""
    original, read = loader_module.read_latent, threading.Event()

    def noted(*arguments):
        read.set()
        return original(*arguments)

    monkeypatch.setattr(loader_module, "read_latent", noted)
    loader = open_loader(make_config(tiny_shards, tmp_path))[-1]
    assert read.wait(60)
    loader.close()


@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_share_out_the_slots_of_one_process(tiny_shards, tmp_path, dp_size):
    config = make_config(tiny_shards, tmp_path, data__micro_batch=1)
    whole = take(config, 5)
    shares = [take(config, 5, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for step, (batch, position) in enumerate(whole):
        parts = [share[step][0] for share in shares]
        assert sum((part.slots for part in parts), ()) == batch.slots
        assert torch.cat([part.noise_BCTHW for part in parts]).equal(batch.noise_BCTHW)
        assert torch.cat([part.latent_BCTHW for part in parts]).equal(batch.latent_BCTHW)
        assert torch.cat([part.sigma_quantile_B for part in parts]).equal(batch.sigma_quantile_B)
        assert {share[step][1] for share in shares} == {position}


def test_a_batch_that_does_not_divide_names_the_sizes_that_do(tiny_shards, tmp_path):
    data = make_config(tiny_shards, tmp_path, data__global_batch=10, data__micro_batch=2).data
    with pytest.raises(UserError) as caught:
        slots_per_rank(data, 4)
    assert "8 or 12" in str(caught.value) and "1, 2, 5, 10 processes" in str(caught.value)
    with pytest.raises(UserError, match=r"micro_batch") as caught:
        slots_per_rank(data, 2)
    assert "1, 5" in str(caught.value)


def test_one_frame_samples_are_text_to_video(tiny_shards, tmp_path):
    config = make_config(
        tiny_shards, tmp_path, objective__image_to_video_share=1.0, data__global_batch=1, data__micro_batch=1
    )
    batches = [batch for batch, _ in take(config, 20)]
    assert {batch.latent_BCTHW.shape[2] for batch in batches} == {1, 5}
    for batch in batches:
        assert batch.image_first_B.all().item() is (batch.latent_BCTHW.shape[2] > 1)


def test_padding_is_zero_rows_and_nothing_is_cut(tiny_shards, tmp_path):
    texts = [np.full((length, 3), 0x3F80, dtype=np.uint16) for length in (1, 5)]
    padded = pad_texts(texts, 8)
    assert padded.shape == (2, 8, 3) and padded.dtype == torch.bfloat16
    assert padded.sum(dim=(1, 2)).tolist() == [3.0, 15.0]
    assert not padded[0, 1:].view(torch.int16).any() and not padded[1, 5:].view(torch.int16).any()
    with pytest.raises(UserError, match="tokens, the model takes 8"):
        take_with_text_len(make_config(tiny_shards, tmp_path), 8)


def take_with_text_len(config, text_len):
    dataset, order, ordinals, loader = open_loader(config)
    loader.close()
    loader = Loader(dataset, order, ordinals, config, text_len=text_len)
    try:
        for _ in range(10):
            next(loader)
    finally:
        loader.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__dims": {"in_channels": 16}}, "48 channels"),
        ({"model__dims": {"text_dim": 32}}, "64 wide"),
        ({"model__dims": {"text_len": 4}}, "text_len"),
    ],
)
def test_a_dataset_of_another_encoder_is_refused_before_the_first_step(tiny_shards, tmp_path, change, message):
    from train_runs import DIMS

    config = make_config(tiny_shards, tmp_path / "run", model__dims=DIMS | change["model__dims"])
    with pytest.raises(UserError, match=message):
        fit(config)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: np.put(values, 7, np.nan), "it holds infinities or NaN"),
        (lambda values: values.fill(6e4), "values up to 6e\\+04: a normalised latent stays below 1000"),
        (lambda values: values.fill(500.0), "the root mean square of its latent is 500"),
    ],
)
def test_latents_that_are_not_normalised_are_named_with_the_check_that_finds_them(tmp_path, spoil, message):
    import shards_data

    class Broken:
        def __init__(self, rng):
            self.rng = rng

        def standard_normal(self, shape):
            values = self.rng.standard_normal(shape)
            if len(shape) == 4:
                spoil(values)
            return values

        def integers(self, *bounds):
            return self.rng.integers(*bounds)

    write = shards_data._write_sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_data, "_write_sample", lambda *a: write(*a[:4], Broken(a[4]), *a[5:]))
        write_dataset(tmp_path / "shards", num_units=1, scratch=tmp_path / "scratch")
    with pytest.raises(UserError, match=message) as caught:
        fit(make_config(tmp_path / "shards", tmp_path / "run", data__validation_fraction=0.0, data__global_batch=2))
    assert "--deep" in caught.value.fix


def test_a_latent_of_other_channels_than_the_first_is_named_before_it_is_used(tmp_path):
    import shards_data

    write, made = shards_data._write_sample, []

    class Narrow:
        def __init__(self, rng):
            self.rng = rng

        def standard_normal(self, shape):
            made.append(shape)
            few = len(shape) == 4 and sum(len(one) == 4 for one in made) == 5
            return self.rng.standard_normal((16, *shape[1:]) if few else shape)

        def integers(self, *bounds):
            return self.rng.integers(*bounds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_data, "_write_sample", lambda *a: write(*a[:4], Narrow(a[4]), *a[5:]))
        write_dataset(tmp_path / "shards", num_units=1, scratch=tmp_path / "scratch")
    with pytest.raises(UserError, match=r"have 16 channels \(sample clip-\d+@.*the model takes 48"):
        fit(make_config(tmp_path / "shards", tmp_path / "run", data__validation_fraction=0.0, data__global_batch=2,
                        max_steps=50))  # fmt: skip


def test_a_bad_sample_is_substituted_on_request_the_same_every_time(tiny_shards, tmp_path):
    root = flip_a_latent(tiny_shards, tmp_path / "shards")
    bad = open_dataset(root).samples[0].key
    for name, micro_batch in (("first", 1), ("second", 4)):
        fit(
            make_config(
                root,
                tmp_path / name,
                max_steps=12,
                data__validation_fraction=0.0,
                data__on_bad_sample="substitute",
                data__micro_batch=micro_batch,
            )
        )
    lines = [line for line in read_metrics(tmp_path / "first") if line["substituted"]]
    assert lines and all(pair[0] == bad and pair[1] != bad for line in lines for pair in line["substituted"])
    assert all(bad not in line["keys"] for line in lines)
    again = [line for line in read_metrics(tmp_path / "second") if line["substituted"]]
    assert [line["substituted"] for line in lines] == [line["substituted"] for line in again]


def test_an_empty_dataset_says_why(tiny_shards, tmp_path):
    def error(**changes):
        with pytest.raises(UserError) as caught:
            fit(make_config(changes.pop("root", tiny_shards), tmp_path / "run", **changes))
        return str(caught.value)

    assert "clip ids look like" in error(data__include=["nothing-*"])
    assert "validation_fraction" in error(data__validation_fraction=0.9999999)
    assert "no bucket can fill a batch" in error(data__global_batch=1000, data__micro_batch=1)
    write_dataset(tmp_path / "empty", num_units=1, samples_per_unit=0, scratch=tmp_path / "scratch")
    assert "no sample" in error(root=tmp_path / "empty")
    assert "no dataset here" in error(root=tmp_path / "nowhere")


def test_the_held_out_side_is_never_trained_on(tiny_shards, tmp_path):
    fit(make_config(tiny_shards, tmp_path / "run", max_steps=12, eval={"num_clips": 3}))
    dataset = open_dataset(tiny_shards)
    train, held_out = select_samples(dataset, make_config(tiny_shards, tmp_path).data)
    assert held_out and not {dataset.samples[n].clip_id for n in train} & {dataset.samples[n].clip_id for n in held_out}
    trained = {key for line in read_metrics(tmp_path / "run") for key in line["keys"]}
    assert not trained & {dataset.samples[n].key for n in held_out}


def test_the_loader_leaves_no_thread_behind(tiny_shards, tmp_path):
    before = threading.active_count()
    loader = open_loader(make_config(tiny_shards, tmp_path))[-1]
    next(loader)
    assert threading.active_count() > before
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_a_storage_that_does_not_answer_stops_the_run(tiny_shards, tmp_path):
    config = make_config(tiny_shards, tmp_path, data__read_timeout_seconds=0.2)
    dataset, order, ordinals, loader = open_loader(config)
    loader.close()
    hold = threading.Event()

    class Silent:
        samples = dataset.samples

        def text(self, *_):
            hold.wait(5)

        null_text = text

    loader = Loader(Silent(), order, ordinals, config, text_len=TEXT_LEN, position=START)
    with pytest.raises(UserError, match="did not arrive within"):
        next(loader)
    hold.set()
    loader.close()


def test_a_missing_tar_refuses_to_start(tiny_shards, tmp_path):
    root = tmp_path / "shards"
    shutil.copytree(tiny_shards, root)
    gone: Path = sorted((root / "text").rglob("*.tar"))[0]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        fit(make_config(root, tmp_path / "run"))


def test_a_new_run_says_when_planned_units_are_absent(tiny_shards, tmp_path, caplog, monkeypatch):
    """One commit is gone, with its texts': the others are trained on, and that is said."""
    root = tmp_path / "shards"
    shutil.copytree(tiny_shards, root)
    for commit in root.rglob("shard-000001.json"):
        commit.unlink()
    monkeypatch.setattr(LOG, "propagate", True)
    fit(make_config(root, tmp_path / "run", max_steps=1))
    assert "2 of 3 planned units are there; `wanshards verify` names the others" in caplog.text


def test_datasets_of_one_length_each_train_together(tmp_path):
    """One identity, two roots: a step is of one length, all are trained, and a resume goes on to the bit."""
    for name, length in (("short", 9), ("long", 17)):
        write_dataset(tmp_path / name, num_units=2, prefix=name, lengths=(length,), scratch=tmp_path / "scratch")
    roots = [str(tmp_path / "short"), str(tmp_path / "long")]

    def config(output, max_steps):
        return make_config("", tmp_path / output, max_steps=max_steps, data__root=roots, data__validation_fraction=0.0)

    fit(config("whole", 12))
    fit(config("parts", 5))
    fit(config("parts", 12))
    lines = read_metrics(tmp_path / "whole")
    assert lines == read_metrics(tmp_path / "parts")
    assert {line["bucket"].rpartition("×")[2] for line in lines} >= {"9", "17"}
    for line in lines:
        assert all(f"-{line['bucket'].rpartition('×')[2]}-" in key for key in line["keys"])
