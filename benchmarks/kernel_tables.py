"""Makes the tables of constants that come with skipc for GPUs, without a GPU, and the table of what compilers made of
the kernels for the docs.

For each kernel and class of sizes: choices are ranked by what they are guessed to take, the best ones are compiled for
the architecture, and of those that spill no register and fit into shared memory the one with the best guess is taken (a
guess that now knows how many programs fit on a multiprocessor). Nothing is measured, and the tables say so; ``skipc
autotune`` on a GPU does better.

Run: python benchmarks/kernel_tables.py [--arch sm_90] [--docs docs/kernels.md] [--only-docs]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path

import click
import torch
from common import console
from skipc.kernels.gpu.catalog import KERNELS, Case, cases
from skipc.kernels.gpu.kernel import Launch, launched_with
from skipc.kernels.gpu.model import choices, floor, predicted
from skipc.kernels.gpu.offline import ARCHS, Arch, Binary, compiled, form
from skipc.kernels.tables import SHIPPED, Choice, Entry, Row, Table, forget

HEAD = """# Kernels

Made by `benchmarks/kernel_tables.py`, on a machine without a GPU: Triton's compilers and the vendors' assemblers ran,
no kernel did. *Spills* are bytes of a thread that went to memory, *occupancy* is the share of a multiprocessor's
threads that fit on it, *moved* what a launch reads and writes, each byte once, and *floor* that at the bandwidth that
the data sheet states (or its operations at the tensor cores' rate). A floor is no promise of a speed.
"""
COMPILED = 2  # choices of a class that may be shipped
TRIED = 12  # choices that are compiled, and the default
LOOKED_AT = 4  # cases of a class, to choose by; the tests look at all
DTYPES = (torch.bfloat16, torch.float32)  # fp16 compiles to what bf16 does, with other instructions
PRODUCTS = ("decode_attention", "prefill_attention", "lora_tiles", "merge_weights")  # by tensor cores
ROWS = ("mlp_rows", "linear_rows")  # these, too, but for a row alone
ATTENTION = ("decode_attention", "prefill_attention")
BITS = {"16 bits": (16, 16), "32 bits": (32, 32)}
# By what else a kernel's constants should differ: a size, and the largest value of the lower class.
SPLITS: Mapping[str, tuple[str, int]] = {
    "lora_rows": ("k", 2048),
    "mlp_rows": ("rows", 1),
    "linear_rows": ("rows", 1),
    "decode_attention": ("dim", 64),
    "prefill_attention": ("dim", 64),
}


def classes(kernel: str) -> Iterator[dict[str, tuple[int, int]]]:
    """Ranges of sizes, of which each has a row of its own."""
    if "compact" in kernel:  # reads flags, whatever the rows are
        yield {}
        return
    for bits in BITS.values():
        if kernel not in SPLITS:
            yield {"bits": bits}
            continue
        size, last = SPLITS[kernel]
        yield {"bits": bits, size: (0, last)}
        yield {"bits": bits, size: (last + 1, 1 << 30)}


_binaries: dict[tuple[Arch, Hashable], Binary | None] = {}


def compile_(launch: Launch, arch: Arch) -> Binary | None:
    """What the compiler makes of a launch, each form once; None if it refuses."""
    key = arch, form(launch)
    if key not in _binaries:
        try:
            _binaries[key] = compiled(launch, arch)
        except Exception as error:
            console.print(f"[yellow]{arch.name}: {launch.kernel.name}: {type(error).__name__}[/yellow]")
            _binaries[key] = None
    return _binaries[key]


def fits(launch: Launch, arch: Arch) -> bool:
    """Whether it may be shipped."""
    binary = compile_(launch, arch)
    if binary is None or binary.spills or binary.shared > arch.shared or not binary.programs(arch):
        return False
    multiplies = launch.kernel.name in PRODUCTS or (launch.kernel.name in ROWS and launch.sizes["rows"] > 1)
    return binary.tensor > 0 or not multiplies or launch.sizes["bits"] == 32


@functools.cache
def _run_of(case: Case) -> Callable[[], object]:
    return case.prepare("meta")


def with_choice(case: Case, arch: Arch, choice: Choice) -> Launch:
    """The launch of a case, with other constants."""
    return launched_with(_run_of(case), case.launch.kernel, choice, arch.name)


def best(found: list[Case], arch: Arch, first: Choice | None) -> Choice | None:
    """The choice for cases of one class; ``first``, if that may be shipped."""
    kernel = found[0].launch.kernel
    if first is not None and all(fits(with_choice(c, arch, first), arch) for c in found):
        return first
    if kernel.name in ATTENTION and found[0].dtype == torch.float32:
        return kernel.default  # no tensor cores: everything is unrolled, and a compiler takes minutes for larger tiles
    guessed: dict[Choice, float] = {}
    for choice in (*choices(kernel), kernel.default):
        launches = [with_choice(case, arch, choice) for case in found]
        guessed[choice] = sum(predicted(x, arch) / floor(x, arch) for x in launches)
    ranked = sorted(guessed, key=guessed.__getitem__)
    made: dict[Choice, float] = {}
    for choice in (*ranked[:TRIED], kernel.default):
        launches = [with_choice(case, arch, choice) for case in found]
        if all(fits(x, arch) for x in launches):  # none after the first that does not
            made[choice] = sum(predicted(x, arch, compile_(x, arch)) / floor(x, arch) for x in launches)
        if len(made) == COMPILED:
            break
    return min(made, key=made.__getitem__) if made else None


def _different(found: list[Case]) -> list[Case]:
    """Some cases, as different in size as there are."""
    by_bytes = sorted(found, key=lambda case: case.launch.moved)
    if len(by_bytes) <= LOOKED_AT:
        return by_bytes
    return [by_bytes[i * (len(by_bytes) - 1) // (LOOKED_AT - 1)] for i in range(LOOKED_AT)]


def make(arch: Arch, like: Table | None) -> Table:
    """The table of an architecture. ``like``: one of another, whose choices are kept where they may be shipped."""
    every = list(cases(arch.name, DTYPES))
    entries = {}
    for name, kernel in KERNELS.items():
        mine = [case for case in every if case.launch.kernel is kernel]
        rows = []
        for when in classes(name):
            inside = [c for c in mine if all(low <= c.launch.sizes[n] <= high for n, (low, high) in when.items())]
            same = [row.choice for row in like.kernels[name].rows if row.when == when] if like is not None else []
            choice = best(_different(inside), arch, same[0] if same else None) if inside else None
            console.print(f"{arch.name} {name} {when}: {choice if choice is None else dict(choice.constants)}")
            if choice is not None:
                rows.append(Row(when=when, constants=choice.constants, warps=choice.warps, stages=choice.stages))
        entries[name] = Entry(source=kernel.source, rows=tuple(rows))
    return Table(arch=arch.name, kernels=entries)


def docs() -> str:
    """What compilers made of the kernels with the constants that are shipped."""
    lines = [HEAD]
    for arch in ARCHS.values():
        lines += [f"## {arch.name}", "", "| kernel | case | constants | registers | spills | shared, KB | occupancy | "
                  "tensor | 16-byte loads | moved, KB | floor, us |", "|" + " --- |" * 11]  # fmt: skip
        for case in cases(arch.name, (torch.bfloat16,)):
            binary, x = compile_(case.launch, arch), case.launch
            assert binary is not None
            constants = " ".join(str(v) for v in x.choice.constants.values())
            total = binary.wide + binary.narrow
            lines.append(
                f"| {x.kernel.name} | {case.name} | {constants}, {x.choice.warps} warps, {x.choice.stages} stages | "
                f"{binary.registers} | {binary.spills} | {binary.shared / 1024:.1f} | {binary.occupancy(arch):.0%} | "
                f"{binary.tensor} | {binary.wide} of {total} | {x.moved / 1e3:.0f} | {floor(x, arch) * 1e6:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


@click.command()
@click.option("--arch", "names", multiple=True, type=click.Choice(list(ARCHS)), help="All by default.")
@click.option("--like", type=click.Choice(list(ARCHS)), help="Keep the choices of this table where they fit, too.")
@click.option("--docs", "path", type=click.Path(path_type=Path), help="Write the table for the docs here.")
@click.option("--only-docs", is_flag=True, help="Leave the tables as they are.")
def main(names: tuple[str, ...], like: str | None, path: Path | None, only_docs: bool) -> None:
    """Entry point."""
    if not only_docs:
        others = Table.read(SHIPPED / f"{like}.json") if like is not None else None
        for arch in [ARCHS[n] for n in names or ARCHS]:
            (SHIPPED / f"{arch.name}.json").unlink(missing_ok=True)
            forget()
            make(arch, others).write(SHIPPED / f"{arch.name}.json")
            forget()
    if path is not None:
        path.write_text(docs())


if __name__ == "__main__":
    main()
