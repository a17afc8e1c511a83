from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.pipelines import any_to_any
from transformers.utils.import_utils import is_torchvision_available

from tests.test_pipeline import chatty_pipeline, make_pipeline, seeded
from tests.tiny import force
from tests.tiny_processor import picture
from transfusion import TransfusionPipeline


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that answers with "a", a picture and "b", with a scheduler of its own."""
    folder = tmp_path_factory.mktemp("model")
    drawer = chatty_pipeline()
    drawer.scheduler = FlowMatchHeunDiscreteScheduler(shift=2.0)
    drawer.save_pretrained(folder)
    return str(folder)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, int)


def test_text_to_image_draws_what_the_diffusers_pipeline_draws(path: str) -> None:
    task = pipeline("text-to-image", model=path, num_inference_steps=2)
    drawer = TransfusionPipeline.from_pretrained(path)
    drawer.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": 2.0, "negative_prompt": "a sky", "height": 16, "width": 32}
    expected = drawer("a heart", num_inference_steps=2, generator=seeded(0)[0], **arguments).images[0]
    image = task("a heart", generator=seeded(0)[0], **arguments)
    assert image.size == (32, 16) and np.array_equal(pixels(image), pixels(expected))
    torch.manual_seed(0)
    first = task("a heart")
    torch.manual_seed(0)
    assert np.array_equal(pixels(task("a heart")), pixels(first))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_to_image_takes_lists_batches_and_several_images_each(path: str, batch_size: int) -> None:
    task = pipeline("text-to-image", model=path, num_inference_steps=1)
    images = task(["a heart", "a sky", "a red heart"], batch_size=batch_size)
    assert [image.size for image in images] == [(16, 16)] * 3
    pairs = task(["a heart", "a sky", "a red heart"], batch_size=batch_size, num_images_per_prompt=2)
    assert [len(pair) for pair in pairs] == [2] * 3
    assert len(task("a heart", num_images_per_prompt=2)) == 2
    streamed = task((prompt for prompt in ("a heart", "a sky")), batch_size=batch_size)
    assert [image.size for image in streamed] == [(16, 16)] * 2


def test_text_to_image_refuses_what_it_does_not_know(path: str) -> None:
    task = pipeline("text-to-image", model=path)
    with pytest.raises(ValueError, match=r"does not take \['eta'\]; allowed: generator"):
        task("a heart", eta=0.0)
    with pytest.raises(ValueError, match="A prompt is 3"):
        task(3)
    with pytest.raises(ValueError, match=r"inputs=\[\]; give one"):
        task([])


def test_text_to_image_edits_and_gives_arrays(path: str) -> None:
    task = pipeline("text-to-image", model=path, num_inference_steps=1)
    edited = task(["redder", "bluer"], image=picture(0, 16, 16), output_type="np", batch_size=2)
    assert [array.shape for array in edited] == [(16, 16, 3)] * 2


def test_tasks_save_model_and_processor_without_code(path: str, tmp_path: Path) -> None:
    pipeline("text-to-image", model=path).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and (tmp_path / "vae").is_dir()
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    assert pipeline("text-to-image", model=str(tmp_path))("a heart", num_inference_steps=1).size == (16, 16)


@pytest.mark.parametrize("name", ["text-to-image", "interleaved-generation"])
def test_tasks_save_the_scheduler_too(name: str, path: str, tmp_path: Path) -> None:
    pipeline(name, model=path).save_pretrained(tmp_path)
    saved = DiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert type(saved) is FlowMatchHeunDiscreteScheduler and saved.config.shift == 2.0


def test_interleaved_generation_draws_with_the_saved_scheduler(path: str) -> None:
    task = pipeline("interleaved-generation", model=path, do_sample=False, num_inference_steps=2)
    chat = [{"role": "user", "content": "a heart"}]
    _, drawing, _ = task(chat, generator=seeded(0)[0])
    drawer = TransfusionPipeline.from_pretrained(path)
    options = {"do_sample": False, "num_inference_steps": 2}
    expected = drawer.chat(chat, generator=seeded(0)[0], **options).images[0]
    assert np.array_equal(pixels(drawing), pixels(expected))
    _, other, _ = task(chat, generator=seeded(0)[0], scheduler=FlowMatchHeunDiscreteScheduler(shift=9.0))
    assert not np.array_equal(pixels(drawing), pixels(other))


def test_interleaved_generation_batches_what_has_pictures_with_what_has_none(path: str) -> None:
    task = pipeline("interleaved-generation", model=path, do_sample=False, num_inference_steps=1)
    one, wide = picture(0, 16, 16), picture(1, 16, 32)
    inputs = ["\n", {"text": "<image>of\n", "images": [one]}, {"text": "<image>or<image>of\n", "images": [one, wide]}]
    for parts in task(inputs, batch_size=3):
        check_parts(parts)


def test_tasks_take_model_and_processor_too() -> None:
    drawer = make_pipeline()
    task = pipeline("text-to-image", model=drawer.model, processor=drawer.processor)
    image = task("a heart", num_inference_steps=2, generator=seeded(0)[0])
    expected = drawer("a heart", num_inference_steps=2, generator=seeded(0)[0]).images[0]
    assert np.array_equal(pixels(image), pixels(expected))


def check_parts(parts: list[Any]) -> None:
    first, drawing, last = parts
    assert (first, last) == ("a", "b") and drawing.size == (16, 16)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_interleaved_generation_writes_and_draws(path: str, batch_size: int) -> None:
    task = pipeline("interleaved-generation", model=path, do_sample=False, num_inference_steps=1)
    prompts = ["\n", "some words\n", "other\n"]
    check_parts(task("\n"))
    for parts in task(prompts, batch_size=batch_size):
        check_parts(parts)
    pictures = {"text": "<image>of\n", "images": [picture(0, 16, 16)]}
    check_parts(task(pictures))
    chat = [{"role": "user", "content": [{"type": "image", "image": picture(0, 16, 16)}]}]
    check_parts(task(chat))
    for parts in task([chat, chat], batch_size=batch_size):
        check_parts(parts)
    with pytest.raises(ValueError, match="The input is {'prompt': 'a'}"):
        task({"prompt": "a"})


def writing_pipeline(path: Path) -> str:
    """A checkpoint that answers with "a b"."""
    drawer = make_pipeline()
    tokenizer = drawer.processor.tokenizer
    newline, a, b = (tokenizer(text)["input_ids"][0] for text in ("\n", "a", "b"))
    force(drawer.model, {newline: a, a: b, drawer.processor.eoi_token_id: b, b: tokenizer.eos_token_id})
    drawer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_image_text_to_text_chats_with_pictures_without_torchvision(tmp_path: Path, batch_size: int) -> None:
    assert not is_torchvision_available()
    task = pipeline("image-text-to-text", model=writing_pipeline(tmp_path))
    arguments = {"max_new_tokens": 4, "return_full_text": False}
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture(0, 16, 16)}, {"type": "text", "text": text}]}]
        for text in ("what?", "and what is this here?")
    ]
    assert task(text=chats[0], **arguments)[0]["generated_text"] == "ab"
    answers = task(text=chats, batch_size=batch_size, **arguments)
    assert [answer[0]["generated_text"] for answer in answers] == ["ab", "ab"]
    described = task(images=picture(0, 16, 16), text="<image>", **arguments)
    assert described[0]["generated_text"].strip() == "b"


def test_any_to_any_needs_torchvision_and_then_does_all(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match="AnyToAnyPipeline requires the Torchvision library"):
        pipeline("any-to-any", model=path)
    monkeypatch.setattr(any_to_any, "requires_backends", lambda task, backends: None)
    task = pipeline("any-to-any", model=path, processor=AutoProcessor.from_pretrained(path))
    assert set(task.model.output_modalities) == {"image", "text"} == set(task.model.input_modalities)
    arguments = {"max_new_tokens": 2, "generation_mode": "text", "return_full_text": False}
    text = task(text="\n", **arguments)
    assert text[0]["generated_text"].startswith("a")
    drawn = task(text="a heart", generation_mode="image", generate_kwargs={"num_inference_steps": 1})
    assert drawn[0]["generated_image"].size == (16, 16)
    pair = task(text=["a heart", "a sky"], generation_mode="image", generate_kwargs={"num_inference_steps": 1})
    assert len(pair) == 2
    chat = [{"role": "user", "content": [{"type": "image", "image": picture(0, 16, 16)}]}]
    assert task(text=chat, **arguments)[0]["generated_text"].startswith("a")
