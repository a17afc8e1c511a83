import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from transfusion import TransfusionModel
from transfusion.configuration import PAPER_UNET_CHANNELS, PRESETS, TransfusionConfig
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration


PAPER_SIZES = {"0.16b": 0.16e9, "0.37b": 0.37e9, "0.76b": 0.76e9, "1.4b": 1.4e9, "7b": 7e9}


def count_parameters(config: TransfusionConfig) -> int:
    with torch.device("meta"):
        model = TransfusionForMultimodalGeneration(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_presets_have_the_papers_parameter_counts(name: str) -> None:
    config = TransfusionConfig.from_preset(name)
    total = count_parameters(config)
    assert total == pytest.approx(PAPER_SIZES[name], rel=0.04)
    assert config.intermediate_size is not None
    width, ffn, layers, vocabulary = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.vocab_size,
    )
    transformer = layers * (4 * width**2 + 3 * width * ffn + 2 * width) + width + 2 * vocabulary * width
    codec = (config.patch_dim + 1) * width + (width + 1) * config.patch_dim + (256 + 1) * width + (width + 1) * width
    assert total == transformer + codec
    # Table 7: the linear codec adds 0.3 to 0.5 %.
    assert 0.3 <= round(100 * codec / transformer, 1) <= 0.5


def test_demo_preset_is_small_and_takes_overrides() -> None:
    config = TransfusionConfig.from_preset("demo", num_hidden_layers=1, objective="ddpm")
    assert (config.num_hidden_layers, config.objective) == (1, "ddpm")
    assert count_parameters(TransfusionConfig.from_preset("demo")) < 20e6


def test_the_defaults_are_the_papers() -> None:
    config = TransfusionConfig()
    assert (config.objective, config.image_loss_weight, config.num_train_timesteps) == ("ddpm", 5.0, 1000)
    assert (config.latent_channels, config.patch_size, config.default_image_grid) == (8, 2, (16, 16))
    assert config.patch_dim == 32
    assert [config.boi_token_id, config.eoi_token_id, config.image_token_id] == [32000, 32001, 32002]


