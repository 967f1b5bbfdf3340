"""The host program as readable Python: what ``skipc.explain`` prints is what runs."""

from __future__ import annotations

import itertools

from skipc.ir.program import Arm, ProgramSpec, Step, Var


def source_of(spec: ProgramSpec) -> str:
    """Python source of ``program(inputs, arms)``. ``inputs`` is the flat list of graph inputs, ``arms`` one arm index
    for each step. Regions are called by name with a list of arguments and return their results in order."""
    lines = ["def program(inputs, arms):"]
    lines += _wrapped("    (", [f"{name}," for name in spec.inputs], ") = inputs") if spec.inputs else []
    late = any(arm.late for step in spec.steps for arm in step.arms)
    lines += ["    late = []"] if late else []
    for i, step in enumerate(spec.steps):
        lines += _step(spec, step, i)
    lines += ["    for region, arguments in late:", "        region(arguments)"] if late else []
    constants = itertools.count()
    results = [v.name if isinstance(v, Var) else f"constants[{next(constants)}]" for v in spec.outputs]
    lines.append(f"    return ({', '.join(results)}{',' if results else ''})")
    return "\n".join(lines) + "\n"


def _step(spec: ProgramSpec, step: Step, index: int) -> list[str]:
    lines = [f"    # {step.label}"]
    if len(step.arms) == 1:
        lines += _arm(spec, step.arms[0], "    ")
    else:
        lines.append(f"    arm = arms[{index}]")
        for i, arm in enumerate(step.arms):
            test = f"{'if' if i == 0 else 'elif'} arm == {i}:"
            note = f"  # {'run' if i == 0 else 'without ' + ', '.join(sorted(arm.skipped)) + f' (kv={arm.kv})'}"
            lines += [f"    {test}{note}", *(_arm(spec, arm, "        ") or ["        pass"])]
    if step.releases:
        lines += _wrapped("    del ", [f"{n}," for n in step.releases[:-1]] + [step.releases[-1]], "")
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
