"""The bundle: a model compiled to graphs, in a directory. `format` says what lies where, `read` checks, `store` writes."""

from stepforge.runtime.bundle.format import (
    MANIFEST,
    NAME,
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
    WEIGHT_PRECISIONS,
    Bank,
    Bundle,
    Component,
    ComponentId,
    ControlCard,
    ModelCard,
    Module,
    Role,
    Size,
    StageCard,
    Tensor,
    TextEncoder,
)
from stepforge.runtime.bundle.preset import Preset
from stepforge.runtime.bundle.read import read, sha256
from stepforge.runtime.bundle.store import locked, update, write_manifest

__all__ = [
    "MANIFEST",
    "NAME",
    "TEXT_ENCODERS",
    "UNET",
    "VAE_DECODER",
    "VAE_ENCODER",
    "WEIGHT_PRECISIONS",
    "Bank",
    "Bundle",
    "Component",
    "ComponentId",
    "ControlCard",
    "ModelCard",
    "Module",
    "Preset",
    "Role",
    "Size",
    "StageCard",
    "Tensor",
    "TextEncoder",
    "locked",
    "read",
    "sha256",
    "update",
    "write_manifest",
]