def test_round_trip_through_json(tmp_path: Path) -> None:
    config = TransfusionConfig.from_preset(
        "demo", timestep_shift=2.0, rope_parameters={"rope_type": "default", "rope_theta": 5e4}
    )
    config.save_pretrained(tmp_path)
    again = TransfusionConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.default_image_grid == config.default_image_grid
    assert again.rope_parameters["rope_theta"] == 5e4


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"objective": "score"}, ["objective", "'score'", "'ddpm'", "'flow'"]),
    ({"timestep_density": "beta"}, ["timestep_density", "'beta'", "'logit_normal'"]),
    ({"hidden_size": "64"}, ["hidden_size", "'64'", "positive integer"]),
    ({"hidden_size": 0}, ["hidden_size=0"]),
    ({"num_attention_heads": 5}, ["hidden_size=768", "multiple of num_attention_heads (5)"]),
    ({"num_key_value_heads": 5}, ["num_key_value_heads=5", "divisor of num_attention_heads (12)"]),
    ({"head_dim": 63}, ["head_dim=63", "even"]),
    ({"image_loss_weight": math.nan}, ["image_loss_weight=nan", "finite"]),
    ({"image_loss_weight": -1}, ["image_loss_weight=-1", "0 or more"]),
    ({"attention_dropout": 1.0}, ["attention_dropout=1.0"]),
    ({"timestep_std": 0}, ["timestep_std=0", "above 0"]),
    ({"qk_norm": 1}, ["qk_norm=1", "True or False"]),
    ({"patch_size": True}, ["patch_size=True"]),
    ({"boi_token_id": 32003}, ["boi_token_id=32003", "below vocab_size (32003)"]),
    ({"boi_token_id": 5, "eoi_token_id": 5}, ["three different ids"]),
    ({"pad_token_id": 32003}, ["pad_token_id=32003", "below vocab_size (32003)"]),
    ({"default_image_grid": (100, 100)}, ["(100, 100)", "10002", "4096"]),
    ({"default_image_grid": (4,)}, ["default_image_grid=(4,)", "(rows, columns)"]),
    ({"patch_codec": "conv"}, ["patch_codec='conv'", "'linear'", "'unet'"]),
    ({"patch_codec": "unet", "patch_size": 3}, ["patch_size=3", "power of two"]),
    ({"patch_codec": "unet", "unet_channels": (32,)}, ["unet_channels=(32,)", "2 positive integers", "patch_size=2"]),
    ({"image_rope": 2}, ["image_rope=2", "'2d'"]),
    ({"image_attention": "full"}, ["image_attention='full'", "'causal'"]),
    ({"num_residual_streams": 0}, ["num_residual_streams=0", "positive integer"]),
    ({"hyper_connections": "deep"}, ["hyper_connections='deep'", "'static'"]),
    ({"modality_experts": "mlp"}, ["modality_experts='mlp'", "None", "'ffn'", "'all'"]),
    ({"noise_limit": 0}, ["noise_limit=0", "above 0"]),
    ({"size_token_grids": [(2, 2)]}, ["size_token_grids=[(2, 2)]", "one length"]),
    ({"size_token_grids": [(2, 2), [2, 2]], "size_token_ids": [5, 6]}, ["no grid twice"]),
    ({"size_token_grids": [(70, 70)], "size_token_ids": [5]}, ["(70, 70)", "4094"]),
    ({"size_token_grids": [(2, 2)], "size_token_ids": [32000]}, ["size_token_ids=[32000]", "different ids"]),
    ({"patch_codec": "unet", "unet_channels": 256}, ["unet_channels=256", "list of positive integers"]),
    ({"unet_channels": (32, 64)}, ["unet_channels=(32, 64)", "patch_codec is 'unet'"]),
    ({"size_token_grids": (4, 4), "size_token_ids": [5, 6]}, ["size_token_grids=(4, 4)", "(rows, columns)"]),
    ({"size_token_grids": [(4, 4)], "size_token_ids": [[5]]}, ["size_token_ids=[[5]]", "list of ids"]),
    ({"size_token_grids": [(4, 4)], "size_token_ids": [2]}, ["size_token_ids=[2]", "none of"]),
    ({"boi_token_id": 2}, ["boi_token_id", "none of the ids that begin, end or pad texts: [2]"]),
    ({"hidden_act": "foo"}, ["hidden_act='foo'", "'gelu' or", "'silu'"]),
    ({"hiden_size": 64}, ["hiden_size=64", "did you mean hidden_size"]),
    ({"completely_unknown": 1}, ["completely_unknown=1", "not a field"]),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[next(iter(values)) for values, _ in REFUSED])
def test_refuses_bad_values_at_construction(values: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        TransfusionConfig(**values)
    for word in words:
        assert word in str(error.value)


def test_refuses_bad_values_on_load_and_on_save(tmp_path: Path) -> None:
    config = TransfusionConfig()
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "objective": "score"}))
    with pytest.raises(ValueError, match="objective='score'"):
        TransfusionConfig.from_pretrained(tmp_path)
    config.patch_size = -1
    with pytest.raises(ValueError, match="patch_size=-1"):
        config.save_pretrained(tmp_path)


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(ValueError, match="'8b'; allowed: 0.16b"):
        TransfusionConfig.from_preset("8b")
    assert set(PRESETS) == {*PAPER_SIZES, "demo"}


def test_a_short_context_takes_a_smaller_default_grid() -> None:
    assert TransfusionConfig(max_position_embeddings=20).default_image_grid == (4, 4)


def test_grids_are_the_same_after_a_round_trip(tmp_path: Path) -> None:
    grids: list[Any] = [(2, 3), [4, 4]]
    config = TransfusionConfig(size_token_grids=grids, size_token_ids=[7, 8], default_image_grid=[2, 3])
    config.save_pretrained(tmp_path)
    again = TransfusionConfig.from_pretrained(tmp_path)
    assert config.size_token_grids == again.size_token_grids == [(2, 3), (4, 4)]
    assert {**again.to_dict(), "transformers_version": None} == {**config.to_dict(), "transformers_version": None}


