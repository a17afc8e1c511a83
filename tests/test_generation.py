import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
)

from tests.tiny import document, make_batch, tiny_model
from tests.tiny_processor import tiny_tokenizer
from transfusion.diffusion import make_scheduler
from transfusion.latents import patchify
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration


BOI, EOI, PATCH, EOS = 97, 98, 99, 2


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def slow_greedy(model: TransfusionForMultimodalGeneration, batch: dict, steps: int) -> list[int]:
    ids = batch["input_ids"]
    for _ in range(steps):
        scores = model(**{**batch, "input_ids": ids, "attention_mask": None}).logits[:, -1].clone()
        scores[:, [BOI, EOI, PATCH]] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_text_after_an_image_equals_greedy_decoding_without_a_cache(cache: dict, attn_implementation: str) -> None:
    model = tiny_model(objective="flow", eos_token_id=None)
    model.set_attn_implementation(attn_implementation)
    with torch.no_grad():  # attention strong enough for a wrong mask to be seen
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(20)
            layer.self_attn.o_proj.weight.mul_(20)
    batch = make_batch([[5, (2, 2), 6, 7]])
    with_logits = {"return_dict_in_generate": True, "output_logits": True}
    written = model.generate(**batch, max_new_tokens=8, do_sample=False, **cache, **with_logits)
    assert written.sequences[0].tolist() == slow_greedy(model, batch, 8)
    whole = model(**{**batch, "input_ids": written.sequences, "attention_mask": None}).logits
    torch.testing.assert_close(torch.stack(written.logits, dim=1), whole[:, -9:-1].float(), atol=1e-5, rtol=1e-5)


def test_text_mode_never_writes_control_tokens(model: TransfusionForMultimodalGeneration) -> None:
    with torch.no_grad():
        model.lm_head.weight[[BOI, EOI, PATCH]] *= 100
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=40, do_sample=True)
    assert not torch.isin(written, torch.tensor([BOI, EOI, PATCH])).any()


def random_writer() -> TransfusionForMultimodalGeneration:
    """A random model whose tokens depend on what it sees."""
    model = tiny_model(objective="flow", eos_token_id=None)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(20)
            layer.self_attn.o_proj.weight.mul_(20)
    return model


def test_beams_and_return_sequences_keep_each_rows_images() -> None:
    model = tiny_model(objective="flow", eos_token_id=None)
    batch = make_batch([[5, (2, 2), 6], [7, (1, 2), 8, (1, 1)]])
    batch["input_ids"][0] = torch.tensor([0, 0, *batch["input_ids"][0, :-2]])
    batch["attention_mask"] = batch["input_ids"].ne(0).long()
    together = model.generate(**batch, max_new_tokens=5, num_beams=3, num_return_sequences=2)
    assert together.shape[0] == 4
    latents = batch["latent_patches"]
    first = {"latent_patches": latents[:4], "image_grids": batch["image_grids"][:1]}
    second = {"latent_patches": latents[4:], "image_grids": batch["image_grids"][1:]}
    for row, images in enumerate((first, second)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        single = model.generate(ids, **images, max_new_tokens=5, num_beams=3, num_return_sequences=2)
        assert torch.equal(together[2 * row : 2 * row + 2, -5:], single[:, -5:])


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_return_sequences": 2}])
def test_embedded_prompts_keep_their_images(options: dict) -> None:
    model = tiny_model(objective="flow", eos_token_id=None)
    batch = make_batch([[5, (2, 2), 6, (1, 2)]])
    embedded = {**batch, "inputs_embeds": model.model.embed_tokens(batch["input_ids"])}
    del embedded["input_ids"]
    arguments = {"max_new_tokens": 5, "num_beams": 2 if "num_return_sequences" in options else 1, "do_sample": False}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    written, expected = (model.generate(**inputs, **arguments, **options) for inputs in (embedded, batch))
    assert written.sequences[:, -5:].tolist() == expected.sequences[:, -5:].tolist()
    torch.testing.assert_close(written.logits, expected.logits, atol=1e-6, rtol=1e-6)


def test_a_cache_is_continued_with_the_new_images_alone() -> None:
    model = tiny_model(objective="flow", eos_token_id=None)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    first = make_batch([[5, (2, 2), 6]])
    turn = model.generate(**first, return_dict_in_generate=True, **arguments)
    second = make_batch([[7, (1, 2), 8]], seed=1)
    ids = torch.cat([turn.sequences, second["input_ids"]], dim=1)
    both = {name: torch.cat([first[name], second[name]]) for name in ("latent_patches", "image_grids")}
    new = {name: second[name] for name in both}
    cache = turn.past_key_values
    continued = model.generate(ids, past_key_values=copy.deepcopy(cache), **new, **arguments)
    assert continued.tolist() == model.generate(ids, **both, **arguments).tolist()


def test_a_cache_is_continued_with_all_images_of_a_chat() -> None:
    model = random_writer()
    first = make_batch([[5, (2, 2), 6], [(1, 2), 8, (1, 1)]])
    first["input_ids"][1] = first["input_ids"][1].roll(1)  # padded on the left, as prompts are
    first["attention_mask"] = first["input_ids"].ne(0).long()
    turn = model.generate(**first, return_dict_in_generate=True, max_new_tokens=4, do_sample=False)
    more = torch.tensor([[7, BOI, PATCH, PATCH, EOI, 8], [9, 10, BOI, PATCH, EOI, 7]])
    ids = torch.cat([turn.sequences, more], dim=1)
    images = {
        "latent_patches": torch.cat([make_batch([[(1, 2)]], seed=seed)["latent_patches"] for seed in range(5)]),
        "image_grids": torch.tensor([[2, 2], [1, 2], [1, 2], [1, 1], [1, 1]]),
    }
    images["latent_patches"][:4], images["latent_patches"][6:9] = first["latent_patches"].split([4, 3])
    mask = torch.cat([first["attention_mask"], torch.ones(2, 10, dtype=torch.long)], dim=1)
    arguments = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "output_logits": True}
    arguments["return_dict_in_generate"] = True
    expected = model.generate(ids, **images, **arguments)
    continued = model.generate(ids, past_key_values=copy.deepcopy(turn.past_key_values), **images, **arguments)
    torch.testing.assert_close(continued.logits, expected.logits, atol=1e-6, rtol=1e-6)
    turn.past_key_values.crop(3 - turn.past_key_values.get_seq_length())  # the pictures that begin before are cut
    with pytest.raises(ValueError, match="past_key_values end at position 3, within an image"):
        model.generate(ids, past_key_values=turn.past_key_values, **images, **arguments)


