"""Kernels compiled for machines that are not at hand, and what the compilers made of them.

What a launch would have been is known from a recorded one (:func:`skipc.kernels.gpu.kernel.recorded`); its arguments
are specialised as Triton does it at a launch (numbers that 16 divides, ones, absent pointers), so what is compiled here
is what would run."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from skipc.kernels.gpu.kernel import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Arch:
    """A kind of device.

    Attributes:
        target: as Triton names it.
        shared: bytes of shared memory that a program may have.
        shared_in_all: bytes that a multiprocessor has.
        registers: that a multiprocessor has, of 32 bits (vector registers of a compute unit on AMD).
        threads: that a multiprocessor can have under way.
        bandwidth: of its memory, bytes a second, as its vendor states it.
        bf16: operations a second of its tensor cores in bf16, likewise, without sparsity.
    """

    name: str
    target: GPUTarget
    shared: int
    shared_in_all: int
    registers: int
    threads: int
    units: int
    bandwidth: float
    bf16: float


# NVIDIA: CUDA C++ Programming Guide, "Compute Capabilities"; data sheets of A100 80GB SXM and H100 SXM. AMD: CDNA 3 ISA
# guide and the data sheet of MI300X.
ARCHS = {
    a.name: a
    for a in (
        Arch("sm_80", GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 65536, 2048, 108, 2.039e12, 312e12),
        Arch("sm_90", GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 65536, 2048, 132, 3.35e12, 989e12),
        Arch("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 4 * 512 * 64, 2048, 304, 5.3e12, 1307e12),
    )
}


@dataclass(frozen=True)
class Binary:
    """What a compiler made.

    Attributes:
        registers: of a thread.
        spills: bytes of a thread's registers that went to memory, with its stack.
        shared: bytes of shared memory of a program.
        tensor: instructions for tensor cores.
        wide: loads and stores of 16 bytes a thread; ``narrow``: of fewer.
        threads: of a program.
    """

    registers: int
    spills: int
    shared: int
    tensor: int
    wide: int
    narrow: int
    threads: int

    def programs(self, arch: Arch) -> int:
        """How many fit on a multiprocessor at a time."""
        granules = -(-self.registers // 8) * 8
        by_registers = arch.registers // max(granules * self.threads, 1)
        taken = self.shared + (1024 if arch.target.backend == "cuda" else 0)  # CUDA keeps a kilobyte of each
        by_shared = arch.shared_in_all // taken if taken else 32
        return max(min(by_registers, by_shared, arch.threads // self.threads, 32), 0)

    def occupancy(self, arch: Arch) -> float:
        """The share of a multiprocessor's threads that are there."""
        return self.programs(arch) * self.threads / arch.threads


def _specialised(value: Any) -> tuple[str, Any, bool]:
    """Of an argument: its type, what it is if that is fixed, and whether 16 divides it."""
    if isinstance(value, torch.Tensor):
        return "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[-1]], None, True
    if value is None or isinstance(value, bool) or value == 1:
        return "constexpr", value, False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), None, value % 16 == 0
    return "fp32", None, False


def _parameters(launch: Launch) -> list[tuple[str, str, Any, bool]]:
    """Of each parameter its name, and what :func:`_specialised` says of its argument."""
    found = []
    for parameter in launch.kernel.function.params:
        value = launch.arguments.get(parameter.name, parameter.default)
        said = ("constexpr", value, False) if parameter.is_constexpr else _specialised(value)
        found.append((parameter.name, *said))
    return found


def form(launch: Launch) -> Hashable:
    """What a compiler sees of a launch: those of one form are compiled alike."""
    return (launch.kernel.name, launch.choice, *_parameters(launch))


def compiled(launch: Launch, arch: Arch) -> Binary:
    """Compile what ``launch`` runs, for ``arch``."""
    parameters = _parameters(launch)
    signature = {name: kind for name, kind, _, _ in parameters}
    constants: Any = {(i,): fixed for i, (_, kind, fixed, _) in enumerate(parameters) if kind == "constexpr"}
    attributes: Any = {(i,): [["tt.divisibility", 16]] for i, (*_, divisible) in enumerate(parameters) if divisible}
    source = ASTSource(launch.kernel.function, signature, constants, attributes)
    options = {"num_warps": launch.choice.warps, "num_stages": launch.choice.stages}
    made = triton.compile(source, target=arch.target, options=options)
    threads = launch.choice.warps * arch.target.warp_size
    if arch.target.backend == "cuda":
        return _read_cuda(made, threads)
    return _read_amd(made, threads)


def _read_cuda(made: Any, threads: int) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    ptx = made.asm["ptx"]
    wide = len(re.findall(r"\b(?:ld|st)\.global[\w.:]*\.v4\.b32|cp\.async[\w.]* \[[^\]]*\], \[[^\]]*\], 0x10", ptx))
    wide += len(re.findall(r"\b(?:ld|st)\.global[\w.:]*\.v2\.b64", ptx))
    every = len(re.findall(r"\b(?:ld|st)\.global|cp\.async\.c[ag]", ptx))
    tensor = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx))
    spills = usage.get("STACK", 0) + usage.get("LOCAL", 0)
    return Binary(usage["REG"], spills, made.metadata.shared, tensor, wide, every - wide, threads)


def _read_amd(made: Any, threads: int) -> Binary:
    text = made.asm["amdgcn"]
    found = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|"
                                                         r"private_segment_fixed_size):\s+(\d+)", text)}  # fmt: skip
    wide = len(re.findall(r"\b(?:buffer|global)_(?:load|store)_dwordx4", text))
    every = len(re.findall(r"\b(?:buffer|global)_(?:load|store)_", text))
    tensor = len(re.findall(r"\bv_mfma_", text))
    spills = 4 * found["vgpr_spill_count"] + 4 * found["sgpr_spill_count"] + found["private_segment_fixed_size"]
    return Binary(found["vgpr_count"], spills, made.metadata.shared, tensor, wide, every - wide, threads)
