# trf-ignore: TRF028 - the licence of all files stands in LICENSE.
"""The Transfusion model: one Llama-style transformer over text tokens and image patches (arXiv:2408.11039).

Shapes: B rows, L positions, V vocabulary, H hidden_size, N images of the whole batch in reading order,
P patches of all of them, D = latent_channels * patch_size**2.
"""

import os
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import AttentionMask, segmented_attention_forward, transfusion_mask
from .configuration import TransfusionConfig
from .diffusion import NoiseProcess, noise_process_of
from .experts import Modalities, by_modality, find_modalities
from .generation import TransfusionGenerationMixin
from .hyper_connections import add_branch, expand_streams, make_connection, reduce_streams
from .inputs import check_documents, check_inputs, images_without_prior_text, learned_labels, refuse_pictures
from .latents import count_positions, patch_places
from .losses import UNLEARNED, mean_cross_entropy, noise_images
from .outputs import TransfusionModelOutput, TransfusionOutput
from .patch_codec import make_patch_decoder, make_patch_encoder
from .positions import TransfusionRotaryEmbedding, apply_rotary_pos_emb, packed_documents, patch_position_ids
from .sharing import SharedModel
from .warm_start import config_from_text_config, freeze_text_tower, load_text_model, load_text_weights


# mlinter, transformers' linter of model files: these fields are options of every config, of no particular checkpoint.
# trf-ignore: TRF041 qk_norm modality_experts image_attention image_rope
# And TRF057 is ignored below, as these docstrings are written, while @auto_docstring generates them.


@use_kernel_forward_from_hub("RMSNorm")
class TransfusionRMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis of `hidden_states` (..., H)."""
        dtype = hidden_states.dtype
        if dtype.itemsize >= 4 and dtype == self.weight.dtype:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        wide = hidden_states.to(torch.promote_types(dtype, torch.float32))
        normed = F.rms_norm(wide, self.weight.shape, eps=self.variance_epsilon)
        return self.weight * normed.to(dtype)

    def extra_repr(self) -> str:
        """Show shape and eps in the model's repr."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def repeat_kv(states: Tensor, groups: int) -> Tensor:
    """Repeat key or value heads (B, kv_heads, L, head_dim) for the query heads that share them."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    """Attention written out: the reference of the fused kernels, and the one that returns its weights."""
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class TransfusionAttention(nn.Module):
    """Grouped-query attention with rotary positions; `image_` projections and norms are those of patches, if any."""

    def __init__(self, config: TransfusionConfig, layer_idx: int) -> None:
        super().__init__()
        # trf-ignore: TRF027 - for type checkers; the config fills them in
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.qk_norm = config.qk_norm
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = TransfusionRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = TransfusionRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.image_q_proj = self.image_k_proj = self.image_v_proj = self.image_o_proj = None
        self.image_q_norm = self.image_k_norm = None
        if config.modality_experts == "all":
            self.image_q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
            self.image_k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
            self.image_v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
            self.image_o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
            if config.qk_norm:
                self.image_q_norm = TransfusionRMSNorm(self.head_dim, eps=config.rms_norm_eps)
                self.image_k_norm = TransfusionRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: AttentionMask = None,
        past_key_values: Cache | None = None,
        modalities: Modalities | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `hidden_states` (B, L, H) to themselves and to the cache."""
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = by_modality(hidden_states, modalities, self.q_proj, self.image_q_proj).view(head_shape)
        key = by_modality(hidden_states, modalities, self.k_proj, self.image_k_proj).view(head_shape)
        value = by_modality(hidden_states, modalities, self.v_proj, self.image_v_proj).view(head_shape).transpose(1, 2)
        if self.qk_norm:
            query = by_modality(query, modalities, self.q_norm, self.image_q_norm)
            key = by_modality(key, modalities, self.k_norm, self.image_k_norm)
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        if past_key_values is not None:
            if torch.compiler.is_compiling() and hasattr(past_key_values, "append"):
                key, value = past_key_values.append(key, value, self)
            else:
                key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = segmented_attention_forward
        if not hasattr(attention_mask, "segments"):
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], -1)
        return by_modality(output, modalities, self.o_proj, self.image_o_proj), weights


class TransfusionMLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `hidden_states` (..., H) to (..., H)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class TransfusionDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each on a residual stream or on several."""

    def __init__(self, config: TransfusionConfig, layer_idx: int) -> None:
        super().__init__()
        self.num_new_streams = config.num_residual_streams if layer_idx == 0 else 1
        self.self_attn = TransfusionAttention(config, layer_idx)
        self.mlp = TransfusionMLP(config)
        self.input_layernorm = TransfusionRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = TransfusionRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.image_mlp = self.image_input_layernorm = self.image_post_attention_layernorm = None
        if config.modality_experts is not None:
            self.image_mlp = TransfusionMLP(config)
            self.image_post_attention_layernorm = TransfusionRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.modality_experts == "all":
            self.image_input_layernorm = TransfusionRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn_connection, self.mlp_connection = (
            make_connection(
                config.hidden_size, config.num_residual_streams, config.hyper_connections, index, config.rms_norm_eps
            )
            for index in (2 * layer_idx, 2 * layer_idx + 1)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: AttentionMask = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        modalities: Modalities | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Update `hidden_states` (B, L, H), or (B, L, n, H) with n residual streams, which the first layer makes."""
        hidden_states = expand_streams(hidden_states, self.num_new_streams)
        branch, residual, output_weights = self.attn_connection(hidden_states)
        branch, _ = self.self_attn(
            by_modality(branch, modalities, self.input_layernorm, self.image_input_layernorm),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            modalities=modalities,
            **kwargs,
        )
        hidden_states = add_branch(residual, output_weights, branch)

        branch, residual, output_weights = self.mlp_connection(hidden_states)
        branch = by_modality(branch, modalities, self.post_attention_layernorm, self.image_post_attention_layernorm)
        return add_branch(residual, output_weights, by_modality(branch, modalities, self.mlp, self.image_mlp))


# By name: a class that was loaded from the Hub is another one.
_SELF_INITIALISED = ("StaticHyperConnection", "DynamicHyperConnection", "ManifoldHyperConnection")


