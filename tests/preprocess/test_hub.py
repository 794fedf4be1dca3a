"""Fetching the checkpoint from a loopback server that speaks the hub's endpoints."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from click.testing import CliRunner

from preprocess.cli.main import main
from preprocess.encoders.download import REPOSITORIES, fetch_model
from shards.errors import UserError

COMMIT = REPOSITORIES["official"][1]
FILES = {
    "config.json": b'{"dim": 3072}',
    "Wan2.2_VAE.pth": bytes(range(256)) * 4000,
    "models_t5_umt5-xxl-enc-bf16.pth": b"text" * 50_000,
    "google/umt5-xxl/spiece.model": b"pieces",
    "google/umt5-xxl/tokenizer.json": b"{}",
    "diffusion_pytorch_model-00001-of-00001.safetensors": b"weights" * 30_000,
    "diffusion_pytorch_model.safetensors.index.json": b'{"weight_map": {}}',
    "README.md": b"not wanted",
    "assets/picture.png": b"not wanted either",
}
LARGE = (".pth", ".safetensors", ".model")


class Hub(ThreadingHTTPServer):
    """The two endpoints that a download asks, with switches for what goes wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.asked = []
        self.cut_after = None
        self.lie = None
        self.status = None
        self.status_after = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Quiet."""

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        if self.server.status_after and len(_downloads(self.server)) > self.server.status_after:
            self._answer(503, b"{}")
        elif self.server.status:
            self._answer(self.server.status, b"{}")
        elif match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
            self._info(match[1], match[2])
        elif match := re.fullmatch(r"/Wan-AI/Wan2.2-TI2V-5B/resolve/(\w+)/(.+)", path):
            self._file(match[2])
        else:
            self._answer(404, b"{}")

    def _info(self, repository, revision):
        if repository != "Wan-AI/Wan2.2-TI2V-5B":
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if revision not in (COMMIT, "main"):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = []
        for name, data in self.server.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - git's own
            sibling = {"rfilename": name, "size": len(data), "blobId": blob}
            if name.endswith(LARGE):
                sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        body = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "private": False}
        self._answer(200, json.dumps(body).encode())

    def _file(self, name):
        data = self.server.files[name] if name != self.server.lie else b"x" * len(self.server.files[name])
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.server.cut_after is not None and len(body) > self.server.cut_after:
            self.wfile.write(body[: self.server.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)

    def _answer(self, status, body, headers=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16_384)  # files here are smaller than one
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


def _downloads(hub):
    return [(path.rsplit("/", 1)[-1], span) for path, span, _ in hub.asked if "/resolve/" in path]


WANTED = {name for name in FILES if name not in ("README.md", "assets/picture.png")}


def test_the_whole_checkpoint_comes_by_its_pinned_revision(hub, tmp_path):
    done = fetch_model(tmp_path)
    assert done.revision == COMMIT
    assert set(done.downloaded) == WANTED
    assert done.num_bytes == sum(len(FILES[name]) for name in WANTED)
    assert all((tmp_path / name).read_bytes() == FILES[name] for name in WANTED)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {name.split("/")[-1] for name in WANTED}
    assert f"/api/models/Wan-AI/Wan2.2-TI2V-5B/revision/{COMMIT}" in [path for path, _, _ in hub.asked]
    hub.asked.clear()
    again = fetch_model(tmp_path)
    assert (again.downloaded, set(again.present), again.num_bytes) == ((), WANTED, 0)
    assert not _downloads(hub)


def test_encoders_alone(hub, tmp_path):
    done = fetch_model(tmp_path, part="encoders", revision="main")
    assert set(done.downloaded) == {name for name in WANTED if name.startswith(("Wan", "models", "google"))}


def test_a_cut_download_goes_on_by_range_in_this_call_and_in_the_next(hub, tmp_path):
    hub.cut_after = 100_000
    name = "Wan2.2_VAE.pth"
    with pytest.raises(UserError, match="resumes where it stopped"):
        hub.status_after = 4
        fetch_model(tmp_path, part="encoders")
    (part,) = tmp_path.rglob("*.part")
    held = part.stat().st_size
    assert 0 < held < len(FILES[name])
    hub.cut_after = hub.status_after = None
    hub.asked.clear()
    done = fetch_model(tmp_path, part="encoders")
    assert (name, f"bytes={held}-") in _downloads(hub)
    assert done.num_bytes == sum(len(FILES[file]) for file in done.downloaded) - held
    assert (tmp_path / name).read_bytes() == FILES[name]
    assert not list(tmp_path.rglob("*.part"))


def test_a_part_of_a_killed_process_is_gone_on_with(hub, tmp_path):
    name = "Wan2.2_VAE.pth"
    digest = hashlib.sha256(FILES[name]).hexdigest()
    (tmp_path / f".{name}.{digest[:12]}.part").write_bytes(FILES[name][:700_000])
    (tmp_path / f".{name}.0123456789ab.part").write_bytes(b"of another revision")
    fetch_model(tmp_path, part="encoders")
    assert (name, "bytes=700000-") in _downloads(hub)
    assert (tmp_path / name).read_bytes() == FILES[name]


def test_a_wrong_digest_is_told_and_not_kept(hub, tmp_path):
    hub.lie = "Wan2.2_VAE.pth"
    with pytest.raises(UserError, match=r"Wan2\.2_VAE\.pth: the download.s digest is not the hub.s"):
        fetch_model(tmp_path, part="encoders")
    assert not (tmp_path / "Wan2.2_VAE.pth").exists()
    hub.lie = None
    fetch_model(tmp_path, part="encoders")


def test_a_small_file_is_checked_by_gits_digest(hub, tmp_path):
    hub.lie = "config.json"
    with pytest.raises(UserError, match=r"config\.json: the download.s digest is not the hub.s"):
        fetch_model(tmp_path, part="transformer")


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda data: data[:-5], "199,995 bytes instead of 200,000"), (lambda data: data[:-1] + b"!", "another digest")],
)
def test_a_file_of_another_revision_is_named_and_left_alone(change, words, hub, tmp_path):
    name = "models_t5_umt5-xxl-enc-bf16.pth"
    (tmp_path / name).write_bytes(change(FILES[name]))
    with pytest.raises(UserError, match=words) as caught:
        fetch_model(tmp_path, part="encoders")
    assert name in str(caught.value)
    assert (tmp_path / name).read_bytes() == change(FILES[name])
    assert not _downloads(hub)


def test_what_the_hub_refuses_is_said_in_words(hub, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no revision 'nowhere'"):
        fetch_model(tmp_path, revision="nowhere")
    with pytest.raises(UserError, match="not on the hub"):
        fetch_model(tmp_path, repository="someone/else")
    hub.files.pop("Wan2.2_VAE.pth")
    with pytest.raises(UserError, match=r"holds no Wan2\.2_VAE\.pth"):
        fetch_model(tmp_path)
    hub.files["../../escape"] = b""
    with pytest.raises(UserError, match="names a file"):
        fetch_model(tmp_path)
    hub.status = 403
    with pytest.raises(UserError, match="403"):
        fetch_model(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="run the command again"):
        fetch_model(tmp_path)


def test_no_room_is_told_before_the_first_byte(hub, tmp_path):
    name = "Wan2.2_VAE.pth"

    class Endless(bytes):
        def __len__(self):
            return 10**18

    hub.files[name] = Endless(b"")
    with pytest.raises(UserError, match="GB are needed"):
        fetch_model(tmp_path, part="encoders")
    assert not _downloads(hub)


def test_the_command(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = CliRunner().invoke(main, ["fetch-model", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    assert f"revision {COMMIT}: {len(WANTED)} files downloaded" in result.output
    assert "hf_secret" not in result.output
    assert any(token == "Bearer hf_secret" for _, _, token in hub.asked)
    result = CliRunner().invoke(main, ["fetch-model", str(tmp_path / "model"), "--revision", "none"])
    assert result.exit_code == 2
    assert "no revision 'none'" in result.output
