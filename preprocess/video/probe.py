"""The truth about one file: read by a child process, weighed here, every decision with its ground.

The file's figures count, not the annotation's; both are kept, and how they differ. Nothing of the file is decoded in
this process: see docs/decisions/020-probe-in-a-child.md.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import JsonValue

from preprocess.config import PrepConfig
from preprocess.corpus.records import Record
from preprocess.facts import ClipFacts, Crop, Inspection, recorded_facts
from preprocess.rejection import ClipRejected
from preprocess.video.aspect import Raster, decide_aspect
from preprocess.video.container import sniff_cut, sniff_playlist
from preprocess.video.inspection import inspect_file, reject_clip
from preprocess.video.interlace import Scan, decide_interlace

HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
WIDE_PRIMARIES = {8: "film", 9: "BT.2020", 10: "SMPTE ST 428-1 (XYZ)", 11: "DCI-P3", 12: "Display P3"}
"""Primaries that show other colours when they are read as BT.709's; those of SD differ from these by little."""
JPEG_CODECS = ("mjpeg", "jpeg2000", "jpegls", "mjpegb")
MATRICES: dict[int, Literal["bt601", "bt709", "fcc", "smpte240m", "bt2020", "rgb"]] = {
    0: "rgb",
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    9: "bt2020",
}


def probe_clip(path: Path, record: Record, config: PrepConfig) -> ClipFacts:
    """Read `path` in a child process and decide how it is to be shown and decoded.

    Raises ClipRejected (stage `probe`) with its own reason for each kind of bad file, within
    `decode.timeout_seconds`.
    """
    _refuse_odd_file(path)
    cut = _sniff(sniff_cut, path)
    if cut and config.decode.policy == "strict":
        reject_clip("truncated", cut)
    inspection = inspect_file(path, config)
    if cut and not inspection.truncated:
        inspection = inspection.model_copy(update={"truncated": cut})
    try:
        _refuse_unusable(inspection, config)
        _refuse_length(inspection, config)
        facts = weigh(inspection, record, config)
    except ClipRejected as rejected:
        rejected.facts = recorded_facts(inspection)
        raise
    if config.window.max_scene_score is None or facts.media == "image":
        return facts
    from preprocess.video.decode import find_cuts

    return facts.model_copy(update={"cuts": find_cuts(path, facts, config)})


def weigh(inspection: Inspection, record: Record, config: PrepConfig) -> ClipFacts:
    """Decide everything from an inspection and the annotation; pure. Raises ClipRejected."""
    scan = decide_interlace(inspection)
    rotation, mirrored, rotation_ground = _orientation(inspection)
    geometry = _geometry(inspection, record, config, rotation in (90, 270), scan)
    matrix, matrix_ground = _matrix(inspection)
    color_range, range_ground = _range(inspection, matrix)
    shown = (geometry.display_width, geometry.display_height)
    display_width, display_height = shown if rotation in (0, 180) else shown[::-1]
    fps = 1 / inspection.period_seconds
    duration = inspection.end_seconds - inspection.start_seconds
    left, top, right, bottom = inspection.bars
    decisions: dict[str, JsonValue] = {
        "aspect": {"value": f"{float(geometry.aspect):.4f}", "ground": geometry.ground},
        "stream": {"value": inspection.stream, "ground": inspection.stream_ground},
        "vbi_lines": {"value": inspection.vbi_lines, "ground": inspection.vbi_ground},
        "bars": {"value": [left, top, right, bottom], "ground": f"{len(inspection.pictures)} pictures"},
        "interlace": {"value": scan.parity, "frames": scan.frames, "ground": scan.ground},
        "rotation": {"value": rotation, "mirrored": mirrored, "ground": rotation_ground},
        "frame_rate": {"value": round(fps, 6), "constant": inspection.is_constant_rate, "ground": "packet timestamps"},
        "matrix": {"value": matrix, "ground": matrix_ground},
        "range": {"value": color_range, "ground": range_ground},
        "duration_seconds": {"value": round(duration, 6), "ground": "packet timestamps"},
        "differences": _differences(inspection, record, fps, duration),
    }
    if inspection.lines_below:
        ground = "blank lines of a raster of 512 or 608 lines: flat and unchanged, with a straight upper edge"
        decisions["lines_below"] = {"value": inspection.lines_below, "ground": ground}
    if inspection.truncated:
        decisions["truncated"] = {"value": True, "ground": inspection.truncated}
    if inspection.corrupt_seconds:
        ground = f"{len(inspection.corrupt_seconds)} packets are marked corrupt"
        decisions["damaged"] = {"value": True, "ground": ground}
    return ClipFacts(
        media="image" if inspection.is_still else "video",
        format=inspection.format,
        codec=inspection.codec,
        pixel_format=inspection.pixel_format,
        stream=inspection.stream,
        width=inspection.width,
        height=inspection.height,
        raster=geometry.raster,
        active=geometry.active,
        display_width=display_width,
        display_height=display_height,
        rotation=rotation,
        mirrored=mirrored,
        deinterlace=scan.parity,
        deinterlace_frames=scan.frames,
        matrix=matrix,
        range=color_range,
        fps=fps,
        is_constant_rate=inspection.is_constant_rate,
        zero_seconds=inspection.zero_seconds,
        start_seconds=inspection.start_seconds,
        end_seconds=inspection.end_seconds,
        duration_seconds=duration,
        max_gap_seconds=inspection.max_gap_seconds,
        num_frames=inspection.num_frames,
        key_seconds=inspection.key_seconds,
        picture_seconds=inspection.picture_seconds,
        corrupt_seconds=inspection.corrupt_seconds,
        decisions=decisions,
    )


