"""Transfusion: one transformer that predicts the next token and diffuses images (arXiv:2408.11039).

Importing this package registers its classes with transformers' Auto classes and tasks, and its pipeline with
diffusers.
"""

import importlib
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

# transformers' own door to this one is shut where torchvision is absent, before 5.18.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration import TransfusionConfig
from .generation import TransfusionStreamer
from .image_processing import TransfusionImageProcessor
from .modeling_transfusion import TransfusionForMultimodalGeneration, TransfusionModel, TransfusionOutput
from .processing import TransfusionProcessor
from .registration import register_with_diffusers
from .tasks import register_tasks


__version__ = "0.1.0"

AutoConfig.register("transfusion", TransfusionConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(TransfusionConfig, TransfusionForMultimodalGeneration, exist_ok=True)
AutoImageProcessor.register(
    TransfusionConfig, image_processor_classes={"pil": TransfusionImageProcessor}, exist_ok=True
)
AutoProcessor.register(TransfusionConfig, TransfusionProcessor, exist_ok=True)
register_tasks()
register_with_diffusers()

# These import diffusers or the Trainer, which takes seconds: only when they are asked for.
_LAZY = {
    "TransfusionPipeline": "pipeline",
    "TransfusionDataCollator": "training",
    "TransfusionTrainer": "training",
}

__all__ = [
    "TransfusionConfig",
    "TransfusionDataCollator",
    "TransfusionForMultimodalGeneration",
    "TransfusionImageProcessor",
    "TransfusionModel",
    "TransfusionOutput",
    "TransfusionPipeline",
    "TransfusionProcessor",
    "TransfusionStreamer",
    "TransfusionTrainer",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
