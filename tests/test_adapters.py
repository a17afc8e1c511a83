"""LoRA by PEFT: what is trained, saved, loaded and merged, and that an adapted model writes and draws as any other."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, TrainingArguments

from tests.test_options import OPTIONS, trained_model
from tests.tiny import make_batch, tiny_config
from tests.tiny_processor import tiny_processor
from tests.training.tiny_rows import RowList, ragged_rows
from transfusion import TransfusionForMultimodalGeneration, TransfusionPipeline, TransfusionTrainer


TIMESTEPS = torch.tensor([300.0])
# Every way to say what an adapter changes; the diffusion parts are trained whole in two of them.
ADAPTERS: dict[str, dict[str, Any]] = {
    "by name": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "whole codec": {"target_modules": ["q_proj"], "modules_to_save": ["patch_encoder", "patch_decoder"]},
    "whole positions": {"target_modules": ["q_proj"], "modules_to_save": ["position_embed"]},
}
MODELS: dict[str, dict[str, Any]] = {
    "linear, axial": {"axial_positions": True},
    "tied": {"tie_word_embeddings": True, "axial_positions": True},
    "unet, streams": {**OPTIONS["unet"], **OPTIONS["dynamic"], "axial_positions": True},
    "experts": {**OPTIONS["experts all"], "axial_positions": True},
}


def one_picture() -> dict[str, Tensor]:
    return make_batch([[5, 6, (2, 2), 8, 2]])


def flow_model(**overrides: Any) -> TransfusionForMultimodalGeneration:
    return trained_model({"objective": "flow", **overrides})


def train(model: Any, steps: int = 3) -> None:
    """Move the trainable parameters."""
    batch = one_picture()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def everything(model: Any) -> list[Tensor]:
    """What a model says: logits, prediction, a text, a picture."""
    outputs = model(**one_picture(), timesteps=TIMESTEPS)
    prompt = torch.tensor([[5, 6, 7]])
    drawing = {"latents": torch.ones(4, 12), "num_inference_steps": 2, "guidance_scale": 2.0}
    drawn = model.generate_images(prompt, image_grids=(2, 2), **drawing).latent_patches
    written = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    return [outputs.logits, outputs.image_prediction, drawn, written]


def assert_same(found: list[Tensor], expected: list[Tensor], atol: float = 0.0) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


PAIRS = [("all linear", name) for name in MODELS] + [(adapter, "unet, streams") for adapter in ADAPTERS]


@pytest.mark.parametrize(("adapter", "name"), [*dict.fromkeys(PAIRS), ("whole positions", "experts")])
def test_adapter_is_trained_saved_loaded_and_merged(adapter: str, name: str, tmp_path: Path) -> None:
    model = flow_model(**MODELS[name])
    model.save_pretrained(tmp_path / "model")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    untrained = everything(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **ADAPTERS[adapter]))
    assert_same(everything(adapted), untrained, 1e-12)
    train(adapted)
    expected = everything(adapted)
    assert (expected[1] - untrained[1]).abs().max() > 1e-6
    with adapted.disable_adapter():
        assert_same(everything(adapted), untrained, 1e-12)
    adapted.save_pretrained(tmp_path / "adapter")

    base = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert all(torch.equal(base.get_parameter(key), value) for key, value in before.items())
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    assert_same(everything(loaded.double()), expected, 1e-12)
    assert_same(everything(loaded.merge_and_unload()), expected, 1e-5)


@pytest.mark.parametrize("name", ["tied", "unet, streams"])
def test_transformers_own_adapter_methods(name: str, tmp_path: Path) -> None:
    model = flow_model(**MODELS[name])
    model.save_pretrained(tmp_path / "model")
    untrained = everything(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"), "style")
    train(model)
    expected = everything(model)
    model.save_pretrained(tmp_path / "adapter")
    assert {path.suffix for path in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}
    assert all("lora_" in key for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))

    loaded = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float64)
    loaded.load_adapter(str(tmp_path / "adapter"), "style")
    assert_same(everything(loaded.double()), expected, 1e-12)
    loaded.disable_adapters()
    assert_same(everything(loaded), untrained, 1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_give_adapters_the_same_gradients(use_reentrant: bool) -> None:
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(flow_model(), peft.LoraConfig(r=2, target_modules="all-linear")).double()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        if is_checkpointed:
            adapted.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            adapted.enable_input_require_grads()
        batch = one_picture()
        noise = torch.ones_like(batch["latent_patches"])
        adapted.train()(**batch, labels=batch["input_ids"], noise=noise, timesteps=TIMESTEPS).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=0)


def make_trainer(folder: Path, steps: int, name: str = "default") -> TransfusionTrainer:
    """A training of an adapter and the codec, with a checkpoint at every second step."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["patch_decoder"])
    torch.manual_seed(1)
    adapted = peft.get_peft_model(flow_model().float(), config, adapter_name=name)
    options: dict[str, Any] = {"save_steps": 2, "max_steps": steps, "per_device_train_batch_size": 4}
    options |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none"}
    args = TrainingArguments(output_dir=str(folder), disable_tqdm=True, gradient_checkpointing=True, **options)
    return TransfusionTrainer(adapted, args, train_dataset=RowList(ragged_rows()))


def test_trainer_saves_and_resumes_an_adapter(tmp_path: Path) -> None:
    whole, cut = make_trainer(tmp_path / "whole", 4), make_trainer(tmp_path / "cut", 2)
    base = {key: value.clone() for key, value in whole.model.named_parameters() if not value.requires_grad}
    whole.train()
    cut.train()
    resumed = make_trainer(tmp_path / "cut", 4)
    resumed.train(resume_from_checkpoint=True)
    whole.save_model(str(tmp_path / "final"))

    state, names = whole.model.state_dict(), {path.name for path in (tmp_path / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "training_args.json"} <= names
    assert "model.safetensors" not in names and "training_args.bin" not in names
    assert all(torch.equal(state[key], value) for key, value in base.items())
    assert all(torch.equal(state[key], value) for key, value in resumed.model.state_dict().items())
    first = make_trainer(tmp_path / "none", 1).model.state_dict()
    assert any(not torch.equal(state[key], first[key]) for key in state)


def test_an_adapter_with_a_name_resumes(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, 3, "mine")
    whole.train()
    resumed = make_trainer(tmp_path, 3, "mine")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = whole.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in resumed.model.state_dict().items())


def test_pipeline_draws_with_an_adapted_and_with_a_merged_model() -> None:
    processor = tiny_processor(size={"height": 4, "width": 4})
    config = {"vocab_size": len(processor.tokenizer), "image_token_id": processor.image_token_id}
    config |= {"boi_token_id": processor.boi_token_id, "eoi_token_id": processor.eoi_token_id, "pad_token_id": 0}
    torch.manual_seed(0)
    model = TransfusionForMultimodalGeneration(tiny_config(objective="flow", **config, default_image_grid=(2, 2)))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))

    def draw(any_model: Any) -> Tensor:
        pipe = TransfusionPipeline(any_model, processor)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a heart", num_inference_steps=2, generator=generator, output_type="latent").images

    drawn = draw(adapted.eval())
    # Latents of about 3: merged weights differ by rounding, in proportion.
    torch.testing.assert_close(draw(adapted.merge_and_unload()), drawn, atol=1e-5, rtol=1e-5)
