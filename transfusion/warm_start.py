"""Starting from a pretrained language model of the Llama family: its config, its weights, its place in training.

The result writes as the language model does. Its parameters have the names that transformers gives them, so weights
are copied by name; what a Transfusion model has besides (patch codec, weights of patches, hyper-connections) is new.
"""

import logging
import os
import re
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .configuration import TransfusionConfig


logger = logging.getLogger(__name__)

# Of each family, what its code has fixed and its config does not say.
FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "smollm3": {},
}
# Fields that the weights go with; without head_dim or a kind of bias in their config, ours has the same default.
FIXED = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "rms_norm_eps rope_parameters tie_word_embeddings attention_bias mlp_bias"
).split()
# Fields that are taken over, and may be overridden.
FREE = "max_position_embeddings initializer_range attention_dropout bos_token_id eos_token_id pad_token_id".split()
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
ROPE_TYPES_OF_LENGTH = ("dynamic", "yarn", "longrope")  # their angles depend on max_position_embeddings

TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # one row per token
ROW_NOISE = 0.01
# What a generation config notes about itself, and what is another thing for pictures.
NOT_OF_TEXT = frozenset({"transformers_version", "_from_model_config", "guidance_scale"})
IMAGE_PREFIX = "image_"
PATCH_CODEC = ("patch_encoder", "patch_decoder")


def load_text_model(path_or_model: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
    """The causal language model saved at `path_or_model`, in the dtype it was saved in; a model as it is.

    Raises:
        ValueError: Another family, or a checkpoint whose weights are not exactly those of the model: transformers
            would draw missing ones at random.
        OSError: No checkpoint in safetensors there.
    """
    if isinstance(path_or_model, PreTrainedModel):
        return path_or_model
    _refuse_other_families(AutoConfig.from_pretrained(path_or_model).to_dict())
    text_model, found = AutoModelForCausalLM.from_pretrained(
        path_or_model, use_safetensors=True, output_loading_info=True
    )
    wrong = [f"{kind} {sorted(found[kind])}" for kind in ("missing_keys", "unexpected_keys") if found[kind]]
    if wrong:
        raise ValueError(
            f"{path_or_model} does not hold exactly the weights of a {type(text_model).__name__}: {'; '.join(wrong)}. "
            f"Take a checkpoint that was saved by {type(text_model).__name__}.save_pretrained."
        )
    return text_model


def config_from_text_config(
    text_config: PreTrainedConfig, processor: Any = None, **overrides: Any
) -> TransfusionConfig:
    """The config of a Transfusion model that contains a language model of `text_config`.

    Args:
        text_config: Of a family in `FAMILIES`.
        processor: The `TransfusionProcessor` it will be used with. Its tokens keep their ids: the vocabulary grows to
            the largest of them, if the table (often padded) has no room for them. It also decides latents, patch size
            and the usual size of pictures. Without it, begin-of-image, end-of-image and placeholder, then size
            tokens, come behind the old vocabulary.
        overrides: Other fields of the config; of the language model's those that leave its results as they are.

    Raises:
        ValueError: A language model that ours cannot represent, overrides that would change its results, a processor
            that does not fit the overrides.
    """
    text = text_config.to_dict()
    max_positions = overrides.get("max_position_embeddings", text["max_position_embeddings"])
    _refuse_other_families(text)
    _refuse_other_layers(text, max_positions)
    fixed = {name: text[name] for name in FIXED if name in text} | FAMILIES[text["model_type"]]
    if text["rope_parameters"]["rope_type"] in ROPE_TYPES_OF_LENGTH:
        fixed["max_position_embeddings"] = text["max_position_embeddings"]
    _refuse_changes(fixed, overrides)
    fields = {name: text[name] for name in FREE}
    if (text["pad_token_id"] or 0) < 0:  # old checkpoints have -1 for none
        fields["pad_token_id"] = None
    fields.update(dtype=text_config.dtype, attn_implementation=text_config._attn_implementation)
    fields.update(_image_fields(text["vocab_size"], processor, len(overrides.get("size_token_grids") or ())))
    fields.update({**overrides, **fixed, "rope_parameters": _same_rope(text["rope_parameters"])})
    fields["vocab_size"] = _vocab_size(text["vocab_size"], processor, fields)
    config = TransfusionConfig(**fields)
    if processor is not None:
        processor.check_model(config)
    return config


@torch.no_grad()
def load_text_weights(model: PreTrainedModel, text_model: PreTrainedModel) -> None:
    """Copy the weights and the generation settings of `text_model` into `model`, and start from them what is new.

    New rows of the vocabulary begin at the mean of the old ones (Hewitt 2021, "Initializing new word embeddings for
    pretrained language models"), so that no new token is likelier than the likeliest old one. A hundredth of the old
    rows' spread is added, because a model that is given embeddings knows patches by their placeholder's row. Weights
    of patches (`image_mlp`, ...) begin as copies of those of text (LMFusion, arXiv:2412.15188, section 3).

    What is new is logged at level INFO.

    Args:
        model: A `TransfusionForMultimodalGeneration` of a config from `config_from_text_config`.
        text_model: The language model; its dtype may differ.

    Raises:
        ValueError: A weight of the language model that has no place, or a place of text that has no weight.
    """
    weights = text_model.state_dict()
    parameters = dict(model.named_parameters())
    _check_names(set(model.state_dict()), parameters, weights)
    for name, parameter in parameters.items():
        if name in TABLES:
            fill_rows(parameter, weights[name])
        elif name in weights:
            parameter.copy_(weights[name])
        elif name.endswith("self_attn.o_proj.bias"):  # Qwen2 has biases on q, k and v alone
            parameter.zero_()
    for name, parameter in parameters.items():
        if (twin := text_twin(name)) in parameters:
            parameter.copy_(parameters[twin])
    settings = text_model.generation_config.to_diff_dict()
    model.generation_config.update(**{name: settings[name] for name in settings.keys() - NOT_OF_TEXT})
    new = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in parameters if name not in weights})
    logger.info("From %s; new: %s", type(text_model).__name__, ", ".join(new))


