"""The kernel for GPUs, compiled ahead for several of them; no GPU takes part. Triton's wheel brings the assemblers.

Sizes are FLUX.1-dev's in bfloat16, with concepts that `saferope train` makes.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel

from saferope_core.run.fused import STAGES, constants, turn_tile, warps

from .rotation import TRAINED

HEADS, HEAD_DIM = 24, 128
TARGETS = [*(GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)), GPUTarget("hip", "gfx942", 64)]
NUMBERS = ("tokens", "batch_stride", "head_stride", "token_stride")
POINTERS = {
    "x": "*bf16",
    "heads": "*i64",
    "directions": "*bf16",
    "theta": "*fp32",
    "cut": "*fp32",
    "counts": "*fp32",
    "passed": "*u8",
}


def rows() -> Iterator[dict[str, Any]]:
    """A row for each target and number of concepts: registers and spilled bytes of a thread, shared memory, loads."""
    for target in TARGETS:
        for concepts in (1, 3):
            name = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
            case = f"{name}, {concepts} concept{'s' * (concepts > 1)}"
            yield {"case": case, **used(compiled(target, concepts), target)}


def compiled(target: GPUTarget, concepts: int) -> CompiledKernel:
    """The kernel for image tokens, with a recorder. Raises what Triton raises where it cannot compile."""
    planes = (TRAINED["rank"] + TRAINED["reach"]) // 2
    directions = torch.empty(HEADS, HEAD_DIM, concepts * (2 * planes + TRAINED["rank"]), device="meta")
    sizes = constants(concepts, planes, directions, counted=True) | {"WIDEN": False}
    types = POINTERS | dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(sizes, "constexpr")
    names = enumerate(turn_tile.arg_names)
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in names if name not in sizes}
    signature = {name: types[name] for name in turn_tile.arg_names}
    options = {"num_warps": warps(concepts), "num_stages": STAGES}
    return triton.compile(ASTSource(turn_tile, signature, sizes, aligned), target, options)


def used(kernel: CompiledKernel, target: GPUTarget) -> dict[str, Any]:
    """The resources that the kernel takes, as the assembler tells them."""
    if target.backend == "cuda":
        code, said = kernel.asm["ptx"], _ptxas(kernel, target)
        registers, spilled = _found(r"Used (\d+) registers", said), _found(r"(\d+) bytes spill stores", said)
    else:
        code = said = kernel.asm["amdgcn"]
        registers, spilled = _found(r"\.vgpr_count: +(\d+)", said), 4 * _found(r"\.vgpr_spill_count: +(\d+)", said)
    sizes = {"registers": registers, "bytes spilled": spilled, "bytes of shared memory": kernel.metadata.shared}
    return {**sizes, "bytes of the widest load": _widest(code)}


def _ptxas(kernel: CompiledKernel, target: GPUTarget) -> str:
    """The report of NVIDIA's assembler on the kernel."""
    arch = kernel.asm["ptx"].split(".target ")[1].split()[0].rstrip(",")
    command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={arch}", "-o", "/dev/null", "-"]
    return subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True).stderr


def _widest(text: str) -> int:
    """Bytes that a thread loads from the GPU's memory at once, at most."""
    words = re.findall(r"ld\.global\S*?\.(?:v(\d)\.)?b(\d+)", text)
    words += [(count or "1", "32") for count in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", text)]
    return max(int(count or 1) * int(bits) // 8 for count, bits in words)


def _found(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in what the assembler said"
    return int(found[1])
