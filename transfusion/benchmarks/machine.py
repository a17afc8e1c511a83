"""What a measurement ran on and with, so that nobody has to guess."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("torch", "transformers", "diffusers", "transfusion-pytorch")
# Instructions that decide how fast products are; bfloat16 without one of its own is emulated.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
)


def environment(device: str) -> dict[str, Any]:
    """Versions, processor, threads, load, commit and command."""
    found: dict[str, Any] = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    found["processor"] = processor()
    found["threads"], found["cores"] = torch.get_num_threads(), os.cpu_count()
    found["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found["variables"] = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    found["commit"] = commit()
    found["command"] = shlex.join(["python", *sys.argv])
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Name, and those of its flags that matter."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
    except OSError:
        return {"name": platform.processor() or platform.machine()}
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", "").split()
    return {
        "name": fields.get("model name", platform.machine()),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "bf16": "amx" if "amx_bf16" in flags else "avx512" if "avx512_bf16" in flags else "emulated",
    }


def commit() -> str | None:
    """Of the repository, with a plus where files were changed."""
    folder = Path(__file__).parent
    try:
        run = [
            subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for args in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0] + ("+" if run[1] else "")


__all__ = ["environment", "processor"]
