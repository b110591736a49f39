"""The shipped checkpoint: its size, its figures measured again on a sample, and a training that can be resumed."""

import json

import pytest
import torch

import minillm.train
from minillm import ModelConfig
from minillm.checkpoint import SHIPPED, load_checkpoint
from minillm.evaluate import evaluate
from minillm.train import train

FIGURES = json.loads((SHIPPED / "small" / "evaluation.json").read_text())


def test_the_checkpoint_is_small_and_has_the_shape_of_its_preset():
    assert sum(path.stat().st_size for path in (SHIPPED / "small").iterdir()) <= 8 * 2**20
    assert load_checkpoint()[0].config == ModelConfig.small()
    assert load_checkpoint()[1].get_vocab_size() <= ModelConfig.small().vocab_size


def test_the_stored_figures_reach_the_goal():
    assert FIGURES["recall"]["mean"] >= 0.95
    assert FIGURES["latest"]["mean"] >= 0.90
    assert FIGURES["abstention"]["mean"] >= 0.95


def test_the_stored_figures_are_true_of_the_shipped_weights():
    again = evaluate(*load_checkpoint(), dialogues_per_cell=5)
    for kind in ("recall", "latest", "abstention"):
        # 80 dialogues: three standard deviations of a share near 0.95 are 0.07
        assert abs(again[kind]["mean"] - FIGURES[kind]["mean"]) < 0.08


def test_a_training_that_was_interrupted_gives_the_same_weights(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", steps=4, second_steps=2, save_every=2)
    calls, step = [], minillm.train.training_step

    def power_cut_in_the_sixth_step(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(minillm.train, "training_step", power_cut_in_the_sixth_step)
        train(tmp_path / "half", steps=4, second_steps=2, save_every=2)
    resumed = train(tmp_path / "half", steps=4, second_steps=2, save_every=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    written = {path.name for path in (tmp_path / "half").iterdir()}
    assert written >= {"loss.png", "model.safetensors", "config.yaml", "tokenizer.json"}
