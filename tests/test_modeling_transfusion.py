from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache

import transfusion  # noqa: F401  registers the auto classes
from tests.tiny import make_batch, tiny_config, tiny_model
from transfusion.inputs import images_without_prior_text
from transfusion.modeling_transfusion import (
    TransfusionForMultimodalGeneration,
    TransfusionModel,
    TransfusionRMSNorm,
    apply_rotary_pos_emb,
    transfusion_mask,
)


def slow_mask(is_patch: list[bool]) -> Tensor:
    """May position i look at j? One pair at a time, from the paper's two sentences."""
    image_of, image = [], -1
    for position, patch in enumerate(is_patch):
        image += patch and not (position > 0 and is_patch[position - 1])
        image_of.append(image if patch else None)
    length = len(is_patch)
    return torch.tensor(
        [
            [j <= i or (image_of[i] is not None and image_of[i] == image_of[j]) for j in range(length)]
            for i in range(length)
        ]
    )


def full_mask(
    config_model: TransfusionForMultimodalGeneration, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    embeds = config_model.model.embed_tokens(input_ids)
    mask = transfusion_mask(config_model.config, embeds, attention_mask, None, input_ids == 99)
    assert mask is not None
    return mask if mask.dtype == torch.bool else mask == 0


def test_mask_is_the_docstrings_drawing() -> None:
    lines = str(transfusion_mask.__doc__).splitlines()
    drawing = [line.split() for line in lines if line.strip().endswith((" .", " 1"))]
    drawn = torch.tensor([[cell == "1" for cell in line[1:]] for line in drawing])
    ids = {"a": 5, "red": 6, "<boi>": 97, "patch": 99, "<eoi>": 98, "heart": 7}
    input_ids = torch.tensor([[ids[line[0]] for line in drawing]])
    assert drawn.shape == (8, 8)
    assert torch.equal(full_mask(tiny_model(), input_ids, None)[0, 0], drawn)


@pytest.mark.parametrize("kind", ["static", "dynamic", "manifold"])
def test_a_plain_checkpoint_opened_with_more_streams_is_the_plain_model(kind: str, tmp_path: Path) -> None:
    plain = TransfusionForMultimodalGeneration(tiny_config())
    plain.save_pretrained(tmp_path)
    wider = AutoModel.from_pretrained(tmp_path, num_residual_streams=2, hyper_connections=kind)
    input_ids = torch.tensor([[5, 6, 7, 8]])
    assert wider.model.layers[1].mlp_connection.static_mix.shape == (2, 2)
    torch.testing.assert_close(wider(input_ids).logits, plain(input_ids).logits, atol=1e-6, rtol=0)


def test_images_can_be_causal_too(batch: dict[str, Tensor]) -> None:
    model = tiny_model(image_attention="causal")
    mask = full_mask(model, batch["input_ids"], batch["attention_mask"])
    for row, visible, row_mask in zip(batch["input_ids"], batch["attention_mask"], mask, strict=True):
        assert torch.equal(row_mask[0], slow_mask([False] * len(row)) & visible.bool())


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_mask_equals_the_slow_one(batch: dict[str, Tensor], attn_implementation: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(attn_implementation)
    mask = full_mask(model, batch["input_ids"], batch["attention_mask"])
    for row, visible, row_mask in zip(batch["input_ids"], batch["attention_mask"], mask, strict=True):
        expected = slow_mask((row == 99).tolist()) & visible.bool()
        assert torch.equal(row_mask[0], expected)


def influence(model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """(L, L), True where the output at a position has a gradient at the input of another."""
    embeds = model.model.embed_tokens(batch["input_ids"])
    is_patch = batch["input_ids"] == 99
    timesteps = torch.zeros(len(batch["image_grids"]))
    patches, _ = model.model.patch_encoder(batch["latent_patches"], timesteps, batch["image_grids"])
    embeds = embeds.masked_scatter(is_patch[..., None], patches).detach().requires_grad_()
    config = model.config
    mask = transfusion_mask(config, embeds, None, None, is_patch)
    positions = model.model.rotary_emb(embeds, torch.arange(embeds.shape[1])[None])
    hidden = embeds
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=positions)
    rows = [torch.autograd.grad(hidden[0, i].sum(), embeds, retain_graph=True)[0][0] for i in range(embeds.shape[1])]
    return torch.stack(rows).abs().sum(-1) > 0


def test_gradients_flow_to_future_patches_of_the_same_image_and_to_no_other_future() -> None:
    batch = make_batch([[5, (2, 2), 6, (1, 2), 7]])
    seen = influence(tiny_model(), batch)
    assert torch.equal(seen, slow_mask((batch["input_ids"][0] == 99).tolist()))


def test_patches_reach_their_image_and_what_follows_through_the_whole_model(
    model: TransfusionForMultimodalGeneration,
) -> None:
    batch = make_batch([[5, (2, 2), 6, (1, 2), 7]])
    patches = batch["latent_patches"].requires_grad_()
    output = model(**{**batch, "latent_patches": patches}, timesteps=torch.tensor([3, 4]))
    first = torch.autograd.grad(output.image_prediction[0].sum(), patches, retain_graph=True)[0].abs().sum(-1) > 0
    last = torch.autograd.grad(output.image_prediction[5].sum(), patches, retain_graph=True)[0].abs().sum(-1) > 0
    text = torch.autograd.grad(output.logits[0, 0].sum(), patches, allow_unused=True)[0]
    assert first.tolist() == [True] * 4 + [False] * 2
    assert last.tolist() == [True] * 6
    assert text is None or not text.any()


def slow_losses(
    model: TransfusionForMultimodalGeneration, batch: dict, labels: Tensor, t: Tensor, noise: Tensor
) -> tuple:
    """Both losses with the paper's equations 1 to 4, row by row and image by image."""
    config, process = model.config, model.noise_process
    patches, squared, count, image, start = batch["latent_patches"].clone(), 0.0, 0, 0, 0
    for image, (rows, columns) in enumerate(batch["image_grids"].tolist()):
        stop = start + rows * columns
        alpha, sigma = process.scales(t[image : image + 1], torch.float64)
        patches[start:stop] = alpha * batch["latent_patches"][start:stop] + sigma * noise[start:stop]
        start = stop
    output = model(**{**batch, "latent_patches": patches}, timesteps=t)
    target = noise if config.objective == "ddpm" else noise - batch["latent_patches"]
    for prediction, wanted in zip(output.image_prediction, target, strict=True):
        squared, count = squared + ((prediction - wanted) ** 2).sum(), count + len(wanted)
    nll, tokens = 0.0, 0
    for row in range(len(labels)):
        for position in range(labels.shape[1] - 1):
            token, target_id = batch["input_ids"][row, position], labels[row, position + 1]
            if token not in (97, 99) and target_id not in (99, -100):
                nll, tokens = nll - output.logits[row, position].log_softmax(-1)[target_id], tokens + 1
    return nll / tokens, squared / count, tokens, count


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def draw(objective: str, num_images: int) -> Tensor:
    uniform = torch.rand(num_images, generator=torch.Generator().manual_seed(1))
    return (uniform * 999).long() if objective == "ddpm" else uniform * 1000


def test_losses_equal_the_slow_reference(
    model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor], objective: str
) -> None:
    timesteps = draw(objective, 3)
    noise = torch.randn(batch["latent_patches"].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output = model(**batch, labels=labels_of(batch), timesteps=timesteps, noise=noise)
    text_loss, image_loss, *_ = slow_losses(model, batch, labels_of(batch), timesteps, noise)
    torch.testing.assert_close(output.text_loss.double(), text_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(output.image_loss.double(), image_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(output.loss, output.text_loss + 5.0 * output.image_loss)


def test_losses_with_global_counts_add_up(
    model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor], objective: str
) -> None:
    """Each row alone, divided by the counts of both, sums to the batch: what accumulation and processes need."""
    timesteps = draw(objective, 3)
    noise = torch.randn(batch["latent_patches"].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = model(**batch, labels=labels_of(batch), timesteps=timesteps, noise=noise)
    *_, tokens, elements = slow_losses(model, batch, labels_of(batch), timesteps, noise)
    total = 0.0
    for row, (patches, images) in enumerate([(slice(0, 6), slice(0, 1)), (slice(6, 13), slice(1, 3))]):
        part = model(
            input_ids=batch["input_ids"][row : row + 1],
            attention_mask=batch["attention_mask"][row : row + 1],
            latent_patches=batch["latent_patches"][patches],
            image_grids=batch["image_grids"][images],
            labels=labels_of(batch)[row : row + 1],
            timesteps=timesteps[images],
            noise=noise[patches],
            num_items_in_batch=tokens,
            num_image_items_in_batch=elements // 12,
        )
        total = total + part.loss
    torch.testing.assert_close(total, whole.loss)


def test_skip_logits_changes_no_loss(
    model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor], objective: str
) -> None:
    inputs = {**batch, "labels": labels_of(batch), "timesteps": draw(objective, 3)}
    noise = torch.zeros_like(batch["latent_patches"])
    full, skipped = model(**inputs, noise=noise), model(**inputs, noise=noise, skip_logits=True)
    assert full.logits.shape == (2, batch["input_ids"].shape[1], 100)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, full.loss)


def test_context_images_carry_no_loss(
    model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor], objective: str
) -> None:
    timesteps, mask = draw(objective, 3), torch.tensor([True, False, True])
    noise = torch.randn(batch["latent_patches"].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    other = noise.clone()
    other[6:10] += 1
    inputs = {**batch, "labels": labels_of(batch), "timesteps": timesteps, "image_loss_mask": mask}
    torch.testing.assert_close(model(**inputs, noise=noise).loss, model(**inputs, noise=other).loss)


def test_what_is_absent_is_drawn_and_capped_before_text(
    model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]
) -> None:
    capped = images_without_prior_text(batch["input_ids"], batch["attention_mask"], model.config)
    assert capped.tolist() == [False, True, False]
    torch.manual_seed(0)
    grids = batch["image_grids"]
    draws = torch.stack([model.draw_timesteps(grids, batch["input_ids"], batch["attention_mask"]) for _ in range(500)])
    limit = model.noise_process.noise_limit
    assert draws[:, 1].max() <= limit
    assert (draws[:, [0, 2]] > limit).float().mean() == pytest.approx(0.5, abs=0.1)
    assert draws[:, 1].float().std() > 50  # a cap, no constant
    one, two = (model(**batch, labels=labels_of(batch)).image_loss for _ in range(2))
    assert one != two and torch.isfinite(one)


def test_without_labels_and_timesteps_images_are_context(
    model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]
) -> None:
    output = model(**batch)
    assert output.loss is None and output.image_loss is None and output.image_prediction is None
    zero = torch.zeros(3, dtype=torch.long if model.config.objective == "ddpm" else torch.float32)
    known = model(**batch, timesteps=zero)
    torch.testing.assert_close(known.logits, output.logits)
    assert known.image_prediction.shape == (13, 12) and known.loss is None


