"""What is measured, declared: the sizes of the models, and the documents they learn, continue and draw in.

A document is a tuple of parts: an integer is so many text tokens, a pair the (rows, columns) of an image's patches.
"""

from collections.abc import Iterable
from dataclasses import dataclass


Part = int | tuple[int, int]
Document = tuple[Part, ...]

VOCABULARY = 515  # of ours; the last three are begin-of-image, end-of-image and the patch, and texts use 3 to 511
TEXT_IDS = (3, 512)
LATENT_CHANNELS, PATCH_SIZE = 4, 2
PATCH_DIM = LATENT_CHANNELS * PATCH_SIZE**2
IMAGE = (16, 16)
GUIDANCE_SCALE = 3.0
TEXT_DROPOUT = 0.1  # of both sides, for guidance


@dataclass(frozen=True)
class Size:
    """Width and depth of a model; feed-forward layers have 8/3 of the width, as the peer's, in multiples of 8."""

    name: str
    width: int
    layers: int
    heads: int

    @property
    def inner(self) -> int:
        """Width of a feed-forward layer."""
        return 8 * max(1, round(self.width / 3))

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 16, 2, 2),
        Size("S", 256, 6, 4),
        Size("M", 512, 8, 8),
        Size("0.3B", 1024, 24, 16),
        Size("1.2B", 2048, 24, 16),
    )
}


def num_patches(document: Document) -> int:
    """Patches of all images of `document`."""
    return sum(part[0] * part[1] for part in document if isinstance(part, tuple))


def num_tokens(document: Document) -> int:
    """Positions of `document` in our layout: text, patches, two tags for each image, and the end."""
    return 1 + sum(part if isinstance(part, int) else part[0] * part[1] + 2 for part in document)


@dataclass(frozen=True)
class Training:
    """A training step.

    Attributes:
        name: In tables.
        documents: Of the batch.
        packed_length: Of the rows that we pack them into; None is a row for each, padded. A long document is packed by
            itself, as it is then attended to without a mask in memory.
    """

    name: str
    documents: tuple[Document, ...]
    packed_length: int | None = None

    @property
    def tokens(self) -> int:
        """Positions that are no padding, in our layout."""
        return sum(map(num_tokens, self.documents))

    @property
    def longest(self) -> int:
        """Positions of the longest document, or of a packed row."""
        return max(self.packed_length or 0, *map(num_tokens, self.documents))


@dataclass(frozen=True)
class Decoding:
    """Text is written after a prompt of text: once `fewer` tokens and once `more`, for the cost of one between."""

    name: str
    batch: int
    prompt: int
    fewer: int = 8
    more: int = 40


@dataclass(frozen=True)
class Denoising:
    """An image is drawn after a prompt of text.

    Attributes:
        name: In tables.
        batch: Images drawn together.
        prompt: Text tokens ahead of each.
        guidance: 1 is none.
        evaluations: Of the network (of each branch), an even number: the peer's midpoint rule takes two a step.
        grid: Patches of the image.
    """

    name: str
    batch: int
    prompt: int
    guidance: float
    evaluations: int = 30
    grid: tuple[int, int] = IMAGE

    @property
    def prefixes(self) -> list[int]:
        """Positions that each row looks at ahead of its image: the branch without text sees begin-of-image alone."""
        return [self.prompt + 1] * self.batch + [1] * (0 if self.guidance == 1 else self.batch)

    @property
    def patches(self) -> int:
        """Of an image."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Interleaving:
    """A prompt of text, an image, and text after it, in one call."""

    name: str
    prompt: int
    tokens: int
    guidance: float = GUIDANCE_SCALE
    evaluations: int = 30
    grid: tuple[int, int] = IMAGE


def repeat(document: Iterable[Part], times: int) -> Document:
    """`document`, several times over, as one."""
    return tuple(document) * times


ROW: Document = (32, IMAGE, 16)
MIXED: tuple[Document, ...] = (  # 311, 25, 101, 118, 605, 362, 151 and 323 positions
    (32, IMAGE, 20),
    (24,),
    (20, (8, 8), 14),
    (117,),
    (32, IMAGE, 32, IMAGE, 24),
    (83, IMAGE, 20),
    (150,),
    (44, IMAGE, 20),
)
ONE_ROW = Training("4 rows of an image and text", (ROW,) * 4)
PADDED = Training("8 documents of mixed lengths, padded", MIXED)
PACKED = Training("8 documents of mixed lengths, packed", MIXED, packed_length=2048)
LONG_4K = Training("a document of 4k, 49 images", (repeat((16, (8, 8)), 49),), packed_length=4096)
LONG_8K = Training("a document of 8k, 99 images", (repeat((16, (8, 8)), 99),), packed_length=8192)
PACKED_8K = Training("26 documents packed to 8k", (ROW,) * 26, packed_length=8192)
GPU_PACKED_8K = Training("packed 8k, images of 256 patches", (ROW,) * 26, packed_length=8192)
GPU_ONE_8K = Training("a document of 8k, 29 images of 256 patches", (repeat((24, IMAGE), 29),), packed_length=8192)

DECODING = (
    Decoding("text, prompt 32", 1, 32),
    Decoding("text, prompt 64", 1, 64),
    Decoding("text, prompt 1024", 1, 1024),
    Decoding("text, prompt 4096", 1, 4096),
    Decoding("8 texts, prompt 32", 8, 32),
    Decoding("8 texts, prompt 1024", 8, 1024),
)
DENOISING = (
    Denoising("image, guided", 1, 32, GUIDANCE_SCALE),
    Denoising("image, not guided", 1, 32, 1.0),
    Denoising("4 images, guided", 4, 32, GUIDANCE_SCALE, evaluations=10),
    Denoising("8 images, guided", 8, 32, GUIDANCE_SCALE, evaluations=10),
    Denoising("image after 1024 tokens, guided", 1, 1024, GUIDANCE_SCALE, evaluations=10),
)
INTERLEAVING = (Interleaving("32 tokens, image, 16 tokens", 32, 16),)

TRAINING = {"train": (ONE_ROW,), "mixed": (PADDED, PACKED), "long": (LONG_4K, LONG_8K, PACKED_8K)}
SUITES = (*TRAINING, "decode", "denoise", "interleaved", "streams", "codec", "memory", "startup", "gpu")
