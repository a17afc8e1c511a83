"""Every block of code in README and docs, run as it stands there, document by document.

Python blocks of a document share their names; JSON blocks are read; of bash blocks the scripts are run, in this
process. A block that cannot run here says why in a comment directly above it, `<!-- not run: needs two GPUs -->`.
"""

import importlib
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- (?P<note>.*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "not run: "
RUN_ELSEWHERE = "test-command"  # by .ci/run, in a fresh environment
SET_UP = ("python3 -m venv ", "pip install ")  # lines of a shell, done before this test runs
# What is added to a command that would train for minutes. The last of two equal options counts.
SHORTER = {
    "scripts/train.py demo": "--data my_pictures --max_minutes 0.02 --num_inference_steps 2",
    "scripts/train.py run": "--set length.max_steps=2 --set training.num_inference_steps=2",
    "scripts/finetune.py": "--max_steps 2 --num_inference_steps 2",
}


@dataclass(frozen=True)
class Block:
    """A block of code: where its first line stands, its language, and the comment above it."""

    path: Path
    line: int
    language: str
    note: str
    code: str

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without those that set the environment up."""
        lines = self.code.replace("\\\n", " ").splitlines()
        commands = [command.split("  #")[0].strip() for command in lines]
        return [command for command in commands if command and not command.startswith(SET_UP)]


def read_blocks(path: Path) -> list[Block]:
    """The blocks of a document, in order."""
    text = path.read_text(encoding="utf-8")
    blocks = []
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        blocks.append(Block(path, line, found["language"], found["note"] or "", found["code"]))
    return blocks


def run_block(block: Block, names: dict[str, Any]) -> None:
    """Run a block in the current folder; what it defines is added to `names`."""
    if block.note.startswith(NOT_RUN) or block.note == RUN_ELSEWHERE:
        return
    if block.language == "python":
        code = "\n" * (block.line - 1) + block.code  # so that a traceback names the line of the document
        exec(compile(code, str(block.path), "exec"), names)
    elif block.language == "json":
        json.loads(block.code)
    else:
        for command in block.commands:
            run_script(command)


def run_script(command: str) -> None:
    """Run `python scripts/<name>.py ...`, shortened where `SHORTER` says so."""
    assert command.startswith("python scripts/"), f"{command}: run a script, or say why not above the block"
    shorter = [options for start, options in SHORTER.items() if command.startswith(f"python {start} ")]
    _, script, *arguments = shlex.split(" ".join([command, *shorter]))
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    module.main(module.parse_args(arguments))


BLOCKS = {path.name: read_blocks(path) for path in DOCUMENTS}


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks])
def test_blocks_run(name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": name}
    for block in BLOCKS[name]:
        run_block(block, names)


def test_every_block_is_found_and_of_a_language_that_runs() -> None:
    for path in DOCUMENTS:
        fences = [line for line in path.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
        assert len(fences) == 2 * len(BLOCKS[path.name]), f"{path.name}: a block is not closed, or is indented"
        languages = {block.language for block in BLOCKS[path.name]}
        assert languages <= {"python", "bash", "json"}, f"{path.name}: blocks of {languages}"


def test_few_blocks_are_left_out() -> None:
    blocks = [block for listed in BLOCKS.values() for block in listed]
    left_out = [block for block in blocks if block.note.startswith(NOT_RUN)]
    assert all(len(block.note) > len(NOT_RUN) + 10 for block in left_out), "say why"
    assert len(left_out) <= len(blocks) / 4, [f"{block.path.name}:{block.line}" for block in left_out]


def test_every_shortening_is_used() -> None:
    commands = [command for listed in BLOCKS.values() for block in listed for command in block.commands]
    for start in SHORTER:
        assert any(command.startswith(f"python {start} ") for command in commands), f"{start} is in no document"


def test_a_wrong_block_is_seen(tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_text("Text.\n\n```python\nx = 1\nx.missing\n```\n\n```bash\nmake demo\n```\n")
    python, bash = read_blocks(tmp_path / "guide.md")
    with pytest.raises(AttributeError) as raised:
        run_block(python, {})
    assert raised.traceback[-1].lineno + 1 == 5
    with pytest.raises(AssertionError, match="make demo"):
        run_block(bash, {})
    run_block(Block(bash.path, bash.line, "bash", "not run: it trains for minutes", bash.code), {})