def fill_rows(table: Tensor, rows: Tensor) -> None:
    """Copy `rows` (V, H) into `table` (V + new, H), and begin the new rows at their mean, with a little noise."""
    table[: len(rows)].copy_(rows)
    new = table[len(rows) :]
    if len(new):
        variance, mean = torch.var_mean(rows.to(table.device, torch.float32), dim=0)
        noise = torch.randn(new.shape, device=table.device)
        new.copy_(mean + ROW_NOISE * variance.sqrt() * noise)


def freeze_text_tower(model: PreTrainedModel) -> None:
    """Leave only patch codec and weights of patches to be trained (LMFusion, arXiv:2412.15188, section 3).

    Whatever is trained then, on text alone the model stays the language model it began as, to the bit. Frozen too are
    the rows of the control tokens, which share tables with text: the model draws where it is asked to
    (`generate_images`, the pipeline), but does not learn to begin a picture by itself. Hyper-connections, which text
    runs through, are frozen as well. Saving does not remember any of this: call it again after loading.

    Raises:
        ValueError: `modality_experts` is None, so that every layer would be frozen for patches too.
    """
    if model.config.modality_experts is None:
        raise ValueError(
            "modality_experts=None leaves no layer to patches when text is frozen, only the patch codec: set "
            "modality_experts='all' (or 'ffn'), or freeze_text=False."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_patches(name))


def is_of_patches(name: str) -> bool:
    """Whether text never runs through the parameter of this name."""
    return any(part in PATCH_CODEC or part.startswith(IMAGE_PREFIX) for part in name.split("."))


def text_twin(name: str) -> str | None:
    """The parameter of text beside one of patches: `layers.0.mlp.*` for `layers.0.image_mlp.*`; else None."""
    twin = ".".join(part.removeprefix(IMAGE_PREFIX) for part in name.split("."))
    return None if twin == name else twin


def _refuse_other_families(text: dict[str, Any]) -> None:
    if text["model_type"] not in FAMILIES:
        raise ValueError(
            f"model_type={text['model_type']!r} is another architecture than ours; allowed: {', '.join(FAMILIES)}. "
            "Take a dense decoder of one of these families."
        )
    if text.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config is set: quantized weights are no start for a training. Take the checkpoint in "
            "bfloat16 or float32, or dequantize() the model and save it."
        )