class _Geometry(NamedTuple):
    raster: Crop
    active: Crop
    aspect: Fraction
    ground: str
    display_width: float
    display_height: float


def _geometry(inspection: Inspection, record: Record, config: PrepConfig, turned: bool, scan: Scan) -> _Geometry:
    """Crops in coded pixels, and the size that the active picture is shown at: its lines kept, its width stretched."""
    width, vbi, below = inspection.width, inspection.vbi_lines, inspection.lines_below
    declared = None
    if record.declared_width and record.declared_height:
        declared = (record.declared_width, record.declared_height)
    flagged = Fraction(*inspection.sample_aspect) if inspection.sample_aspect else None
    aspect, ground = decide_aspect(
        Raster(width, inspection.height, vbi + below, flagged, declared, turned, inspection.bars),
        config.decode.sd_display_aspect,
    )
    # Lines are cut in fours where fields must keep their order in subsampled chroma too, else in twos.
    step = 4 if scan.parity != "none" else 2
    above = -(-vbi // step) * step
    height = inspection.height - -(-below // step) * step
    left, top, right, bottom = inspection.bars
    x, right = -(-left // 2) * 2, -(-right // 2) * 2
    y = max(-(-(vbi + top) // 2) * 2, above)
    active_width = (width - x - right) // 2 * 2 if x + right else width
    active_height = (height - y - bottom) // 2 * 2 if y + bottom else height
    pixel_aspect = aspect * Fraction(inspection.height - vbi - below, width)
    return _Geometry(
        raster=Crop(x=0, y=above, width=width, height=height - above),
        active=Crop(x=x, y=y, width=active_width, height=active_height),
        aspect=aspect,
        ground=ground,
        display_width=float(active_width * pixel_aspect),
        display_height=float(active_height),
    )


def _orientation(inspection: Inspection) -> tuple[Literal[0, 90, 180, 270], bool, str]:
    """Clockwise turn, and whether the picture is flipped left to right before it, from the display matrix."""
    if inspection.display_matrix is None:
        return 0, False, "no display matrix"
    a, b, c, d = inspection.display_matrix
    scale = max(abs(value) for value in (a, b, c, d))
    if not scale or not math.isfinite(scale):
        reject_clip("odd-rotation", f"display matrix {inspection.display_matrix}")
    signs = tuple(round(value / scale) for value in (a, b, c, d))
    turns: dict[tuple[int, ...], tuple[Literal[0, 90, 180, 270], bool]] = {
        (1, 0, 0, 1): (0, False),
        (0, 1, -1, 0): (90, False),
        (-1, 0, 0, -1): (180, False),
        (0, -1, 1, 0): (270, False),
        (-1, 0, 0, 1): (0, True),
        (1, 0, 0, -1): (180, True),
        (0, -1, -1, 0): (90, True),
        (0, 1, 1, 0): (270, True),
    }
    off_axis = max(abs(value / scale - sign) for value, sign in zip((a, b, c, d), signs, strict=True))
    if signs not in turns or off_axis > 0.02:
        reject_clip("odd-rotation", f"display matrix {a:.3f} {b:.3f} {c:.3f} {d:.3f} is no multiple of 90°")
    return *turns[signs], "display matrix"


def _matrix(inspection: Inspection) -> tuple[Literal["bt601", "bt709", "fcc", "smpte240m", "bt2020", "rgb"], str]:
    name = inspection.pixel_format
    if name.startswith(("rgb", "bgr", "gbr", "argb", "abgr", "pal", "0rgb", "0bgr")):
        return "rgb", f"pixel format {name}"
    if inspection.matrix in MATRICES and inspection.matrix != 0:
        return MATRICES[inspection.matrix], "flagged"
    if inspection.matrix not in (0, 2):
        reject_clip("matrix-unsupported", f"matrix coefficients {inspection.matrix} (ISO 23091-2)")
    if inspection.is_still or inspection.codec in JPEG_CODECS:
        return "bt601", "not flagged: JPEG's"
    # Consumer and broadcast practice: BT.709 belongs to HD rasters, BT.601 to the smaller ones.
    if inspection.width >= 1280 or inspection.height > 608:
        return "bt709", "not flagged: HD raster"
    return "bt601", "not flagged: SD raster"


def _range(inspection: Inspection, matrix: str) -> tuple[Literal["limited", "full"], str]:
    if matrix == "rgb":
        return "full", "RGB"
    if inspection.range in (1, 2):
        return ("limited", "full")[inspection.range - 1], "flagged"
    if inspection.pixel_format.startswith("yuvj"):
        return "full", f"pixel format {inspection.pixel_format}"
    return "limited", "not flagged"


def _differences(inspection: Inspection, record: Record, fps: float, duration: float) -> dict[str, JsonValue]:
    """What the annotation claims otherwise: {field: [declared, found]}."""
    found: dict[str, JsonValue] = {}
    if record.declared_width and record.declared_height:
        declared = (record.declared_width, record.declared_height)
        if declared != (inspection.width, inspection.height):
            found["size"] = [f"{declared[0]}×{declared[1]}", f"{inspection.width}×{inspection.height}"]
    if record.declared_fps and abs(record.declared_fps / fps - 1) > 0.005:
        found["fps"] = [record.declared_fps, round(fps, 3)]
    if record.declared_seconds is not None and abs(record.declared_seconds - duration) > 0.1:
        found["seconds"] = [record.declared_seconds, round(duration, 3)]
    return found


def _refuse_odd_file(path: Path) -> None:
    """Only a plain file of a known kind is ever opened: a FIFO would block, a playlist would lead elsewhere."""
    try:
        status = path.stat()
    except OSError as error:
        reject_clip("cannot-open", error.strerror or "stat failed", retryable=True)
    if not stat.S_ISREG(status.st_mode):
        reject_clip("not-a-file", stat.filemode(status.st_mode))
    if status.st_size == 0:
        reject_clip("empty-file", "0 bytes", retryable=True)
    kind = _sniff(sniff_playlist, path)
    if kind is not None:
        reject_clip("playlist", kind)


def _sniff(sniffer: Callable[[Path], str | None], path: Path) -> str | None:
    """What `sniffer` says of a file that can be read. One that cannot costs its clip, not the build."""
    try:
        return sniffer(path)
    except OSError as error:
        reject_clip("cannot-open", error.strerror or type(error).__name__, retryable=True)


def _refuse_unusable(inspection: Inspection, config: PrepConfig) -> None:
    if inspection.problem:
        reject_clip(inspection.problem, inspection.detail)
    if inspection.is_still != config.sieve.images and inspection.is_still:
        reject_clip("image", inspection.format)
    sizes = sorted({(picture.width, picture.height) for picture in inspection.pictures})
    if len(sizes) > 1:
        reject_clip("size-changes", ", ".join(f"{width}×{height}" for width, height in sizes))
    if config.decode.policy == "strict" and inspection.truncated:
        reject_clip("truncated", inspection.truncated)
    if inspection.transfer in HDR_TRANSFERS:
        reject_clip("hdr", HDR_TRANSFERS[inspection.transfer])
    if inspection.primaries in WIDE_PRIMARIES:
        reject_clip(
            "primaries-unsupported", f"{WIDE_PRIMARIES[inspection.primaries]} (ISO 23091-2 {inspection.primaries})"
        )


def _refuse_length(inspection: Inspection, config: PrepConfig) -> None:
    """The sieve's limits on the probed length; half a frame is granted, for timestamps are rounded."""
    if inspection.is_still:
        return
    duration = inspection.end_seconds - inspection.start_seconds
    grace = inspection.period_seconds / 2
    if duration < config.sieve.min_seconds - grace:
        reject_clip("too-short", f"{duration:.3f} s, sieve.min_seconds {config.sieve.min_seconds:g}")
    if duration > config.sieve.max_seconds + grace:
        reject_clip("too-long", f"{duration:.3f} s, sieve.max_seconds {config.sieve.max_seconds:g}")
