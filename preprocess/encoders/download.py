"""Fetch the checkpoint from the Hugging Face hub: one revision, resumable within a file, every digest checked.

`huggingface_hub` queries the hub, authenticates and transfers. Its own download starts a ten-gigabyte file again after
a kill, so the bytes go into `NAME.part` here, by ranges, and the file is renamed when its digest is the hub's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from preprocess.corpus.url import USER_IN_URL
from shards.console import LOG
from shards.errors import UserError
from shards.files.safetensors_index import CheckpointLayout

Part = Literal["all", "encoders", "transformer"]
ENDPOINT = "https://huggingface.co"
REPOSITORIES: dict[CheckpointLayout, tuple[str, str]] = {
    "official": ("Wan-AI/Wan2.2-TI2V-5B", "921dbaf3f1674a56f47e83fb80a34bac8a8f203e"),
    "diffusers": ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "b8fff7315c768468a5333511427288870b2e9635"),
}
"""The published repositories and the revisions that this project was written against."""
_PATTERNS: dict[tuple[CheckpointLayout, Part], tuple[str, ...]] = {
    ("official", "encoders"): ("Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*"),
    ("official", "transformer"): ("config.json", "diffusion_pytorch_model*"),
    ("diffusers", "encoders"): ("model_index.json", "vae/*", "text_encoder/*", "tokenizer/*"),
    ("diffusers", "transformer"): ("model_index.json", "transformer/*", "scheduler/*"),
}
_CHUNK_BYTES = 2**22


class RemoteFile(NamedTuple):
    """A file of the repository at one revision."""

    name: str
    size: int
    sha256: str | None
    """Of large files; None where the hub knows the git digest only."""
    git_sha1: str | None


class FetchedModel(NamedTuple):
    """What `fetch_model` did."""

    revision: str
    """The commit of the requested revision."""
    downloaded: tuple[str, ...]
    present: tuple[str, ...]
    """Files that were already there with the right digest."""
    num_bytes: int
    """Bytes transferred, without what a `.part` already held."""


def fetch_model(
    folder: Path,
    layout: CheckpointLayout = "official",
    *,
    part: Part = "all",
    repository: str | None = None,
    revision: str | None = None,
) -> FetchedModel:
    """Download the files of one revision into `folder`; call it again to resume.

    The endpoint is `HF_ENDPOINT`, the token `HF_TOKEN` or what `hf auth login` stored.

    Raises UserError for an unknown repository or revision, no connection, too little disk space, and a file or a
    download with another digest.
    """
    known, pinned = REPOSITORIES[layout]
    repository = repository or known
    commit, files = _ask_hub(repository, revision or pinned)
    wanted = _choose(files, layout, part, repository)
    present, missing = _compare(folder, wanted, f"{repository} at {commit[:8]}")
    _check_room(folder, missing)
    num_bytes = 0
    for place, file in enumerate(missing, 1):
        LOG.info("%d of %d: %s (%.2f GB)", place, len(missing), file.name, file.size / 1e9)
        num_bytes += _download(folder, file, repository, commit)
    return FetchedModel(commit, tuple(file.name for file in missing), tuple(file.name for file in present), num_bytes)


def _endpoint() -> str:
    # Read when called: huggingface_hub reads it once, when it is imported.
    return os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")


def _ask_hub(repository: str, revision: str) -> tuple[str, list[RemoteFile]]:
    """The commit of a revision and its files. Raises UserError for each kind of refusal by the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi(endpoint=_endpoint()).model_info(repository, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        raise UserError(f"{repository}: no revision {revision!r}", expected="a commit, a branch or a tag") from None
    except GatedRepoError:
        fix = "accept its terms on the hub, then set HF_TOKEN"
        raise UserError(f"{repository}: its owner requires consent first", fix=fix) from None
    except RepositoryNotFoundError:
        raise UserError(f"{repository}: not on the hub, or hidden without a token", fix="set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set", fix="unset it to download") from None
    except _hub_errors() as error:
        raise _unreachable(error) from None
    return str(info.sha), [_remote(sibling) for sibling in info.siblings or ()]


def _remote(sibling: Any) -> RemoteFile:
    name = PurePosixPath(sibling.rfilename)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"the hub names a file {sibling.rfilename!r}", expected="a path within the repository")
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    return RemoteFile(str(name), int(sibling.size or 0), sha256, sibling.blob_id)


