"""Format v1: the golden dataset opens for ever, also for a reader written from docs/shard-format.md alone."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from shards.check.verify import verify
from shards.errors import ShardDamage, UserError
from shards.format import commit
from shards.format.names import commit_name
from shards.format.sealed_json import seal_document
from shards.read.dataset import open_dataset
from shards.storage import open_storage

GOLDEN = Path(__file__).parents[1] / "golden" / "shards-v1"
REVISION = "37639ccbc33453407ab6c1bf3a96c8738177c89eca47d24e0d9df9fb718d9351"
IDENTITY = "6fb8a82bbdfe5d9ff89f1112fb8b53d1ed970f9be603e251f41e8f637f8787d6"
TEXT_IDENTITY = "7e5514a7edd5ce46e914c19628491630ef17d6eaff6ed787e04245c78a15576e"
SAMPLES = {
    "clip-0@0-17-96x160": "e103a04420f6757d",
    "clip-1@0-17-96x160": "4cfd43dc4f2320db",
    "clip-1@2500-17-160x96": "ae6cacdc76d4eb1f",
    "clip-3@0-1-160x96": "75da6a94be58aabd",
    "clip-4@0-17-96x160": "21f3bfccc112ed45",
    "clip-5@0-17-96x160": "a70fc0e54bf43993",
    "clip-5@2500-17-160x96": "1a111231bd10c22d",
    "clip-7@0-1-160x96": "7c99a02cc64013d1",
}
"""sha256 of the latent's and the first embedding's elements."""


def test_the_golden_dataset_opens_and_is_whole() -> None:
    dataset = open_dataset(GOLDEN)
    assert dataset.revision == REVISION
    assert (dataset.identity_digest, dataset.text_identity_digest) == (IDENTITY, TEXT_IDENTITY)
    found = {
        sample.key: dataset.latent(sample.key).tobytes() + dataset.text(sample.key).tobytes()
        for sample in dataset.samples
    }
    assert {key: hashlib.sha256(data).hexdigest()[:16] for key, data in found.items()} == SAMPLES
    assert [dataset.null_text(which).shape for which in ("empty", "negative")] == [(1, 64), (9, 64)]
    assert verify(open_storage(GOLDEN), "deep").problems == []


@pytest.mark.parametrize("kind", ["latents", "text/default"])
def test_a_commit_opens_alike_as_it_was_written_and_as_any_other_json(kind: str, monkeypatch: Any) -> None:
    """The quick way is taken where the bytes are those of `commit_bytes`, and never for another value."""
    path = GOLDEN / commit_name(kind, 0)
    written, values = path.read_bytes(), sealed(path)
    values.pop("seal")
    spaced, turned = seal_document(values, indent=1), seal_document(values | {"unit": 1})
    as_any = commit.parse_commit(spaced, "f", kind, 0)
    with pytest.raises(ShardDamage, match="its revision is"):
        commit.parse_commit(turned, "f", kind, 1)
    future = seal_document(values | {"format_version": 99})
    with pytest.raises(UserError, match="version 99"):
        commit.parse_commit(future, "f", kind, 0)
    monkeypatch.setattr(commit, "open_document", None)
    assert commit.parse_commit(written, "f", kind, 0).commit == as_any.commit
    assert as_any.revision == as_any.commit.revision == values["revision"]
    for damaged in (spaced, turned, future):
        with pytest.raises(TypeError, match="not callable"):
            commit.parse_commit(damaged, "f", kind, 0)


# What follows knows the document and nothing of the package.


def sealed(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    head, tail = data[:-75], data[-75:]
    assert tail == b'"seal":"' + hashlib.sha256(head).hexdigest().encode() + b'"}\n'
    return json.loads(data)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def header(name: str, size: int) -> bytes:
    block = bytearray(512)
    fields = {0: name.encode(), 100: b"0000644", 108: b"0000000", 116: b"0000000", 124: b"%011o" % size,
              136: b"00000000000", 148: b"        ", 156: b"0", 257: b"ustar\x0000", 329: b"0000000",
              337: b"0000000"}  # fmt: skip
    for offset, field in fields.items():
        block[offset : offset + len(field)] = field
    block[148:156] = b"%06o\x00 " % sum(block)
    return bytes(block)


def array(payload: bytes, member: dict[str, Any]) -> np.ndarray:
    assert payload[-4:][::-1].hex() == member["check"]
    content = zstandard.ZstdDecompressor().decompress(payload)
    assert content[:8] == b"\x93NUMPY\x01\x00"
    length = int.from_bytes(content[8:10], "little")
    assert (10 + length) % 64 == 0
    facts = ast.literal_eval(content[10 : 10 + length].decode())
    assert facts["descr"] == {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}[member["dtype"]]
    assert list(facts["shape"]) == member["shape"] and not facts["fortran_order"]
    return np.frombuffer(content[10 + length :], facts["descr"]).reshape(facts["shape"])


def key_of(summary: dict[str, Any]) -> str:
    data = summary["clip"].encode()
    clip = "".join(chr(byte) if chr(byte).isalnum() or byte == 45 else f"_{byte:02x}" for byte in data)
    return f"{clip}@{summary['start_ms']}-{summary['frames']}-{summary['height']}x{summary['width']}"


@pytest.mark.parametrize("kind", ["latents", "text/default"])
def test_a_reader_written_from_the_document_reads_it(kind: str) -> None:
    info, dataset = sealed(GOLDEN / "dataset.json"), open_dataset(GOLDEN)
    identity = info["identity"] if kind == "latents" else info["text_sets"]["default"]["identity"]
    for path in sorted((GOLDEN / kind).glob("*.json")):
        commit = sealed(path)
        data = (GOLDEN / commit["tar"]["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (commit["tar"]["size"], commit["tar"]["sha256"])
        assert commit["identity_sha256"] == digest(identity) and commit["format_version"] == 1
        body = {name: v for name, v in commit.items() if name not in ("ledger", "provenance", "revision", "seal")}
        assert commit["revision"] == digest(body)
        place, listed = 0, []
        said = {"format_version": 1, "kind": kind, "unit": commit["unit"]}
        said |= {"identity": identity, "identity_sha256": digest(identity)}
        members = {f"{s['key']}.{m['suffix']}": (s, m) for s in commit["samples"] for m in s["members"]}
        for name in ("__wanshards__/header", *members, "__wanshards__/footer"):
            size = int(data[place + 124 : place + 135], 8)
            assert data[place : place + 512] == header(name, size)
            payload = data[place + 512 : place + 512 + size]
            if name.endswith("footer"):
                assert json.loads(payload) == {"members": listed, "num_samples": len(commit["samples"])}
            elif name.endswith("header"):
                assert json.loads(payload) == said
            else:
                check_member(payload, place + 512, *members[name], kind, dataset)
            listed.append([name, place + 512, size, hashlib.sha256(payload).hexdigest()])
            place += 512 + size + -size % 512
        assert data[place:] == bytes(1024)


def check_member(payload: bytes, offset: int, sample: dict, member: dict, kind: str, dataset: Any) -> None:
    assert (offset, len(payload), hashlib.sha256(payload).hexdigest()) == (
        member["offset"],
        member["size"],
        member["sha256"],
    )
    if kind == "latents":
        assert sample["key"] == key_of(sample["summary"])
    if member["suffix"] == "latent.npy.zst":
        assert np.array_equal(array(payload, member), dataset.latent(sample["key"]))
    elif member["suffix"] == "text.npy.zst" and sample["key"] not in ("empty", "negative"):
        assert np.array_equal(array(payload, member), dataset.text(sample["key"]))


def test_the_revision_is_as_the_document_says() -> None:
    commits = [sealed(path) for kind in ("latents", "text/default") for path in (GOLDEN / kind).glob("*.json")]
    assert digest(sorted([c["kind"], c["unit"], c["revision"]] for c in commits)) == REVISION
