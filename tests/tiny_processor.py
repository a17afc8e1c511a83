"""Tiny real parts of a processor: a byte-level tokenizer, the three VAEs, pictures of noise."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transfusion.latents import patchify
from transfusion.processing import TransfusionImageProcessor, TransfusionProcessor


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<eos>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SPECIAL_TOKENS = ["<boi>", "<eoi>", "<image>", "<eos>", "<pad>", "<|im_start|>"]


def tiny_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE: pad 0, eos 1, a chat token 2, bytes, a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a red heart, a blue sky, an <image> of <boi> a heart"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"pad_token": "<pad>", "eos_token": "<eos>", **options}
    )


def tiny_vae(name: str = "AutoencoderKL", **overrides: Any) -> Any:
    """A VAE of random weights: factor 4 and 4 channels, factor 2 and 5, or factor 8 and 8."""
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

    torch.manual_seed(0)
    if name == "AutoencoderKL":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        defaults = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, "shift_factor": 0.3}
        return AutoencoderKL(**{**blocks, **defaults, "scaling_factor": 0.4, **overrides}).eval()
    sizes: dict[str, Any]
    if name == "AutoencoderTiny":
        sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        depth = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 5}
        return AutoencoderTiny(**{**sizes, **depth, "scaling_factor": 0.7, "shift_factor": 0.2, **overrides}).eval()
    sizes = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    depth = {"encoder_layers_per_block": (1,) * 4, "decoder_layers_per_block": (1,) * 4, "latent_channels": 8}
    plain = {"encoder_qkv_multiscales": ((),) * 4, "decoder_qkv_multiscales": ((),) * 4, "attention_head_dim": 4}
    return AutoencoderDC(**{**sizes, **depth, **plain, "scaling_factor": 0.41, **overrides}).eval()


def tiny_processor(vae: Any = None, size: Any = None, patch_size: int = 2, **options: Any) -> TransfusionProcessor:
    """A processor; without a VAE, pixels are its latents. `options` are the tokenizer's."""
    image_processor = TransfusionImageProcessor(size=size, patch_size=patch_size)
    return TransfusionProcessor(image_processor, tiny_tokenizer(**options), vae=vae, chat_template=CHAT_TEMPLATE)


def picture(seed: int = 0, height: int = 4, width: int = 6) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pixel_patches(*pictures: Image.Image) -> Tensor:
    """Patches (P, 12) of pictures whose pixels are the latents, 2 x 2 pixels each."""
    values = [torch.tensor(np.asarray(image).transpose(2, 0, 1) / 127.5 - 1).float() for image in pictures]
    return torch.cat([patchify(value, 2) for value in values])


_PLAIN_TOKENIZER = tiny_tokenizer()


def text_ids(text: str) -> list[int]:
    """Ids of an ordinary text, which are the same for every tiny tokenizer."""
    return _PLAIN_TOKENIZER(text, split_special_tokens=True)["input_ids"]


def text_part(text: str) -> dict[str, Any]:
    """A part of a structured row."""
    return {"type": "text", "text": text}


def image_part(source: Any = None) -> dict[str, Any]:
    """A part of a structured row, with its picture or without."""
    return {"type": "image"} if source is None else {"type": "image", "image": source}
