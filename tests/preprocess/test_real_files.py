"""What real files taught: each kind of file that was refused or silently read wrong, made here and read right."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from clips import SMALL, a_record, ffmpeg_run, number_picture, only_bucket, prep_config, probed, read_number, write_clip
from PIL import Image, ImageOps

from preprocess.build.clip import _refused_by_measure
from preprocess.config import CorpusConfig, FetchConfig, PictureSize, PrepConfig
from preprocess.corpus.records import Record, parse_record
from preprocess.facts import Inspection
from preprocess.fetch.fetcher import Fetcher
from preprocess.rejection import ClipRejected, Rejection
from preprocess.video import inspection as inspector_child
from preprocess.video import inspector
from preprocess.video.bucket import choose_bucket
from preprocess.video.decode import decode_window
from preprocess.video.ffmpeg import Result
from preprocess.video.inspection import inspect_file
from preprocess.video.measure import Measured, measure_window
from preprocess.video.packets import read_packets
from preprocess.video.probe import weigh
from preprocess.video.window import Window, choose_windows

CONFIG = prep_config(((160, 96),))
TOLERANT = prep_config(((160, 96),), decode={"policy": "tolerant"})
TILES = prep_config(((160, 96),), window={"policy": "tile", "max_windows": 9})
OPEN_GROUPS = ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2", "-g", "12", "-flags", "-cgop", "-pix_fmt", "yuv420p")
OPEN_H264 = ("-c:v", "libx264", "-crf", "12", "-bf", "3", "-x264-params", "open-gop=1:keyint=24:b-pyramid=normal")
OPEN_HEVC = ("-c:v", "libx265", "-crf", "12", "-x265-params", "open-gop=1:keyint=24:log-level=none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


def numbered(num: int) -> np.ndarray:
    return np.stack([number_picture(n) for n in range(num)])


def source(folder: Path, name: str, output: tuple[str, ...], num: int = 200) -> Path:
    """Numbered pictures, 25 a second, as `name`."""
    return write_clip(folder / name, numbered(num), 25, *output)


def packets_of(path: Path) -> list[tuple[int, int]]:
    """(byte position, size) of the video packets, in the order of the file."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def presented(path: Path) -> dict[float, int]:
    """The independent reference: every picture that a full decoding in order of presentation shows, by its time."""
    with av.open(str(path)) as container:
        zero = (container.start_time or 0) / 1_000_000
        frames = list(container.decode(video=0))
        return {round(float(f.time) - zero, 3): read_number(f.to_ndarray(format="rgb24")) for f in frames}


def check_against_reference(path: Path, config: PrepConfig = TILES) -> int:
    """Every window of the clip shows the pictures that the reference has for its times; how many windows."""
    shown = presented(path)
    facts = probed(path, config)
    times = sorted(shown)
    assert facts.start_seconds == pytest.approx(times[0], abs=0.002)
    windows = choose_windows(facts, a_record(), config)
    for window in windows:
        frames = decode_window(path, facts, window, only_bucket(config), config)
        for k, frame in enumerate(frames):
            due = [time for time in times if (time - window.start_seconds) * 24 < k + 0.5 - 1e-6]
            assert read_number(frame) in {shown[time] for time in due[-2:]}, (window, k)
        # A program stream may have a gap of its own.
        assert sum(np.array_equal(a, b) for a, b in itertools.pairwise(frames)) <= 2, "frozen"
    return len(windows)


@pytest.mark.parametrize(
    ("name", "output", "suffix"),
    [
        ("open.ts", OPEN_GROUPS, "ts"),
        ("open.mpg", OPEN_GROUPS, "mpg"),
        ("open2.ts", OPEN_GROUPS, "mkv"),
        ("hevc.ts", OPEN_HEVC, "ts"),
        ("h264.mkv", OPEN_H264, "mkv"),
        ("h264.mkv", OPEN_H264, "mp4"),
    ],
)
def test_a_copy_from_an_open_group_starts_at_its_first_picture_that_decodes(
    folder: Path, name: str, output: tuple[str, ...], suffix: str
) -> None:
    whole = source(folder, name, output)
    path = folder / f"cut-{name}.{suffix}"
    ffmpeg_run("-ss", "2.1", "-i", whole, "-c", "copy", path)
    assert check_against_reference(path) >= 2
    start = prep_config(((160, 96),), window={"policy": "start"})
    (window,) = choose_windows(probed(path, start), a_record(), start)
    assert window.start_seconds >= 0


