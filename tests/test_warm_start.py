"""Warm starts from small language models of every family, their weights random so that a missed one shows."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from tests.tiny_processor import picture, tiny_processor
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration
from transfusion.warm_start import (
    config_from_text_config,
    fill_rows,
    load_text_model,
    load_text_weights,
)


from_text_model = TransfusionForMultimodalGeneration.from_text_model

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [2.0] * 8, "factor": 4.0}
TEXT_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama_tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama_one_key_head_per_query": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama_biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "head_dim": 32}),
    "llama_llama3": (LlamaConfig, {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "llama_linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama_dynamic": (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama_longrope": (LlamaConfig, {"rope_parameters": {**LONG, "original_max_position_embeddings": 16}}),
    "qwen2": (Qwen2Config, {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "qwen2_yarn": (
        Qwen2Config,
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 1, 1], "tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral_wide_window": (MistralConfig, {"sliding_window": 128}),
}
EXPERTS = ("ffn", "all")


def make_text_config(kind: str, **overrides: Any) -> PreTrainedConfig:
    config_class, values = TEXT_CONFIGS[kind]
    values = {**SIZES, **values, **overrides}
    if "rope_parameters" in values:
        values["rope_parameters"] = {"rope_theta": 10000.0, **values["rope_parameters"]}
    return config_class(**values)


def make_text_model(kind: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A language model whose every weight, norms and biases included, is random."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(make_text_config(kind, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_ids(rows: int = 2, length: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same_results(model: Any, text_model: Any, input_ids: Tensor, **inputs: Any) -> None:
    ours = model(input_ids=input_ids, output_hidden_states=True, **inputs)
    theirs = text_model(input_ids=input_ids, output_hidden_states=True, **inputs)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == text_model.config.num_hidden_layers + 1
    for layer, (our, their) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert our.dtype == their.dtype
        if our.dim() == 4:  # residual streams, each of which is the plain one
            their = their[:, :, None].expand_as(our)
        assert torch.equal(our, their), f"layer {layer} differs by {(our - their).abs().max()}"
    torch.testing.assert_close(ours.logits[..., : theirs.logits.shape[-1]], theirs.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TEXT_CONFIGS)
def test_on_text_the_model_is_the_language_model(kind: str, attention: str, tmp_path: Path) -> None:
    make_text_model(kind).save_pretrained(tmp_path)
    text_model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    model = from_text_model(tmp_path, attn_implementation=attention)
    assert model.config._attn_implementation == text_model.config._attn_implementation == attention
    assert_same_results(model, text_model, make_ids())
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[0, 12:] = 0
    assert_same_results(model, text_model, make_ids(), attention_mask=padding)


@pytest.mark.parametrize("kind", ["llama_dynamic", "llama_longrope", "qwen2_yarn", "llama"])
def test_so_it_is_on_texts_longer_than_the_training(kind: str) -> None:
    text_model = make_text_model(kind)
    assert_same_results(from_text_model(text_model), text_model, make_ids(1, 160))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "smollm3"])
def test_greedy_text_is_the_language_models(kind: str) -> None:
    text_model = make_text_model(kind)
    prompt, settings = make_ids(1, 6), {"max_new_tokens": 24, "do_sample": False}
    expected = text_model.generate(prompt, **settings)
    assert expected.shape[1] > 10
    assert torch.equal(from_text_model(text_model).generate(input_ids=prompt, **settings), expected)


def test_writing_keeps_the_settings_of_the_checkpoint(tmp_path: Path) -> None:
    text_model = make_text_model()
    text_model.generation_config.update(eos_token_id=[2, 5], do_sample=True, temperature=0.7, guidance_scale=1.5)
    text_model.save_pretrained(tmp_path)
    settings = from_text_model(tmp_path, objective="flow").generation_config
    assert (settings.eos_token_id, settings.do_sample, settings.temperature) == ([2, 5], True, 0.7)
    plain = TransfusionForMultimodalGeneration.default_generation_config(from_text_model(text_model).config)
    assert settings.guidance_scale == plain.guidance_scale != 1.5


def test_a_bfloat16_checkpoint_stays_one_unless_told_otherwise(tmp_path: Path) -> None:
    text_model = make_text_model("qwen3").to(torch.bfloat16)
    text_model.save_pretrained(tmp_path)
    text_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = from_text_model(tmp_path)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        ours = model(input_ids=make_ids(), output_hidden_states=True).hidden_states
        theirs = text_model(input_ids=make_ids(), output_hidden_states=True).hidden_states
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))
    wide = from_text_model(tmp_path, dtype="float32")
    assert wide.dtype == torch.float32 == wide.config.dtype
    assert torch.equal(wide.model.norm.weight, text_model.model.norm.weight.float())


def test_a_model_that_was_cast_keeps_its_dtype() -> None:
    """Though its config names the dtype it was made in."""
    text_model = make_text_model().to(torch.bfloat16)
    model = from_text_model(text_model)
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert torch.equal(model.model.norm.weight, text_model.model.norm.weight)


def test_manifold_connections_begin_as_the_language_model_but_for_rounding() -> None:
    text_model = make_text_model("qwen3")
    model = from_text_model(text_model, num_residual_streams=4, hyper_connections="manifold")
    with torch.no_grad():
        ours, theirs = model(input_ids=make_ids()).logits, text_model(make_ids()).logits
    torch.testing.assert_close(ours[..., :97], theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"patch_codec": "unet", "axial_positions": True, "image_rope": "2d"},
        {"num_residual_streams": 2},
        {"num_residual_streams": 4, "hyper_connections": "static", "modality_experts": "ffn"},
        {"modality_experts": "all", "objective": "flow", "image_attention": "causal"},
    ],
)
def test_no_option_for_images_touches_text_and_saving_keeps_all(
    kind: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    text_model = make_text_model(kind)
    model = from_text_model(text_model, **overrides)
    assert_same_results(model, text_model, make_ids())
    model.save_pretrained(tmp_path)
    loaded = TransfusionForMultimodalGeneration.from_pretrained(tmp_path)
    assert_same_results(loaded, text_model, make_ids())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    inputs = picture_inputs(model)
    torch.testing.assert_close(loaded(**inputs).image_prediction, model(**inputs).image_prediction)


def picture_inputs(model: TransfusionForMultimodalGeneration, seed: int = 0) -> dict[str, Tensor]:
    """Text, a picture of 2 x 2 patches, text, with labels."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    ids = [1, 5, 6, config.boi_token_id, *[config.image_token_id] * 4, config.eoi_token_id, 7, 8, 2]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([ids]),
        "latent_patches": torch.randn(4, config.patch_dim, generator=generator),
        "image_grids": torch.tensor([[2, 2]]),
        "noise": torch.randn(4, config.patch_dim, generator=generator),
        "timesteps": torch.tensor([300]),
    }


