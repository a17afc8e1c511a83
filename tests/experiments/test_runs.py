import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from transfusion.experiments.runs import RunSettings, make_model, make_trainer, run_trial, shapes_processor
from transfusion.experiments.trials import TRIALS, Trial


SETTINGS = RunSettings(steps=2, batch_size=8, num_pictures=16, num_prompts=4, num_texts=4, num_inference_steps=2)


def test_a_trial_leaves_scores_and_drawings_and_is_not_run_twice(tmp_path: Path) -> None:
    result = run_trial(TRIALS["base"], 3, SETTINGS, tmp_path)
    assert result["trial"] == "base" and result["seed"] == 3 and result["settings"]["steps"] == 2
    assert {"drawn_all", "captioned_cells", "perplexity", "image_loss", "cpu_seconds"} <= set(result)
    with Image.open(tmp_path / "base-3.png") as sheet:
        assert sheet.size == (16 * 64, 64)
    kept = json.loads((tmp_path / "base-3.json").read_text())
    assert kept == result
    (tmp_path / "base-3.json").write_text(json.dumps({**kept, "image_loss": 42}))
    assert run_trial(TRIALS["base"], 3, SETTINGS, tmp_path)["image_loss"] == 42
    with pytest.raises(ValueError, match="was made with settings=.*delete the file"):
        run_trial(TRIALS["base"], 3, dataclasses.replace(SETTINGS, steps=3), tmp_path)
    with pytest.raises(ValueError, match="was made with config="):
        run_trial(Trial("base", {"image_rope": "2d"}), 3, SETTINGS, tmp_path)


def test_trials_see_the_same_rows_in_the_same_order_with_the_same_noise(tmp_path: Path) -> None:
    def first_batches(name: str) -> list[dict[str, Any]]:
        trial = dataclasses.replace(TRIALS[name], text_steps=min(TRIALS[name].text_steps, 1))
        processor = shapes_processor(trial.config.get("patch_size", 4))
        trainer = make_trainer(trial, SETTINGS, processor, 0, tmp_path)
        return list(itertools.islice(trainer.get_train_dataloader(), 2))

    for other in ("unet", "4 streams dynamic", "warm start"):
        for one, two in zip(first_batches("base"), first_batches(other), strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                assert torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name]
    texts = [[batch["sample_ids"] for batch in first_batches(name)] for name in ("base", "linear patch 8")]
    assert texts[0] == texts[1]


def test_a_seed_gives_the_same_run_again(tmp_path: Path) -> None:
    one, two = (run_trial(TRIALS["base"], 0, SETTINGS, tmp_path / name) for name in ("one", "two"))
    assert [one[key] for key in ("image_loss", "text_loss", "perplexity")] == [
        two[key] for key in ("image_loss", "text_loss", "perplexity")
    ]


@pytest.mark.parametrize("trial", [trial for trial in TRIALS.values() if trial.text_steps], ids=lambda t: t.name)
def test_a_warm_start_has_the_shape_of_the_base_and_may_freeze_text(trial: Trial, tmp_path: Path) -> None:
    quick = Trial(trial.name, trial.config, text_steps=1, freeze_text=trial.freeze_text)
    processor = shapes_processor(4)
    warm = make_model(quick, SETTINGS, processor, 0, tmp_path)
    cold = make_model(Trial("cold", trial.config), SETTINGS, processor, 0, tmp_path)
    assert warm.num_parameters() == cold.num_parameters()
    assert warm.config.objective == "flow" and warm.config.default_image_grid == (4, 4)
    text = warm.model.layers[0].mlp.up_proj.weight
    assert text.requires_grad is not trial.freeze_text
    assert not torch.equal(text, cold.model.layers[0].mlp.up_proj.weight)
