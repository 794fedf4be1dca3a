"""Many processes, one run: the same losses, the same samples, the same weights as one process."""

from __future__ import annotations

import pytest
from train_runs import make_config, read_metrics

from train import checkpoint
from train.config import TrainConfig
from train.loop import fit

VARIED = {
    "lora__dropout": 0.1,
    "data__caption_dropout": 0.3,
    "optim__ema_decay": 0.9,
    "objective__image_to_video_share": 0.5,
    "optim__lr": 1e-2,
}


def train(config: TrainConfig) -> int:
    return fit(config).step


def weights(output, step):
    return checkpoint.load_tensors(output / "checkpoints" / checkpoint.checkpoint_name(step) / "lora.safetensors")


def test_two_replicas_are_one_process(tiny_shards, tmp_path, run_distributed):
    changes = VARIED | {"data__micro_batch": 1, "eval": {"num_clips": 2, "every_steps": 5}}
    fit(make_config(tiny_shards, tmp_path / "one", **changes))
    assert run_distributed(2, train, make_config(tiny_shards, tmp_path / "two", **changes)) == [10, 10]
    assert_same_run(tmp_path / "one", tmp_path / "two")


def assert_same_run(one, other, rel=1e-5):
    for name, exact in (("metrics.jsonl", ("step", "keys", "num_image_to_video", "bucket", "updates", "tokens")),):
        ours, theirs = read_metrics(one, name), read_metrics(other, name)
        assert [[line[key] for key in exact] for line in ours] == [[line[key] for key in exact] for line in theirs]
        for field in ("loss", "grad_norm"):
            assert [line[field] for line in theirs] == pytest.approx([line[field] for line in ours], rel=rel)
