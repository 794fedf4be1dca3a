"""`vae_precision: auto`: which mode a device gets, by hand-made facts and by a real VAE; settled once, kept, obeyed."""

import json

import numpy as np
import pytest
import torch
from train_traces import vae_traffic

from preprocess.build import vae_precision as gate
from preprocess.build.vae_precision import (
    EncoderDevice,
    ModeFigures,
    VaePrecision,
    choose_mode,
    fast_modes,
    find_precision,
    measure_modes,
    relative_error,
    resized,
    settle_precision,
)
from preprocess.config import EncodersConfig
from preprocess.encoders.encoders import VaeEncoder, load_vae_encoder, to_channels_last
from preprocess.encoders.random_weights import build_random_vae
from preprocess.encoders.vae_forward import LowTrafficEncoder
from shards.config import validate_config
from shards.errors import UserError
from shards.storage import open_storage

V100 = EncoderDevice("Tesla V100-PCIE-32GB", "cuda", (7, 0))
H100 = EncoderDevice("NVIDIA H100 80GB HBM3", "cuda", (9, 0))
P100 = EncoderDevice("Tesla P100", "cuda", (6, 0))
CPU = EncoderDevice("cpu", "cpu")


def figures(*modes):
    return [ModeFigures(mode=mode, seconds=seconds, error=error) for mode, seconds, error in modes]


@pytest.fixture
def clips():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (5, 32, height, 3), dtype=np.uint8) for height in (32, 64)]


def load(mode):
    return load_vae_encoder(EncodersConfig(device="cpu", vae_precision=mode))


def test_a_v100_is_never_asked_for_bf16_and_a_processor_for_nothing():
    assert fast_modes(V100) == (("fp16",), "")
    assert fast_modes(H100) == (("fp16", "bf16"), "")
    assert fast_modes(P100)[0] == () and "6.0" in fast_modes(P100)[1]
    assert fast_modes(CPU) == ((), "16 bits make no VAE faster on a cpu")


@pytest.mark.parametrize(
    ("measured", "mode", "why"),
    [
        # Right and three times as fast.
        ([("fp32", 14.0, 0.0), ("fp16", 5.0, 0.001)], "fp16", "error 0.001, 5 s a clip against fp32's 14 s"),
        # The convolutions that were fast and wrong.
        ([("fp32", 14.0, 0.0), ("fp16", 5.0, 0.9)], "fp32", "no 16-bit mode is within the tolerance 0.005"),
        ([("fp32", 14.0, 0.0), ("fp16", 5.0, None)], "fp32", "values that are not finite"),
        # Right but slow: an emulated mode, or vol2col in place of cuDNN.
        ([("fp32", 14.0, 0.0), ("fp16", 13.0, 0.001)], "fp32", "nothing is 1.2 times as fast"),
        # Of two, the more exact, though the other is a little faster.
        ([("fp32", 3.0, 0.0), ("fp16", 0.42, 0.001), ("bf16", 0.4, 0.004)], "fp16", "error 0.001"),
        ([("fp32", 3.0, 0.0), ("fp16", 0.4, None), ("bf16", 0.4, 0.004)], "bf16", "error 0.004"),
        ([("fp32", 3.0, 0.0), ("fp16", 0.4, 0.005), ("bf16", 0.4, 0.012)], "fp16", "the tolerance is 0.005"),
    ],
)
def test_the_choice(measured, mode, why):
    chosen, reason = choose_mode(figures(*measured), 0.005)
    assert chosen == mode and why in reason


def test_the_error_is_relative_and_sees_what_is_not_finite():
    reference = np.array([3.0, 4.0], dtype=np.float32)
    assert relative_error(reference, reference) == 0
    assert relative_error(reference * 1.01, reference) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(np.array([3.0, np.inf], dtype=np.float32), reference) is None
    assert relative_error(np.array([3.0, np.nan], dtype=np.float32), reference) is None


