"""The frozen plan: what decides it, what does not, how it grows, and what it finds when it is damaged."""

import json
import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from collections import Counter

import pytest
from annotations import annotation, encode, numbered, sieve, write_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.config import PrepConfig
from preprocess.corpus import corpus as corpus_module
from preprocess.corpus.corpus import Chunk, Document
from preprocess.corpus.records import Record, parse_record
from preprocess.plan import freeze
from preprocess.plan.freeze import ensure_plan, freeze_plan, read_and_filter
from preprocess.plan.plan import open_plan, plan_commit_name, plan_ledger_name, plan_name
from preprocess.rejection import Rejection
from preprocess.text.captions import compose_all
from shards.config import validate_config
from shards.errors import ShardDamage, UserError
from shards.format.keys import clip_hash
from shards.format.ledger import LedgerRow, read_ledger
from shards.format.sealed_json import canonical_json
from shards.storage import open_storage

IMAGE = {"raw_data_info__source_media_info__media_type": "image"}
LONG = {"raw_data_info__source_media_info__details__length": "00:00:50.00"}
SHORT = {"raw_data_info__source_media_info__details__length": "00:00:02.00"}


def config(location, **changes):
    values = {"output": "unused", "corpus": {"location": str(location)}, "shards": {"unit_size": 8}, **changes}
    return validate_config(PrepConfig, values, origin="test")


def limited(location, limit, **changes):
    return config(location, corpus={"location": str(location), "limit": limit}, **changes)


def frozen(folder, *configs, **options):
    storage = open_storage(folder)
    for each in configs:
        plan = freeze_plan(storage, each, **options)
    return plan


def objects(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "plan").iterdir())}


def clip_ids(plan):
    return [candidate.record.clip_id for candidate in plan.candidates()]


def check_counts(plan, num_documents):
    """Accepted + rejected = records read, by the rows themselves and not by the plan's own sums."""
    last = plan.generations[-1]
    planned = {candidate.record.source for candidate in plan.candidates()}
    latest = {row.source: row for row in plan.ledger()}
    rows = [row for row in latest.values() if row.source not in planned]
    assert len(rows) == plan.num_refused
    assert Counter(f"{row.stage}/{row.reason}" for row in rows) == Counter(plan.refused_by())
    assert len(clip_ids(plan)) == plan.num_candidates == len(set(clip_ids(plan)))
    assert [candidate.ordinal for candidate in plan.candidates()] == list(range(plan.num_candidates))
    assert last.records_read == num_documents
    assert plan.num_candidates + plan.num_refused + last.num_beyond_limit == num_documents


@pytest.fixture
def mixed(tmp_path):
    """40 good records, and a few of each kind that is refused."""
    documents = numbered(40)
    documents |= {f"image/b/{n}.json": annotation(f"image-{n}", **IMAGE) for n in range(5)}
    documents |= {f"video/b/short-{n}.json": annotation(f"short-{n}", **SHORT) for n in range(3)}
    documents |= {"video/b/broken.json": b"{", "video/b/empty.json": b"", "video/b/list.json": []}
    # Two more of one clip id: the first by name stays, in whatever order they are found.
    documents |= {"video/a.json": annotation("0000007"), "video/z.json": annotation("0000007")}
    return write_tree(tmp_path / "corpus", documents), len(documents)


def test_every_record_is_accounted_for(mixed, tmp_path):
    corpus, num_documents = mixed
    plan = frozen(tmp_path / "out", config(corpus))
    check_counts(plan, num_documents)
    assert plan.num_candidates == 40
    assert plan.refused_by() == {
        "sieve/image": 5,
        "sieve/too-short": 3,
        "read/duplicate-clip": 2,
        "read/not-json": 2,
        "read/not-object": 1,
    }
    rows = {row.source: row for row in plan.ledger()}
    assert rows["image/b/2.json"].clip_id == "image-2"
    assert rows["video/b/broken.json"].clip_id == ""
    assert "video/a.json" in rows["video/z.json"].detail
    assert "video/batch_0000/0000007.json" in rows
    assert {candidate.record.source for candidate in plan.candidates()} >= {"video/a.json"}


