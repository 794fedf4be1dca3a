"""The fourteen ways to train wrong in silence: each is set in a copy of the code, and its tests must fail.

A row is one trap as one edit of one line, and the tests that are its guard. `make test` checks that every edit still
finds its line and every guard exists; the long test sets each trap and sees the guard fail, and none fail without it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("shards", "preprocess", "train", "tests", "configs", "pyproject.toml")


class Trap(NamedTuple):
    """One edit that would train wrong, or store what trains wrong."""

    number: int
    """Which of the fourteen."""
    what: str
    file: str
    old: str
    new: str
    guards: tuple[str, ...]
    """Tests that must fail, as file::function below tests/."""


RESUMED = "train/test_layouts.py::test_a_run_goes_from_any_layout_to_one_process_and_back"

TRAPS = (
    Trap(
        1, "FSDP2 casts what goes into the model, timesteps too", "train/parallel/fsdp.py",
        "MixedPrecisionPolicy(cast_forward_inputs=False)", "MixedPrecisionPolicy(param_dtype=torch.bfloat16)",
        ("train/test_sharding.py::test_a_spread_base_gives_the_bits_of_a_whole_one[full-dtype1-False]",),
    ),
    Trap(
        2, "the timestep rounded to bf16", "train/objective.py",
        "return (NUM_TIMESTEPS * sigma_B.double()).float()",
        "return (NUM_TIMESTEPS * sigma_B.double()).bfloat16().float()",
        ("train/test_objective.py::test_the_timestep_is_not_rounded",),
    ),
    Trap(
        2, "the timestep cut to an integer", "train/objective.py",
        "return (NUM_TIMESTEPS * sigma_B.double()).float()",
        "return (NUM_TIMESTEPS * sigma_B.double()).long().float()",
        ("train/test_objective.py::test_the_timestep_is_not_rounded",),
    ),
    Trap(
        3, "the residual stream rounded", "train/model/block.py",
        "return gated_sum(x_BLD, y_BLD, gate2, inputs.num_first)",
        "return gated_sum(x_BLD, y_BLD, gate2, inputs.num_first).to(dtype).float()",
        ("train/test_model.py::test_the_residual_stream_is_never_rounded",),
    ),
    Trap(
        3, "the residual stream rounded in the block that writes its own backward pass", "train/recompute/block.py",
        'x_BLD = add_gated_(x_BLD, down, _gate(mod, 5, parts, "ffn.2"), shared.num_first)',
        'x_BLD = add_gated_(x_BLD, down, _gate(mod, 5, parts, "ffn.2"), shared.num_first).to(down.dtype).float()',
        ("train/test_checkpointing.py::test_the_residual_stream_and_its_gradient_are_never_rounded",),
    ),
    Trap(
        3, "the time embedding rounded", "train/model/dit.py",
        "time_BRD = self.time_embedding(sinusoids(rows_BR, self.config.freq_dim))",
        "time_BRD = self.time_embedding(sinusoids(rows_BR, self.config.freq_dim)).to(self.compute_dtype).float()",
        ("train/test_model.py::test_the_time_embedding_is_never_rounded",),
    ),
    Trap(
        4, "gradients of ranks that share a sample averaged", "train/parallel/ranks.py",
        "weight.grad = part.view(weight.shape)", "weight.grad = part.view(weight.shape) / self.layout.ulysses",
        (f"{RESUMED}[ulysses-2]",),
    ),
    Trap(
        4, "a loss that all ranks compute counted once for each", "train/parallel/ulysses.py",
        "_Exchange.apply(there, ulysses.own, own_BlP)",
        "_Exchange.apply(there, lambda grad: ulysses.own(grad) * ulysses.size, own_BlP)",
        (
            f"{RESUMED}[ulysses-2]",
            "train/test_ulysses.py::test_ranks_that_share_the_tokens_give_one_process_s_numbers[2-none-size0]",
        ),
    ),
    Trap(
        5, "ranks of one sequence drawing their own noise", "train/data/loader.py",
        "noise = draw_noise(self._config.seed, step,",
        'noise = draw_noise(self._config.seed + int(__import__("os").environ.get("RANK", "0")) % 2, step,',
        (f"{RESUMED}[ulysses-2]",),
    ),
    Trap(
        5, "ranks of one sequence taking their own samples, modes and dropout", "train/loop.py",
        "dp_rank=ranks.layout.dp_rank,", "dp_rank=ranks.layout.rank % ranks.layout.dp_size,",
        (f"{RESUMED}[replicate-2-ulysses-2]",),
    ),
    Trap(
        6, "latents not divided by their standard deviations", "preprocess/encoders/encoders.py",
        "((mean_CTHW - self._mean_C111) * self._inverse_std_C111)",
        "(mean_CTHW - self._mean_C111)",
        ("preprocess/test_encoders.py::test_latents_are_diffusers_normalised_mode",),
    ),
    Trap(
        7, "a sample of the posterior in place of its mode", "preprocess/encoders/encoders.py",
        ".latent_dist.mode()", ".latent_dist.sample()",
        ("preprocess/test_encoders.py::test_latents_are_diffusers_normalised_mode",),
    ),
    Trap(
        8, "the first frame noised in image-to-video", "train/objective.py",
        "torch.where(clean, x0[:, :, 0], noised[:, :, 0])",
        "torch.where(clean, noised[:, :, 0], noised[:, :, 0])",
        (
            "train/test_objective.py::test_the_first_latent_frame_is_clean_only_in_image_to_video",
            "train/test_objective.py::test_training_inputs_are_those_of_the_image_to_video_pipeline",
        ),
    ),
    Trap(
        8, "the first frame in the loss of image-to-video", "train/objective.py",
        "torch.where(first_B, 0.0, 1.0)", "torch.where(first_B, 1.0, 1.0)",
        (
            "train/test_objective.py::test_a_slots_loss_is_the_mean_over_its_own_trained_elements",
            "train/test_objective.py::test_no_gradient_reaches_the_first_frame_of_image_to_video",
        ),
    ),
    Trap(
        8, "a clean first frame whose tokens are not at t = 0", "train/model/dit.py",
        "non_blocking=True), 0.0, timestep_B)", "non_blocking=True), timestep_B, timestep_B)",
        ("train/test_model.py::test_the_first_frame_takes_timestep_zero_only_where_asked",),
    ),
    Trap(
        9, "text not padded with zeros", "train/data/batch.py",
        "padded = np.zeros(", "padded = np.ones(",
        ("train/test_data.py::test_padding_is_zero_rows_and_nothing_is_cut",),
    ),
    Trap(
        9, "captions cleaned without ftfy", "preprocess/text/clean.py",
        "fixed = _ftfy().fix_text(text)", "fixed = text",
        (
            "preprocess/test_captions.py::test_the_full_width_comma_is_folded",
            "preprocess/test_captions.py::test_without_ftfy_there_is_no_caption",
        ),
    ),
    Trap(
        9, "diffusers' default of 226 tokens", "preprocess/encoders/encoders.py",
        "MAX_TOKENS = 512", "MAX_TOKENS = 226",
        ("preprocess/test_encoders.py::test_a_text_beyond_512_tokens_is_refused_not_cut",),
    ),
    Trap(
        9, "untied text embeddings taken", "preprocess/encoders/load.py",
        "not torch.equal(both[0].tensor, both[1].tensor)", "False",
        ("preprocess/test_checkpoint.py::test_untied_text_embeddings_are_refused_and_tied_copies_taken",),
    ),
    Trap(
        10, "frames beyond 4k+1 dropped by the encoder", "preprocess/encoders/encoders.py",
        "if len(frames_THWC) % 4 != 1:", "if False:",
        ("preprocess/test_encoders.py::test_frames_that_the_encoder_would_drop_are_refused",),
    ),
    Trap(
        10, "sides that are multiples of 16 only", "preprocess/config.py",
        "if self.width % 32 or self.height % 32:", "if self.width % 16 or self.height % 16:",
        ("preprocess/test_cli.py::test_bad_settings_are_named_with_what_was_expected",),
    ),
    Trap(
        11, "norm3 taken for the norm of the feed-forward", "train/model/load.py",
        r'(r"\.norm3\.", ".norm2."),', r'(r"\.norm3\.", ".norm3."),',
        ("train/test_weights.py::test_norm3_is_the_norm_before_cross_attention",),
    ),
    Trap(
        12, "alpha lost at export", "train/lora/formats.py",
        "(pair.up_Or.float() * pair.scale)", "(pair.up_Or.float() * 1)",
        (
            "train/test_lora.py::test_export_folds_the_scale_once",
            "train/test_lora.py::test_exported_file_loads_in_a_diffusers_pipeline_at_the_right_scale",
        ),
    ),
    Trap(
        12, "alpha applied twice", "train/lora/formats.py",
        "torch.tensor(float(pair.rank))", "torch.tensor(float(pair.rank * pair.scale))",
        (
            "train/test_lora.py::test_export_folds_the_scale_once",
            "train/test_lora_formats.py::test_the_scale_is_folded_into_b_and_alpha_is_the_rank",
        ),
    ),
    Trap(
        13, "random tests over a head of zeros", "train/model/dit.py",
        "zero_head: bool = False", "zero_head: bool = True",
        ("train/test_model.py::test_random_weights_repeat_and_have_a_live_head",),
    ),
    Trap(
        14, "rotary positions counted from each rank's own first token", "train/model/rope.py",
        "token = torch.arange(offset, offset + num_tokens, dtype=torch.int64)",
        "token = torch.arange(0, num_tokens, dtype=torch.int64)",
        ("train/test_model.py::test_rotation_by_parts_equals_the_whole",),
    ),
)  # fmt: skip


def test_every_trap_still_finds_its_line_and_its_guards() -> None:
    """An edit that finds no line would prove nothing, and so would a guard that is gone."""
    for trap in TRAPS:
        assert (ROOT / trap.file).read_text().count(trap.old) == 1, f"trap {trap.number}, {trap.what}"
        for guard in trap.guards:
            file, _, name = guard.partition("::")
            function = re.escape(name.partition("[")[0])
            assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), guard


def test_all_fourteen_are_there() -> None:
    """Every trap of the list has at least one row."""
    assert {trap.number for trap in TRAPS} == set(range(1, 15))


def failed(tree: Path, guards: tuple[str, ...]) -> set[str]:
    """Which of the guards fail in a tree, parametrised or not."""
    names = [f"tests/{guard}" for guard in guards]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-rf", *names]
    done = subprocess.run(command, check=False, cwd=tree, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 2 and up: pytest itself broke, which proves nothing
    lines = "|".join(re.escape(f"tests/{guard}") for guard in guards)
    found = re.findall(rf"^FAILED ({lines})(?!\w)", done.stdout, re.MULTILINE)
    return {line.removeprefix("tests/") for line in found}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code and its tests."""
    folder = tmp_path_factory.mktemp("trapped")
    for name in COPIED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        (shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_guard_fails_without_its_trap(tree: Path) -> None:
    """Else a failing guard would say nothing about a trap."""
    assert not failed(tree, tuple(sorted({guard for trap in TRAPS for guard in trap.guards})))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: f"{trap.number}: {trap.what}")
def test_a_trap_that_is_set_is_noticed(tree: Path, trap: Trap) -> None:
    """The code with this one edit fails every guard."""
    file = tree / trap.file
    before = file.read_text()
    file.write_text(before.replace(trap.old, trap.new))
    try:
        assert failed(tree, trap.guards) == set(trap.guards)
    finally:
        file.write_text(before)
