"""The architecture, read from the sources: floors, flat Hub files, no pickle, sizes, mirrored tests, scripts."""

import ast
import importlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import pytest


ROOT = Path(__file__).parents[1]

# From the ground up: a module imports lower floors and, in a folder, its own room. A room need not be built yet.
HUB_FLOORS = (
    (
        "autoencoder",
        "configuration",
        "diffusion",
        "experts",
        "generation_options",
        "hyper_connections",
        "latents",
        "layout",
        "model_card",
    ),
    ("block_masks", "caching", "positions", "sharing"),
    (
        "attention",
        "chat",
        "context",
        "image_processing",
        "inputs",
        "losses",
        "outputs",
        "patch_codec",
        "special_tokens",
    ),
    ("denoising", "warm_start"),
    ("interleaving", "processing_options"),
    ("generation",),
    ("modeling_transfusion", "processing"),
    ("pipeline",),
)
FLOORS = (
    *HUB_FLOORS,
    ("registration", "tasks"),
    ("data",),
    ("evaluation", "serving", "training"),
    ("benchmarks", "experiments"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HUB_ROOMS = frozenset(room for rooms in HUB_FLOORS for room in rooms)

# What a user of the Hub files has: transformers refuses to load a file that names anything else.
HUB_IMPORTS = frozenset(
    ("PIL", "diffusers", "einops", "huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers")
)
PICKLES = frozenset(("_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"))

MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 80
MAX_MEDIAN_LINES = 14

# The two patterns of transformers.dynamic_module_utils, which reads lines, not syntax: docstrings count.
HUB_IMPORT_LINE = re.compile(r"^\s*(?:from\s+(\S+)\s+import\b|import\s+(\S+)\s*$)")
MACHINE_PATH = re.compile(r"(?<![\w./~$}-])/(?:home|mnt|root|tmp|work)(?:/\S*|\b(?!\w))")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A Python file: its path from the root of the repository, and its text."""

    path: PurePosixPath
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @property
    def room(self) -> str:
        """The room of a file of the package: `data` for transfusion/data/captions.py."""
        return self.path.with_suffix("").parts[1]

    @property
    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def imports(self, nodes: Iterable[ast.AST] | None = None) -> Iterator[tuple[int, str]]:
        """Line and absolute dotted name of whatever is imported, by default anywhere in the file."""
        for node in ast.walk(self.tree) if nodes is None else nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                folder = self.path.parent.parts
                base = folder[: len(folder) - node.level + 1] if node.level else ()
                module = ".".join((*base, node.module) if node.module else base)
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def read_sources(folder: str) -> list[Source]:
    return [
        Source(PurePosixPath(path.relative_to(ROOT).as_posix()), path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


PACKAGE = read_sources("transfusion")
SCRIPTS = read_sources("scripts")
TESTS = read_sources("tests")
HUB_FILES = [source for source in PACKAGE if len(source.path.parts) == 2 and source.room in HUB_ROOMS]
HUB_CLASSES = frozenset(
    node.name for source in HUB_FILES for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)
)


def floor_problems(source: Source) -> Iterator[str]:
    """Imports of the package that are not of a lower floor."""
    if source.room in ("__init__", "__main__"):
        return
    if source.room not in FLOOR_OF:
        yield f"{source.path}: no floor has this room; add {source.room!r} to FLOORS where it belongs"
        return
    own = {(line, f"{name}.".split(".")[1]) for line, name in source.imports() if name.split(".")[0] == "transfusion"}
    for line, room in sorted(own):
        if room not in FLOOR_OF:
            yield f"{source.path}:{line}: no module {room!r} in FLOORS; import from the module that defines the name"
        elif FLOOR_OF[room] >= FLOOR_OF[source.room] and room != source.room:
            floors = f"floor {FLOOR_OF[room]}, this file on {FLOOR_OF[source.room]}"
            yield f"{source.path}:{line}: {room} is on {floors}; move what both need to a lower floor"


def flatness_problems(source: Source) -> Iterator[str]:
    """Imports by which a Hub file reaches anything but a sibling file, as transformers reads them."""
    siblings = set()
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        siblings.add(node.lineno)
        if node.level > 1 or node.module is None or "." in node.module or node.module not in HUB_ROOMS:
            yield f"{source.path}:{node.lineno}: write `from .x import y`, x being one of the Hub files beside it"
        elif node.col_offset:
            yield f"{source.path}:{node.lineno}: move this import to the start of the file"
    for line, text in enumerate(source.text.splitlines(), 1):
        found = HUB_IMPORT_LINE.match(text)
        name = (found.group(1) or found.group(2)) if found else ""
        if name.startswith(".") and line not in siblings:
            yield f"{source.path}:{line}: transformers takes this line of a docstring for an import; reword it"


def dependency_problems(source: Source) -> Iterator[str]:
    """Imports that a Hub file may not ask of those who load a checkpoint, in code or in a docstring."""
    imported = [(line, name) for line, name in source.imports() if not name.startswith("transfusion.")]
    for line, text in enumerate(source.text.splitlines(), 1):
        if found := HUB_IMPORT_LINE.match(text):
            imported.append((line, found.group(1) or found.group(2)))
    for line, name in sorted(set(imported)):
        top = name.split(".")[0]
        if top and top not in HUB_IMPORTS and top not in sys.stdlib_module_names:
            yield f"{source.path}:{line}: {name}; a Hub file imports {', '.join(sorted(HUB_IMPORTS))} and no more"


def own_class_check_problems(source: Source) -> Iterator[str]:
    """Checks against a class of the Hub files, which exists twice once it is loaded from the Hub.

    A private class of the same file is fine: no other file makes instances of it.
    """
    private = {
        node.name for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef) and node.name.startswith("_")
    }
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or len(node.args) < 2:
            continue
        if node.func.id in ("isinstance", "issubclass"):
            named = {child.id for child in ast.walk(node.args[1]) if isinstance(child, ast.Name)}
            named |= {child.attr for child in ast.walk(node.args[1]) if isinstance(child, ast.Attribute)}
            for name in sorted((named & HUB_CLASSES) - private):
                yield f"{source.path}:{node.lineno}: {node.func.id} of {name}; ask for what it does, not for its class"


def module_level(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run on import: neither function bodies nor `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from module_level(child)


def slow_import_problems(source: Source) -> Iterator[str]:
    """Imports of diffusers that run when the module is imported: they take seconds."""
    for line, name in source.imports(module_level(source.tree)):
        if name.split(".")[0] == "diffusers":
            yield f"{source.path}:{line}: {name}; import it inside the function that needs it"


def torchvision_problems(source: Source) -> Iterator[str]:
    """Imports of torchvision."""
    for line, name in source.imports():
        if name.split(".")[0] == "torchvision":
            yield f"{source.path}:{line}: {name}; torchvision is no dependency, use torch, numpy or PIL"


def pickle_problems(source: Source) -> Iterator[str]:
    """Ways to read or write a pickle, which runs code when it is read."""
    remedy = "use safetensors for tensors and JSON for the rest"
    for line, name in source.imports():
        if name.split(".")[0] in PICKLES or name in ("torch.load", "torch.save"):
            yield f"{source.path}:{line}: {name}; {remedy}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            yield f"{source.path}:{node.lineno}: {ast.unparse(node)}; {remedy}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"{source.path}:{node.lineno}: allow_pickle; {remedy}"


def num_lines(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def size_problems(source: Source) -> Iterator[str]:
    """Files and functions that are too long."""
    length = len(source.text.splitlines())
    if length > MAX_FILE_LINES:
        yield f"{source.path}: {length} lines, at most {MAX_FILE_LINES}; split it by what it is about"
    for function in source.functions:
        if (length := num_lines(function)) > MAX_FUNCTION_LINES:
            where = f"{source.path}:{function.lineno}: {function.name}"
            yield f"{where} has {length} lines, at most {MAX_FUNCTION_LINES}; name its steps"


def script_problems(source: Source) -> Iterator[str]:
    """What a script lacks of being a documented program that can be imported."""
    body = source.tree.body
    if not any(isinstance(node, Function) and node.name == "main" for node in body):
        yield f"{source.path}: no main; put what the script does into `def main(...)`"
    guards = [node for node in body if isinstance(node, ast.If)]
    if not any(ast.unparse(node.test) == "__name__ == '__main__'" for node in guards):
        yield f'{source.path}: end it with `if __name__ == "__main__":` and a call of main'
    if str(source.path) not in (ast.get_docstring(source.tree) or ""):
        yield f"{source.path}: begin it with a docstring that shows its use: `python {source.path} --option value`"


def path_problems(source: Source) -> Iterator[str]:
    """Absolute paths of the machine that a text was written on."""
    for line, text in enumerate(source.text.splitlines(), 1):
        for found in MACHINE_PATH.finditer(text):
            yield f"{source.path}:{line}: {found.group()}; write a path relative to the repository"


RULES = [
    (floor_problems, PACKAGE),
    (flatness_problems, HUB_FILES),
    (dependency_problems, HUB_FILES),
    (own_class_check_problems, HUB_FILES),
    (slow_import_problems, [source for source in PACKAGE if source.room != "pipeline"]),  # its base is diffusers'
    (torchvision_problems, PACKAGE + SCRIPTS + TESTS),
    (pickle_problems, PACKAGE + SCRIPTS),
    (size_problems, PACKAGE + SCRIPTS + TESTS),
    (script_problems, SCRIPTS),
]
Rule = Callable[[Source], Iterator[str]]


@pytest.mark.parametrize(("rule", "sources"), RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_rule(rule: Rule, sources: list[Source]) -> None:
    problems = [problem for source in sources for problem in rule(source)]
    assert not problems, "\n".join(["", *problems])


LONG_FUNCTION = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES

VIOLATIONS: list[tuple[Rule, str, str]] = [
    (floor_problems, "transfusion/latents.py", "from .generation import generate"),
    (floor_problems, "transfusion/latents.py", "from .diffusion import DDPM"),
    (floor_problems, "transfusion/latents.py", "def f():\n    import transfusion.pipeline"),
    (floor_problems, "transfusion/pipeline.py", "from . import TransfusionConfig"),
    (floor_problems, "transfusion/pipeline.py", "import transfusion"),
    (floor_problems, "transfusion/data/cache.py", "from ..training.trainer import TransfusionTrainer"),
    (floor_problems, "transfusion/training/trainer.py", "from ..evaluation.perplexity import perplexity"),
    (floor_problems, "transfusion/data/cache.py", "from transfusion import cli"),
    (floor_problems, "transfusion/cellar.py", ""),
    (flatness_problems, "transfusion/pipeline.py", "from . import latents"),
    (flatness_problems, "transfusion/pipeline.py", "from ..transfusion.latents import patchify"),
    (flatness_problems, "transfusion/pipeline.py", "from .data.captions import slug"),
    (flatness_problems, "transfusion/pipeline.py", "from .cli import main"),
    (flatness_problems, "transfusion/pipeline.py", "def f():\n    from .latents import patchify"),
    (flatness_problems, "transfusion/pipeline.py", '"""An example:\n\n    from .latents import patchify\n"""'),
    (dependency_problems, "transfusion/pipeline.py", "import transfusion"),
    (dependency_problems, "transfusion/pipeline.py", "def f():\n    import datasets.arrow, json"),
    (dependency_problems, "transfusion/pipeline.py", '"""An example:\n\n    from datasets import Dataset\n"""'),
    (own_class_check_problems, "transfusion/pipeline.py", "isinstance(c, (dict, TransfusionConfig))"),
    (own_class_check_problems, "transfusion/pipeline.py", "issubclass(c, configuration.TransfusionConfig)"),
    (
        slow_import_problems,
        "transfusion/pipeline.py",
        "try:\n    from diffusers import DDIMScheduler\nfinally:\n    pass",
    ),
    (torchvision_problems, "tests/test_pipeline.py", "def f():\n    from torchvision.transforms import v2"),
    (pickle_problems, "scripts/train.py", "def f():\n    import pickle"),
    (pickle_problems, "scripts/train.py", "import torch\ntorch.load('x', weights_only=True)"),
    (pickle_problems, "scripts/train.py", "from torch import save"),
    (pickle_problems, "scripts/train.py", "numpy.load('x', allow_pickle=True)"),
    (size_problems, "transfusion/pipeline.py", LONG_FUNCTION),
    (size_problems, "transfusion/pipeline.py", "\n" * (MAX_FILE_LINES + 1)),
    (script_problems, "scripts/train.py", '"""python scripts/train.py"""\ndef main(): pass'),
    (script_problems, "scripts/train.py", '"""Trains."""\ndef main(): pass\nif __name__ == "__main__":\n    main()'),
    (script_problems, "scripts/train.py", '"""python scripts/train.py"""\nif __name__ == "__main__":\n    pass'),
    (path_problems, "docs/guide.md", "Write to `/tmp` or"),
    (path_problems, "docs/guide.md", "cd /root/transfusion"),
    (path_problems, "docs/guide.md", 'path: "/home/me"'),
]


@pytest.mark.parametrize(("rule", "path", "text"), VIOLATIONS)
def test_rule_sees_a_violation(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(PurePosixPath(path), text)))


ALLOWED: list[tuple[Rule, str, str]] = [
    (floor_problems, "transfusion/__init__.py", "from .cli import main"),
    (floor_problems, "transfusion/data/cache.py", "from .captions import slug\nfrom ..latents import patchify"),
    (flatness_problems, "transfusion/pipeline.py", "from .latents import (\n    patchify,\n)\nfrom torch import nn"),
    (dependency_problems, "transfusion/pipeline.py", '"""\n>>> from transfusion import TransfusionConfig\n"""'),
    (dependency_problems, "transfusion/pipeline.py", "import json\nimport numpy as np\nfrom .latents import patchify"),
    (slow_import_problems, "transfusion/pipeline.py", "if TYPE_CHECKING:\n    import diffusers"),
    (slow_import_problems, "transfusion/pipeline.py", "class A:\n    def f(self):\n        import diffusers"),
    (own_class_check_problems, "transfusion/pipeline.py", "isinstance(x, torch.Tensor | list)"),
    (own_class_check_problems, "transfusion/processing.py", "class _Picture: pass\nisinstance(x, _Picture)"),
    (pickle_problems, "scripts/train.py", '"""No pickle."""\nfrom safetensors.torch import load'),
    (
        path_problems,
        "docs/guide.md",
        "https://example.org/home/x, ./work/x, $HOME/work, ~/tmp/x, and/or, /workers, a/tmp",
    ),
]


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_rule_lets_pass(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(Source(PurePosixPath(path), text)))


def test_hub_files_are_closed_for_transformers() -> None:
    """What transformers itself would copy beside each Hub file are Hub files."""
    from transformers.dynamic_module_utils import get_relative_import_files

    for source in HUB_FILES:
        copied = {Path(path).relative_to(ROOT) for path in get_relative_import_files(ROOT / source.path)}
        assert copied <= {Path(hub_file.path) for hub_file in HUB_FILES}, f"{source.path} takes along {copied}"


def test_private_names_of_transformers_are_those_of_every_version() -> None:
    """From 5.17, the oldest that is allowed; others have come and gone since."""
    found = {
        alias.name
        for source in PACKAGE
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers"
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert found <= {"_compile_jinja_template", "_get_template_variables"}


def test_importing_the_package_leaves_diffusers_alone() -> None:
    code = "import sys, transfusion; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, "import it where it is needed"


def test_median_function_is_short() -> None:
    lengths = [num_lines(function) for source in PACKAGE for function in source.functions]
    assert statistics.median(lengths) <= MAX_MEDIAN_LINES, (
        f"the median function of the package has {statistics.median(lengths)} lines, at most {MAX_MEDIAN_LINES}; "
        "take steps out of the longest ones"
    )


def test_tests_mirror_the_package() -> None:
    missing = []
    for source in PACKAGE:
        mirror = Path("tests", *source.path.parts[1:-1], f"test_{source.path.name}")
        if source.path.name != "__init__.py" and not (ROOT / mirror).exists():
            missing.append(f"{source.path}: write {mirror.as_posix()}")
    assert not missing, "\n".join(["", *missing])


@pytest.mark.parametrize("path", [str(source.path) for source in SCRIPTS])
def test_script_can_be_imported(path: str) -> None:
    """Without its optional extras too, apart from train and eval, and without doing anything."""
    importlib.import_module(path.removesuffix(".py").replace("/", "."))


def test_texts_name_no_path_of_a_machine() -> None:
    """Sources, documents, and the JSON files that ship with the package (a config remembers where it was saved)."""
    documents = [path for pattern in ("*.md", "*.txt", "*.toml", "Makefile", ".ci/run") for path in ROOT.glob(pattern)]
    for folder in ("docs", "transfusion", "scripts"):
        documents += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".txt", ".json", ".yaml")]
    texts = [Source(PurePosixPath(path.relative_to(ROOT).as_posix()), path.read_text("utf-8")) for path in documents]
    problems = [problem for text in texts + PACKAGE + SCRIPTS for problem in path_problems(text)]
    assert not problems, "\n".join(["", *problems])
