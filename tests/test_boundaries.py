"""The tree is the architecture: who may import whom, and what never enters a process that trains or prints help."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from figures import ORDER, cycles, figures, has_python, import_graph

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("preprocess", "shards", "train")

# Most files of one folder, most entries at the root of a package, most levels of imports under one file.
MAX_FILES, MAX_ROOT_ENTRIES, MAX_DEPTH = 13, 22, 16
ENCODER_LIBRARIES = {"diffusers", "transformers", "av", "ffmpeg", "sentencepiece", "tokenizers"}


def imported_by(package: str) -> set[str]:
    """Top-level names that any file of `package` imports, at any depth of the code."""
    names: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded in a fresh interpreter after running `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def every_module(package: str) -> list[str]:
    """Dotted names of all modules of a package, sub-packages too, without `__main__` (which runs)."""
    paths = sorted(path for path in (ROOT / package).rglob("*.py") if path.stem != "__main__")
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


@pytest.mark.parametrize(
    ("package", "strangers"),
    [("shards", ("preprocess", "train")), ("train", ("preprocess",)), ("preprocess", ("train",))],
)
def test_data_flows_one_way(package: str, strangers: tuple[str, ...]) -> None:
    assert not imported_by(package) & set(strangers)


@pytest.mark.parametrize(
    ("package", "strangers"),
    [("shards", ("preprocess", "train")), ("train", ("preprocess",)), ("preprocess", ("train",))],
)
def test_data_flows_one_way_at_run_time(package: str, strangers: tuple[str, ...]) -> None:
    loaded = modules_after("\n".join(f"import {name}" for name in every_module(package)))
    assert not loaded & set(strangers)


def test_training_knows_no_encoder() -> None:
    assert not imported_by("train") & ENCODER_LIBRARIES
    loaded = modules_after("\n".join(f"import {name}" for name in every_module("train")))
    assert "torch" in loaded
    assert not loaded & (ENCODER_LIBRARIES - {"av"})


@pytest.mark.parametrize("package", PACKAGES)
def test_configuration_and_help_import_no_torch(package: str) -> None:
    module = "shards.cli" if package == "shards" else f"{package}.cli.main"
    code = f"from {module} import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert not modules_after(code) & {
        "torch",
        "boto3",
        "diffusers",
        "transformers",
        "av",
        "ray",
        "pandas",
        "webdataset",
    }


@pytest.mark.parametrize("package", ("preprocess", "train"))
def test_loading_a_config_imports_no_torch(package: str) -> None:
    assert "torch" not in modules_after(f"import {package}.config{'.train' if package == 'train' else ''}")


def test_every_source_file_stays_small() -> None:
    large = {
        str(path.relative_to(ROOT)): path.stat().st_size
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.stat().st_size > 20_000
    }
    assert not large


def test_no_pickle_and_no_unsafe_load() -> None:
    """`weights_only=True`, safe YAML, no pickles: a dataset or a checkpoint from elsewhere must not run code."""
    for package in PACKAGES:
        assert not imported_by(package) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_folders_import_only_downwards() -> None:
    """Each folder or root file imports only from those below it in ORDER, in function bodies too."""
    upwards = []
    for package, order in ORDER.items():
        places = {name: place for place, name in enumerate(order.split())}
        present = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or has_python(path)}
        assert present - {"__init__"} == set(places), f"{package}: ORDER does not list what is there"
        for module, imported in import_graph().items():
            parts, others = module.split("."), (name.split(".") for name in imported)
            if parts[0] == package and len(parts) > 1:
                upwards += [
                    f"{module} imports {'.'.join(other)}"
                    for other in others
                    if other[0] == package and len(other) > 1 and places[other[1]] < places[parts[1]]
                ]
    assert not upwards


def test_no_file_is_part_of_a_cycle() -> None:
    """Imports in function bodies count, imports for types only do not."""
    assert not [group for group in cycles(import_graph()) if len(group) > 1]


def test_the_tree_stays_readable() -> None:
    """Folders of a dozen files, a short root, a bounded depth of imports."""
    found = figures()
    assert found.largest_folder <= MAX_FILES and found.largest_root <= MAX_ROOT_ENTRIES and found.depth <= MAX_DEPTH, (
        found
    )


def test_init_files_hold_no_convenience_imports() -> None:
    """A name is imported from where it is defined. `shards.storage` holds the entry point of its own folder."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            handed_on = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not handed_on or path == ROOT / "shards/storage/__init__.py", path


def test_a_pattern_a_set_or_a_large_number_is_written_down_once() -> None:
    """Short ones such as a number of threads may be alike by chance."""
    places: dict[str, list[str]] = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call | ast.Set | ast.Constant):
                text = ast.unparse(node)
                if isinstance(node.value, ast.Set) or "re.compile(" in text or text.rpartition(" ")[2][4:].isdigit():
                    places.setdefault(text, []).append(str(path.relative_to(ROOT)))
    assert len(places) > 50
    assert not {text: found for text, found in places.items() if len(found) > 1}


def test_a_class_has_a_name_of_its_own() -> None:
    """One meaning a name in the whole project: a reader who searches for a class finds one."""
    places: dict[str, list[str]] = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_function_has_a_name_of_its_own_in_its_package(package: str) -> None:
    """Commands are called like what they run, and are not looked at; nor is a script's `main`."""
    places: dict[str, list[str]] = {}
    for path in (ROOT / package).rglob("*.py"):
        if "cli" not in (path.stem, path.parent.name):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name != "main":
                    places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert len(places) > 50
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


@pytest.mark.parametrize("module", ["preprocess.cli", "shards.cli", "train.cli"])
def test_a_module_started_with_m_answers(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
