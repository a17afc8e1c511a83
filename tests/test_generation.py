import copy

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from tests.tiny import make_batch, tiny_model
from tests.tiny_processor import tiny_tokenizer
from transfusion.denoising import read_documents
from transfusion.generation import _NamedGrids
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration


BOI, EOI, PATCH, EOS = 97, 98, 99, 2


def force(model: TransfusionForMultimodalGeneration, answers: dict[int, int]) -> TransfusionForMultimodalGeneration:
    """Make greedy decoding answer token `a` with `answers[a]`: a real model whose weights say so."""
    width = model.config.hidden_size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for axis, (token, answer) in enumerate(answers.items()):
            assert axis < width
            model.model.embed_tokens.weight[token, axis] = 1
            model.lm_head.weight[answer, axis] = 1
    return model


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
    with pytest.raises(ValueError, match="1 runs of image placeholders"):
        model.generate(ids, past_key_values=cache, **both, **arguments)


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


def test_interleaved_rows_draw_in_their_own_time_and_go_on() -> None:
    """Row one draws at its second token and row two at its third; then both write on, with what they drew in view."""
    answers = {5: 6, 6: BOI, EOI: 7, 7: 8, 8: EOS, 10: 11, 11: 12, 12: BOI}
    model = force(tiny_model(objective="flow"), answers)
    ids = torch.tensor([[0, 5], [9, 10]])
    output = model.generate(
        ids,
        attention_mask=ids.ne(0).long(),
        generation_mode="interleaved",
        image_grids=[(1, 2), (2, 2)],
        max_new_tokens=20,
        do_sample=False,
        num_inference_steps=3,
        generator=generators(0, 1),
    )
    assert output.sequences.tolist() == [
        [0, 5, 6, BOI, PATCH, PATCH, EOI, 7, 8, EOS, 0, 0, 0],
        [9, 10, 11, 12, BOI, PATCH, PATCH, PATCH, PATCH, EOI, 7, 8, EOS],
    ]
    assert output.image_grids == [[(1, 2)], [(2, 2)]]
    assert [[tuple(i.shape) for i in row] for row in output.images] == [[(2, 12)], [(4, 12)]]
    assert output.prompt_length == 2