def test_text_only_batches_train_every_parameter(model: TransfusionForMultimodalGeneration) -> None:
    batch = make_batch([[5, 6, 7], [8, 9]])
    output = model.train()(**batch, labels=labels_of(batch))
    output.loss.backward()
    assert output.image_loss == 0
    assert all(p.grad is not None for p in model.parameters())


def test_a_batch_without_any_target_has_a_finite_loss(
    model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]
) -> None:
    nothing = torch.full_like(batch["input_ids"], -100)
    no_images = torch.zeros(3, dtype=torch.bool)
    output = model.train()(**batch, labels=nothing, image_loss_mask=no_images)
    output.loss.backward()
    assert output.loss == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padding_side_and_amount_change_nothing(model: TransfusionForMultimodalGeneration) -> None:
    batch = make_batch([[5, (2, 2), 6, 7]])
    length = batch["input_ids"].shape[1]
    pads = torch.zeros(1, 3, dtype=torch.long)
    plain = model(**batch).logits
    right = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], pads], 1),
        "attention_mask": torch.cat([batch["attention_mask"], pads], 1),
    }
    left = {
        **batch,
        "input_ids": torch.cat([pads, batch["input_ids"]], 1),
        "attention_mask": torch.cat([pads, batch["attention_mask"]], 1),
    }
    torch.testing.assert_close(model(**right).logits[:, :length], plain)
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(model(**left, position_ids=positions).logits[:, 3:], plain, atol=1e-6, rtol=1e-6)