def test_a_real_vae_is_measured_in_each_mode_of_the_card(clips):
    """The card's facts are an H100's, the arithmetic this processor's: errors are real, and bf16's the larger."""
    found = measure_modes(H100, clips, load, tolerance=0.5)
    by_mode = {each.mode: each for each in found.figures}
    assert list(by_mode) == ["fp32", "fp16", "bf16"] and found.num_clips == 2
    assert by_mode["fp32"].error == 0 and 1e-5 < by_mode["fp16"].error < by_mode["bf16"].error < 0.2
    assert all(each.seconds > 0 for each in found.figures)
    exact = load("fp32").encode(clips[0])
    assert by_mode["bf16"].error >= relative_error(load("bf16").encode(clips[0]), exact) > 0
    tight = measure_modes(H100, clips, load, tolerance=1e-6)
    assert tight.mode == "fp32" and "within the tolerance 1e-06" in tight.reason


def test_a_wrong_kernel_is_not_taken(clips):
    """As pytorch#40275: in 16 bits one convolution gives other numbers, fast. The gate compares, so it sees it."""

    def load_broken(mode):
        encoder = load(mode)
        if mode == "fp16":
            encode = encoder.encode
            encoder.encode = lambda frames: np.roll(encode(frames), 1, axis=1)
        return encoder

    found = measure_modes(V100, clips, load_broken, tolerance=0.02)
    assert [each.mode for each in found.figures] == ["fp32", "fp16"]
    assert found.mode == "fp32" and found.figures[1].error > 0.1


def test_without_a_fast_mode_or_a_clip_it_is_fp32_with_the_reason(clips):
    assert measure_modes(CPU, [], load, 0.005) == VaePrecision(
        mode="fp32", reason="16 bits make no VAE faster on a cpu", device="cpu", tolerance=0.005, num_clips=0
    )
    assert "could be decoded" in measure_modes(V100, [], load, 0.005).reason


def test_frames_are_tried_at_every_bucket_size():
    frames = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    assert np.array_equal(resized(frames, 4, 6), frames)
    assert np.array_equal(resized(frames, 8, 3), frames[:, [0, 0, 1, 1, 2, 2, 3, 3]][:, :, [0, 2, 4]])


def settled_as(mode):
    return VaePrecision(mode=mode, reason="measured", device="card", tolerance=0.005, num_clips=1)


def a_config(tmp_path, mode="auto"):
    from prep_runs import prep

    return prep(tmp_path, tmp_path, encoders={"vae_precision": mode})


def test_it_is_settled_once_and_what_is_settled_counts(tmp_path):
    storage = open_storage(tmp_path)
    calls = []

    def measure(config):
        calls.append(config)
        return settled_as("fp16")

    for _ in range(2):
        assert settle_precision(storage, a_config(tmp_path), measure).encoders.vae_precision == "fp16"
    assert len(calls) == 1 and find_precision(storage) == settled_as("fp16")
    assert settle_precision(storage, a_config(tmp_path, "bf16"), measure).encoders.vae_precision == "bf16"
    assert json.loads((tmp_path / gate.DOCUMENT).read_text())["tolerance"] == 0.005


def test_another_process_that_was_first_has_the_word(tmp_path):
    storage = open_storage(tmp_path)

    def measure(config):
        settle_precision(open_storage(tmp_path), config, lambda _: settled_as("fp16"))
        return settled_as("fp32")

    assert settle_precision(storage, a_config(tmp_path), measure).encoders.vae_precision == "fp16"


def test_auto_builds_on_a_processor_in_fp32_and_says_why(demo_corpus, tmp_path):
    from prep_runs import build

    from shards.check.verify import verify
    from shards.format.dataset_info import read_info

    build(demo_corpus, tmp_path / "out", corpus={"limit": 1}, encoders={"vae_precision": "auto", "device": "cpu"})
    storage = open_storage(tmp_path / "out")
    settled = find_precision(storage)
    assert (settled.mode, settled.device) == ("fp32", "cpu") and "16 bits" in settled.reason
    assert read_info(storage).identity["vae"]["precision"] == "fp32"
    assert not verify(storage, "deep").problems
    # Latents that are there have the word: a document of another mind does not make the build a mismatch.
    (tmp_path / "out" / gate.DOCUMENT).unlink()
    settle_precision(storage, a_config(tmp_path), lambda _: pytest.fail("measured again"))


