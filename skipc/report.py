"""One self-contained page about a profile, and its pictures as PNGs."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipc.calibration.profile import Profile, told
from skipc.ir.plan import RUN

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MARKS = (0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100, 1000, 10_000)  # losses that the axis names


@dataclass(frozen=True)
class Sample:
    """What the model and each plan make of a prompt."""

    prompt: str
    texts: Mapping[str, str]  # by plan; "whole model" for the model itself


_PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short poem about a river in winter.",
    "List three ways to save energy at home.",
)


def samples_of(profile: Profile, model: Any, tokenizer: Any, new_tokens: int = 64) -> list[Sample]:
    """What a chat model and each plan make of some prompts, by greedy decoding; none for other models."""
    if profile.regime.phase != "decode" or not getattr(tokenizer, "chat_template", None):
        return []
    import skipc

    compiled = skipc.compile(model)
    plans = {"whole model": skipc.Plan()} | {e.name: profile.plan_of(e) for e in profile.menu}
    made = []
    for prompt in _PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt").input_ids
        texts = {}
        for name, plan in plans.items():
            with compiled.session(plan=plan):
                found = skipc.generate(compiled, ids, max_new_tokens=new_tokens)
            texts[name] = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        made.append(Sample(prompt, texts))
    return made


def write_report(
    profile: Profile, folder: str | Path, samples: Sequence[Sample] = (), baselines: Mapping[str, Any] | None = None
) -> Path:
    """Write ``report.html`` and its pictures into ``folder``.

    Args:
        profile: what it is about.
        samples: texts to show side by side.
        baselines: ``points`` of ``benchmarks/quality.py``, for the curve.

    Raises:
        ImportError: without matplotlib, naming the command that installs it.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install 'skipc[report]'") from None
    from jinja2 import Environment, PackageLoader

    matplotlib.use("Agg")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    figures = {"curve": _curve(profile, baselines), "sites": _sites(profile), "plans": _plans(profile)}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        pictures[name] = base64.b64encode(path.read_bytes()).decode()
    page = Environment(autoescape=True, loader=PackageLoader("skipc", "")).get_template("report.html.j2")
    timings = [
        (str(t.regime), told(t.actions), t.seconds * 1e3, profile.costs.seconds(t.regime, t.actions) * 1e3)
        for t in profile.timings
    ]
    html = page.render(
        profile=profile, pictures=pictures, samples=samples, timings=timings,
        menu=[(e, profile.speedup(e), told(e.actions)) for e in profile.menu],
        about=json.dumps(profile.about, indent=1),
    )  # fmt: skip
    (folder / "report.html").write_text(html)
    return folder / "report.html"


def _figure(**size: Any) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", **size)


def _curve(profile: Profile, baselines: Mapping[str, Any] | None) -> Figure:
    """Loss against speed-up, with baselines where there are some."""
    figure, axes = _figure(figsize=(7.5, 4.5))
    curves: dict[str, list[tuple[float, float, float, float]]] = {"skipc": [(1.0, 0.0, 0.0, 0.0)]}
    for entry in profile.menu:
        j = entry.judgement
        curves["skipc"].append((profile.speedup(entry), j.loss, j.low, j.high))
    for point in (baselines or {}).values():
        for name, found in point.items():
            if name != "skipc":
                curves.setdefault(name, []).append(
                    (_speed(profile, found["removed"]), found["loss"], found["low"], found["high"])
                )
    for name, points in curves.items():
        points.sort()
        x, y, low, high = (list(v) for v in zip(*points, strict=True))
        own = name == "skipc"
        axes.plot(x, y, marker="o", label=name, linewidth=2.5 if own else 1, zorder=3 if own else 2)
        axes.fill_between(x, low, high, alpha=0.2 if own else 0.07)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=-0.01)
    highest = max(point[1] for points in curves.values() for point in points)
    marks = [m for m in _MARKS if m < 2 * highest]
    axes.set_yticks(marks, [f"{m:,.0%}" for m in marks])
    axes.minorticks_off()
    axes.set_xlabel(f"speed over exact mode ({profile.regime})")
    measure = profile.menu[0].judgement.measure if profile.menu else "perplexity"
    axes.set_ylabel("perplexity lost" if measure == "perplexity" else "1 - cosine of embeddings")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure  # type: ignore[no-any-return]


