"""Writing a manifest into a bundle."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from stepforge.runtime.bundle.format import MANIFEST, Bundle, to_dict


def write_manifest(bundle: Bundle) -> None:
    """Write bundle.json in one atomic step."""
    text = json.dumps(to_dict(bundle), indent=1)
    with tempfile.NamedTemporaryFile("w", dir=bundle.path, prefix=".manifest", delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(bundle.path / MANIFEST)
