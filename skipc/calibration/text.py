"""Text to calibrate on where the user brings none."""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch

_SHORTEST = 200  # characters


def english_text() -> str:
    """Some 400,000 characters of plain English that come with CPython: the topics of ``help()``."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def halves(text: str) -> tuple[str, str]:
    """Two halves of a text, and of the second only the paragraphs that the first does not have: help topics quote each
    other, and what is judged on must not have been read."""
    first, second = text[: len(text) // 2], text[len(text) // 2 :]
    known = set(first.split("\n\n"))
    return first, "\n\n".join(p for p in second.split("\n\n") if p not in known)


def library_files() -> list[Path]:
    """Python's own source files, in order, without tests; none where Python came without its sources."""
    root, others = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages", "test", "tests"}
    return [path for path in sorted(root.rglob("*.py")) if not others.intersection(path.relative_to(root).parts)]


@functools.cache
def documentation_text() -> str:
    """Some 1,200,000 characters of English: the longer docstrings of the standard library's modules, in a fixed order
    that mixes them. Empty where Python came without its sources."""
    found: dict[str, None] = {}
    for path in library_files():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= _SHORTEST:
                    found[text] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    return "\n\n".join(texts)


def token_windows(tokenizer: Any, text: str, tokens: int, count: int) -> list[torch.Tensor]:
    """``count`` disjoint stretches of ``text``, evenly spread, each int64 [1, tokens].

    Raises:
        ValueError: if the text is too short.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    stride = ids.shape[1] // count
    if stride < tokens:
        raise ValueError(f"{ids.shape[1]} tokens of text hold no {count} windows of {tokens}")
    return [ids[:, i * stride : i * stride + tokens] for i in range(count)]


def calibration_windows(tokenizer: Any, tokens: int, held_out: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Text to calibrate on, in random order, and text to judge by: int64 [1, tokens] each. The first half of CPython's
    help topics and as many windows of the standard library's docstrings are calibrated on; of the other half of the
    topics (see :func:`halves`), ``held_out`` windows are judged. Windows of the topics, which are few, overlap."""
    read, other = halves(english_text())
    pick = random.Random(seed)
    given = windows_of(tokenizer, read, tokens, tokens // 4)
    if text := documentation_text():
        more = windows_of(tokenizer, text, tokens)
        given += pick.sample(more, min(len(more), len(given)))
    pick.shuffle(given)
    return given, token_windows(tokenizer, other, tokens, held_out)


def windows_of(tokenizer: Any, text: str, tokens: int = 512, stride: int | None = None) -> list[torch.Tensor]:
    """All of ``text`` in stretches of so many tokens, one every ``stride`` (by default end to end): int64 [1, tokens]
    each; the last, which may be shorter, is left out unless it is the only one."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    return [ids[:, i : i + tokens] for i in range(0, max(1, ids.shape[1] - tokens + 1), stride or tokens)]