def test_the_order_is_the_hash_of_the_clip_id(mixed, tmp_path):
    plan = frozen(tmp_path / "out", config(mixed[0]))
    assert clip_ids(plan) == sorted(clip_ids(plan), key=clip_hash)
    assert [len(plan.unit(n)) for n in range(plan.num_units)] == [8] * 5


def test_folders_and_archives_and_workers_have_no_say(mixed, tmp_path, monkeypatch):
    corpus, _ = mixed
    frozen(tmp_path / "one", config(corpus))
    first = objects(tmp_path / "one")
    monkeypatch.setattr(corpus_module, "CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(corpus_module, "SERIAL_CHUNKS", 1)
    frozen(tmp_path / "two", config(corpus), num_workers=2)
    assert objects(tmp_path / "two") == first


@given(st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_order_of_documents_has_no_say(tmp_path_factory, rng):
    folder = tmp_path_factory.mktemp("order")
    documents = list(numbered(20).items()) + [(f"x/{n}.json", annotation("0000003")) for n in range(3)]
    documents += [("y.json", []), ("z.json", annotation("i", **IMAGE))]
    documents = [Document(source, encode(value)) for source, value in documents]
    plans = []
    for name in ("a", "b"):
        rng.shuffle(documents)
        chunks = [Chunk(None, tuple(documents[start : start + 7])) for start in range(0, len(documents), 7)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(freeze, "map_chunks", lambda location, work, workers, chunks=chunks: map(work, chunks))
            frozen(folder / name, config("anywhere"))
        plans.append(objects(folder / name))
    assert plans[0] == plans[1]


def test_again_adds_nothing(mixed, tmp_path):
    frozen(tmp_path / "out", config(mixed[0]))
    before = objects(tmp_path / "out")
    frozen(tmp_path / "out", config(mixed[0]), config(mixed[0]))
    assert objects(tmp_path / "out") == before


def test_new_records_make_a_generation_and_change_nothing_frozen(mixed, tmp_path):
    corpus, num_documents = mixed
    out = tmp_path / "out"
    first = frozen(out, config(corpus))
    units = [first.unit(n) for n in range(first.num_units)]
    before = objects(out)
    write_tree(corpus, numbered(11, first=100) | {"image/b/new.json": annotation("image-new", **IMAGE)})
    plan = frozen(out, config(corpus))
    assert before.items() <= objects(out).items()
    assert len(plan.generations) == 2
    assert [plan.unit(n) for n in range(first.num_units)] == units
    assert clip_ids(plan)[:40] == clip_ids(first)
    assert sorted(clip_ids(plan)[40:]) == [f"{n:07d}" for n in range(100, 111)]
    assert [row.clip_id for row in plan.ledger()][-1] == "image-new"
    assert (plan.generations[1].num_planned_before, plan.generations[1].num_refused_before) == (40, 13)
    check_counts(plan, num_documents + 12)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4).map(sorted))
@settings(max_examples=15, deadline=None)
def test_a_limit_is_a_prefix_and_grows(tmp_path_factory, limits):
    folder = tmp_path_factory.mktemp("limit")
    corpus = write_tree(folder / "corpus", numbered(40) | {"i.json": annotation("i", **IMAGE)})
    whole = frozen(folder / "whole", config(corpus))
    for limit in limits:
        plan = frozen(folder / "grown", limited(corpus, limit))
        assert clip_ids(plan) == clip_ids(whole)[:limit]
        check_counts(plan, 41)
    plan = frozen(folder / "grown", config(corpus))
    assert clip_ids(plan) == clip_ids(whole)
    check_counts(plan, 41)


def test_a_limit_of_whole_units_gives_the_same_units(tmp_path):
    corpus = write_tree(tmp_path / "corpus", numbered(40))
    whole = frozen(tmp_path / "whole", config(corpus))
    part = frozen(tmp_path / "part", limited(corpus, 16))
    assert [part.unit(n) for n in range(2)] == [whole.unit(n) for n in range(2)]


def test_a_limit_below_the_plan_says_so(tmp_path, caplog):
    corpus = write_tree(tmp_path / "corpus", numbered(20))
    caplog.set_level("WARNING", "wan")
    plan = frozen(tmp_path / "out", config(corpus), limited(corpus, 5))
    assert plan.num_candidates == 20
    assert "corpus.limit 5 is below" in caplog.text


def test_a_changed_sieve_bears_on_what_is_not_planned_yet(mixed, tmp_path, caplog):
    corpus, _ = mixed
    caplog.set_level("WARNING", "wan")
    out = tmp_path / "out"
    loose = {"min_seconds": 1.0, "max_seconds": 10.0, "images": True}
    plan = frozen(out, config(corpus), config(corpus, sieve=loose))
    assert "the sieve has changed" in caplog.text
    # 21-second records are planned and stay; images and short ones come in; duplicates are refused as too long now.
    assert plan.generations[1].num_candidates == 8
    assert plan.generations[1].refused_by == {"sieve/too-long": 2}
    assert plan.generations[1].num_planned_before == 40


def test_a_refused_record_that_passes_later_counts_once(tmp_path):
    corpus = write_tree(
        tmp_path / "corpus", numbered(5) | {f"{n}.json": annotation(f"long-{n}", **LONG) for n in "abc"}
    )
    out, loose = tmp_path / "out", {"min_seconds": 3.0, "max_seconds": 60.0}
    check_counts(frozen(out, config(corpus, sieve={"max_seconds": 30.0})), 8)
    # Another limit: other words in the rows, the same records.
    plan = frozen(out, config(corpus, sieve={"max_seconds": 25.0}))
    assert (plan.num_refused, plan.generations[1].superseded_by) == (3, {"sieve/too-long": 3})
    check_counts(plan, 8)
    check_counts(frozen(out, config(corpus, sieve={"max_seconds": 30.0})), 8)
    # One of them comes in, two are beyond the limit and stay refused until it is raised.
    part = frozen(out, limited(corpus, 6, sieve=loose))
    assert (part.num_candidates, part.num_refused) == (6, 2)
    check_counts(part, 8)
    plan = ensure_plan(open_storage(out), config(corpus, sieve=loose))
    assert (plan.num_candidates, plan.num_refused, plan.refused_by()) == (8, 0, {})
    check_counts(plan, 8)
    # Candidates stay, whatever the sieve says later; nothing is superseded twice.
    assert frozen(out, config(corpus)).generations == plan.generations


def test_a_fixed_record_counts_once(tmp_path):
    corpus = write_tree(tmp_path / "corpus", numbered(5) | {"x.json": b"{", "y.json": b"{", "z.json": []})
    out = tmp_path / "out"
    check_counts(frozen(out, config(corpus)), 8)
    write_tree(corpus, {"x.json": annotation("fixed"), "y.json": annotation("y", **IMAGE)})
    plan = frozen(out, config(corpus))
    assert plan.refused_by() == {"read/not-object": 1, "sieve/image": 1}
    assert plan.generations[1].superseded_by == {"read/not-json": 2}
    check_counts(plan, 8)
    write_tree(corpus, {"x.json": b"{", "y.json": b"{"})
    check_counts(frozen(out, config(corpus)), 8)
    assert len(frozen(out, config(corpus)).generations) == 3


def test_a_name_that_an_archive_holds_twice_is_known_again(tmp_path):
    archive = tmp_path / "corpus.zip"
    with zipfile.ZipFile(archive, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile's own, of the name
        for text in (b"{", b"[]", encode(annotation("1")), encode(annotation("1"))):
            file.writestr("a.json", text)
    plan = frozen(tmp_path / "out", config(archive), config(archive), config(archive))
    assert (len(plan.generations), plan.num_candidates, plan.num_refused) == (1, 1, 3)


def test_a_record_that_moved_or_came_twice(tmp_path):
    corpus = write_tree(tmp_path / "corpus", {"a/1.json": annotation("1"), "a/2.json": annotation("2")})
    out = tmp_path / "out"
    frozen(out, config(corpus))
    (corpus / "a/1.json").rename(corpus / "a/3.json")
    write_tree(corpus, {"0/2.json": annotation("2")})
    plan = frozen(out, config(corpus))
    assert plan.num_candidates == 2
    assert [(row.source, row.reason) for row in plan.ledger()] == [("0/2.json", "duplicate-clip")]
    assert plan.generations[1].num_planned_before == 2


def test_ensure_plan_reads_no_corpus_again(tmp_path):
    corpus = write_tree(tmp_path / "corpus", numbered(20))
    storage = open_storage(tmp_path / "out")
    first = ensure_plan(storage, limited(corpus, 5))
    write_tree(corpus, numbered(5, first=100))
    assert ensure_plan(storage, limited(corpus, 5)).num_candidates == first.num_candidates == 5
    assert ensure_plan(storage, limited(corpus, 12)).num_candidates == 12
    assert ensure_plan(storage, config(corpus)).num_candidates == 25
    gone = config(tmp_path / "gone")
    assert ensure_plan(storage, gone).num_candidates == 25


def test_an_empty_corpus_is_the_users_to_fix(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UserError, match="no annotation in it"):
        frozen(tmp_path / "out", config(tmp_path / "corpus"))
    assert open_plan(open_storage(tmp_path / "out")).num_units == 0


def test_a_corpus_where_nothing_passes_has_a_ledger_and_no_unit(tmp_path):
    corpus = write_tree(tmp_path / "corpus", {"a.json": annotation("a", **IMAGE), "b.json": b"{"})
    plan = frozen(tmp_path / "out", config(corpus))
    assert (plan.num_units, plan.num_refused) == (0, 2)
    check_counts(plan, 2)


def test_an_unit_outside_the_plan(mixed, tmp_path):
    plan = frozen(tmp_path / "out", config(mixed[0]))
    for number in (-1, 5):
        with pytest.raises(UserError, match="not in the plan"):
            plan.unit(number)


def test_a_unit_is_one_ranged_read(mixed, tmp_path):
    plan = frozen(tmp_path / "out", config(mixed[0]))
    reads = []
    storage = plan.storage
    get_range = storage.get_range
    storage.get_range = lambda name, offset, length: reads.append((offset, length)) or get_range(name, offset, length)
    try:
        plan.unit(3)
    finally:
        del storage.get_range
    frames = plan.generations[0].frame_bytes
    assert reads == [(sum(frames[:3]), frames[3])]


def test_a_plan_survives_pickling(mixed, tmp_path):
    plan = frozen(tmp_path / "out", config(mixed[0]))
    assert pickle.loads(pickle.dumps(plan)).unit(2) == plan.unit(2)  # noqa: S301 - our own bytes


def test_every_flipped_byte_is_found(mixed, tmp_path):
    out = tmp_path / "out"
    plan = frozen(out, config(mixed[0]))
    name = plan.generations[0].name
    units = [plan.unit(n) for n in range(plan.num_units)]
    rng = random.Random(0)
    for target in (plan_name(name), plan_ledger_name(name), plan_commit_name(0)):
        path = out / target
        whole = path.read_bytes()
        for place in rng.sample(range(len(whole)), min(60, len(whole))):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            try:
                opened = open_plan(open_storage(out))
                same = [opened.unit(n) for n in range(opened.num_units)] == units
                same &= len(list(opened.ledger())) == plan.num_refused
            except ShardDamage:
                continue
            # A bit of a zstd header that means nothing may differ; what is read may not.
            assert same
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ShardDamage):
            [
                list(reader())
                for reader in (open_plan(open_storage(out)).candidates, open_plan(open_storage(out)).ledger)
            ]
        path.write_bytes(whole)


def test_a_killed_freeze_leaves_nothing_that_counts(mixed, tmp_path, monkeypatch):
    corpus, num_documents = mixed
    out = tmp_path / "out"
    storage = open_storage(out)

    def die(name, data, *, if_absent=False):
        if name == plan_commit_name(0):
            raise KeyboardInterrupt
        return put(name, data, if_absent=if_absent)

    put = storage.put
    monkeypatch.setattr(storage, "put", die)
    with pytest.raises(KeyboardInterrupt):
        freeze_plan(storage, config(corpus))
    assert open_plan(open_storage(out)).num_units == 0
    write_tree(corpus, numbered(3, first=200))
    check_counts(frozen(out, config(corpus)), num_documents + 3)


def test_two_that_freeze_at_once_end_with_one_plan(mixed, tmp_path, monkeypatch):
    corpus, num_documents = mixed
    out = tmp_path / "out"
    late = open_storage(out)
    put = late.put

    def overtaken(name, data, *, if_absent=False):
        if name == plan_commit_name(0):
            frozen(out, config(corpus, shards={"unit_size": 5}))
        return put(name, data, if_absent=if_absent)

    monkeypatch.setattr(late, "put", overtaken)
    plan = freeze_plan(late, config(corpus))
    assert plan.generations[0].unit_size == 5
    check_counts(plan, num_documents)


def test_the_fast_pass_is_the_plain_one(mixed):
    """The lines of the fast pass against parse_record and sieve, record by record."""
    corpus, _ = mixed
    settings_ = config(corpus).sieve
    for chunk in corpus_module.iter_chunks(str(corpus)):
        result = read_and_filter(chunk, settings_)
        kept, refused = [], []
        for document in corpus_module.read_chunk(chunk):
            record = parse_record(document.data, document.source)
            reason = record if isinstance(record, Rejection) else sieve(record, settings_)
            if reason is None:
                kept.append(record)
            else:
                refused.append((document.source, *reason))
        assert [Record.model_validate_json(line) for *_, line in result.candidates] == kept
        rows = [LedgerRow.model_validate_json(line) for *_, line in result.refused]
        assert [(row.source, row.stage, row.reason, row.detail, row.retryable) for row in rows] == refused
        assert [canonical_json(row.model_dump(mode="json")) for row in rows] == [row.line for row in result.refused]


def test_the_ledger_is_the_contracts(mixed, tmp_path):
    plan = frozen(tmp_path / "out", config(mixed[0]))
    generation = plan.generations[0].generation
    data = open_storage(tmp_path / "out").get(f"plan/{generation.name}.ledger.jsonl.zst")
    assert list(read_ledger(data)) == list(plan.ledger())
    assert generation.num_records == plan.num_candidates + plan.num_refused


def test_captions_can_be_composed_again_from_the_plan_alone(mixed, tmp_path):
    """What recaption needs is in the plan: the corpus may be gone."""
    corpus, _ = mixed
    plan = frozen(tmp_path / "out", config(corpus))
    settings_ = config(corpus).captions
    for candidate in plan.unit(0):
        record = candidate.record
        fresh = parse_record((corpus / record.source).read_bytes(), record.source)
        assert record == fresh
        assert compose_all(record, 1.0, 3.04, settings_, len) == compose_all(fresh, 1.0, 3.04, settings_, len)


def test_counts_that_do_not_add_up_are_a_bug_and_stop(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(freeze, "_new_rows", lambda *arguments: iter(()))
    with pytest.raises(RuntimeError, match="accounted for"):
        frozen(tmp_path / "out", config(mixed[0]))


def test_a_full_scratch_disk_is_named_and_leaves_no_plan(mixed, tmp_path):
    """A real limit on the size of files, in a process of its own."""
    code = (
        "import resource, sys; from preprocess.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); main(sys.argv[1:])"
    )
    path = tmp_path / "prep.yaml"
    path.write_text(json.dumps({"output": str(tmp_path / "out"), "corpus": {"location": str(mixed[0])}}))
    done = subprocess.run([sys.executable, "-c", code, "plan", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "scratch database cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert open_plan(open_storage(tmp_path / "out")).generations == ()


def test_the_plan_has_no_address_and_no_time(mixed, tmp_path):
    frozen(tmp_path / "out", config(mixed[0]))
    body = json.loads((tmp_path / "out" / plan_commit_name(0)).read_bytes())
    assert str(tmp_path) not in json.dumps(body)
