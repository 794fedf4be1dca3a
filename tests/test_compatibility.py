"""What older code began, this code continues: a half-built dataset, checkpoints of each layout, ledgers.

The fixtures in golden/before-rooms were made before the packages were moved into sub-packages; its make.py says how.
They are never written again. This test knows the console commands, config keys and files on disk, and no module of
ours. Where the machine computes as the one that made them did (make.py's `machine`), every byte is compared. Elsewhere
numbers are compared closely, and the test says so as a skip after its checks.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden" / "before-rooms"
LAYOUTS = ["one", "replicate-2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("shard-2", "ulysses-2"))]
CLOCKED = ("seconds", "memory_gib", "tflops", "mfu")


def _load_make() -> Any:
    spec = importlib.util.spec_from_file_location("make_before_rooms", GOLDEN / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load_make()


@pytest.fixture(scope="module")
def differences() -> list[str]:
    """What differs between this machine and the one of the fixtures; empty: bytes must be the same."""
    answer = subprocess.run([sys.executable, GOLDEN / "make.py", "--machine"], check=True, stdout=subprocess.PIPE)
    golden = json.loads((GOLDEN / "machine.json").read_text())
    here = json.loads(answer.stdout)
    return [f"{name} {here[name]}, then {golden[name]}" for name in golden if here[name] != golden[name]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the configs and the corpus, as they lay when the fixtures were made."""
    for name in ("prep.yaml", "ledger.yaml", "train.yaml"):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    shutil.copytree(GOLDEN / "corpus", tmp_path / "corpus")
    return tmp_path


def say(differences: list[str]) -> None:
    """Called after the last check."""
    if differences:
        pytest.skip(
            f"all checks passed, but numbers were compared closely and not to the bit: {'; '.join(differences)}"
        )


BUILD = ["build-shards", "prep.yaml", "--serve", "corpus", "--quiet", "-o", "output=half-built"]


