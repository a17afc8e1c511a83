import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.evaluate import main, parse_args
from tests.test_pipeline import make_pipeline, seeded
from transfusion.data import load_emoji, load_glosses
from transfusion.evaluation.frechet import FRECHET
from transfusion.evaluation.report import (
    EvaluationSettings,
    draw,
    evaluate_demo,
    name_scores,
    two_halves,
    write_captions,
)
from transfusion.evaluation.text import text_perplexity
from transfusion.pipeline import TransfusionCaptionOutput, TransfusionPipelineOutput


SETTINGS = EvaluationSettings(num_pictures=7, num_texts=12, num_shown=3, batch_size=4, num_inference_steps=2, seed=3)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The report of an untrained model, and its scores."""
    folder = tmp_path_factory.mktemp("run") / "report"
    return folder, evaluate_demo(make_pipeline(default_image_grid=(2, 3)), folder, SETTINGS)


def test_scores_are_written_and_those_of_a_model_that_knows_nothing(report: tuple[Path, dict]) -> None:
    folder, scores = report
    assert json.loads((folder / "evaluation.json").read_text()) == scores
    assert scores["settings"] == {
        "num_pictures": 7,
        "num_texts": 12,
        "num_shown": 3,
        "batch_size": 4,
        "num_inference_steps": 2,
        "guidance_scale": None,
        "seed": 3,
        "num_frechet": 0,
    }
    assert (scores["num_pictures"], scores["num_texts"]) == (7, 12)
    assert not any("frechet" in name for name in scores)
    assert scores["chance"] == 5 / len(load_emoji("train"))
    assert 0 <= scores["drawn_nearest"] <= scores["drawn_in_nearest_5"] <= 1
    assert scores["captions_with_name"] == 0
    # An untrained model is as good as a uniform one; the trigrams of the training definitions know more.
    vocabulary = make_pipeline().model.config.vocab_size
    assert scores["perplexity"] == pytest.approx(vocabulary, rel=0.2)
    assert scores["trigram_perplexity"] < vocabulary / 5
    pipeline = make_pipeline(default_image_grid=(2, 3))
    few = text_perplexity(pipeline.model, pipeline.processor, load_glosses("held_out")[:12])
    assert scores["perplexity"] == pytest.approx(few)


def test_the_table_holds_every_score_with_what_stands_beside_it(report: tuple[Path, dict]) -> None:
    folder, scores = report
    header, line, *rows = (folder / "evaluation.md").read_text().splitlines()
    assert header == "| score | value | beside it | measured on |"
    percent, nearest = (f"{100 * scores[name]:.1f} %" for name in ("drawn_in_nearest_5", "drawn_nearest"))
    assert rows == [
        f"| drawings with their picture among the 5 nearest | {percent} | chance 0.35 % | 7 drawings |",
        f"| drawings whose nearest picture is theirs | {nearest} | chance 0.07 % | 7 drawings |",
        "| captions with the right name | 0.0 % | another's name 0.0 % | 7 pictures |",
        f"| perplexity of held-out definitions | {scores['perplexity']:.1f} | trigrams "
        f"{scores['trigram_perplexity']:.1f} | 12 definitions |",
    ]


def test_chance_of_a_name_is_counted_over_all_pairs_with_another() -> None:
    captions, names = ["a red heart", "a heart and a star", "nothing", "a star"], ["red heart", "star", "heart", "sun"]
    right = [[name in caption for name in names] for caption in captions]
    others = [right[i][j] for i in range(4) for j in range(4) if i != j]
    assert name_scores(captions, names) == {
        "captions_with_name": 0.5,
        "captions_with_another_name": pytest.approx(sum(others) / 12),
    }
    assert sum(others) == 3


def test_the_page_lists_the_pictures_of_both_splits_with_their_names(report: tuple[Path, dict]) -> None:
    folder, _ = report
    header, line, *rows = (folder / "captions.md").read_text().splitlines()
    assert header == "| picture | split | name | the model's caption |"
    pictures = {picture.name: picture for picture in load_emoji("all")}
    cells = [[cell.strip() for cell in row.split(" | ")] for row in rows]
    assert [cell[1] for cell in cells] == ["train"] * 3 + ["held_out"] * 3
    for image, split, name, *_ in cells:
        assert pictures[name].split == split
        path = folder / image[image.index("(") + 1 : -1]
        with Image.open(path) as saved:
            assert np.array_equal(np.asarray(saved), np.asarray(pictures[name].image))
    assert len(list((folder / "captions").iterdir())) == 6


def test_the_sheet_holds_both_splits(report: tuple[Path, dict]) -> None:
    """Two lines of three rows of drawing, nearest and true picture."""
    folder, _ = report
    with Image.open(folder / "samples.png") as page:
        assert page.size == (3 * (150 + 3 * 70 + 14), 2 * 70 + 22)
        true = np.asarray(page.crop((150 + 140, 22, 150 + 140 + 64, 22 + 64)))
    first = re.findall(r"!\[(.*?)\]", (folder / "captions.md").read_text())[0]
    [picture] = [picture for picture in load_emoji("train") if picture.name == first]
    assert np.array_equal(true, np.asarray(picture.image.resize((24, 16)).resize((64, 64))))


def test_batches_change_neither_drawings_nor_captions() -> None:
    pipeline = make_pipeline()
    captions = ["a red heart", "a sky", "a heart"]
    pictures = [picture.image for picture in load_emoji("train")[:3]]
    few, all_at_once = (EvaluationSettings(batch_size=size, num_inference_steps=2) for size in (2, 3))
    for one, other in zip(draw(pipeline, captions, few), draw(pipeline, captions, all_at_once), strict=True):
        np.testing.assert_allclose(np.asarray(one, dtype=float), np.asarray(other, dtype=float), atol=1)
    expected = pipeline(captions, num_inference_steps=2, generator=seeded(0, 1, 2)).images
    assert [one.tobytes() for one in draw(pipeline, captions, all_at_once)] == [one.tobytes() for one in expected]
    assert write_captions(pipeline, pictures, few) == write_captions(pipeline, pictures, all_at_once)


class Oracle:
    """A pipeline that draws the true picture of each caption, and names each picture."""

    def __init__(self) -> None:
        pipeline = make_pipeline()
        self.model, self.processor = pipeline.model, pipeline.processor
        self.by_caption = {picture.captions[0]: picture for picture in load_emoji("all")}
        self.by_pixels = {picture.image.tobytes(): picture for picture in load_emoji("all")}

    def __call__(self, prompts: list[str], **kwargs: Any) -> TransfusionPipelineOutput:
        return TransfusionPipelineOutput([self.by_caption[one].image.resize((16, 16)) for one in prompts])

    def caption(self, pictures: list[Image.Image], **kwargs: Any) -> TransfusionCaptionOutput:
        return TransfusionCaptionOutput([f"this is {self.by_pixels[one.tobytes()].name}!" for one in pictures])


def test_a_pipeline_that_is_always_right_scores_full_marks(tmp_path: Path) -> None:
    """Its Frechet distance, too: 50 drawings, 7 of them made for the other scores, and 50 pictures not drawn."""
    scores = evaluate_demo(Oracle(), tmp_path, replace(SETTINGS, num_frechet=50))
    assert scores[FRECHET] == pytest.approx(scores[f"{FRECHET}_floor"], rel=1e-6)
    assert scores["frechet_num_pictures"] == 50
    value = f"{scores[FRECHET]:.1f}"
    expected = f"| Frechet distance (EfficientNet-Lite0) | {value} | floor (real pictures) {value} | 50 drawings |"
    assert (tmp_path / "evaluation.md").read_text().splitlines()[-1] == expected
    assert scores["drawn_nearest"] == scores["drawn_in_nearest_5"] == scores["captions_with_name"] == 1
    for row in (tmp_path / "captions.md").read_text().splitlines()[2:]:
        _, _, name, said = row.strip("| ").split(" | ")
        assert said == f"this is {name}!"


def test_the_halves_share_no_picture_and_the_first_begins_with_what_was_drawn() -> None:
    chosen = [5, 3, 90]
    own, others = two_halves(chosen, 100, 50, seed=1)
    assert own[:3] == chosen
    assert sorted(own + others) == list(range(100))
    own, others = two_halves(chosen, 100, 2, seed=1)
    assert own == [5, 3]
    assert len(set(own + others)) == 4
    assert two_halves(chosen, 100, 50, seed=1) != two_halves(chosen, 100, 50, seed=2)


@pytest.mark.parametrize("count", [1, 49])
def test_refuses_few_drawings_for_a_frechet_distance(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_frechet={count}; .* at least 50"):
        EvaluationSettings(num_frechet=count)


def test_refuses_more_drawings_than_half_of_the_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_frechet=711; at most half of the 1420"):
        evaluate_demo(Oracle(), tmp_path, replace(SETTINGS, num_frechet=711))


def test_the_command_takes_every_setting_and_prints_the_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(load_glosses("held_out")) > 1000
    make_pipeline().save_pretrained(tmp_path)
    assert parse_args(["folder"]).num_frechet == 300
    options = [
        "--num_frechet",
        "0",
        "--num_pictures",
        "2",
        "--num_texts",
        "2",
        "--num_shown",
        "1",
        "--num_inference_steps",
        "1",
    ]
    main(parse_args([str(tmp_path), "--guidance_scale", "1.0", "--out", str(tmp_path / "out"), *options]))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (printed["settings"]["num_texts"], printed["settings"]["guidance_scale"]) == (2, 1.0)
    assert math.isfinite(printed["perplexity"])
