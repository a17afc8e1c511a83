import pytest
import torch
from torch import Tensor

from tests.tiny import make_batch, tiny_config, tiny_model
from transfusion.context import Context, Document, hide_text, read_documents


SIZED = {"size_token_grids": [(2, 2), (3, 1)], "size_token_ids": [95, 96]}
ROWS: list[list[int | tuple[int, int]]] = [[5, 6, (2, 2), 7, (1, 3)], [8], [9, (1, 2), 10, 11]]


def test_documents_are_read_from_either_side_of_the_padding(batch: dict[str, Tensor]) -> None:
    right = read_documents(**batch, config=tiny_config())
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    longest = max(map(len, rows))
    padded = [torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows]
    left = {**batch, "input_ids": torch.stack(padded), "attention_mask": torch.stack(padded).ne(0).long()}
    for documents in (right, read_documents(**left, config=tiny_config())):
        assert [d.input_ids.tolist() for d in documents] == [row.tolist() for row in rows]
        assert [d.grids for d in documents] == [[(2, 3)], [(2, 2), (1, 3)]]
        assert torch.equal(torch.cat([i for d in documents for i in d.images]), batch["latent_patches"])


def test_too_many_images_for_the_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="0 runs of image placeholders and 1 images"):
        read_documents(torch.tensor([[5]]), None, torch.zeros(1, 12), torch.tensor([[1, 1]]), tiny_config())


def test_size_tokens_stay_where_text_is_hidden() -> None:
    ids = torch.tensor([5, 95, 99, 98, 6, 97, 99, 98, 96])
    seen = hide_text(ids, tiny_config(**SIZED))
    assert seen.tolist() == [False, True, True, True, False, True, True, True, True]
    assert not hide_text(ids, tiny_config())[[1, 8]].any()


def documents_of(rows: list[list[int | tuple[int, int]]]) -> list[Document]:
    return read_documents(**make_batch(rows), config=tiny_config())


def next_logits(context: Context, tokens: list[int]) -> Tensor:
    ids = torch.tensor(tokens)[:, None]
    return context.extend(ids, torch.ones_like(ids, dtype=torch.bool), [], [])


@torch.no_grad()
def test_rows_that_are_taken_go_on_as_they_would_have() -> None:
    """Also after runs in which they took no part, which leave hidden columns between theirs."""
    model = tiny_model(objective="flow")
    context = Context.read(model, documents_of(ROWS))
    for turn, wrote in enumerate([[True, False, True], [False, True, False], [True, True, False]]):
        context.extend(torch.full((3, 1), 20 + turn), torch.tensor(wrote)[:, None], [], [])
    taken = context.take([2, 0])
    assert taken.attention_mask.sum(dim=1).tolist() == [8, 16]
    assert not (taken.attention_mask.diff(dim=1) < 0).any()  # padding on the left alone
    before = [layer.keys.clone() for layer in context.cache.layers]
    assert torch.allclose(next_logits(taken, [30, 31]), next_logits(context, [31, 32, 30])[[2, 0]], atol=1e-6)
    for layer, keys in zip(context.cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :-1], keys)


@torch.no_grad()
def test_joined_contexts_go_on_as_each() -> None:
    model = tiny_model(objective="flow")
    documents = documents_of(ROWS)
    contexts = [Context.read(model, documents[:1]), Context.read(model, documents[1:])]
    joined = Context.join(contexts)
    expected = torch.cat([next_logits(contexts[0], [30]), next_logits(contexts[1], [31, 32])])
    assert torch.allclose(next_logits(joined, [30, 31, 32]), expected, atol=1e-6)


@torch.no_grad()
def test_hidden_tokens_leave_a_gap_in_the_positions() -> None:
    model = tiny_model(objective="flow")
    documents = documents_of(ROWS[:1])
    visible = [hide_text(documents[0].input_ids, model.config)]
    context = Context.read(model, documents, visible)
    batch = make_batch([[*ROWS[0], 40]])
    batch["attention_mask"][0, :-1] = visible[0].long()
    assert torch.allclose(next_logits(context, [40]), model(**batch).logits[:, -1].float(), atol=1e-6)
    assert context.attention_mask.shape[1] == visible[0].sum() + 1


def test_layers_that_keep_nothing_are_refused() -> None:
    model, prompt = tiny_model(), torch.tensor([[5, 6, 7]])
    model.gradient_checkpointing_enable()
    expected = model.generate_images(prompt, num_inference_steps=1, latents=torch.zeros(6, 12)).latent_patches
    model.train()
    with pytest.raises(ValueError, match=r"gradient checkpointing.*call model.eval\(\)"):
        model.generate_images(prompt, num_inference_steps=1)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.generate(prompt, generation_mode="interleaved", max_new_tokens=2)
    model.gradient_checkpointing_disable()
    drawn = model.generate_images(prompt, num_inference_steps=1, latents=torch.zeros(6, 12)).latent_patches
    assert torch.equal(drawn, expected)
