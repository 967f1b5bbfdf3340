"""The ``skipc`` command."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import platform
import sys
from pathlib import Path
from typing import Any

import click


@click.group(help="A torch.compile backend that lets transformer inference skip sublayers.")
@click.version_option(importlib.metadata.version("skipc"))
def main() -> None:
    """Entry point."""


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("skipc-out"),
    show_default=True,
    help="Folder for picture and figures.",
)
@click.option("--tokens", default=48, show_default=True, help="Tokens to generate.")
@click.option("--threads", type=int, help="Threads of torch; at most 2 by default.")
def demo(out: Path, tokens: int, threads: int | None) -> None:
    """Run SmolLM2 under Inductor and under skipc, then skip a few sublayers."""
    from skipc.demo import main as run

    run(out, tokens, threads)


_MODEL = "MODEL is a folder with a Hugging Face model, `smollm2` or `minilm`."


@main.command(help=f"Show the sites of a model. {_MODEL}")
@click.argument("model", default="smollm2")
@click.option("--program", is_flag=True, help="Also print the host program.")
@click.option("--profile", type=click.Path(path_type=Path), help="Folder of a profile, to be shown, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(model: str, program: bool, profile: Path | None, as_json: bool) -> None:
    """Print an explanation."""
    import skipc
    from skipc.calibration.batches import batches_of

    loaded, _ = _load(model)
    (batch,) = batches_of(loaded, [_token_ids()])
    explanation = skipc.explain(loaded, **batch.inputs)
    known = _profile(profile, loaded) if profile is not None else None
    if as_json:
        record = explanation.to_dict()
        if known is not None:
            record["profile"] = json.loads((Path(str(profile)) / "profile.json").read_text())
        click.echo(json.dumps(record, indent=1))
        return
    click.echo(str(explanation))
    if known is not None:
        click.echo(str(known))
    if program:
        click.echo(explanation.program())


@main.command(help=f"Measure a model and make plans for it. {_MODEL}")
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the profile and its report.")
@click.option("--effort", type=click.Choice(["quick", "thorough"]), default="quick", show_default=True)
@click.option(
    "--removal", "removals", type=float, multiple=True, default=[0.05, 0.1, 0.2, 0.33], show_default=True,
    help="Share of the sublayers' time to save; one plan for each.",
)  # fmt: skip
@click.option("--phase", type=click.Choice(["prefill", "decode"]), help="Calls to save time in; decode, if it can.")
@click.option("--batch", default=1, show_default=True, help="Rows of those calls.")
@click.option("--length", default=1, show_default=True, help="Tokens in each row of a prefill.")
@click.option("--cache", default=255, show_default=True, help="Tokens behind which a decode step comes.")
@click.option("--never", multiple=True, help="Name of a site to leave whole.")
@click.option("--kind", "kinds", multiple=True, help="Change only sites of this kind: mlp, attention.")
@click.option("--most-in-a-row", type=int, help="Sites next to each other that may be left out.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A text like those that the model is for; by default English that comes with Python.")  # fmt: skip
@click.option("--baselines", type=click.Path(exists=True, path_type=Path), help="Figures of benchmarks/quality.py.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=int)
def calibrate(
    model: str, out: Path, effort: Any, removals: tuple[float, ...], text: Path | None, baselines: Path | None,
    kinds: tuple[str, ...], threads: int | None, **settings: Any,
) -> None:  # fmt: skip
    """Calibrate, save and report."""
    import torch

    import skipc
    from skipc.calibration.text import windows_of

    if threads:
        torch.set_num_threads(threads)
    loaded, tokenizer = _load(model)
    if text is not None and tokenizer is None:
        raise click.ClickException(f"{model} has no tokenizer for {text}")
    batches = windows_of(tokenizer, text.read_text()) if text is not None else None
    if (out / "profile.json").exists():
        profile = _profile(out, loaded)
        click.echo(f"{out} has a profile already, of effort {profile.effort!r}; its report is made anew")
    else:
        try:
            profile = skipc.calibrate(
                loaded, batches, tokenizer=tokenizer, effort=effort, removals=removals, kinds=kinds or None,
                folder=out, **settings,
            )  # fmt: skip
        except (skipc.SkipcError, TypeError) as error:
            raise click.ClickException(str(error)) from error
    click.echo(str(profile))
    _report(profile, loaded, tokenizer, out, baselines)


def _report(profile: Any, model: Any, tokenizer: Any, out: Path, baselines: Path | None) -> None:
    from skipc.report import samples_of, write_report

    points = json.loads(baselines.read_text())["points"] if baselines is not None else None
    try:
        click.echo(f"report: {write_report(profile, out, samples_of(profile, model, tokenizer), points)}")
    except ImportError as error:
        click.echo(f"no report: {error}")


@main.command(help=f"Time a model in eager, under Inductor, and under skipc with the plans of a profile. {_MODEL}")
@click.argument("model", default="smollm2")
@click.option("--profile", type=click.Path(path_type=Path), help="Folder of a profile.")
@click.option("--cache", type=int, help="Tokens behind which a decode step comes; the profile's by default, or 255.")
@click.option("--batch", default=1, show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--threads", type=int)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
def bench(
    model: str, profile: Path | None, cache: int | None, batch: int, rounds: int, dtype: str, threads: int | None,
    path: Path | None,
) -> None:  # fmt: skip
    """Print a table of times."""
    import torch

    from skipc.bench import bench as run

    if threads:
        torch.set_num_threads(threads)
    loaded, _ = _load(model, getattr(torch, dtype))
    known = _profile(profile, loaded) if profile is not None else None
    record = run(loaded, known, batch, cache, rounds)
    if path is not None:
        path.write_text(json.dumps(record, indent=1))


@main.command()
@click.option(
    "--model", help=f"Tune for the linear layers of a model. {_MODEL} By default, for layers of common widths."
)
@click.option("--dtype", "dtypes", type=click.Choice(["float32", "bfloat16"]), multiple=True,
              default=["float32", "bfloat16"], show_default=True, help="Of the weights; may be repeated.")  # fmt: skip
@click.option("--rows", multiple=True, default=["1,2,4,8"], show_default=True,
              help="Tokens of a call, all sequences together, as in 1,2,4.")  # fmt: skip
@click.option("--shape", "shapes", multiple=True, metavar="K,N",
              help="A layer of K inputs and N outputs; several that share them: K,N+N+N. May be repeated.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True)
@click.option("--seconds", default=600.0, show_default=True, help="Begin no shape later than this; go on another time.")
@click.option("--again", is_flag=True, help="Measure what the table has already, too.")
@click.option("--threads", type=int, help="Threads of torch; a table is for so many.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
def autotune(
    model: str | None, dtypes: tuple[str, ...], rows: tuple[str, ...], shapes: tuple[str, ...], device: str,
    seconds: float, again: bool, threads: int | None, path: Path | None,
) -> None:  # fmt: skip
    """Measure which constants of kernels are best on this machine, and keep them in a table that kernels read.

    CPU kernels give the same bits with all of them. Results are kept after each shape, so an interrupted run goes on
    where it was; shapes that the table has are not measured again. Nothing else should run meanwhile.
    """
    import torch

    from skipc.autotune_command import autotune as run
    from skipc.autotune_command import layers_named, layers_spelled
    from skipc.ir.errors import SkipcError
    from skipc.tunable import COMMON, Work

    if threads:
        torch.set_num_threads(threads)
    try:
        layers = layers_spelled(shapes) + (layers_named(model) if model else ()) or COMMON
        counts = sorted({int(n) for text in rows for n in text.split(",")})
        if counts[0] < 1:
            raise ValueError(f"rows must be positive, not {counts[0]}")
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    try:
        work = Work(layers, tuple(getattr(torch, dtype) for dtype in dtypes), tuple(counts))
        record = run(device, work, again=again, seconds=seconds)
    except SkipcError as error:
        raise click.ClickException(str(error)) from error
    if path is not None:
        path.write_text(json.dumps(record, indent=1))


def _load(model: str, dtype: Any = None) -> tuple[Any, Any]:
    import torch

    from skipc.loading import load_model

    try:
        return load_model(model, dtype or torch.float32)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    except ImportError as error:
        raise click.ClickException(str(error)) from error


def _profile(folder: Path, model: Any) -> Any:
    from skipc.calibration.profile import Profile
    from skipc.ir.errors import ProfileError

    try:
        profile = Profile.load(folder)
        profile.check(model)
    except ProfileError as error:
        raise click.ClickException(str(error)) from error
    return profile


def _token_ids() -> Any:
    import torch

    return torch.arange(1, 17)[None]


@main.command()
@click.option("--markdown", is_flag=True, help="Print the table of docs/passes.md.")
def passes(markdown: bool) -> None:
    """List the passes, in the order in which they run."""
    from skipc.passes.pipeline import PIPELINE, REGION_PIPELINE

    if markdown:
        click.echo(passes_markdown(), nl=False)
        return
    for i, kind in enumerate((*PIPELINE, *REGION_PIPELINE)):
        click.echo(f"{i}. {kind.name}{'' if kind.optional else ' (always)'}\n")
        click.echo("\n".join(f"   {line}" for line in inspect.getdoc(kind).splitlines()) + "\n")  # type: ignore[union-attr]


def passes_markdown() -> str:
    """The text of ``docs/passes.md``."""
    from skipc.passes.pipeline import PIPELINE, REGION_PIPELINE

    rows = ["# Passes", "", "Generated by `skipc passes --markdown`. They run in this order.", "",
            f"Those up to `{PIPELINE[-1].name}` see the whole graph; the rest run on each distinct region.", "",
            "| pass | what it does | can be switched off |", "| --- | --- | --- |"]  # fmt: skip
    details = []
    for kind in (*PIPELINE, *REGION_PIPELINE):
        doc = inspect.getdoc(kind) or ""
        first = " ".join(doc.split("\n\n")[0].split())
        off = f'`options={{"disable_passes": ("{kind.name}",)}}`' if kind.optional else "no"
        rows.append(f"| `{kind.name}` | {first} | {off} |")
        body = [
            ("    " + line[4:] if line.startswith("    ") else line.replace("::", ":")) for line in doc.splitlines()
        ]
        details += ["", f"## {kind.name}", "", *body]
    return "\n".join([*rows, *details]) + "\n"


@main.command()
def options() -> None:
    """List the options of the backend."""
    import skipc

    for name, text in skipc.list_options().items():
        click.echo(f"{name}: {text}")


@main.command()
def env() -> None:
    """Print versions and the machine, for bug reports."""
    import torch

    names = ["skipc", "torch", "triton", "transformers", "peft", "networkx", "sympy", "pydantic"]
    for name in names:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        click.echo(f"{name:<14}{version}")
    click.echo(f"{'python':<14}{sys.version.split()[0]}")
    click.echo(f"{'platform':<14}{platform.platform()}")
    click.echo(f"{'cpu':<14}{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    click.echo(f"{'cuda':<14}{cuda}")
    click.echo(f"{'c++ compiler':<14}{_compiler()}")


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except Exception as error:
        return f"none ({type(error).__name__}): Inductor cannot compile for the CPU"


if __name__ == "__main__":
    main()