def test_eager_equals_sdpa(model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]) -> None:
    fused = model(**batch).logits
    model.set_attn_implementation("eager")
    visible = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[visible], fused[visible], atol=1e-6, rtol=1e-6)


def test_flash_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="[Ff]lash"):
        tiny_model().set_attn_implementation("flash_attention_2")


def test_cache_equals_no_cache_at_any_cut(model: TransfusionForMultimodalGeneration) -> None:
    """Cuts between tokens, never inside an image; also with the whole image in the second part."""
    batch = make_batch([[5, 6, (2, 2), 7, 8, (1, 2), 9]])
    whole = model(**batch).logits
    starts_of_cuts = {2: 0, 3: 0, 7: 4, 9: 4, 13: 6}  # position -> patches before it
    for cut, patches in starts_of_cuts.items():
        parts = []
        cache = None
        for ids, latents in (
            (batch["input_ids"][:, :cut], batch["latent_patches"][:patches]),
            (batch["input_ids"][:, cut:], batch["latent_patches"][patches:]),
        ):
            grids = {4: [[2, 2]], 2: [[1, 2]], 6: [[2, 2], [1, 2]]}.get(len(latents))
            images = {"latent_patches": latents, "image_grids": torch.tensor(grids)} if grids else {}
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, **images)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-6)