def test_a_cache_is_continued_with_the_new_ids_alone() -> None:
    """Their images are new, wherever they stand; the mask is that of all."""
    model, images = random_writer(), make_batch([[(2, 2)]])
    del images["input_ids"], images["attention_mask"]
    turn = model.generate(torch.tensor([[5, 6]]), return_dict_in_generate=True, max_new_tokens=4, do_sample=False)
    cache, past = turn.past_key_values, turn.sequences[:, :-1]
    new = torch.cat([turn.sequences[:, -1:], torch.tensor([document(7, (2, 2), 8)])], dim=1)
    whole = torch.cat([past, new], dim=1)
    assert cache.get_seq_length() == past.shape[1] < new.shape[1]
    options = {"attention_mask": torch.ones_like(whole), "max_new_tokens": 4, "do_sample": False, **images}
    written = model.generate(new, past_key_values=cache, **options)
    assert torch.equal(written[:, new.shape[1] :], model.generate(whole, **options)[:, whole.shape[1] :])


def test_all_images_of_a_chat_may_come_where_none_is_new() -> None:
    model, batch = random_writer(), make_batch([[5, (2, 2), 6]])
    images = {name: batch[name] for name in ("latent_patches", "image_grids")}
    options = {"max_new_tokens": 4, "do_sample": False}
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        first = model.generate(**batch, past_key_values=cache, **options)
        longer = torch.cat([first, torch.tensor([[11, 12]])], dim=1)
        written = model.generate(longer, past_key_values=cache, **images, **options)
        assert torch.equal(written, model.generate(longer, **images, **options))


def test_generate_images_appends_begin_of_image_where_it_is_absent(model: TransfusionForMultimodalGeneration) -> None:
    arguments = {"num_inference_steps": 3, "image_grids": (2, 2)}
    with_boi = model.generate_images(torch.tensor([[5, 6, BOI]]), generator=generators(0)[0], **arguments)
    without = model.generate_images(torch.tensor([[5, 6]]), generator=generators(0)[0], **arguments)
    assert with_boi.latent_patches.shape == (4, 12)
    assert with_boi.image_grids.tolist() == [[2, 2]]
    assert torch.equal(with_boi.latent_patches, without.latent_patches)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_draws_what_single_calls_draw(side: str) -> None:
    model = tiny_model(objective="flow")
    left = side == "left"
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10] if left else [9, 10, 0, 0]])
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.5}
    together = model.generate_images(
        ids, ids.ne(0), image_grids=[(2, 2), (1, 3)], generator=generators(1, 2), **arguments
    )
    one = model.generate_images(
        torch.tensor([[5, 6, 7, 8]]), image_grids=(2, 2), generator=generators(1)[0], **arguments
    )
    two = model.generate_images(torch.tensor([[9, 10]]), image_grids=(1, 3), generator=generators(2)[0], **arguments)
    expected = torch.cat([one.latent_patches, two.latent_patches])
    torch.testing.assert_close(together.latent_patches, expected, atol=1e-5, rtol=1e-5)
    assert together.image_grids.tolist() == [[2, 2], [1, 3]]


