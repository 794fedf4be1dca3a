"""Each kind of bad file ends as a rejection with its own reason, in time, and leaves no process and no file behind."""

from __future__ import annotations

import errno
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import SMALL, a_record, ffmpeg_run, number_picture, only_bucket, prep_config, probed, write_clip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preprocess.config import PrepConfig
from preprocess.facts import ClipFacts
from preprocess.rejection import ClipRejected, Rejection
from preprocess.video import ffmpeg, probe
from preprocess.video.container import PLAYLISTS, sniff_cut, sniff_playlist
from preprocess.video.decode import decode_window, split_log
from preprocess.video.ffmpeg import (
    FFMPEG_VARIABLE,
    complaints,
    ffmpeg_version,
    file_url,
    find_ffmpeg,
    run_ffmpeg,
    run_killable,
)
from preprocess.video.inspection import inspect_file
from preprocess.video.probe import probe_clip
from preprocess.video.window import Window
from shards.errors import UserError

CONFIG = prep_config(((160, 96),), decode={"timeout_seconds": 60.0})
HASTY = prep_config(((160, 96),), decode={"timeout_seconds": 1.0})
TOLERANT = prep_config(((160, 96),), decode={"policy": "tolerant", "timeout_seconds": 60.0})
WINDOW = Window(0.1, 49, "test")


@pytest.fixture(scope="session")
def good_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = np.stack([number_picture(n) for n in range(100)])
    noise = np.random.default_rng(0).integers(0, 40, frames.shape, dtype=np.uint8)
    return write_clip(
        tmp_path_factory.mktemp("good") / "good.mp4", frames + noise, 25, *SMALL, "-movflags", "+faststart"
    )


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does, its temporary folder stays empty and no child of this process remains."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    before = children()
    yield
    assert list(scratch.iterdir()) == []
    assert children() <= before
    find_ffmpeg.cache_clear()
    ffmpeg_version.cache_clear()


def children() -> set[int]:
    """Processes whose parent is this one, zombies included."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(status.parent.name))
    return found


def running(mark: str) -> list[str]:
    """Command lines of all processes that hold `mark`; the killed have ten seconds to be gone, on a busy machine."""
    deadline = time.monotonic() + 10.0
    while True:
        lines = [line for line in _command_lines() if mark in line]
        if not lines or time.monotonic() > deadline:
            return lines
        time.sleep(0.05)


def _command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue


def refused(path: Path, config: PrepConfig = CONFIG) -> Rejection:
    """The rejection that probing ends with, or, where the probe passes, decoding."""
    with pytest.raises(ClipRejected) as caught:
        facts = probe_clip(path, a_record(), config)
        decode_window(path, facts, WINDOW, only_bucket(config), config)
    assert str(path.parent) not in caught.value.rejection.detail, "a ledger's bytes must not depend on the folder"
    return caught.value.rejection


def half(path: Path, target: Path, share: float = 0.5) -> Path:
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def huge_avi(path: Path, codec: bytes) -> Path:
    """An AVI whose header claims 100,000×100,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    main = struct.pack("<14I", 40000, 0, 0, 0x10, 75, 0, 1, 0, 100_000, 100_000, 0, 0, 0, 0)
    stream = b"vids" + codec + struct.pack("<IHHIIIIIIII4H", 0, 0, 0, 0, 1, 25, 0, 75, 0, 0xFFFFFFFF, 0, 0, 0, 0, 0)
    picture = struct.pack("<IiiHH4sIiiII", 40, 100_000, 100_000, 1, 24, codec, 0, 0, 0, 0, 0)
    streams = chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", picture))
    header = chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + streams)
    movie = chunk(b"LIST", b"movi" + b"".join(chunk(b"00dc", b"\xff\xd8" + b"x" * 200) for _ in range(75)))
    path.write_bytes(chunk(b"RIFF", b"AVI " + header + movie))
    return path