def _refuse_other_layers(text: dict[str, Any], max_positions: int) -> None:
    """Refuse what a model of the right family may do and ours does not, for texts of up to `max_positions`."""
    rope_type = text["rope_parameters"]["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is not allowed; allowed: {', '.join(ROPE_TYPES)}. Take another.")
    if (factor := text["rope_parameters"].get("partial_rotary_factor", 1.0)) != 1:
        raise ValueError(
            f"partial_rotary_factor={factor} is not allowed, our heads turn as a whole (1.0). Take another."
        )
    if text["model_type"] == "smollm3" and not all(text["no_rope_layers"]):
        without = [layer for layer, has_rope in enumerate(text["no_rope_layers"]) if not has_rope]
        raise ValueError(
            f"Layers {without} have no rotary positions (no_rope_layers), which ours have in every layer. Take a "
            "checkpoint without such layers, as SmolLM2's are."
        )
    window = text.get("sliding_window")
    slides = text["model_type"] == "mistral" or "sliding_attention" in text.get("layer_types", ())
    if slides and window is not None and window < max_positions:
        raise ValueError(
            f"sliding_window={window} hides positions from each other among max_position_embeddings={max_positions}, "
            f"and ours has no such window. Give max_position_embeddings={window}, up to which it hides nothing."
        )


def _refuse_changes(fixed: dict[str, Any], overrides: dict[str, Any]) -> None:
    for name in fixed.keys() & overrides.keys():
        if overrides[name] != fixed[name]:
            raise ValueError(
                f"{name}={overrides[name]!r} would change what the language model computes, which needs "
                f"{fixed[name]!r}. Leave it out, or start from a language model that has it."
            )


def _same_rope(rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """The same angles to the last bit.

    Ours are theta ** -x by default, those of language models 1 / theta ** x, an ulp apart for some x; linear scaling
    by 1 is computed in their way.
    """
    if rope_parameters["rope_type"] != "default":
        return dict(rope_parameters)
    return {"rope_type": "linear", "factor": 1.0, "rope_theta": rope_parameters["rope_theta"]}


def _image_fields(old_size: int, processor: Any, num_size_tokens: int) -> dict[str, Any]:
    """Control tokens, and what else the processor knows; without one, ids that follow on `old_size`."""
    if processor is None:
        ids = {"boi_token_id": old_size, "eoi_token_id": old_size + 1, "image_token_id": old_size + 2}
        size_token_ids = list(range(old_size + 3, old_size + 3 + num_size_tokens))
        return {**ids, "size_token_ids": size_token_ids} if size_token_ids else ids
    fields: dict[str, Any] = {
        "boi_token_id": processor.boi_token_id,
        "eoi_token_id": processor.eoi_token_id,
        "image_token_id": processor.image_token_id,
        "size_token_grids": processor.size_token_grids,
        "size_token_ids": processor.size_token_ids,
        "latent_channels": processor.latent_channels,
        "patch_size": processor.image_processor.patch_size,
    }
    if (size := processor.image_processor.size) is not None:
        block = processor.image_processor.block
        fields["default_image_grid"] = (size["height"] // block, size["width"] // block)
    return fields


def _vocab_size(old_size: int, processor: Any, fields: dict[str, Any]) -> int:
    """As many rows as text, tokenizer and control tokens need, or the more that `fields` ask for."""
    ids = [
        fields["boi_token_id"],
        fields["eoi_token_id"],
        fields["image_token_id"],
        *(fields.get("size_token_ids") or ()),
    ]
    needed = max(old_size, max(ids) + 1, 0 if processor is None else len(processor.tokenizer))
    vocab_size = fields.get("vocab_size", needed)
    if vocab_size < needed:
        raise ValueError(f"vocab_size={vocab_size} is too small; text and control tokens need {needed} or more.")
    return vocab_size


def _check_names(places: set[str], parameters: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    unused = sorted(weights.keys() - places)
    empty = sorted(
        name
        for name in parameters.keys() - weights.keys()
        if not is_of_patches(name) and "_connection." not in name and not name.endswith("self_attn.o_proj.bias")
    )
    wrong = [f"weights without a place: {unused}"] * bool(unused) + [f"places without a weight: {empty}"] * bool(empty)
    for name in parameters.keys() & weights.keys():
        shape, place = weights[name].shape, parameters[name].shape
        if shape[1:] != place[1:] or (shape[0] > place[0] if name in TABLES else shape[0] != place[0]):
            wrong.append(f"{name} is {tuple(shape)}, its place {tuple(place)}")
    if wrong:
        raise ValueError(
            f"The language model does not fit: {'; '.join(wrong)}. Give a causal language model, with its head, and "
            "the config that config_from_text_config makes for it."
        )


__all__ = ["config_from_text_config", "freeze_text_tower", "load_text_model", "load_text_weights"]