def test_a_stream_that_begins_within_a_group_loses_only_its_beginning(folder: Path, tmp_path: Path) -> None:
    whole = source(folder, "closed.ts", (*SMALL, "-g", "50", "-bf", "0"))
    data = whole.read_bytes()
    path = tmp_path / "within.ts"
    path.write_bytes(data[: 188 * 2] + data[len(data) // 10 // 188 * 188 :])  # its tables, then from within a group
    facts = probed(path, TILES)
    assert facts.zero_seconds + facts.start_seconds > 1.0
    assert check_against_reference(path) >= 2


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_looking_for_shot_changes_refuses_no_copy_from_an_open_group(folder: Path, suffix: str) -> None:
    """All of the clip is decoded for it, and the decoder complains of references before the clip's beginning."""
    path = folder / f"shots.{suffix}"
    ffmpeg_run("-ss", "2.1", "-i", source(folder, "h264.mkv", OPEN_H264), "-c", "copy", path)
    config = prep_config(((160, 96),), window={"policy": "tile", "max_windows": 9, "max_scene_score": 0.4})
    assert probed(path, config).cuts == ()
    assert check_against_reference(path, config) >= 2


@pytest.fixture(scope="module")
def damaged(folder: Path) -> Path:
    """The pictures of its first second are destroyed; groups are of one second."""
    noise = np.random.default_rng(0).integers(0, 40, (200, 96, 160), dtype=np.uint8)
    whole = write_clip(folder / "groups.mkv", numbered(200) + noise, 25, *SMALL, "-g", "25", "-bf", "0")
    data = bytearray(whole.read_bytes())
    rng = np.random.default_rng(1)
    for position, size in packets_of(whole)[:25]:
        first = position + 30
        data[first : position + size - 4] = rng.bytes(max(0, position + size - 4 - first))
    path = folder / "damaged.mkv"
    path.write_bytes(data)
    return path


def test_damage_in_the_first_second_costs_only_the_windows_that_need_it(damaged: Path) -> None:
    facts = probed(damaged, TILES)
    for start in (1.1, 3.0, 5.5):
        frames = decode_window(damaged, facts, Window(start, 49, "test"), only_bucket(CONFIG), CONFIG)
        assert read_number(frames[0]) == round(start * 25), start
    assert 0.0 < facts.start_seconds < 1.1
    for start in (0.0, 0.1, 0.8):
        with pytest.raises(ClipRejected) as caught:
            decode_window(damaged, facts, Window(start, 49, "test"), only_bucket(CONFIG), CONFIG)
        assert caught.value.rejection.reason in ("missing-frames", "decode-errors")


def test_copies_that_fill_a_gap_are_not_pictures(damaged: Path) -> None:
    """Under the tolerant policy too: what was decoded counts, not what the filter gives."""
    facts = probed(damaged, TOLERANT)
    lost = facts.model_copy(update={"picture_seconds": tuple(n / 25 for n in range(200)), "start_seconds": 0.0})
    real = decode_window.__globals__["run_ffmpeg"]

    def without_first_second(*arguments: object, **limits: object) -> Result:
        result: Result = real(*arguments, **limits)
        kept = [line for line in result.stderr.splitlines(keepends=True) if not re.match(r"frame:1[0-3] ", line)]
        return result._replace(stderr="".join(kept))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.video.decode.run_ffmpeg", without_first_second)
        with pytest.raises(ClipRejected) as caught:
            decode_window(damaged, lost, Window(3.0, 49, "test"), only_bucket(TOLERANT), TOLERANT)
    assert caught.value.rejection[:2] == ("decode", "missing-frames")
    assert "4 of " in caught.value.rejection.detail


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_a_photo_is_turned_as_its_exif_asks(tmp_path: Path, orientation: int, suffix: str) -> None:
    if orientation not in (2, 5, 6) and suffix != "jpg":
        pytest.skip("one orientation of each sort is enough for the other formats")
    picture = Image.new("RGB", (160, 96), "blue")
    picture.paste("red", (0, 0, 80, 96))
    picture.paste("white", (0, 0, 40, 24))
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "camera", orientation
    path = tmp_path / f"photo.{suffix}"
    picture.save(path, exif=exif)
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    config = prep_config((upright.size,), sieve={"images": True})
    facts = probed(path, config)
    frame = decode_window(path, facts, Window(0.0, 1, "image"), only_bucket(config), config)[0]
    assert np.abs(frame.astype(int) - np.asarray(upright)).mean() < 12


def test_a_film_whose_frames_carry_exif_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for n in range(60):
        Image.fromarray(number_picture(n)).convert("RGB").save(tmp_path / f"{n:03d}.jpg", exif=exif, quality=95)
    path = tmp_path / "film.mov"
    ffmpeg_run("-noautorotate", "-framerate", "25", "-i", tmp_path / "%03d.jpg", "-c", "copy", path)
    facts = probed(path, prep_config(((96, 160),)))
    assert (facts.rotation, facts.display_width) == (90, 96)


def test_a_frame_whose_side_data_raises_costs_nothing(folder: Path) -> None:
    path = source(folder, "plain.mp4", SMALL, 80)

    class Raising:
        rotation = 90

        @property
        def side_data(self) -> object:
            raise ValueError("31 is not a valid Type")

    assert inspector._display_matrix(Raising()) == (0, -1, 1, 0)
    assert probed(path, CONFIG).rotation == 0


def test_an_inspector_that_fails_twice_alike_is_not_to_be_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(folder, "plain.mp4", SMALL, 80)
    answers = iter(["a", "a", "a", "b"])
    monkeypatch.setattr(
        inspector_child, "_run_inspector", lambda *_: Result(1, bytearray(), f"Error: {next(answers)}", False, False)
    )
    for retryable in (False, True):
        with pytest.raises(ClipRejected) as caught:
            inspect_file(path, CONFIG)
        assert caught.value.rejection[1] == "inspector-failed" and caught.value.rejection.retryable is retryable


def test_an_avi_with_dropped_frames_is_whole(folder: Path) -> None:
    path = folder / "dropped.avi"
    whole = source(folder, "plain200.mp4", SMALL)
    keep = "select='not(eq(mod(n\\,10)\\,5))'"
    ffmpeg_run("-i", whole, "-vf", keep, "-fps_mode", "vfr", "-c:v", "mpeg4", "-q:v", "2", path)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > sum(1 for _ in container.decode(video=0))
    facts = probed(path, CONFIG)
    frames = decode_window(path, facts, Window(1.0, 49, "test"), only_bucket(CONFIG), CONFIG)
    assert read_number(frames[0]) in (24, 25)


def test_sound_may_outlast_the_pictures(folder: Path) -> None:
    path = folder / "longer-sound.mkv"
    whole = source(folder, "plain200.mp4", SMALL)
    ffmpeg_run("-i", whole, "-f", "lavfi", "-i", "sine=duration=20", "-c:v", "copy", path)
    assert probed(path, CONFIG).duration_seconds == pytest.approx(8.0, abs=0.05)


def test_the_largest_of_two_video_streams_is_taken_and_recorded(folder: Path) -> None:
    small = source(folder, "plain200.mp4", SMALL)
    large = write_clip(folder / "large.mp4", np.stack([number_picture(n, 320, 192) for n in range(200)]), 25, *SMALL)
    path = folder / "two.ts"
    ffmpeg_run("-i", small, "-i", large, "-map", "0", "-map", "1", "-c", "copy", path)
    facts = probed(path, CONFIG)
    assert (facts.width, facts.stream) == (320, 1)
    assert facts.decisions["stream"]["ground"] == "the largest of 2 video streams (0: 160×96, 1: 320×192)"
    assert decode_window(path, facts, Window(1.0, 49, "test"), only_bucket(CONFIG), CONFIG).shape == (49, 96, 160, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_cover_picture_is_no_video_stream_however_large(folder: Path, suffix: str) -> None:
    small, path = source(folder, "plain200.mp4", SMALL), folder / f"cover.{suffix}"
    Image.new("RGB", (640, 480), "red").save(folder / "cover.jpg")
    cover = ("-i", folder / "cover.jpg", "-map", "0", "-map", "1", "-disposition:v:1", "attached_pic")
    if suffix == "mkv":
        cover = ("-attach", folder / "cover.jpg", "-metadata:s:t", "mimetype=image/jpeg")
    ffmpeg_run("-i", small, *cover, "-c", "copy", path)
    with av.open(str(path)) as container:
        assert [stream.width for stream in container.streams.video] == [160, 640]
    facts = probed(path, CONFIG)
    assert (facts.width, facts.stream, facts.num_frames) == (160, 0, 200)
    frames = decode_window(path, facts, Window(1.0, 49, "test"), only_bucket(CONFIG), CONFIG)
    assert read_number(frames[0]) == 25


def test_a_stream_that_no_decoder_knows_is_passed_over(folder: Path) -> None:
    small = source(folder, "plain200.mp4", SMALL)
    large = write_clip(folder / "large.mp4", np.stack([number_picture(n, 320, 192) for n in range(200)]), 25, *SMALL)
    path = folder / "unknown.mkv"
    ffmpeg_run("-i", small, "-i", large, "-map", "0", "-map", "1", "-c", "copy", path)
    name = b"V_MPEG4/ISO/AVC"
    before, first, second = path.read_bytes().rpartition(name)
    path.write_bytes(before + first.replace(b"AVC", b"XYZ") + second)
    facts = probed(path, CONFIG)
    assert (facts.width, facts.stream) == (160, 0)
    assert facts.decisions["stream"]["ground"] == "the largest of 2 video streams (0: 160×96, 1: 0×0)"


def test_full_range_hd_without_a_flag_is_bt709_and_its_green_stays(tmp_path: Path) -> None:
    path = tmp_path / "hd.mp4"
    green = "scale=out_color_matrix=bt709:out_range=full,format=yuvj420p"
    ffmpeg_run("-f", "lavfi", "-i", "color=0x00cb00:s=1280x720:r=25:d=3", "-vf", green, *SMALL[:-4], path)
    flagless = tmp_path / "flagless.mp4"
    bits = "h264_metadata=colour_primaries=2:transfer_characteristics=2:matrix_coefficients=2"
    ffmpeg_run("-i", path, "-c", "copy", "-bsf:v", bits, "-colorspace", "unknown", flagless)
    facts = probed(flagless, CONFIG)
    assert (facts.matrix, facts.range) == ("bt709", "full")
    frames = decode_window(flagless, facts, Window(0.1, 49, "test"), only_bucket(CONFIG), CONFIG)
    assert frames[0].mean(axis=(0, 1)) == pytest.approx((0, 203, 0), abs=3)


@pytest.mark.parametrize(("primaries", "reason"), [(9, "BT.2020"), (12, "Display P3"), (1, None), (5, None), (2, None)])
def test_wide_primaries_are_refused_by_name(folder: Path, primaries: int, reason: str | None) -> None:
    path = folder / f"primaries{primaries}.mp4"
    whole = source(folder, "plain.mp4", SMALL, 80)
    ffmpeg_run("-i", whole, "-c", "copy", "-bsf:v", f"h264_metadata=colour_primaries={primaries}", path)
    if reason is None:
        assert probed(path, CONFIG).matrix
        return
    with pytest.raises(ClipRejected) as caught:
        probed(path, CONFIG)
    assert caught.value.rejection[:2] == ("probe", "primaries-unsupported") and reason in caught.value.rejection.detail


SUFFIXES = [
    "mts",
    "m2t",
    "vob",
    "dv",
    "flv",
    "3gp",
    "gif",
    "avif",
    "MTS",
    "ogv",
    "3g2",
    "Mp4",
    "Mov",
    "divx",
    "jfif",
    "Jpeg",
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_clip_beside_its_json_is_found_whatever_its_suffix(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"clip.{suffix}").write_bytes(b"x")
    media = "image" if suffix in ("avif", "jfif", "Jpeg") else "video"
    for source in ("clip.json", f"clip.{suffix}.json"):
        record = Record(clip_id="clip", source=source, media_type=media)
        with (
            Fetcher(FetchConfig(), CorpusConfig(location=str(tmp_path)), tmp_path, threading.Event()) as fetcher,
            fetcher.fetched(record) as clip,
        ):
            assert clip.path.name == f"clip.{suffix}"


def test_a_gif_is_read(folder: Path) -> None:
    path = folder / "film.gif"
    ffmpeg_run("-i", source(folder, "plain.mp4", SMALL, 80), path)
    facts = probed(path, CONFIG)
    assert decode_window(path, facts, Window(0.2, 49, "test"), only_bucket(CONFIG), CONFIG).shape == (49, 96, 160, 3)


@pytest.mark.parametrize("level", ["not a list", {"text": "a"}, 7, True])
def test_a_level_of_the_wrong_type_is_a_defect_and_no_caption(level: object) -> None:
    levels = {"semantic_level": level, "object_level": [{"text": "b.", "tc_in": "soon", "tc_out": ""}]}
    data = {"file_id": "1", "labeling_data_info": {"caption_info": levels}}
    record = parse_record(json.dumps(data).encode(), "1.json")
    assert isinstance(record, Record)
    assert record.semantic == record.object == ()
    assert {"wrong-type-captions", "bad-timecode"} <= set(record.defects)


def test_the_inspector_runs_our_code_in_a_folder_with_a_preprocess_py(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(folder, "plain.mp4", SMALL, 80)
    for name in ("preprocess", "shards", "train", "av", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user’s own file')\n")
    monkeypatch.chdir(tmp_path)
    assert probed(path, CONFIG).num_frames == 80


def test_every_child_is_started_so_that_the_current_folder_is_not_searched() -> None:
    """`-m` and `-c` put the current folder first on the path unless -P is given."""
    root = Path(inspector.__file__).parents[2]
    for package in ("preprocess", "shards", "train"):
        for file in (root / package).rglob("*.py"):
            lines = file.read_text().splitlines()
            for number, line in enumerate(lines):
                if "sys.executable," in line and not line.strip().startswith("#"):
                    assert '"-P"' in line, f"{file}:{number + 1}"


def test_a_window_that_rests_or_is_black_is_refused_and_a_slide_is_not(tmp_path: Path) -> None:
    config = prep_config(((160, 96),))
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(40, 200, (12, 20)), np.ones((8, 8)))
    other = np.kron(rng.integers(40, 200, (12, 20)), np.ones((8, 8)))
    grain = rng.normal(0, 5, (60, 96, 160))
    clips = {
        "still": np.repeat(picture[None], 60, axis=0),
        "noisy": picture[None] + grain,
        "slide": np.stack([picture if n < 30 else other for n in range(60)]),
        "black": np.full((60, 96, 160), 2) + grain / 3,
    }
    reasons = {}
    for name, frames in clips.items():
        path = write_clip(tmp_path / f"{name}.mp4", np.clip(frames, 0, 255).astype(np.uint8), 24, *SMALL)
        window = Window(0.1, 49, "test")
        decoded = decode_window(path, probed(path, config), window, only_bucket(config), config)
        measured = measure_window(decoded, 1.0)
        refused = _refused_by_measure(measured, window, config)
        reasons[name] = refused and refused[:2]
    assert reasons == {
        "still": ("window", "no-motion"), "noisy": ("window", "no-motion"), "slide": None, "black": ("window", "black"),
    }  # fmt: skip
    still = Measured(motion=0.0, black_share=0.0, kept_share=1.0)
    assert _refused_by_measure(still, Window(0.0, 1, "image"), config) is None, "one frame is exempt"
    lax = prep_config(window={"min_motion": 0, "max_black_share": 1})
    assert _refused_by_measure(still, Window(0.0, 49, "t"), lax) is None


def test_a_shape_that_loses_most_of_its_picture_is_refused() -> None:
    facts = weigh(
        Inspection(
            width=2000, height=200, num_frames=80, period_seconds=0.04, end_seconds=3.2, pixel_format="yuv420p",
            codec="h264", format="mov", stream=0,
        ),
        a_record(), CONFIG,
    )  # fmt: skip
    config = prep_config(((832, 480), (480, 832)))
    refused = choose_bucket(facts, config.buckets)
    assert isinstance(refused, Rejection) and refused[:2] == ("bucket", "cropped-too-much")
    assert "keep 0.173" in refused.detail
    lax = config.buckets.model_copy(update={"min_kept_share": 0.1})
    assert choose_bucket(facts, lax) == PictureSize(width=832, height=480)
    portrait = facts.model_copy(update={"display_width": 540.0, "display_height": 960.0})
    only_wide = prep_config(((832, 480),)).buckets
    assert isinstance(choose_bucket(portrait, only_wide), Rejection)


def test_a_stream_that_appears_in_mid_file_ends_nothing(folder: Path) -> None:
    """A transport stream may announce a stream at any time; PyAV then mostly raises IndexError when it has read all."""
    later = source(folder, "later.ts", (*SMALL, "-mpegts_start_pid", "400"), 80)
    path = folder / "joined.ts"
    path.write_bytes(source(folder, "first.ts", SMALL).read_bytes() * 3 + later.read_bytes())
    config = prep_config(((160, 96),), window={"policy": "start"})
    facts = probed(path, config)
    window = choose_windows(facts, a_record(), config)[0]
    assert read_number(decode_window(path, facts, window, only_bucket(config), config)[0]) == 0

    class Ending:
        def demux(self) -> Iterator[object]:
            with av.open(str(path)) as container:
                yield from container.demux()
            raise IndexError("list index out of range")

    with av.open(str(path)) as container:
        packets, _, _ = read_packets(Ending(), container.streams.video[0], [])
    assert len(packets) == 600