def _hub_errors() -> tuple[type[Exception], ...]:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError, OSError, httpx2.HTTPError)


def _unreachable(error: Exception) -> UserError:
    text = " ".join(str(error).split())[:300]
    return UserError(
        USER_IN_URL.sub("://", f"{_endpoint()}: {type(error).__name__}: {text}"),
        fix="run the command again: it resumes where it stopped. HF_ENDPOINT names another hub or a mirror",
    )


def _choose(files: Iterable[RemoteFile], layout: CheckpointLayout, part: Part, repository: str) -> list[RemoteFile]:
    parts: tuple[Part, ...] = ("encoders", "transformer") if part == "all" else (part,)
    patterns = [pattern for one in parts for pattern in _PATTERNS[layout, one]]
    wanted = [file for file in files if any(PurePosixPath(file.name).match(pattern) for pattern in patterns)]
    found = {file.name for file in wanted}
    for pattern in patterns:
        if not any(PurePosixPath(name).match(pattern) for name in found):
            raise UserError(
                f"{repository}: holds no {pattern}",
                expected=f"Wan2.2-TI2V-5B in the {layout} layout",
                fix="check --repo and --layout",
            )
    return sorted(wanted)


def _compare(folder: Path, wanted: Iterable[RemoteFile], what: str) -> tuple[list[RemoteFile], list[RemoteFile]]:
    """Files already there, by digest, and files to download. Raises UserError for a file with another digest."""
    present, missing = [], []
    for file in wanted:
        path = folder / file.name
        if not path.is_file():
            missing.append(file)
        elif path.stat().st_size == file.size and _digest(path, file) == _expected(file):
            present.append(file)
        else:
            size = path.stat().st_size
            cut = f"{size:,} bytes instead of {file.size:,}" if size != file.size else "another digest"
            raise UserError(
                f"{path}: not the file of {what}: {cut}",
                expected=f"sha256 {file.sha256}" if file.sha256 else f"git digest {file.git_sha1}",
                fix="it is of another revision, or not complete: remove it and run this again, or name another folder",
            )
    return present, missing


def _expected(file: RemoteFile) -> str | None:
    return file.sha256 or file.git_sha1


def _digest(path: Path, file: RemoteFile) -> str:
    """sha256 of a large file, or git's digest of a small one."""
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(usedforsecurity=False)
    if not file.sha256:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check_room(folder: Path, missing: list[RemoteFile]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(file.size - _part_size(folder, file) for file in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed",
            fix="name a folder on another disk, or download one part: --only encoders or --only transformer",
        )


def _part(folder: Path, file: RemoteFile) -> Path:
    # The digest in the name keeps a part of another revision from being resumed.
    path = folder / file.name
    return path.with_name(f".{path.name}.{str(_expected(file))[:12]}.part")


def _part_size(folder: Path, file: RemoteFile) -> int:
    part = _part(folder, file)
    return part.stat().st_size if part.is_file() else 0


def _download(folder: Path, file: RemoteFile, repository: str, commit: str) -> int:
    """Fetch one file, resuming its part; return the bytes transferred. Raises UserError."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = _part(folder, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repository, file.name, revision=commit, endpoint=_endpoint())
    held = _part_size(folder, file)
    if held > file.size:
        part.unlink()
        held = 0
    with part.open("r+b" if held else "w+b") as stream:
        stream.seek(held)
        try:
            http_get(url, stream, resume_size=held, headers=build_hf_headers(), expected_size=file.size)
        except _hub_errors() as error:
            raise _unreachable(error) from None
        stream.flush()
        os.fsync(stream.fileno())
    if _digest(part, file) != _expected(file):
        part.unlink()
        raise UserError(
            f"{file.name}: the download's digest is not the hub's",
            expected=f"{_expected(file)}",
            fix="run the command again; if it fails again, a proxy or a mirror changes the file",
        )
    part.rename(folder / file.name)
    return file.size - held
