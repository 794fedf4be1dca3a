"""`wanprep demo-corpus`: a small annotated corpus in the MBC layout, with moving pictures, to try everything on.

OUT/video/batch_0001/<clip_id>.json     annotations; `clip_proxy_url` points below the base URL
OUT/image/batch_0001/<clip_id>.json
OUT/media/<clip_id>.mp4                 what the CDN would serve: see `server.py`
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from preprocess.demo.clips import DemoClip, archive_clips, base_clips
from preprocess.demo.media import Media, make_media
from shards.errors import UserError

BASE_URL = "http://127.0.0.1:8765/"
_PARALLEL = 2
_MARK = ".wanprep-demo-corpus"

_SUBJECTS = ("밝은 사각형", "둥근 무늬", "색깔 막대", "푸른 줄무늬", "작은 점들", "어두운 배경")
_MOVES = (
    "오른쪽으로 천천히 움직인다",
    "가운데에서 회전한다",
    "위에서 아래로 흐른다",
    "왼쪽으로 밀려난다",
    "빠르게 흩어진다",
    "색이 서서히 바뀐다",
)
_PLACES = (
    "화면 아래쪽에는 푸른 띠가 있다",
    "화면 오른쪽 위에는 방송국 표지가 있다",
    "배경은 부드럽게 번져 있다",
    "가장자리는 어둡다",
)
_CATEGORIES = ("생활/문화", "역사/사회", "자연/풍경", "공간/건축", "축제")


class Written(NamedTuple):
    """What `write_corpus` did."""

    num_records: int
    num_media: int
    num_made: int


def write_corpus(
    folder: Path, clips: Sequence[Path] = (), base_url: str = BASE_URL, *, with_base: bool = True
) -> Written:
    """Write the corpus into `folder`; a second call makes only what is missing or changed. Raises UserError.

    Args:
        clips: the user's own video files, added as further records.
        base_url: where `folder` will be served.
        with_base: whether to write the clips for the base model too.
    """
    _claim(folder)
    media_folder = folder / "media"
    media_folder.mkdir(exist_ok=True)
    own = [_own_clip(path, media_folder) for path in clips]
    records = [*archive_clips(), *(base_clips() if with_base else ()), *own]
    media = [clip.media for clip in records if clip.media and clip not in own]
    with ThreadPoolExecutor(_PARALLEL) as pool:
        made = list(pool.map(lambda one: make_media(media_folder, one), media))
    for number, clip in enumerate(records):
        path = folder / clip.media_type / "batch_0001" / f"{clip.clip_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_document(clip, number, base_url), encoding="utf-8")
    return Written(len(records), len(made) + len(own), sum(made))


def _claim(folder: Path) -> None:
    """Mark a new or empty folder as a demo corpus; refuse any other folder."""
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).is_file():
            raise UserError(f"{folder}: not empty, and not a demo corpus", expected="a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).write_text("written by wanprep demo-corpus\n")
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}", expected="a folder that can be written") from None


def _own_clip(path: Path, media_folder: Path) -> DemoClip:
    """A user's file as a record without declared figures: the probe finds them."""
    if not path.is_file():
        raise UserError(f"--clip {path}: no such file", expected="a video file")
    clip_id = f"clip-{re.sub(r'[^A-Za-z0-9_-]+', '-', path.stem)[:60]}"
    name = f"{clip_id}{path.suffix.lower()}"
    shutil.copyfile(path, media_folder / name)
    return DemoClip(clip_id, f"the user's {path.name}", Media(name, 0, 0, "", 0, 0), None)


def _document(clip: DemoClip, number: int, base_url: str) -> str:
    if clip.not_json:
        return '{"file_id": "3339002", "source_data_info": {"clip_id": '
    name = clip.media.name if clip.media else f"{clip.clip_id}.mp4"
    stem = f"{base_url.rstrip('/')}/media/"
    record = {
        "file_id": clip.clip_id,
        "source_data_info": {
            "clip_id": clip.clip_id,
            "clip_proxy_url": stem + name,
            "clip_proxy_thumbnail_url": [f"{stem}{clip.clip_id}_0.jpg"],
            "ai_generated_info": {
                "keyword": "자료 화면, 무늬, 움직임",
                "mid_category": _CATEGORIES[number % len(_CATEGORIES)],
                "stt_script": "",
                "scene_description_auto": _scenes(clip, number),
            },
        },
        "labeling_data_info": {"caption_info": _levels(clip, number)},
        "raw_data_info": {"source_media_info": _media_info(clip)},
    }
    return json.dumps(record, ensure_ascii=False, indent=2) + "\n"


def _seconds(clip: DemoClip) -> float | None:
    """Declared length; None where the record claims nothing."""
    if clip.declared is None:
        return None
    return clip.declared_seconds or (clip.media.seconds if clip.media else None)


def _media_info(clip: DemoClip) -> dict[str, Any]:
    seconds = _seconds(clip)
    if clip.declared is None or seconds is None:
        return {"media_type": clip.media_type}
    resolution = f"{clip.declared[0]}, {clip.declared[1]}"
    hours, rest = divmod(seconds, 3600)
    length = f"{int(hours):02d}:{int(rest // 60):02d}:{rest % 60:05.2f}"
    details = {"length": length, "frame_rate": clip.declared_fps, "resolution": resolution}
    return {"media_type": clip.media_type, "resolution": resolution, "details": details}


def _levels(clip: DemoClip, number: int) -> dict[str, list[dict[str, Any]]]:
    if clip.captions == 0:
        return {"object_level": [], "semantic_level": [], "application_level": []}
    return {
        "object_level": [
            {"text": _sentence(number + i, i), **_stretch(clip, i), "token": 9, "sentences": 1}
            for i in range(clip.captions)
        ],
        "semantic_level": [{"text": "차분하고 고른 움직임이 이어지는 느낌을 준다.", "token": 13, "sentences": 1}],
        "application_level": [{"text": "지역 방송의 자료 화면으로 쓰기에 알맞다.", "token": 13, "sentences": 1}],
    }


def _scenes(clip: DemoClip, number: int) -> list[dict[str, str]]:
    if clip.captions == 0:
        return []
    return [{**_stretch(clip, 0), "description": f"{_SUBJECTS[number % 6]}이(가) 보이는 장면이다."}]


def _sentence(subject: int, place: int) -> str:
    count = "" if place < len(_PLACES) else f" {place}번째 무늬가 이어서 나타난다."
    return f"{_SUBJECTS[subject % 6]}이(가) {_MOVES[(subject * 5 + place) % 6]}. {_PLACES[place % 4]}.{count}"


def _stretch(clip: DemoClip, index: int) -> dict[str, str]:
    """Timecodes of the index-th caption, in the corpus's notation; many captions share the whole clip."""
    seconds = _seconds(clip)
    if seconds is None or clip.captions > 4:
        return {"tc_in": "", "tc_out": ""}
    step = seconds / clip.captions
    return {
        "tc_in": _timecode(index * step, clip.declared_fps),
        "tc_out": _timecode((index + 1) * step, clip.declared_fps),
    }


def _timecode(seconds: float, fps: float) -> str:
    """SMPTE timecode within the first minute, where drop-frame (`;`) and non-drop count alike."""
    rate = round(fps)
    frame = min(int(seconds * fps), rate * 60 - 1)
    mark = ";" if abs(fps - rate) > 0.01 else ":"
    return f"00:00:{frame // rate:02d}{mark}{frame % rate:02d}"