def test_a_single_generator_serves_all_rows_in_turn() -> None:
    model = tiny_model(objective="flow")
    ids = torch.tensor([[5, 6], [7, 8]])
    one, two = (model.generate_images(ids, num_inference_steps=2, generator=generators(3)[0]) for _ in range(2))
    assert torch.equal(one.latent_patches, two.latent_patches)
    assert not torch.equal(one.latent_patches[:6], one.latent_patches[6:])


def test_negative_prompts_replace_the_unconditional_branch() -> None:
    model = tiny_model(objective="flow")
    ids, arguments = torch.tensor([[5, 6]]), {"num_inference_steps": 3, "guidance_scale": 3.0}
    plain = model.generate_images(ids, generator=generators(0)[0], **arguments)
    negative = model.generate_images(
        ids, generator=generators(0)[0], negative_input_ids=torch.tensor([[9]]), **arguments
    )
    same = model.generate_images(ids, generator=generators(0)[0], negative_input_ids=ids, **arguments)
    unguided = model.generate_images(ids, generator=generators(0)[0], num_inference_steps=3, guidance_scale=1.0)
    assert not torch.allclose(plain.latent_patches, negative.latent_patches)
    torch.testing.assert_close(same.latent_patches, unguided.latent_patches, atol=1e-5, rtol=1e-5)


def test_an_edit_draws_after_a_prompt_with_a_picture() -> None:
    model = tiny_model(objective="flow")
    batch = make_batch([[5, (2, 2), 6]])
    arguments = {"num_inference_steps": 2, "output_image_grids": (1, 2)}
    drawn = model.generate_images(**batch, generator=generators(0)[0], **arguments)
    other = model.generate_images(**make_batch([[5, (2, 2), 6]], seed=1), generator=generators(0)[0], **arguments)
    assert drawn.latent_patches.shape == (2, 12)
    assert not torch.allclose(drawn.latent_patches, other.latent_patches)


def test_defaults_come_from_the_generation_config(model: TransfusionForMultimodalGeneration, objective: str) -> None:
    drawing = model.prepare_drawing()
    assert drawing.num_inference_steps == model.generation_config.num_inference_steps
    assert drawing.guidance_scale == model.generation_config.guidance_scale
    model.generation_config.num_inference_steps = 7
    model.generation_config.guidance_scale = 1.5
    drawing = model.prepare_drawing()
    assert (drawing.num_inference_steps, drawing.guidance_scale) == (7, 1.5)
    given = GenerationConfig(num_inference_steps=3)
    drawing = model.prepare_drawing(generation_config=given)
    assert (drawing.num_inference_steps, drawing.guidance_scale) == (3, 1.5)
    assert model.prepare_drawing(num_inference_steps=4, generation_config=given).num_inference_steps == 4
    expected = {"ddpm": "DDIMScheduler", "flow": "FlowMatchEulerDiscreteScheduler"}[objective]
    assert type(drawing.scheduler).__name__ == expected


def test_the_default_scheduler_is_that_of_the_config() -> None:
    flow = tiny_model(objective="flow", timestep_shift=3.0, num_train_timesteps=500).prepare_drawing().scheduler
    assert (flow.config.shift, flow.config.num_train_timesteps) == (3.0, 500)
    ddpm = tiny_model(objective="ddpm", timestep_shift=3.0, num_train_timesteps=500).prepare_drawing().scheduler
    assert ddpm.config.num_train_timesteps == 500


def test_guidance_of_images_does_not_touch_text() -> None:
    model = tiny_model(objective="flow", eos_token_id=None)
    ids = torch.tensor([[5, 6, 7]])
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.generation_config.guidance_scale = 9.0
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)


