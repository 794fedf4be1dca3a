"""Every damage is found: by `verify` anywhere, by the reader before a damaged sample is used."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards_data import IDENTITY, PROVENANCE, write_dataset

from shards.check.verify import Problem, verify
from shards.errors import ShardDamage, UserError
from shards.format.arrays import array_facts, encode_array
from shards.format.commit import read_commit
from shards.format.dataset_info import read_info, write_info
from shards.format.keys import sample_key
from shards.format.ledger import read_ledger, read_ledger_lines, write_ledger
from shards.format.sealed_json import canonical_json, open_document, seal_document
from shards.format.tar import BLOCK, Member, padding, scan_tar
from shards.read.dataset import Dataset, open_dataset
from shards.read.index import write_index
from shards.storage import open_storage
from shards.write.shard_writer import ShardWriter

TAR_KINDS = ("latents", "text/default")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two units of four samples with few channels: small enough to damage it thousands of times."""
    root = tmp_path_factory.mktemp("small")
    write_dataset(root, num_units=2, samples_per_unit=4, channels=2, scratch=tmp_path_factory.mktemp("scratch"))
    return root


@pytest.fixture
def root(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def tar_of(root: Path, kind: str, unit: int = 1) -> Path:
    return root / read_commit(open_storage(root), kind, unit).commit.tar.name


def members_of(path: Path) -> list[Member]:
    data = path.read_bytes()
    return list(scan_tar(lambda offset, length: data[offset : offset + length], path.name, len(data)))


def problems(root: Path, level: str = "hash", partial: bool = False) -> list[Problem]:
    return verify(open_storage(root), level, partial=partial).problems  # type: ignore[arg-type]


def read_all(dataset: Dataset) -> Iterator[tuple[str, bytes]]:
    """Every sample's arrays and documents, by the reader."""
    for place, sample in enumerate(dataset.samples):
        yield sample.key, dataset.latent(place).tobytes()
        yield sample.key, repr(dataset.meta(place)).encode()
        yield sample.key, repr(dataset.text_meta(place)).encode()
        for variant in range(sample.num_variants):
            yield sample.key, dataset.text(place, variant).tobytes()


@pytest.fixture(scope="module")
def whole(small: Path) -> list[tuple[str, bytes]]:
    return list(read_all(open_dataset(small)))


def assert_reader_is_not_fooled(root: Path, whole: list[tuple[str, bytes]]) -> bool:
    """All that the reader gives is what was written; True when it found damage."""
    try:
        dataset = open_dataset(root)
    except UserError:
        return True
    given = read_all(dataset)
    for expected in whole:
        try:
            assert next(given) == expected
        except ShardDamage as damage:
            assert damage.file.endswith(".tar") and damage.member and damage.offset
            return True
    return False


def test_the_small_dataset_is_whole(small: Path, whole: list[tuple[str, bytes]]) -> None:
    assert problems(small, "deep") == problems(small, "fast") == []
    assert not assert_reader_is_not_fooled(small, whole)


@pytest.mark.parametrize("kind", TAR_KINDS)
def test_a_tar_cut_anywhere_is_found(root: Path, kind: str, whole: list[tuple[str, bytes]]) -> None:
    path = tar_of(root, kind)
    good = path.read_bytes()
    boundaries = {place for m in members_of(path) for place in (m.offset - BLOCK, m.offset, m.offset + m.size)}
    random = {int(place) for place in np.random.default_rng(0).integers(0, len(good), 30)}
    for length in sorted(boundaries | random | {0, len(good) - 1, len(good) - BLOCK}):
        path.write_bytes(good[:length])
        for level in ("fast", "hash"):
            found = problems(root, level)
            assert [problem.file for problem in found] == [str(path)]
            assert found[0].offset == length and "truncated" in found[0].what
        with pytest.raises(ShardDamage, match=path.name):
            open_dataset(root)


def test_an_open_dataset_finds_a_tar_cut_under_it(root: Path) -> None:
    dataset = open_dataset(root)
    path = Path(dataset.storage(dataset.shard(7)).url(dataset.shard(7).tar))
    with path.open("r+b") as file:
        file.truncate(members_of(path)[-2].offset - 2 * BLOCK)
    with pytest.raises(ShardDamage, match=rf"{path.name}: member {dataset.samples[7].key}.* at offset \d+: "):
        dataset.latent(7)


@pytest.mark.parametrize("kind", TAR_KINDS)
def test_a_flipped_bit_of_every_class_is_found(root: Path, kind: str, whole: list[tuple[str, bytes]]) -> None:
    path = tar_of(root, kind)
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    places = {len(good) - 1, len(good) - BLOCK - 1}
    for m in members_of(path):
        places |= {m.offset - BLOCK + int(place) for place in rng.integers(0, BLOCK, 3)}
        places |= {m.offset + int(place) for place in rng.integers(0, m.size, 4)}
        places |= {m.offset + m.size + int(place) for place in rng.integers(0, max(1, padding(m.size)), 1)}
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bad)
        found = problems(root)
        assert [problem.file for problem in found] == [str(path)], place
        assert found[0].offset is not None
        assert_reader_is_not_fooled(root, whole)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flip_in_a_payload_names_its_member(root: Path, whole: list[tuple[str, bytes]], data: st.DataObject) -> None:
    path = tar_of(root, data.draw(st.sampled_from(TAR_KINDS)))
    good = path.read_bytes()
    member = data.draw(st.sampled_from([m for m in members_of(path) if "__" not in m.name]))
    bad = bytearray(good)
    bad[member.offset + data.draw(st.integers(0, member.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(bad)
        assert [(p.file, p.member, p.offset) for p in problems(root)] == [(str(path), member.name, member.offset)]
        assert_reader_is_not_fooled(root, whole)
    finally:
        path.write_bytes(good)


def write_unit(root: Path, scratch: Path, arrays: dict[str, np.ndarray], said: dict[str, np.ndarray]) -> None:
    """Unit 1 of latents anew: an image of 32×32 for each clip, whose JSON tells of another array where `said` does."""
    for path in root.glob("latents/shard-000001*"):
        path.unlink()
    with ShardWriter(open_storage(root), "latents", 1, IDENTITY, scratch, PROVENANCE) as writer:
        for clip, array in arrays.items():
            meta = {"clip": clip, "latent": array_facts(said.get(clip, array))}
            summary = {"clip": clip, "start_ms": 0, "frames": 1, "height": 32, "width": 32}
            members = {"json": canonical_json(meta), "latent.npy.zst": encode_array(array)}
            key = sample_key(clip, 0, 1, 32, 32)
            writer.add(key, members, {**summary, "source_media": "image", "category": None})
        writer.seal()


@pytest.mark.parametrize("with_headers", [False, True])
def test_two_members_swapped_are_found(root: Path, tmp_path: Path, with_headers: bool) -> None:
    """Payloads of equal size exchanged, with and without their headers: each is a good array of the other sample."""
    rng = np.random.default_rng(0)
    noise = {clip: rng.integers(0, 2**16, (48, 1, 9, 9), np.uint16) for clip in ("one", "two")}
    write_unit(root, tmp_path, noise, {})
    path = tar_of(root, "latents")
    bad = path.read_bytes()
    one, two = (member for member in members_of(path) if member.name.endswith(".latent.npy.zst"))
    assert one.size == two.size
    start = BLOCK if with_headers else 0
    parts = [bad[member.offset - start : member.offset + member.size] for member in (one, two)]
    for member, part in zip((two, one), parts, strict=True):
        bad = bad[: member.offset - start] + part + bad[member.offset + member.size :]
    path.write_bytes(bad)
    assert [problem.member for problem in problems(root) if problem.member] in ([one.name], [two.name])
    dataset = open_dataset(root, None)
    for sample in dataset.samples[-2:]:
        with pytest.raises(
            ShardDamage, match="tar header" if with_headers else "checksum is not the one in the commit"
        ):
            dataset.latent(sample.key)


def test_two_shards_swapped_are_found(root: Path, whole: list[tuple[str, bytes]]) -> None:
    for suffix in (".tar", ".json"):
        one, two = ((tar_of(root, "latents", unit) if suffix == ".tar" else root / f"latents/shard-00000{unit}.json")
                    for unit in (0, 1))  # fmt: skip
        swap(one, two)
        assert {problem.file for problem in problems(root)} >= {str(one), str(two)}
        assert assert_reader_is_not_fooled(root, whole)
        swap(one, two)
    assert problems(root) == []


def swap(one: Path, two: Path) -> None:
    hold = one.with_name("hold")
    one.rename(hold)
    two.rename(one)
    hold.rename(two)


def test_a_commit_of_another_tar_is_found(root: Path, whole: list[tuple[str, bytes]]) -> None:
    """A commit sealed anew, that names unit 1's tar as unit 0's."""
    body = open_document((root / "latents/shard-000001.json").read_bytes(), "one")
    (root / "latents/shard-000000.json").write_bytes(seal_document({**body, "unit": 0}))
    assert any("shard-000000.json" in problem.file for problem in problems(root))
    assert assert_reader_is_not_fooled(root, whole)


def test_missing_and_doubled_units_are_named(root: Path, whole: list[tuple[str, bytes]]) -> None:
    (root / "latents/shard-000001.json").rename(root / "latents/shard-000007.json")
    found = {(str(Path(problem.file).relative_to(root)), problem.what.split(",")[0]) for problem in problems(root)}
    assert found == {
        ("latents/shard-000001.json", "unit 1 is missing: lost"),
        ("latents/shard-000007.json", "it is the commit of unit 1 of latents"),
        ("latents/shard-000007.json", "no generation of the plan has this unit"),
        ("text/default/shard-000007.json", "unit 7 is missing: not built yet"),
    }
    assert assert_reader_is_not_fooled(root, whole)
    (root / "latents/shard-000007.json").unlink()
    assert [p.kind for p in problems(root, partial=True)] == ["damaged"]  # its text says that it was built
    (root / "text/default/shard-000001.json").unlink()
    assert problems(root, partial=True) == []
    assert [p.kind for p in problems(root)] == ["unfinished", "unfinished"]


@pytest.mark.parametrize("level", ["fast", "hash"])
@pytest.mark.parametrize("pattern", ["latents/*1-*.tar", "latents/*1-*.ledger*", "text/default/*1-*.tar",
                                     "text/default/null-*.tar", "plan/*", "text/default/null.json"])  # fmt: skip
def test_a_deleted_object_is_named(root: Path, pattern: str, level: str) -> None:
    (path,) = root.glob(pattern)
    path.unlink()
    found = problems(root, level)
    assert len(found) == 1 and found[0].file == str(path) and "missing" in found[0].what


@pytest.mark.parametrize("pattern", ["latents/*1-*.ledger*", "plan/*"])
def test_a_flipped_bit_of_ledger_and_plan_is_named(root: Path, pattern: str) -> None:
    (path,) = root.glob(pattern)
    good = path.read_bytes()
    for place in range(0, len(good), max(1, len(good) // 40)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert [problem.file for problem in problems(root)] == [str(path)]


def test_another_good_ledger_is_named(root: Path) -> None:
    """A ledger of another run of the unit: whole, of the same samples, and not the commit's."""
    (path,) = root.glob("latents/*1-*.ledger*")
    rows = list(read_ledger(path.read_bytes()))
    runs = [write_ledger([row.model_copy(update={"bytes": row.bytes * n}) for row in rows]) for n in range(2, 99)]
    other = next(data for data in runs if len(data) == path.stat().st_size)  # nothing but its digest tells
    path.write_bytes(other)
    assert {problem.file for problem in problems(root)} == {str(path)}


def test_a_damaged_sample_is_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(root)
    storage = dataset.storage(dataset.shard(0))
    good = dataset.latent(0)
    real, reads = type(storage).read_into, []

    def bad_once(self: object, name: str, offset: int, buffer: memoryview) -> int:
        got = real(self, name, offset, buffer)
        if not reads:
            buffer[600] ^= 1
        reads.append(name)
        return got

    monkeypatch.setattr(type(storage), "read_into", bad_once)
    assert np.array_equal(dataset.latent(0), good)
    assert len(reads) == 2


def test_deep_finds_what_was_written_wrong(root: Path, tmp_path: Path) -> None:
    """Infinities, and an array that is not what its JSON says: whole by every digest."""
    good, bad = np.zeros((2, 1, 2, 2), np.float16), np.full((2, 1, 2, 2), np.inf, np.float16)
    write_unit(root, tmp_path, {"inf": bad, "other": good}, {"other": bad})
    found = [problem for problem in problems(root, "deep") if problem.member]
    assert [problem.member for problem in found] == [
        "inf@0-1-32x32.latent.npy.zst",
        "other@0-1-32x32.latent.npy.zst",
    ]
    assert "infinities" in found[0].what and "JSON says" in found[1].what
    assert [problem for problem in problems(root) if problem.member] == []


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_a_tar_give_a_sample_or_a_typed_error(
    root: Path, whole: list[tuple[str, bytes]], data: st.DataObject
) -> None:
    """The fuzzer of the reader: a stretch of a tar, a commit or the index overwritten by anything."""
    storage = open_storage(root)
    if not storage.exists("index.jsonl.zst"):
        write_index(storage)
    names = ["latents/shard-000001.json", "text/default/shard-000001.json", "dataset.json", "index.jsonl.zst"]
    paths = [tar_of(root, "latents"), tar_of(root, "text/default"), *(root / name for name in names)]
    path = data.draw(st.sampled_from(paths))
    good = path.read_bytes()
    start = data.draw(st.integers(0, len(good) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=600))
    try:
        path.write_bytes((good[:start] + junk + good[start + len(junk) :])[: len(good)])
        assert_reader_is_not_fooled(root, whole)
        if path.name.endswith(".tar") and path.read_bytes() != good:
            assert problems(root)
    finally:
        path.write_bytes(good)


def test_verify_looks_at_the_commits_of_plans(root: Path) -> None:
    """Of generations named `gen-NNN-<d8>`, as the preprocessing names them; gen-000 alone has no commit."""
    storage = open_storage(root)
    info = read_info(storage)
    assert verify(storage, "fast").problems == []
    (root / "plan/gen-000.jsonl.zst").rename(root / "plan/gen-000-0123abcd.jsonl.zst")
    (root / "dataset.json").unlink()
    generation = info.generations[0].model_copy(update={"name": "gen-000-0123abcd"})
    write_info(storage, info.model_copy(update={"generations": (generation,)}))
    path = root / "plan/gen-000.json"

    def found() -> list[tuple[str, str]]:
        return [(problem.file, problem.what) for problem in verify(storage, "fast").problems]

    assert found() == [(str(path), "missing, but dataset.json lists generation gen-000-0123abcd")]
    fields = generation.model_dump(mode="json", include={"name", "plan_sha256", "ledger_sha256", "first_unit",
                                                         "num_candidates"})  # fmt: skip
    fields |= {"plan_version": 1, "frame_bytes": [6] * generation.num_units}
    data = seal_document(fields)
    path.write_bytes(data)
    assert found() == []
    path.write_bytes(bytes([*data[:20], data[20] ^ 1, *data[21:]]))
    ((file, what),) = found()
    assert file == str(path) and "its seal says" in what
    changes: dict[str, object] = {"name": "gen-000-ffffffff", "plan_sha256": "0" * 64, "first_unit": 1}
    changes |= {"frame_bytes": [], "num_candidates": 9}
    for field, value in changes.items():
        path.write_bytes(seal_document({**fields, field: value}))
        ((file, what),) = found()
        assert file == str(path) and f"{'num_units' if field == 'frame_bytes' else field} is" in what
    path.write_bytes((root / "latents/shard-000001.json").read_bytes())  # intact, of another kind
    ((file, what),) = found()
    assert file == str(path) and "not the commit of a plan" in what
    path.write_bytes(data)
    (root / "plan/vae.json").write_bytes(data)
    ((file, what),) = found()
    assert file == str(root / "plan/vae.json") and "precision" in what


def test_verify_compares_the_index_with_the_commits(root: Path) -> None:
    """A line that readers would use and that says something else, an index that is damaged; a stale line is unused."""
    storage, path = open_storage(root), root / "index.jsonl.zst"
    write_index(storage)
    assert problems(root, "fast") == []
    lines = [json.loads(line) for line in read_ledger_lines(path.read_bytes(), "index")]
    row = next(place for place, line in enumerate(lines) if line.get("kind") == "latents")

    def write(line: dict) -> None:
        changed = [*lines[:row], line, *lines[row + 1 :]]
        data = b"".join(canonical_json(each) + b"\n" for each in changed)
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(data))

    for change in ({"clip": ["x"] * len(lines[row]["clip"])}, {"revision": "0" * 64}, {"provenance": {}}, {"more": 1}):
        write({**lines[row], **change})
        (found,) = problems(root, "fast")
        assert found.file == str(path) and f"line {row + 1} is not what the commit" in found.what
    write({**lines[row], "commit": [1, "x"]})  # of a commit that is no more: no reader uses it
    assert problems(root, "fast") == []
    good = path.read_bytes()
    path.write_bytes(good[:-9])
    (found,) = problems(root, "fast")
    assert found.file == str(path) and "rebuilds it" in found.what


def test_a_lost_unit_is_told_from_one_that_is_not_built_yet(root: Path) -> None:
    """By the counts of the finished build, where its text is gone too."""
    storage = open_storage(root)
    info = read_info(storage)
    for name in ("latents/shard-000001.json", "text/default/shard-000001.json"):
        (root / name).unlink()
    assert {problem.kind for problem in problems(root)} == {"unfinished"}
    assert open_dataset(root).missing_units() == "1 of 2 planned units are there"
    write_info(storage, info.model_copy(update={"totals": {"units": {"planned": 2, "latents": 2}}}))
    assert [(p.kind, p.what) for p in problems(root, partial=True)] == [
        ("damaged", "unit 1 is missing: lost, because it had been built")
    ]


def test_numbers_in_documents_ask_for_no_memory(root: Path) -> None:
    """A plan of 2^29 units; more than the format has are refused."""
    path = root / "dataset.json"
    body = open_document(path.read_bytes(), "dataset.json")
    generation = {**body["generations"][0], "num_units": 2**29, "num_candidates": 2**40}
    path.write_bytes(seal_document({**body, "generations": [generation]}))
    tracemalloc.start()
    found = problems(root, "fast")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert len(found) == 2 * 1001 and "2 of 536,870,912 are there" in found[-1].what
    path.write_bytes(seal_document({**body, "generations": [{**generation, "num_units": 2**31}]}))
    with pytest.raises(ShardDamage, match="2,147,483,648 units"):
        open_dataset(root)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint16])
def test_a_latent_that_no_encoder_gives_is_named_before_it_is_used(root: Path, tmp_path: Path, dtype: type) -> None:
    good = np.full((3, 1, 2, 2), 3.0, np.float32)
    stored = {np.uint16: (good.view(np.uint32) >> 16).astype(np.uint16)}.get(dtype, good.astype(dtype))
    bad = np.full_like(stored, {np.uint16: 0xC76A, np.float16: -6e4, np.float32: -6e4}[dtype])
    loud = (stored * np.array(70, stored.dtype)) if dtype != np.uint16 else np.full_like(stored, 0x4352)  # 210
    write_unit(root, tmp_path, {"huge": bad, "good": stored, "loud": loud}, {})
    dataset = open_dataset(root, None)
    assert np.array_equal(dataset.latent("good@0-1-32x32"), stored)
    with pytest.raises(ShardDamage, match=r"huge@0-1-32x32.*values up to (6|5.99)e\+04.*stays below 1000"):
        dataset.latent("huge@0-1-32x32")
    assert np.array_equal(dataset.latent("huge@0-1-32x32", plausible=False), bad)
    found, second = sorted((each for each in problems(root, "deep") if each.member), key=lambda each: each.member)
    assert found.member == "huge@0-1-32x32.latent.npy.zst" and "values up to" in found.what
    assert second.member == "loud@0-1-32x32.latent.npy.zst" and "its root mean square is 210" in second.what
    assert dataset.latent_channels() == {2: dataset.samples[0].key, 3: "huge@0-1-32x32"}