def fake_ffmpeg(path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a script in ffmpeg's place for this test."""
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    monkeypatch.setenv(FFMPEG_VARIABLE, str(path))
    find_ffmpeg.cache_clear()


HANGS = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", os.path.abspath(__file__)])
sys.stdout.buffer.write(b"x" * 1000)
sys.stdout.flush()
time.sleep(600)
"""


def test_a_decoder_that_hangs_and_ignores_sigterm_is_killed_with_its_children(
    good_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = probed(good_clip, CONFIG)
    fake_ffmpeg(tmp_path / "hanging-ffmpeg", HANGS, monkeypatch)
    begun = time.monotonic()
    with pytest.raises(ClipRejected) as caught:
        decode_window(good_clip, facts, WINDOW, only_bucket(HASTY), HASTY)
    assert time.monotonic() - begun < 1.0 + 2.0
    assert caught.value.rejection[:2] == ("decode", "decode-timeout")
    assert caught.value.rejection.retryable
    assert running(str(tmp_path)) == []


def test_a_decoder_that_closes_its_pipes_and_stays_is_killed(tmp_path: Path) -> None:
    code = "import os, time; os.close(1); os.close(2); time.sleep(600)"
    begun = time.monotonic()
    result = run_killable([sys.executable, "-c", code, str(tmp_path)], timeout_seconds=1.0, max_stdout_bytes=10)
    assert result.timed_out
    assert time.monotonic() - begun < 3.0
    assert running(str(tmp_path)) == []


def test_a_child_that_outlives_its_parent_does_not_hold_us(tmp_path: Path) -> None:
    sleeper = "import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleeper}', '{tmp_path}'])"
    begun = time.monotonic()
    result = run_killable([sys.executable, "-c", code], timeout_seconds=30.0, max_stdout_bytes=10)
    assert result.returncode == 0 and not result.timed_out
    assert time.monotonic() - begun < 15.0
    assert running(str(tmp_path)) == []


def test_what_a_program_writes_in_its_last_moment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes and ends between a look at its pipes and a look at whether it lives."""
    real = ffmpeg._has_ended

    def late(process: Any) -> bool:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return real(process)

    monkeypatch.setattr(ffmpeg, "_has_ended", late)
    code = "import time; time.sleep(1); print('x' * 100_000, end='')"
    result = run_killable([sys.executable, "-c", code], timeout_seconds=30.0, max_stdout_bytes=1 << 20)
    assert result.returncode == 0 and len(result.stdout) == 100_000


def test_output_without_end_is_cut_and_stderr_is_bounded() -> None:
    flood = "import sys\nwhile True: sys.stdout.write('x' * 65536); sys.stderr.write('e' * 65536)"
    result = run_killable([sys.executable, "-c", flood], timeout_seconds=30.0, max_stdout_bytes=1 << 20)
    assert result.overflowed and not result.timed_out
    assert len(result.stdout) <= 1 << 20
    assert len(result.stderr) <= 64 * 1024


@pytest.mark.parametrize("sniffer", ["sniff_playlist", "sniff_cut"])
@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), OSError(errno.EIO, "Input/output error")])
def test_a_file_that_cannot_be_read_costs_its_clip_only(
    good_clip: Path, monkeypatch: pytest.MonkeyPatch, sniffer: str, error: OSError
) -> None:
    def fail(path: Path) -> None:
        raise error  # a broken disk cannot be had in a test, nor a closed file by root

    monkeypatch.setattr(probe, sniffer, fail)
    with pytest.raises(ClipRejected) as caught:
        probe_clip(good_clip, a_record(), CONFIG)
    assert caught.value.rejection == Rejection("probe", "cannot-open", str(error.strerror), True)


def test_a_prober_that_hangs_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe.mp4"
    os.mkfifo(fifo)
    assert refused(fifo)[:2] == ("probe", "not-a-file")
    begun = time.monotonic()
    with pytest.raises(ClipRejected) as caught:
        inspect_file(fifo, HASTY)  # past the check: the open blocks for ever
    assert caught.value.rejection[:2] == ("probe", "probe-timeout")
    assert time.monotonic() - begun < 3.0
    assert running(str(fifo)) == []


