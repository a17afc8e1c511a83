"""The `transfusion` command: one verb for each thing that users do.

transfusion train scripts/recipes/demo.yaml
transfusion train my_run.yaml --resume --set length.max_steps=2000 --set training.batch_size=32
torchrun --nproc_per_node 2 -m transfusion.cli train my_run.yaml
accelerate launch --config_file scripts/recipes/accelerate/fsdp2.yaml -m transfusion.cli train my_run.yaml
"""

import logging
import sys
from pathlib import Path
from typing import Annotated


try:
    import typer
    from rich.logging import RichHandler
except ImportError as error:
    raise SystemExit(f"{error}: the command needs pip install 'transfusion-transformers[train]'.") from error


app = typer.Typer(
    help="Train and use Transfusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def start() -> None:
    """Train and use Transfusion models."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="YAML file of a training; see scripts/recipes.")],
    resume: Annotated[bool, typer.Option(help="Go on from the newest complete checkpoint, if there is one.")] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="An entry in place of the file's, such as length.max_steps=100.")
    ] = None,
) -> None:
    """Train what a YAML file states.

    The process ends with 143 where SIGTERM stopped it and with 130 where ctrl-C did, both with a checkpoint: the same
    command with --resume goes on.
    """
    from .training.run import train_run
    from .training.specs import read_spec

    train_run(read_spec(file, changes or ()), resume)


def main() -> None:
    """Run the command; what a user got wrong is shown without a traceback."""
    try:
        app()
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
