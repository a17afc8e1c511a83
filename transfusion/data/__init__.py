"""Captioned pictures and text that ship with the package, the tokenizer and autoencoder made for them, and readers."""

from .autoencoder import load_vae
from .glosses import load_glosses
from .pictures import CaptionedPicture, DataFault, DataReport, load_emoji, read_image_folder
from .shapes import edit_triples, shapes_world
from .specs import DataSpec, SourceSpec
from .tokenizer import load_tokenizer


__all__ = [
    "CaptionedPicture",
    "DataFault",
    "DataReport",
    "DataSpec",
    "SourceSpec",
    "edit_triples",
    "load_emoji",
    "load_glosses",
    "load_tokenizer",
    "load_vae",
    "read_image_folder",
    "shapes_world",
]
