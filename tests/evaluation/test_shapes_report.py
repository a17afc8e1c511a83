import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scripts.evaluate import main, parse_args
from tests.test_pipeline import make_pipeline
from tests.tiny_processor import tiny_tokenizer
from transfusion.data import load_tokenizer, shapes_world
from transfusion.data.shapes import parse_caption
from transfusion.evaluation.frechet import FRECHET
from transfusion.evaluation.report import EvaluationSettings
from transfusion.evaluation.shapes import chance
from transfusion.evaluation.shapes_report import evaluate_shapes, longest_caption, reads_definitions
from transfusion.pipeline import TransfusionCaptionOutput, TransfusionPipelineOutput


SETTINGS = EvaluationSettings(num_pictures=6, num_texts=5, num_shown=2, batch_size=4, num_inference_steps=1, seed=3)
NAMES = ("count", "colour", "shape", "position", "all", "cells")


class Oracle:
    """A pipeline that draws and names the held-out scenes of seed 3."""

    def __init__(self, default_image_grid: tuple[int, int] = (8, 8)) -> None:
        pipeline = make_pipeline(default_image_grid=default_image_grid)
        self.model, self.processor = pipeline.model, pipeline.processor
        pictures = shapes_world(60, 3, "held_out")
        self.by_caption: dict[str, list[Image.Image]] = {}
        for picture in pictures:  # a scene can come twice, each time at other offsets
            self.by_caption.setdefault(picture.captions[0], []).append(picture.image)
        self.by_pixels = {picture.image.tobytes(): picture.captions[0] for picture in pictures}

    def __call__(self, prompts: list[str], **kwargs: Any) -> TransfusionPipelineOutput:
        return TransfusionPipelineOutput([self.by_caption[prompt].pop(0) for prompt in prompts])

    def caption(self, pictures: list[Image.Image], **kwargs: Any) -> TransfusionCaptionOutput:
        return TransfusionCaptionOutput([self.by_pixels[picture.tobytes()] for picture in pictures])


def test_a_pipeline_that_is_always_right_scores_full_marks(tmp_path: Path) -> None:
    """Six drawings are asked for, but the Frechet distance asks for more, and then all of them are read."""
    scores = evaluate_shapes(Oracle(), tmp_path, replace(SETTINGS, num_frechet=52))
    assert json.loads((tmp_path / "evaluation.json").read_text()) == scores
    scenes = [parse_caption(picture.captions[0]) for picture in shapes_world(52, 3, "held_out")]
    expected = chance(scenes)
    for name in NAMES:
        assert scores[f"drawn_{name}"] == scores[f"captioned_{name}"] == 1
        assert scores[f"chance_{name}"] == expected[name]
    assert (scores["num_drawings"], scores["num_pictures"], scores["num_texts"]) == (52, 6, 5)
    assert scores[FRECHET] == pytest.approx(scores[f"{FRECHET}_floor"], rel=1e-6)
    assert scores[FRECHET] > 1
    assert scores["frechet_num_pictures"] == 52
    rows = (tmp_path / "evaluation.md").read_text().splitlines()[2:]
    percent = f"{100 * expected['cells']:.1f} %"
    assert rows[5] == f"| drawings: cells that are right | 100.0 % | chance {percent} | 52 drawings |"
    assert rows[11] == f"| captions: cells that are right | 100.0 % | chance {percent} | 6 captions |"
    assert [row.split(" | ")[0] for row in rows[12:]] == [
        "| perplexity of held-out definitions",
        "| Frechet distance (EfficientNet-Lite0)",
    ]
    pages = (tmp_path / "captions.md").read_text().splitlines()[2:]
    assert len(pages) == 4
    for row in pages:
        _, split, name, said = row.strip("| ").split(" | ")
        assert (split, name) == ("held_out", said)
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.size == (3 * (150 + 2 * 70 + 14), 2 * 70 + 22)


def test_an_untrained_model_knows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command."""
    make_pipeline(default_image_grid=(2, 3)).save_pretrained(tmp_path)
    options = ["--data", "shapes", "--num_frechet", "0", "--num_pictures", "3", "--num_texts", "3", "--num_shown", "1"]
    main(parse_args([str(tmp_path), *options, "--num_inference_steps", "1", "--out", str(tmp_path / "report")]))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert printed["drawn_all"] == printed["captioned_all"] == 0
    assert printed["perplexity"] > printed["trigram_perplexity"]


def test_captions_may_be_as_long_as_the_longest_true_one_and_its_end() -> None:
    pictures = shapes_world(20, 3, "held_out")
    pipeline = make_pipeline()
    lengths = [len(pipeline.processor.tokenizer(picture.captions[0])["input_ids"]) for picture in pictures]
    assert longest_caption(pipeline, pictures) == 1 + max(lengths)


def test_a_tokenizer_that_lacks_words_does_not_read_definitions() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "red": 2, "circle": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert not reads_definitions(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))
    assert reads_definitions(tiny_tokenizer())
    assert reads_definitions(load_tokenizer())
