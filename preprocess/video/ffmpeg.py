"""One ffmpeg, run so that it can always be ended.

A decoder fed with a hostile file may loop, stall or ignore SIGTERM, and ffmpeg has no wall-clock limit of its own. So
every run gets its own process group, a deadline, SIGKILL, bounded output, and is collected before this returns.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple, cast

from preprocess.corpus.url import USER_IN_URL
from shards.errors import UserError

FFMPEG_VARIABLE = "WANPREP_FFMPEG"
MAX_STDERR_BYTES = 64 * 1024
READ_BYTES = 1 << 20
_ENDING = threading.Event()

# Containers that a clip may have. Playlists, concat lists, SDP, devices and generators are not among them: they open
# other files or addresses, or have no end.
VIDEO_FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mxf", "asf", "flv", "dv", "ogg", "gif")
IMAGE_FORMATS = ("image2", "jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe")


_SECRET_NAME = re.compile(
    r"^(AWS|AZURE|CLOUDFRONT|GCP|GCS|GOOGLE|HF|OSS|S3|WANDB)_|TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|AUTH|PROXY|KEY(_?ID)?$",
    re.IGNORECASE,
)
COMPLAINT = re.compile(r"(\[[^\]]* @ 0x[0-9a-f]+\] )*\[(error|fatal|panic)\] ")


class Result(NamedTuple):
    """What became of one run."""

    returncode: int
    stdout: bytearray
    stderr: str
    timed_out: bool
    overflowed: bool
    """More came on stdout than was allowed; the run was killed."""


@lru_cache
def find_ffmpeg() -> str:
    """Path of ffmpeg: $WANPREP_FFMPEG, else the system's, else the imageio-ffmpeg wheel's. Raises UserError."""
    chosen = os.environ.get(FFMPEG_VARIABLE)
    if chosen:
        found = shutil.which(chosen)
        if found is None:
            raise UserError(f"{FFMPEG_VARIABLE}={chosen}: not an executable file", expected="the path of an ffmpeg")
        return found
    found = shutil.which("ffmpeg")
    if found is not None:
        return found
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise UserError(
            "no ffmpeg on this machine",
            expected="ffmpeg on PATH, or the Python package imageio-ffmpeg",
            fix="pip install imageio-ffmpeg -c constraints.txt",
        ) from None


@lru_cache
def ffmpeg_version() -> str:
    """Version of the ffmpeg in use, for provenance, such as `9.0.2`. Raises UserError where it does not run."""
    result = run_killable([find_ffmpeg(), "-version"], timeout_seconds=20, max_stdout_bytes=1 << 20)
    match = re.match(rb"ffmpeg version (\S+)", bytes(result.stdout))
    if match is None:
        raise UserError(f"{find_ffmpeg()}: does not answer to -version", expected="a working ffmpeg")
    return match[1].decode("ascii", "replace")


def run_ffmpeg(
    arguments: Sequence[str],
    *,
    timeout_seconds: float,
    max_stdout_bytes: int,
    max_alloc_mib: int = 1024,
    max_cpu_seconds: int | None = None,
) -> Result:
    """Run ffmpeg with `arguments` (what ffmpeg-python's `get_args` gives), quiet, with no input from the terminal.

    ffmpeg's own limits on one allocation and on CPU time are set too: they still hold should this process be killed.
    """
    limits = ["-max_alloc", str(max_alloc_mib << 20)]
    if max_cpu_seconds is not None:
        limits += ["-timelimit", str(max_cpu_seconds)]
    return run_killable(
        [find_ffmpeg(), "-hide_banner", "-nostdin", "-nostats", *limits, *arguments],
        timeout_seconds=timeout_seconds,
        max_stdout_bytes=max_stdout_bytes,
    )


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a program that reads hostile files: without keys, tokens, passwords and proxies."""
    return {
        name: value
        for name, value in environment.items()
        if not (_SECRET_NAME.search(name) or "-----BEGIN" in value or USER_IN_URL.search(value))
    }


@contextlib.contextmanager
def runs_that_end() -> Iterator[Callable[[], None]]:
    """A block of runs in threads; what it yields ends them all within a fifth of a second, as if timed out."""
    try:
        yield _ENDING.set
    finally:
        _ENDING.clear()


def run_killable(
    argv: Sequence[str],
    *,
    timeout_seconds: float,
    max_stdout_bytes: int,
    environment: Mapping[str, str] | None = None,
) -> Result:
    """Run a program to its end, its deadline or its output limit, whichever comes first; nothing is left running.

    Args:
        argv: program and arguments.
        timeout_seconds: wall-clock limit; then SIGKILL to the whole process group.
        max_stdout_bytes: more than this ends the run. stderr keeps its first 64 KiB and is drained beyond.
        environment: the program's environment; None: this process's. Keys, tokens and passwords are left out of it.
    """
    deadline = time.monotonic() + timeout_seconds
    process = subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=_without_secrets(os.environ if environment is None else environment),
    )
    stdout, stderr = bytearray(), bytearray()
    timed_out = overflowed = False
    try:
        overflowed, timed_out = _drain(process, stdout, stderr, deadline, max_stdout_bytes)
        if not overflowed and not timed_out:
            timed_out = not _ends_before(process, deadline)
    finally:
        _kill_group(process)
    return Result(process.returncode, stdout, stderr.decode("utf-8", "replace"), timed_out, overflowed)


def _drain(
    process: subprocess.Popen[bytes], stdout: bytearray, stderr: bytearray, deadline: float, max_stdout_bytes: int
) -> tuple[bool, bool]:
    """Read both pipes until they close or a limit is met; returns (overflowed, timed out)."""
    out, err = cast(IO[bytes], process.stdout), cast(IO[bytes], process.stderr)
    _widen(out)
    ended = False
    with selectors.DefaultSelector() as selector:
        selector.register(out, selectors.EVENT_READ)
        selector.register(err, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0 or _ENDING.is_set():
                return False, True
            ready = selector.select(0 if ended else min(left, 0.2))
            if not ready:
                if ended:
                    return False, False  # what still holds its pipes is a child of it that we end below
                ended = _has_ended(process)  # it may have written since: what is in the pipes is read first
            for key, _ in ready:
                data = os.read(key.fd, READ_BYTES)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is out:
                    if len(stdout) + len(data) > max_stdout_bytes:
                        return True, False
                    stdout += data
                else:
                    stderr += data[: MAX_STDERR_BYTES - len(stderr)]
    return False, False


def _widen(pipe: IO[bytes]) -> None:
    """A pipe of 1 MiB where the system allows it: frames are large and each wake-up costs."""
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, READ_BYTES)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it is over, without collecting it: until it is collected no other process can get its number."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _ends_before(process: subprocess.Popen[bytes], deadline: float) -> bool:
    while not _has_ended(process):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the process's group and collect it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def file_url(path: Path) -> str:
    """`path` as ffmpeg must be given it: a name like `concat:a|b` or `-i` then stays a plain file name."""
    return f"file:{path.resolve()}"


def complaints(stderr: str) -> list[str]:
    """Lines of level error or worse in a log written with `-loglevel level+…`, without addresses, 200 characters each.

    The level is looked for at its own place only: a file's metadata is logged too, and may hold anything.
    """
    return [first_line(line) for line in stderr.splitlines() if COMPLAINT.match(line)]


def first_line(stderr: str) -> str:
    """First line of a log, without the addresses that change from run to run, at most 200 characters."""
    for line in stderr.splitlines():
        text = re.sub(r" @ 0x[0-9a-f]+", "", line).strip()
        if text:
            return text[:200]
    return ""