def test_a_half_built_dataset_of_an_older_transform_is_refused_by_name_and_can_be_read(folder: Path) -> None:
    """Its pixels were cut by other rules: it is read, verified, trained and recaptioned, and not grown."""
    dataset = folder / "half-built"
    shutil.copytree(GOLDEN / "half-built", dataset)
    before = files_of(dataset)
    assert_holds(make.reports(folder, "half-built"), json.loads((GOLDEN / "reports.json").read_text())["half-built"])
    program = Path(sys.executable).with_name("wanprep")
    done = subprocess.run(
        [program, *BUILD], cwd=folder, env=make.ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "transform.version: there 1, expected 2" in done.stderr
    assert "build into another output" in done.stderr
    assert files_of(dataset) == before
    assert "damaged" not in make.command(folder, "wanshards", "verify", "half-built", "--deep", "--partial")


def test_a_half_built_dataset_is_finished_with_identical_bytes(folder: Path, differences: list[str]) -> None:
    """Of the present transform: `tests/golden/transform-2`, made as before-rooms/make.py says."""
    dataset, golden = folder / "half-built", GOLDEN.parent / "transform-2"
    shutil.copytree(golden / "half-built", dataset)
    before = {name: (dataset / name).stat().st_mtime_ns for name in files_of(dataset) if name != "dataset.json"}
    assert {"latents/shard-000001.json", "text/default/shard-000000.json"} <= before.keys()
    assert not {"latents/shard-000002.json", "text/default/shard-000001.json"} & before.keys()

    make.command(folder, "wanprep", *BUILD)

    after, finished = files_of(dataset), files_of(golden / "half-built")
    for name, written in before.items():
        assert after[name] == finished[name], f"{name} was finished, and was changed"
        assert (dataset / name).stat().st_mtime_ns == written, f"{name} was finished, and was written again"
    compare_datasets(after, files_of(golden / "undisturbed"), exact=not differences)
    say(differences)


def files_of(dataset: Path) -> dict[str, bytes]:
    """Its files by name, without what killed writers left."""
    names = [path.relative_to(dataset) for path in sorted(dataset.rglob("*")) if path.is_file()]
    return {str(name): (dataset / name).read_bytes() for name in names if ".tmp-" not in str(name)}


def compare_datasets(new: dict[str, bytes], old: dict[str, bytes], *, exact: bool) -> None:
    """Every tar, commit, plan and ledger; the ledgers' names and rows without the seconds in them."""

    def plain(name: str) -> str:
        name = re.sub(r"(/shard-\d+)-[0-9a-f]{8}\.ledger", r"\1.ledger", name)
        return name if exact else re.sub(r"-[0-9a-f]{8}\.tar", ".tar", name)

    ours, theirs = ({plain(name): data for name, data in files.items()} for files in (new, old))
    assert ours.keys() == theirs.keys()
    for name, data in theirs.items():
        if name.endswith(".ledger.jsonl.zst"):
            for row, before in zip(rows_of(ours[name]), rows_of(data), strict=True):
                # A rejected clip's row has said what its file is only since these fixtures were made.
                assert {k: v for k, v in row.items() if k in before or k != "facts"} == before, name
        elif name.endswith(".tar") and not exact:
            compare_tars_closely(ours[name], data)
        elif "/shard-" in name and name.endswith(".json"):
            compare_commits(json.loads(ours[name]), json.loads(data), exact=exact)
        elif name == "dataset.json":
            document = json.loads(data)
            del document["seal"]
            if not exact:  # how well other numbers can be compressed
                del document["totals"]["bytes"], document["totals"]["text"]["bytes"]
            assert_holds(json.loads(ours[name]), document, name)
        elif exact or name.startswith("plan/"):
            assert ours[name] == data, f"{name}: other bytes"


def rows_of(ledger: bytes) -> Iterator[dict[str, Any]]:
    for line in zstandard.ZstdDecompressor().stream_reader(ledger).read().splitlines():
        row = json.loads(line)
        yield {name: value for name, value in row.items() if name != "seconds"}


def compare_commits(new: dict[str, Any], old: dict[str, Any], *, exact: bool) -> None:
    """Without what the clock decides; closely: the samples and what is said of them."""
    apart = {"ledger", "seal", "provenance"}
    if exact:
        assert {k: v for k, v in new.items() if k not in apart} == {k: v for k, v in old.items() if k not in apart}
        assert_holds(new["provenance"], old["provenance"])
        return
    assert (new["unit"], new["kind"], new["identity_sha256"]) == (old["unit"], old["kind"], old["identity_sha256"])
    for sample, same in zip(new["samples"], old["samples"], strict=True):
        assert (sample["key"], sample["summary"]) == (same["key"], same["summary"])


def compare_tars_closely(new: bytes, old: bytes) -> None:
    ours, theirs = members_of(new), members_of(old)
    assert list(ours) == list(theirs)
    for name, data in theirs.items():
        if name.endswith(".npy.zst"):
            same, array = array_of(ours[name]), array_of(data)
            assert (same.shape, same.dtype) == (array.shape, array.dtype)
            if array.dtype == np.uint16:  # bfloat16
                same, array = ((x.astype(np.uint32) << 16).view(np.float32) for x in (same, array))
            same, array = same.astype(np.float64), array.astype(np.float64)
            assert np.linalg.norm(same - array) <= 5e-3 * np.linalg.norm(array), name
        elif name.endswith(".json"):
            assert without_digests(json.loads(ours[name])) == without_digests(json.loads(data)), name


def members_of(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def array_of(payload: bytes) -> np.ndarray:
    return np.load(io.BytesIO(zstandard.ZstdDecompressor().stream_reader(payload).read()), allow_pickle=False)


def without_digests(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_digests(item) for name, item in value.items() if name != "sha256"}
    return [without_digests(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_resumed_from_the_checkpoint_of_its_layout(folder: Path, differences: list[str], layout: str) -> None:
    """The command that made it, three steps more: the steps, losses and tensors of the run that was never stopped."""
    shutil.copytree(GOLDEN / "undisturbed", folder / "shards")
    shutil.copytree(GOLDEN / "checkpoints" / layout, folder / "run")
    start = folder / "run/checkpoints/step-0000003"
    assert "uint8" in {str(tensor.dtype) for tensor in load_file(start / "optimizer.safetensors").values()}
    before = (folder / "run/metrics.jsonl").read_bytes()

    make.command(folder, "wantrain", "fit", "train.yaml", *make.LAYOUTS[layout], "-o", "max_steps=6")

    assert (folder / "run/metrics.jsonl").read_bytes().startswith(before), "the first steps were taken again"
    golden = GOLDEN / "checkpoints" / f"{layout}-6"
    for name in ("metrics.jsonl", "held_out.jsonl"):
        compare_lines(folder / "run" / name, golden / name, exact=not differences)
    end = Path("checkpoints/step-0000006")
    compare_states(folder / "run" / end, golden / end, exact=not differences)
    say(differences)


def unclocked(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if not any(word in name for word in CLOCKED)}


def compare_lines(new: Path, old: Path, *, exact: bool) -> None:
    """Line by line; closely as tests/golden_losses.txt is, slot losses as they are written: to five digits."""
    # A resume does not repeat the evaluation of the step it begins at, and a line of a step is written once.
    ours, theirs = ([unclocked(json.loads(line)) for line in path.read_text().splitlines()] for path in (new, old))
    if new.name == "held_out.jsonl":  # the run that ended at step 3 took it there as the other did
        assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, 3, 6]
    assert_holds(ours, theirs, new.name, rel=0.0 if exact else 1e-5, loose={"slot_losses": 1e-4, "grad_norm": 1e-4})


def compare_states(new: Path, old: Path, *, exact: bool) -> None:
    """Every tensor of a checkpoint, and what its state.json says."""
    assert sorted(path.name for path in new.iterdir()) == sorted(path.name for path in old.iterdir())
    assert (new / "dataset-pin.json").read_bytes() == (old / "dataset-pin.json").read_bytes()
    ours, theirs = (unclocked(json.loads((path / "state.json").read_text())) for path in (new, old))
    assert_holds(ours, theirs, "state.json", rel=0.0 if exact else 1e-5)
    for path in old.glob("*.safetensors"):
        tensors, same = load_file(path), load_file(new / path.name)
        assert same.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (same[name].shape, same[name].dtype) == (tensor.shape, tensor.dtype), name
            if exact:
                assert same[name].tobytes() == tensor.tobytes(), f"{path.name}: {name}: other bytes"
            elif path.name != "optimizer.safetensors":  # a code of 8 bits flips where a last bit of a gradient does
                assert np.linalg.norm(same[name] - tensor) <= 1e-3 * np.linalg.norm(tensor), f"{path.name}: {name}"


def test_the_ledgers_say_what_they_said(folder: Path) -> None:
    """A plan of two generations, and rows of every stage: read, sieve, fetch, probe, decode; retried and not."""
    shutil.copytree(GOLDEN / "ledger", folder / "ledger")
    golden = json.loads((GOLDEN / "reports.json").read_text())["ledger"]
    # Figures over latents are sums of float64, whose order a library may choose.
    assert_holds(make.reports(folder, "ledger"), golden, rel=1e-6)
    assert "no problems: " in make.command(folder, "wanshards", "verify", "ledger", "--deep")


def assert_holds(
    new: Any, old: Any, where: str = "", *, rel: float = 0.0, loose: dict[str, float] | None = None
) -> None:
    """`new` says all that `old` does; a dict may say more.

    Args:
        rel: how closely floats agree; 0: to the bit.
        loose: other bounds below some keys, where `rel` is not 0.
    """
    if isinstance(old, dict):
        assert isinstance(new, dict) and old.keys() <= new.keys(), f"{where}: {old.keys() - new.keys()} missing"
        for name, value in old.items():
            below = max(rel, (loose or {}).get(name, rel)) if rel else rel
            assert_holds(new[name], value, f"{where}.{name}", rel=below, loose=loose)
    elif isinstance(old, list):
        assert isinstance(new, list) and len(new) == len(old), f"{where}: {len(new)} items, not {len(old)}"
        for number, (item, value) in enumerate(zip(new, old, strict=True)):
            assert_holds(item, value, f"{where}[{number}]", rel=rel, loose=loose)
    elif re.fullmatch(r".*\.findings\[\d+\]\.what", where):  # a sentence for people may be reworded: its numbers stay
        assert re.findall(r"-?\d[\d.]*", new) == re.findall(r"-?\d[\d.]*", old), f"{where}: {new}, not {old}"
    elif isinstance(old, float) and rel:
        assert new == pytest.approx(old, rel=rel, abs=rel), where
    else:
        assert new == old, f"{where}: {new}, not {old}"
