import math
from threading import Thread
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import BaseStreamer

from tests.tiny import force, make_batch, tiny_model
from tests.tiny_processor import tiny_processor, tiny_tokenizer
from transfusion.context import read_documents
from transfusion.interleaving import TransfusionStreamer, _NamedGrids
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration


BOI, EOI, PATCH, EOS = 97, 98, 99, 2

# Several sizes: 95 begins an image of 2 x 3 patches, 96 one of 1 x 2
SIZED: dict = {"objective": "flow", "size_token_grids": [(2, 3), (1, 2)], "size_token_ids": [95, 96]}
DRAWN: dict = {"generation_mode": "interleaved", "num_inference_steps": 2, "do_sample": False}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


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


def runs_of(model: TransfusionForMultimodalGeneration, ids: Tensor, **options: Any) -> tuple[Any, list[list[int]]]:
    """An interleaved generation, and the shape of what the model ran each time."""
    shapes: list[list[int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(list(kwargs["input_ids"].shape)), with_kwargs=True
    )
    output = model.generate(ids, generation_mode="interleaved", do_sample=False, num_inference_steps=3, **options)
    handle.remove()
    return output, shapes


def test_no_row_that_writes_waits_for_an_image_and_images_are_drawn_together() -> None:
    answers = {5: BOI, EOI: 7, 7: EOS, 10: 11, 11: 12, 12: BOI, 20: 21, 21: 22, 22: 23, 23: 24, 24: EOS}
    model = force(tiny_model(objective="flow"), answers)
    ids = torch.tensor([[4, 5], [9, 10], [9, 20]])
    output, shapes = runs_of(model, ids, image_grids=(1, 2), guidance_scale=1.0, max_new_tokens=9)
    assert [row[2:].tolist() for row in output.sequences] == [
        [BOI, PATCH, PATCH, EOI, 7, EOS, 0, 0],
        [11, 12, BOI, PATCH, PATCH, EOI, 7, EOS],
        [21, 22, 23, 24, EOS, 0, 0, 0],
    ]
    # Prompts; four tokens, while two rows begin images; three steps for both; both images are committed; a token.
    assert shapes == [[3, 2]] + [[3, 1]] * 5 + [[2, 2]] * 3 + [[3, 3]] + [[3, 1]]


def test_rows_that_drew_are_held_to_lengths_of_their_own() -> None:
    """A row that waited while the others wrote may still write as many tokens, and processors see its own length."""
    answers = {5: BOI, EOI: 30, 30: 30, 10: 10}
    model = force(tiny_model(objective="flow"), answers)
    ids = torch.tensor([[4, 5], [9, 10]])
    lengths: list[tuple[int, ...]] = []

    class Recorder(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            lengths.append(tuple(input_ids.shape))
            return scores

    options = {"image_grids": (1, 1), "max_new_tokens": 4, "logits_processor": LogitsProcessorList([Recorder()])}
    options |= {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    output, _ = runs_of(model, ids, **options)
    assert output.sequences[:, 2:].tolist() == [[BOI, PATCH, EOI, 30, 30, 30], [10, 10, 10, 10, 0, 0]]
    assert output.finish_reasons == ["length", "length"]
    assert lengths == [(2, 2), (2, 3), (2, 4), (2, 5), (2, 3), (2, 4), (2, 5)]
    assert [[int(row.argmax()) for row in scores] for scores in output.scores] == [[BOI, 10]] + [[30, 10]] * 3
    assert len(output.logits) == 4


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
        self.heard: list[object] = []

    def put(self, value: Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.heard.append("end")


class ImageRecorder(Recorder):
    def put_image(self, latent_patches: Tensor, grid: tuple[int, int]) -> None:
        self.heard.append((tuple(latent_patches.shape), grid))


def test_a_streamer_hears_text_alone_or_images_too() -> None:
    model = force(tiny_model(objective="flow"), {EOI: 6, 6: BOI})
    prompt = make_batch([[5, (1, 1)]])
    options = {**DRAWN, "output_image_grids": (1, 2), "max_new_tokens": 4, "max_images": 1}
    plain, both = Recorder(), ImageRecorder()
    output = model.generate(**prompt, streamer=plain, **options)
    assert output.sequences[0, 4:].tolist()[:5] == [6, BOI, PATCH, PATCH, EOI]
    text = [6, *output.sequences[0, 9:].tolist()]
    assert plain.heard == [5, *text, "end"]
    model.generate(**prompt, streamer=both, **options)
    assert both.heard == [5, 6, ((2, 12), (1, 2)), *text[1:], "end"]
    with pytest.raises(ValueError, match="one row and there are 2"):
        model.generate(torch.tensor([[5], [5]]), streamer=Recorder(), max_new_tokens=1, **DRAWN)


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_strings_and_pictures_stream_in_order(skip_prompt: bool) -> None:
    processor = tiny_processor()
    tokens = {name: getattr(processor, f"{name}_token_id") for name in ("boi", "eoi", "image")}
    word = processor.tokenizer("h")["input_ids"][0]
    ids = {f"{name}_token_id": token for name, token in tokens.items()}
    model = tiny_model(objective="flow", vocab_size=len(processor.tokenizer), eos_token_id=1, **ids)
    model = force(model, {3: word, word: tokens["boi"], tokens["eoi"]: 4, 4: 1}).float()
    streamer = TransfusionStreamer(processor, skip_prompt=skip_prompt, timeout=20)
    options = {**DRAWN, "image_grids": (1, 2), "max_new_tokens": 9, "streamer": streamer}
    thread = Thread(target=model.generate, args=(torch.tensor([[3]]),), kwargs=options)
    thread.start()
    heard = [piece for piece in streamer if piece != ""]
    thread.join()
    texts = [processor.tokenizer.decode([token]) for token in (3, word, 4)]
    before = texts[1] if skip_prompt else texts[0] + texts[1]
    assert [piece if isinstance(piece, str) else piece.size for piece in heard] == [before, (4, 2), texts[2]]
    assert isinstance(heard[1], Image.Image)


def test_a_text_streamer_prints_the_text_around_an_image() -> None:
    tokenizer = tiny_tokenizer()
    heart = tokenizer("heart")["input_ids"]
    answers = {3: heart[0], **dict(zip(heart, [*heart[1:], 297], strict=True)), 298: 4, 4: 1}
    controls = {"boi_token_id": 297, "eoi_token_id": 298, "image_token_id": 299}
    model = force(tiny_model(objective="flow", vocab_size=300, eos_token_id=1, **controls), answers)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20, skip_special_tokens=True)
    model.generate(torch.tensor([[3]]), streamer=streamer, max_new_tokens=20, **DRAWN)
    assert "".join(streamer) == tokenizer.decode([*heart, 4])


class StopsAt(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        return input_ids[:, -1] == self.token


def test_each_row_says_why_it_ended() -> None:
    model = force(tiny_model(objective="flow"), {5: EOS, 6: 7, 7: 7, 8: 9, 9: BOI, 10: 10})
    stops = StoppingCriteriaList([StopsAt(7), StopsAt(BOI), StopsAt(EOS)])
    ids = torch.tensor([[5], [6], [8], [10]])
    output = model.generate(ids, stopping_criteria=stops, max_new_tokens=3, image_grids=(1, 1), **DRAWN)
    assert output.finish_reasons == ["eos", "stop", "stop", "length"]
    assert output.sequences[2].tolist()[:5] == [8, 9, BOI, PATCH, EOI]  # what was begun is finished
    at_once = model.generate(ids, stopping_criteria=stops, max_new_tokens=1, **DRAWN)
    assert at_once.finish_reasons == ["eos", "stop", "length", "length"]  # the first of eos, stop, time, length
    late = model.generate(ids, max_time=0.0, max_new_tokens=5, **DRAWN)
    assert late.finish_reasons == ["eos", "time", "time", "time"]
    assert late.sequences.shape == (4, 2)


def test_rows_that_ended_are_padding_for_processors_and_criteria() -> None:
    seen: list[list[int]] = []

    class Records(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
            seen.append(input_ids[0].tolist())
            return input_ids[:, -1] == -1

    model = force(tiny_model(objective="flow"), {5: EOS, EOS: 7, 6: 6})
    model.generate(
        torch.tensor([[5], [6]]), stopping_criteria=StoppingCriteriaList([Records()]), max_new_tokens=3, **DRAWN
    )
    assert seen[-1] == [5, EOS, 0, 0]


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 1}])
def test_a_row_draws_at_most_max_images(sampling: dict) -> None:
    model = force(tiny_model(objective="flow", eos_token_id=None), {5: BOI, EOI: BOI, 6: 7, 7: BOI, 8: 8})
    options = {**DRAWN, **sampling, "max_new_tokens": 5, "image_grids": (1, 2)}
    for limit, counts in ((None, [5, 4, 0]), (2, [2, 2, 0]), (1, [1, 1, 0]), (0, [0, 0, 0])):
        output = model.generate(torch.tensor([[5], [6], [8]]), max_images=limit, **options)
        assert [len(row) for row in output.images] == counts
        begun = [int((ids == BOI).sum()) for ids in output.sequences]
        assert begun == counts and output.finish_reasons == ["length"] * 3
    at_once = model.generate(torch.tensor([[5, BOI]]), max_images=1, **options)
    assert len(at_once.images[0]) == 1  # the image that the prompt begins is one of them
    with pytest.raises(ValueError, match="max_images=0 and a prompt that ends in a begin-of-image"):
        model.generate(torch.tensor([[5, BOI]]), max_images=0, **options)
    with pytest.raises(ValueError, match="max_images=-1"):
        model.generate(torch.tensor([[5]]), max_images=-1, **options)


def test_no_image_is_begun_without_room_for_it() -> None:
    """17 positions: a prompt of 1 and two images of 1 + 6 + 1; a third would not fit, one of 1 x 2 neither."""
    answers = {5: 95, EOI: 95, 96: 96}
    model = force(tiny_model(**SIZED, max_position_embeddings=17, eos_token_id=None), answers)
    output = model.generate(torch.tensor([[5]]), max_new_tokens=4, **DRAWN)
    assert output.image_grids == [[(2, 3), (2, 3)]]
    assert not torch.isin(output.sequences[0, 17:], torch.tensor([95, 96, BOI])).any()
    small = model.generate(torch.tensor([[5]]), max_new_tokens=9, image_grids=(1, 2), **DRAWN)
    assert small.image_grids == [[(1, 2)] * 4]  # of 4 positions each
    with pytest.raises(ValueError, match=r"prompt of 11 positions.*take 18; max_position_embeddings=17"):
        model.generate(torch.tensor([[*[5] * 10, 95]]), max_new_tokens=2, **DRAWN)


class AddsInPlace(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.add_(1.0)


def test_scores_and_logits_are_those_of_the_chosen_tokens() -> None:
    """One (B, V) for each choice, none for patches; the logits are those of a plain run over the whole row."""
    model = random_drawer()
    options = {**DRAWN, "output_scores": True, "output_logits": True, "max_new_tokens": 6, "image_grids": (1, 2)}
    processed = {"logits_processor": LogitsProcessorList([AddsInPlace()])}
    output = model.generate(torch.tensor([[5, 6, 7]]), generator=generators(0), **processed, **options)
    chosen = [place for place, token in enumerate(output.sequences[0]) if token not in (EOI, PATCH)][3:]
    assert len(output.images[0]) > 0 and len(output.scores) == len(output.logits) == len(chosen) == 6
    whole = model(output.sequences, **images_of(output.images[0], output.image_grids[0])).logits[0].float()
    for place, scores, logits in zip(chosen, output.scores, output.logits, strict=True):
        torch.testing.assert_close(logits[0], whole[place - 1], atol=1e-4, rtol=1e-4)
        assert scores.shape == (1, 100) and scores[0].argmax() == output.sequences[0, place]
        assert scores[0, [EOI, PATCH]].tolist() == [-math.inf] * 2
    text = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(torch.tensor([[5, 6, 7]]), **text)
    undrawn = model.generate(torch.tensor([[5, 6, 7]]), max_images=0, **options)
    torch.testing.assert_close(torch.stack(undrawn.scores), torch.stack(plain.scores), atol=1e-5, rtol=1e-5)
    assert undrawn.sequences.tolist() == plain.sequences.tolist()


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
