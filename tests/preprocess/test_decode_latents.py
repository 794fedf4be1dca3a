"""From latents to videos: the VAE's own pictures, files that players read, a watched run, bad input."""

import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from preprocess.cli.main import main
from preprocess.config import EncodersConfig
from preprocess.encoders.encoders import load_vae_encoder
from preprocess.encoders.random_weights import build_random_vae
from preprocess.encoders.vae_config import LATENT_MEAN, LATENT_STD
from preprocess.tools.decode_latents import composite, decode_file, decode_new, load_decoder
from shards.errors import UserError
from shards.files.tensor_files import read_latent_file, read_prompts, write_latent

CONFIG = "configs/demo/prep.yaml"


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(EncodersConfig())


@pytest.fixture
def latent():
    return np.random.default_rng(0).standard_normal((48, 3, 4, 6)).astype(np.float32)


def _call(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result


def _size(path):
    with Image.open(path) as picture:
        return picture.size


def _frames(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 24
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def test_decoding_is_the_vaes_own_with_the_statistics_undone(decoder, latent):
    vae = build_random_vae(0).eval()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    with torch.no_grad():
        pixels = vae.decode(torch.from_numpy(latent)[None] * std + mean).sample[0].clamp(-1, 1)
    truth = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    frames = decoder.decode(latent)
    assert frames.shape == (9, 64, 96, 3)
    assert np.array_equal(frames, truth)
    assert len(np.unique(frames)) > 10


def test_the_video_holds_the_frames(decoder, latent, tmp_path):
    from fractions import Fraction

    from preprocess.tools.decode_latents import write_frames

    rows, columns = np.mgrid[0:64, 0:96]
    smooth = np.stack([np.stack([rows * 2, columns * 2, rows * 0 + 20 * t], -1) for t in range(9)]).astype(np.uint8)
    write_frames(tmp_path / "smooth.mp4", smooth, Fraction(24))
    again = _frames(tmp_path / "smooth.mp4")
    assert again.shape == smooth.shape
    assert np.abs(again.astype(int) - smooth).mean() < 3  # right matrix and range: a wrong one is off by ten and more
    write_latent(tmp_path / "a.safetensors", latent, {"fps": "24"})
    decode_file(decoder, tmp_path / "a.safetensors", tmp_path / "a.png")
    assert _size(tmp_path / "a.png") == (96, 64)


def test_decode_by_command(latent, tmp_path):
    write_latent(tmp_path / "a.safetensors", latent, {"fps": "24", "prompt": "바다"})
    result = _call("decode", tmp_path / "a.safetensors", tmp_path / "a.mp4", "-c", CONFIG)
    assert result.exit_code == 0, result.output
    assert "9 frames" in result.output
    assert "random weights" in result.output
    assert len(_frames(tmp_path / "a.mp4")) == 9
    assert not list(tmp_path.glob(".writing*"))


def test_watching_decodes_what_is_new_and_keeps_a_sheet(decoder, latent, tmp_path):
    run = tmp_path / "run"
    for step, name in ((0, "sea"), (0, "hills"), (500, "sea")):
        write_latent(run / f"samples/step-{step:07d}/{name}.safetensors", latent + step / 500, {"fps": "24"})
    made = decode_new(decoder, run)
    assert [f"{path.parent.name}/{path.name}" for path in made] == [
        "step-0000000/hills.mp4", "step-0000000/sea.mp4", "step-0000500/sea.mp4",
    ]  # fmt: skip
    first = _size(run / "samples/contact-sheet.jpg")
    assert decode_new(decoder, run) == []
    write_latent(run / "samples/step-0001000/sea.safetensors", latent, {"fps": "24"})
    write_latent(run / "samples/step-0000500/sea.safetensors", latent, {"fps": "24"})  # a run that went back
    assert [path.parent.name for path in decode_new(decoder, run)] == ["step-0000500", "step-0001000"]
    width, height = _size(run / "samples/contact-sheet.jpg")
    assert width == first[0]
    assert height > first[1]
    result = _call("decode", "--watch", run, "--once", "-c", CONFIG)
    assert result.exit_code == 0, result.output


def test_the_two_sides_are_identical_to_the_bit_where_the_latents_are(decoder, latent, tmp_path):
    """What the encoder is given for a LoRA of zero B, and that another LoRA is seen."""
    folder = tmp_path / "samples"
    for step in ("base", "step-0000500"):
        write_latent(folder / step / "sea.safetensors", latent, {"fps": "24"})
        write_latent(folder / step / "hills.safetensors", (latent if step == "base" else -latent)[:, :2], {"fps": "24"})
    decode_new(decoder, tmp_path)
    videos = [[folder / step / f".cell-{name}.mkv" for step in ("base", "step-0000500")] for name in ("hills", "sea")]
    frames = np.stack(list(composite(videos, ["base", "step-0000500"])))
    assert frames.shape == (9, 20 + 2 * 64, 2 * 96, 3)
    left, right = frames[:, 20:, :96], frames[:, 20:, 96:]
    assert np.array_equal(left[:, 64:], right[:, 64:])
    assert not np.array_equal(left[:, :64], right[:, :64])
    assert np.array_equal(frames[4, 20:84], frames[8, 20:84])  # the shorter prompt holds its last frame
    assert len(_frames(folder / "side-by-side.mp4")) == 9
    assert _size(folder / "contact-sheet.jpg")[1] == 18 + 2 * 124


def test_of_many_steps_four_are_shown_side_by_side_and_of_one_none(decoder, latent, tmp_path):
    folder = tmp_path / "samples"
    write_latent(folder / "step-0000000/sea.safetensors", latent, {"fps": "24"})
    decode_new(decoder, tmp_path)
    assert not (folder / "side-by-side.mp4").exists()
    for step in range(1, 7):
        write_latent(folder / f"step-{step:07d}/sea.safetensors", latent, {"fps": "24"})
    decode_new(decoder, tmp_path)
    assert _frames(folder / "side-by-side.mp4").shape == (9, 20 + 64, 4 * 96, 3)


def test_a_watch_says_when_there_is_nothing_to_wait_for(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("output: run\nsample: null\n")
    result = _call("decode", "--watch", run, "-c", CONFIG)
    assert result.exit_code == 2
    assert "this run makes no samples" in result.output and "add `sample:" in result.output


def test_a_watch_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "run").mkdir()
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'preprocess.cli', 'decode', '--watch', sys.argv[1], '-c',"
        " sys.argv[2], '--every-seconds', '0.2', '--with-parent'], stderr=subprocess.PIPE, text=True)\n"
        "print(child.pid, child.stderr.readline(), flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), CONFIG],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    pid = int(done.stdout.split()[0])
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline, "the watch goes on without its parent"
        time.sleep(0.2)


def test_bad_input_of_decode_is_one_error_with_the_fix(decoder, latent, tmp_path):
    path = tmp_path / "a.safetensors"
    write_latent(path, latent, {"vae": "0" * 64})
    with pytest.raises(UserError, match="a latent of another VAE"):
        decode_file(decoder, path, tmp_path / "a.mp4")
    write_latent(path, latent, {"vae": decoder.encoder_sha256})
    decode_file(decoder, path, tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"\.avi"):
        decode_file(decoder, path, tmp_path / "a.avi")
    write_latent(path, latent[:16], {})
    with pytest.raises(UserError, match="16 channels"):
        decode_file(decoder, path, tmp_path / "a.mp4")
    for arguments in ((path,), (), (path, "x.mp4", "--watch", tmp_path)):
        assert _call("decode", *arguments, "-c", CONFIG).exit_code == 2
    result = _call("decode", "--watch", tmp_path / "nowhere", "--once", "-c", CONFIG)
    assert result.exit_code == 2
    assert "no such folder" in result.output


def test_the_decoder_knows_the_vae_of_the_shards(decoder):
    assert decoder.encoder_sha256 == load_vae_encoder(EncodersConfig()).weights_sha256


def test_embed_by_command(tmp_path):
    out = tmp_path / "prompts.safetensors"
    result = _call("embed", "바닷가를 걷는 사람 ", "A market &amp; a bridge", "--out", out, "-c", CONFIG)
    assert result.exit_code == 0, result.output
    prompts = read_prompts(out)
    assert prompts.texts == ("바닷가를 걷는 사람", "A market & a bridge")
    assert prompts.embeddings[0].shape[1] == prompts.empty.shape[1] == 64
    assert prompts.empty.shape[0] == 1  # the end token alone
    assert prompts.negative.shape[0] > 10
    from preprocess.encoders.encoders import load_text_encoder, load_tokenizer

    config = EncodersConfig()
    encoder = load_text_encoder(config, load_tokenizer(config))
    assert np.array_equal(prompts.embeddings[1], encoder.embed("A market & a bridge"))


def test_a_prompt_of_5000_characters_and_an_empty_one_are_refused(tmp_path):
    long = "바다 " * 1700
    result = _call("embed", long, "--out", tmp_path / "p.safetensors", "-c", CONFIG)
    assert result.exit_code == 2
    assert "5,099 characters" in result.output
    assert "at most 512 tokens" in result.output
    assert "a shorter prompt" in result.output
    assert "has no words" in _call("embed", "  ", "--out", tmp_path / "p.safetensors", "-c", CONFIG).output
    assert not (tmp_path / "p.safetensors").exists()


def test_an_image_becomes_the_latent_of_its_frame(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (96, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "still.png")
    out = tmp_path / "first.safetensors"
    result = _call("encode-image", tmp_path / "still.png", out, "--width", 160, "--height", 96, "-c", CONFIG)
    assert result.exit_code == 0, result.output
    latent = read_latent_file(out)
    vae = load_vae_encoder(EncodersConfig())
    assert latent.values.shape == (48, 1, 6, 10)
    assert latent.facts["vae"] == vae.weights_sha256
    # The training path goes through 4:2:0-free ffmpeg scaling; at the picture's own size nothing changes.
    np.testing.assert_allclose(latent.values, vae.encode(pixels[None]), atol=0.05)


def test_an_image_of_17_by_4000_pixels_and_a_text_file_are_refused(tmp_path):
    Image.new("RGB", (17, 4000)).save(tmp_path / "thin.png")
    size = ("--width", 160, "--height", 96, "-c", CONFIG)
    result = _call("encode-image", tmp_path / "thin.png", tmp_path / "o.safetensors", *size)
    assert result.exit_code == 2
    assert "17×4000" in result.output
    assert "to fix" in result.output
    (tmp_path / "text.png").write_text("no picture")
    result = _call("encode-image", tmp_path / "text.png", tmp_path / "o.safetensors", *size)
    assert result.exit_code == 2
    assert "text.png" in result.output
    result = _call("encode-image", tmp_path / "nowhere.png", tmp_path / "o.safetensors", *size)
    assert result.exit_code == 2
    result = _call("encode-image", tmp_path / "thin.png", tmp_path / "o.safetensors", "--width", 100, *size[2:])
    assert result.exit_code == 2
    assert "multiples of 32" in result.output
    assert not (tmp_path / "o.safetensors").exists()
