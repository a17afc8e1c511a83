"""Builds what `prepare_data.py` writes: the embedded assets, the five-style emoji set, the tokenizer."""

import gzip
import logging
from pathlib import Path

from .captions import slug
from .emoji_builder import EMOJI_STYLES, EmojiStyle, build_rows, write_image_folder
from .glosses import gloss_file, load_glosses, select_glosses, split_glosses, wordnet_licence
from .packages import EMOJIBASE, WORDNET, package_folder, unpacked
from .pictures import ASSETS, EMOJI_FILE, load_emoji
from .tokenizer import TOKENIZER_FOLDER, train_tokenizer


logger = logging.getLogger(__name__)

# The npm package carries no licence file; this is the text at https://github.com/microsoft/fluentui-emoji.
_FLUENT_COPYRIGHT = "MIT License\n\nCopyright (c) Microsoft Corporation."


def build_emoji_set(
    out: Path, styles: tuple[EmojiStyle, ...] = EMOJI_STYLES, size: int = 64, downloads: Path | None = None
) -> int:
    """Draws emoji sets as an imagefolder, or as a zip file of one where `out` ends in ".zip".

    Args:
        out: the folder or zip file to write.
        styles: which sets; all five by default.
        size: side of the pictures in pixels.
        downloads: folder with the npm tarballs; fetched with npm if None.

    Returns:
        The number of pictures.
    """
    with unpacked([EMOJIBASE, *(style.package for style in styles)], downloads) as packages:
        return write_image_folder(build_rows(packages, styles, size), out)


def build_embedded_emoji(downloads: Path | None = None) -> None:
    """Rebuilds the embedded Fluent pictures and writes the licences of the drawings and of the tags beside them."""
    count = build_emoji_set(EMOJI_FILE, EMOJI_STYLES[:1], 64, downloads)
    logger.info("%s: %d pictures, %d bytes", EMOJI_FILE, count, EMOJI_FILE.stat().st_size)
    with unpacked([EMOJIBASE], downloads) as packages:
        licence = (packages / package_folder(EMOJIBASE) / "LICENSE").read_text(encoding="utf-8").strip()
    (ASSETS / "LICENSE-emojibase.txt").write_text(licence + "\n", encoding="utf-8")
    terms = licence[licence.index("Permission is hereby granted") :]
    (ASSETS / "LICENSE-fluent-emoji.txt").write_text(f"{_FLUENT_COPYRIGHT}\n\n{terms}\n", encoding="utf-8")


def build_embedded_glosses(downloads: Path | None = None) -> None:
    """Rebuilds the embedded WordNet definitions, with their licence; the embedded emoji must be there."""
    named = {word for picture in load_emoji("all") for word in slug(picture.name).split("-")}
    named |= {picture.name.lower() for picture in load_emoji("all")}
    with unpacked([WORDNET], downloads) as packages:
        dictionary = packages / package_folder(WORDNET) / "dict"
        parts = split_glosses(select_glosses(dictionary, named))
        (ASSETS / "LICENSE-wordnet.txt").write_text(wordnet_licence(dictionary), encoding="utf-8")
    for split, glosses in parts.items():
        packed = gzip.compress("\n".join([*glosses, ""]).encode("utf-8"), compresslevel=9, mtime=0)
        gloss_file(split).write_bytes(packed)
        logger.info("%s: %d definitions, %d bytes", gloss_file(split), len(glosses), len(packed))


def build_tokenizer(out: Path = TOKENIZER_FOLDER) -> None:
    """Retrains the embedded tokenizer on the training captions and definitions."""
    captions = [caption for picture in load_emoji("train") for caption in picture.captions]
    tokenizer = train_tokenizer([*captions, *load_glosses("train")])
    tokenizer.save_pretrained(out)
    logger.info("%s: %d entries", out, len(tokenizer))
