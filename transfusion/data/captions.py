"""Names, captions and the train / held-out split of the emoji sets: text only, no pictures."""

import hashlib
import re
import unicodedata


# One name in ten, by hash: stable when a set gains names, and equal for all styles.
HELD_OUT_ONE_IN = 10

_PERSON_WORDS = frozenset(
    "man woman person men women people boy girl adult child mother father facing right left".split()
)
_PLURAL_HEADS = frozenset("people men women children dice teeth skis together".split())
_SINGULAR_HEADS = frozenset("atlas canvas gas rhinoceros".split())
_SINGULAR_IN_S = ("ss", "us", "is")
_UNCOUNTABLE = frozenset(
    "adhesive air bacon baggage blood bread broccoli butter cash cheese clothing confetti construction cooking corn "
    "currency customs fire fog food foggy fruit garlic ginger hair hockey honey ice infinity information lacrosse "
    "lightning luggage mahjong money moss music poo popcorn racing rain rice salt sake seaweed snow soap soccer "
    "softball spaghetti sushi tea tennis thread timber toast volleyball voltage water wheat wind wine wireless wood "
    "yarn".split()
)
_ADJECTIVES = frozenset("dizzy locked prohibited radioactive registered unlocked".split())
_NEEDS_THE = frozenset({"statue of liberty", "star of david", "map of japan", "milky way"})
_PEOPLE_FIRST = re.compile(r"(?:old |older |bald )?(man|woman|person|child|boy|girl|face|men|women|people)\b")
_AFTER_HEAD = re.compile(r" (?:with|of|in|on|over|at|for|from|and|behind|showing|without|to|curving|pointing)\b|[,(]")
# By sound: "a unicorn", "a ewe", "an hourglass", "an 8 ball", "an NG button", "an x-ray".
_VOWEL_SOUND = re.compile(
    r"(?!one|once|eu|ewe|uni|use|usual|uk|UFO)(?:[aeiouAEIOU8]|hour|11\b|18\b|x-|[FHLMNRSX][A-Z]?\b|SOS)"
)


def slug(name: str) -> str:
    """Lower-case ASCII words joined by hyphens: "Curaçao (flag)" -> "curacao-flag"."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", letters.lower().replace("'", "")))


def split_of(name: str) -> str:
    """ "train" or "held_out", by a hash of the name.

    Words that only tell who is shown ("man", "woman") and the direction are left out of the hash, so that "man
    surfing" and "woman surfing" fall on the same side.
    """
    words = slug(name).split("-")
    key = " ".join([word for word in words if word not in _PERSON_WORDS] or words)
    return "held_out" if int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % HELD_OUT_ONE_IN == 0 else "train"


def plain(text: str) -> str:
    """The text with straight quotes and hyphens for the typographic ones."""
    return text.translate({ord("’"): "'", ord("“"): '"', ord("”"): '"', ord("–"): "-"})


def readable_name(label: str) -> str:
    """A label of the emoji standard as plain words: "flag: Niue" -> "flag of Niue", curly quotes made straight."""
    label = plain(label).replace("&", "and")
    head, colon, tail = label.partition(": ")
    if not colon:
        return label
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {tail}"
    if head in {"family", "kiss", "couple with heart"}:
        members = tail.split(", ")
        listed = ", ".join(members[:-1]) + " and " * bool(members[:-1]) + members[-1]
        return f"{head} of {listed}" if head != "couple with heart" else f"couple with heart, {listed}"
    if tail == "bald":
        return f"bald {head}"
    return f"{head} {tail}" if tail.startswith("facing") else f"{head} with {tail}"


def with_article(name: str) -> str:
    """The name with "a", "an", "the" or, for plurals, substances and proper names, nothing before it."""
    if name.lower() in _NEEDS_THE or name.startswith("flag of "):
        return f"the {name}"
    if _is_bare(name):
        return name
    return f"{'an' if _VOWEL_SOUND.match(name) else 'a'} {name}"


def _is_bare(name: str) -> bool:
    """Whether no article goes before the name; judged by its first word for people, else by its head noun."""
    words = name.split()
    if people := _PEOPLE_FIRST.match(name):
        return people[1] in _PLURAL_HEADS
    before = _AFTER_HEAD.split(name)[0]
    head = (before.split() or words)[-1].lower()
    plural = head in _PLURAL_HEADS or (
        head.endswith("s") and not head.endswith(_SINGULAR_IN_S) and head not in _SINGULAR_HEADS
    )
    proper = words[-1] == "Claus" or (len(words) == 1 and re.fullmatch(r"[A-Z][a-z]+", name) is not None)
    time_of_day = name.endswith(("o'clock", "-thirty"))
    first = words[0].lower() in {"no", "the", "two", "input"} or name in _ADJECTIVES
    return plural or proper or time_of_day or first or head in _UNCOUNTABLE


def phrasings(name: str, tags: list[str], style: str | None = None) -> list[str]:
    """Captions of one picture, the plain one first.

    Args:
        name: the readable name, such as "red heart".
        tags: further words for it; those that are in the name are left out of the list phrasing.
        style: words for the manner of drawing, such as "twemoji"; a caption naming it is added.
    """
    named = with_article(name)
    captions = [named, f"an emoji of {named}", f"a flat picture of {named}"]
    other = [tag for tag in map(plain, tags) if tag.lower() not in name.lower()][:3]
    if other:
        captions.append(", ".join([name, *other]))
    if style is not None:
        captions.append(f"{named}, {style} style")
    return captions
