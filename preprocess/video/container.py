"""What the first bytes of a file say before any library opens it: playlists in disguise, files cut short."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

PLAYLISTS = {
    b"#EXTM3U": "an M3U8 playlist",
    b"ffconcat": "an ffmpeg concat list",
    b"[playlist]": "a PLS playlist",
    b"v=0\r\n": "an SDP session",
    b"v=0\n": "an SDP session",
    b"<?xml": "an XML document",
    b"<MPD": "a DASH manifest",
    b"<smil": "a SMIL document",
    b"<SmoothStreamingMedia": "a Smooth Streaming manifest",
    b"<!DOCTYPE": "an HTML page",
    b"<html": "an HTML page",
    b"RTSPtext": "a reference movie",
    b"[Reference]": "an ASF reference",
}
BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp", b"sidx", b"uuid", b"meta"}
MAX_BOXES = 100_000
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def sniff_playlist(path: Path) -> str | None:
    """What kind of list of other files this is, if it is one; such a file must not be opened as a clip."""
    with path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((name for mark, name in PLAYLISTS.items() if head[: len(mark)].lower() == mark.lower()), None)


def sniff_cut(path: Path) -> str | None:
    """Where the file's own sizes say that its end is missing (MP4 and MOV, Matroska, AVI); None: they do not."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[4:8] in BOXES:
            return _cut_boxes(file, size)
    if head[:4] == b"RIFF":
        return _beyond("RIFF chunk", 8 + int.from_bytes(head[4:8], "little"), size)
    if head[:4] == EBML:
        return _cut_segment(head, size)
    return None


def _beyond(name: str, end: int, size: int) -> str | None:
    return f"the {name} ends at byte {end:,} of {size:,}" if end > size else None


def _cut_segment(head: bytes, size: int) -> str | None:
    """A Matroska file is an EBML header and one segment, whose size is all ones where the writer could not seek."""
    if len(head) < 64:
        return None
    length, at = _ebml_size(head, 4)
    at += length
    if head[at : at + 4] != SEGMENT or at + 12 > len(head):
        return None
    length, begin = _ebml_size(head, at + 4)
    unknown = (1 << 7 * (begin - at - 4)) - 1
    return None if length == unknown else _beyond("segment", begin + length, size)


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer at `at`, and the place after it."""
    num_bytes = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + num_bytes], "big")
    return value & ((1 << 7 * num_bytes) - 1), at + num_bytes


def _cut_boxes(file: BinaryIO, size: int) -> str | None:
    """Walk an ISO base media file's boxes: one that ends beyond the file was cut."""
    at, seen = 0, set()
    for _ in range(MAX_BOXES):
        if at + 8 > size:
            break
        file.seek(at)
        header = file.read(16)
        length, kind = struct.unpack(">I4s", header[:8])
        seen.add(kind)
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        elif length == 0:
            length = size - at
        if length < 8:
            return None
        if at + length > size:
            return _beyond(f"{kind.decode('latin-1')} box", at + length, size)
        at += length
    if b"mdat" in seen and not seen & {b"moov", b"moof", b"meta"}:  # meta: the index of a still, such as AVIF
        return "media data without an index (moov)"
    return None