REFUSED = [
    ({"scheduler": "NoScheduler"}, "NoScheduler"),
    ({"scheduler": "DDIMScheduler"}, "DDIMScheduler"),
    ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ({"num_inference_steps": True}, "num_inference_steps=True"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"guidance_scale": "3"}, "guidance_scale='3'; give a finite number"),
    ({"guidance_scale": True}, "guidance_scale=True"),
    ({"attention_mask": torch.ones(1, 2)}, "attention_mask has shape (1, 2)"),
    ({"latent_patches": torch.zeros(1, 12)}, "Of latent_patches and image_grids one is None"),
    ({"image_grids": (100, 100)}, "10002"),
    ({"image_grids": (0, 3)}, "(0, 3)"),
    ({"image_grids": (2.0, 3.0)}, "image_grids=(2.0, 3.0) is not (rows, columns)"),
    ({"image_grids": "2x3"}, "image_grids=2x3 is not (rows, columns)"),
    ({"image_grids": [(1,), (1, 2)]}, "is not (rows, columns)"),
    ({"image_grids": [(1, 1), (1, 2)]}, "nor 1 of these"),
    ({"generator": [None, None]}, "list of 2 for 1 images"),
    ({"latents": torch.zeros(3, 12)}, "(3, 12)"),
    ({"negative_input_ids": torch.ones(2, 3, dtype=torch.long)}, "2 negative prompts"),
    ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "(0, 3)"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refuses_bad_drawing_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        tiny_model(objective="flow").generate_images(**{"input_ids": torch.tensor([[5]]), **arguments})
    assert words in str(error.value)


def test_refuses_bad_modes(batch: dict[str, Tensor]) -> None:
    model, ids = tiny_model(objective="flow"), torch.tensor([[5]])
    with pytest.raises(ValueError, match="generation_mode='video'; allowed: 'text', 'image', 'interleaved'"):
        model.generate(ids, generation_mode="video")
    with pytest.raises(ValueError, match="num_inference_steps cannot work in text mode"):
        model.generate(ids, num_inference_steps=4)
    with pytest.raises(ValueError, match="guidance_scale cannot work in text mode"):
        model.generate(ids, guidance_scale=2.0)
    with pytest.raises(ValueError, match="image_grids cannot work in text mode"):
        model.generate(ids, image_grids=(2, 2))
    with pytest.raises(ValueError, match="max_images=True"):
        model.generate(ids, generation_mode="interleaved", max_images=True)
    with pytest.raises(ValueError, match="num_return_sequences=0"):
        model.generate(ids, generation_mode="image", num_return_sequences=0)
    with pytest.raises(ValueError, match=r"prompts of rows \[1\] are empty"):
        mask = torch.tensor([[1], [0]])
        model.generate(torch.tensor([[5], [0]]), attention_mask=mask, generation_mode="interleaved")


NOT_DRAWING = [
    {"num_beams": 2},
    {"assistant_model": torch.nn.Identity()},
    {"prompt_lookup_num_tokens": 2},
    {"past_key_values": DynamicCache()},
    {"cache_implementation": "static"},
    {"cache_implementation": "quantized"},
    {"use_cache": False},
    {"inputs_embeds": torch.zeros(1, 1, 32)},
    {"position_ids": torch.zeros(1, 1, dtype=torch.long)},
    {"output_attentions": True},
    {"output_hidden_states": True},
    {"prefill_chunk_size": 2},
    {"synced_gpus": True},
    {"custom_generate": print},
]
NOT_IMAGES = [
    {"streamer": TextStreamer(tiny_tokenizer())},
    {"logits_processor": LogitsProcessorList()},
    {"prefix_allowed_tokens_fn": print},
    {"output_scores": True},
    {"max_images": 1},
    {"generation_config": GenerationConfig(num_beams=2)},
]


