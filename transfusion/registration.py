"""Makes our pipeline known to diffusers without importing diffusers, which takes seconds.

`DiffusionPipeline.from_pretrained` looks a pipeline up among the names of diffusers, and `AutoPipelineForText2Image`
in a table; neither can be told of a class before it exists, nor asks anyone. Importing diffusers for that, and the
table, would make `import transfusion` half as long again (2.3 s of processor time on 4.6 s). So the import system says
when a program has imported one of the two, and only then is our pipeline imported and entered.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


_PIPELINE = f"{__package__}.pipeline"


class _AfterImport(MetaPathFinder):
    """Waits on `sys.meta_path` for one module, and calls `action` whenever it was executed, on a reload too."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as the finders after this one do, with a loader that calls `action` in the end."""
        if fullname != self.name:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call `action` whenever the module `name` was imported or loaded again; now, if it is imported."""
    sys.meta_path.insert(0, _AfterImport(name, action))
    if name in sys.modules:
        action()


def register_with_diffusers() -> None:
    """Let `DiffusionPipeline` and `AutoPipelineForText2Image` load our checkpoints, whenever they are imported."""
    after_import("diffusers.pipelines.pipeline_utils", _import_pipeline)
    after_import(_PIPELINE, _name_pipeline)
    after_import("diffusers.pipelines.auto_pipeline", _map_pipeline)


def _import_pipeline() -> Any:
    # Where it is our pipeline that imports diffusers, this is the half-made module.
    return importlib.import_module(_PIPELINE)


def _name_pipeline() -> None:
    sys.modules["diffusers"].TransfusionPipeline = _import_pipeline().TransfusionPipeline  # type: ignore[attr-defined]


def _map_pipeline() -> None:
    table = sys.modules["diffusers.pipelines.auto_pipeline"].AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    table["transfusion"] = _import_pipeline().TransfusionPipeline


__all__ = ["after_import", "register_with_diffusers"]