@pytest.mark.parametrize("experts", EXPERTS)
def test_weights_of_patches_begin_as_those_of_text(experts: str) -> None:
    """So with experts a picture is read just as without them."""
    text_model = make_text_model("qwen3", attention_bias=True)
    plain, split = (from_text_model(text_model, modality_experts=value) for value in (None, experts))
    plain_names = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in split.named_parameters():
            parameter.copy_(plain_names.get(name, parameter))  # codec and new rows, which are random
    ours, theirs = split(**picture_inputs(split)), plain(**picture_inputs(plain))
    torch.testing.assert_close(ours.image_prediction, theirs.image_prediction)
    torch.testing.assert_close(ours.logits, theirs.logits)
    twins = {name for name in dict(split.named_parameters()) if name not in plain_names}
    assert len(twins) == (3 * 4 if experts == "ffn" else 3 * (3 + 2 + 8 + 2) + 1)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_grows_by_rows_near_the_mean(tied: bool) -> None:
    text_model = make_text_model(tie_word_embeddings=tied)
    model = from_text_model(text_model, size_token_grids=[(2, 2), (2, 3)])
    config = model.config
    assert (config.boi_token_id, config.eoi_token_id, config.image_token_id) == (97, 98, 99)
    assert config.size_token_ids == [100, 101] and config.vocab_size == 102
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    tables = [(model.model.embed_tokens, text_model.model.embed_tokens), (model.lm_head, text_model.lm_head)]
    for ours, theirs in tables:
        rows, new = theirs.weight, ours.weight[97:]
        assert torch.equal(ours.weight[:97], rows)
        distance = (new - rows.mean(0)).square().sum(1)
        spread = (rows - rows.mean(0)).square().sum(1).mean()
        assert (distance < 0.02**2 * spread).all() and (distance > 0).all()
        assert len(new.unique(dim=0)) == 5


