"""What a calibration has done so far, in a folder, so that it can go on after an interruption."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("skipc")

_SETTINGS = "settings.json"


class Stages:
    """Results of finished stages, by name: nested dictionaries of plain data and tensors.

    Args:
        folder: results are kept in its ``unfinished``; None keeps nothing.
        settings: what results depend on. Those of other settings are thrown away.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]):
        self.folder = Path(folder) / "unfinished" if folder is not None else None
        if self.folder is None:
            return
        text, path = json.dumps(settings, sort_keys=True, indent=1), self.folder / _SETTINGS
        if path.exists() and path.read_text() != text:
            log.warning("%s was left by a calibration with other settings, and is made anew", self.folder)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def get(self, name: str) -> Any:
        """The results of a stage; None if it has none."""
        if self.folder is None or not (self.folder / f"{name}.json").exists():
            return None
        from safetensors.torch import load_file

        tensors = load_file(self.folder / f"{name}.safetensors")
        log.info("%s: taken from %s", name, self.folder)
        return _joined(json.loads((self.folder / f"{name}.json").read_text()), tensors)

    def put(self, name: str, result: Mapping[str, Any]) -> None:
        """Keep the results of a stage."""
        if self.folder is None:
            return
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        plain = _parted(result, tensors)
        save_file(tensors, self.folder / f"{name}.safetensors")
        part = self.folder / f"{name}.json.part"  # whose last step is to get its name, when all else is there
        part.write_text(json.dumps(plain))
        part.rename(self.folder / f"{name}.json")

    def clear(self) -> None:
        """Throw all results away."""
        if self.folder is not None:
            shutil.rmtree(self.folder)


def _parted(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.contiguous()
        return {"$tensor": key}
    if isinstance(value, Mapping):
        return {k: _parted(v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_parted(v, tensors) for v in value]
    return value


def _joined(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value["$tensor"]] if "$tensor" in value else {k: _joined(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_joined(v, tensors) for v in value]
    return value
