"""What a user waits for before anything happens: imports in fresh processes, and loading a checkpoint."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

from . import ours, peer
from .timing import Samples, turns
from .workloads import ROW, Size, num_tokens


# By the name of a system, what a fresh process runs.
IMPORTS = {
    "ours, the package": "import transfusion",
    "ours, with its model class": "from transfusion import TransfusionForMultimodalGeneration",
    "plain, what the model needs of transformers": "from transformers import AutoModel, PreTrainedModel",
    "torch alone": "import torch",
}
PEER_IMPORT = {"peer": f"import {peer.PACKAGE}"}


def run_fresh(code: str) -> float:
    """Wall seconds of a fresh interpreter that runs `code`, less those of one that runs nothing."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


def time_imports(
    rounds: int,
    statements: Mapping[str, str] | None = None,
    run: Callable[[str], float] = run_fresh,
) -> dict[str, Samples]:
    """Seconds of each import, in turn; one round more warms the disk cache up."""
    if statements is None:
        statements = IMPORTS | (PEER_IMPORT if peer.is_installed() else {})
    found = {name: Samples() for name in statements}
    for statement in statements.values():
        run(statement)
    for _, name in turns(list(statements), rounds):
        found[name].values.append(run(statements[name]) - run("pass"))
    return found


def loaders(size: Size, folder: Path, with_peer: bool) -> dict[str, Callable[[], Any]]:
    """By system, a call that loads a checkpoint of `size` from `folder`."""
    model = ours.build(ours.make_config(size, num_tokens(ROW)))
    model.save_pretrained(folder / "ours")
    calls: dict[str, Callable[[], Any]] = {
        "ours, from_pretrained": lambda: type(model).from_pretrained(folder / "ours")
    }
    if with_peer:
        (folder / "peer").mkdir()
        file = str(folder / "peer" / "model.safetensors")
        save_model(peer.build(size), file)

        def load_peer() -> nn.Module:
            module = peer.build(size)
            load_model(module, file)
            return module

        calls["peer, built and filled from safetensors"] = load_peer
    return calls


def in_folder(measure: Callable[[Path], Any]) -> Any:
    """What `measure` returns, given a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


__all__ = ["IMPORTS", "in_folder", "loaders", "run_fresh", "time_imports"]
