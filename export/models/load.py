"""The door to models on disk: a diffusers folder or an original checkpoint, examined before any weight is read."""

from __future__ import annotations

from pathlib import Path

from stepforge.export.models.files import reading
from stepforge.export.models.folder import read_folder
from stepforge.export.models.scheduler import EXAMINED, scheduler_card
from stepforge.export.models.single_file import read_single_file
from stepforge.export.models.source import Source
from stepforge.runtime.errors import BundleError, CheckpointError


def load(path: str | Path, *, tokenizer: str | Path | None = None, prediction_type: str | None = None) -> Source:
    """Examine a diffusers folder or an original single-file checkpoint; read no weights yet.

    tokenizer: folder with vocab.json and merges.txt, for single files, which do not carry it; refused beside a folder.
    prediction_type: overrides what the model says, for single files that do not say it (SD 2: epsilon, v_prediction).
    Raises CheckpointError, here and from the loaders.
    """
    path = Path(path)
    with reading(path):
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; give a diffusers folder or a .safetensors checkpoint")
        if path.is_dir() and tokenizer is not None:
            raise CheckpointError(f"{path} is a folder and has its own tokenizer; give a tokenizer for a single file")
        if path.is_dir():
            source = read_folder(path, prediction_type)
        else:
            source = read_single_file(path, None if tokenizer is None else Path(tokenizer), prediction_type)
    try:
        scheduler_card(source.scheduler, EXAMINED)
    except (BundleError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return source