@pytest.mark.parametrize("option", NOT_DRAWING, ids=lambda option: next(iter(option)))
@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_options_that_cannot_draw_are_refused(mode: str, option: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        tiny_model(objective="flow").generate(torch.tensor([[5]]), generation_mode=mode, **option)


@pytest.mark.parametrize("option", NOT_IMAGES, ids=lambda option: next(iter(option)))
def test_options_that_choose_tokens_are_refused_where_none_is_chosen(option: dict) -> None:
    with pytest.raises(ValueError, match="generation_mode='image' works without it"):
        tiny_model(objective="flow").generate(torch.tensor([[5]]), generation_mode="image", **option)


FOREIGN = [
    ("negative_prompt_ids", "negative_input_ids"),
    ("negative_prompt_attention_mask", "negative_attention_mask"),
    ("negative_prompt", "negative_input_ids"),
    ("pixel_values", "latent_patches and image_grids"),
    ("height", "output_image_grids"),
    ("image_size", "output_image_grids"),
    ("callback_on_step_end", "callback"),
    ("noise", "latents"),
    ("seed", "generator"),
]


@pytest.mark.parametrize(("name", "ours"), FOREIGN, ids=[name for name, _ in FOREIGN])
@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_names_of_other_libraries_are_answered_by_ours(mode: str, name: str, ours: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is unknown to this model's generate; .*{ours}"):
        tiny_model(objective="flow").generate(torch.tensor([[5]]), generation_mode=mode, **{name: torch.ones(1, 1)})


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_prompts_that_are_no_ids_and_lengths_that_are_no_numbers_are_refused(mode: str) -> None:
    for name, value in (("inputs", "a red heart"), ("input_ids", [[5]])):
        with pytest.raises(ValueError, match=rf"{name} is a {type(value).__name__}; give ids, \*\*processor"):
            tiny_model().generate(generation_mode=mode, **{name: value})
    for n in ("many", 0, 1.5):
        with pytest.raises(ValueError, match=f"max_new_tokens={n!r}; give an integer of 1 or more"):
            tiny_model().generate(torch.tensor([[5]]), generation_mode=mode, max_new_tokens=n)


def test_image_mode_says_what_it_returns() -> None:
    config = GenerationConfig(return_dict_in_generate=True)
    for options in ({"return_dict_in_generate": True}, {"generation_config": config}):
        with pytest.raises(ValueError, match=r"returns a tensor \(B, C, H, W\).*generate_images"):
            tiny_model(objective="flow").generate(torch.tensor([[5]]), generation_mode="image", **options)


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_what_a_batch_holds_for_training_is_not_read(mode: str) -> None:
    model, batch = tiny_model(objective="flow"), make_batch([[5, (2, 2), 6]])
    options = {"generation_mode": mode, "max_new_tokens": 2, "do_sample": False}
    options |= {} if mode == "text" else {"output_image_grids": (1, 2), "num_inference_steps": 1}
    further = {"labels": batch["input_ids"], "mm_token_type_ids": batch["input_ids"].eq(PATCH).long()}
    torch.manual_seed(0)
    expected = model.generate(**batch, **options)
    torch.manual_seed(0)
    written = model.generate(**batch, **further, **options)
    assert torch.equal(written, expected) if mode != "interleaved" else written.sequences.equal(expected.sequences)


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_pictures_without_a_prompt_are_answered(mode: str) -> None:
    batch = make_batch([[5, (2, 2), 6]])
    images = {name: batch[name] for name in ("latent_patches", "image_grids")}
    with pytest.raises(ValueError, match=r"latent_patches came without input_ids.*<image>"):
        tiny_model(objective="flow").generate(**images, generation_mode=mode)


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_patches_of_images_lie_flat(mode: str) -> None:
    batch = make_batch([[5, (2, 2), 6]])
    stacked = {**batch, "latent_patches": batch["latent_patches"][None]}
    with pytest.raises(ValueError, match=r"latent_patches has shape \(1, 4, 12\).*TransfusionDataCollator"):
        tiny_model(objective="flow").generate(**stacked, generation_mode=mode, num_beams=1)
    with pytest.raises(ValueError, match="TransfusionDataCollator"):
        tiny_model(objective="flow").generate_images(**stacked)


def test_the_mode_may_stand_in_a_generation_config() -> None:
    """The call's keyword wins, then the given config, then the model's."""
    model, ids = tiny_model(objective="flow"), torch.tensor([[5, 6]])
    options = {"num_inference_steps": 1, "output_image_grids": (1, 2)}
    image, text = GenerationConfig(generation_mode="image"), GenerationConfig(generation_mode="text", max_new_tokens=2)
    assert model.generate(ids, generation_config=image, **options).shape == (1, 3, 2, 4)
    assert model.generate(ids, text, generation_mode="image", **options).ndim == 4
    model.generation_config.generation_mode = "image"
    assert model.generate(ids, **options).ndim == 4
    assert model.generate(ids, generation_config=text).shape == (1, 4)
    with pytest.raises(ValueError, match="generation_mode='video'"):
        model.generate(ids, GenerationConfig(generation_mode="video"))


def test_a_negative_guidance_scale_leads_away_from_the_prompt() -> None:
    assert tiny_model(objective="flow").prepare_drawing(guidance_scale=-3).guidance_scale == -3.0


def test_schedulers_of_another_length_are_refused(objective: str) -> None:
    scheduler = make_scheduler(objective, num_train_timesteps=500)
    with pytest.raises(ValueError, match="num_train_timesteps=500"):
        tiny_model(objective=objective).prepare_drawing(scheduler=scheduler)
    assert tiny_model(objective=objective, num_train_timesteps=500).prepare_drawing(scheduler=scheduler)


def test_methods_that_are_neither_greedy_nor_sampling_cannot_draw() -> None:
    with pytest.raises(ValueError, match="contrastive_search cannot draw"):
        tiny_model().generate(torch.tensor([[5]]), generation_mode="interleaved", penalty_alpha=0.6, top_k=4)


# What may never be sampled, whatever the caller asks for


class Prefers(LogitsProcessor):
    """Adds infinity to the score of a token."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.tokens] += torch.inf
        return scores


NEVER = (BOI, EOI, PATCH)
PUSHED: list[dict] = [
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_p": 0.1, "renormalize_logits": True},
    {"sequence_bias": [[[token], 1e4] for token in NEVER]},
    {"bad_words_ids": [[token] for token in range(3, 90)]},
    {"logits_processor": LogitsProcessorList([Prefers(*NEVER)])},
    {"logits_processor": LogitsProcessorList([Prefers(*NEVER)]), "do_sample": True, "top_k": 3, "temperature": 0.5},
    {"prefix_allowed_tokens_fn": lambda row, ids: [*NEVER, 7]},
    {"num_beams": 3, "remove_invalid_values": True},
    {"num_beams": 2, "prefix_allowed_tokens_fn": lambda row, ids: [*NEVER, 7, 8]},
]


@pytest.mark.parametrize("options", PUSHED, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_no_option_makes_the_model_write_a_patch(mode: str, options: dict) -> None:
    if "num_beams" in options and mode == "interleaved":
        return
    model = tiny_model(objective="flow", eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight[list(NEVER)] *= 100
    drawing = {"max_images": 0} if mode == "interleaved" else {}
    written = model.generate(
        torch.tensor([[5, 6, 7], [8, 9, 10]]), generation_mode=mode, max_new_tokens=8, **drawing, **options
    )
    ids = written.sequences if mode == "interleaved" else written
    assert ids.shape == (2, 11) and not torch.isin(ids, torch.tensor(NEVER)).any()


def test_constraints_that_leave_no_token_are_refused() -> None:
    model, ids = tiny_model(objective="flow"), torch.tensor([[5, 6]])
    for options in ({}, {"do_sample": True}, {"num_beams": 2}, {"generation_mode": "interleaved"}):
        with pytest.raises(ValueError, match="leave rows .* no token that can be sampled"):
            model.generate(ids, prefix_allowed_tokens_fn=lambda row, ids: [PATCH], max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="forced_eos_token_id=99 forces a token of images"):
        model.generate(ids, forced_eos_token_id=PATCH, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"forced_bos_token_id=97 forces"):
        model.generate(ids, forced_bos_token_id=BOI, max_new_tokens=2)
    with pytest.raises(ValueError, match="prefill_chunk_size=2 would cut"):
        model.generate(**make_batch([[5, (2, 2), 6]]), prefill_chunk_size=2, max_new_tokens=2)


# Ways of decoding text, with an image in the prompt and without


@pytest.mark.parametrize("row", [[5, (2, 2), 6, 7, 5], [5, 6, 7, 5, 6]], ids=["image", "text"])
def test_assisted_decoding_writes_what_greedy_decoding_writes(row: list) -> None:
    model = random_writer()
    torch.manual_seed(1)
    assistant = TransfusionForMultimodalGeneration(model.config).double().eval()
    batch, options = make_batch([row]), {"max_new_tokens": 10, "do_sample": False}
    expected = model.generate(**batch, **options)
    for helper in (assistant, model):
        assert torch.equal(model.generate(**batch, assistant_model=helper, **options), expected)
    assert torch.equal(model.generate(**batch, prompt_lookup_num_tokens=2, **options), expected)


def test_an_assistant_sees_the_images_of_the_prompt() -> None:
    """Then a model that assists itself is right about every token, and the main model runs but a few times."""
    model, runs = random_writer(), []
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0
    model.register_forward_hook(lambda module, args, output: runs.append(1))
    batch = make_batch([[5, (2, 2), 6]])
    model.generate(**batch, assistant_model=assistant, max_new_tokens=12, do_sample=False)
    assert len(runs) == 2  # each accepts five tokens and adds one


def test_a_cache_of_fixed_size_is_filled_and_continued() -> None:
    model, batch = random_writer(), make_batch([[5, (2, 2), 6], [7, (2, 2), 8]])
    options = {"max_new_tokens": 4, "do_sample": False}
    cache = StaticCache(config=model.config, max_cache_len=40)
    first = model.generate(**batch, past_key_values=cache, **options)
    assert torch.equal(first, model.generate(**batch, **options))
    longer = torch.cat([first, torch.tensor([[11, 12], [13, 14]])], dim=1)
    images = {name: batch[name] for name in ("latent_patches", "image_grids")}
    expected = model.generate(longer, **images, **options)
    assert torch.equal(model.generate(longer, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_logits_that_are_kept_change_nothing(num_beams: int) -> None:
    model, batch = random_writer(), make_batch([[5, (2, 2), 6]])
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": num_beams}
    assert torch.equal(model.generate(**batch, logits_to_keep=0, **options), model.generate(**batch, **options))


def test_prompts_of_text_may_be_run_in_chunks() -> None:
    model, ids = random_writer(), torch.tensor([[5, 6, 7, 8, 9]])
    whole = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=2), whole)


def test_continuous_batching_closes_the_tokens_of_images() -> None:
    """It asks for the logits processors in a way of its own."""
    processors = tiny_model()._get_logits_processor(GenerationConfig(do_sample=True, top_k=5))
    scores = processors(torch.tensor([[5]]), torch.arange(100.0)[None])
    assert scores.argmax() == 96 and all(scores[0, token] == -torch.inf for token in NEVER)
    assert all(p.supports_continuous_batching is not False for p in processors)


def test_a_streamer_of_transformers_hears_text() -> None:
    model, tokenizer = random_writer(), tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    written = model.generate(torch.tensor([[5, 6]]), streamer=streamer, max_new_tokens=6, do_sample=False)
    assert "".join(streamer) == tokenizer.decode(written[0, 2:])


def test_a_generation_config_may_come_second() -> None:
    model, ids = random_writer(), torch.tensor([[5, 6]])
    written = model.generate(ids, GenerationConfig(max_new_tokens=3, do_sample=False))
    assert torch.equal(written, model.generate(ids, max_new_tokens=3, do_sample=False))


# The image mode


IMAGE: dict = {"generation_mode": "image", "num_inference_steps": 2}


def test_image_mode_returns_the_latents_that_generate_images_draws(objective: str) -> None:
    model = tiny_model(objective=objective)
    ids = torch.tensor([[0, 5, 6], [7, 8, BOI]])  # padding is hidden, begin-of-image is appended where it is absent
    latents = model.generate(ids, image_grids=(2, 3), generator=generators(0, 1), **IMAGE)
    drawn = model.generate_images(
        ids, ids.ne(0), image_grids=(2, 3), generator=generators(0, 1), num_inference_steps=2
    )
    assert latents.shape == (2, 3, 4, 6) and latents.dtype == torch.float32
    assert torch.equal(patchify(latents, 2).flatten(0, 1), drawn.latent_patches)


def test_image_mode_draws_several_for_each_prompt() -> None:
    model, batch = tiny_model(objective="flow"), make_batch([[5, (2, 2), 6], [(1, 2), (1, 1), 7]])
    batch["input_ids"] = torch.stack([ids.roll(int((ids == 0).sum())) for ids in batch["input_ids"]])
    batch["attention_mask"] = batch["input_ids"].ne(0).long()
    options = {**IMAGE, "output_image_grids": (1, 2), "negative_input_ids": torch.tensor([[8], [9]])}
    several = model.generate(**batch, num_return_sequences=2, generator=generators(0, 1, 2, 3), **options)
    assert several.shape == (4, 3, 2, 4)
    for copy_of in range(2):
        seeds = (copy_of, copy_of + 2)
        once = model.generate(**batch, generator=generators(*seeds), **options)
        plain = {name: value for name, value in options.items() if name != "generation_mode"}
        drawn = model.generate_images(**batch, generator=generators(*seeds), **plain)
        assert torch.equal(patchify(once, 2).flatten(0, 1), drawn.latent_patches)
        torch.testing.assert_close(several[copy_of::2], once, atol=1e-5, rtol=1e-5)
    configured = GenerationConfig(num_return_sequences=2, do_sample=True, num_inference_steps=2)
    again = model.generate(
        **batch,
        generation_config=configured,
        generator=generators(0, 1, 2, 3),
        **{**options, "num_inference_steps": None},
    )
    assert torch.equal(again, several)


def test_image_mode_starts_from_given_noise_and_reports_its_steps() -> None:
    model, seen = tiny_model(objective="flow"), []
    noise = torch.randn(6, 12)
    options = {**IMAGE, "latents": noise, "callback": lambda step, timestep, x_t: seen.append(step)}
    latents = model.generate(torch.tensor([[5]]), max_new_tokens=256, **options)  # lengths are not read
    expected = model.generate_images(torch.tensor([[5]]), latents=noise, num_inference_steps=2).latent_patches
    assert seen == [0, 1] and torch.equal(patchify(latents[0], 2), expected)


def test_image_mode_refuses_what_it_cannot_return_or_read() -> None:
    model, ids = tiny_model(objective="flow"), torch.tensor([[5], [6]])
    with pytest.raises(ValueError, match=r"grids \[\(1, 2\), \(2, 2\)\].*generate_images"):
        model.generate(ids, image_grids=[(1, 2), (2, 2)], **IMAGE)
    with pytest.raises(ValueError, match="came without prompts"):
        model.generate(**IMAGE)
    with pytest.raises(ValueError, match="max_new_token: generation_mode='image' does not read this"):
        model.generate(ids, max_new_token=5, **IMAGE)
    with pytest.raises(ValueError, match="list of 2 for 4 images"):
        model.generate(ids, num_return_sequences=2, generator=generators(0, 1), **IMAGE)
    with pytest.raises(ValueError, match="negative_input_ids, latents cannot work in text mode"):
        model.generate(ids, negative_input_ids=ids, latents=ids)


def test_drawing_is_refused_where_the_positions_end() -> None:
    model = tiny_model(objective="flow", max_position_embeddings=12)
    fits, long = torch.tensor([[5] * 4]), torch.tensor([[5] * 5])  # 4 and begin, 6 patches, end: 12
    assert model.generate(fits, **IMAGE).shape == (1, 3, 4, 6)
    with pytest.raises(ValueError, match=r"prompt of 6 positions.*take 13; max_position_embeddings=12.*Shorten"):
        model.generate(long, **IMAGE)
    with pytest.raises(ValueError, match="take 13"):
        model.generate_images(fits, negative_input_ids=long, num_inference_steps=1)


# Several sizes: 95 begins an image of 2 x 3 patches, 96 one of 1 x 2


SIZED: dict = {"objective": "flow", "size_token_grids": [(2, 3), (1, 2)], "size_token_ids": [95, 96]}
DRAWN: dict = {"generation_mode": "interleaved", "num_inference_steps": 2, "do_sample": False}


def test_text_mode_never_begins_an_image_of_any_size() -> None:
    model = tiny_model(**SIZED, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight[[95, 96, BOI]] *= 100
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=40, do_sample=True)
    assert not torch.isin(written, torch.tensor([95, 96, BOI, EOI, PATCH])).any()
    plain = tiny_model(objective="flow", eos_token_id=None)  # without size tokens these ids are words
    with torch.no_grad():
        plain.lm_head.weight[[95, 96]] *= 100
    written = plain.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=40, do_sample=True)
    assert torch.isin(written, torch.tensor([95, 96])).any()


def draw(model: TransfusionForMultimodalGeneration, ids: list[list[int]], **options: object) -> Tensor:
    arguments = {"num_inference_steps": 2, "generator": generators(*range(len(ids))), **options}
    drawn = model.generate_images(torch.tensor(ids), **arguments)
    assert drawn.image_grids.prod(1).sum() == len(drawn.latent_patches)
    return drawn.latent_patches


def test_generate_images_begins_each_size_with_its_token() -> None:
    model = tiny_model(**SIZED, default_image_grid=(1, 2))
    for grid, begin in (((2, 3), 95), ((1, 2), 96), ((3, 1), BOI)):
        appended = draw(model, [[5, 6]], image_grids=grid)
        assert torch.equal(appended, draw(model, [[5, 6, begin]], image_grids=grid))
    assert torch.equal(draw(model, [[5, 6]]), draw(model, [[5, 6, 96]]))  # the default's
    named = draw(model, [[5, 6]], image_grids=[(2, 3)])
    assert torch.equal(draw(model, [[5, 6, 95]]), named)  # the prompt's token names the size
    assert not torch.allclose(draw(model, [[5, 6, BOI]], image_grids=(2, 3)), named)  # the plain one may draw any
    mixed = draw(model, [[5, 6, 95], [5, 7, 96], [8, 9, BOI]], image_grids=[(2, 3), (1, 2), (2, 2)])
    torch.testing.assert_close(mixed[:6], named, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"size token 96, which begins an image of \(1, 2\).*\(2, 3\)"):
        draw(model, [[5, 96]], image_grids=(2, 3))


def test_negative_prompts_begin_the_same_size_and_see_the_same_images() -> None:
    model, one = tiny_model(**SIZED), {"num_inference_steps": 2}
    unguided = draw(model, [[5, 6]], image_grids=(2, 3), guidance_scale=1.0)
    same = draw(model, [[5, 6]], image_grids=(2, 3), guidance_scale=3.0, negative_input_ids=torch.tensor([[5, 6]]))
    torch.testing.assert_close(same, unguided, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="size token 96"):
        draw(model, [[5, 6]], image_grids=(2, 3), negative_input_ids=torch.tensor([[96]]))
    edit = {**make_batch([[(2, 2), 5, 6]]), "output_image_grids": (1, 2), **one}
    ids = edit["input_ids"]
    alike = model.generate_images(**edit, negative_input_ids=ids, guidance_scale=3.0, generator=generators(0))
    alone = model.generate_images(**edit, guidance_scale=1.0, generator=generators(0))
    torch.testing.assert_close(alike.latent_patches, alone.latent_patches, atol=1e-5, rtol=1e-5)
    other = ids[:, 6:]  # without the picture
    blind = model.generate_images(**edit, negative_input_ids=other, guidance_scale=3.0, generator=generators(0))
    assert not torch.allclose(blind.latent_patches, alone.latent_patches, atol=1e-3)
