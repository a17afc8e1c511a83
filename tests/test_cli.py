import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from transfusion import cli


ROOT = Path(__file__).parents[1]


def test_the_command_trains_what_the_file_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("transfusion.training.run.train_run", lambda spec, resume: asked.append((spec, resume)))
    file = tmp_path / "run.yaml"
    entries = {
        "output_dir": "x",
        "model": {"preset": "demo"},
        "data": {"sources": [{"kind": "imagefolder", "path": "p"}]},
        "length": {"max_steps": 3},
    }
    file.write_text(yaml.safe_dump(entries))
    result = CliRunner().invoke(cli.app, ["train", str(file), "--resume", "--set", "length.max_steps=5"])
    assert result.exit_code == 0, result.output
    [(spec, resume)] = asked
    assert spec.length.max_steps == 5 and resume is True


def test_what_is_wrong_is_said_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "transfusion.cli", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "is no file; give the YAML file of a training." in done.stderr and "Traceback" not in done.stderr
