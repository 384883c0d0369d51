"""Launches of the real launchers without a GPU: every kernel is specialised as it would be, and none runs.

The tensors are on the meta device; a driver that stands in for CUDA's names the architecture. What a launch can then be
compiled to, down to the machine code, is what a machine of that architecture would be given; `resources` reads it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pyattn.kernels import _configs

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class DryDriver(DriverBase):
    """As much of a CUDA driver as a launch asks for before it launches."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps its state per device: architectures must not share it

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Launch:
    """One kernel, specialised."""

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, Any]  # constexpr arguments by name
    source: Any  # triton.compiler.ASTSource
    options: dict[str, Any]  # num_warps, num_stages, ...
    target: GPUTarget

    def compile(self) -> Any:
        return triton.compile(self.source, target=self.target, options=self.options)


@contextmanager
def dry_launches(arch: int) -> Iterator[list[Launch]]:
    """Inside it, launches on meta tensors are specialised for `arch` and recorded in the list it gives."""
    launches: list[Launch] = []
    specialised: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        specialised.append((self.ASTSource(self, signature, constexprs, attrs), options.__dict__))

    def dry_run(self, *args, grid, warmup, **kwargs):
        run(self, *args, grid=grid, warmup=True, **kwargs)
        source, options = specialised.pop()
        constants = {self.arg_names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
        launches.append(Launch(self.fn.__name__, grid, constants, source, options, GPUTarget("cuda", arch, 32)))

    active = driver._active
    with (
        mock.patch.object(JITFunction, "run", dry_run),
        mock.patch.object(JITFunction, "_do_compile", do_compile),
        mock.patch.object(_configs, "architecture", lambda device: arch),
    ):
        driver.set_active(DryDriver(arch))
        try:
            yield launches
        finally:
            driver._active = active


@dataclass(frozen=True)
class Resources:
    """What the machine code of one kernel needs and holds."""

    shared_bytes: int
    tensor_memory_columns: int
    registers: int
    stack_bytes: int  # room for spilled registers
    instructions: Counter[str]  # by opcode, without modifiers


def resources(compiled: Any) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output("cuobjdump", "--dump-resource-usage", cubin)
        sass = _output("nvdisasm", "-c", cubin)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    opcodes = re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.MULTILINE)
    metadata = compiled.metadata
    return Resources(metadata.shared, getattr(metadata, "tmem_size", None) or 0, registers, stack, Counter(opcodes))


def _output(tool: str, *arguments: Any) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