def random_drawer() -> TransfusionForMultimodalGeneration:
    """A random model that likes to draw."""
    model = tiny_model(objective="flow", eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[BOI] *= 2
    return model


def test_interleaved_text_equals_a_full_run_without_a_cache() -> None:
    """After each generation: every greedy token is the one that a plain run over the whole document chooses."""
    model = random_drawer()
    ids = torch.tensor([[5, 6, 7], [0, 8, 9], [10, 11, 12]])
    output = model.generate(
        ids,
        attention_mask=ids.ne(0).long(),
        generation_mode="interleaved",
        max_new_tokens=12,
        do_sample=False,
        image_grids=[(1, 2), (2, 2), (1, 1)],
        num_inference_steps=2,
        generator=generators(0, 1, 2),
    )
    drawn = 0
    for row, (images, grids) in enumerate(zip(output.images, output.image_grids, strict=True)):
        whole = output.sequences[row]
        whole = whole[whole != 0]
        given = {"latent_patches": torch.cat(images), "image_grids": torch.tensor(grids)} if images else {}
        logits = model(whole[None], **given).logits[0]
        logits[:, [EOI, PATCH]] = -torch.inf
        prompt = int((ids[row] != 0).sum())
        for position in range(prompt, len(whole)):
            if whole[position] not in (EOI, PATCH):
                assert whole[position] == logits[position - 1].argmax()
        drawn += len(images)
    assert drawn >= 2


def test_an_interleaved_batch_equals_single_calls() -> None:
    model = random_drawer()
    ids = torch.tensor([[5, 6, 7], [0, 8, 9], [10, 11, 12]])
    arguments = {"generation_mode": "interleaved", "max_new_tokens": 10, "do_sample": False, "num_inference_steps": 2}
    together = model.generate(
        ids,
        attention_mask=ids.ne(0).long(),
        image_grids=[(1, 2), (2, 2), (1, 1)],
        generator=generators(0, 1, 2),
        **arguments,
    )
    for row, grid in enumerate([(1, 2), (2, 2), (1, 1)]):
        alone = model.generate(
            ids[row][ids[row] != 0][None], image_grids=grid, generator=generators(row)[0], **arguments
        )
        assert [t for t in together.sequences[row].tolist() if t] == [t for t in alone.sequences[0].tolist() if t]
        for image, other in zip(together.images[row], alone.images[0], strict=True):
            torch.testing.assert_close(image, other, atol=1e-4, rtol=1e-4)


def test_patches_do_not_count_and_a_begun_image_is_finished() -> None:
    model = force(tiny_model(objective="flow"), {5: 6, 6: BOI, EOI: 7, 7: 8})
    arguments = {"generation_mode": "interleaved", "image_grids": (3, 3), "num_inference_steps": 2, "do_sample": False}
    at_boi = model.generate(torch.tensor([[5]]), max_new_tokens=2, **arguments)
    assert at_boi.sequences.tolist() == [[5, 6, BOI, *[PATCH] * 9, EOI]]
    later = model.generate(torch.tensor([[5]]), max_new_tokens=4, **arguments)
    assert later.sequences.tolist() == [[5, 6, BOI, *[PATCH] * 9, EOI, 7, 8]]


def test_a_prompt_that_ends_in_begin_of_image_draws_at_once() -> None:
    model = force(tiny_model(objective="flow"), {EOI: 7, 7: 8})
    output = model.generate(
        torch.tensor([[5, BOI]]),
        generation_mode="interleaved",
        max_new_tokens=2,
        num_inference_steps=2,
        do_sample=False,
    )
    assert output.sequences.tolist() == [[5, BOI, *[PATCH] * 6, EOI, 7, 8]]
    assert output.image_grids == [[(2, 3)]]


def test_interleaved_with_a_picture_in_the_prompt() -> None:
    model = force(tiny_model(objective="flow"), {EOI: 7, 7: BOI})
    output = model.generate(
        **make_batch([[5, (2, 2)]]),
        generation_mode="interleaved",
        output_image_grids=(1, 2),
        max_new_tokens=3,
        num_inference_steps=2,
        do_sample=False,
    )
    assert output.sequences.tolist() == [[5, BOI, *[PATCH] * 4, EOI, 7, BOI, PATCH, PATCH, EOI, 7]]
    assert [len(row) for row in output.images] == [1]
    assert output.image_grids == [[(1, 2)]]


def test_interleaved_text_is_sampled_where_asked() -> None:
    model = tiny_model(objective="flow", eos_token_id=None)
    arguments = {"generation_mode": "interleaved", "max_new_tokens": 12, "suppress_tokens": [BOI]}

    def write(seed: int, **options: bool | int) -> list[int]:
        torch.manual_seed(seed)
        return model.generate(torch.tensor([[5, 6]]), **arguments, **options).sequences[0].tolist()

    assert write(0, do_sample=True) == write(0, do_sample=True) != write(1, do_sample=True)
    assert write(0, do_sample=False) == write(1, do_sample=False) == write(0, do_sample=True, top_k=1)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


def test_a_streamer_gets_the_sequence_and_its_end() -> None:
    model = force(tiny_model(objective="flow"), {5: 6, 6: BOI, EOI: 7, 7: EOS})
    arguments = {"generation_mode": "interleaved", "image_grids": (1, 2), "num_inference_steps": 1, "do_sample": False}
    streamer = Recorder()
    output = model.generate(torch.tensor([[5]]), max_new_tokens=9, streamer=streamer, **arguments)
    assert streamer.tokens == output.sequences[0].tolist() == [5, 6, BOI, PATCH, PATCH, EOI, 7, EOS]
    assert streamer.has_ended
    with pytest.raises(ValueError, match="one row and there are 2"):
        model.generate(torch.tensor([[5], [5]]), streamer=Recorder(), **arguments)


def test_stop_strings_eos_lists_and_missing_padding() -> None:
    tokenizer = tiny_tokenizer()
    heart = tokenizer("heart")["input_ids"]
    model = tiny_model(objective="flow", vocab_size=len(tokenizer) + 3, pad_token_id=None, eos_token_id=[1, 2])
    model = force(model, {3: heart[0], **dict(zip(heart, heart[1:] + [4], strict=True)), 5: 2})
    arguments = {"generation_mode": "interleaved", "max_new_tokens": 20, "do_sample": False}
    stopped = model.generate(torch.tensor([[3]]), tokenizer=tokenizer, stop_strings=["heart"], **arguments)
    assert stopped.sequences.tolist() == [[3, *heart]]
    ended = model.generate(torch.tensor([[5], [3]]), **{**arguments, "max_new_tokens": 2})
    assert ended.sequences[0].tolist() == [5, 2, 1]  # without padding, the first end of sequence pads


def test_several_drawings_of_each_prompt() -> None:
    model = force(tiny_model(objective="flow"), {EOI: 7, 7: 8})
    ids = torch.tensor([[5, BOI], [6, BOI]])
    output = model.generate(
        ids,
        generation_mode="interleaved",
        max_new_tokens=1,
        num_inference_steps=1,
        do_sample=True,
        num_return_sequences=2,
        image_grids=[(1, 1), (1, 2), (1, 3), (2, 2)],
        generator=generators(0, 1, 2, 3),
    )
    assert output.sequences[:, 0].tolist() == [5, 5, 6, 6]
    assert output.image_grids == [[(1, 1)], [(1, 2)], [(1, 3)], [(2, 2)]]


def test_a_control_token_may_have_the_id_zero() -> None:
    """Padding inside the decoder is never taken for a patch."""
    model = tiny_model(objective="flow", image_token_id=0, pad_token_id=None, eos_token_id=None)
    ids, mask = torch.tensor([[5, 6, BOI], [1, 7, BOI]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    output = model.generate(
        ids,
        attention_mask=mask,
        generation_mode="interleaved",
        max_new_tokens=2,
        image_grids=[(1, 1), (2, 2)],
        num_inference_steps=1,
        generator=generators(0, 1),
    )
    alone = model.generate(
        ids[1:, 1:],
        generation_mode="interleaved",
        max_new_tokens=2,
        image_grids=(2, 2),
        num_inference_steps=1,
        generator=generators(1),
    )
    torch.testing.assert_close(output.images[1][0], alone.images[0][0], atol=1e-5, rtol=1e-5)


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
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"attention_mask": torch.ones(1, 2)}, "attention_mask has shape (1, 2)"),
    ({"latent_patches": torch.zeros(1, 12)}, "Of latent_patches and image_grids one is None"),
    ({"image_grids": (100, 100)}, "10002"),
    ({"image_grids": (0, 3)}, "(0, 3)"),
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
    with pytest.raises(ValueError, match="generation_mode='video'; allowed: 'text', 'interleaved'"):
        model.generate(ids, generation_mode="video")
    with pytest.raises(ValueError, match="num_inference_steps cannot work in text mode"):
        model.generate(ids, num_inference_steps=4)
    with pytest.raises(ValueError, match="guidance_scale cannot work in text mode"):
        model.generate(ids, guidance_scale=2.0)
    with pytest.raises(ValueError, match="image_grids cannot work in text mode"):
        model.generate(ids, image_grids=(2, 2))
    with pytest.raises(ValueError, match=r"prompts of rows \[1\] are empty"):
        mask = torch.tensor([[1], [0]])
        model.generate(torch.tensor([[5], [0]]), attention_mask=mask, generation_mode="interleaved")
    with pytest.raises(ValueError, match="num_beams=2 cannot draw"):
        model.generate(ids, generation_mode="interleaved", num_beams=2)


# Several sizes: 95 begins an image of 2 x 3 patches, 96 one of 1 x 2


SIZED: dict = {"objective": "flow", "size_token_grids": [(2, 3), (1, 2)], "size_token_ids": [95, 96]}
DRAWN: dict = {"generation_mode": "interleaved", "num_inference_steps": 2, "do_sample": False}


def test_the_model_chooses_the_size_of_what_it_begins() -> None:
    model = force(tiny_model(**SIZED, default_image_grid=(1, 1)), {5: 95, 6: 96, 7: BOI, EOI: 8})
    output = model.generate(torch.tensor([[5], [6], [7]]), max_new_tokens=2, generator=generators(0, 1, 2), **DRAWN)
    assert output.image_grids == [[(2, 3)], [(1, 2)], [(1, 1)]]
    assert [ids[ids != 0].tolist() for ids in output.sequences] == [
        [5, 95, *[PATCH] * 6, EOI, 8],
        [6, 96, *[PATCH] * 2, EOI, 8],
        [7, BOI, PATCH, EOI, 8],
    ]


def test_a_prompt_that_ends_in_a_size_token_draws_it_at_once() -> None:
    model = force(tiny_model(**SIZED), {EOI: 96, 8: 8})
    output = model.generate(torch.tensor([[5, 95]]), max_new_tokens=1, generator=generators(0), **DRAWN)
    assert output.sequences.tolist() == [[5, 95, *[PATCH] * 6, EOI, 96, PATCH, PATCH, EOI]]
    assert output.image_grids == [[(2, 3), (1, 2)]]
    with pytest.raises(ValueError, match=r"size token 95, which begins an image of \(2, 3\).*\(1, 2\).*end .* in 96"):
        model.generate(torch.tensor([[5, 95]]), image_grids=(1, 2), max_new_tokens=1, **DRAWN)


@pytest.mark.parametrize(("grid", "begin"), [((2, 3), 95), ((1, 2), 96), ((3, 1), BOI)])
@pytest.mark.parametrize("wish", [95, 96, BOI])
def test_a_named_grid_is_drawn_whatever_size_the_model_would_begin(
    grid: tuple[int, int], begin: int, wish: int
) -> None:
    model = force(tiny_model(**SIZED), {5: wish})
    output = model.generate(torch.tensor([[5]]), image_grids=grid, max_new_tokens=1, **DRAWN)
    assert output.sequences.tolist() == [[5, begin, *[PATCH] * (grid[0] * grid[1]), EOI]]
    assert output.image_grids == [[grid]]


def test_a_named_grid_keeps_the_probability_to_draw() -> None:
    """That of all begin-of-image tokens goes to the named one, row by row; all words keep theirs."""
    scores = torch.randn(3, 100, dtype=torch.float64, generator=generators(0)[0])
    scores[2, [95, 96, BOI]] = -torch.inf  # suppressed by the caller
    before = scores.softmax(-1)
    after = _NamedGrids([(1, 2), (4, 4), (2, 3)], tiny_model(**SIZED).config, "cpu")(scores[:, :0], scores).softmax(-1)
    words = [token for token in range(100) if token not in (95, 96, BOI)]
    torch.testing.assert_close(after[:, words], before[:, words])
    for row, begin in enumerate((96, BOI, 95)):
        expected = torch.zeros(3, dtype=torch.float64)
        expected[[95, 96, BOI].index(begin)] = before[row, [95, 96, BOI]].sum()
        torch.testing.assert_close(after[row, [95, 96, BOI]], expected)


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


def images_of(images: list[Tensor], grids: list[tuple[int, int]]) -> dict[str, Tensor]:
    """What the model is given of images, nothing where there is none."""
    return {"latent_patches": torch.cat(images), "image_grids": torch.tensor(grids)} if images else {}


@pytest.mark.parametrize("overrides", [{"objective": "flow"}, SIZED], ids=["plain", "sizes"])
def test_interleaving_after_any_images_equals_slow_runs(overrides: dict) -> None:
    """Rows with images before, between and after text: text as a plain run over all of it would choose it, images as
    `generate_images` draws them after the same tokens, and each row as alone.
    """
    model = tiny_model(**overrides, eos_token_id=None)
    begins = list(model.config.boi_token_ids)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[begins] *= 2
    batch = make_batch([[5, (2, 2), 6, (1, 1)], [(1, 2), (2, 1), 8], [9, 10]])
    batch["input_ids"] = torch.stack([ids.roll(int((ids == 0).sum())) for ids in batch["input_ids"]])
    batch["attention_mask"] = batch["input_ids"].ne(0).long()
    options = {**DRAWN, "max_new_tokens": 9}
    output = model.generate(**batch, generator=generators(0, 1, 2), **options)
    documents = read_documents(**batch, config=model.config)
    grids = [grid for row in output.image_grids for grid in row]
    assert len(grids) >= 3 and (len(set(grids)) > 1) == ("size_token_ids" in overrides)
    for row, prompt in enumerate(documents):
        new = output.sequences[row, output.prompt_length :]
        ids = torch.cat([prompt.input_ids, new[new != 0]])
        images, image_grids = [*prompt.images, *output.images[row]], [*prompt.grids, *output.image_grids[row]]
        scores = model(ids[None], **images_of(images, image_grids)).logits[0]
        scores[:, [EOI, PATCH]] = -torch.inf
        replay, count = generators(row), len(prompt.images)
        for place in range(len(prompt.input_ids), len(ids)):
            if ids[place] not in (EOI, PATCH):
                assert ids[place] == scores[place - 1].argmax()
            if ids[place] in begins:
                drawn = model.generate_images(
                    ids[None, : place + 1],
                    **images_of(images[:count], image_grids[:count]),
                    output_image_grids=image_grids[count],
                    num_inference_steps=2,
                    generator=replay,
                )
                torch.testing.assert_close(images[count].float(), drawn.latent_patches, atol=1e-4, rtol=1e-4)
                count += 1
        assert count == len(images)
        inputs = images_of(prompt.images, prompt.grids)
        alone = model.generate(prompt.input_ids[None], **inputs, generator=generators(row), **options)
        assert alone.sequences[0].tolist() == ids.tolist()