def test_no_new_token_is_likelier_than_the_likeliest_old_one() -> None:
    model = from_text_model(make_text_model())
    logits = model(input_ids=make_ids(8, 40)).logits
    assert (logits[..., 97:].amax(-1) < logits[..., :97].amax(-1)).all()


def test_patches_are_found_by_the_row_of_their_placeholder_alone() -> None:
    model = from_text_model(make_text_model())
    input_ids = picture_inputs(model)["input_ids"]
    embeddings = model.model.embed_tokens(input_ids)
    assert torch.equal(model.model.get_image_mask(None, embeddings), input_ids == model.config.image_token_id)


def test_rows_are_filled_in_half_precision_without_losing_the_mean() -> None:
    rows = (3 + torch.randn(4000, 8)).bfloat16()
    table = torch.empty(4003, 8, dtype=torch.bfloat16)
    fill_rows(table, rows)
    torch.testing.assert_close(table[4000:].float().mean(0), rows.float().mean(0), atol=0.05, rtol=0)


@pytest.mark.parametrize("has_room", [True, False])
def test_the_processors_tokens_keep_their_ids(has_room: bool) -> None:
    processor = tiny_processor(size=8)
    old_size = 512 if has_room else processor.boi_token_id
    text_model = make_text_model("qwen2", vocab_size=old_size)
    model = from_text_model(text_model, processor, patch_codec="unet")
    processor.check_model(model.config)
    assert model.config.vocab_size == (512 if has_room else len(processor.tokenizer))
    assert model.config.default_image_grid == (4, 4)
    assert_same_results(model, text_model, make_ids())
    if has_room:
        assert torch.equal(model.model.embed_tokens.weight, text_model.model.embed_tokens.weight)
    out = model(
        **processor(text="a red <image>", images=[picture(height=8, width=8)], return_labels=True, return_tensors="pt")
    )
    out.loss.backward()
    assert out.loss.isfinite()


def test_the_processors_size_tokens_come_along() -> None:
    processor = tiny_processor()
    sized = type(processor)(processor.image_processor, processor.tokenizer, size_token_grids=[(2, 3), (4, 4)])
    config = config_from_text_config(make_text_config("llama", vocab_size=287), sized)
    assert config.boi_token_for((2, 3)) == sized.boi_token_for((2, 3)) != config.boi_token_id
    assert config.vocab_size == len(sized.tokenizer) > 287


def test_a_processor_that_contradicts_the_overrides_is_refused() -> None:
    with pytest.raises(ValueError, match="patch_size is 4 in the config and 2 in the processor"):
        config_from_text_config(make_text_config("llama"), tiny_processor(), patch_size=4)


def test_vocab_size_may_be_rounded_up_but_not_down() -> None:
    assert config_from_text_config(make_text_config("llama"), vocab_size=128).boi_token_id == 97
    with pytest.raises(ValueError, match="vocab_size=99 is too small.*need 100"):
        config_from_text_config(make_text_config("llama"), vocab_size=99)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_a_frozen_text_tower_stays_the_language_model_while_images_are_learned(kind: str, experts: str) -> None:
    text_model = make_text_model(kind)
    model = from_text_model(text_model, freeze_text=True, modality_experts=experts, num_residual_streams=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(input_ids=make_ids()).logits
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        model(**picture_inputs(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_results(model, text_model, make_ids())
    with torch.no_grad():
        assert torch.equal(model(input_ids=make_ids()).logits, logits)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {name for name in before if "image_" in name or "patch_" in name}
    # The last layer's patches are read by nothing but the patch decoder, so all of its weights learn too.
    assert moved == expected


def test_a_frozen_text_tower_needs_weights_for_patches() -> None:
    with pytest.raises(ValueError, match="modality_experts=None leaves no layer to patches"):
        from_text_model(make_text_model(), freeze_text=True)


REFUSALS: list[tuple[PreTrainedConfig, str]] = [
    (Gemma2Config(), "model_type='gemma2'.*allowed: llama"),
    (Qwen3MoeConfig(), "model_type='qwen3_moe'"),
    (SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}), r"Layers \[3\] have no rotary positions"),
    (MistralConfig(**{**SIZES, "sliding_window": 64}), "sliding_window=64.*Give max_position_embeddings=64"),
    (
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=1),
        "sliding_window=32.*max_position_embeddings=128",
    ),
    (
        LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        ),
        "partial_rotary_factor=0.5",
    ),
    (LlamaConfig(**SIZES, quantization_config={"quant_method": "awq"}), "quantization_config is set"),
]


