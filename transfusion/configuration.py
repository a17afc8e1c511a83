"""`TransfusionConfig`: one flat, validated description of a Transfusion model (Zhou et al. 2024, arXiv:2408.11039)."""

import difflib
import math
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging


logger = logging.get_logger(__name__)

OBJECTIVES = ("ddpm", "flow")
TIMESTEP_DENSITIES = ("uniform", "logit_normal")
PATCH_CODECS = ("linear", "linear_skip", "unet")
IMAGE_ATTENTIONS = ("bidirectional", "causal")
IMAGE_ROPES = ("1d", "2d")
HYPER_CONNECTIONS = ("dynamic", "static", "manifold")
MODALITY_EXPERTS = ("ffn", "all")

# Paper, Table 2: layers, width, heads. The feed-forward width is Llama's rule, which the paper does not state.
_PAPER_SIZES = {
    "0.16b": (16, 768, 12),
    "0.37b": (24, 1024, 16),
    "0.76b": (24, 1536, 24),
    "1.4b": (24, 2048, 16),
    "7b": (32, 4096, 32),
}
PRESETS: dict[str, dict[str, Any]] = {
    name: {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    for name, (layers, width, heads) in _PAPER_SIZES.items()
}
# What two CPU cores train in minutes on the pictures that ship with the package.
PRESETS["demo"] = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "qk_norm": True,
    "latent_channels": 8,
    "patch_size": 4,
    "patch_codec": "linear_skip",
    "axial_positions": True,
    "objective": "flow",
    "timestep_mean": 1.0,
    "default_image_grid": (4, 4),
}

# The paper says 0.27 billion parameters, whatever the patch size, and no widths; these come to it.
PAPER_UNET_CHANNELS = {2: (512, 1152), 4: (384, 640, 1024), 8: (192, 384, 640, 1024)}

# Keys that transformers itself writes to a config.json or passes to a config, beside the fields of its dataclass.
_TRANSFORMERS_KEYS = frozenset(
    "_attn_implementation_internal _commit_hash _experts_implementation_internal _name_or_path add_cross_attention "
    "attn_implementation auto_map cross_attention_hidden_size custom_pipelines decoder_start_token_id "
    "experts_implementation finetuning_task is_decoder model_type name_or_path num_labels output_attentions "
    "per_layer_config prefix pruned_heads quantization_config rope_scaling rope_theta partial_rotary_factor "
    "sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript "
    "transformers_version use_bfloat16".split()
)


