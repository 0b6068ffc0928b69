"""Tiny models, and what merging a file into them gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import nn

from stepforge.export.lora.merge import merge
from stepforge.export.models.load import load
from stepforge.export.models.networks import modules_of, named_modules
from stepforge.export.models.source import Source
from stepforge.runtime.bundle import UNET, ComponentId, Module
from stepforge.runtime.lora.adapter import Adapter, read_adapter

State = Mapping[str, torch.Tensor]


@dataclass
class Model:
    """A model on disk. Components are named as in a bundle."""

    folder: Path
    source: Source

    @cached_property
    def pristine(self) -> dict[ComponentId, nn.Module]:
        """Its networks in float32. Not to be changed: take a `copy`."""
        loaders = (self.source.unet, *self.source.text_encoders)
        return {name: loader(torch.float32) for name, loader in zip(self.source.empty, loaders, strict=True)}

    @cached_property
    def modules(self) -> dict[ComponentId, tuple[Module, ...]]:
        return {name: modules_of(network) for name, network in self.pristine.items()}

    @property
    def names(self) -> dict[str, ComponentId]:
        """diffusers' name of a component -> a bundle's."""
        return {component.name: component for component in self.source.empty}

    def pipeline(self) -> type:
        import diffusers

        return getattr(diffusers, f"StableDiffusion{'XL' if self.source.family == 'sdxl' else ''}Pipeline")

    def copy(self, component: ComponentId = UNET) -> nn.Module:
        return copy.deepcopy(self.pristine[component])

    def only(self, paths: Iterable[str], component: ComponentId = UNET) -> nn.Module:
        """A network of nothing but some layers, by their paths: quicker to copy than all of it."""
        network = nn.Module()
        for path in paths:
            *parents, last = path.split(".")
            at = network
            for name in parents:
                if name not in at._modules:
                    at.add_module(name, nn.Module())
                at = at._modules[name]
            at.add_module(last, copy.deepcopy(named_modules(self.pristine[component])[path]))
        return network

    def read(self, file: Path) -> Adapter:
        return read_adapter(file, self.modules)

    def check(self, file: Path, wanted: Mapping[float, Mapping[ComponentId, State]]) -> Adapter:
        """Merging at each strength gives the wanted parameters (component -> name -> tensor) within 1e-6 of their norm.

        Parameters that are not among them stay as they were, and something changes.
        """
        adapter = self.read(file)
        for strength, components in wanted.items():
            assert set(adapter.components) == set(components)
            for component, theirs in components.items():
                layers = {path: layer for (where, path), layer in adapter.layers.items() if where == component}
                ours = dict(merge(self.copy(component), [(layers, strength)]).named_parameters())
                assert close(ours, {**dict(self.pristine[component].named_parameters()), **theirs}, 1e-6)
                assert not close(ours, dict(self.pristine[component].named_parameters()), 1e-3)
        return adapter


@torch.no_grad()
def close(ours: State, theirs: State, limit: float) -> bool:
    assert ours.keys() == theirs.keys()
    errors = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours}
    worst = max(errors, key=errors.__getitem__)
    print(f"{worst}: {errors[worst]:.2g}")  # shown when a test fails
    return errors[worst] <= limit


def _model(folder: Path) -> Model:
    return Model(folder, load(folder))


@pytest.fixture(scope="session")
def sd1(tiny_sd1: Path) -> Model:
    return _model(tiny_sd1)


@pytest.fixture(scope="session")
def sd2(tiny_sd2v: Path) -> Model:
    return _model(tiny_sd2v)


@pytest.fixture(scope="session")
def xl(tiny_sdxl: Path) -> Model:
    return _model(tiny_sdxl)


@pytest.fixture
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Fresh adapters change nothing: give every trained parameter a value."""

    def fill(network: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "magnitude" in name or name.endswith("bias"):
                    parameter += parameter.requires_grad * 0.1 * torch.randn_like(parameter)
                elif parameter.requires_grad:
                    parameter.normal_(std=0.2)
        return network

    return fill


@pytest.fixture
def check_fused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Adapter]:
    """Merging a file at each strength gives what diffusers' load_lora_weights() and fuse_lora() give."""
    # transformers asks for a PEFT newer than the newest that there is
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)

    def run(model: Model, file: Path, *strengths: float) -> Adapter:
        wanted = {}
        for strength in strengths:
            pipe = model.pipeline().from_pretrained(model.folder)
            pipe.load_lora_weights(file.parent, weight_name=file.name)
            names = [name for name in model.names if getattr(getattr(pipe, name), "peft_config", None)]
            pipe.fuse_lora(components=names, lora_scale=strength)
            pipe.unload_lora_weights()
            wanted[strength] = {model.names[name]: dict(getattr(pipe, name).named_parameters()) for name in names}
        return model.check(file, wanted)

    return run


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These layers are so small that a second thread only waits: 85 s of processor time against 33."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)
