"""Corpora of every kind, good and hostile: every document is seen, nothing outside is opened, memory is bounded."""

import gzip
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest
import zstandard
from annotations import annotation, encode, numbered, write_tree
from peak import PEAK_KIB

from preprocess.corpus import corpus as corpus_module
from preprocess.corpus.archives import iter_archive
from preprocess.corpus.corpus import iter_chunks, iter_documents, map_chunks
from preprocess.corpus.records import MAX_DOCUMENT_BYTES
from shards.errors import UserError

DOCUMENTS = numbered(5)


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "corpus", DOCUMENTS)


def read_all(location):
    return {document.source: document for document in iter_documents(str(location))}


def reasons(location):
    return {source: doc.rejection.reason for source, doc in read_all(location).items() if doc.rejection is not None}


def pack_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pack_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def lines():
    return b"".join(encode(value).replace(b"\n", b" ") + b"\n" for value in DOCUMENTS.values())


PACKED = {name: encode(value) for name, value in DOCUMENTS.items()}


def test_a_folder(tree):
    (tree / "video/batch_0000/0000001.mp4").write_bytes(b"not an annotation")
    found = read_all(tree)
    assert {source: doc.data for source, doc in found.items()} == PACKED
    assert list(found) == sorted(found)


@pytest.mark.parametrize("name", ["c.zip", "c.tar", "c.tar.gz", "c.tgz", "c.jsonl", "c.jsonl.zst"])
def test_archives(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".zip"):
        pack_zip(path, PACKED)
    elif "jsonl" in name:
        # Two frames, as appended files have; a blank line is no document.
        packed = [zstandard.compress(lines()[:300]), zstandard.compress(lines()[300:] + b"\n")]
        path.write_bytes(b"".join(packed) if name.endswith(".zst") else lines() + b"  \n")
    else:
        pack_tar(path, PACKED, "w" if name.endswith(".tar") else "w:gz")
    found = list(iter_documents(str(path)))
    assert len(found) == 5
    assert all(doc.rejection is None for doc in found)
    assert found[0].source == ("c.jsonl:1" if name == "c.jsonl" else found[0].source)
    assert b"0000000" in found[0].data


def test_an_s3_prefix(monkeypatch):
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        endpoint = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="archive")
        for name, data in {**PACKED, "video/clip.mp4": b"-", "big.json": b" " * (MAX_DOCUMENT_BYTES + 1)}.items():
            client.put_object(Bucket="archive", Key=f"mbc/{name}", Body=data)
        client.close()
        found = read_all(f"s3://archive/mbc?endpoint={endpoint}")
        assert {source: doc.data for source, doc in found.items() if doc.rejection is None} == PACKED
        assert found["big.json"].rejection.reason == "too-large"
    finally:
        server.stop()


def test_what_is_no_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for location in (tmp_path / "nowhere", tmp_path / "a.txt", tmp_path / "nowhere.zip"):
        with pytest.raises(UserError, match=r"corpus\.location"):
            list(iter_documents(str(location)))


def test_links_are_followed_only_within_the_tree(tree, tmp_path):
    outside = write_tree(tmp_path / "outside", {"secret.json": annotation("secret")})
    (tree / "out.json").symlink_to(outside / "secret.json")
    (tree / "folder").symlink_to(outside)
    (tree / "loop").symlink_to(tree)
    (tree / "nowhere.json").symlink_to(tree / "gone.json")
    (tree / "self.json").symlink_to(tree / "self.json")
    (tree / "inner.json").symlink_to(tree / "video/batch_0000/0000001.json")
    found = read_all(tree)
    assert reasons(tree) == dict.fromkeys(["out.json", "folder", "loop", "nowhere.json", "self.json"], "symlink")
    assert found["inner.json"].data == PACKED["video/batch_0000/0000001.json"]
    assert not any(b"secret" in doc.data for doc in found.values())


