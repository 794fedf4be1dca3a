"""From a run to files and pictures: export, continue, sample while training, and the commands around them."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train_runs import DIMS, make_config

from shards.errors import UserError
from shards.files.tensor_files import read_latent_file
from shards.read.dataset import open_dataset
from train.cli.main import main
from train.config.model import DiTConfig
from train.loop import fit
from train.lora import export as exporting
from train.lora.export import export_lora, export_metadata, locate_lora
from train.lora.formats import read_lora
from train.model.dit import build_model
from train.model.load import save_dit
from train.parallel.ranks import Ranks
from train.sampling.preview import Preview


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    save_dit(build_model(DiTConfig(**DIMS), seed=3), path)
    return path


@pytest.fixture(scope="module")
def run(base, tiny_shards, tmp_path_factory):
    """Six steps with a moving average and pictures every three."""
    key = min(sample.key for sample in open_dataset(tiny_shards).samples if sample.frames > 1)
    prompts = [{"name": "t2v", "key": key}, {"name": "i2v", "key": "*", "first_frame": "sample", "num_frames": 9}]
    folder = tmp_path_factory.mktemp("run") / "run"
    config = make_config(
        tiny_shards, folder, max_steps=6, model__checkpoint=str(base), model__dims=None, lora__alpha=8.0,
        optim__ema_decay=0.5, checkpoint__every_steps=3, checkpoint__licence="CC BY 4.0",
        sample={"every_steps": 3, "prompts": prompts, "sampler": {"steps": 2}},
    )  # fmt: skip
    fit(config)
    return folder


def _call(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result


def _metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_runs_own_export_says_where_it_comes_from(run, tiny_shards):
    dataset = open_dataset(tiny_shards)
    metadata = _metadata(run / "lora.safetensors")
    assert "base_model" not in metadata  # this base is not the published one
    assert metadata["dataset_identity"] == dataset.identity_digest
    assert metadata["dataset_revision"] == dataset.revision
    assert metadata["licence"] == "CC BY 4.0"
    assert metadata["step"] == "6"
    assert len(metadata["config_digest"]) == len(metadata["base_weights"]) == 64
    assert "lora_adapter_metadata" not in metadata


def test_the_base_is_named_only_where_its_files_are_the_published_ones(tmp_path, monkeypatch):
    """Files of the right sizes, the digests of which are compared; one flipped byte, and nothing is claimed."""
    files = {f"part-{place}.safetensors": bytes([place]) * (10 + place) for place in range(2)}
    table = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    monkeypatch.setattr(exporting, "BASE_FILES", table)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert export_metadata({}, 1, None, str(tmp_path))["base_model"] == "Wan-AI/Wan2.2-TI2V-5B"
    (tmp_path / "part-1.safetensors").write_bytes(bytes(11))
    assert "base_model" not in export_metadata({}, 1, None, str(tmp_path))
    (tmp_path / "part-1.safetensors").unlink()
    assert "base_model" not in export_metadata({}, 1, None, str(tmp_path))
    assert "base_model" not in export_metadata({}, 1, None, None)


def test_export_of_a_run_is_its_last_average_and_of_a_step_that_ones(run, tmp_path):
    result = _call("export", run, tmp_path / "last.safetensors", "--licence", "mine")
    assert result.exit_code == 0, result.output
    ours, runs = load_file(tmp_path / "last.safetensors"), load_file(run / "lora.safetensors")
    assert ours.keys() == runs.keys()
    assert all(torch.equal(ours[name], runs[name]) for name in ours)
    assert {k: v for k, v in _metadata(tmp_path / "last.safetensors").items() if "licen" not in k} == {
        k: v for k, v in _metadata(run / "lora.safetensors").items() if "licen" not in k
    }
    assert "licence: mine" in result.output
    export_lora(run, tmp_path / "three.safetensors", "diffusers", torch.bfloat16, step=3)
    three = load_file(tmp_path / "three.safetensors")
    raw = load_file(run / "checkpoints/step-0000003/average.safetensors")
    name = "blocks.0.self_attn.q.lora_B.weight"
    assert torch.equal(three["transformer.blocks.0.attn1.to_q.lora_B.weight"], (2 * raw[name]).bfloat16())
    assert _metadata(tmp_path / "three.safetensors")["step"] == "3"


def test_a_card_says_what_the_lora_was_made_from_and_names_no_path(run, tiny_shards, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / "samples/contact-sheet.jpg").write_bytes(b"picture")
    out = tmp_path / "shared/lora.safetensors"
    result = _call("export", copied, out, "--licence", "CC BY-NC 4.0", "--card")
    assert result.exit_code == 0, result.output
    assert "hf upload" in result.output
    text = (tmp_path / "shared/README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "cc-by-nc-4.0"
    assert "base_model" not in head  # this base is no published one, and the card says so
    assert "| base | not compared with the published weights |" in text
    for fact in (open_dataset(tiny_shards).revision, "| rank, alpha | 4, 8.0 |", "| steps | 6 |", "contact-sheet.jpg"):
        assert fact in text
    assert str(tmp_path) not in text and str(tiny_shards) not in text
    assert (tmp_path / "shared/contact-sheet.jpg").read_bytes() == b"picture"
    held_out = copied / "held_out.jsonl"
    line = {"sigmas": [0.5, 0.9], "num_clips": 3, "t2v": [2.0, 1.0], "i2v": [4.0, 1.0], "mean": 2.0, "step": 0}
    better = {**line, "t2v": [1.0, 1.0], "mean": 1.5, "step": 6}
    held_out.write_text("".join(json.dumps(one) + "\n" for one in (line, better)) + '{"step": 9, "me')
    assert _call("export", copied, tmp_path / "b/lora.safetensors", "--licence", "ours", "--card").exit_code == 0
    text = (tmp_path / "b/README.md").read_text()
    assert "| T2V, σ 0.50 | 2.0000 | 1.0000 | -50.0 % |" in text and "| all | 2.0000 | 1.5000 | -25.0 % |" in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "other"
    held_out.write_text(json.dumps(better) + "\n")  # evaluated from step 6 on
    out = tmp_path / "three/lora.safetensors"
    assert _call("export", copied, out, "--step", "3", "--card").exit_code == 0
    assert "Held-out loss" not in (out.parent / "README.md").read_text()
    result = _call("export", run / "lora.safetensors", tmp_path / "c/lora.safetensors", "--card")
    assert result.exit_code == 2
    assert "a card is made from a run" in result.output
    assert not (tmp_path / "c").exists()
    held_out.write_text("garbage\n")
    result = _call("export", copied, tmp_path / "c/lora.safetensors", "--card")
    assert result.exit_code == 2 and "`wantrain verify RUN` names the line" in result.output
    result = _call("export", copied, tmp_path / "b/other.safetensors", "--card")
    assert result.exit_code == 2 and "README.md is there already" in result.output


def test_export_converts_any_file_and_refuses_nonsense(run, tmp_path):
    assert _call("export", run / "lora.safetensors", tmp_path / "m.safetensors", "--format", "musubi").exit_code == 0
    assert read_lora(tmp_path / "m.safetensors").format == "musubi"
    for arguments, words in [
        ((run, tmp_path / "m.safetensors"), "is there already"),
        ((run, tmp_path / "n.safetensors", "--step", "4"), "one of 3, 6"),
        ((tmp_path, tmp_path / "n.safetensors"), "no LoRA file, no checkpoint and no run"),
    ]:
        result = _call("export", *arguments)
        assert result.exit_code == 2
        assert words in result.output
    tensors = load_file(run / "lora.safetensors")
    tensors["diffusion_model.blocks.0.self_attn.q.lora_B.weight"] += 1e6
    save_file(tensors, tmp_path / "huge.safetensors")
    result = _call("export", tmp_path / "huge.safetensors", tmp_path / "n.safetensors", "--dtype", "float16")
    assert result.exit_code == 2
    assert "is not finite as float16" in result.output


def test_info_as_text_and_as_json(run):
    result = _call("lora", "info", run / "lora.safetensors")
    assert result.exit_code == 0, result.output
    assert "written by: wan-broadcast-lora" in result.output
    assert "ranks: 4" in result.output
    facts = json.loads(_call("lora", "info", run, "--json").output)
    assert facts["scales"] == [2.0]
    assert facts["format"] == "run"


def test_merge_and_unmerge_by_command(run, base, tmp_path):
    merged, back = tmp_path / "merged", tmp_path / "back"
    arguments = ("merge", base, run / "lora.safetensors", merged, "--layout", "diffusers")
    result = _call(*arguments)
    assert result.exit_code == 0, result.output
    assert "16 of" in result.output
    assert _call("unmerge", merged, run / "lora.safetensors", back).exit_code == 0
    before, after = load_file(base), load_file(back / "diffusion_pytorch_model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6)
    result = _call("unmerge", back, run / "lora.safetensors", tmp_path / "again")
    assert result.exit_code == 2
    assert "--unrecorded-scale" in result.output


def test_pictures_are_made_before_the_first_step_and_on_the_way(run):
    folders = sorted(path.name for path in (run / "samples").iterdir())
    assert folders == ["step-0000000", "step-0000003", "step-0000006"]
    first, last = (read_latent_file(run / "samples" / name / "t2v.safetensors") for name in (folders[0], folders[-1]))
    assert first.values.shape == last.values.shape
    assert (first.values != last.values).any()
    assert first.facts["prompt"] == last.facts["prompt"] != ""
    assert read_latent_file(run / "samples" / folders[0] / "i2v.safetensors").values.shape[1] == 3


def test_pictures_change_nothing_of_the_training(run, base, tiny_shards, tmp_path):
    config = make_config(
        tiny_shards, tmp_path / "plain", max_steps=6, model__checkpoint=str(base), model__dims=None, lora__alpha=8.0,
        optim__ema_decay=0.5, checkpoint__every_steps=3, checkpoint__licence="CC BY 4.0",
    )  # fmt: skip
    fit(config)
    ours, theirs = load_file(run / "lora.safetensors"), load_file(tmp_path / "plain/lora.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _sample_config(tmp_path, base, run, tiny_shards, **changes):
    key = min(sample.key for sample in open_dataset(tiny_shards).samples if sample.frames > 1)
    values = {
        "output": str(tmp_path / "out"), "model": {"checkpoint": str(base)}, "lora": str(run),
        "data": {"root": str(tiny_shards)}, "prompts": [{"name": "t2v", "key": key}], "sampler": {"steps": 2},
        **changes,
    }  # fmt: skip
    path = tmp_path / "sample.yaml"
    path.write_text(json.dumps(values))
    return path


def test_sample_by_command_equals_the_sample_of_the_run(run, base, tiny_shards, tmp_path):
    config = _sample_config(tmp_path, base, run, tiny_shards)
    result = _call("sample", config)
    assert result.exit_code == 0, result.output
    ours = read_latent_file(tmp_path / "out/t2v.safetensors").values
    runs = read_latent_file(run / "samples/step-0000006/t2v.safetensors").values
    torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(runs), atol=1e-5, rtol=1e-5)
    assert _call("sample", config, "-o", "lora_scale=0").exit_code == 0
    without = read_latent_file(tmp_path / "out/t2v.safetensors").values
    start = read_latent_file(run / "samples/step-0000000/t2v.safetensors").values
    torch.testing.assert_close(torch.from_numpy(without), torch.from_numpy(start), atol=1e-5, rtol=1e-5)
    assert abs(ours - without).max() > 1e-3


def test_compare_samples_the_base_and_every_checkpoint_from_the_same_noise(run, base, tiny_shards, tmp_path):
    config = _sample_config(tmp_path, base, run, tiny_shards)
    result = _call("sample", config, "--compare")
    assert result.exit_code == 0, result.output
    assert "wanprep decode --watch" in result.output
    found = {path.parent.name: read_latent_file(path).values for path in sorted((tmp_path / "out").rglob("t2v.*"))}
    assert list(found) == ["base", "step-0000003", "step-0000006"]
    plain = tmp_path / "plain"
    assert _call("sample", config, "-o", "lora=null", "-o", f"output={plain}").exit_code == 0
    assert np.array_equal(found["base"], read_latent_file(plain / "t2v.safetensors").values)
    assert abs(found["step-0000006"] - found["step-0000003"]).max() > 1e-4
    assert _call("sample", config, "-o", f"output={tmp_path}/last").exit_code == 0
    assert np.array_equal(found["step-0000006"], read_latent_file(tmp_path / "last/t2v.safetensors").values)
    tensors = load_file(run / "lora.safetensors")
    zero = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in tensors.items()}
    save_file(zero, tmp_path / "zero.safetensors")
    arguments = ("--compare", "-o", f"lora={tmp_path}/zero.safetensors", "-o", f"output={tmp_path}/zero")
    assert _call("sample", config, *arguments).exit_code == 0
    latents = [read_latent_file(tmp_path / f"zero/samples/{side}/t2v.safetensors").values for side in ("base", "lora")]
    assert np.array_equal(*latents)
    result = _call("sample", config, "--compare", "-o", "lora=null")
    assert result.exit_code == 2
    assert "--compare: lora is null" in result.output


def test_one_command_trains_and_shows_videos(base, tiny_shards, tmp_path, monkeypatch):
    """`sample.decode` names the config of stage 1; its process makes the videos, whose VAE is the demo's random one."""
    key = min(sample.key for sample in open_dataset(tiny_shards).samples if sample.frames > 1)
    sample = {"every_steps": 1, "prompts": [{"name": "sea", "key": key}], "sampler": {"steps": 1}}
    prep = tmp_path / "prep.yaml"
    prep.write_text(Path("configs/demo/prep.yaml").read_text())
    changes = {"max_steps": 2, "model__checkpoint": str(base), "model__dims": None}
    with pytest.raises(UserError, match=r"sample\.decode: nowhere\.yaml: no such file"):
        fit(make_config(tiny_shards, tmp_path / "no", **changes, sample={**sample, "decode": "nowhere.yaml"}))
    run, order = tmp_path / "run", []
    barrier, finish = Ranks.barrier, Preview.finish
    monkeypatch.setattr(Ranks, "barrier", lambda self: order.append("barrier") or barrier(self))
    monkeypatch.setattr(Preview, "finish", lambda self: order.append("finish") or finish(self))
    fit(make_config(tiny_shards, run, **changes, sample={**sample, "decode": str(prep)}))
    assert order[-2:] == ["barrier", "finish"], "the other ranks wait for no VAE"
    assert len(list((run / "samples").glob("step-*/sea.mp4"))) == 3, (run / "logs/decode.log").read_text()
    assert (run / "samples/side-by-side.mp4").is_file()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.compile=true", "model.compile"),
        ("precision.initial_scale=2", "precision.initial_scale"),
        ("precision.max_skipped_in_a_row=2", "precision.max_skipped_in_a_row"),
        ('prompts=[{"name": "a", "key": "*", "index": 2}]', "index 2"),
    ],
)
def test_sample_refuses_keys_that_sampling_does_not_use(run, base, tiny_shards, tmp_path, override, words):
    result = _call("sample", _sample_config(tmp_path, base, run, tiny_shards), "-o", override)
    assert result.exit_code == 2
    assert words in result.output
    result = _call("sample", _sample_config(tmp_path, base, None, tiny_shards, lora=None), "-o", "lora_scale=0.5")
    assert result.exit_code == 2
    assert "lora_scale: 0.5 scales a LoRA, and lora is null" in result.output


