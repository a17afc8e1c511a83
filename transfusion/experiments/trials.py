"""What is compared: questions the paper and its followers answer, each with the trials that ask them again.

A trial is the base model with some fields of its config replaced. All trials see the same rows in the same order, with
the same noise, for the same number of steps; a warm start has read its definitions before that.
"""

from dataclasses import dataclass, field
from typing import Any


# The base of all trials: the demo's shape at half its width, at the paper's choices where these are in question.
BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_codec": "linear",
    "timestep_mean": 0.0,
    "unet_layers_per_block": 1,
}


@dataclass(frozen=True)
class Trial:
    """One model to train.

    Attributes:
        name: Names its results.
        config: Fields of `TransfusionConfig` that differ from the base.
        text_steps: Steps of training a Qwen 3 on text alone, from which the model then starts; 0 starts from scratch.
        freeze_text: Keep what came from it.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    text_steps: int = 0
    freeze_text: bool = False


@dataclass(frozen=True)
class Question:
    """A table: what is asked, what the paper says to it, and which trials answer."""

    title: str
    paper: str
    trials: tuple[str, ...]


_SKIP, _UNET = {"patch_codec": "linear_skip"}, {"patch_codec": "unet"}
# Feed-forward widths that bring a plain model to the parameters of the one it is held against.
_AS_LARGE_AS_UNET, _AS_LARGE_AS_EXPERTS = 896, 1024

TRIALS: dict[str, Trial] = {
    trial.name: trial
    for trial in (
        Trial("base"),
        Trial("linear causal", {"image_attention": "causal"}),
        Trial("linear wide", {"intermediate_size": _AS_LARGE_AS_UNET}),
        Trial("linear with skip", _SKIP),
        Trial("ddpm with skip", {**_SKIP, "objective": "ddpm"}),
        Trial("flow logit-normal(1, 1) with skip", {**_SKIP, "timestep_mean": 1.0}),
        Trial("linear patch 8 with skip", {**_SKIP, "patch_size": 8}),
        Trial("2 streams dynamic with skip", {**_SKIP, "num_residual_streams": 2}),
        Trial("unet", _UNET),
        Trial("unet logit-normal(1, 1)", {**_UNET, "timestep_mean": 1.0}),
        Trial("unet causal", {**_UNET, "image_attention": "causal"}),
        Trial("linear patch 8", {"patch_size": 8}),
        Trial("unet patch 8", {**_UNET, "patch_size": 8}),
        Trial("linear patch 2", {"patch_size": 2}),
        Trial("unet patch 2", {**_UNET, "patch_size": 2}),
        Trial("ddpm", {"objective": "ddpm"}),
        Trial("flow uniform", {"timestep_density": "uniform"}),
        Trial("flow logit-normal(1, 1)", {"timestep_mean": 1.0}),
        Trial("no noise limit", {"noise_limit": 1.0}),
        Trial("positions flat", {"axial_positions": False}),
        Trial("positions rotary 2-D", {"axial_positions": False, "image_rope": "2d"}),
        Trial("positions axial and rotary 2-D", {"image_rope": "2d"}),
        *(
            Trial(f"{streams} streams {kind}", {"num_residual_streams": streams, "hyper_connections": kind})
            for kind in ("static", "dynamic", "manifold")
            for streams in (2, 4)
        ),
        Trial("experts ffn", {"modality_experts": "ffn"}),
        Trial("experts all", {"modality_experts": "all"}),
        Trial("dense wide", {"intermediate_size": _AS_LARGE_AS_EXPERTS}),
        Trial("warm start", text_steps=600),
        Trial("warm start, text frozen", {"modality_experts": "all"}, text_steps=600, freeze_text=True),
    )
}

QUESTIONS: tuple[Question, ...] = (
    Question(
        "Attention inside an image",
        "Table 5: bidirectional far better with linear layers (FID 20.3 against 61.3), little with the U-Net (16.7, "
        "16.8).",
        ("base", "linear causal", "unet", "unet causal"),
    ),
    Question(
        "Linear layers or U-Net, by patch size",
        "Tables 6 and 7: the U-Net is better at every size, most at large patches and small models, beyond what its "
        "parameters explain; larger patches cost linear layers much and the U-Net little.",
        (
            "linear patch 2",
            "unet patch 2",
            "base",
            "linear wide",
            "linear with skip",
            "unet",
            "unet logit-normal(1, 1)",
            "linear patch 8",
            "unet patch 8",
        ),
    ),
    Question(
        "A way around the transformer for the noise",
        "Not asked. The U-Net of the paper has one by its skips; linear layers have none, and noise or velocity of a "
        "patch, 128 numbers here, must pass through a residual stream of 128.",
        (
            "base",
            "linear with skip",
            "4 streams dynamic",
            "2 streams dynamic with skip",
            "linear patch 8",
            "linear patch 8 with skip",
            "ddpm",
            "ddpm with skip",
            "flow logit-normal(1, 1)",
            "flow logit-normal(1, 1) with skip",
        ),
    ),
    Question(
        "Noise process",
        "The paper has ddpm alone. Esser et al. 2024: flow beats it only with logit-normal noise levels.",
        ("ddpm", "flow uniform", "base", "flow logit-normal(1, 1)"),
    ),
    Question(
        "Noise limit ahead of captions",
        "Table 8: captions gain (CIDEr 25.4 to 29.4), the rest stays.",
        ("no noise limit", "base"),
    ),
    Question(
        "Positions of patches",
        "The paper has the flat index; its best-known implementation adds a continuous axial embedding.",
        ("positions flat", "base", "positions rotary 2-D", "positions axial and rotary 2-D"),
    ),
    Question(
        "Residual streams",
        "Not in the paper. Zhu et al. 2024: 4 dynamic streams converge 1.8 times as fast on text, 2 nearly; static "
        "ones less. Xie et al. 2025: the manifold makes deep ones stable.",
        ("base", *(f"{n} streams {kind}" for kind in ("static", "dynamic", "manifold") for n in (2, 4))),
    ),
    Question(
        "Weights for each modality",
        "Liang et al. 2024, in the paper's own setting: FID 25.6 to 15.8 at 760M, text unchanged; the feed-forward "
        "gives most of it.",
        ("base", "dense wide", "experts ffn", "experts all"),
    ),
    Question(
        "Start from a language model",
        "Shi et al. 2024 (LMFusion): better text, as good pictures, at half the compute, with the text tower frozen.",
        ("base", "warm start", "experts all", "warm start, text frozen"),
    ),
)


__all__ = ["BASE", "QUESTIONS", "TRIALS", "Question", "Trial"]