# trf-ignore: TRF057
class TransfusionPreTrainedModel(SharedModel, PreTrainedModel):
    """Loading, saving, initialisation and the flags by which transformers treats the model."""

    config: TransfusionConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "TransfusionDecoderLayer",
        "LinearPatchEncoder",
        "LinearSkipPatchEncoder",
        "LinearSkipPatchDecoder",
        "UNetPatchEncoder",
        "UNetPatchDecoder",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    # Flash attention takes no mask, so image blocks would silently turn causal.
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TransfusionDecoderLayer, "attentions": TransfusionAttention}

    def _replicate_for_data_parallel(self) -> "TransfusionPreTrainedModel":
        """Refuse `nn.DataParallel`, which cuts each input into equal parts: patches of all rows lie in one."""
        raise ValueError(
            "nn.DataParallel cannot divide latent_patches (P, D) among devices row by row. Use "
            "DistributedDataParallel: start the script with torchrun or accelerate launch, one process a device."
        )

    @property
    def device(self) -> torch.device:
        """Where inputs belong. Weights that are offloaded, to disk for example, are on no device until their turn."""
        tensors = (
            tensor
            for module in self.modules()
            for tensor in chain(module._parameters.values(), module._buffers.values())
        )
        return next(
            (tensor.device for tensor in tensors if tensor is not None and not tensor.is_meta), torch.device("meta")
        )

    def compile_layers(self, **options: Any) -> None:
        """Compile each decoder layer by itself, in place: all layers share one graph, which takes seconds to make.

        `options` are those of `torch.compile`; `fullgraph=True` is for trainings alone, as attention to a cache stays
        outside of the graphs. Names of parameters, saving and loading stay as they are.
        """
        for module in self.modules():
            if type(module).__name__ == "TransfusionDecoderLayer":
                module.compile(**options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Convolutions of the U-Net keep torch's scale, by which it learns faster, or start at zero.
        if isinstance(module, nn.Conv2d) or type(module).__name__ in _SELF_INITIALISED:
            module.reset_parameters()


# trf-ignore: TRF057
class TransfusionModel(TransfusionPreTrainedModel):
    """The transformer without its heads: token ids and noisy patches in, hidden states out."""

    _keep_in_fp32_modules = ["patch_encoder"]  # as the whole model's patch codec

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.patch_encoder = make_patch_encoder(config)
        self.layers = nn.ModuleList(
            [TransfusionDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = TransfusionRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.image_norm = None
        if config.modality_experts == "all":
            self.image_norm = TransfusionRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = TransfusionRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_image_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, L), True where a patch stands; with `inputs_embeds` alone, where the placeholder's embedding does."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        # trf-ignore: TRF027 - for type checkers; forward refuses neither
        assert inputs_embeds is not None
        placeholder = self.embed_tokens(torch.tensor(self.config.image_token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(-1)

    # trf-ignore: TRF057
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        latent_patches: Tensor | None = None,
        image_grids: Tensor | None = None,
        timesteps: Tensor | None = None,
        document_ids: Tensor | None = None,
        patch_repeats: int = 1,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TransfusionModelOutput:
        """Run the transformer.

        Args:
            input_ids: (B, L) token ids; patches hold `image_token_id`.
            attention_mask: (B, past + L), 0 where a key is hidden. Positions do not move by it. Or a finished mask.
            position_ids, document_ids: (B, L); by default a document begins where the positions begin anew.
            past_key_values: Cache of the positions before these.
            inputs_embeds: (B, L, H) in place of `input_ids`.
            latent_patches, image_grids: (P, D) as they are, noisy or clean; (N, 2), their rows and columns.
            timesteps, patch_repeats: (N,), clean (0) by default; how often the images stand in the batch.
            use_cache: Whether to return the keys and values; `kwargs` are for the attention implementation.

        Returns `last_hidden_state` (B, L, H), the cache, and `patch_skips` for the patch decoder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        image_mask = modalities = patch_skips = None
        given_positions = position_ids if past_key_values is None else None  # of whole rows
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = count_positions(inputs_embeds, past_length, document_ids)
        if latent_patches is not None:
            if image_grids is None:
                raise ValueError("latent_patches came without image_grids; give both, as the processor makes them.")
            image_mask = self.get_image_mask(input_ids, inputs_embeds)
            if timesteps is None:
                timesteps = latent_patches.new_zeros(image_grids.shape[0])
            patch_embeds, patch_skips = self.patch_encoder(latent_patches, timesteps, image_grids)
            patch_embeds = patch_embeds.to(inputs_embeds.dtype).repeat(patch_repeats, 1)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask[..., None], patch_embeds)
            if self.config.image_rope == "2d":
                grids = image_grids.repeat(patch_repeats, 1)
                position_ids = patch_position_ids(position_ids, image_mask, grids, patch_embeds.shape[0])
            if self.config.modality_experts is not None:
                modalities = find_modalities(image_mask, patch_embeds.shape[0])
            if latent_patches.shape[0] == 0:
                image_mask = None  # a plain causal mask, which the fused kernels need not read
        if document_ids is None and given_positions is not None:
            document_ids = packed_documents(given_positions.expand(inputs_embeds.shape[:2]), image_mask)
        mask_inputs = (attention_mask, past_key_values, image_mask, document_ids, self.training)
        mask = transfusion_mask(self.config, inputs_embeds, *mask_inputs)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        caches = getattr(past_key_values, "prefixes", [past_key_values] * len(self.layers))
        # Assisted decoding by the model's own first layers names fewer in the config for a while.
        for layer, cache in zip(self.layers[: self.config.num_hidden_layers], caches, strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=cache,
                modalities=modalities,
                **kwargs,
            )
        hidden_states = reduce_streams(hidden_states)
        return TransfusionModelOutput(
            last_hidden_state=by_modality(hidden_states, modalities, self.norm, self.image_norm),
            past_key_values=past_key_values if use_cache else None,
            patch_skips=patch_skips,
        )


class TransfusionKwargs(TransformersKwargs):
    """Further keywords of the whole model's `forward`.

    `noise` is no parameter of its own, since transformers' test suites take one of this name for the noise of masked
    autoencoders, which has another shape.
    """

    noise: Tensor | None


# trf-ignore: TRF057 - trf-ignore: TRF015 - the config, with its tie_word_embeddings, is in configuration.py
class TransfusionForMultimodalGeneration(TransfusionPreTrainedModel, TransfusionGenerationMixin):
    """Transfusion with its two heads: it writes, and it draws.

    `generate` writes text or interleaves text and images, `generate_images` draws; both are in `generation.py`.
    In `forward`, what is given decides what happens to the images:

    * neither `labels` nor `timesteps`: they are context, fed clean;
    * `timesteps` alone: `latent_patches` are noisy already, as in sampling, and `image_prediction` comes back;
    * `labels` or `noise`: `latent_patches` are clean, noise is added, and the image loss is taken where
      `image_loss_mask` is True. What is absent of `timesteps` and `noise` is drawn.

    Arguments of `forward`:
        input_ids: (B, L) token ids; patches hold `config.image_token_id`.
        attention_mask: (B, past + L), 0 where a key is hidden (padding, dropped text).
        position_ids: (B, L); by default 0, 1, ... counted on from the cache, whatever the mask hides. Documents packed
            into one row begin where they begin anew.
        past_key_values: Cache of earlier positions.
        inputs_embeds: (B, L, H) in place of `input_ids`.
        document_ids: (B, L) for rows that hold several documents one after the other, as packing makes them: the
            number of each position's document, -1 at padding. Documents do not see each other, and positions count
            from the beginning of each.
        latent_patches: (P, D), the patches of all images in reading order.
        image_grids: (N, 2), their rows and columns of patches.
        timesteps: (N,) noise levels: for `ddpm` integers 0..999 as diffusers' `add_noise` takes them, for `flow`
            floats in [0, 1000]. Given ones are never capped.
        noise: (P, D), standard normal; by keyword.
        image_loss_mask: (N,), False for an image that is context only: fed clean, without a loss.
        labels: (B, L), `input_ids` with -100 where nothing is to be learned; shifted inside.
        use_cache: Whether to return `past_key_values`.
        logits_to_keep: Only the last so many positions (0: all), or the positions of an index tensor.
        patch_repeats: How often the images stand in the batch, one set of rows after the other, as the branches of
            guidance; they are encoded once. Not with labels.
        skip_logits: Return no logits; the text loss then computes them at its targets alone.
        num_items_in_batch: Text targets of the whole optimizer step, over which the text loss is a mean.
        num_image_items_in_batch: Patches with a loss in the whole optimizer step, likewise.

    It raises a ValueError for images and placeholders that do not fit each other, impossible grids, patches of the
    wrong width, values that are not finite, timesteps outside the schedule, documents that end within an image,
    `pixel_values` and the like.
    """

    # Not quantized either, by any method, and left in float32 where the checkpoint is loaded in float16.
    _keep_in_fp32_modules = ["model.patch_encoder", "patch_decoder"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # Trainer would take num_items_in_batch for the divisor of the whole loss, and drop the division by the number of
    # accumulation steps that a sum of two means needs.
    accepts_loss_kwargs = False

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__(config)
        self.model = TransfusionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.patch_decoder = make_patch_decoder(config)
        self.generation_config = self.default_generation_config(config)
        self.post_init()

    @classmethod
    def from_text_model(
        cls,
        path_or_model: str | os.PathLike | PreTrainedModel,
        processor: Any = None,
        freeze_text: bool = False,
        **config_overrides: Any,
    ) -> "TransfusionForMultimodalGeneration":
        """Start from a language model of the Llama family; on text it writes as that one does.

        Args:
            path_or_model: A checkpoint of Llama, Mistral, Qwen 2 or 3, SmolLM 2 or 3, or such a model.
            processor: The `TransfusionProcessor` for it, whose tokens and latents the model then has.
            freeze_text: Train only what patches alone run through; wants `modality_experts`.
            config_overrides: Fields of `TransfusionConfig`, such as `modality_experts="all"` or `patch_size=4`, and
                `dtype` in place of the language model's.

        Raises:
            ValueError: A language model, or overrides, that this architecture cannot represent.
        """
        text_model = load_text_model(path_or_model)
        config_overrides.setdefault("dtype", text_model.dtype)
        model = cls._from_config(config_from_text_config(text_model.config, processor, **config_overrides))
        load_text_weights(model, text_model)
        if freeze_text:
            freeze_text_tower(model)
        return model.eval()

    @property
    def noise_process(self) -> NoiseProcess:
        """The noise process of the config's objective."""
        return noise_process_of(self.config)

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        latent_patches: Tensor | None = None,
        image_grids: Tensor | None = None,
        timesteps: Tensor | None = None,
        image_loss_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        patch_repeats: int = 1,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        num_image_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[TransfusionKwargs],
    ) -> TransfusionOutput:
        """Predict the next tokens and the noise of the images, and both losses; the class says what is what."""
        noise, shifted_labels = kwargs.pop("noise", None), kwargs.get("shift_labels")
        given_images = (latent_patches, image_grids, timesteps, noise, image_loss_mask)
        self._check(kwargs, past_key_values, document_ids, input_ids, inputs_embeds, *given_images)
        if latent_patches is None and labels is not None:
            # Over no patch the codec still takes part, so that every process of a training has every gradient.
            latent_patches = torch.zeros(0, self.config.patch_dim, device=labels.device)
            image_grids = torch.zeros(0, 2, dtype=torch.long, device=labels.device)
        document_ids = self._documents_of(document_ids, input_ids, position_ids, past_key_values)
        images = logits = image_prediction = text_loss = image_loss = loss = None
        if latent_patches is not None and image_grids is not None and (labels is not None or noise is not None):
            if timesteps is None:
                timesteps = self.draw_timesteps(image_grids, input_ids, attention_mask, document_ids)
            images = noise_images(self.noise_process, latent_patches, image_grids, timesteps, noise, image_loss_mask)
            latent_patches, timesteps = images.patches, images.timesteps

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            latent_patches=latent_patches,
            image_grids=image_grids,
            timesteps=timesteps,
            document_ids=document_ids,
            patch_repeats=patch_repeats,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if not skip_logits:
            logits = self.lm_head(hidden_states[:, kept])
        if latent_patches is not None and timesteps is not None and image_grids is not None:
            image_mask = self.model.get_image_mask(input_ids, inputs_embeds)
            image_prediction = self.patch_decoder(
                hidden_states.flatten(0, 1)[patch_places(image_mask, patch_repeats * latent_patches.shape[0])],
                outputs.patch_skips,
                timesteps.repeat(patch_repeats),
                image_grids.repeat(patch_repeats, 1),
            )
        if images is not None:
            image_loss = images.loss(image_prediction, num_image_items_in_batch)
            loss = self.config.image_loss_weight * image_loss
        if labels is not None:
            targets = (input_ids, labels, num_items_in_batch, shifted_labels, document_ids)
            text_loss = self.text_loss(hidden_states, *targets)
            loss = text_loss + loss
        return TransfusionOutput(
            loss=loss,
            text_loss=text_loss,
            image_loss=image_loss,
            logits=logits,
            image_prediction=image_prediction if latent_patches is not None and len(latent_patches) else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _documents_of(
        self,
        document_ids: Tensor | None,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor | None:
        """The given documents, or those that `position_ids` tell apart: for noise levels and labels too."""
        if document_ids is not None or input_ids is None or position_ids is None or past_key_values is not None:
            return document_ids
        return packed_documents(position_ids.expand(input_ids.shape), input_ids == self.config.image_token_id)

    def _check(
        self,
        kwargs: Mapping[str, Any],
        past_key_values: Cache | None,
        document_ids: Tensor | None,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        latent_patches: Tensor | None,
        image_grids: Tensor | None,
        timesteps: Tensor | None,
        *further: Tensor | None,
    ) -> None:
        """Check inputs that are new: tokens after a cache, and denoising steps against it, have been checked."""
        refuse_pictures(kwargs)
        if document_ids is not None:
            check_documents(self.config, document_ids, input_ids, past_key_values)
        if torch.compiler.is_compiling():
            return
        is_committed = latent_patches is not None and timesteps is None
        is_new = past_key_values is None or is_committed or bool(past_key_values.get_seq_length() == 0)
        if not is_new:
            return
        if input_ids is None and inputs_embeds is not None and latent_patches is not None:
            is_patch = self.model.get_image_mask(None, inputs_embeds)
            input_ids = torch.where(is_patch, self.config.image_token_id, self.config.eoi_token_id)
        check_inputs(self.config, input_ids, latent_patches, image_grids, timesteps, *further)
        if timesteps is not None:
            self.noise_process.validate_timesteps(timesteps)

    def text_loss(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        labels: Tensor,
        num_targets: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the next token, from `hidden_states` (B, L, H) at the positions that are learned.

        `shift_labels` (B, L) are next tokens already, as sequence parallelism gives them; then `labels` do not count.
        """
        if shift_labels is not None:
            labels = F.pad(shift_labels, (1, 0))
            input_ids = None if input_ids is None else F.pad(input_ids, (0, 1))
            document_ids = None  # who shifts the labels leaves out those at borders
        targets = learned_labels(input_ids, labels, self.config, document_ids)
        hidden_states = hidden_states[:, : targets.shape[1]]
        if not torch.compiler.is_compiling():  # a compiled graph has no shape that depends on values
            is_target = targets != UNLEARNED
            hidden_states, targets = hidden_states[is_target], targets[is_target]
        return mean_cross_entropy(self.lm_head(hidden_states).flatten(0, -2), targets.flatten(), num_targets)

    def draw_timesteps(
        self,
        image_grids: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Draw a timestep for each image, up to `noise_limit` where no text precedes it (section 4.3.4)."""
        uniform = torch.rand(image_grids.shape[0], device=image_grids.device)
        capped = None
        if input_ids is not None:
            capped = images_without_prior_text(input_ids, attention_mask, self.config, document_ids)
        return self.noise_process.timestep_from_uniform(uniform, capped)


__all__ = [
    "TransfusionForMultimodalGeneration",
    "TransfusionModel",
    "TransfusionOutput",
    "TransfusionPreTrainedModel",
    "transfusion_mask",
]
