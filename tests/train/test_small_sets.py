"""Small sets of clips: at least one is held out; what does not fit is found before the weights are built."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from click.testing import CliRunner
from train_runs import DIMS, make_config

from shards.errors import UserError
from shards.format.keys import clip_hash
from train.cli.main import main
from train.config.train import check_folders
from train.data.loader import select_samples
from train.data.open import open_data
from train.run import session


def test_one_clip_is_held_out_where_none_falls_on_that_side(tiny_shards, tmp_path, caplog):
    config = make_config(tiny_shards, tmp_path, data__validation_fraction=1e-6)
    dataset = open_data(config)
    assert select_samples(dataset, config.data)[1] == []
    logging.getLogger("wan").propagate = True
    with caplog.at_level(logging.WARNING, "wan"):
        train, held_out = select_samples(dataset, config.data, hold_out_one=True)
    clips = {dataset.samples[ordinal].clip_id for ordinal in held_out}
    everyone = {sample.clip_id for sample in dataset.samples}
    assert clips == {min(everyone, key=lambda clip_id: clip_hash(clip_id, "split"))}
    assert not clips & {dataset.samples[ordinal].clip_id for ordinal in train}
    assert len(train) + len(held_out) == len(dataset.samples)
    # The fraction that the message names holds out that very clip by the rule that never changes.
    fraction = float(caplog.text.split("set data.validation_fraction: ")[1].split()[0])
    named = make_config(tiny_shards, tmp_path, data__validation_fraction=fraction)
    assert select_samples(dataset, named.data)[1] == held_out


def test_a_width_that_does_not_fit_is_found_before_the_weights_are_built(tiny_shards, tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError("weights were built")

    monkeypatch.setattr(session, "make_trainee", never)
    config = make_config(tiny_shards, tmp_path, model={"dims": {**DIMS, "text_dim": 128}})
    with pytest.raises(UserError, match="text embeddings are 64 wide, the model takes 128"):
        session.open_session(config)


def test_a_run_and_a_dataset_are_not_within_each_other_nor_in_the_code(tmp_path):
    for root, output in ((tmp_path / "run/shards", tmp_path / "run"), (tmp_path / "d", tmp_path / "d/run")):
        with pytest.raises(UserError, match="one is within the other"):
            check_folders(make_config(root, output))
    check_folders(make_config("s3://bucket/run", tmp_path / "run"))
    with pytest.raises(UserError, match="inside the source package"):
        check_folders(make_config(tmp_path / "d", Path(session.__file__).parent / "mine"))


def test_a_config_of_the_other_stage_is_recognised(tmp_path):
    prep = tmp_path / "prep.yaml"
    prep.write_text("output: x\ncorpus: {location: clips}\nwindow: {num_frames: 17}\n")
    told = CliRunner().invoke(main, ["fit", str(prep)])
    assert told.exit_code == 2 and "this is a config of `wanprep`" in told.output and "unknown key" not in told.output