def test_odd_files_are_rows(tree):
    os.mkfifo(tree / "pipe.json")  # opening it for reading would wait for ever
    (tree / "folder.json").mkdir()
    (tree / "empty.json").write_bytes(b"")
    with (tree / "huge.json").open("wb") as file:
        file.truncate(2**30)
    (tree / os.fsdecode(b"\xff\xfe.json")).write_bytes(b"{}")
    assert reasons(tree) == {"pipe.json": "unreadable", "huge.json": "too-large", r"\udcff\udcfe.json": "bad-file-name"}
    assert read_all(tree)["empty.json"].data == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_a_row(tree):
    (tree / "video/batch_0000/0000001.json").chmod(0)
    assert set(reasons(tree).values()) == {"unreadable"}


def test_member_names_are_never_paths(tmp_path):
    names = ["../../etc/a.json", "/etc/a.json", "a/../../b.json", "..\\b.json", "good.json", "__MACOSX/._good.json"]
    for path in (
        pack_zip(tmp_path / "a.zip", {name: b"{}" for name in names}),
        pack_tar(tmp_path / "a.tar", {name: b"{}" for name in names}),
    ):
        found = list(iter_documents(str(path)))
        assert [doc.source for doc in found if doc.rejection is None] == ["good.json"]
        assert {doc.rejection.reason for doc in found if doc.rejection} == {"bad-file-name"}
        assert len(found) == 5


@pytest.mark.timeout(60)
@pytest.mark.parametrize("field", ["pax", "base-256"])
def test_a_tar_member_that_claims_more_than_there_is_does_not_hang(tmp_path, field):
    """tarfile would read behind the archive's end, once for each 10 KiB of the size."""
    member = tarfile.TarInfo("a.bin")
    if field == "pax":
        member.pax_headers = {"size": "99999999999999999999"}
    else:
        member.size = 2**70
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(member.tobuf(tarfile.PAX_FORMAT if field == "pax" else tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(UserError, match=r"damaged: cut short within a\.bin"):
        list(iter_archive(str(tmp_path / "a.tar.gz")))


def test_links_and_devices_in_a_tar_are_rows(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.json")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert set(reasons(path).values()) == {"symlink"}


@pytest.mark.parametrize("name", ["c.tar", "c.tar.gz", "c.jsonl.zst", "c.zip"])
def test_an_archive_cut_short_is_the_users_to_fix(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".zip"):
        pack_zip(path, PACKED)
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines() * 50))
    else:
        pack_tar(path, PACKED, "w" if name.endswith(".tar") else "w:gz")
    whole = path.read_bytes()
    # A tar cut at a member's end reads as a shorter tar, were the end mark not looked for.
    ends = [512 * n for n in range(1, len(whole) // 512)] if name == "c.tar" else range(1, len(whole), 97)
    end = len(whole.rstrip(b"\0")) if name == "c.tar" else len(whole)
    for length in (n for n in ends if n < end):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            list(iter_documents(str(path)))


def test_a_damaged_member_of_a_zip_is_its_own_row(tmp_path):
    path = pack_zip(tmp_path / "a.zip", PACKED)
    data = bytearray(path.read_bytes())
    data[data.index(b"0000001.json") + 40] ^= 0xFF
    path.write_bytes(data)
    found = list(iter_documents(str(path)))
    assert len(found) == 5
    assert [doc.rejection.reason for doc in found if doc.rejection] == ["unreadable"]


def test_a_zip_that_lies_about_its_sizes(tmp_path):
    """The central directory says 100 bytes, the member inflates to 64 MiB: it is read no further than it says."""
    path = pack_zip(tmp_path / "bomb.zip", {"a.json": b" " * 2**26, "b.json": b"{}"})
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 2**26), struct.pack("<I", 100)))
    found = {doc.source: doc for doc in iter_documents(str(path))}
    assert found["a.json"].rejection is not None
    assert found["b.json"].data == b"{}"


BOMBS = f"""
import sys
from preprocess.corpus.corpus import iter_documents
found = list(iter_documents(sys.argv[1]))
assert [doc.rejection and doc.rejection.reason for doc in found] == ["too-large", None], found
print({PEAK_KIB} // 1024)
"""


