"""Half precision: how far bfloat16 and float16 are from float32, what is never rounded, and weights that lie on disk.

A distance is the norm of the difference over the norm of the float32 value. A rounding to bfloat16 has one of up to
2**-8, to float16 of up to 2**-11; the limits are little more than twice that.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from tests.test_options import OPTIONS, trained_model
from tests.tiny import make_batch, tiny_config, tiny_model
from transfusion import TransfusionForMultimodalGeneration
from transfusion.positions import TransfusionRotaryEmbedding


LIMITS = {torch.bfloat16: 0.01, torch.float16: 0.0015}
MODELS: dict[str, dict[str, Any]] = {
    "linear, axial": {"axial_positions": True},
    "linear skip, manifold, ddpm": {**OPTIONS["linear skip"], **OPTIONS["manifold"], "objective": "ddpm"},
    "unet, tied": {**OPTIONS["unet"], **OPTIONS["qwen"], "axial_positions": True},
    "experts, dynamic": {**OPTIONS["experts all"], **OPTIONS["dynamic"]},
}
TIMESTEPS = torch.tensor([300, 500, 700])


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> TransfusionForMultimodalGeneration:
    return trained_model({"objective": "flow", **MODELS[request.param]}).float()


def pictures_and_texts() -> dict[str, Tensor]:
    batch = make_batch([[5, 6, 7, (2, 3), 8, 2], [(2, 2), 9, 10, (1, 3), 11, 12, 13, 2]])
    return {**batch, "latent_patches": batch["latent_patches"].float()}


@torch.no_grad()
def everything(model: Any) -> dict[str, Tensor]:
    """Logits, prediction, losses and a picture of a few steps."""
    batch = pictures_and_texts()
    told = model(**batch, timesteps=TIMESTEPS)
    noise = torch.randn(batch["latent_patches"].shape, generator=torch.Generator().manual_seed(0))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    learned = model(**batch, labels=labels, timesteps=TIMESTEPS, noise=noise)
    drawn = model.generate_images(
        torch.tensor([[5, 6, 7]]), image_grids=(2, 3), latents=noise[:6], num_inference_steps=4, guidance_scale=2.0
    )
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    return {
        "logits": told.logits,
        "prediction": told.image_prediction,
        "text_loss": learned.text_loss,
        "image_loss": learned.image_loss,
        "drawn": drawn.latent_patches,
        "written": written,
    }


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    distances = {name: distance(found[name], expected[name]) for name in expected if name != "written"}
    assert max(distances.values()) < LIMITS[dtype], distances
    assert all(found[name].dtype == torch.float32 for name in ("text_loss", "image_loss", "drawn"))


@pytest.mark.parametrize("dtype", LIMITS)
def test_half_precision_is_near_float32(
    model: TransfusionForMultimodalGeneration, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Loaded in it, cast to it, and by autocast."""
    expected = everything(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    # float16 holds no number above 65504: the codec, which sees raw noise and timesteps, is kept apart from it.
    codec_dtype = {parameter.dtype for parameter in loaded.patch_decoder.parameters()}
    assert codec_dtype == {torch.float32 if dtype == torch.float16 else dtype}
    assert_near(everything(loaded), expected, dtype)

    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again", dtype="auto")
    assert {name: p.dtype for name, p in again.named_parameters()} == {
        n: p.dtype for n, p in loaded.named_parameters()
    }

    cast = copy.deepcopy(model).to(dtype)
    assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
    assert_near(everything(cast), expected, dtype)
    with torch.autocast("cpu", dtype):
        assert_near(everything(model), expected, dtype)


@pytest.mark.parametrize("part", ["patch_decoder", "model.patch_encoder"])
def test_codec_halves_may_differ_in_dtype(part: str, model: TransfusionForMultimodalGeneration) -> None:
    """As they do where an adapter trains one of them in float32."""
    expected = everything(model)
    model.bfloat16().get_submodule(part).float()
    assert_near(everything(model), expected, torch.bfloat16)


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double])
def test_a_cast_does_not_round_rotary_frequencies(cast: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    config = tiny_config(max_position_embeddings=4096)
    rotary, positions = TransfusionRotaryEmbedding(config), torch.tensor([[0, 1, 3000]])
    expected = rotary(torch.zeros(1), positions)
    found = cast(rotary)(torch.zeros(1), positions)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_rotary_frequencies_leave_the_meta_device() -> None:
    with torch.device("meta"):
        rotary = TransfusionRotaryEmbedding(tiny_config())
    assert rotary.to_empty(device="cpu").inv_freq.device.type == "cpu"
    assert TransfusionRotaryEmbedding(tiny_config()).to("meta").inv_freq.is_meta


def test_float16_survives_large_latents() -> None:
    """Latents of a hundred, and the last timestep, overflow nothing."""
    model = tiny_model(objective="ddpm").half()
    batch = pictures_and_texts()
    batch["latent_patches"] = batch["latent_patches"] * 100
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    out = model(**batch, labels=labels, timesteps=torch.tensor([999, 999, 999]))
    assert torch.isfinite(out.loss) and torch.isfinite(out.image_prediction).all()


OFFLOADED = {
    "linear, axial": {"model.embed_tokens": "cpu", "model.patch_encoder": "disk", "patch_decoder": "disk"},
    "unet, tied": {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.patch_encoder": "disk"},
    "experts, dynamic": {"model.embed_tokens": "disk", "model.patch_encoder": "cpu", "patch_decoder": "cpu"},
}


@pytest.mark.parametrize("name", OFFLOADED)
def test_parts_on_disk_change_nothing(name: str, tmp_path: Path) -> None:
    """A model whose parts are named one by one; the rest of them lies on disk."""
    trained_model({"objective": "flow", **MODELS[name]}).float().save_pretrained(tmp_path / "model")
    expected = everything(AutoModel.from_pretrained(tmp_path / "model"))
    parts = ("model.embed_tokens", "model.patch_encoder", "model.layers", "model.norm", "model.rotary_emb")
    others = ("model.image_norm", "lm_head", "patch_decoder")
    device_map = {part: "disk" for part in (*parts, *others)} | {"model.rotary_emb": "cpu"} | OFFLOADED[name]
    offloaded = AutoModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert "disk" in offloaded.hf_device_map.values()
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert offloaded.device == torch.device("cpu")
    for key, value in everything(offloaded).items():
        torch.testing.assert_close(value, expected[key], atol=0, rtol=0)


@pytest.mark.parametrize("name", OFFLOADED)
def test_automatic_device_map_changes_nothing(name: str, tmp_path: Path) -> None:
    trained_model({"objective": "flow", **MODELS[name]}).float().save_pretrained(tmp_path / "model")
    plain = AutoModel.from_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in plain.parameters())
    options = {"max_memory": {"cpu": int(size * 0.7)}, "offload_folder": tmp_path / "offload"}
    offloaded = AutoModel.from_pretrained(tmp_path / "model", device_map="auto", **options)
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    expected = everything(plain)
    for key, value in everything(offloaded).items():
        torch.testing.assert_close(value, expected[key], atol=0, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_no_device_map_divides_a_block(name: str) -> None:
    """A decoder layer or half of a codec adds vectors of its parts, which have to be on one device."""
    model = tiny_model(**MODELS[name])
    size = sum(parameter.nbytes for parameter in model.parameters())
    inside_block = re.compile(r"model\.layers\.\d+\.|model\.patch_encoder\.|patch_decoder\.")
    for percent in range(5, 100, 5):
        memory = {0: size * percent // 100, "cpu": 10 * size}
        parts = accelerate.infer_auto_device_map(model, memory, list(model._no_split_modules))
        assert not [part for part in parts if inside_block.match(part)]
