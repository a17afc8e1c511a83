"""Options of `generate` and `generate_images`: their defaults, and which of them cannot work when."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig


# (denoising steps, guidance scale) where the caller names none; both stand in the generation config of a checkpoint.
SAMPLING_DEFAULTS = {"ddpm": (50, 3.0), "flow": (30, 3.0)}

GENERATION_MODES = ("text", "image", "interleaved")

# Options that cannot work while images are drawn, with the values that leave them off.
NOT_WHILE_DRAWING: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "past_key_values": (None,),
    "cache_implementation": (None, "dynamic"),
    "use_cache": (None, True),
    "prefill_chunk_size": (None,),
    "inputs_embeds": (None,),
    "position_ids": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "token_healing": (None, False),
    "custom_generate": (None,),
    "synced_gpus": (None, False),
}
# The image mode chooses no token. Lengths and settings of the sampling are not read; what would have to be called for
# each token, or come back for it, is refused.
NOT_FOR_IMAGES = NOT_WHILE_DRAWING | {
    "streamer": (None,),
    "logits_processor": (None,),
    "stopping_criteria": (None,),
    "prefix_allowed_tokens_fn": (None,),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "max_images": (None,),
}

# What stands in every batch of a training. transformers does not read labels here, and the ids say what is a patch.
NOT_READ = ("labels", "mm_token_type_ids")

_PATCHES = "latent_patches and image_grids, which the processor makes of pictures"
_GRIDS = "output_image_grids=(rows, columns) of patches, or a size token at the end of the prompt"
# Arguments of other libraries, and of text guidance, by what stands for them here.
INSTEAD = {
    "callback_on_step_end": "callback, which gets (step, timestep, noisy patches)",
    "height": _GRIDS,
    "image": _PATCHES,
    "image_grid": _GRIDS,
    "image_latents": "latents",
    "image_size": _GRIDS,
    "image_sizes": _PATCHES,
    "images": _PATCHES,
    "negative_prompt": "negative_input_ids",
    "negative_prompt_attention_mask": "negative_attention_mask, as images alone are guided",
    "negative_prompt_ids": "negative_input_ids, as images alone are guided",
    "noise": "latents",
    "num_images_per_prompt": "num_return_sequences",
    "pixel_attention_mask": _PATCHES,
    "pixel_values": _PATCHES,
    "prompt": "input_ids, which the processor makes of texts",
    "seed": "generator=torch.Generator().manual_seed(...)",
    "width": _GRIDS,
}


# What only `forward` reads; a decoding step would be another with them.
OF_FORWARD = ("document_ids", "image_loss_mask", "patch_repeats", "skip_logits", "timesteps")


def refuse_foreign_names(options: dict[str, Any]) -> None:
    """Raise a ValueError where `options` have a name of another library, saying what it is called here, or of
    `forward`.
    """
    if given := [name for name in OF_FORWARD if options.get(name) is not None]:
        raise ValueError(f"{', '.join(given)} can be given to the model's forward alone; leave it out.")
    for name, ours in INSTEAD.items():
        if options.get(name) is not None:
            raise ValueError(f"{name} is unknown to this model's generate; give {ours}.")


def check_count(name: str, value: Any, lowest: int) -> None:
    """Raise a ValueError unless `value` is an integer of `lowest` or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < lowest:
        raise ValueError(f"{name}={value!r}; give an integer of {lowest} or more.")


def refuse_options(mode: str, options: dict[str, Any], refused: dict[str, tuple[Any, ...]]) -> None:
    """Raise a ValueError where `options` switch on what is `refused` in this mode."""
    for name, off in refused.items():
        value = options.get(name)
        if not any(value is allowed or (isinstance(value, int | float | str) and value == allowed) for allowed in off):
            shown = repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__
            raise ValueError(
                f"{name}={shown} cannot draw: generation_mode={mode!r} works without it. Leave it out, or use "
                "generation_mode='text'."
            )


def refuse_forced_tokens(generation_config: GenerationConfig, closed: Sequence[int]) -> None:
    """Raise a ValueError where the options force a token that is never sampled."""
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = getattr(generation_config, name)
        if set(forced if isinstance(forced, list | tuple) else [forced]) & set(closed):
            raise ValueError(
                f"{name}={forced} forces a token of images, which is never sampled here; force another token, or draw "
                "with generation_mode='image' or 'interleaved'."
            )


def check_guidance(scale: Any, interval: Any) -> tuple[float, tuple[float, float]]:
    """The guidance scale and the interval of the schedule in which it works; a ValueError where they are neither."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale={scale!r}; give a finite number, 1 for no guidance.")
    is_pair = isinstance(interval, list | tuple) and len(interval) == 2
    if not is_pair or not all(isinstance(share, numbers.Real) for share in interval):
        raise ValueError(f"guidance_interval={interval!r}; give two shares of the schedule, such as (0.2, 0.8).")
    low, high = map(float, interval)
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"guidance_interval={interval!r}; give (low, high) with 0 <= low <= high <= 1: 0 is clean, 1 is noise."
        )
    return float(scale), (low, high)


__all__ = [
    "GENERATION_MODES",
    "NOT_FOR_IMAGES",
    "NOT_READ",
    "NOT_WHILE_DRAWING",
    "SAMPLING_DEFAULTS",
    "check_count",
    "check_guidance",
    "refuse_forced_tokens",
    "refuse_foreign_names",
    "refuse_options",
]
