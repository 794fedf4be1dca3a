"""What is interlaced is deinterlaced, whatever its flags; what is not comes through untouched."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from clips import LOSSLESS, SMALL, interlaced, only_bucket, prep_config, probed, weave, write_clip

from preprocess.config import PrepConfig
from preprocess.facts import ClipFacts, Inspection, MeasuredPicture
from preprocess.video.decode import decode_window, window_arguments
from preprocess.video.ffmpeg import find_ffmpeg
from preprocess.video.interlace import decide_interlace
from preprocess.video.measure import fields_of
from preprocess.video.window import Window

WIDTH, HEIGHT = 320, 192
CONFIG = prep_config(((WIDTH, HEIGHT),))
WINDOW = Window(0.2, 49, "test")


def moving_edge(num: int, step: int = 3, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """An upright edge, dark to its left, that moves `step` pixels a picture over a faint texture."""
    ground = np.random.default_rng(1).integers(0, 12, (height, width)).astype(np.int16)
    pictures = []
    for n in range(num):
        edge = 40 + step * n % (width - 80)
        pictures.append((np.where(np.arange(width) < edge, 60, 190)[None, :] + ground).astype(np.uint8))
    return np.stack(pictures)


def raggedness(frames: np.ndarray) -> float:
    """Worst share, over the frames, of rows whose edge lies more than a pixel from the other rows' edge."""
    worst = 0.0
    for frame in frames:
        gray = frame[12:-12].astype(np.float32).mean(axis=2)
        places = (gray < 128).sum(axis=1)
        worst = max(worst, float((np.abs(places - np.median(places)) > 1.0).mean()))
    return worst


def decode(path: Path, facts: ClipFacts, config: PrepConfig = CONFIG) -> np.ndarray:
    return decode_window(path, facts, WINDOW, only_bucket(config), config)


@pytest.fixture(scope="session")
def scan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scan")


@pytest.mark.parametrize("order", ["tff", "bff"])
@pytest.mark.parametrize("flagged", [True, False], ids=["flagged", "unflagged"])
def test_a_moving_edge_shows_no_comb(scan_folder: Path, order: str, flagged: bool) -> None:
    top_first = order == "tff"
    woven = weave(moving_edge(150), top_first=top_first)
    options = interlaced(top_first, ("-crf", "5")) if flagged else SMALL
    path = write_clip(scan_folder / f"{order}-{flagged}.mp4", woven, 25, *options)
    facts = probed(path, CONFIG)
    assert facts.deinterlace == order
    assert order in facts.decisions["interlace"]["ground"]
    assert raggedness(decode(path, facts)) < 0.02
    untouched = facts.model_copy(update={"deinterlace": "none"})
    assert raggedness(decode(path, untouched)) > 0.4, "the clip does comb when it is left alone"
    wrong = facts.model_copy(update={"deinterlace": "bff" if top_first else "tff"})
    assert not np.array_equal(decode(path, wrong), decode(path, facts))


@pytest.mark.parametrize("lines", [30, 33])
def test_the_blanking_crop_keeps_the_field_order(scan_folder: Path, lines: int) -> None:
    pictures = moving_edge(150, height=480, width=720)
    rng = np.random.default_rng(2)
    pictures[:, :lines] = 16
    for line in (2, 10, 11, 20, 21):
        data = rng.choice(np.array([16, 180], np.uint8), (len(pictures), 90))
        pictures[:, line] = np.repeat(data, 8, axis=1)
    path = write_clip(scan_folder / f"vbi{lines}.mp4", weave(pictures), 25, *interlaced(True, ("-crf", "5")))
    config = prep_config(((320, 192),))
    facts = probed(path, config)
    assert facts.deinterlace == "tff"
    assert facts.decisions["vbi_lines"]["value"] == lines
    assert facts.raster.y % 4 == 0 and lines <= facts.raster.y < lines + 4
    assert raggedness(decode(path, facts, config)) < 0.02


@pytest.mark.parametrize("flagged", [True, False], ids=["flagged", "unflagged"])
def test_progressive_pictures_are_bit_equal_to_no_filter(scan_folder: Path, flagged: bool) -> None:
    options = interlaced(True, ("-crf", "5")) if flagged else SMALL
    path = write_clip(scan_folder / f"progressive-{flagged}.mp4", moving_edge(80, step=5), 24, *options)
    facts = probed(path, CONFIG)
    assert facts.deinterlace == "none"
    bare = [
        find_ffmpeg(),
        "-v",
        "error",
        "-i",
        str(path),
        "-frames:v",
        "49",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "yuv420p",
        "-",
    ]
    planes = subprocess.run(bare, capture_output=True, check=True, timeout=60).stdout
    luma = np.frombuffer(planes, np.uint8).reshape(49, -1)[:, : WIDTH * HEIGHT].reshape(49, HEIGHT, WIDTH)
    window = Window(0.0, 49, "test")
    arguments = window_arguments(path, facts, window, only_bucket(CONFIG), CONFIG, None)
    as_planes = [argument.replace("format=rgb24", "null") for argument in arguments]
    as_planes[as_planes.index("rgb24")] = "yuv420p"
    graph = as_planes.index("-filter_complex") + 1
    as_planes[graph] = ";".join(part for part in as_planes[graph].split(";") if "]scale=" not in part)
    as_planes[graph] = _rejoin(as_planes[graph])
    ours = subprocess.run([find_ffmpeg(), *as_planes], capture_output=True, check=True, timeout=60).stdout
    got = np.frombuffer(ours, np.uint8).reshape(49, -1)[:, : WIDTH * HEIGHT].reshape(49, HEIGHT, WIDTH)
    assert np.array_equal(got, luma)


