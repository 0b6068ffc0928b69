from dataclasses import dataclass
from typing import Any


@dataclass
class ControlSource:
    name: str
    network: Any
    provenance: Any
    config: Any


def load_control(path, config, vae_scale, name):
    from diffusers import ControlNetModel

    net = ControlNetModel.from_pretrained(path)
    return ControlSource(name, lambda dtype: net.to(dtype).eval(), {}, dict(net.config))
