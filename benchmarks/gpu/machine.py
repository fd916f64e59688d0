"""What the machine is, and its own rates: the ceilings of everything else."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.clock import median_seconds
from benchmarks.gpu.scale import Scale

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "triton")


def measure(scale: Scale, note: Any) -> None:
    """Names and versions, the rate of a large matrix product, the bandwidth of a copy."""
    device = scale.torch_device
    note(
        card=torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        memory=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        driver=driver(),
        cuda=torch.version.cuda,
        python=platform.python_version(),
        cpus=os.cpu_count(),
        versions={name: version(name) for name in PACKAGES},
    )
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(scale.matrix, scale.matrix, device=device, dtype=dtype) for _ in range(2))
        seconds = median_seconds(partial(torch.matmul, a, b), device, 10)
        note(**{f"matrix_product_{name}_flops": 2 * scale.matrix**3 / seconds})
    source = torch.randn(16 * scale.matrix**2, device=device)
    into = torch.empty_like(source)
    note(copy_bytes_per_second=2 * source.nbytes / median_seconds(lambda: into.copy_(source), device, 10))


def driver() -> str | None:
    """The version of NVIDIA's driver, if there is one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def version(package: str) -> str | None:
    """The installed version of a package, if there is one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
