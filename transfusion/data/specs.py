"""`DataSpec`: what a training reads, as a configuration file states it."""

from dataclasses import dataclass

from .documents import Columns


KINDS = ("imagefolder", "jsonl", "parquet", "webdataset", "stream")
CROPS = ("center", "random")


@dataclass(frozen=True)
class SourceSpec:
    """One source of documents.

    Attributes:
        kind: `"imagefolder"` (a folder with metadata.jsonl), `"jsonl"` (a file of records, whose file names lie below
            its folder), `"parquet"` and `"webdataset"` (a file, a folder of them, or a pattern such as `set/*.tar`),
            or `"stream"` (what `datasets.load_dataset(path, streaming=True)` loads).
        path: Where it is.
        weight: Its share of an epoch, on a scale that all sources have in common; None: by its number of rows.
        split: Keep the rows with this value of the column `split`; of a stream, the split to load.
        content, picture, original, caption, parts: What its records are and which columns hold what; see `Columns`.
    """

    kind: str
    path: str
    weight: float | None = None
    split: str | None = None
    content: str | None = None
    picture: str | None = None
    original: str | None = None
    caption: str | None = None
    parts: str | None = None

    def __post_init__(self) -> None:
        """Check what no later step would."""
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; allowed: {', '.join(KINDS)}.")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"The weight of {self.path} is {self.weight}; give a number above 0, or leave it out.")

    @property
    def columns(self) -> Columns:
        """Which columns hold what."""
        return Columns(self.content, self.picture, self.original, self.caption, self.parts)


@dataclass(frozen=True)
class DataSpec:
    """What a training reads.

    Attributes:
        sources: Where documents come from. A stream stands alone, as its rows cannot be counted.
        epoch_rows: Rows of an epoch; None: as many as the sources have.
        caption_first: Share of the pairs in which the caption precedes the picture (paper, section 4.1).
        buckets: Sizes (height, width) in pixels, of about equal area. A picture is brought to the one whose aspect is
            nearest to its own. Empty: to the size of the image processor.
        flip: Mirror every second picture, by chance. Wrong where captions say left and right, or pictures hold text.
        crop: Which part of a picture is kept where the aspect is another: `"center"`, or `"random"`.
        cache_dir: Folder for latents and indices. None keeps nothing: pictures are encoded each time they are read,
            as they are with `flip` or a random crop.
        shuffle_block: How many rows of a stream are shuffled at a time.
        max_length: Longest row in tokens; documents that would be longer are left out and reported.
        max_faulty: Share of rows with a fault above which nothing is trained.
        strict: Raise on any fault.
    """

    sources: tuple[SourceSpec, ...]
    epoch_rows: int | None = None
    caption_first: float = 0.8
    buckets: tuple[tuple[int, int], ...] = ()
    flip: bool = False
    crop: str = "center"
    cache_dir: str | None = None
    shuffle_block: int = 1024
    max_length: int | None = None
    max_faulty: float = 0.1
    strict: bool = False

    def __post_init__(self) -> None:
        """Check what no later step would."""
        weights = [source.weight for source in self.sources]
        if not self.sources:
            raise ValueError("sources is empty; name at least one.")
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError(f"The sources have the weights {weights}; give all of them one, or none.")
        if self.is_stream and len(self.sources) > 1:
            raise ValueError(
                "A stream cannot be mixed with other sources, as its rows are not known; train on it alone."
            )
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}; allowed: {', '.join(CROPS)}.")
        for name in ("caption_first", "max_faulty"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a share, 0 to 1.")
        for name in ("epoch_rows", "shuffle_block", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give a number above 0.")

    @property
    def is_stream(self) -> bool:
        """Whether the rows come one after the other and cannot be counted."""
        return any(source.kind == "stream" for source in self.sources)

    @property
    def augments(self) -> bool:
        """Whether a picture differs from one reading to the next."""
        return self.flip or self.crop == "random"


__all__ = ["DataSpec", "SourceSpec"]
