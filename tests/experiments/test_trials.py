import pytest
import torch

from transfusion import TransfusionConfig, TransfusionForMultimodalGeneration
from transfusion.experiments.trials import BASE, QUESTIONS, TRIALS


def num_parameters(name: str) -> int:
    config = TransfusionConfig.from_preset("demo", **{**BASE, "vocab_size": 4101, **TRIALS[name].config})
    with torch.device("meta"):
        return TransfusionForMultimodalGeneration(config).num_parameters()


@pytest.mark.parametrize("name", TRIALS)
def test_every_trial_is_a_model(name: str) -> None:
    assert 1_000_000 < num_parameters(name) < 4_000_000


def test_questions_are_answered_by_trials_and_every_trial_answers_one() -> None:
    asked = {name for question in QUESTIONS for name in question.trials}
    assert asked == set(TRIALS)


@pytest.mark.parametrize(("plain", "other"), [("linear wide", "unet"), ("dense wide", "experts ffn")])
def test_plain_models_are_as_large_as_those_they_are_held_against(plain: str, other: str) -> None:
    assert num_parameters(plain) == pytest.approx(num_parameters(other), rel=0.04)
