"""Builds that are killed: each in a process group of its own, forked from a server that has torch loaded.

A build can be told to kill itself (SIGKILL, its whole group) at the first point that is not among those it may pass.
A point is a moment before it changes something in its output: opens, links, renames or removes a file, or sends a
request to the server of its bucket.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

ROOT = Path(__file__).parents[2]
_SEND = "http.client.send"
_CHANGES = {"open": 0, "os.link": 1, "os.rename": 1, "os.remove": 0, "os.mkdir": 0, _SEND: 1}
"""Audit events, and which of their arguments is the path that changes."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Builds(NamedTuple):
    """The server's ends."""

    process: subprocess.Popen[str]
    folder: Path

    def start(self, values: dict[str, Any], passed: set[str] | None = None, only: str = "") -> int:
        """Start a build of a config; its process group.

        Args:
            values: the config.
            passed: points that it may pass; None: it passes all.
            only: a pattern; points that it is not found in may be passed too.
        """
        points = None if passed is None else sorted(passed)
        order = {"values": values, "log": str(self.folder / "point"), "passed": points, "only": only}
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Wait for it; its exit status, negative for a signal."""
        return int(self._line())

    def run(self, values: dict[str, Any], passed: set[str] | None = None, only: str = "") -> int:
        """Start and wait."""
        self.start(values, passed, only)
        return self.end()

    def point(self) -> str:
        """Where the last build that was told to has killed itself."""
        return (self.folder / "point").read_text()

    def said(self) -> str:
        """What the builds wrote to the terminal so far."""
        return (self.folder / "said").read_text()

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the server has ended: {self.said()}"
        return line


@contextmanager
def builds(folder: Path) -> Iterator[Builds]:
    """The server, for the length of the block; `folder` takes what the builds say."""
    temporary = folder / "tmp"
    temporary.mkdir()
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = {**os.environ, **keys, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=environment, text=True, stderr=said,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
    with process:
        try:
            running = Builds(process, folder)
            running.end()  # it says 0 when it is ready
            yield running
        finally:
            process.kill()


def _serve() -> None:
    _warm()
    print(0, flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _build(**json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _warm() -> None:
    """Import and use what a build does, which takes many times as long as a small build."""
    import numpy as np
    import torch

    import preprocess.build.processes
    import preprocess.build.text_pass  # noqa: F401
    from preprocess.build.worker import library_versions
    from preprocess.config import EncodersConfig
    from preprocess.encoders.encoders import load_text_encoder, load_tokenizer, load_vae_encoder

    torch.set_num_threads(1)
    library_versions()
    load_vae_encoder(EncodersConfig()).encode(np.zeros((5, 32, 32, 3), np.uint8))
    load_text_encoder(EncodersConfig(), load_tokenizer(EncodersConfig())).embed("word")


def _build(values: dict[str, Any], log: str, passed: list[str] | None, only: str) -> None:
    """In the child; does not return."""
    os.setsid()
    os.dup2(2, 1)
    code = 1
    try:
        _fork_workers()
        if passed is not None:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            sys.addaudithook(_killer(values["output"], set(passed), only, descriptor))
        code = _run(values)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(values: dict[str, Any]) -> int:
    from preprocess.config import PrepConfig
    from preprocess.pipeline import build_shards
    from shards.config import validate_config
    from shards.errors import UserError

    try:
        build_shards(validate_config(PrepConfig, values, origin="test"), quiet=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _fork_workers() -> None:
    """Workers of several devices are forked, not spawned: they start at once, and the killer looks at them too."""
    import multiprocessing
    from typing import cast

    from preprocess.build import processes

    class Forking:
        connection, process = multiprocessing.connection, multiprocessing.process
        get_context = staticmethod(lambda method: multiprocessing.get_context("fork"))

    processes.multiprocessing = cast(Any, Forking)


def _killer(output: str, passed: set[str], only: str, log: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook. Points are named by what changes and what was changed before: a name alone comes again."""
    last = ""
    bucket = output.removeprefix("s3:/").partition("?")[0]
    root = f"{bucket if output.startswith('s3://') else output}/"

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal last
        place = _CHANGES.get(event)
        if place is None or (event == "open" and not _writes(arguments)):
            return
        path = _sent(arguments[1]) if event == _SEND else arguments[place]
        if not isinstance(path, str | os.PathLike) or not (path := os.fspath(path)).startswith(root):
            return
        name = _plain(path.removeprefix(root))
        if name.startswith(".tmp-build/") and not name.endswith(".tar"):  # scratch but for the growing shards
            return
        point = f"{event} {name} after {last}"
        if point not in passed and re.search(only, point):
            os.write(log, point.encode())
            os.killpg(0, signal.SIGKILL)
        if ".tmp-put" not in name:
            last = name

    return look


def _sent(data: Any) -> str:
    """The path of a request that changes something in a bucket."""
    verb, _, rest = bytes(data[:2000]).partition(b" ") if isinstance(data, bytes | bytearray) else (b"", b"", b"")
    return unquote(rest.split(b" ")[0].split(b"?")[0].decode()) if verb in (b"PUT", b"POST", b"DELETE") else ""


def _writes(arguments: tuple[Any, ...]) -> bool:
    return isinstance(arguments[2], int) and bool(arguments[2] & _WRITES)


def _plain(name: str) -> str:
    """Without what differs from run to run: process numbers, random digits, the digests of ledgers."""
    name = re.sub(r"\.tmp-(put|build)-[^/]*", r".tmp-\1", name)
    name = re.sub(r"(\.tmp-(?:latents|text)-.*)-\d+-[0-9a-f]{8}\.tar", r"\1.tar", name)
    return re.sub(r"-[0-9a-f]{8}\.ledger", ".ledger", name)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    _serve()