class TransfusionConfig(PreTrainedConfig):
    """Configuration of a Transfusion model; the defaults are the paper's smallest controlled model (section 4.1).

    Every value is checked when the config is made, loaded and saved: a `ValueError` names the field, its value and
    what is allowed. A name that is no field is refused too, since transformers would silently keep a misspelt one; in
    a file, which a newer version may have written, it is left out with a warning.

    Args:
        vocab_size: Size of the embedding table, control tokens included (Llama 2's 32,000 and three more).
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim: As in
            Llama. `intermediate_size` defaults to two thirds of four widths, rounded up to a multiple of 256.
        attention_bias, mlp_bias, qk_norm: Biases and the RMSNorm on queries and keys that Qwen-like checkpoints have.
        latent_channels: Channels of the image latents (3 where pixels are the latents).
        patch_size: Side of a square patch, in latent positions.
        patch_codec: What stands between patches and the transformer: `"linear"` layers, or the `"unet"` of the paper
            (section 3), whose down blocks come before the transformer and whose up blocks after it. `"linear_skip"`
            has linear layers and of the U-Net only the way around the transformer.
        unet_channels: Width of each level of the U-Net, from the full latent resolution down to one position per
            patch: one more than `patch_size` halves into 1. By default small beside `hidden_size`.
        unet_layers_per_block: Residual blocks per level on the way down; the way up has one more.
        axial_positions: Whether a continuous axial embedding tells each patch its row and column.
        image_rope: Rotary positions of patches: `"1d"`, the flat index (paper), or `"2d"`, their row and column.
        image_attention: `"bidirectional"` inside each image, or `"causal"`, which the paper compares (Table 5).
        num_residual_streams: 1 is the plain residual; more are mixed by `hyper_connections`.
        hyper_connections: `"dynamic"` or `"static"` (arXiv:2409.19606), or `"manifold"` (arXiv:2512.24880).
        modality_experts: Weights of their own for patches: `"ffn"` the feed-forward layers, `"all"` the attention
            projections and norms too (Mixture-of-Transformers, arXiv:2411.04996), or None.
        objective: `"ddpm"` (epsilon prediction under the cosine schedule: the paper) or `"flow"` (rectified flow).
        image_loss_weight: The weight of the image loss beside the text loss (paper, equation 4: 5).
        num_train_timesteps: Length of the noise schedule.
        noise_limit: Share of the schedule to which an image that no text precedes is noised at most (paper, section
            4.3.4: 0.5); 1 is no limit.
        timestep_density, timestep_mean, timestep_std, timestep_shift: How `flow` draws noise levels in training
            (Esser et al. 2024, arXiv:2403.03206, sections 3.1 and 5.3.2); `ddpm` draws them uniformly.
        boi_token_id, eoi_token_id, image_token_id: Begin-of-image, end-of-image and patch placeholder. By default the
            last three ids of the vocabulary, in this order.
        size_token_grids, size_token_ids: Further begin-of-image tokens, each of which stands for one grid of (rows,
            columns), so that the model itself chooses the size of the picture it begins.
        default_image_grid: (rows, columns) of patches of a picture whose size nobody names. By default (16, 16), the
            paper's 256 patches, or the largest square that fits into `max_position_embeddings`.
    """

    model_type = "transfusion"
    keys_to_ignore_at_inference = ["past_key_values", "text_loss", "image_loss", "image_prediction"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32003
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    qk_norm: bool = False

    latent_channels: int = 8
    patch_size: int = 2
    patch_codec: str = "linear"
    unet_channels: tuple[int, ...] | list[int] | None = None
    unet_layers_per_block: int = 2
    axial_positions: bool = False
    image_rope: str = "1d"
    image_attention: str = "bidirectional"
    num_residual_streams: int = 1
    hyper_connections: str = "dynamic"
    modality_experts: str | None = None
    objective: str = "ddpm"
    image_loss_weight: int | float = 5.0
    num_train_timesteps: int = 1000
    noise_limit: int | float = 0.5
    timestep_density: str = "logit_normal"
    timestep_mean: int | float = 0.0
    timestep_std: int | float = 1.0
    timestep_shift: int | float = 1.0
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    image_token_id: int | None = None
    size_token_grids: list[tuple[int, int]] | list[list[int]] | None = None
    size_token_ids: list[int] | None = None
    default_image_grid: tuple[int, int] | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        self._check_numbers()
        if self.head_dim is None:
            heads = self.num_attention_heads
            _check(self, "hidden_size", lambda v: v % heads == 0, f"a multiple of num_attention_heads ({heads})")
            self.head_dim = self.hidden_size // heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 256 * math.ceil(8 * self.hidden_size / 3 / 256)
        for offset, name in enumerate(("boi_token_id", "eoi_token_id", "image_token_id")):
            if getattr(self, name) is None:
                setattr(self, name, self.vocab_size - 3 + offset)
        self._fills_grid = self.default_image_grid is None
        if self.default_image_grid is None:
            self.default_image_grid = self._largest_grid()
        rows, columns = self.default_image_grid
        self.default_image_grid = (rows, columns)
        if self.size_token_grids is not None:  # as default_image_grid above; JSON knows lists alone
            self.size_token_grids = [(rows, columns) for rows, columns in self.size_token_grids]
        if self.patch_codec == "unet" and self.unet_channels is None:
            self.unet_channels = _small_unet_channels(self.hidden_size, self.patch_size)
        self.base_model_tp_plan = {**self.base_model_tp_plan, **_optional_tp_plan(self.modality_experts, self.qk_norm)}
        super().__post_init__(**kwargs)
        self._check_architecture()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "TransfusionConfig":
        """Return the config of a named size: the paper's five (Table 2) or `"demo"`; `overrides` replace fields."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; allowed: {', '.join(PRESETS)}.")
        preset = dict(PRESETS[name])
        if name in _PAPER_SIZES and overrides.get("patch_codec") == "unet":
            patch_size = overrides.get("patch_size", cls.patch_size)
            if patch_size not in PAPER_UNET_CHANNELS and "unet_channels" not in overrides:
                raise ValueError(
                    f"patch_size={patch_size!r} is none of the paper's ({', '.join(map(str, PAPER_UNET_CHANNELS))}); "
                    "give unet_channels with it."
                )
            preset["unet_channels"] = PAPER_UNET_CHANNELS.get(patch_size)
        return cls(**{**preset, **overrides})

    @property
    def patch_dim(self) -> int:
        """Length of a patch vector, laid out (channel, row in patch, column in patch)."""
        return self.latent_channels * self.patch_size**2

    @property
    def boi_token_ids(self) -> tuple[int, ...]:
        """Every begin-of-image token: the plain one, then those that stand for a grid."""
        assert self.boi_token_id is not None  # __post_init__ filled it in
        return (self.boi_token_id, *(self.size_token_ids or ()))

    def boi_token_for(self, grid: tuple[int, int]) -> int:
        """The begin-of-image token of an image of `grid` (rows, columns): its size token, or else the plain one."""
        tokens = zip(self.size_token_grids or (), self.size_token_ids or (), strict=True)
        return {tuple(sized): token for sized, token in tokens}.get(tuple(grid), self.boi_token_ids[0])

    def grid_of_boi(self, token_id: int) -> tuple[int, int] | None:
        """The grid (rows, columns) that a size token stands for; None for any other token."""
        tokens = zip(self.size_token_ids or (), self.size_token_grids or (), strict=True)
        return {token: (rows, columns) for token, (rows, columns) in tokens}.get(token_id)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for any config, but fields in `kwargs` replace those of the dict before anything follows from them.

        What the dict holds and is no field, as in the file of a newer version, is left out, and said so.
        """
        known = cls._known_names()
        if unknown := sorted(set(config_dict) - known):
            logger.warning(
                f"The config holds {', '.join(unknown)}, which is no field of {cls.__name__} here; left out. If a "
                "newer version of transfusion wrote it, install that; if not, it is misspelt."
            )
        config_dict = {name: value for name, value in config_dict.items() if name in known}
        replaced = {name: kwargs.pop(name) for name in tuple(kwargs) if name in TransfusionConfig.__annotations__}
        return super().from_dict({**config_dict, **replaced}, **kwargs)

    def _largest_grid(self) -> tuple[int, int]:
        """The square grid of an image whose size nobody named."""
        side = min(16, math.isqrt(max(self.max_position_embeddings - 2, 1)))
        return side, side

    def validate(self) -> None:
        """Check every field again; transformers calls this before it saves a config."""
        super().validate()
        rows, columns = self.default_image_grid or (1, 1)
        if self._fills_grid and rows * columns + 2 > self.max_position_embeddings:  # fewer positions were set since
            self.default_image_grid = self._largest_grid()
        self._check_numbers()
        self._check_architecture()

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: without attributes set later that are no fields, as no load accepts them."""
        known = self._known_names()
        return {name: value for name, value in super().to_dict().items() if name in known}

    @classmethod
    def _known_names(cls) -> frozenset[str]:
        fields = frozenset(cls.__dataclass_fields__)
        # Generation settings are dropped by transformers itself, with its own message when they are saved.
        return fields | _TRANSFORMERS_KEYS | frozenset(cls._get_generation_defaults())

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        fields, known = set(self.__dataclass_fields__), self._known_names()
        for name, value in kwargs.items():
            if name not in known:
                close = difflib.get_close_matches(name, fields, n=3)
                hint = (
                    f"did you mean {' or '.join(close)}?" if close else "see TransfusionConfig's docstring for them."
                )
                raise ValueError(f"{name}={value!r} is not a field of TransfusionConfig; {hint}")

    @staticmethod
    def _get_generation_defaults() -> dict[str, Any]:
        from transformers import GenerationConfig

        return GenerationConfig._get_default_generation_params()

    def _check_numbers(self) -> None:
        """Check each field alone: its type, its range, its allowed values."""
        for name in _POSITIVE_INTEGERS:
            _check(self, name, lambda v: _is_int(v) and v > 0, "a positive integer")
        for name in ("intermediate_size", "num_key_value_heads", "head_dim"):
            _check(self, name, lambda v: v is None or (_is_int(v) and v > 0), "a positive integer or None")
        for name in ("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias", "qk_norm", "axial_positions"):
            _check(self, name, lambda v: isinstance(v, bool), "True or False")
        for name in ("rms_norm_eps", "timestep_std", "timestep_shift"):
            _check(self, name, lambda v: _is_number(v) and v > 0, "a finite number above 0")
        choices = {
            "patch_codec": PATCH_CODECS,
            "image_rope": IMAGE_ROPES,
            "image_attention": IMAGE_ATTENTIONS,
            "hyper_connections": HYPER_CONNECTIONS,
            "modality_experts": (None, *MODALITY_EXPERTS),
            "objective": OBJECTIVES,
            "timestep_density": TIMESTEP_DENSITIES,
            "hidden_act": tuple(ACT2FN),
        }
        for name, values in choices.items():
            _check(self, name, values.__contains__, " or ".join(map(repr, values)))
        _check(self, "noise_limit", lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, up to 1")
        for name in ("initializer_range", "image_loss_weight"):
            _check(self, name, lambda v: _is_number(v) and v >= 0, "a finite number, 0 or more")
        _check(self, "timestep_mean", _is_number, "a finite number")
        _check(self, "attention_dropout", lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 up to, not with, 1")
        _check(
            self, "default_image_grid", lambda v: v is None or _is_grid(v), "(rows, columns), two positive integers"
        )
        for name, is_allowed, allowed in (
            ("size_token_grids", _is_grid, "a list of (rows, columns), two positive integers each"),
            ("size_token_ids", _is_int, "a list of ids"),
            ("unet_channels", lambda v: _is_int(v) and v > 0, "a list of positive integers"),
        ):
            _check(self, name, _is_list_of(is_allowed), f"{allowed}, or None")
        for name in ("pad_token_id", "bos_token_id", "boi_token_id", "eoi_token_id", "image_token_id"):
            _check(self, name, lambda v: v is None or (_is_int(v) and v >= 0), "an id (0 or more) or None")

    def _check_architecture(self) -> None:
        """Check fields against each other."""
        heads = self.num_attention_heads
        _check(self, "num_key_value_heads", lambda v: heads % v == 0, f"a divisor of num_attention_heads ({heads})")
        _check(self, "head_dim", lambda v: v % 2 == 0, "an even integer, since rotary embeddings turn pairs")
        control = {name: getattr(self, name) for name in ("boi_token_id", "eoi_token_id", "image_token_id")}
        for name in control:
            _check(self, name, lambda v: 0 <= v < self.vocab_size, f"an id below vocab_size ({self.vocab_size})")
        _check(
            self,
            "pad_token_id",
            lambda v: v is None or v < self.vocab_size,
            f"None or an id below vocab_size ({self.vocab_size})",
        )
        if len(set(control.values())) < 3:
            raise ValueError(f"{control} must be three different ids.")
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        texts = {self.bos_token_id, self.pad_token_id, *eos} - {None}
        if shared := texts & set(control.values()):
            raise ValueError(f"{control} must be none of the ids that begin, end or pad texts: {sorted(shared)}.")
        self._check_size_tokens(texts | set(control.values()))
        self._check_unet()
        assert self.default_image_grid is not None  # __post_init__ filled it in
        rows, columns = self.default_image_grid
        if rows * columns + 2 > self.max_position_embeddings:
            raise ValueError(
                f"default_image_grid={self.default_image_grid} takes {rows * columns + 2} positions with its "
                f"begin and end tokens; max_position_embeddings={self.max_position_embeddings} allows no more. "
                "Take a smaller grid, larger patches or more positions."
            )

    def _check_size_tokens(self, taken: set[int | None]) -> None:
        """Each size token stands for one grid that fits, and is no other control token."""
        grids, ids = self.size_token_grids or [], self.size_token_ids or []
        if len(grids) != len(ids) or len(set(map(tuple, grids))) != len(grids):
            raise ValueError(
                f"size_token_grids={grids} and size_token_ids={ids} must be of one length, with no grid twice."
            )
        for grid in grids:
            largest = self.max_position_embeddings - 2
            if grid[0] * grid[1] > largest:
                raise ValueError(
                    f"size_token_grids holds {grid!r}; allowed: (rows, columns) of at most {largest} patches, which "
                    "max_position_embeddings leaves."
                )
        if len(taken | set(ids)) != len(taken) + len(ids) or not all(0 <= i < self.vocab_size for i in ids):
            raise ValueError(
                f"size_token_ids={ids} must be different ids below vocab_size ({self.vocab_size}), none of {taken}."
            )

    def _check_unet(self) -> None:
        """The U-Net halves the latent until a patch is one position, so it has one width for each size on the way."""
        if self.patch_codec != "unet":
            _check(self, "unet_channels", lambda v: v is None, "None, unless patch_codec is 'unet'")
            return
        _check(self, "patch_size", lambda v: v & (v - 1) == 0, "a power of two, with patch_codec='unet'")
        levels = self.patch_size.bit_length()
        allowed = f"{levels} positive integers for patch_size={self.patch_size}"
        _check(self, "unet_channels", lambda v: v is not None and len(v) == levels, allowed)


_FFN_TP_PLAN = {
    "layers.*.image_mlp.gate_proj": "colwise",
    "layers.*.image_mlp.up_proj": "colwise",
    "layers.*.image_mlp.down_proj": "rowwise",
}
_EXPERT_TP_PLANS = {
    None: {},
    "ffn": _FFN_TP_PLAN,
    "all": {
        **_FFN_TP_PLAN,
        "layers.*.self_attn.image_q_proj": "colwise",
        "layers.*.self_attn.image_k_proj": "colwise",
        "layers.*.self_attn.image_v_proj": "colwise",
        "layers.*.self_attn.image_o_proj": "rowwise",
    },
}


def _optional_tp_plan(modality_experts: str | None, qk_norm: bool) -> dict[str, str]:
    """The tensor-parallel plan of the modules that only some configs have."""
    norms = ("q_norm", "k_norm", "image_q_norm", "image_k_norm")[: 4 if modality_experts == "all" else 2]
    # Every process norms its own heads, with the weight that all have.
    norm_plan = {f"layers.*.self_attn.{norm}": "replicated_with_grad_allreduce" for norm in norms if qk_norm}
    return {**_EXPERT_TP_PLANS[modality_experts], **norm_plan}


_POSITIVE_INTEGERS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings "
    "latent_channels patch_size num_train_timesteps num_residual_streams unet_layers_per_block"
).split()


def _small_unet_channels(hidden_size: int, patch_size: int) -> tuple[int, ...]:
    """Widths that double on the way down, to half of `hidden_size`, in multiples of 32."""
    levels = patch_size.bit_length()
    return tuple(max(32, hidden_size // 2 ** (levels - level) // 32 * 32) for level in range(levels))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_grid(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_is_int(side) and side > 0 for side in value)


def _is_list_of(is_allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: values is None or (isinstance(values, list | tuple) and all(map(is_allowed, values)))


def _check(config: TransfusionConfig, name: str, is_allowed: Any, allowed: str) -> None:
    value = getattr(config, name)
    if not is_allowed(value):
        raise ValueError(f"{name}={value!r} is not allowed; allowed: {allowed}.")


__all__ = ["OBJECTIVES", "PRESETS", "TIMESTEP_DENSITIES", "TransfusionConfig"]
