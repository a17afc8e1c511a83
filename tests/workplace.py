"""The folder in which README, guides and notebook are read: a trained model, a language model, ten pictures."""

import json
import shutil
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_processor import tiny_tokenizer
from transfusion.data import load_emoji
from transfusion.training.recipes import DemoRecipe, train_demo


RECIPES = Path(__file__).parents[1] / "scripts" / "recipes"


def make_workplace(folder: Path) -> None:
    """Make `runs/demo`, `runs/llama`, `my_pictures` and `scripts/recipes` in `folder`, by the package's own code."""
    shutil.copytree(RECIPES, folder / "scripts" / "recipes")
    save_pictures(folder / "my_pictures")
    save_language_model(folder / "runs" / "llama")
    recipe = DemoRecipe(batch_size=10, num_inference_steps=2)
    train_demo(folder / "runs" / "demo", recipe, folder / "my_pictures", max_minutes=None, max_steps=2)


def save_pictures(folder: Path) -> None:
    """Ten pictures with their captions."""
    folder.mkdir(parents=True)
    rows = []
    for number, picture in enumerate(load_emoji("held_out")[:10]):
        picture.image.save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": picture.captions[0]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def save_language_model(folder: Path) -> None:
    """A small Llama of random weights, with its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