def write_bomb(path):
    """A document of 1 GiB and then a good one."""
    good = encode(annotation()).replace(b"\n", b" ") + b"\n"
    block, count = b" " * 2**20, 2**10
    if path.name.endswith(".zst"):
        compressor = zstandard.ZstdCompressor().compressobj()
        with path.open("wb") as file:
            for _ in range(count):
                file.write(compressor.compress(block))
            file.write(compressor.compress(b"\n" + good) + compressor.flush())
    elif path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("a.json", "w") as member:
                for _ in range(count):
                    member.write(block)
            archive.writestr("b.json", good)
    else:
        write_tree(path, {"b.json": good})
        with (path / "a.json").open("wb") as file:
            file.truncate(2**30)


@pytest.mark.parametrize("name", ["c.jsonl.zst", "c.zip", "folder"])
def test_a_gigabyte_of_json_takes_no_memory(tmp_path, name):
    write_bomb(tmp_path / name)
    run = subprocess.run(
        [sys.executable, "-c", BOMBS, tmp_path / name], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 250


def count_chunk(chunk):
    return [doc.source for doc in corpus_module.read_chunk(chunk)]


def test_several_processes_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(corpus_module, "SERIAL_CHUNKS", 2)
    location = str(write_tree(tmp_path / "corpus", numbered(40)))
    alone = list(map_chunks(iter_chunks(location), count_chunk, 1))
    assert list(map_chunks(iter_chunks(location), count_chunk, 3)) == alone
    assert sum(map(len, alone)) == 40


HEADER_BOMBS = f"""
import sys
from preprocess.corpus.corpus import iter_documents
from shards.errors import UserError
try:
    print("read", list(iter_documents(sys.argv[1])))
except UserError as error:
    print({PEAK_KIB} // 1024, error.problem)
"""


def write_header_bomb(path, kind):
    """A tar.gz of a few kilobytes whose headers are 400 MiB: a long name, extended attributes, a sparse map."""
    with gzip.GzipFile(path, "wb", compresslevel=9) as file:
        if kind == "many headers":
            for _ in range(20_000):
                info = tarfile.TarInfo("pax")
                info.type, info.size = tarfile.XGLTYPE, 20
                file.write(info.tobuf(tarfile.USTAR_FORMAT) + b"20 comment=abcdefgh\n".ljust(512, b"\0"))
            return
        info = tarfile.TarInfo("a.json")
        info.type = {
            "long name": tarfile.GNUTYPE_LONGNAME, "pax": tarfile.XHDTYPE, "global pax": tarfile.XGLTYPE,
            "sparse": tarfile.GNUTYPE_SPARSE,
        }.get(kind, tarfile.XHDTYPE)  # fmt: skip
        if kind == "sparse 1.0":
            records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
            info.size = len(records)
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0"))
            info.type = tarfile.REGTYPE
        info.size = 400 << 20
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(400):
            file.write(b"9" * 2**20)


@pytest.mark.parametrize("kind", ["long name", "pax", "global pax", "sparse", "sparse 1.0", "many headers"])
def test_tar_headers_without_bound_take_no_memory(tmp_path, kind):
    write_header_bomb(tmp_path / "c.tar.gz", kind)
    command = [sys.executable, "-c", HEADER_BOMBS, tmp_path / "c.tar.gz"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    memory_mib, problem = run.stdout.split(maxsplit=1)
    assert int(memory_mib) < 250
    assert re.search("damaged" if kind == "many headers" else "a header of|a sparse member", problem)


def test_a_long_name_that_is_fair_is_read(tmp_path):
    path = tmp_path / "c.tar.gz"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w:gz", format=form) as archive:
            info = tarfile.TarInfo(f"{'long/' * 100}a.json")
            info.size = 2
            archive.addfile(info, io.BytesIO(b"{}"))
        assert [document.data for document in iter_documents(str(path))] == [b"{}"]