def test_channels_last_gives_the_same_latents_up_to_rounding(clips):
    contiguous, last = load("fp32"), load_vae_encoder(EncodersConfig(device="cpu", vae_channels_last=True))
    assert relative_error(last.encode(clips[1]), contiguous.encode(clips[1])) < 1e-5
    assert last.identity() == contiguous.identity()  # as another card's kernels: provenance, not identity
    assert last.provenance() == {"vae_layout": "channels_last_3d"}
    vae = build_random_vae(0)
    to_channels_last(vae)
    kernels = [p for p in vae.parameters() if p.dim() == 5 and min(p.shape[1:]) > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)


class _Full(torch.nn.Module):
    """A VAE on a device without room: torch's own exception, at the place where it comes up."""

    def encode(self, pixels):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")


def test_out_of_memory_says_what_to_set(clips):
    with pytest.raises(UserError, match=r"ran out of memory on cpu at \[5, 32, 32, 3\], fp32") as caught:
        VaeEncoder(_Full(), device=torch.device("cpu"), precision="fp32").encode(clips[0])
    for fix in ("buckets.sizes", "window.num_frames", "encoders.vae_precision=auto"):
        assert fix in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own, inside Inductor
def test_compiled_it_gives_the_same_latents_up_to_rounding_under_an_identity_of_its_own(clips):
    compiled = load_vae_encoder(EncodersConfig(device="cpu", vae_compile=True))
    plain = load("fp32")
    assert relative_error(compiled.encode(clips[0]), plain.encode(clips[0])) < 1e-4
    assert compiled.identity() == {**plain.identity(), "compiled": True}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_fewer_passes_over_memory_give_the_same_latents(num_frames, channels_last):
    """Within 1e-6 of the library's encoder in fp32, under an identity of its own."""
    frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, 64, 96, 3), dtype=np.uint8)
    config = EncodersConfig(device="cpu", vae_channels_last=channels_last)
    library = load_vae_encoder(config)
    ours = load_vae_encoder(config.model_copy(update={"vae_low_traffic": True}))
    latent = ours.encode(frames)
    assert relative_error(latent, library.encode(frames)) < 1e-6
    assert np.array_equal(latent, ours.encode(frames)), "nothing of a clip is left for the next one"
    assert ours.identity() == {**library.identity(), "low_traffic": True}
    assert "low_traffic" not in library.identity()


def test_in_16_bits_it_is_no_further_from_fp32_than_the_library():
    """It rounds less often. Of one network chance decides, so a mean over a few."""
    errors = []
    for seed in range(8):
        frames = np.random.default_rng(seed).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
        latents = [
            VaeEncoder(build_random_vae(seed), device=torch.device("cpu"), precision=mode, low_traffic=low).encode(
                frames
            )
            for mode, low in (("fp32", False), ("bf16", False), ("bf16", True))
        ]
        errors.append([relative_error(latent, latents[0]) for latent in latents[1:]])
    library, ours = np.mean(errors, axis=0)
    assert ours <= library


def test_fewer_passes_over_memory_are_counted():
    """At real widths on fake tensors: the bytes of an encode and its peak, against the library's."""
    library, ours = vae_traffic(5, (64, 64), low_traffic=False), vae_traffic(5, (64, 64), low_traffic=True)
    assert ours.between() < 0.45 * library.between()
    assert ours.peak <= library.peak


def test_one_forward_at_a_time_and_one_form_of_vae():
    with pytest.raises(UserError, match="choose one"):
        validate_config(EncodersConfig, {"vae_compile": True, "vae_low_traffic": True}, origin="encoders")
    vae = build_random_vae(0)
    vae.register_to_config(is_residual=False)
    with pytest.raises(ValueError, match=r"not Wan2\.2's"):
        LowTrafficEncoder(vae)
