"""Damaged and crafted files through every command: an answer or one line, no traceback, no hang, bounded memory.

python tests/shards/test_fuzz.py 10000 [SEED [KIND]]      that many of each kind; the seed is printed
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from click.testing import CliRunner

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from shards_data import write_dataset
from train_runs import make_config

from shards.cli import main
from shards.errors import UserError
from shards.format.commit import content_digest
from shards.format.ledger import read_ledger_lines
from shards.format.sealed_json import canonical_json, open_document, seal_document
from shards.read.dataset import open_dataset
from shards.read.index import write_index
from shards.read.table import pack
from shards.storage import open_storage
from train.config.train import TrainConfig
from train.data.loader import Loader, check_model_fits, select_samples
from train.data.open import open_data
from train.data.sampler import Order

NUM_CASES = 500
LONGEST_SECONDS = 30.0
FREE_BYTES = 64 * 2**20
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, "", "x", "x" * 5000, "../../etc/passwd", "\x00",
    "[/red]", "\ud800", [], {}, [[]], {"a": {}}, [0] * 3000, "AAAA", "====", pack([2**63, 0]), pack([0] * 40), "0" * 64,
    "latents", "text/default",
)  # fmt: skip


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*place, key)
        yield from _places(value[key], (*place, key))


def _craft(draw: random.Random, document: Any) -> Any:
    """The document with one to three values removed, replaced, repeated, or exchanged for another of its values."""
    document = json.loads(json.dumps(document))
    for _ in range(draw.randint(1, 3)):
        places = list(_places(document))
        if not places:
            break
        *parents, last = draw.choice(places)
        holder = document
        for key in parents:
            holder = holder[key]
        kind = draw.randrange(6)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder[last], list):
            holder[last] = holder[last] * draw.choice((0, 2, 100))
        elif kind == 2:
            other = document
            for key in draw.choice(places):
                other = other[key] if isinstance(other, dict) or key < len(other) else other
            holder[last] = json.loads(json.dumps(other))
        elif kind == 3 and isinstance(holder[last], int):
            holder[last] += draw.choice((-1, 1, 512, 2**40))
        elif kind == 4 and isinstance(holder, dict):
            holder["more"] = copy.deepcopy(draw.choice(ODD))
        else:
            holder[last] = copy.deepcopy(draw.choice(ODD))
    return document


def crafted(root: Path, draw: random.Random) -> tuple[Path, bytes]:
    """A file of the dataset and what it is replaced by: intact by its seal or checksum, of odd content."""
    names = [path for path in sorted(root.rglob("*")) if path.suffix == ".json" or path.name.endswith(".jsonl.zst")]
    path = draw.choice([path for path in names if path.parent.name != "plan" or path.suffix == ".json"])
    if path.suffix == ".json":
        body = _craft(draw, open_document(path.read_bytes(), path.name))
        if "revision" in body and draw.random() < 0.7:
            body["revision"] = content_digest({key: value for key, value in body.items() if key != "revision"})
        return path, seal_document({key: value for key, value in body.items() if key != "seal"} or {"x": 1})
    lines = [json.loads(line) for line in read_ledger_lines(path.read_bytes(), path.name)]
    place = draw.randrange(len(lines))
    if "ledger" in path.name:
        lines[place]["facts"] = {"codec": "h264", "decisions": {"matrix": {"value": "bt709", "ground": "flagged"}}}
    lines[place] = _craft(draw, lines[place])
    data = b"".join(canonical_json(line) + b"\n" for line in lines)
    return path, zstandard.ZstdCompressor(write_checksum=True).compress(data)


def damaged(root: Path, draw: random.Random) -> tuple[Path, bytes]:
    """A file of the dataset and its bytes after one damage."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    path = draw.choice(files)
    data = path.read_bytes()
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + draw.choice((1, 3, 64, 4096)))
    junk = draw.randbytes(draw.choice((1, 16, 600)))
    return path, [
        lambda: data[:start] + bytes(byte ^ 1 << draw.randrange(8) for byte in data[start:end]) + data[end:],
        lambda: data[:start],
        lambda: data[:start] + junk + data[end:],
        lambda: data[:start] + bytes(end - start) + data[end:],
        lambda: data + junk,
        lambda: draw.choice(files).read_bytes(),
        lambda: bytes(len(data)),
    ][draw.randrange(7)]()


def _commands(root: Path, work: Path, key: str) -> list[list[str]]:
    return [
        ["ls", str(root)],
        ["show", str(root), key],
        ["show", str(root), "clip-0-gone"],
        ["verify", str(root)],
        ["stats", str(root), "--no-cache"],
        ["report", str(root), str(work / "report.html"), "--cache", str(work / "cache")],
        ["index", str(root)],
    ]