def _speed(profile: Profile, removed: float) -> float:
    """Speed of a call that saves a share of the sublayers' time."""
    whole = profile.costs.seconds(profile.regime)
    return whole / (whole - removed * sum(profile.costs.of_site(profile.regime, n) for n in profile.sites))


def _sites(profile: Profile) -> Figure:
    """What leaving out each site costs, and how similar the stream is around it: kinds by layers."""
    from matplotlib.colors import LogNorm

    kinds = list(dict.fromkeys(f.kind for f in profile.sites.values()))
    depth = 1 + max(f.layer for f in profile.sites.values())
    phases = list(dict.fromkeys(p for f in profile.sites.values() for p in f.similarity))
    figure, axes = _figure(nrows=1 + len(phases), figsize=(max(7.0, depth * 0.3), 1.7 * (1 + len(phases))))
    rows = list(axes) if phases else [axes]
    grid = [[float("nan")] * depth for _ in kinds]
    for facts in profile.sites.values():
        if facts.loss is not None:
            grid[kinds.index(facts.kind)][facts.layer] = max(facts.loss, 1e-6)
    image = rows[0].imshow(grid, aspect="auto", norm=LogNorm(), cmap="magma_r")
    rows[0].set_title("nats per token that leaving the site out costs, by its gradients", fontsize=9)
    figure.colorbar(image, ax=rows[0])
    for phase, row in zip(phases, rows[1:], strict=True):
        grid = [[float("nan")] * depth for _ in kinds]
        for facts in profile.sites.values():
            grid[kinds.index(facts.kind)][facts.layer] = facts.similarity.get(phase, float("nan"))
        image = row.imshow(grid, aspect="auto", cmap="viridis")
        row.set_title(f"similarity of the stream before and after, {phase}", fontsize=9)
        figure.colorbar(image, ax=row)
    for row in rows:
        row.set_yticks(range(len(kinds)), kinds)
    rows[-1].set_xlabel("layer")
    return figure  # type: ignore[no-any-return]


def _plans(profile: Profile) -> Figure:
    """What each plan leaves of each site's time."""
    names = list(profile.sites)
    kinds = list(dict.fromkeys(f.kind for f in profile.sites.values()))
    depth = 1 + max(f.layer for f in profile.sites.values())
    rows = [(e.name, kind) for e in profile.menu for kind in kinds]
    grid = [[1.0] * depth for _ in rows]
    ranks: list[tuple[int, int, str]] = []
    for i, (plan, kind) in enumerate(rows):
        actions = next(e.actions for e in profile.menu if e.name == plan)
        for name in names:
            facts = profile.sites[name]
            if facts.kind == kind:
                whole, action = profile.costs.of_site(profile.regime, name), actions.get(name, RUN)
                grid[i][facts.layer] = profile.costs.of_site(profile.regime, name, action) / whole if whole else 0.0
                if action.kind == "lowrank":
                    ranks.append((facts.layer, i, str(action.size)))
    figure, axes = _figure(figsize=(max(7.0, depth * 0.3), 0.8 + 0.35 * max(1, len(rows))))
    image = axes.imshow(grid or [[1.0]], aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(rows)), [f"{plan}: {kind}" for plan, kind in rows])
    axes.set_xlabel("layer")
    for x, y, text in ranks:
        axes.text(x, y, text, ha="center", va="center", fontsize=6, color="white")
    axes.set_title("share of each site's time that is left; a number is the rank of a map in its place", fontsize=9)
    figure.colorbar(image, ax=axes)
    return figure  # type: ignore[no-any-return]