def test_size_tokens_name_a_grid_and_back() -> None:
    config = TransfusionConfig(size_token_grids=[(2, 3), (4, 4)], size_token_ids=[7, 8])
    boi = config.boi_token_ids[0]
    assert config.boi_token_ids == (boi, 7, 8)
    assert [config.boi_token_for(grid) for grid in ((2, 3), (4, 4), (3, 2))] == [7, 8, boi]
    assert [config.grid_of_boi(token) for token in (7, 8, boi, 9)] == [(2, 3), (4, 4), None, None]
    again = TransfusionConfig.from_dict(json.loads(config.to_json_string()))
    assert again.boi_token_for((4, 4)) == 8 and again.grid_of_boi(7) == (2, 3)


def test_unet_widths_are_small_by_default_and_the_papers_in_its_presets() -> None:
    assert TransfusionConfig(
        patch_codec="unet", hidden_size=256, num_attention_heads=4, patch_size=4
    ).unet_channels == (
        32,
        64,
        128,
    )
    assert TransfusionConfig(patch_codec="linear").unet_channels is None
    with pytest.raises(ValueError, match="patch_size=16 is none of the paper's"):
        TransfusionConfig.from_preset("7b", patch_codec="unet", patch_size=16)
    for patch_size, widths in PAPER_UNET_CHANNELS.items():
        config = TransfusionConfig.from_preset("7b", patch_codec="unet", patch_size=patch_size)
        assert config.unet_channels == widths


@pytest.mark.parametrize("kind", [None, "ffn", "all"])
def test_every_projection_of_a_layer_has_a_tensor_parallel_rule_and_every_rule_a_projection(kind: str | None) -> None:
    config = TransfusionConfig(modality_experts=kind, num_residual_streams=2)
    with torch.device("meta"):
        layer = TransfusionModel(config).layers[0]
    projections = {f"layers.*.{name}" for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(config.base_model_tp_plan) == projections
    assert "tp_plan" not in config.to_json_string()


def test_a_field_named_at_loading_is_there_when_the_others_follow(tmp_path: Path) -> None:
    """As if the config had been made with it: what depends on it is filled in and checked."""
    TransfusionConfig(qk_norm=True).save_pretrained(tmp_path)
    loaded = TransfusionConfig.from_pretrained(tmp_path, patch_codec="unet", modality_experts="all")
    made = TransfusionConfig(qk_norm=True, patch_codec="unet", modality_experts="all")
    assert loaded.unet_channels == made.unet_channels is not None
    assert loaded.base_model_tp_plan == made.base_model_tp_plan
    with pytest.raises(ValueError, match="num_key_value_heads=5"):
        TransfusionConfig.from_pretrained(tmp_path, num_key_value_heads=5)


def test_what_is_saved_can_be_loaded(tmp_path: Path) -> None:
    """An attribute that is no field may be set, but stays behind: a load would refuse it."""
    config = TransfusionConfig()
    config.hidden_size = 1536
    config.layer_norm_eps = 1.0
    config.save_pretrained(tmp_path)
    loaded = TransfusionConfig.from_pretrained(tmp_path)
    assert loaded.hidden_size == 1536 and not hasattr(loaded, "layer_norm_eps")


def test_a_newer_version_s_fields_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TransfusionConfig(qk_norm=True).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "new_field": 1}))
    for kind in (TransfusionConfig, AutoConfig):
        caplog.clear()
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.to_diff_dict() == TransfusionConfig(qk_norm=True).to_diff_dict()
        assert "The config holds new_field, which is no field of TransfusionConfig" in caplog.text


def test_a_grid_that_nobody_named_follows_the_positions(tmp_path: Path) -> None:
    values = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = TransfusionConfig(**values, max_position_embeddings=128)
    config.max_position_embeddings = 38
    config.save_pretrained(tmp_path)
    assert TransfusionConfig.from_pretrained(tmp_path).default_image_grid == (6, 6)
    named = TransfusionConfig(**values, max_position_embeddings=128, default_image_grid=(11, 11))
    named.max_position_embeddings = 38
    with pytest.raises(ValueError, match=r"default_image_grid=\(11, 11\) takes 123 positions"):
        named.save_pretrained(tmp_path)
