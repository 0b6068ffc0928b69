"""The bundle: a model compiled to graphs, in a directory. `format` states what lies where."""

from stepforge.runtime.bundle.format import (
    MANIFEST,
    NAME,
    PRECISIONS,
    Bank,
    Bundle,
    Component,
    ControlCard,
    ModelCard,
    Module,
    Size,
    Tensor,
    TextEncoder,
    read,
    sha256,
    write_manifest,
)

__all__ = [
    "MANIFEST",
    "NAME",
    "PRECISIONS",
    "Bank",
    "Bundle",
    "Component",
    "ControlCard",
    "ModelCard",
    "Module",
    "Size",
    "Tensor",
    "TextEncoder",
    "read",
    "sha256",
    "write_manifest",
]
