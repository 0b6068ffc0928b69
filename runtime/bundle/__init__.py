"""The bundle: a model compiled to graphs, in a directory. `format` says what lies where, `read` checks, `store` writes."""

from stepforge.runtime.bundle.format import (
    MANIFEST,
    NAME,
    PRECISIONS,
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    Bank,
    Bundle,
    Component,
    ComponentId,
    ControlCard,
    ModelCard,
    Module,
    Role,
    Size,
    Tensor,
    TextEncoder,
)
from stepforge.runtime.bundle.read import read, sha256
from stepforge.runtime.bundle.store import write_manifest

__all__ = [
    "MANIFEST",
    "NAME",
    "PRECISIONS",
    "TEXT_ENCODERS",
    "UNET",
    "VAE_DECODER",
    "Bank",
    "Bundle",
    "Component",
    "ComponentId",
    "ControlCard",
    "ModelCard",
    "Module",
    "Role",
    "Size",
    "Tensor",
    "TextEncoder",
    "read",
    "sha256",
    "write_manifest",
]
