import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from PIL import Image
from transformers import AutoModel, AutoProcessor

from scripts.generate import main, parse_args
from tests.tiny import force, tiny_config
from tests.tiny_processor import CHAT_TEMPLATE, picture, text_ids, tiny_tokenizer, tiny_vae
from transfusion import TransfusionPipeline
from transfusion.image_processing import TransfusionImageProcessor
from transfusion.latents import patchify, unpatchify
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration
from transfusion.pipeline import TransfusionPipeline as FromModule
from transfusion.pipeline import read_scheduler, save_pipeline_parts
from transfusion.processing import TransfusionProcessor


def make_pipeline(
    objective: str = "flow", size: int | None = 16, sizes: Any = None, with_vae: bool = True, **overrides: Any
) -> Any:
    """Pictures of 16 x 16 pixels, latents of 4 x 4 and 4 channels, 2 x 2 patches; size tokens for `sizes`."""
    image_processor = TransfusionImageProcessor(size=size)
    vae = tiny_vae() if with_vae else None
    processor = TransfusionProcessor(image_processor, tiny_tokenizer(), vae, CHAT_TEMPLATE, size_token_grids=sizes)
    torch.manual_seed(0)
    config = tiny_config(
        objective=objective,
        vocab_size=len(processor.tokenizer),
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        image_token_id=processor.image_token_id,
        size_token_grids=processor.size_token_grids,
        size_token_ids=processor.size_token_ids,
        eos_token_id=processor.tokenizer.eos_token_id,
        latent_channels=processor.latent_channels,
        bos_token_id=None,
        **{"default_image_grid": (2, 2), **overrides},
    )
    pipeline = TransfusionPipeline(TransfusionForMultimodalGeneration(config).eval(), processor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_package_exports_it() -> None:
    assert TransfusionPipeline is FromModule


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_draws_what_generate_images_draws(objective: str) -> None:
    pipeline = make_pipeline(objective)
    image = pipeline("a red heart", num_inference_steps=4, guidance_scale=2.0, generator=seeded(3)[0]).images[0]
    inputs = pipeline.processor(text="a red heart", return_tensors="pt")
    drawn = pipeline.model.generate_images(
        **inputs, image_grids=(2, 2), num_inference_steps=4, guidance_scale=2.0, generator=seeded(3)[0]
    )
    expected = pipeline.processor.decode_images(drawn.latent_patches, drawn.image_grids)[0]
    assert image.size == (16, 16)
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_pictures_of_a_batch_are_those_of_single_calls_in_order() -> None:
    pipeline = make_pipeline()
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    together = pipeline(
        ["a red heart", "a sky"], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), **arguments
    ).images
    prompts = ["a red heart", "a red heart", "a sky", "a sky"]
    for index, prompt in enumerate(prompts):
        alone = pipeline(prompt, generator=seeded(index)[0], **arguments).images
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_output_types_show_the_same_picture() -> None:
    pipeline = make_pipeline()
    outputs = {
        kind: pipeline("a heart", num_inference_steps=2, generator=seeded(0)[0], output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    pixels = np.asarray(outputs["pil"][0]) / 255
    np.testing.assert_allclose(outputs["np"][0], pixels, atol=1e-6)
    np.testing.assert_allclose(outputs["pt"][0].permute(1, 2, 0).numpy(), pixels, atol=1e-6)
    assert outputs["latent"].shape == (1, 4, 4, 4)


def test_latents_start_the_drawing_and_callbacks_replace_them() -> None:
    pipeline = make_pipeline()
    start = torch.randn(1, 4, 8, 4, generator=seeded(0)[0])
    seen = []

    def keep(pipe: TransfusionPipeline, step: int, timestep: torch.Tensor, kwargs: dict) -> dict:
        seen.append((pipe is pipeline, step, tuple(kwargs["latents"].shape)))
        return {"latents": start}

    arguments = {"height": 32, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    drawn = pipeline("a heart", latents=start, callback_on_step_end=keep, **arguments).images
    assert seen == [(True, 0, (1, 4, 8, 4)), (True, 1, (1, 4, 8, 4))]
    torch.testing.assert_close(drawn, start)
    free = pipeline("a heart", latents=start, **arguments).images
    patches = pipeline.model.generate_images(
        **pipeline.processor(text="a heart", return_tensors="pt"),
        image_grids=(4, 2),
        num_inference_steps=2,
        latents=patchify(start[0], 2),
    ).latent_patches
    torch.testing.assert_close(free[0], unpatchify(patches, (4, 2), 2))


def test_sizes_and_the_scheduler_default_to_the_models() -> None:
    pipeline = make_pipeline(default_image_grid=(2, 3), timestep_shift=2.0, num_train_timesteps=500)
    assert pipeline.grid_of(None, None) == (2, 3)
    assert pipeline.grid_of(32, None) == (4, 3)
    assert pipeline("a heart", num_inference_steps=1).images[0].size == (24, 16)
    assert (pipeline.scheduler.config.shift, pipeline.scheduler.config.num_train_timesteps) == (2.0, 500)
    pipeline.scheduler = DDIMScheduler()  # a call draws with the pipeline's scheduler, and so refuses this one
    with pytest.raises(ValueError, match="DDIMScheduler"):
        pipeline("a heart", num_inference_steps=1)


def test_prompts_cannot_inject_control_tokens_and_may_be_empty() -> None:
    pipeline = make_pipeline()
    processor = pipeline.processor
    ids = pipeline.encode_prompt(["<boi> <image> <eoi> <eos>", "", "  a heart  "])
    control = torch.tensor([processor.boi_token_id, processor.eoi_token_id, processor.image_token_id])
    assert torch.isin(ids["input_ids"], control).sum(1).tolist() == [1, 1, 1]  # the begin of the drawing alone
    assert ids["attention_mask"].sum(1)[1] == 1
    stripped = ids["input_ids"][2][ids["attention_mask"][2].bool()]
    assert stripped.tolist() == pipeline.encode_prompt("a heart")["input_ids"][0].tolist()


def test_negative_prompts_guide_away() -> None:
    pipeline = make_pipeline()
    arguments = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    plain = pipeline("a heart", generator=seeded(0)[0], **arguments).images
    away = pipeline("a heart", negative_prompt="a sky", generator=seeded(0)[0], **arguments).images
    assert not torch.allclose(plain, away)
    each = {"num_images_per_prompt": 2, "generator": seeded(0, 1, 2, 3), **arguments}
    together = pipeline(["a heart", "a red heart"], negative_prompt=["a sky", "blue"], **each).images
    shared = pipeline(["a heart", "a red heart"], negative_prompt="a sky", **each | {"generator": seeded(0, 1, 2, 3)})
    for index, (prompt, negative) in enumerate([("a heart", "a sky")] * 2 + [("a red heart", "blue")] * 2):
        alone = pipeline(prompt, negative_prompt=negative, generator=seeded(index)[0], **arguments).images
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)
        is_shared = torch.allclose(shared.images[index : index + 1], alone, atol=1e-4, rtol=1e-4)
        assert is_shared == (negative == "a sky")


@pytest.mark.parametrize("sizes", [None, [(2, 2), (2, 4)]])
def test_an_edit_draws_after_the_picture_and_the_instruction(sizes: list | None) -> None:
    """Against ids put together by hand: the picture's block, the text, begin-of-image."""
    pipeline = make_pipeline(size=None, sizes=sizes)
    processor, source = pipeline.processor, picture(0, 16, 32)
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    edited = pipeline("make it blue ", image=source, generator=seeded(0), output_type="latent", **settings).images
    begin = processor.boi_token_id if sizes is None else processor.size_token_ids[1]
    latent = processor.encode_images(processor.image_processor(source)["pixel_values"])[0]
    block = [begin, *[processor.image_token_id] * 8, processor.eoi_token_id]
    drawn = pipeline.model.generate_images(
        torch.tensor([[*block, *text_ids("make it blue"), begin]]),
        image_grids=torch.tensor([[2, 4]]),
        latent_patches=patchify(latent, 2),
        output_image_grids=(2, 4),  # the size of the source
        generator=seeded(0),
        **settings,
    )
    torch.testing.assert_close(edited[0], unpatchify(drawn.latent_patches, (2, 4), 2))
    assert pipeline("make it blue", image=source, num_inference_steps=1).images[0].size == (32, 16)
    assert pipeline("make it blue", image=source, width=16, num_inference_steps=1).images[0].size == (16, 16)
    other = pipeline("make it blue", image=picture(1, 16, 32), generator=seeded(0), output_type="latent")
    assert not torch.allclose(other.images, edited)


def test_edits_of_a_batch_are_those_of_single_calls() -> None:
    pipeline = make_pipeline(size=None)
    pictures, prompts = [picture(0, 16, 16), picture(1, 16, 16)], ["make it red", "turn it around, please"]
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    for negative in (None, "an ugly heart"):
        settings["negative_prompt"] = negative
        several = {"num_images_per_prompt": 2, "generator": seeded(0, 1, 2, 3)}
        together = pipeline(prompts, image=pictures, **several, **settings).images
        for row, (prompt, source) in enumerate([pair for pair in zip(prompts, pictures, strict=True) for _ in "12"]):
            alone = pipeline(prompt, image=source, generator=seeded(row), **settings).images
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    one = pipeline(prompts, image=pictures[0], generator=seeded(0, 1), **settings).images
    twice = pipeline(prompts, image=pictures[:1] * 2, generator=seeded(0, 1), **settings).images
    torch.testing.assert_close(one, twice, atol=1e-4, rtol=1e-4)


def test_a_negative_prompt_of_an_edit_sees_the_picture() -> None:
    """Equal prompts leave no guidance, which they would not if one of them had no picture before it."""
    pipeline = make_pipeline()
    settings = {"image": picture(0, 16, 16), "num_inference_steps": 2, "output_type": "latent"}
    alike = pipeline("a", negative_prompt="a", guidance_scale=5.0, generator=seeded(0), **settings).images
    torch.testing.assert_close(
        alike, pipeline("a", guidance_scale=1.0, generator=seeded(0), **settings).images, atol=1e-4, rtol=1e-4
    )


def test_pictures_that_do_not_fit_the_prompts() -> None:
    pipeline = make_pipeline(size=None)
    with pytest.raises(ValueError, match="2 pictures and 3 prompts"):
        pipeline(["a", "b", "c"], image=[picture(0, 16, 16)] * 2)
    mixed = {"image": [picture(0, 16, 16), picture(1, 8, 16)], "num_inference_steps": 1}
    with pytest.raises(ValueError, match=r"latent sizes \[\(2, 4\), \(4, 4\)\]; name height and width"):
        pipeline(["a", "b"], **mixed)
    assert [image.size for image in pipeline(["a", "b"], height=8, width=8, **mixed).images] == [(8, 8)] * 2


def test_a_drawing_begins_with_the_token_of_its_size() -> None:
    pipeline = make_pipeline(sizes=[(2, 2), (4, 2)])
    first, second = pipeline.processor.size_token_ids
    for size, begin in (({}, first), ({"height": 32}, second), ({"width": 32}, pipeline.processor.boi_token_id)):
        arguments = {"num_inference_steps": 2, "generator": seeded(0), "output_type": "latent"}
        image = pipeline("a heart", **size, **arguments).images[0]
        grid = pipeline.grid_of(size.get("height"), size.get("width"))
        ids = torch.tensor([[*text_ids("a heart"), begin]])
        drawn = pipeline.model.generate_images(
            ids, image_grids=grid, num_inference_steps=2, generator=seeded(0), scheduler=pipeline.scheduler
        )
        torch.testing.assert_close(image, unpatchify(drawn.latent_patches, grid, 2))


def test_captions_one_picture_or_a_list() -> None:
    pipeline = make_pipeline()
    picture = Image.new("RGB", (16, 16), "red")
    one = pipeline.caption(picture, max_new_tokens=6, do_sample=False).text
    assert isinstance(one, str)
    other = Image.new("RGB", (16, 16), "blue")
    assert pipeline.caption([picture, other], max_new_tokens=6, do_sample=False).text[0] == one
    inputs = pipeline.processor(text="<image>", images=[picture], return_tensors="pt")
    ids = pipeline.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert one == pipeline.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_captions_hold_no_control_tokens_and_no_space_around() -> None:
    pipeline = make_pipeline()
    tokenizer, processor = pipeline.processor.tokenizer, pipeline.processor
    ids = tokenizer(" blue ")["input_ids"]
    assert len(set(ids)) == len(ids)
    chain = [processor.eoi_token_id, *ids[:-1], tokenizer("\t")["input_ids"][0], tokenizer.eos_token_id]
    force(pipeline.model, dict(zip(chain, chain[1:], strict=False)))
    assert pipeline.caption(Image.new("RGB", (16, 16), "red"), do_sample=False).text == "blue"


def test_several_captions_of_one_picture() -> None:
    picture = Image.new("RGB", (16, 16), "red")
    texts = make_pipeline().caption(picture, max_new_tokens=4, num_beams=2, num_return_sequences=2).text
    assert isinstance(texts, list) and len(texts) == 2


def test_moving_and_casting_take_the_vae_along() -> None:
    pipeline = make_pipeline()
    assert pipeline.to(torch.bfloat16) is pipeline
    assert pipeline.dtype == pipeline.model.dtype == pipeline.processor.vae.dtype == torch.bfloat16
    assert pipeline("a heart", num_inference_steps=2).images[0].size == (16, 16)
    pipeline.to("meta")
    assert pipeline.processor.vae.device.type == pipeline.model.device.type == "meta"


LOADERS = [TransfusionPipeline, DiffusionPipeline, AutoPipelineForText2Image]


def drawn(pipeline: Any, **arguments: Any) -> torch.Tensor:
    """The pixels of one picture of one seed."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "generator": seeded(0)[0], "output_type": "pt", **arguments}
    return pipeline("a heart", **settings).images


def test_a_checkpoint_is_one_folder_for_both_libraries(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    weights = {file for file in files if file.endswith((".safetensors", ".bin"))}
    assert weights == {"model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    assert {"model_index.json", "scheduler/scheduler_config.json", "config.json", "processor_config.json"} <= files
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"scheduler", "vae"}
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(drawn(TransfusionPipeline(model, processor)), drawn(pipeline))


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_give_the_saved_picture_and_take_components(loader: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=2.0)
    pipeline.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    assert type(again) is TransfusionPipeline and again.vae is again.processor.vae
    assert type(again.scheduler) is FlowMatchHeunDiscreteScheduler and again.scheduler.config.shift == 2.0
    assert torch.equal(drawn(again), drawn(pipeline))
    assert again.count_steps(3) == 5
    given = FlowMatchHeunDiscreteScheduler(shift=4.0)
    assert loader.from_pretrained(tmp_path, scheduler=given).scheduler.config.shift == 4.0
    assert loader.from_pretrained(tmp_path, vae=pipeline.vae).processor.vae is pipeline.vae
    cast = loader.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert cast.model.dtype == cast.vae.dtype == torch.bfloat16
    assert torch.equal(drawn(cast), drawn(loader.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)))


@pytest.mark.parametrize("loader", LOADERS)
def test_pipelines_without_a_vae_are_saved_and_loaded(loader: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline("ddpm", with_vae=False)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == [None, None]
    again = loader.from_pretrained(tmp_path)
    assert again.vae is None and torch.equal(drawn(again), drawn(pipeline))


def test_folders_of_model_and_processor_alone_are_loaded_and_can_be_completed(tmp_path: Path) -> None:
    pipeline = make_pipeline(timestep_shift=2.0)
    pipeline.model.save_pretrained(tmp_path)
    pipeline.processor.save_pretrained(tmp_path)
    for folder in ("scheduler", "model_index.json"):
        assert not (tmp_path / folder).exists()
    again = TransfusionPipeline.from_pretrained(tmp_path)
    assert again.scheduler.config.shift == 2.0 and torch.equal(drawn(again), drawn(pipeline))
    assert TransfusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    save_pipeline_parts(tmp_path, pipeline.model.config)
    assert torch.equal(drawn(DiffusionPipeline.from_pretrained(tmp_path)), drawn(pipeline))
    (tmp_path / "model_index.json").unlink()  # a folder that an earlier version saved
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    pipeline.scheduler.save_pretrained(tmp_path / "scheduler")
    assert torch.equal(drawn(TransfusionPipeline.from_pretrained(tmp_path)), drawn(pipeline))


def test_a_repository_without_an_index_is_taken_from_the_cache_of_the_hub(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    repository = tmp_path / "models--someone--hearts"
    pipeline.model.save_pretrained(repository / "snapshots" / "abc")
    pipeline.processor.save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    again = TransfusionPipeline.from_pretrained("someone/hearts", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(drawn(again), drawn(pipeline))


def test_weights_are_split_and_always_safetensors(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path, max_shard_size="50KB", safe_serialization=False)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not list(tmp_path.rglob("*.bin"))
    assert torch.equal(drawn(DiffusionPipeline.from_pretrained(tmp_path)), drawn(pipeline))
    with pytest.raises(ValueError, match="variant='fp16'"):
        pipeline.save_pretrained(tmp_path, variant="fp16")


DDPM_SCHEDULERS = (
    "DDPM DDIM DPMSolverMultistep DPMSolverSinglestep EulerDiscrete EulerAncestralDiscrete UniPCMultistep "
    "HeunDiscrete PNDM DEISMultistep KDPM2Discrete"
).split()
FLOW_SCHEDULERS = ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"]


@pytest.mark.parametrize("name", [*DDPM_SCHEDULERS, *FLOW_SCHEDULERS])
def test_every_scheduler_is_swapped_by_from_config_and_saved(name: str, tmp_path: Path) -> None:
    pipeline = make_pipeline("flow" if name.startswith("Flow") else "ddpm")
    scheduler_class = getattr(diffusers, f"{name}Scheduler")
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    expected = drawn(pipeline, num_inference_steps=5)
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is scheduler_class
    torch.testing.assert_close(drawn(again, num_inference_steps=5), expected)


def test_a_scheduler_of_another_objective_is_refused() -> None:
    pipeline = make_pipeline("flow")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler takes the prediction 'epsilon'"):
        drawn(pipeline)


def test_components_make_another_pipeline_and_the_vae_is_one() -> None:
    pipeline = make_pipeline()
    assert set(pipeline.components) == {"model", "processor", "scheduler", "vae"}
    for again in (TransfusionPipeline(**pipeline.components), AutoPipelineForText2Image.from_pipe(pipeline)):
        assert again.vae is pipeline.vae and torch.equal(drawn(again), drawn(pipeline))
    other = tiny_vae()
    pipeline.vae = other
    assert pipeline.processor.vae is pipeline.components["vae"] is other
    with pytest.raises(ValueError, match="The VAE's factor is 2 and the image processor's vae_scale_factor 4"):
        TransfusionPipeline(pipeline.model, pipeline.processor, vae=tiny_vae("AutoencoderTiny"))


def test_offloaded_components_are_brought_in_where_they_work() -> None:
    pipeline = make_pipeline()
    expected = drawn(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        hooks = list(pipeline._all_hooks)
        assert [hook.model for hook in hooks] == [pipeline.model, pipeline.vae]
        assert torch.equal(drawn(pipeline), expected)
        assert pipeline._all_hooks[0] is not hooks[0]  # set up anew, which takes all from the device
    pipeline.caption(picture(0, 16, 16), max_new_tokens=2)
    pipeline.remove_all_hooks()  # meta is no device to compute on, but one to see a move to
    pipeline._all_hooks = [cpu_offload_with_hook(part, "meta")[1] for part in (pipeline.model, pipeline.vae)]
    pipeline._onload(pipeline.model)
    assert (pipeline.model.device.type, pipeline.vae.device.type) == ("meta", "cpu")
    pipeline._onload(pipeline.vae)
    assert pipeline.vae.device.type == "meta"


def test_sequential_offload_keeps_the_vae_and_names_the_device_of_the_model() -> None:
    pipeline = make_pipeline()
    pipeline.enable_sequential_cpu_offload(device="cpu")
    assert pipeline.model.lm_head.weight.is_meta and not pipeline.vae.decoder.conv_out.weight.is_meta
    assert pipeline.model.device == pipeline.vae.device == torch.device("cpu")


def test_callbacks_get_what_they_ask_for_and_end_a_drawing() -> None:
    pipeline = make_pipeline()
    seen: list[Any] = []

    def stop(pipe: Any, step: int, timestep: torch.Tensor, kwargs: dict) -> dict:
        seen.append((step, list(kwargs), pipe.num_timesteps))
        pipe._interrupt = step == 1
        return kwargs

    arguments = {"num_inference_steps": 4, "callback_on_step_end": stop, "output_type": "latent"}
    ended = drawn(pipeline, callback_on_step_end_tensor_inputs=["latents"], **arguments)
    assert seen == [(0, ["latents"], 4), (1, ["latents"], 4)]
    steps: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: torch.Tensor, kwargs: dict) -> dict:
        steps.append(kwargs["latents"])
        return {}

    drawn(pipeline, **{**arguments, "callback_on_step_end": keep})
    assert len(steps) == 4 and torch.equal(ended, steps[1])
    seen.clear()
    drawn(pipeline, callback_on_step_end_tensor_inputs=[], **arguments)
    assert seen[0] == (0, [], 4)


def chatty_pipeline() -> Any:
    """A pipeline that answers, after a line break, "a", a picture, "b" and the end."""
    pipeline = make_pipeline()
    processor = pipeline.processor
    newline, a, b = (processor.tokenizer(text)["input_ids"][0] for text in ("\n", "a", "b"))
    chain = [newline, a, processor.boi_token_id]
    answers = dict(zip(chain, chain[1:], strict=False)) | {
        processor.eoi_token_id: b,
        b: processor.tokenizer.eos_token_id,
    }
    force(pipeline.model, answers)
    return pipeline


def test_chats_answer_with_text_and_pictures_in_order() -> None:
    pipeline = chatty_pipeline()
    image = picture(0, 16, 16)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "and now?"}]
    messages = [{"role": "user", "content": parts}]
    arguments = {"do_sample": False, "num_inference_steps": 2}
    answer = pipeline.chat(messages, generator=seeded(0)[0], **arguments)
    first, drawing, last = answer.parts
    assert (first, last, answer.text, answer.images) == ("a", "b", "ab", [drawing])
    assert drawing.size == (16, 16)
    assert answer.message["role"] == "assistant"
    assert answer.message["content"][1] == {"type": "image", "image": drawing}
    messages += [answer.message, {"role": "user", "content": "again"}]
    again = pipeline.chat([messages, messages[:1]], generator=seeded(1, 0), **arguments)
    assert [len(row) for row in again.images] == [1, 1] and again.text == ["ab", "ab"]
    np.testing.assert_allclose(np.asarray(again.images[1][0], int), np.asarray(drawing, int), atol=1)
    tall = pipeline.chat(messages, height=32, width=16, max_new_tokens=4, **arguments)
    assert tall.images[0].size == (16, 32)
    refused: list[Any] = [[], 5, "hello"]
    for wrong in refused:
        with pytest.raises(ValueError, match=rf"messages={re.escape(repr(wrong))}; give a list"):
            pipeline.chat(wrong)
    pipeline.scheduler = DDIMScheduler()  # draws with the pipeline's own scheduler, and so refuses this one
    with pytest.raises(ValueError, match="DDIMScheduler"):
        pipeline.chat(messages, **arguments)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt=[]"),
    ({"prompt": [1]}, "prompt=[1]"),
    ({"output_type": "jpeg"}, "'jpeg'; allowed: 'pil'"),
    ({"height": 20}, "multiples of 8; the nearest is"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "holds ['noise']; allowed: ['latents']"),
    ({"generator": [torch.Generator()] * 2}, "list of 2 for 1 images"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, "take (1, 4, 4, 4)"),
    ({"latents": torch.zeros(1, 4, 2, 8)}, "latents has shape (1, 4, 2, 8)"),
    ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ({"negative_prompt": ["a", "b"]}, "2 negative prompts"),
    ({"negative_prompt": 3}, "negative_prompt=3; give a string"),
    ({"height": "64"}, "height='64'; give a whole number of pixels"),
    ({"width": 64.0}, "width=64.0; give a whole number of pixels"),
    ({"height": True}, "height=True; give a whole number"),
    ({"height": 4096, "width": 4096}, "height=4096, width=4096 is too large"),
    ({"guidance_scale": "3"}, "guidance_scale='3'"),
    ({"num_inference_steps": True}, "num_inference_steps=True"),
    ({"num_images_per_prompt": True}, "num_images_per_prompt=True"),
    ({"generator": 42}, "generator=42; give a generator, torch.Generator().manual_seed(0)"),
    ({"generator": "seed"}, "generator='seed'; give a generator"),
    ({"latents": "noise"}, "latents is a str; give a tensor of the shape (1, 4, 4, 4)"),
    ({"callback_on_step_end": "stop"}, "callback_on_step_end='stop'; give a function"),
    ({"callback_on_step_end": lambda *_: None}, "callback_on_step_end returned None; return its last argument"),
    ({"callback_on_step_end_tensor_inputs": None}, "tensor_inputs=None; give a list of ['latents']"),
    ({"callback_on_step_end_tensor_inputs": "latents"}, "tensor_inputs='latents'; give a list of ['latents']"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[next(iter(a)) for a, _ in REFUSED])
def test_refuses_bad_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        make_pipeline()(**{"prompt": "a heart", "num_inference_steps": 1, **arguments})
    assert words in str(error.value)


@pytest.mark.parametrize("path", [None, 5])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match=f"path={path}; give the folder of a checkpoint"):
        TransfusionPipeline.from_pretrained(path)


@pytest.mark.parametrize("scheduler", ["euler", FlowMatchHeunDiscreteScheduler, None])
def test_what_is_no_scheduler_is_refused(scheduler: Any) -> None:
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match="scheduler=.* give one of diffusers"):
        pipeline.scheduler = scheduler


def test_captions_and_chats_of_nothing_are_refused() -> None:
    pipeline = make_pipeline()
    for image in (None, [], [None]):
        with pytest.raises(ValueError, match="image=.* give a picture"):
            pipeline.caption(image)
    for messages in ("hi", {"role": "user", "content": "hi"}):
        with pytest.raises(ValueError, match="messages=.* give a list of at least one message"):
            pipeline.chat(messages)


def test_the_scheduler_of_a_checkpoint_is_of_its_revision(tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path / "saved")
    first = tmp_path / "models--user--name" / "snapshots" / ("0" * 40)
    shutil.copytree(tmp_path / "saved", first)
    assert read_scheduler("user/name", cache_dir=tmp_path, revision="0" * 40) is not None
    with pytest.raises(OSError):  # offline, nobody knows whether there is one
        read_scheduler("user/name", cache_dir=tmp_path, revision="1" * 40)
    missing = tmp_path / "models--user--name" / ".no_exist" / ("1" * 40) / "scheduler" / "scheduler_config.json"
    missing.parent.mkdir(parents=True)
    missing.touch()
    assert read_scheduler("user/name", cache_dir=tmp_path, revision="1" * 40) is None
    (tmp_path / "empty").mkdir()
    assert read_scheduler(tmp_path / "empty") is None


def test_the_command_draws_captions_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    make_pipeline().save_pretrained(model)

    def run(*options: str) -> list[str]:
        main(parse_args([str(model), *options]))
        return capsys.readouterr().out.splitlines()

    names = ["000-a-red-heart.png", "001-a-red-heart.png", "002-sky.png", "003-sky.png"]
    options = ["--num_inference_steps", "1", "--num_images_per_prompt", "2", "--out", str(tmp_path / "out")]
    files = run("draw", "A red, heart!", "sky", *options)
    assert files == [str(tmp_path / "out" / name) for name in names]
    [said] = run("caption", files[0], "--max_new_tokens", "3")
    assert said.startswith(f"{files[0]}: ")
    written = "\n".join(run("write", "a red heart", "sky", "--max_new_tokens", "3"))
    assert written.startswith("a red heart") and "\nsky" in written


def test_refuses_parts_that_do_not_fit() -> None:
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match="DDIMScheduler"):
        TransfusionPipeline(pipeline.model, pipeline.processor, DDIMScheduler())
    other = TransfusionProcessor(TransfusionImageProcessor(size=16), tiny_tokenizer())
    with pytest.raises(ValueError, match="latent_channels is 4 in the config and 3 in the processor"):
        TransfusionPipeline(pipeline.model, other)