def test_sample_is_deterministic_where_that_is_asked(run, base, tiny_shards, tmp_path, monkeypatch):
    from train.sampling import sample as sampling

    seen, original = [], sampling.sample_latent
    monkeypatch.setattr(
        sampling,
        "sample_latent",
        lambda *inputs: (seen.append(torch.are_deterministic_algorithms_enabled()), original(*inputs))[1],
    )
    config = _sample_config(tmp_path, base, run, tiny_shards)
    assert _call("sample", config, "-o", "precision.deterministic=true").exit_code == 0
    assert _call("sample", config).exit_code == 0
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_sample_refuses_a_lora_of_another_model(run, base, tiny_shards, tmp_path):
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 3072),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(3072, 4),
    }
    save_file(tensors, tmp_path / "other.safetensors")
    config = _sample_config(tmp_path, base, run, tiny_shards)
    result = _call("sample", config, "-o", f"lora={tmp_path}/other.safetensors")
    assert result.exit_code == 2
    assert "adapts a 3072 × 3072 linear, which is 32 × 32" in result.output


@pytest.mark.parametrize("tool", ["comfyui", "diffusers"])
def test_training_goes_on_from_another_tools_file(tool, run, base, tiny_shards, tmp_path, caplog):
    """Its first picture is the last of the run that wrote the file; what does not fit is found before weights load."""
    export_lora(run, tmp_path / "start.safetensors", tool, torch.float32)
    sample = {"prompts": [{"name": "t2v", "key": _key(tiny_shards)}], "sampler": {"steps": 2}}
    config = make_config(
        tiny_shards, tmp_path / "next", max_steps=1, model__checkpoint=str(base), model__dims=None, sample=sample,
        lora__start_from=str(tmp_path / "start.safetensors"),
    )  # fmt: skip
    fit(config)
    first = read_latent_file(tmp_path / "next/samples/step-0000000/t2v.safetensors").values
    last = read_latent_file(run / "samples/step-0000006/t2v.safetensors").values
    torch.testing.assert_close(torch.from_numpy(first), torch.from_numpy(last), atol=1e-5, rtol=1e-5)
    caplog.set_level("INFO", "wan")
    caplog.clear()
    with pytest.raises(UserError, match=r"rank 4, lora\.rank is 2"):
        fit(
            config.model_copy(
                update={"lora": config.lora.model_copy(update={"rank": 2}), "output": str(tmp_path / "x")}
            )
        )
    with pytest.raises(UserError, match="8 are unexpected"):
        targets = config.lora.model_copy(update={"targets": ("self_attn",)})
        fit(config.model_copy(update={"lora": targets, "output": str(tmp_path / "x")}))
    assert "opening the dataset" in caplog.text and "loading the base" not in caplog.text


def _key(root):
    return min(sample.key for sample in open_dataset(root).samples if sample.frames > 1)


def test_locate_prefers_the_average(run):
    file, identity, step = locate_lora(run)
    assert file == run / "checkpoints/step-0000006/average.safetensors"
    assert step == 6
    assert identity["dataset"]["revision"]
    assert locate_lora(run / "lora.safetensors") == (run / "lora.safetensors", None, None)
