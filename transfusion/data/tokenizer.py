"""The tokenizer that ships with the package, and how it is trained."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .pictures import ASSETS


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FOLDER = ASSETS / "tokenizer"
VOCABULARY_SIZE = 4096
IMAGE_TOKENS = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}


def load_tokenizer() -> "PreTrainedTokenizerFast":
    """The shipped byte-level BPE tokenizer: 4,096 entries, any text comes back exactly.

    It has `eos_token` "<eos>", `pad_token` "<pad>" and, for images, `boi_token`, `eoi_token` and `image_token`; it
    adds nothing by itself. With `split_special_tokens=True` these strings are ordinary text.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(TOKENIZER_FOLDER)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> "PreTrainedTokenizerFast":
    """Learns a byte-level BPE vocabulary from the texts; the special tokens get the ids 0 to 4."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "<eos>", *IMAGE_TOKENS.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=IMAGE_TOKENS,
        clean_up_tokenization_spaces=False,
    )