@pytest.mark.parametrize(("text_config", "message"), REFUSALS)
def test_what_ours_cannot_represent_is_refused(text_config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_text_config(text_config)


def test_a_window_longer_than_the_texts_hides_nothing() -> None:
    text_model = make_text_model("mistral", sliding_window=64)
    assert_same_results(from_text_model(text_model, max_position_embeddings=64), text_model, make_ids(2, 64))
    unused = Qwen2Config(**SIZES, sliding_window=16, use_sliding_window=False)
    assert config_from_text_config(unused).max_position_embeddings == 128


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("llama", {"num_hidden_layers": 2}, "num_hidden_layers=2 would change.*needs 3"),
        ("llama", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("qwen3", {"qk_norm": False}, "qk_norm=False"),
        ("llama_tied", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("llama_dynamic", {"max_position_embeddings": 256}, "max_position_embeddings=256"),
        ("llama", {"modality_expert": "all"}, "did you mean modality_experts"),
    ],
)
def test_overrides_that_change_the_language_model_are_refused(
    kind: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_text_config(make_text_config(kind), **overrides)


def test_overrides_that_agree_or_are_free_are_taken() -> None:
    config = config_from_text_config(
        make_text_config("llama"),
        hidden_size=64,
        max_position_embeddings=256,
        attention_dropout=0.1,
        bos_token_id=None,
    )
    assert (config.max_position_embeddings, config.attention_dropout, config.bos_token_id) == (256, 0.1, None)


def test_old_checkpoints_say_minus_one_for_no_padding() -> None:
    assert config_from_text_config(make_text_config("llama", pad_token_id=-1)).pad_token_id is None


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    """Where transformers would draw one at random."""
    make_text_model().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing_keys \['lm_head.weight'\]"):
        from_text_model(tmp_path)
    with pytest.raises(ValueError, match="weights without a place: .*'embed_tokens.weight'"):
        from_text_model(make_text_model().model)


def test_a_model_of_another_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    Gemma2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='gemma2'"):
        load_text_model(tmp_path)


def test_weights_and_places_must_match() -> None:
    text_model = make_text_model("qwen3")
    smaller = config_from_text_config(make_text_config("qwen3", intermediate_size=80))
    with pytest.raises(ValueError, match=r"gate_proj.weight is \(96, 64\), its place \(80, 64\)"):
        load_text_weights(TransfusionForMultimodalGeneration(smaller), text_model)
    llama = TransfusionForMultimodalGeneration(config_from_text_config(make_text_config("llama", head_dim=32)))
    with pytest.raises(ValueError, match="weights without a place: .*'model.layers.0.self_attn.k_norm.weight'"):
        load_text_weights(llama, text_model)
    qwen3 = TransfusionForMultimodalGeneration(config_from_text_config(make_text_config("qwen3")))
    with pytest.raises(ValueError, match="places without a weight: .*'model.layers.0.self_attn.k_norm.weight'"):
        load_text_weights(qwen3, make_text_model("llama", head_dim=32))


def test_what_is_new_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="transfusion.warm_start"):
        from_text_model(make_text_model("qwen2"), modality_experts="ffn")
    assert "From Qwen2ForCausalLM; new:" in caplog.text
    for name in ("model.layers.*.image_mlp.up_proj.weight", "model.layers.*.self_attn.o_proj.bias", "patch_decoder."):
        assert name in caplog.text
    assert "q_proj" not in caplog.text
