"""Annotations in the MBC layout, made for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preprocess.config import SieveConfig
from preprocess.corpus.records import Record
from preprocess.plan.filter import caption_texts, filter_captions, filter_metadata
from preprocess.rejection import Rejection

CAPTION = "상인이 시장에서 과일을 판다."


def annotation(clip_id: str = "3338987", **changes: Any) -> dict[str, Any]:
    """One good annotation; `changes` name a path with `__`: `source_data_info__clip_proxy_url=None`."""
    value: dict[str, Any] = {
        "file_id": clip_id,
        "source_data_info": {
            "clip_id": clip_id,
            "clip_proxy_url": f"https://d111.cloudfront.net/proxy/{clip_id}.mp4",
            "clip_proxy_thumbnail_url": [f"https://d111.cloudfront.net/thumb/{clip_id}_0.jpg"],
            "ai_generated_info": {
                "keyword": "시장, 과일",
                "mid_category": "생활/문화",
                "stt_script": "어서 오세요.",
                "scene_description_auto": [
                    {"tc_in": "00:00:00;00", "tc_out": "00:00:12;05", "description": "사람들이 골목을 걷는다."}
                ],
            },
        },
        "labeling_data_info": {
            "caption_info": {
                "object_level": [
                    {"text": CAPTION, "tc_in": "00:00:14;03", "tc_out": "00:00:21;06", "token": 9, "sentences": 1}
                ],
                "semantic_level": [{"text": "활기찬 시장의 아침이다.", "token": 13, "sentences": 1}],
                "application_level": [{"text": "관광 홍보에 쓸 수 있다.", "token": 13, "sentences": 1}],
            }
        },
        "raw_data_info": {
            "source_media_info": {
                "media_type": "video",
                "resolution": "1920, 1080",
                "details": {"length": "00:00:21.37", "frame_rate": 29.97, "resolution": "1920, 1080"},
            }
        },
    }
    for path, new in changes.items():
        *parents, leaf = path.split("__")
        place = value
        for parent in parents:
            place = place[parent]
        place[leaf] = new
    return value


def encode(value: Any) -> bytes:
    """JSON as the corpus writes it: UTF-8, no escapes."""
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def write_tree(root: Path, documents: dict[str, Any]) -> Path:
    """Write documents (bytes as they are, other values as JSON) below `root`, by relative name."""
    for name, value in documents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value if isinstance(value, bytes) else encode(value))
    return root


def numbered(count: int, first: int = 0) -> dict[str, Any]:
    """`count` good annotations by name, as they lie in the corpus."""
    names = range(first, first + count)
    return {f"video/batch_{n // 100:04d}/{n:07d}.json": annotation(f"{n:07d}") for n in names}


def sieve(record: Record, config: SieveConfig) -> Rejection | None:
    """All rules on one record."""
    rejection = filter_metadata(record.media_type, record.declared_seconds, config)
    return rejection or filter_captions(caption_texts(record.model_dump()), config)
