"""Identity, revision, generations and text sets: what is refused, in which words, and what only warns."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from shards_data import IDENTITY, PROVENANCE, TEXT_IDENTITY, write_dataset

from shards.check.verify import verify
from shards.errors import FutureFormat, ShardDamage, UserError
from shards.format.commit import committed_units, is_committed, read_commit
from shards.format.dataset_info import Generation, TextSetInfo, read_info, write_info
from shards.format.identity import IdentityMismatch, refuse_mismatch
from shards.format.names import NULL_UNIT
from shards.format.sealed_json import canonical_digest, canonical_json, open_document, seal_document
from shards.read.dataset import open_dataset
from shards.storage import open_storage


@pytest.fixture
def root(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "copy"))


def test_canonical_json_is_one_form() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None, "é"]}) == b'{"a":[1.5,null,"\\u00e9"],"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_a_mismatch_names_both_digests_and_the_fields() -> None:
    ours = {"encoder": {"weights": "aaa", "dtype": "fp32"}, "sizes": [1, 2]}
    theirs = {"encoder": {"weights": "bbb", "dtype": "fp32"}, "sizes": [1, 2], "crop": "centre"}
    refuse_mismatch(ours, dict(ours), "nothing")
    with pytest.raises(IdentityMismatch) as error:
        refuse_mismatch(ours, theirs, "the dataset at X")
    text = str(error.value)
    assert canonical_digest(ours) in text and canonical_digest(theirs) in text
    assert 'encoder.weights: there "bbb", expected "aaa"' in text
    assert 'crop: there "centre", expected nothing' in text
    assert "encoder.dtype" not in text and "sizes" not in text
    assert "to fix" in text


def test_a_dataset_grows_and_never_changes(root: Path) -> None:
    storage = open_storage(root)
    info = read_info(storage)
    write_info(storage, info)
    more = Generation(
        name="gen-001", plan_sha256=hashlib.sha256(b"more").hexdigest(), first_unit=3, num_units=1, num_candidates=9,
        num_records=9,
    )  # fmt: skip
    grown = info.model_copy(update={"generations": (*info.generations, more)})
    write_info(storage, grown)
    with pytest.raises(UserError, match="frozen plan"):
        write_info(storage, info)
    changed = info.generations[0].model_copy(update={"num_candidates": 1})
    with pytest.raises(UserError, match="frozen plan"):
        write_info(storage, grown.model_copy(update={"generations": (changed, more)}))
    with pytest.raises(ShardDamage, match="starts at unit 5, expected 3"):
        gap = more.model_copy(update={"first_unit": 5})
        write_info(storage, info.model_copy(update={"generations": (*info.generations, gap)}))
    with pytest.raises(IdentityMismatch, match=r"encoder\.weights"):
        write_info(storage, grown.model_copy(update={"identity": {**IDENTITY, "encoder": {"weights": "9"}}}))
    other = {"default": TextSetInfo(identity={**TEXT_IDENTITY, "template": "{scene}"})}
    with pytest.raises(IdentityMismatch, match=r"text set 'default'(.|\n)*template(.|\n)*another name"):
        write_info(storage, grown.model_copy(update={"text_sets": other}))
    with pytest.raises(UserError, match="would vanish"):
        write_info(storage, grown.model_copy(update={"text_sets": {}}))
    write_info(storage, grown.model_copy(update={"text_sets": {**info.text_sets, "short": other["default"]}}))
    with pytest.raises(UserError, match="a–z"):
        write_info(storage, grown.model_copy(update={"text_sets": {**info.text_sets, "../x": other["default"]}}))


def test_a_version_from_the_future_is_refused_by_name(root: Path) -> None:
    for name in ("dataset.json", "latents/shard-000001.json"):
        path = root / name
        good = path.read_bytes()
        path.write_bytes(seal_document({**open_document(good, name), "format_version": 2}))
        with pytest.raises(
            FutureFormat, match=rf"{name}: format version 2(.|\n)*expected: format version 1(.|\n)*update"
        ):
            open_dataset(root)
        path.write_bytes(good)
    open_dataset(root)


def test_a_changed_document_is_refused(root: Path) -> None:
    for name in ("dataset.json", "latents/shard-000001.json", "text/default/null.json"):
        path = root / name
        good = path.read_bytes()
        for place in np.random.default_rng(0).integers(0, len(good), 40):
            path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
            with pytest.raises(ShardDamage, match=name):
                open_dataset(root)
            assert any(name in problem.file for problem in _problems(root))
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(ShardDamage, match="truncated"):
            open_dataset(root)
        path.write_bytes(good)


def _problems(root: Path) -> list:
    try:
        return verify(open_storage(root), "fast").problems
    except ShardDamage as damage:
        return [damage]


def test_the_revision_says_what_is_in_it(tiny_shards: Path, tmp_path: Path) -> None:
    revision = open_dataset(tiny_shards).revision
    write_dataset(tmp_path / "again")
    again = open_dataset(tmp_path / "again")
    assert again.revision == revision  # of the same tars, elsewhere
    assert again.identity_digest == canonical_digest(IDENTITY)
    assert again.text_identity_digest == canonical_digest(TEXT_IDENTITY)
    assert open_dataset(tiny_shards, None).revision != revision
    write_dataset(tmp_path / "other", seed=1)
    assert open_dataset(tmp_path / "other").revision != revision
    assert open_dataset([tiny_shards, tmp_path / "other"][:1], revision=revision)
    with pytest.raises(UserError, match=f"expected {revision}"):
        open_dataset(tmp_path / "other", revision=revision)


def test_a_pin_keeps_to_its_own_commits(tmp_path: Path) -> None:
    root = tmp_path / "growing"
    write_dataset(root, num_units=2)
    before = open_dataset(root)
    pin = before.pin()
    write_dataset(tmp_path / "more", num_units=3)
    for kind in ("latents", "text/default"):
        for path in (tmp_path / "more" / kind).glob("shard-000002*"):
            shutil.copy(path, root / kind)
    shutil.copy(tmp_path / "more" / "dataset.json", root)
    assert len(open_dataset(root)) == 24
    with pytest.raises(UserError, match="shards were added"):
        open_dataset(root, revision=before.revision)
    pinned = open_dataset(root, pin=pin, revision=before.revision)
    assert [sample.key for sample in pinned.samples] == [sample.key for sample in before.samples]
    (root / "latents" / "shard-000001.json").unlink()
    with pytest.raises(UserError, match=r"1 commits of the pinned revision .* are missing"):
        open_dataset(root, pin=pin)


def test_a_union_reads_as_one_and_refuses_another_identity(tiny_shards: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "b", num_units=1, seed=7, prefix="other")
    both = open_dataset([tiny_shards, tmp_path / "b"])
    assert len(both) == 32
    one, two = open_dataset(tiny_shards), open_dataset(tmp_path / "b")
    assert np.array_equal(both.latent(30), two.latent(6))
    assert np.array_equal(both.text(25, 1), two.text(1, 1))
    assert both.revision == open_dataset([tmp_path / "b", tiny_shards]).revision != one.revision
    with pytest.raises(ShardDamage, match=r"is in .* too"):
        open_dataset([tiny_shards, Path(shutil.copytree(tiny_shards, tmp_path / "twin"))])
    with pytest.raises(UserError, match="named twice"):
        open_dataset([tiny_shards, tiny_shards])
    write_dataset(tmp_path / "c", num_units=1, prefix="c", identity={**IDENTITY, "dtype": "bfloat16"})
    with pytest.raises(IdentityMismatch, match='dtype: there "bfloat16", expected "float16"'):
        open_dataset([tiny_shards, tmp_path / "c"])


def test_a_unit_of_another_identity_is_refused(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "c", identity={**IDENTITY, "dtype": "bfloat16"})
    for path in (root / "latents").glob("shard-000001*"):
        path.unlink()
    for path in (tmp_path / "c" / "latents").glob("shard-000001*"):
        shutil.copy(path, root / "latents")
    with pytest.raises(IdentityMismatch, match=r"shard-000001\.json: its identity is"):
        open_dataset(root)
    assert any("identity" in problem.what for problem in verify(open_storage(root), "fast").problems)


def test_missing_text_names_the_units_and_the_command(root: Path) -> None:
    (root / "text" / "default" / "shard-000001.json").unlink()
    with pytest.raises(UserError, match=r"units 1 \(8 samples\)(.|\n)*`wanprep build-shards CONFIG`"):
        open_dataset(root)
    assert len(open_dataset(root, None)) == 24
    with pytest.raises(UserError, match=r"text set 'short'(.|\n)*default(.|\n)*`wanprep recaption short CONFIG`"):
        open_dataset(root, "short")


def test_missing_null_embeddings_are_named(root: Path) -> None:
    (root / "text" / "default" / "null.json").unlink()
    with pytest.raises(UserError, match="no null embedding 'empty'"):
        open_dataset(root).null_text("empty")


def test_another_provenance_warns(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "latents/shard-000001.json"
    body = open_document((root / name).read_bytes(), name)
    before = open_dataset(root).revision
    (root / name).write_bytes(seal_document({**body, "provenance": {**PROVENANCE, "torch": "2.9.1"}}))
    logging.getLogger("wan").propagate = True
    with caplog.at_level(logging.WARNING, "wan"):
        assert open_dataset(root).revision == before
    assert "latents: shards of 2 different provenances" in caplog.text and "2.9.1" in caplog.text


def test_latents_and_texts_of_different_libraries_are_no_difference(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (root / "text" / "default").glob("*.json"):
        body = open_document(path.read_bytes(), path.name)
        path.write_bytes(seal_document({**body, "provenance": {**PROVENANCE, "transformers": "5.20"}}))
    logging.getLogger("wan").propagate = True
    with caplog.at_level(logging.WARNING, "wan"):
        open_dataset(root)
    assert "provenances" not in caplog.text


def test_what_is_committed(tiny_shards: Path) -> None:
    storage = open_storage(tiny_shards)
    assert committed_units(storage, "latents") == committed_units(storage, "text/default") == {0, 1, 2}
    assert is_committed(storage, "text/default", NULL_UNIT) and not is_committed(storage, "latents", 3)
    stored = read_commit(storage, "latents", 1)
    assert stored.commit.unit == 1 and len(stored.commit.samples) == 8


def test_a_null_shard_without_one_of_its_embeddings_is_an_error_that_names_it(tiny_shards: Path) -> None:
    dataset = open_dataset([tiny_shards])
    keys = dataset._opened.null.keys  # as of a commit that somebody wrote: its seal is right
    keys[keys.index("empty")] = "other"
    with pytest.raises(UserError, match="no null embedding 'empty'"):
        dataset.null_text("empty")
    assert dataset.null_text("negative").ndim == 2
