"""What the first bytes of a file say before any library opens it: playlists in disguise, files cut short."""

from __future__ import annotations

import struct
from pathlib import Path

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


def sniff(path: Path) -> tuple[str, str] | None:
    """A reason code and a detail when the file must not be opened as a clip, else None."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        for mark, name in PLAYLISTS.items():
            if head[: len(mark)].lower() == mark.lower():
                return "playlist", name
        file.seek(0)
        if file.read(8)[4:8] not in BOXES:
            return None
        return _cut_short(file, size)


def _cut_short(file: object, size: int) -> tuple[str, str] | None:
    """Walk an ISO base media file's boxes: one that ends beyond the file was cut."""
    at, seen = 0, set()
    for _ in range(MAX_BOXES):
        if at + 8 > size:
            break
        file.seek(at)  # type: ignore[attr-defined]
        header = file.read(16)  # type: ignore[attr-defined]
        length, kind = struct.unpack(">I4s", header[:8])
        seen.add(kind)
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        elif length == 0:
            length = size - at
        if length < 8:
            return None
        if at + length > size:
            return "truncated", f"the {kind.decode('latin-1')} box ends at byte {at + length:,} of {size:,}"
        at += length
    if b"mdat" in seen and not seen & {b"moov", b"moof"}:
        return "truncated", "media data without an index (moov)"
    return None
