"""An engine whose model has every part that can be tuned."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stepforge import Engine
from stepforge.runtime.backends.fake import Fake, fake_bundle
from stepforge.runtime.bundle import UNET, Component, ComponentId, ControlCard, Tensor

SIZE = 64


class Variants(Fake):
    """The fake backend with the two reuse variants, which repeat the prediction that was kept, and a ControlNet."""

    def open(self, component, banks=None):
        if component.role.startswith("control"):
            return self._control(component.role == "control_hint")
        whole = super().open(component)
        if component.role != "denoiser":
            return whole

        def run(inputs):
            if (kept := inputs.get("deep", inputs.get("text_0"))) is not None:
                return {"prediction": kept.copy(), "deep": kept.copy()}
            outputs = whole(inputs)
            return {**outputs, "deep": outputs["prediction"], "text_0": outputs["prediction"]}

        return run

    @staticmethod
    def _control(is_hint):
        def run(inputs):
            if is_hint:
                return {"hint": inputs["image"]}
            return {"residual_0": np.zeros((len(inputs["sample"]), 4, 1, 1), np.float32)}

        return run


def variants_bundle():
    base = fake_bundle(SIZE)
    common = tuple(Tensor(name, "float32", (1,)) for name in ("sample", "timestep", "encoder_hidden_states"))
    residual = Tensor("residual_0", "float32", ("n", 4, "h", "w"))
    control = (*common, Tensor("hint", "float32", (1,)), Tensor("scale", "float32", ("n", 1)))
    components = {
        **base.components,
        UNET: Component("", (*common, residual), ()),
        replace(UNET, variant="deepcache"): Component("", (*common, residual, Tensor("deep", "float32", (1,))), ()),
        replace(UNET, variant="tgate"): Component("", (*common, residual, Tensor("text_0", "float32", (1,))), ()),
        ComponentId("control_hint", "edge"): Component("", (), ()),
        ComponentId("control_residuals", "edge"): Component("", control, ()),
    }
    return replace(base, components=components, controls={"edge": ControlCard()})


@pytest.fixture
def backend():
    return Variants


@pytest.fixture
def controls():
    """The ControlNet of a request."""
    return [{"name": "edge", "image": Image.new("RGB", (SIZE, SIZE), "red")}]


@pytest.fixture
def engine():
    bundle = variants_bundle()
    with Engine(bundle, Variants(bundle)) as engine:
        yield engine