def test_images_that_join_a_cache_must_fit_their_placeholders() -> None:
    model = tiny_model()
    cache = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    ids = torch.tensor([[97, 99, 99, 98]])
    with pytest.raises(ValueError, match=r"1 runs of image placeholders, of lengths \[2\].*of \[6\] patches"):
        model(ids, past_key_values=cache, latent_patches=torch.zeros(6, 12), image_grids=torch.tensor([[2, 3]]))


@torch.no_grad()
def test_a_step_with_a_static_cache_compiles_whole() -> None:
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    step = compiled(input_ids=torch.tensor([[8]]), past_key_values=cache, use_cache=True)
    torch.testing.assert_close(step.logits, model(torch.tensor([[5, 6, 7, 8]])).logits[:, -1:], atol=1e-9, rtol=0)


def test_gradient_checkpointing_changes_nothing(batch: dict[str, Tensor]) -> None:
    losses = []
    for enabled in (False, True):
        model = tiny_model(objective="flow").train()
        if enabled:
            model.activation_checkpointing_enable()
        zeros = torch.zeros_like(batch["latent_patches"])
        output = model(**batch, labels=labels_of(batch), timesteps=torch.tensor([1.0, 2.0, 3.0]), noise=zeros)
        output.loss.backward()
        losses.append((output.loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    torch.testing.assert_close(losses[0], losses[1])


def test_is_llama_on_text() -> None:
    """Same names, same numbers: a Llama checkpoint's weights give a Llama's logits."""
    values: dict[str, Any] = dict(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    values |= dict(num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, rms_norm_eps=1e-6)
    llama = LlamaForCausalLM(LlamaConfig(**values)).double().eval()
    model = tiny_model()
    missing, unexpected = model.load_state_dict(llama.state_dict(), strict=False)
    assert not unexpected and all("patch_" in name for name in missing)
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, llama(ids).logits)


def test_is_qwen3_on_text() -> None:
    """With norms on queries and keys, and heads that are wider than the model divided by them."""
    values: dict[str, Any] = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    values |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128)
    qwen = Qwen3ForCausalLM(Qwen3Config(**values, pad_token_id=0, rms_norm_eps=1e-6)).double().eval()
    with torch.no_grad():
        for name, weight in qwen.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    model = tiny_model(qk_norm=True, head_dim=16)
    missing, unexpected = model.load_state_dict(qwen.state_dict(), strict=False)
    assert not unexpected and all("patch_" in name for name in missing)
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, qwen(ids).logits)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_dropout_acts_in_training_alone(batch: dict[str, Tensor], attn_implementation: str) -> None:
    model = tiny_model(attention_dropout=0.5)
    model.set_attn_implementation(attn_implementation)
    plain = tiny_model()
    plain.set_attn_implementation(attn_implementation)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert not torch.allclose(model.train()(**batch).logits, plain(**batch).logits)