def open_as_fit(config: TrainConfig, pin: dict[str, Any] | None) -> None:
    """What a run does with its dataset before it builds its model, and its first batch."""
    dataset = open_data(config, pin)
    ordinals, _ = select_samples(dataset, config.data, hold_out_one=True)
    order = Order([dataset.samples[ordinal] for ordinal in ordinals], config.seed, config.data.global_batch)
    check_model_fits(dataset, ordinals[0], channels=2, text_dim=64, text_len=32)
    with contextlib.closing(Loader(dataset, order, ordinals, config, text_len=32)) as loader:
        next(loader)


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


@contextlib.contextmanager
def _bounded(what: str, num_bytes: int) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is used now
    used, start = _memory("VmRSS"), time.monotonic()
    yield
    assert time.monotonic() - start < LONGEST_SECONDS, what
    assert _memory("VmHWM") - used <= FREE_BYTES + 16 * num_bytes, what


class Dataset:
    """A small dataset with an index and the commit of a plan, which is damaged and restored."""

    def __init__(self, work: Path) -> None:
        self.work, self.root = work, work / "root"
        write_dataset(self.root, num_units=2, samples_per_unit=3, channels=2, scratch=work / "scratch")
        generation = {"plan_version": 1, "name": "gen-000", "first_unit": 0, "frame_bytes": [3, 3], "num_candidates": 8}
        body = open_document((self.root / "dataset.json").read_bytes(), "")["generations"][0]
        fields = {"plan_sha256": body["plan_sha256"], "ledger_sha256": None}
        (self.root / "plan/gen-000.json").write_bytes(seal_document({**generation, **fields}))
        write_index(open_storage(self.root))
        dataset = open_dataset(self.root)
        self.key, self.pin = dataset.samples[0].key, dataset.pin()
        self.config = make_config(self.root, work / "run", data__global_batch=2)
        open_as_fit(self.config, self.pin)  # imports what it needs

    def try_all(self, path: Path, data: bytes) -> None:
        """Run the commands with the file replaced."""
        index = self.root / "index.jsonl.zst"
        before = {path: path.read_bytes(), index: index.read_bytes()}
        path.write_bytes(data)
        try:
            for command in _commands(self.root, self.work, self.key):
                what = f"{command[0]} of {path.name}"
                with _bounded(what, len(data)):
                    result = CliRunner().invoke(main, command)
                assert result.exception is None or isinstance(result.exception, SystemExit), what
                assert result.exit_code in (0, 1, 2) and "Traceback" not in result.output, (what, result.output)
                # After warnings, of devices that differ say, there is one error.
                num_errors = sum(line.startswith("error: ") for line in result.output.splitlines())
                assert num_errors == (result.exit_code == 2), (what, result.output)
            for pin in (self.pin, None):
                with _bounded(f"a run's opening with {path.name}", len(data)), contextlib.suppress(UserError):
                    open_as_fit(self.config, pin)
        finally:
            for each, content in before.items():
                each.write_bytes(content)


def run_cases(work: Path, kind: str, num: int, seed: int, first: int = 0) -> None:
    """Cases `first` to `num` of a kind. Each is a function of (seed, kind, its number)."""
    dataset = Dataset(work)
    for number in range(first, num):
        draw = random.Random(f"{seed} {kind} {number}")
        path, data = (crafted if kind == "crafted" else damaged)(dataset.root, draw)
        try:
            dataset.try_all(path, data)
        except BaseException:
            print(f"seed {seed}, {kind} case {number}: {path}", file=sys.stderr)
            raise
        if number % 500 == 499:
            print(f"{kind}: {number + 1} of {num}", flush=True)


@pytest.mark.parametrize(("kind", "seed", "number"), [("crafted", 1858, 4567), ("crafted", 20261129, 9949)])
def test_cases_that_once_ended_badly(tmp_path: Path, kind: str, seed: int, number: int) -> None:
    """A ledger's row of 1e308 seconds; an index that gives a latent fewer channels and a unit an odd device."""
    run_cases(tmp_path, kind, number + 1, seed, first=number)


@pytest.mark.parametrize("kind", ["crafted", "damaged"])
def test_a_few_odd_files_end_no_command_badly(tmp_path: Path, kind: str) -> None:
    run_cases(tmp_path, kind, 50, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["crafted", "damaged"])
def test_many_odd_files_end_no_command_badly(tmp_path: Path, kind: str) -> None:
    run_cases(tmp_path, kind, NUM_CASES, seed=0)


if __name__ == "__main__":
    import tempfile

    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 10**9
    print(f"seed {seed}")
    for kind in sys.argv[3:] or ("crafted", "damaged"):
        with tempfile.TemporaryDirectory() as folder:
            run_cases(Path(folder), kind, int(sys.argv[1]), seed)
