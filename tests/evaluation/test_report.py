import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.evaluate import main, parse_args
from tests.test_pipeline import make_pipeline, seeded
from transfusion.data import load_emoji, load_glosses
from transfusion.evaluation.report import EvaluationSettings, caption_page, draw, evaluate_demo, sheet, write_captions
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
    }
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


def test_the_sheet_puts_each_picture_under_its_heading() -> None:
    colours = ["red", "green", "blue", "black"]
    squares = [Image.new("RGB", (8, 8), colour) for colour in colours]
    page = sheet([("one", squares[:2]), ("two", squares[2:])], ["a", "b"], columns=1)
    centres = [(150 + 32, 22 + 32), (150 + 70 + 32, 22 + 32), (150 + 32, 92 + 32), (150 + 70 + 32, 92 + 32)]
    assert [page.getpixel(centre) for centre in centres] == [square.getpixel((0, 0)) for square in squares]
    has_text = np.asarray(page.crop((0, 22, 150, 92))).min() < 128
    assert has_text


def test_captions_cannot_break_the_table(tmp_path: Path) -> None:
    [picture] = load_emoji("train")[:1]
    page = caption_page([picture], ["a | b\nc"], tmp_path / "pictures")
    assert page.splitlines()[-1].endswith(f"| train | {picture.name} | a \\| b c |")


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
    scores = evaluate_demo(Oracle(), tmp_path, SETTINGS)
    assert scores["drawn_nearest"] == scores["drawn_in_nearest_5"] == scores["captions_with_name"] == 1
    for row in (tmp_path / "captions.md").read_text().splitlines()[2:]:
        _, _, name, said = row.strip("| ").split(" | ")
        assert said == f"this is {name}!"


def test_the_command_takes_every_setting_and_prints_the_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(load_glosses("held_out")) > 1000
    make_pipeline().save_pretrained(tmp_path)
    options = ["--num_pictures", "2", "--num_texts", "2", "--num_shown", "1", "--num_inference_steps", "1"]
    main(parse_args([str(tmp_path), "--guidance_scale", "1.0", "--out", str(tmp_path / "out"), *options]))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (printed["settings"]["num_texts"], printed["settings"]["guidance_scale"]) == (2, 1.0)
    assert math.isfinite(printed["perplexity"])
