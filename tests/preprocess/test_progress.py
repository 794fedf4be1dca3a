"""Progress: the right figures, as a bar, as lines, as JSON lines, or nothing."""

import contextlib
import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from preprocess.build import progress as progress_module
from preprocess.build.progress import describe_facts, show_progress
from shards.format.ledger import LedgerRow


def row(candidate=0, status="accepted", num_bytes=2**20, encode=3.0):
    return LedgerRow(
        candidate=candidate, clip_id=str(candidate), source="", status=status, stage=None, reason=None, detail=None,
        retryable=False, attempts=1, windows=(), seconds={"encode": encode}, bytes=num_bytes,
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_rates_count_from_the_first_encoder_and_are_shared_by_all(clock):
    with show_progress("latents", num_units=2, num_clips=10, style="none") as progress:
        clock.now += 50  # loading
        progress.worker()
        progress.worker()
        for candidate in range(4):
            clock.now += 2
            waited = {"fetch": 0.5, "decode": 0.0, "encode": 1.5, "write": 0.0}
            progress.row(row(candidate, "rejected" if candidate == 1 else "accepted"), waited)
        progress.unit(0)
    assert progress.facts() == {
        "pass": "latents", "units": 1, "of_units": 2, "clips": 4, "of_clips": 10, "accepted": 3, "rejected": 1,
        "bytes": 4 * 2**20, "clips_per_second": 0.5, "encoder_busy": 12 / 8 / 2, "seconds": 8.0, "seconds_left": 12,
        "pools": {"fetch": 0.25, "decode": 0.0, "encode": 0.75, "write": 0.0}, "bottleneck": "fetch",
    }  # fmt: skip


def test_words_for_people():
    facts = {
        "clips": 1500, "accepted": 1400, "rejected": 100, "bytes": 2**31, "clips_per_second": 0.143,
        "encoder_busy": 0.968, "bottleneck": "encode", "seconds_left": 3 * 86_400 + 7300,
    }  # fmt: skip
    said = ", 3 d 2 h left, 1,400 accepted, 100 rejected, 0.14 clips/s, encoder busy 97%"
    assert describe_facts(facts) == f"{said}, bound by encode, 2,048 MiB fetched"
    assert describe_facts(facts | {"bottleneck": None}) == f"{said}, 2,048 MiB fetched"
    assert describe_facts({"clips": 0, "seconds_left": 3700}) == ", 1 h 01 min left"
    assert describe_facts({"clips": 0, "seconds_left": None}) == ""


def test_json_lines_are_one_document_each_and_no_more_than_one_a_second(clock, capsys):
    with show_progress("latents", num_units=1, num_clips=30, style="json") as progress:
        progress.worker()
        for candidate in range(30):
            clock.now += 0.1
            progress.row(row(candidate))
        progress.unit(0)
    documents = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert 3 <= len(documents) <= 4
    assert documents[-1]["event"] == "progress" and documents[-1]["units"] == documents[-1]["of_units"] == 1
    assert documents[-1]["clips"] == 30 and documents[-1]["seconds_left"] == 0


def test_elsewhere_a_line_now_and_then_and_one_at_the_end(clock, caplog):
    with caplog.at_level(logging.INFO, "wan"), show_progress("text", num_units=50, num_clips=None, style="auto") as it:
        for unit in range(50):
            clock.now += 1
            it.unit(unit)
    lines = [record.getMessage() for record in caplog.records]
    assert 5 <= len(lines) <= 6 and lines[0] == "text: 10 of 50 units, 0 min 40 s left"
    assert lines[-1] == "text: 50 of 50 units, 0 min 00 s left"


def test_quiet_says_nothing(clock, caplog, capsys):
    with caplog.at_level(logging.INFO, "wan"), show_progress("text", num_units=1, num_clips=None, style="none") as it:
        clock.now += 100
        it.unit(0)
    assert not caplog.records and capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with show_progress("latents", num_units=1, num_clips=2, style="auto") as progress:
        progress.worker()
        for candidate in range(2):
            clock.now += 1
            progress.row(row(candidate, encode=0.5))
    said = terminal.getvalue()
    assert "latents" in said and "2/2" in said and "2 accepted" in said and "encoder busy 50%" in said


def in_a_terminal(code: str, columns: int) -> bytes:
    """What a program writes to a real terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=follower, stdout=follower, stderr=follower,
        env={**environment, "TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    written = b""
    with contextlib.suppress(OSError):  # the end of a terminal on Linux
        while read := os.read(leader, 65_536):
            written += read
    os.close(leader)
    assert process.wait() == 0, written.decode()
    return written


def test_at_80_columns_the_time_left_comes_first_and_a_note_has_its_own_line():
    written = in_a_terminal(
        """
from preprocess.build.progress import show_progress
from shards.console import LOG, set_up_logging
from shards.format.ledger import LedgerRow
set_up_logging()
note = "a note that is longer than the terminal is wide, with a path /data/" + "x" * 60
with show_progress("text a-long-name", num_units=2, num_clips=12_000, style="auto") as progress:
    progress.worker()
    LOG.info("%s", note)
    progress.row(LedgerRow(candidate=0, clip_id="0", source="", status="accepted", stage=None, reason=None, detail=None,
        retryable=False, attempts=1, windows=(), seconds={"encode": 0.1}, bytes=2**20))
""",
        80,
    )
    # A line is what stands between two line ends once the terminal's own commands are taken out.
    plain = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", written).decode()
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    at = next(number for number, line in enumerate(lines) if "a note that" in line)
    assert re.fullmatch(r"\d\d:\d\d:\d\d a note that .* with a path", lines[at]), lines[at]
    assert lines[at + 1] == " " * 9 + "/data/" + "x" * 60, "a line is broken between words, and a path stays whole"
    bars = [line for line in lines if "a-long-name" in line]
    assert bars[0].startswith("loading") and all(len(line) <= 80 for line in bars)
    assert re.match(r"\d.* left text a-long-name \S+ +1/12,000 1 accepted, 0 rejected", bars[-1]), bars[-1]
