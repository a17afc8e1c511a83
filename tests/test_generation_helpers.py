"""Helpers of text generation beside images: assistants, the model's own first layers, token healing."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_generation import random_writer
from tests.tiny import make_batch, tiny_model
from tests.tiny_processor import tiny_tokenizer


@pytest.mark.parametrize("overrides", [{}, {"num_residual_streams": 2, "modality_experts": "all"}])
def test_the_first_layers_may_assist(overrides: dict) -> None:
    """The config says for a while that there are fewer; afterwards the model is whole again."""
    model, batch = tiny_model(eos_token_id=None, **overrides), make_batch([[5, (2, 2), 6]])
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, assistant_early_exit=1, **options), expected)
    assert model.config.num_hidden_layers == 2
    assert torch.equal(model.generate(**batch, **options), expected)


def test_an_assistant_that_reads_no_images_is_refused_beside_images() -> None:
    model = random_writer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    assistant = LlamaForCausalLM(LlamaConfig(vocab_size=100, pad_token_id=0, **sizes)).eval()
    options = {"assistant_model": assistant, "max_new_tokens": 4, "do_sample": False}
    ids = torch.tensor([[5, 6]])
    assert torch.equal(model.generate(ids, **options), model.generate(ids, max_new_tokens=4, do_sample=False))
    with pytest.raises(ValueError, match="assistant_model is a llama model.*images of the prompt"):
        model.generate(**make_batch([[5, (2, 2), 6]]), **options)


def test_tokens_are_not_healed_beside_images() -> None:
    """transformers writes the prompt anew from its text."""
    model, tokenizer = tiny_model(vocab_size=300), tiny_tokenizer(bos_token="<|im_start|>")
    options = {"token_healing": True, "tokenizer": tokenizer, "max_new_tokens": 2}
    prompt = tokenizer("a red hear", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, **options).shape[0] == 1
    ids = torch.tensor([[5, 297, *[299] * 4, 298, 6]])
    images = {"latent_patches": torch.zeros(4, 12).double(), "image_grids": torch.tensor([[2, 2]])}
    with pytest.raises(ValueError, match="token_healing=True would lose the images"):
        model.generate(ids, **images, **options)
