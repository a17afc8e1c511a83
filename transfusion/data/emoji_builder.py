"""Building captioned emoji pictures from the npm packages of Iconify and emojibase. Needs resvg-py."""

import io
import json
import logging
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from .captions import phrasings, readable_name, slug, split_of, with_article
from .packages import EMOJIBASE, package_folder


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmojiStyle:
    """One emoji set of Iconify: its npm package, its licence and the words that name it in captions."""

    name: str
    package: str
    license: str


EMOJI_STYLES = (
    EmojiStyle("fluent", "@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    EmojiStyle("twemoji", "@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
    EmojiStyle("noto", "@iconify-json/noto@1.2.9", "Apache-2.0"),
    EmojiStyle("openmoji", "@iconify-json/openmoji@1.2.29", "CC-BY-SA-4.0"),
    EmojiStyle("emojione", "@iconify-json/emojione@1.2.3", "CC-BY-4.0"),
)

_SKIN_TONE = re.compile(r"skin-tone|-tone[1-5]$")
_SHORT_SKIN_TONE = re.compile(r"(?:-(?:medium-light|medium-dark|light|medium|dark))+$")

# Letters outside ASCII were dropped from these OpenMoji names.
_REPAIRED = {
    "flag-cte-divoire": "flag-cote-divoire",
    "flag-curaao": "flag-curacao",
    "flag-land-islands": "flag-aland-islands",
    "flag-runion": "flag-reunion",
    "flag-so-tom-prncipe": "flag-sao-tome-and-principe",
    "flag-st-barthlemy": "flag-st-barthelemy",
    "piata": "pinata",
    "schwbisch-gmnd-fnfknopfturm": "schwaebisch-gmuend-fuenfknopfturm",
    "schwbisch-gmnd-forum-gold-und-silber": "schwaebisch-gmuend-forum-gold-und-silber",
    "schwbisch-gmnd-ratshaus": "schwaebisch-gmuend-rathaus",
    "sptzlepresse": "spaetzle-press",
}

_CATEGORIES = {
    "food": "food & drink",
    "nature": "animals & nature",
    "people": "people & body",
    "travel": "travel & places",
    "animals nature": "animals & nature",
    "food drink": "food & drink",
    "people body": "people & body",
    "smileys emotion": "smileys & emotion",
    "travel places": "travel & places",
    "modifiers": "components",
    "extras openmoji": "extras",
    "extras unicode": "extras",
}


@dataclass(frozen=True)
class EmojiEntry:
    """What is known of one emoji apart from its drawing."""

    name: str
    category: str
    tags: tuple[str, ...]


class EmojiNames:
    """Finds the standard's label, category and tags for an icon of any set.

    An icon is looked up by its code point where the set lists them, else by its name and by its aliases in the set,
    so that one concept has one name in all styles.
    """

    def __init__(self, folder: Path) -> None:
        rows = json.loads((folder / "en/data.json").read_text(encoding="utf-8"))
        groups = json.loads((folder / "en/messages.json").read_text(encoding="utf-8"))["groups"]
        messages = {group["order"]: group["message"] for group in groups}
        self.by_code: dict[str, EmojiEntry] = {}
        self.by_slug: dict[str, EmojiEntry] = {}
        for row in rows:
            if "group" not in row:
                continue
            entry = EmojiEntry(readable_name(row["label"]), messages[row["group"]], tuple(row.get("tags", ())))
            self.by_code[_code_key(row["hexcode"])] = entry
            self.by_slug.setdefault(slug(row["label"].replace("&", "and")), entry)

    def find(self, code: str | None, icon_names: list[str]) -> EmojiEntry | None:
        """The entry of the code point, or of the first icon name that is a label; None if there is none."""
        if code is not None and _code_key(code) in self.by_code:
            return self.by_code[_code_key(code)]
        return next((self.by_slug[name] for name in icon_names if name in self.by_slug), None)


def _code_key(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def is_skin_tone_variant(icon: str, icons: dict[str, dict[str, str]]) -> bool:
    """Whether the icon is another icon of the set with a skin tone (and not, say, a "traffic light")."""
    base = _SHORT_SKIN_TONE.sub("", icon)
    return bool(_SKIN_TONE.search(icon)) or (base != icon and base in icons)


def clean_icon_name(icon: str) -> str:
    """An icon's name without the sets' slips: "flag-for-flag-niue" -> "flag-niue", "axe2" -> "axe"."""
    icon = re.sub(r"^flag-for-(?:flag-)?", "flag-", icon.replace("_", "-"))
    return re.sub(r"(?<=[a-z])\d$", "", _REPAIRED.get(icon, icon))


@dataclass(frozen=True)
class Drawing:
    """One icon of a set: what it shows and the SVG that shows it."""

    entry: EmojiEntry
    svg: str
    mirrored: bool


def read_set(folder: Path, names: EmojiNames) -> list[Drawing]:
    """The icons of one unpacked Iconify package, one per name, without skin-tone variants, sorted by name.

    Where two icons have the same name after cleaning, the one that the set does not hide stays.
    """
    collection, categories, codes = (
        json.loads((folder / f"{file}.json").read_text(encoding="utf-8")) for file in ("icons", "metadata", "chars")
    )
    icons, aliases = collection["icons"], collection["aliases"]
    code_of = {icon: code for code, icon in dict(codes).items()}
    category_of = {icon: category for category, members in categories["categories"].items() for icon in members}
    mirrored = {alias: target["parent"] for alias, target in aliases.items() if "hFlip" in target}
    same = _aliases_by_icon(aliases, mirrored)
    found: dict[str, Drawing] = {}
    for icon in sorted([*icons, *mirrored], key=lambda icon: ("hidden" in icons.get(icon, ()), icon)):
        if is_skin_tone_variant(icon, icons | mirrored):
            continue
        cleaned = clean_icon_name(icon)
        entry = names.find(code_of.get(icon), [cleaned, *same.get(icon, [])])
        if entry is None:
            entry = EmojiEntry(_unlisted_name(cleaned), _category(category_of.get(icon, "extras")), ())
        drawing = Drawing(entry, _svg(icons[mirrored.get(icon, icon)], collection), icon in mirrored)
        found.setdefault(file_stem(entry.name), drawing)
    return [found[stem] for stem in sorted(found)]


def _aliases_by_icon(aliases: dict[str, dict[str, str]], mirrored: dict[str, str]) -> dict[str, list[str]]:
    """Other names of each icon; a mirrored alias is a picture of its own."""
    same: dict[str, list[str]] = {}
    for alias, target in aliases.items():
        if alias not in mirrored:
            same.setdefault(target["parent"], []).append(alias)
    return same


def _category(name: str) -> str:
    return _CATEGORIES.get(name.lower(), name.lower())


def file_stem(name: str) -> str:
    """A name as a file name: its slug, or its code points where it has no letter or digit."""
    return slug(name) or "-".join(f"{ord(letter):x}" for letter in name)


def _unlisted_name(cleaned: str) -> str:
    if cleaned.startswith("flag-"):
        return "flag of " + " ".join(word.capitalize() for word in cleaned.split("-")[1:])
    return cleaned.replace("-", " ")


def _svg(icon: dict[str, str], collection: dict[str, float]) -> str:
    left, top = icon.get("left", collection.get("left", 0)), icon.get("top", collection.get("top", 0))
    width, height = (icon.get(side, collection.get(side, 16)) for side in ("width", "height"))
    view = f"{left} {top} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view}">{icon["body"]}</svg>'
    )


def render(svg: str, size: int, mirrored: bool = False) -> Image.Image:
    """Draws an SVG on white: an RGB picture of (size, size) pixels, other shapes centred."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    with Image.open(io.BytesIO(png)) as drawn:
        rgba = drawn.convert("RGBA")
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(rgba, ((size - rgba.width) // 2, (size - rgba.height) // 2))
    rgb = canvas.convert("RGB")
    return ImageOps.mirror(rgb) if mirrored else rgb


def build_rows(packages: Path, styles: tuple[EmojiStyle, ...], size: int) -> Iterator[tuple[dict[str, object], bytes]]:
    """Draws the sets one picture after another.

    Args:
        packages: folder with the unpacked npm packages, each in a folder named by `package_folder`.
        styles: the sets, in order; captions name the style when there is more than one.
        size: side of the pictures in pixels.

    Yields:
        The row of metadata.jsonl and the picture as a lossless WebP file.
    """
    names = EmojiNames(packages / package_folder(EMOJIBASE))
    for style in styles:
        drawings = read_set(packages / package_folder(style.package), names)
        logger.info("%s: %d names", style.name, len(drawings))
        for drawing in drawings:
            entry = drawing.entry
            row: dict[str, object] = {
                "file_name": f"{style.name}/{file_stem(entry.name)}.webp",
                "name": entry.name,
                "text": with_article(entry.name),
                "captions": phrasings(entry.name, list(entry.tags), style.name if len(styles) > 1 else None),
                "category": entry.category,
                "style": style.name,
                "license": style.license,
                "split": split_of(entry.name),
            }
            buffer = io.BytesIO()
            render(drawing.svg, size, drawing.mirrored).save(buffer, "WEBP", lossless=True, quality=80, method=6)
            yield row, buffer.getvalue()


def write_image_folder(rows: Iterable[tuple[Mapping[str, object], bytes]], out: Path) -> int:
    """Writes pictures and metadata.jsonl as an imagefolder, or as a zip file of one if `out` ends in ".zip".

    The zip file has no times in it: the same rows make the same bytes. Returns the number of pictures.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    if out.suffix == ".zip":
        with zipfile.ZipFile(out, "w") as archive:
            for row, picture in rows:
                archive.writestr(zipfile.ZipInfo(str(row["file_name"])), picture)
                lines.append(json.dumps(row, ensure_ascii=False))
            archive.writestr(zipfile.ZipInfo("metadata.jsonl"), "\n".join(lines) + "\n", zipfile.ZIP_DEFLATED, 9)
        return len(lines)
    for row, picture in rows:
        path = out / str(row["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
        lines.append(json.dumps(row, ensure_ascii=False))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
