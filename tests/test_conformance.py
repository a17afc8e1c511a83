"""What transformers expects of any model: one function, however it is called, stored, compiled or spread."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import Cache, DynamicCache, StaticCache

from tests.tiny import make_batch, tiny_config, tiny_model
from transfusion import TransfusionForMultimodalGeneration, TransfusionModel


ROOT = Path(__file__).parents[1]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flow": {"objective": "flow", "axial_positions": True, "patch_codec": "linear_skip", "qk_norm": True},
    "streams": {"num_residual_streams": 2, "image_rope": "2d", "tie_word_embeddings": True},
    "experts": {"modality_experts": "all", "qk_norm": True},
    "unet": {"patch_codec": "unet", "unet_layers_per_block": 1, "axial_positions": True, "modality_experts": "ffn"},
}
LINEAR = [name for name in VARIANTS if name != "unet"]


@pytest.fixture(params=VARIANTS)
def any_model(request: pytest.FixtureRequest) -> TransfusionForMultimodalGeneration:
    """A tiny float64 model of each kind."""
    return tiny_model(**VARIANTS[request.param])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def timesteps_of(model: TransfusionForMultimodalGeneration, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long if model.config.objective == "ddpm" else torch.float32)


def training_inputs(model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    noise = torch.randn(13, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {**batch, "labels": labels, "noise": noise, "timesteps": timesteps_of(model, 20, 500, 980)}


@torch.no_grad()
def test_kernels_of_attention_agree(any_model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]) -> None:
    any_model, visible = any_model.float(), batch["attention_mask"].bool()
    batch["latent_patches"] = batch["latent_patches"].float()
    logits = {}
    for name in ("eager", "sdpa", "flex_attention"):
        any_model.set_attn_implementation(name)
        logits[name] = any_model(**batch).logits[visible]
    torch.testing.assert_close(logits["sdpa"], logits["eager"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits["flex_attention"], logits["eager"], atol=1e-6, rtol=1e-5)


def test_rows_are_what_they_are_alone(any_model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]) -> None:
    together = any_model(**batch, timesteps=timesteps_of(any_model, 20, 500, 980))
    parts = [(slice(0, 6), slice(0, 1), (20,)), (slice(6, 13), slice(1, 3), (500, 980))]
    for row, (patches, images, timesteps) in enumerate(parts):
        length = int(batch["attention_mask"][row].sum())
        alone = any_model(
            batch["input_ids"][row, None, :length],
            latent_patches=batch["latent_patches"][patches],
            image_grids=batch["image_grids"][images],
            timesteps=timesteps_of(any_model, *timesteps),
        )
        torch.testing.assert_close(alone.logits[0], together.logits[row, :length], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(alone.image_prediction, together.image_prediction[patches], atol=1e-6, rtol=1e-6)


PACKED: list[list[int | tuple[int, int]]] = [[5], [6, 7, (2, 3), 8], [9], [(2, 2), 10], [11, 12, 13]]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_see_nothing_of_each_other(
    any_model: TransfusionForMultimodalGeneration, implementation: str
) -> None:
    """Where position_ids begin anew, with a cache and without one, with a mask and without one."""
    any_model.set_attn_implementation(implementation)
    alone = [make_batch([row], seed=seed) for seed, row in enumerate(PACKED)]
    expected = torch.cat([any_model(**row).logits for row in alone], dim=1)
    names = ("latent_patches", "image_grids")
    packed = {name: torch.cat([row[name] for row in alone if name in row]) for name in names}
    packed["input_ids"] = torch.cat([row["input_ids"] for row in alone], dim=1)
    packed["position_ids"] = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in alone])[None]
    for options in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(packed["input_ids"])}):
        torch.testing.assert_close(any_model(**packed, **options).logits, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", LINEAR)
def test_packed_documents_compile_into_one_graph(name: str) -> None:
    model = tiny_model(**VARIANTS[name])
    batch = make_batch([[part for row in PACKED for part in row]])
    batch["position_ids"] = torch.cat([torch.arange(n) for n in (1, 11, 1, 7, 3)])[None]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_embeddings_stand_for_their_ids(
    any_model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]
) -> None:
    by_ids = any_model(**batch)
    embedded = {**batch, "inputs_embeds": any_model.get_input_embeddings()(batch["input_ids"])}
    del embedded["input_ids"]
    torch.testing.assert_close(any_model(**embedded).logits, by_ids.logits)
    embedded["image_grids"] = torch.tensor([[2, 3], [1, 3], [2, 2]])
    with pytest.raises(ValueError, match=r"of lengths \[6, 4, 3\]; image_grids hold 3 images, of \[6, 3, 4\] patches"):
        any_model(**embedded)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient(
    any_model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor], use_reentrant: bool
) -> None:
    inputs = training_inputs(any_model, batch)
    gradients = []
    for is_checkpointed in (False, True):
        any_model.train().zero_grad()
        if is_checkpointed:
            any_model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        any_model(**inputs).loss.backward()
        without = [name for name, parameter in any_model.named_parameters() if parameter.grad is None]
        assert not without
        gradients.append([parameter.grad for parameter in any_model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", LINEAR)
def test_one_graph_serves_all_timesteps(name: str, batch: dict[str, Tensor]) -> None:
    """The whole forward, without a break; a training step likewise."""
    model, counter = tiny_model(**VARIANTS[name]), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for timesteps in ((20, 500, 980), (999, 0, 7)):
            inputs = {**batch, "timesteps": timesteps_of(model, *timesteps)}
            torch.testing.assert_close(compiled(**inputs).image_prediction, model(**inputs).image_prediction)
    assert counter.frame_count == 1
    inputs = training_inputs(model, batch)
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)


@pytest.mark.usefixtures("fresh_compiler")
def test_training_compiles_without_timesteps_and_without_images(batch: dict[str, Tensor]) -> None:
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    labels = training_inputs(model, batch)["labels"]
    assert torch.isfinite(compiled(**batch, labels=labels).loss)
    text = make_batch([[5, 6, 7]])
    text["labels"] = text["input_ids"]
    torch.testing.assert_close(compiled(**text).loss, model(**text).loss)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_forward_that_is_one_graph_writes_and_draws() -> None:
    model, prompt = tiny_model(objective="flow", eos_token_id=None), torch.tensor([[5, 6, 7]])

    def run() -> list[Tensor]:
        how = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        written = model.generate(prompt, max_new_tokens=3, do_sample=False)
        return [written, model.generate_images(prompt, **how).latent_patches]

    expected = run()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    for given, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(given, wanted)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.usefixtures("fresh_compiler")
def test_the_unet_compiles_in_parts(batch: dict[str, Tensor]) -> None:
    """Its convolutions need the height and width of each image, which lie in a tensor: there the graph breaks."""
    model = tiny_model(**VARIANTS["unet"])
    inputs = {**batch, "timesteps": timesteps_of(model, 20, 500, 980)}
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).image_prediction, model(**inputs).image_prediction)


def forget(cache: Cache, num_tokens: int) -> None:
    for layer in cache.layers:
        if isinstance(cache, StaticCache):
            layer.cumulative_length.sub_(num_tokens)
        else:
            layer.crop(-num_tokens)


@torch.no_grad()
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_one_graph_serves_all_denoising_steps(name: str, kind: str) -> None:
    """Against the prefix of a prompt and of an empty one, as in guidance. A dynamic cache changes its strides once,
    when it is first cut, so that its second step compiles anew.
    """
    model, counter = tiny_model(**VARIANTS[name]), CompileCounter()
    prompts = torch.tensor([[5, 6, 7, 97], [0, 0, 0, 97]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    cache = StaticCache(model.config, max_cache_len=16) if kind == "static" else DynamicCache(config=model.config)
    model(prompts, attention_mask=mask, past_key_values=cache, use_cache=True)
    step = torch.compile(model, fullgraph=True, backend=counter)
    image = {"latent_patches": make_batch([[(2, 3)]])["latent_patches"], "image_grids": torch.tensor([[2, 3]])}
    patches = torch.full((2, 6), 99)
    for timestep in (980, 700, 400, 20):
        image["timesteps"] = timesteps_of(model, timestep)
        predicted = step(
            patches,
            attention_mask=torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], dim=1),
            past_key_values=cache,
            patch_repeats=2,
            use_cache=True,
            **image,
        ).image_prediction
        forget(cache, 6)
        conditional = model(torch.cat([prompts[:1], patches[:1]], dim=1), **image).image_prediction
        torch.testing.assert_close(predicted[:6], conditional, atol=1e-6, rtol=1e-6)
    assert counter.frame_count == (1 if kind == "static" else 2)


@torch.no_grad()
@pytest.mark.parametrize("name", LINEAR)
def test_exports_with_images(name: str, batch: dict[str, Tensor]) -> None:
    model = tiny_model(**VARIANTS[name])
    inputs = {**batch, "timesteps": timesteps_of(model, 20, 500, 980), "use_cache": False}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs).image_prediction, model(**inputs).image_prediction)


def test_data_parallel_is_refused(any_model: TransfusionForMultimodalGeneration) -> None:
    """It takes a replica of each module first, whatever the inputs; with one device or none it replicates nothing."""
    with pytest.raises(ValueError, match="nn.DataParallel cannot divide latent_patches.*torchrun"):
        any_model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="nn.DataParallel cannot divide latent_patches.*torchrun"):
        any_model.model._replicate_for_data_parallel()


def test_every_way_to_load_gives_the_model(
    any_model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """In shards, as a variant, onto a named device; the whole, and the part without heads, into either class."""
    expected = any_model(**batch).logits
    any_model.save_pretrained(tmp_path / "whole", max_shard_size="20KB", variant="tiny")
    assert len([*(tmp_path / "whole").glob("model.tiny-*.safetensors")]) > 1
    options: dict[str, Any] = {"variant": "tiny", "dtype": "auto", "output_loading_info": True}
    for more in ({}, {"device_map": {"": "cpu"}}, {"attn_implementation": "eager"}, {"use_safetensors": True}):
        again, info = TransfusionForMultimodalGeneration.from_pretrained(tmp_path / "whole", **options, **more)
        assert not any(info.values())
        torch.testing.assert_close(again(**batch).logits, expected)
    base, info = TransfusionModel.from_pretrained(tmp_path / "whole", **options)
    assert not info["missing_keys"]
    assert all(name.startswith(("lm_head", "patch_decoder")) for name in info["unexpected_keys"])
    base.save_pretrained(tmp_path / "base")
    again, info = TransfusionForMultimodalGeneration.from_pretrained(
        tmp_path / "base", dtype="auto", output_loading_info=True
    )
    assert all(name.startswith(("lm_head", "patch_decoder")) for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    torch.testing.assert_close(again.model(**batch).last_hidden_state, base(**batch).last_hidden_state)


@pytest.mark.parametrize("name", LINEAR)
def test_runs_on_the_meta_device(name: str, batch: dict[str, Tensor]) -> None:
    """Shapes alone, as memory estimates want them; the U-Net reads the grids, of which there are no values."""
    with torch.device("meta"):
        model = TransfusionForMultimodalGeneration(tiny_config(**VARIANTS[name]))
    output = model(**{name: value.to("meta") for name, value in batch.items()}, output_hidden_states=True)
    assert output.logits.shape == (*batch["input_ids"].shape, 100) and output.logits.is_meta


def test_the_vocabulary_grows_and_shrinks(
    any_model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """A larger one changes nothing. Cut below the control tokens the model still writes, but is not saved."""
    before = any_model(**batch).logits
    any_model.resize_token_embeddings(120)
    assert any_model.config.vocab_size == 120
    torch.testing.assert_close(any_model(**batch).logits[..., :100], before)
    any_model.save_pretrained(tmp_path)
    again = TransfusionForMultimodalGeneration.from_pretrained(tmp_path, dtype="auto")
    torch.testing.assert_close(again(**batch).logits[..., :100], before)
    any_model.resize_token_embeddings(90)
    assert any_model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 90)
    with pytest.raises(ValueError, match=r"boi_token_id=97 .*below vocab_size \(90\)"):
        any_model.save_pretrained(tmp_path)


def test_targets_may_come_shifted(any_model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]) -> None:
    """As transformers' Trainer gives them under sequence parallelism; they replace the labels."""
    inputs = training_inputs(any_model, batch)
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    expected = any_model(**inputs).text_loss
    torch.testing.assert_close(any_model(**inputs, shift_labels=shifted).text_loss, expected)
    inputs["labels"] = torch.full_like(shifted, 7)
    torch.testing.assert_close(any_model(**inputs, shift_labels=shifted).text_loss, expected)
    shifted[0, 0] = 8
    assert not torch.allclose(any_model(**inputs, shift_labels=shifted).text_loss, expected)


