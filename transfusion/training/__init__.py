"""Training: rows and batches, the trainer, averaged weights, sample sheets, and recipes."""

from .assembly import build_rows
from .collator import TransfusionDataCollator
from .latent_cache import encode_pictures
from .reporting import SampleGridCallback, plot_losses
from .rows import CaptionedPictureRows, EditRows
from .signals import SaveOnSignal
from .trainer import TransfusionTrainer


__all__ = [
    "CaptionedPictureRows",
    "EditRows",
    "SampleGridCallback",
    "SaveOnSignal",
    "TransfusionDataCollator",
    "TransfusionTrainer",
    "build_rows",
    "encode_pictures",
    "plot_losses",
]
