"""Draws: functions of (seed, step, slot, purpose), the right distributions, the same bits for ever."""

import hashlib
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from train.data import draws
from train.data.draws import (
    Purpose,
    draw_integer,
    draw_noise,
    draw_quantile,
    draw_slot,
    draw_uniform,
    normal_from_uniform,
    raw_bits,
)

GOLDEN_BITS = ["0x6141d1a0a6ad3c41", "0xc1100028f4c929c1", "0x977a6e74cfeba6a6"]
GOLDEN_NOISE = "cb2553fb4f5f78e43ede190a29290d9c9fc32d0bb77b82a83675b7f9c2c8d17b"
GOLDEN_SLOT = (0.258828184973212, False, 1, False, 7429786939538170641)
WORDS = st.integers(min_value=0, max_value=2**63 - 1)


def test_the_bits_never_change():
    # Written down once. A change here makes every checkpoint's run another: raise DRAWS_VERSION.
    assert [hex(int(word)) for word in raw_bits(1, 2, 3, Purpose.NOISE, 3)] == GOLDEN_BITS
    assert hashlib.sha256(draw_noise(1, 2, 3, (48, 3, 6, 10)).tobytes()).hexdigest() == GOLDEN_NOISE
    drawn = draw_slot(7, 8, 9, image_to_video_share=0.4, num_captions=3, caption_dropout=0.1)
    assert tuple(drawn) == GOLDEN_SLOT


def test_bits_are_philox_at_the_key_and_counter_that_are_stated():
    expected = np.random.Philox(key=[5, draws.DRAWS_VERSION], counter=[0, 6, 7, int(Purpose.SIGMA)]).random_raw(4)
    assert (raw_bits(5, 7, 6, Purpose.SIGMA, 4) == expected).all()


@given(WORDS, WORDS, WORDS)
@settings(max_examples=50, deadline=None)
def test_every_word_of_the_key_counts(seed, step, slot):
    base = raw_bits(seed, step, slot, Purpose.NOISE, 2)
    for other in ((seed ^ 1, step, slot), (seed, step ^ 1, slot), (seed, step, slot ^ 1)):
        assert (raw_bits(*other, Purpose.NOISE, 2) != base).all()
    assert (raw_bits(seed, step, slot, Purpose.SIGMA, 2) != base).all()


def test_streams_do_not_overlap():
    words = [raw_bits(0, step, slot, purpose, 64) for step in range(4) for slot in range(4) for purpose in Purpose]
    assert len(np.unique(np.concatenate(words))) == sum(map(len, words))


def test_noise_is_normal():
    noise = draw_noise(0, 1, 0, (48, 5, 30, 52)).ravel()
    count = len(noise)
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.std() - 1) < 4 / (2 * count) ** 0.5
    ranks = (np.arange(count) + 0.5) / count
    ours = np.array([NormalDist().cdf(x) for x in np.sort(noise)[::97]])
    assert np.abs(ours - ranks[::97]).max() < 1.95 / count**0.5  # Kolmogorov's bound at 0.1 %
    assert noise.dtype == np.float32


def test_inverse_normal_against_the_standard_library():
    uniform = np.concatenate(
        [np.linspace(1e-4, 1 - 1e-4, 9999), 2.0 ** -np.arange(5, 34), 1 - 2.0 ** -np.arange(5, 34)]
    )
    expected = np.array([NormalDist().inv_cdf(u) for u in uniform])
    assert np.abs(normal_from_uniform(uniform) - expected).max() < 2e-6
    assert np.isfinite(draw_noise(0, 0, 0, (1 << 16,))).all()


def test_noise_of_a_part_is_a_slice_of_the_whole():
    whole = draw_noise(3, 4, 5, (8, 4, 6, 10))
    assert (draw_noise(3, 4, 5, (8, 4, 6, 10))[:, 1:3] == whole[:, 1:3]).all()
    # A longer draw begins with a shorter one: chunks and odd counts decide nothing.
    flat = draw_noise(3, 4, 5, (2 * draws.CHUNK_ELEMENTS + 1,))
    assert (draw_noise(3, 4, 5, (draws.CHUNK_ELEMENTS + 7,)) == flat[: draws.CHUNK_ELEMENTS + 7]).all()


def test_shares_are_kept_and_ends_are_exact():
    slots = [
        draw_slot(0, step, slot, image_to_video_share=0.4, num_captions=3, caption_dropout=0.1)
        for step in range(250)
        for slot in range(16)
    ]
    assert abs(np.mean([slot.image_to_video for slot in slots]) - 0.4) < 0.03
    assert abs(np.mean([slot.drop_caption for slot in slots]) - 0.1) < 0.02
    assert np.bincount([slot.caption for slot in slots]).min() > 1200
    assert abs(np.mean([slot.sigma_quantile for slot in slots]) - 0.5) < 0.02
    for share, expected in ((0.0, False), (1.0, True)):
        drawn = [
            draw_slot(0, step, 0, image_to_video_share=share, num_captions=1, caption_dropout=share)
            for step in range(99)
        ]
        assert all(slot.image_to_video is expected and slot.drop_caption is expected for slot in drawn)


def test_the_mode_does_not_move_the_timestep_or_the_noise():
    first = draw_slot(0, 5, 1, image_to_video_share=0.0, num_captions=1, caption_dropout=0.0)
    second = draw_slot(0, 5, 1, image_to_video_share=1.0, num_captions=4, caption_dropout=1.0)
    assert first.sigma_quantile == second.sigma_quantile and first.dropout_key == second.dropout_key


@given(WORDS, st.integers(1, 2**40))
@settings(max_examples=100, deadline=None)
def test_uniform_and_integer_stay_inside(seed, below):
    assert 0 < draw_uniform(seed, 0, 0, Purpose.MODE) < 1
    assert 0 <= draw_integer(seed, 0, 0, Purpose.CAPTION, below) < below


@given(WORDS, st.integers(0, 2**40), st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_each_slot_of_a_step_takes_another_stratum(seed, step, num_strata):
    quantiles = [draw_quantile(seed, step, slot, num_strata) for slot in range(num_strata)]
    assert sorted(int(quantile * num_strata) for quantile in quantiles) == list(range(num_strata))
    assert all(0 < quantile < 1 for quantile in quantiles)
    drawn = draw_slot(
        seed, step, 1, image_to_video_share=0.4, num_captions=1, caption_dropout=0.1, num_strata=num_strata
    )
    assert drawn.sigma_quantile == quantiles[1]


def test_strata_are_shuffled_anew_in_every_step():
    of_slot = np.bincount([int(draw_quantile(5, step, 3, 8) * 8) for step in range(800)], minlength=8)
    assert of_slot.min() > 60, "a slot has no stratum of its own"


def test_another_version_is_refused():
    draws.check_draws_version(draws.DRAWS_VERSION)
    with pytest.raises(UserError, match="version 0"):
        draws.check_draws_version(0)