def test_logits_of_some_positions(batch: dict[str, Tensor]) -> None:
    model = tiny_model()
    whole = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([4, 1])).logits, whole[:, [4, 1]])


def test_norms_are_taken_in_float32() -> None:
    """Squares of what bfloat16 holds to three digits would be off by a hundredth."""
    x = torch.randn(200, 64).bfloat16()
    norm = TransfusionRMSNorm(64).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(norm(x), exact.bfloat16())


def test_rotary_scores_depend_on_distance_alone() -> None:
    rotary = tiny_model().model.rotary_emb
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for offset in (0, 37):
        cos, sin = rotary(query[0], torch.tensor([[3 + offset]]))
        rotated_query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        cos, sin = rotary(key[0], torch.tensor([[1 + offset]]))
        rotated_key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        scores.append((rotated_query * rotated_key).sum())
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)


def test_qk_norm_makes_attention_blind_to_scale() -> None:
    model = tiny_model(qk_norm=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(7)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


def test_save_and_load_through_auto_model(
    tmp_path: Path, model: TransfusionForMultimodalGeneration, batch: dict[str, Tensor]
) -> None:
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".bin", ".pt", ".pkl")] == []
    again = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert isinstance(again, TransfusionForMultimodalGeneration)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    assert again.generation_config.num_inference_steps == model.generation_config.num_inference_steps


def test_base_model_and_inputs_embeds(batch: dict[str, Tensor]) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.5  # a placeholder is known by its whole embedding
    embeds = model.model.embed_tokens(batch["input_ids"])
    images = {"latent_patches": batch["latent_patches"], "image_grids": batch["image_grids"]}
    by_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **images)
    torch.testing.assert_close(by_embeds.logits, model(**batch).logits)
    base = TransfusionModel(tiny_config())
    with pytest.raises(ValueError, match="latent_patches came without image_grids"):
        base(batch["input_ids"], latent_patches=batch["latent_patches"])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        base()
    outputs = model(**batch, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3


def test_bfloat16_follows_float32(batch: dict[str, Tensor]) -> None:
    model = tiny_model(objective="flow").float()
    batch["latent_patches"] = batch["latent_patches"].float()
    exact = model(**batch).logits
    rough = model.bfloat16()(**batch).logits
    assert F.mse_loss(rough.float(), exact).sqrt() < 0.02 * exact.std() + 0.02


def test_permuting_patches_of_pure_noise_is_seen_with_axial_positions() -> None:
    """Top and bottom differ by more than their distance to the text: each patch knows its row and column."""
    model = tiny_model(objective="flow", axial_positions=True)
    for layer in model.model.layers:  # leave positions to the embedding alone
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    batch = make_batch([[5, (2, 2)]])
    batch["latent_patches"] = batch["latent_patches"][:1].expand(4, -1)
    predictions = model(**batch, timesteps=torch.tensor([500.0])).image_prediction
    assert torch.cdist(predictions, predictions).add(torch.eye(4)).min() > 1e-4
    plain = tiny_model(objective="flow")
    for layer in plain.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    predictions = plain(**batch, timesteps=torch.tensor([500.0])).image_prediction
    assert torch.cdist(predictions, predictions).max() < 1e-12