def _rejoin(graph: str) -> str:
    """Link the filters again after one was taken out of the chain."""
    filters = [part[part.rindex("]", 0, part.rindex("[")) + 1 : part.rindex("[")] for part in graph.split(";")]
    return f"[0:0]{','.join(filters)}[{graph.rsplit('[', 1)[1]}"


def test_a_flag_is_believed_where_nothing_moves(scan_folder: Path) -> None:
    still = np.repeat(moving_edge(1), 80, axis=0)
    path = write_clip(scan_folder / "still.mp4", still, 25, *interlaced())
    facts = probed(path, CONFIG)
    assert facts.deinterlace in ("tff", "auto")
    assert "pictures unclear" in facts.decisions["interlace"]["ground"]


def test_an_interlaced_size_is_no_ground(scan_folder: Path) -> None:
    """720×512 and 720×486 are interlaced as often as not: only flags and pictures say."""
    for width, height in ((720, 512), (720, 486)):
        frames = moving_edge(50, height=height, width=width)
        facts = probed(write_clip(scan_folder / f"{height}.mp4", frames, 25, *SMALL), CONFIG)
        assert facts.deinterlace == "none"


def test_idet_alone_does_not_comb_a_progressive_test_picture(scan_folder: Path) -> None:
    """idet takes ffmpeg's own progressive test picture for bottom field first; the pictures know better."""
    path = scan_folder / "testsrc2.mp4"
    command = [find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", "testsrc2=s=320x192:r=25:d=2.5", *LOSSLESS, str(path)]
    subprocess.run(command, check=True, timeout=60)
    facts = probed(path, CONFIG)
    assert facts.deinterlace == "none"


def inspection(
    flags: list[bool], scan: dict[str, int], idet: dict[str, int] | None = None, order: int = 0
) -> Inspection:
    pictures = tuple(MeasuredPicture(seconds=0.0, width=8, height=8, interlaced=flag, mean=90.0) for flag in flags)
    votes = {"progressive": 0, "tff": 0, "bff": 0, "unclear": 0} | scan
    counts = None if idet is None else {"progressive": 0, "tff": 0, "bff": 0, "undetermined": 0} | idet
    return Inspection(pictures=pictures, scan=votes, idet=counts, field_order=order)


@pytest.mark.parametrize(
    ("given", "parity", "frames"),
    [
        (inspection([False] * 4, {"progressive": 4}), "none", "all"),
        (inspection([True] * 4, {"tff": 4}, order=2), "tff", "all"),
        (inspection([True] * 4, {"bff": 4}, {"bff": 50}, order=2), "bff", "all"),  # the flagged order lies
        (inspection([False] * 4, {"tff": 4}, {"tff": 50}), "tff", "all"),  # the flag lies
        (inspection([False] * 4, {"tff": 4}, {"progressive": 50}), "none", "all"),  # idet decides
        (inspection([True] * 4, {"progressive": 4}, {"progressive": 50}, order=2), "none", "all"),
        (inspection([True] * 4, {"progressive": 4}, {"tff": 50}, order=2), "tff", "all"),  # idet decides
        (inspection([True] * 4, {"unclear": 4}, {"undetermined": 60}), "auto", "all"),
        (inspection([True] * 4, {"unclear": 4}, {"undetermined": 60}, order=2), "tff", "all"),
        (inspection([True] * 4, {"unclear": 4}, {"undetermined": 60}, order=3), "bff", "all"),
        (
            inspection([True] * 4, {"unclear": 4}, {"undetermined": 60}, order=4),
            "bff",
            "all",
        ),  # top coded, bottom shown
        (inspection([True] * 4, {"unclear": 4}, {"undetermined": 60}, order=5), "tff", "all"),
        (inspection([True, False] * 2, {"tff": 2, "progressive": 1}), "auto", "flagged"),
    ],
)
def test_flags_pictures_and_idet_are_weighed(given: Inspection, parity: str, frames: str) -> None:
    scan = decide_interlace(given)
    assert (scan.parity, scan.frames) == (parity, frames)


@pytest.mark.parametrize("order", ["tff", "bff"])
def test_two_frames_tell_how_they_were_scanned(order: str) -> None:
    pictures = moving_edge(4)
    assert fields_of(pictures[0], pictures[1]) == "progressive"
    first, second = weave(pictures, top_first=order == "tff")
    assert fields_of(first, second) == order
    assert fields_of(first, first) == "unclear"
    assert fields_of(pictures[0], 255 - pictures[1]) == "unclear", "a cut"