@pytest.mark.parametrize("codec", [b"MJPG", b"H264", b"\0\0\0\0"], ids=["mjpeg", "h264", "raw"])
def test_a_hundred_thousand_pixels_square_are_refused(tmp_path: Path, codec: bytes) -> None:
    path = huge_avi(tmp_path / "huge.avi", codec)
    assert refused(path)[:2] == ("probe", "too-large")


def test_a_picture_above_the_configured_limit_is_refused(good_clip: Path) -> None:
    config = prep_config(decode={"max_megapixels": 0.01})
    rejection = refused(good_clip, config)
    assert rejection[:2] == ("probe", "too-large")
    assert "160×96" in rejection.detail


LISTS = {
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{good}\n#EXT-X-ENDLIST\n",
    "bom.mp4": "\ufeff\n #EXTM3U\n#EXTINF:3,\n{good}\n",
    "concat.mp4": "ffconcat version 1.0\nfile '{good}'\n",
    "dash.mp4": '<?xml version="1.0"?><MPD><Period/></MPD>',
    "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_playlist_in_disguise_is_refused_unopened(tmp_path: Path, good_clip: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(LISTS[name].format(good=good_clip))
    assert refused(path)[:2] == ("probe", "playlist")


def test_the_libraries_refuse_playlists_too(tmp_path: Path, good_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fence: should a playlist slip past the look at its first bytes, no demuxer for it may open it."""
    monkeypatch.setattr("preprocess.video.probe.sniff_playlist", lambda path: None)
    for name, kind in (("list.m3u8", "hls.mp4"), ("concat.mp4", "concat.mp4")):
        path = tmp_path / name
        path.write_text(LISTS[kind].format(good=good_clip))
        rejection = refused(path)
        assert rejection[:2] == ("probe", "format-refused"), rejection
        facts = probed(good_clip, CONFIG)
        with pytest.raises(ClipRejected) as caught:
            decode_window(path, facts, WINDOW, only_bucket(CONFIG), CONFIG)
        assert caught.value.rejection[:2] == ("decode", "decode-errors")
        assert str(tmp_path) not in caught.value.rejection.detail


def test_a_name_that_looks_like_a_protocol_is_a_file(good_clip: Path, tmp_path: Path) -> None:
    for name in ("concat:a.mp4", "-i.mp4", "http:x.mp4"):
        path = tmp_path / name
        path.write_bytes(good_clip.read_bytes())
        facts = probed(path, CONFIG)
        assert len(decode_window(path, facts, WINDOW, only_bucket(CONFIG), CONFIG)) == 49
    assert file_url(Path("/a/-i.mp4")) == "file:/a/-i.mp4"


@pytest.mark.parametrize("name", ["index-last.mp4", "index-first.mp4", "half.mkv", "half.avi"])
def test_a_file_cut_in_half_is_refused(good_clip: Path, tmp_path: Path, name: str) -> None:
    whole = tmp_path / f"whole-{name}"
    copied = {"index-first.mp4": ["-movflags", "+faststart"]}.get(name, [])
    codec = ["-c:v", "mpeg4"] if name.endswith("avi") else ["-c", "copy"]
    ffmpeg_run("-i", good_clip, *codec, *copied, whole)
    rejection = refused(half(whole, tmp_path / name))
    assert rejection[:2] == ("probe", "truncated")


def test_the_tolerant_policy_takes_what_is_there(good_clip: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.mkv"
    ffmpeg_run("-i", good_clip, "-c", "copy", whole)
    path = half(whole, tmp_path / "cut.mkv", 0.85)
    assert refused(path)[1] == "truncated"
    facts = probed(path, TOLERANT)
    assert facts.decisions["truncated"]["value"] is True
    assert facts.duration_seconds < 4.0
    assert len(decode_window(path, facts, WINDOW, only_bucket(TOLERANT), TOLERANT)) == 49
    late = Window(facts.end_seconds - 1.0, 49, "beyond the end")
    with pytest.raises(ClipRejected) as caught:
        decode_window(path, facts, late, only_bucket(TOLERANT), TOLERANT)
    assert caught.value.rejection[:2] == ("decode", "missing-frames")


def flip_bits(clip: Path, path: Path) -> Path:
    """A copy whose pictures are damaged everywhere."""
    data = bytearray(clip.read_bytes())
    rng = np.random.default_rng(0)
    begin = data.index(b"mdat") + 4
    for place in rng.integers(begin + 2000, len(data) - 100, 400):
        data[place] ^= 0xFF
    path.write_bytes(data)
    return path


def test_damaged_pictures_are_refused_strictly_and_taken_tolerantly(good_clip: Path, tmp_path: Path) -> None:
    path = flip_bits(good_clip, tmp_path / "flipped.mp4")
    rejection = refused(path)
    assert rejection[:2] == ("decode", "decode-errors")
    facts = probed(path, TOLERANT)
    assert len(decode_window(path, facts, WINDOW, only_bucket(TOLERANT), TOLERANT)) == 49


def test_what_is_printed_between_the_parts_of_a_log_line_is_taken_out_of_it() -> None:
    """libav's log writes a line in parts, and the filter that prints pictures has a thread of its own."""
    log = "[h264 @ 0x1] [error] left block unavailable\n[vist#0:0/h264 @ 0x2] [dec:h264 @ 0x3] [warning] corrupt\n"
    torn = (
        "frame:0    pts:0       pts_time:0\npicture=1\n"
        "[h264 @ 0x1] frame:1    pts:11520000 pts_time:0.5\n[error] picture=1\nleft block unavailable\n"
        "[vist#0:0/h264 @ 0x2] [dec:h264 @ 0x3] frame:2    pts:23040000 pts_time:1\npicture=1\n[warning] corrupt\n"
    )
    assert split_log(torn) == ([0.0, 0.5, 1.0], log)
    hostile = "    title           : frame:9    pts:1 pts_time:1\n  x [error] frame:9    pts:1 pts_time:1\n"
    assert split_log(hostile) == ([], hostile)


def test_damage_is_decoded_alike_every_time(good_clip: Path, tmp_path: Path) -> None:
    """Decoder and filter log at once, for every picture: no line of the one costs a line of the other."""
    path = flip_bits(good_clip, tmp_path / "flipped.mp4")
    facts = probed(path, TOLERANT)
    for _ in range(12):
        assert len(decode_window(path, facts, WINDOW, only_bucket(TOLERANT), TOLERANT)) == 49


def test_a_file_without_pictures_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    ffmpeg_run("-f", "lavfi", "-i", "sine=duration=3", path)
    assert refused(path)[:2] == ("probe", "no-video")


def two_sizes(folder: Path, suffix: str) -> Path:
    """Three seconds of one size, then three of another, in one stream."""
    parts = []
    for n, scale in enumerate((1, 2)):
        frames = np.stack([number_picture(k, 160 * scale, 96 * scale) for k in range(75)])
        part = folder / f"part{n}.ts"
        write_clip(part, frames, 25, *SMALL, "-output_ts_offset", str(3 * n))
        parts.append(part.read_bytes())
    joined = folder / "joined.ts"
    joined.write_bytes(b"".join(parts))
    path = folder / f"sizes.{suffix}"
    ffmpeg_run("-i", joined, "-c", "copy", path)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_change_of_size_half_way_is_refused(tmp_path: Path, suffix: str) -> None:
    path = two_sizes(tmp_path, suffix)
    rejection = refused(path)
    assert rejection[:2] == ("probe", "size-changes")
    assert "160×96, 320×192" in rejection.detail


@pytest.mark.parametrize("config", [CONFIG, TOLERANT], ids=["strict", "tolerant"])
def test_a_change_of_size_within_the_window_is_seen_by_the_decoder(
    tmp_path: Path, good_clip: Path, config: PrepConfig
) -> None:
    """The second fence: the probe looks at a few places only."""
    path = two_sizes(tmp_path, "mp4")
    facts = probed(good_clip, config)
    values = facts.model_dump() | {"key_seconds": (), "raster": facts.raster, "active": facts.active}
    with pytest.raises(ClipRejected) as caught:
        decode_window(path, ClipFacts(**values), Window(2.0, 49, "test"), only_bucket(config), config)
    assert caught.value.rejection[:2] == ("decode", "size-changes")


def test_small_oddities_have_their_own_reasons(tmp_path: Path) -> None:
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    assert refused(empty)[:2] == ("probe", "empty-file")
    assert refused(tmp_path / "absent.mp4")[:2] == ("probe", "cannot-open")
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(20_000))
    assert refused(noise)[:2] in (("probe", "cannot-open"), ("probe", "format-refused"))
    assert refused(tmp_path)[:2] == ("probe", "not-a-file")
    picture = tmp_path / "picture.mp4"
    ffmpeg_run("-f", "lavfi", "-i", "testsrc=s=64x64:d=1", "-frames:v", "1", "-c:v", "png", "-f", "image2", picture)
    assert refused(picture)[:2] == ("probe", "format-refused")
    assert len(PLAYLISTS) > 5


def test_a_prober_that_crashes_is_a_row_not_an_end(
    tmp_path: Path, good_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing = tmp_path / "crash.py"
    crashing.write_text(f"#!{sys.executable}\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    crashing.chmod(0o755)
    monkeypatch.setattr("preprocess.video.inspection.sys.executable", str(crashing))
    with pytest.raises(ClipRejected) as caught:
        inspect_file(good_clip, CONFIG)
    assert caught.value.rejection[:2] == ("probe", "decoder-crashed")
    assert "SIGSEGV" in caught.value.rejection.detail


def test_length_limits_hold_on_the_probed_length(good_clip: Path) -> None:
    for sieve, reason in (({"min_seconds": 4.1}, "too-short"), ({"min_seconds": 0.1, "max_seconds": 3.9}, "too-long")):
        assert refused(good_clip, prep_config(sieve=sieve))[:2] == ("probe", reason)
    for sieve in ({"min_seconds": 4.0}, {"min_seconds": 0.1, "max_seconds": 4.0}):
        assert probed(good_clip, prep_config(sieve=sieve)).duration_seconds == pytest.approx(4.0)


def test_ffmpeg_is_found_and_a_wrong_choice_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ffmpeg_version()[0].isalnum()
    monkeypatch.setenv(FFMPEG_VARIABLE, "/nowhere/ffmpeg")
    find_ffmpeg.cache_clear()
    with pytest.raises(UserError, match="/nowhere/ffmpeg"):
        find_ffmpeg()


def test_ffmpeg_of_the_wheel_serves_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FFMPEG_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    find_ffmpeg.cache_clear()
    assert "imageio_ffmpeg" in find_ffmpeg()


def test_a_title_cannot_pose_as_an_error(good_clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "titled.mp4"
    title = "title=[error] not one\n[fatal] nor this"
    ffmpeg_run("-i", good_clip, "-c", "copy", "-metadata", title, path)
    facts = probed(path, CONFIG)
    assert len(decode_window(path, facts, WINDOW, only_bucket(CONFIG), CONFIG)) == 49
    assert complaints("[h264 @ 0x1f] [error] bad\n[info] [error] fine\n[fatal] worse") == [
        "[h264] [error] bad",
        "[fatal] worse",
    ]


def test_limits_reach_ffmpeg(good_clip: Path) -> None:
    result = run_ffmpeg(
        ["-v", "error", "-i", str(good_clip), "-f", "null", "-"],
        timeout_seconds=30,
        max_stdout_bytes=0,
        max_alloc_mib=0,
    )
    assert result.returncode != 0, "no allocation at all is allowed"


HEADS = [b"RIFF", b"\x1a\x45\xdf\xa3", b"\0\0\0\x18ftyp", b"\0\0\0\x01mdat", b"#EXTM3U", b""]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=st.sampled_from(HEADS), rest=st.binary(max_size=200))
def test_looking_at_first_bytes_never_raises(tmp_path: Path, head: bytes, rest: bytes) -> None:
    path = tmp_path / "any.bin"
    path.write_bytes(head + rest)
    assert sniff_playlist(path) in {None, *PLAYLISTS.values()}
    sniff_cut(path)
