"""Builds the C++ kernels of ``kernels/cpu`` once per machine, with the compiler that Inductor needs anyway.

Where the CPU has tile registers (Intel AMX), products with bf16 weights use them, unless ``SKIPC_TILES=0`` says
otherwise (``kernels/cpu/tiles.h``): other bits than those of vectors, and hardly more time for 16 rows than for one.

The library speaks torch's stable ABI, so it survives patch releases of torch. It is kept outside Inductor's cache, in
``SKIPC_CACHE_DIR`` (default: ``~/.cache/skipc``), under a name that holds sources, compiler, flags, CPU and torch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from skipc.kernels.library import library

log = logging.getLogger("skipc.kernels")

_SOURCES = Path(__file__).parent / "cpu"
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fvisibility=hidden"]
_lock = threading.Lock()

library.define("tiles() -> bool")  # these of the C++ library alone
library.define("use_tiles(bool wanted) -> ()")


def cache_dir() -> Path:
    """Where built libraries are kept."""
    return Path(os.environ.get("SKIPC_CACHE_DIR") or Path.home() / ".cache" / "skipc")


def available() -> str | None:
    """None once the native kernels are loaded, building them if need be, and follow the tables of this CPU; else why
    they cannot be used.

    Raises:
        ConfigError: for a table that is broken, naming its file.
    """
    from skipc.kernels.products import use_tables  # which asks for the name of this CPU

    with _lock:
        reason = _load()
        if reason is None:
            use_tables()
        return reason


def tiles() -> bool:
    """Whether products with bf16 weights use tile registers here."""
    return available() is None and torch.ops.skipc.tiles()  # type: ignore[no-any-return]


@contextmanager
def without_tiles() -> Iterator[None]:
    """Products use vectors alone in the block, as on CPUs without tile registers. For tests and benchmarks: it holds
    for the process, and is not for changing while kernels run."""
    before = tiles()
    torch.ops.skipc.use_tiles(False)
    try:
        yield
    finally:
        torch.ops.skipc.use_tiles(before)


@functools.cache
def _load() -> str | None:
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler was found (set CXX, or install g++)"
    try:
        library = _built(compiler)
        torch.ops.load_library(str(library))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        log.warning("native CPU kernels are not used: %s", error)
        return f"building the kernels failed: {error}"
    return None


def find_compiler() -> str | None:
    """The C++ compiler: ``CXX``, else g++ or clang++ from the path. Only Linux is known to work."""
    if platform.system() != "Linux":
        return None
    names = [os.environ.get("CXX"), "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(shlex.split(name)[0]))), None)


def _built(compiler: str) -> Path:
    """The library for this machine, built now if it is not in the cache."""
    flags = [*_FLAGS, f"-DTORCH_TARGET_VERSION=0x{_torch_version():016x}"]
    if "g++" in Path(compiler).name:
        # Tuned for some CPUs, it fuses multiplying and adding in some loops and not in others, which round differently.
        flags += ["-mprefer-vector-width=512", "--param", "avoid-fma-max-bits=0"]
    target = cache_dir() / f"skipc_cpu_{_fingerprint(compiler, flags)}.so"
    if target.exists():
        return target
    log.info("building native CPU kernels, once for this machine: %s", target)
    start = time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = []
        running = []
        for source in sorted(_SOURCES.glob("*.cpp")):
            objects.append(f"{scratch}/{source.stem}.o")
            command = [compiler, *flags, f"-I{root / 'include'}", "-c", str(source), "-o", objects[-1]]
            running.append((command, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
        for command, process in running:
            output = process.communicate()[0].decode(errors="replace")
            if process.returncode:
                raise RuntimeError(f"{shlex.join(command)}\n{output[-4000:]}")
        made = f"{scratch}/{target.name}"
        links = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run([compiler, *flags, "-shared", *objects, "-o", made, *links], check=True, capture_output=True)
        os.replace(made, target)  # atomic: a process that builds at the same time does no harm
    log.info("built in %.1f s", time.perf_counter() - start)
    return target


def _fingerprint(compiler: str, flags: list[str]) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    sources = [p.read_text() for p in sorted(_SOURCES.iterdir()) if p.suffix in (".h", ".cpp")]
    parts = [version, *flags, _cpu(), torch.__version__, *sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def cpu_fingerprint() -> str:
    """A short name of this CPU."""
    return hashlib.sha256(_cpu().encode()).hexdigest()[:12]


def _cpu() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({ln for ln in lines if ln.startswith(("flags", "Features", "model name"))}))


def _torch_version() -> int:
    major, minor = (int(p) for p in torch.__version__.split(".")[:2])
    return major << 56 | minor << 48