def test_a_tuple_holds_the_same_outputs(
    any_model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]
) -> None:
    inputs = training_inputs(any_model, batch)
    output = any_model(**inputs, use_cache=False)
    torch.testing.assert_close(any_model(**inputs, use_cache=False, return_dict=False), output.to_tuple())
    torch.testing.assert_close(any_model(**batch, return_dict=False)[0], any_model(**batch).logits)


def test_tensor_parallel_plans_name_modules(any_model: TransfusionForMultimodalGeneration) -> None:
    """Each entry some module, and each projection of attention and feed-forward some entry."""
    modules = {name.replace(".0.", ".*.") for name, _ in any_model.named_modules()}
    assert set(any_model.tp_plan) <= modules
    projections = [n for n in modules if n.startswith("model.layers.*.") and n.endswith(("_proj", "q_norm", "k_norm"))]
    assert len(projections) >= 7 and set(projections) <= set(any_model.tp_plan)


def test_a_field_named_at_loading_brings_what_follows_from_it(tmp_path: Path) -> None:
    TransfusionForMultimodalGeneration(tiny_config()).save_pretrained(tmp_path)
    experts = TransfusionForMultimodalGeneration.from_pretrained(tmp_path, modality_experts="all", qk_norm=True)
    test_tensor_parallel_plans_name_modules(experts)
    assert "model.layers.*.self_attn.image_q_norm" in experts.tp_plan
    unet = TransfusionForMultimodalGeneration.from_pretrained(
        tmp_path, patch_codec="unet", ignore_mismatched_sizes=True
    )
    assert unet.config.unet_channels == (32, 32)
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        TransfusionForMultimodalGeneration.from_pretrained(tmp_path, num_key_value_heads=3)


@pytest.mark.distributed
def test_two_processes_share_the_layers(tmp_path: Path) -> None:
    """Tensor parallelism: losses, predictions and gradients are those of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "tests/tensor_parallel.py"), str(tmp_path)]
    finished = subprocess.run(command + script, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
