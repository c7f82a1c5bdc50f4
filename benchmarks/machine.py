"""A description of the machine that the figures were measured on."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def described(device: str = "cpu") -> str:
    """Return processor, cores, accelerator and versions in one line."""
    parts = [f"{os.cpu_count()} cores of {_processor()}"]
    if device.startswith("cuda"):
        parts.append(torch.cuda.get_device_name(device))
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "mergekit"))
    return ", ".join([*parts, f"Python {platform.python_version()}", *versions])


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
