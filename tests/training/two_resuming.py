"""Two processes, started by torchrun, that stop a training and go on; each writes what it saw."""

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.training.resumable import PLAIN, Act, differences, outcome, plain_model, tiny_trainer
from transfusion.training.signals import SaveOnSignal


def train(output_dir: Path, resume: bool | str | None = None, *callbacks: Any, **options: Any) -> dict[str, Any]:
    trainer = tiny_trainer(output_dir, callbacks=list(callbacks), per_device_train_batch_size=1, **options)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


def error_of(output_dir: Path, resume: bool | str | None = None, *callbacks: Any, **options: Any) -> str:
    try:
        train(output_dir, resume, *callbacks, **options)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}
    whole = train(folder / "whole")
    results["resumed"] = []
    for step in (3, 2, 5):
        results["resumed"] += differences(train(folder / "whole", str(folder / "whole" / f"checkpoint-{step}")), whole)
    results["differ"] = differences(train(folder / "seed", seed=1, save_strategy="no"), whole)

    stop = Act(3, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None, at_substep=True)
    try:
        train(folder / "cut", None, SaveOnSignal(), stop, save_strategy="no")
    except SystemExit as end:
        results["code"] = end.code
    results["after a signal"] = differences(train(folder / "cut", True), whole)

    def fill_disk() -> None:
        def full(*args: Any, **kwargs: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if rank == 1:
            setattr(Path, "write_text", full)  # noqa: B010

    write_text = Path.write_text
    results["full"] = error_of(folder / "full", None, Act(3, fill_disk), save_steps=2, max_steps=4)
    setattr(Path, "write_text", write_text)  # noqa: B010
    results["left"] = sorted(path.name for path in (folder / "full").iterdir())
    train(folder / "plain", model=plain_model(), **PLAIN)
    results["none"] = error_of(folder / "none", True)
    (folder / f"results-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
