"""The host program as readable Python: with all its branches, as ``skipc.explain`` prints it, and with the arms of one
plan chosen, as it runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from skipc.runtime.chaining import Chain

from skipc.ir.program import Arm, ProgramSpec, Step, Var


def source_of(spec: ProgramSpec) -> str:
    """Python source of ``program(inputs, arms)``. ``inputs`` is the flat list of graph inputs, ``arms`` one arm index
    for each step. Regions are called by name with a list of arguments and return their results in order."""
    lines = ["def program(inputs, arms):", *_unpacked(spec)]
    late = any(arm.late for step in spec.steps for arm in step.arms)
    lines += ["    late = []"] if late else []
    for i, step in enumerate(spec.steps):
        lines.append(f"    # {step.label}")
        lines += _step(spec, step, i) + _releases(step.releases)
    return "\n".join([*lines, *_ending(spec, late)]) + "\n"


def source_for(spec: ProgramSpec, arms: Sequence[int] | None, chains: Sequence[Chain]) -> str:
    """The same with the arms chosen, ``program(inputs)``, and steps joined to ``chains``, which are called by the names
    ``chain_0``, ``chain_1``, ... with what the first link reads, parameters, and other operands. Without ``arms``, a
    :class:`~skipc.runtime.gating.GatedCall` chooses while the program runs: ``program(inputs, gates)``."""
    gates = "" if arms is not None else ", gates"

    def call(k: int, chain: Chain) -> list[str]:
        parameters, others = ([f"{n}," for n in names] for names in (chain.parameters, chain.others))
        end = f"), gates.gates({chain.entry}))" if gates else "))"
        return _wrapped(f"    joined = chain_{k}({chain.entry}, (", [*parameters, "),", "(", *others], end)

    return "\n".join([f"def program(inputs{gates}):", *_unpacked(spec), *_chosen(spec, arms, chains, call)]) + "\n"


def bound_source_for(spec: ProgramSpec, arms: Sequence[int] | None, chains: Sequence[Chain]) -> str:
    """The same for inputs that stay: ``bind(inputs)`` returns ``program(trusted)``, or ``program(trusted, gates)``.
    Its chains are made by ``bind_0``, ``bind_1``, ... of operands that are inputs, and called with what the first link
    reads and the other operands."""
    gates = "" if arms is not None else ", gates"
    lines = ["def bind(inputs):", *_unpacked(spec)]
    for k, chain in enumerate(chains):
        stay, _ = chain.operands_in(spec.inputs)
        lines += _wrapped(f"    chain_{k} = bind_{k}((", [f"{n}," for n in stay], "))")

    def call(k: int, chain: Chain) -> list[str]:
        _, given = chain.operands_in(spec.inputs)
        end = f"), trusted, gates.gates({chain.entry}))" if gates else "), trusted)"
        return _wrapped(f"    joined = chain_{k}({chain.entry}, (", [f"{n}," for n in given], end)

    body = [f"    {line}" for line in _chosen(spec, arms, chains, call)]
    return "\n".join([*lines, f"    def program(trusted{gates}):", *body, "    return program"]) + "\n"


def _chosen(
    spec: ProgramSpec, arms: Sequence[int] | None, chains: Sequence[Chain], call: Callable[[int, Chain], list[str]]
) -> list[str]:
    lines: list[str] = []
    steps = spec.steps
    chosen = [s.arms for s in steps] if arms is None else [(s.arms[a],) for s, a in zip(steps, arms, strict=True)]
    starts = {chain.first: (k, chain) for k, chain in enumerate(chains)}
    late, made, i = False, set(), 0
    while i < len(chosen):
        if i in starts:
            k, chain = starts[i]
            lines.append(f"    # {spec.steps[i].label} to {spec.steps[chain.last].label}")
            lines += call(k, chain)
            lines += [f"    {name} = {'joined' if new else chain.entry}" for name, new in chain.outputs]
            made |= {name for name, _ in chain.outputs}
            done = range(i, chain.last + 1)
            lines.append("    del joined")
        else:
            lines.append(f"    # {spec.steps[i].label}")
            waits = any(arm.late for arm in chosen[i])
            lines += ["    late = []"] if waits and not late else []
            late |= waits
            lines += _arm(spec, chosen[i][0], "    ") if len(chosen[i]) == 1 else _step(spec, spec.steps[i], i, "gates")
            made |= {n for a in chosen[i] for n in (*a.outputs, *(name for name, _ in a.copies))}
            done = range(i, i + 1)
        lines += _releases([n for j in done for n in spec.steps[j].releases if n in made])
        i = done.stop
    return lines + _ending(spec, late)


def _unpacked(spec: ProgramSpec) -> list[str]:
    return _wrapped("    (", [f"{name}," for name in spec.inputs], ") = inputs") if spec.inputs else []


def _ending(spec: ProgramSpec, late: bool) -> list[str]:
    constants = itertools.count()
    results = [v.name if isinstance(v, Var) else f"constants[{next(constants)}]" for v in spec.outputs]
    lines = ["    for region, arguments in late:", "        region(arguments)"] if late else []
    return [*lines, f"    return ({', '.join(results)}{',' if results else ''})"]


def _releases(names: Sequence[str]) -> list[str]:
    return _wrapped("    del ", [f"{n}," for n in names[:-1]] + [names[-1]], "") if names else []


def _step(spec: ProgramSpec, step: Step, index: int, gates: str | None = None) -> list[str]:
    if len(step.arms) == 1:
        return _arm(spec, step.arms[0], "    ")
    lines = [f"    arm = arms[{index}]" if gates is None else f"    arm = {gates}.arm({index})"]
    first = step.arms[0]
    predicated = gates is not None and first.region is not None and spec.regions[first.region].predicated is not None
    if predicated:
        lines += ["    if arm < 0:  # its kernel looks at its gate itself"]
        lines += [f"        {first.outputs[0]} = {gates}.predicated({index}, [{', '.join(first.inputs)}])"]
        lines += [f"        {step.moments} = None"] if step.moments is not None else []
    for i, arm in enumerate(step.arms):
        test = f"{'if' if i == 0 and not predicated else 'elif'} arm == {i}:"
        note = f"  # {'run' if i == 0 else 'without ' + ', '.join(sorted(arm.skipped)) + f' (kv={arm.kv})'}"
        body = _arm(spec, arm, "        ")
        if gates is not None and step.moments is not None and step.moments not in arm.outputs:
            body.append(f"        {step.moments} = None")
        lines += [f"    {test}{note}", *(body or ["        pass"])]
    if gates is not None and step.stream is not None:
        before, after = step.stream
        measured = f", measured={step.moments}" if step.moments is not None else ""
        lines.append(f"    {after} = {gates}.ran({index}, {before}, {after}{measured})")
    return lines


def _arm(spec: ProgramSpec, arm: Arm, indent: str) -> list[str]:
    lines = []
    if arm.region is not None:
        name, arguments = spec.regions[arm.region].name, f"[{', '.join(arm.inputs)}]"
        call = f"late.append(({name}, {arguments}))" if arm.late else f"{name}({arguments})"
        lines.append(f"{indent}({', '.join(arm.outputs)},) = {call}" if arm.outputs else f"{indent}{call}")
    lines += [f"{indent}{name} = {value}" for name, value in arm.copies]
    return lines


def _wrapped(start: str, items: list[str], end: str, width: int = 118) -> list[str]:
    """``start item item ... end`` on as many lines as it takes; inside brackets, or continued by a backslash."""
    bracket = start.endswith("(")
    lines, line = [], start
    for item in items:
        if len(line) + len(item) > width:
            lines.append(line.rstrip() + ("" if bracket else " \\"))
            line = "        "
        line += item + " "
    return [*lines, line.rstrip() + end]
