"""Every option of the architecture alone and every pair: train, save, load, decode with a cache and without."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from tests.tiny import make_batch, tiny_config
from transfusion import TransfusionForMultimodalGeneration


OPTIONS: dict[str, dict[str, Any]] = {
    "unet": {"patch_codec": "unet", "unet_layers_per_block": 1},
    "linear skip": {"patch_codec": "linear_skip"},
    "axial": {"axial_positions": True},
    "rotary 2-D": {"image_rope": "2d"},
    "causal images": {"image_attention": "causal"},
    "static": {"num_residual_streams": 2, "hyper_connections": "static"},
    "dynamic": {"num_residual_streams": 4, "hyper_connections": "dynamic"},
    "manifold": {"num_residual_streams": 3, "hyper_connections": "manifold"},
    "experts ffn": {"modality_experts": "ffn"},
    "experts all": {"modality_experts": "all"},
    "size tokens": {"size_token_grids": [(2, 2), (1, 3)], "size_token_ids": [95, 96]},
    "ddpm": {"objective": "ddpm"},
    "qwen": {"qk_norm": True, "attention_bias": True, "tie_word_embeddings": True},
}


def combinations() -> Iterator[Any]:
    """One option, or two that do not set the same field."""
    for size in (1, 2):
        for names in itertools.combinations(OPTIONS, size):
            merged = {field: value for name in names for field, value in OPTIONS[name].items()}
            if len(merged) == sum(len(OPTIONS[name]) for name in names):
                yield pytest.param(merged, id=" + ".join(names))


def trained_model(overrides: dict[str, Any]) -> TransfusionForMultimodalGeneration:
    """A float64 model after three steps, in which parts that begin at zero move; every parameter has moved."""
    torch.manual_seed(0)
    model = TransfusionForMultimodalGeneration(tiny_config(**overrides)).double()
    batch = make_batch([[5, 6, (2, 2), 8, 2], [(1, 3), 9, (2, 3), 11, 2], [7, 8, 9]])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unmoved
    return model.eval()


def slow_drawing(
    model: TransfusionForMultimodalGeneration, prompt: list[int], x_t: Tensor, steps: int, scale: float
) -> Tensor:
    """Euler's steps of the flow, guided, from the whole row each time, branch by branch."""
    ids = torch.tensor([[*prompt, *[99] * 4]])
    masks = [torch.ones_like(ids), (ids >= 95).long()]  # the unconditional branch sees control tokens and patches
    for step in range(steps, 0, -1):
        timesteps = torch.tensor([1000.0 * step / steps])
        inputs = {"latent_patches": x_t, "image_grids": torch.tensor([[2, 2]]), "timesteps": timesteps}
        given, without = (model(input_ids=ids, attention_mask=mask, **inputs).image_prediction for mask in masks)
        x_t = x_t - (without + scale * (given - without)) / steps
    return x_t


@pytest.mark.parametrize("overrides", list(combinations()))
@torch.no_grad()
def test_options_train_save_load_and_decode_with_a_cache_as_without(overrides: dict[str, Any], tmp_path: Path) -> None:
    with torch.enable_grad():
        model = trained_model({"objective": "flow", **overrides})
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    batch = make_batch([[5, 6, (2, 2), 8, 9]])
    expected = model(**batch, timesteps=torch.tensor([300]))
    found = loaded(**batch, timesteps=torch.tensor([300]))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.image_prediction, expected.image_prediction, atol=1e-12, rtol=0)

    cut, is_before = 9, {"latent_patches": batch["latent_patches"], "image_grids": batch["image_grids"]}
    cached = loaded(input_ids=batch["input_ids"][:, :cut], use_cache=True, **is_before)
    rest = loaded(input_ids=batch["input_ids"][:, cut:], past_key_values=cached.past_key_values)
    whole = loaded(input_ids=batch["input_ids"], **is_before).logits
    torch.testing.assert_close(torch.cat([cached.logits, rest.logits], dim=1), whole, atol=1e-10, rtol=0)
    with_cache = loaded.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(with_cache, loaded.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=False))

    if model.config.objective == "flow":
        noise = torch.randn(4, 12)
        prompt = [5, 6, model.config.boi_token_for((2, 2))]
        drawn = loaded.generate_images(
            torch.tensor([prompt]), image_grids=(2, 2), latents=noise, num_inference_steps=3, guidance_scale=2.0
        )
        slow = slow_drawing(loaded, prompt, noise, 3, 2.0)
        torch.testing.assert_close(drawn.latent_patches.double(), slow.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("overrides", [pytest.param(fields, id=name) for name, fields in OPTIONS.items()])
def test_options_bear_activation_checkpointing(overrides: dict[str, Any]) -> None:
    batch = make_batch([[5, 6, (2, 2), 8, 2], [(1, 3), 9, (2, 3), 11, 2]])
    noise, timesteps = torch.randn(13, 12).double(), torch.tensor([100, 200, 300])
    gradients = []
    for is_checkpointed in (False, True):
        model = trained_model({"objective": "flow", **overrides}).train()
        if is_checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], noise=noise, timesteps=timesteps).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["static", "dynamic", "manifold", "experts ffn", "experts all", "rotary 2-D"])
def test_layers_compile_whole(name: str) -> None:
    """Every operation of a forward pass is traced, by the compiler's front; what it makes of them is not at stake."""
    model = trained_model({"objective": "flow", **OPTIONS[name]})
    batch = make_batch([[5, 6, (2, 2), 8, 2], [(1, 3), 9, (2, 3), 11, 2]])
    timesteps = torch.tensor([100.0, 200.0, 300.0])
    with torch.no_grad():
        expected = model(**batch, timesteps=timesteps)
        compiled = torch.compile(model.model, fullgraph=True, backend="eager")
        found = compiled(**batch, timesteps=timesteps)
        kept = model.lm_head(found.last_hidden_state)
    torch.testing.assert_close(kept, expected.logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["dynamic", "manifold", "experts all", "unet"])
def test_lora_trains_on_top_of_an_option(name: str) -> None:
    model = trained_model({"objective": "flow", **OPTIONS[name]})
    batch = make_batch([[5, 6, (2, 2), 8, 2]])
    expected = model(**batch, timesteps=torch.tensor([300.0])).image_prediction
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    torch.testing.assert_close(adapted(**batch, timesteps=torch.tensor([300.0])).image_prediction, expected)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
