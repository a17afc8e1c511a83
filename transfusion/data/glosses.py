"""Short definitions from WordNet: the embedded text, and its builder."""

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .captions import split_of
from .pictures import ASSETS, check_split


# WordNet's lexicographer files (lexnames(5WN)) of things that can be drawn: animals, artifacts, body parts, food,
# natural objects, people, plants, substances.
_CONCRETE = frozenset({"05", "06", "08", "13", "17", "18", "20", "27"})


def load_glosses(split: str = "train") -> list[str]:
    """The embedded definitions, "word: definition" each, in WordNet's order.

    Args:
        split: "train", "held_out" (about a tenth of the words, by the hash that splits the emoji) or "all".

    Raises:
        ValueError: for another split.
    """
    check_split(split)
    splits = ("train", "held_out") if split == "all" else (split,)
    return [line for part in splits for line in _read(gloss_file(part))]


def gloss_file(split: str) -> Path:
    """Where the definitions of "train" or "held_out" lie."""
    return ASSETS / f"wordnet_glosses_{split}.txt.gz"


def _read(file: Path) -> list[str]:
    return gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()


@dataclass(frozen=True)
class Synset:
    """One meaning: its words (the first is the head), part of speech (n, v, a), lexicographer file, definition."""

    words: tuple[str, ...]
    part_of_speech: str
    file: str
    gloss: str


def read_synsets(dictionary: Path) -> Iterator[Synset]:
    """The nouns, verbs and adjectives of WordNet's data files (wndb(5WN)), definitions without the examples."""
    for part in ("noun", "verb", "adj"):
        for line in (dictionary / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            columns = fields.split()
            raw = columns[4 : 4 + 2 * int(columns[3], 16) : 2]
            words = tuple(re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in raw)
            definition = re.split(r';?\s*"', gloss.strip())[0].strip(" ;:")
            yield Synset(words, part[0], columns[1], definition)


def read_counted_words(dictionary: Path) -> set[str]:
    """The words that occur in WordNet's tagged texts, lower-cased: a list of common words."""
    rows = (line.split() for line in (dictionary / "index.sense").read_text(encoding="utf-8").splitlines())
    return {row[0].partition("%")[0].replace("_", " ") for row in rows if int(row[3]) > 0}


def select_glosses(dictionary: Path, named: set[str]) -> list[str]:
    """Definitions of common words and of what the pictures name; of abstract nouns only single words.

    Args:
        dictionary: WordNet's folder `dict`.
        named: lower-case words that captions use.
    """
    common = read_counted_words(dictionary)
    chosen: dict[str, None] = {}
    for synset in read_synsets(dictionary):
        head = synset.words[0]
        if head != head.lower() or not 8 <= len(synset.gloss) <= 240:
            continue
        abstract_phrase = " " in head and synset.part_of_speech == "n" and synset.file not in _CONCRETE
        if head in named or (head in common and not abstract_phrase):
            chosen[f"{head}: {synset.gloss}"] = None
    return list(chosen)


def split_glosses(glosses: list[str]) -> dict[str, list[str]]:
    """The definitions by split; all of one word go to one side."""
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for gloss in glosses:
        parts[split_of(gloss.partition(":")[0])].append(gloss)
    return parts


def wordnet_licence(dictionary: Path) -> str:
    """The licence at the head of WordNet's data files."""
    lines = (dictionary / "data.noun").read_text(encoding="utf-8").splitlines()
    return "\n".join(re.sub(r"^\s*\d+ ?", "", line).rstrip() for line in lines if line.startswith("  ")) + "\n"
