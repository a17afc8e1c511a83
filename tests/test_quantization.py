"""Quantized weights on the CPU: torchao in 8 bits, bitsandbytes in 8 and 4, and LoRA on top of each.

The diffusion parts stay as they are without anybody naming them. A distance is the norm of the difference over the
norm of the float32 value; the limits follow from the step of a number format with 8 or 4 bits, measured with a margin
of two.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig

from tests.test_dtypes import distance
from tests.test_options import OPTIONS
from tests.tiny import make_batch, tiny_config
from transfusion import TransfusionForMultimodalGeneration


METHODS: dict[str, tuple[Callable[[], Any], float]] = {
    "torchao int8": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), 0.005),
    "bitsandbytes 8 bit": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.008),
    "bitsandbytes 4 bit": (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.05),
}
QUANTIZED = {"Int8Tensor", "Int8Params", "Params4bit"}
MODELS: dict[str, dict[str, Any]] = {
    "linear": {"axial_positions": True},
    "unet, tied": {**OPTIONS["unet"], **OPTIONS["qwen"]},
    "experts, streams": {**OPTIONS["experts all"], **OPTIONS["dynamic"]},
}
TIMESTEPS = torch.tensor([300.0])


def one_picture() -> dict[str, Tensor]:
    batch = make_batch([[5, 6, (2, 2), 8, 2]])
    return {**batch, "latent_patches": batch["latent_patches"].float()}


def save_model(folder: Path, **overrides: Any) -> TransfusionForMultimodalGeneration:
    """A model, briefly trained, whose layers are large enough for blocks of 64 weights; saved to `folder`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "objective": "flow"}
    model = TransfusionForMultimodalGeneration(tiny_config(**sizes, **overrides))
    train(model, 5)
    model.save_pretrained(folder)
    return model


def train(model: Any, steps: int) -> None:
    batch = one_picture()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def everything(model: Any) -> list[Tensor]:
    """Logits, prediction, a picture of a few steps."""
    outputs = model(**one_picture(), timesteps=TIMESTEPS)
    noise = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    drawing: dict[str, Any] = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 2.0}
    drawn = model.generate_images(torch.tensor([[5, 6, 7]]), image_grids=(2, 2), **drawing)
    return [outputs.logits, outputs.image_prediction, drawn.latent_patches]


def quantized_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if type(parameter).__name__ in QUANTIZED}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_quantized_model_is_near_and_keeps_its_codec(method: str, name: str, tmp_path: Path) -> None:
    make_config, limit = METHODS[method]
    model = save_model(tmp_path / "model", **MODELS[name])
    quantized = AutoModel.from_pretrained(tmp_path / "model", quantization_config=make_config())
    linear = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantized_names(quantized) == {key for key in linear if key.startswith("model.layers.")}
    for part in ("patch_decoder", "model.patch_encoder"):
        expected_state = model.get_submodule(part).state_dict()
        assert all(torch.equal(quantized.state_dict()[f"{part}.{k}"], value) for k, value in expected_state.items())

    distances = [distance(*pair) for pair in zip(everything(quantized), everything(model), strict=True)]
    assert 0 < max(distances) < limit, distances
    written = quantized.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert written.shape == (1, 6)

    quantized.save_pretrained(tmp_path / "quantized")
    again = AutoModel.from_pretrained(tmp_path / "quantized")
    assert quantized_names(again) == quantized_names(quantized)
    for found, expected in zip(everything(again), everything(quantized), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_rest_of_a_quantized_model_may_be_of_half_precision(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_config, limit = METHODS[method]
    model = save_model(tmp_path)
    quantized = AutoModel.from_pretrained(tmp_path, quantization_config=make_config(), dtype=dtype)
    distances = [distance(*pair) for pair in zip(everything(quantized), everything(model), strict=True)]
    assert max(distances) < limit + 0.005, distances


def test_modules_named_by_the_user_are_spared_beside_the_codec(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head", "model.layers.0"])
    names = quantized_names(AutoModel.from_pretrained(tmp_path, quantization_config=config))
    assert names and all(name.startswith("model.layers.1.") for name in names)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["linear", "experts, streams"])
def test_lora_trains_on_quantized_weights(name: str, method: str, tmp_path: Path) -> None:
    """QLoRA (Dettmers et al. 2023): the base stays as it is, the adapter learns, is saved and loaded."""
    save_model(tmp_path / "model", **MODELS[name])
    make_config, _ = METHODS[method]
    base, plain, fresh = (
        AutoModel.from_pretrained(tmp_path / "model", quantization_config=make_config()) for _ in range(3)
    )
    prepared = peft.prepare_model_for_kbit_training(base) if method.startswith("bits") else base
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["patch_decoder"])
    adapted = peft.get_peft_model(prepared, config)
    # Before anything is drawn: on the CPU, 4-bit layers that ran in evaluation let no gradient through, and
    # bitsandbytes rounds them once more where they are packed out again (hence three copies).
    train(adapted, 3)
    expected, untrained = everything(adapted), everything(plain)
    assert all(distance(*pair) > 1e-5 for pair in zip(expected, untrained, strict=True))
    with adapted.disable_adapter():
        for found, other in zip(everything(adapted), untrained, strict=True):
            torch.testing.assert_close(found, other, atol=1e-5, rtol=0)
    adapted.save_pretrained(tmp_path / "adapter")

    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    for found, other in zip(everything(loaded), expected, strict=True):
        torch.testing.assert_close(found, other, atol=1e-5, rtol=0)
