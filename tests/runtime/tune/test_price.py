"""What a row costs, and which rows a plan has."""

import time
from dataclasses import replace

import pytest

from stepforge import Engine, Request
from stepforge.runtime.bundle import ControlCard
from stepforge.runtime.tune.price import denoising_rows, prices, row_counts


@pytest.mark.parametrize("pooled", [False, True], ids=["plain", "pooled"])
@pytest.mark.parametrize("guess_mode", [False, True], ids=["all rows", "guess mode"])
def test_rows_are_counted_as_the_engine_does(engine, backend, controls, pooled, guess_mode):
    """Pooled residuals run in conditional rows only, as in guess mode."""
    bundle = replace(engine.bundle, controls={"edge": ControlCard(global_pool=pooled)})
    request = Request(
        prompt="x", steps=10, guidance="interval(3, steps=0.2..0.7)", reuse="deepcache(3)", sampler="ddim",
        controls=[{**controls[0], "end": 0.6, "guess_mode": guess_mode}],
    )  # fmt: skip
    with Engine(bundle, backend(bundle)) as other:
        result = other.generate(request)
    counted = row_counts(result.plan, request, bundle)
    assert counted == denoising_rows(result)
    conditional = sum(count for label, count in counted.items() if label.startswith("control/"))
    assert conditional == (6 if pooled or guess_mode else 10)


def test_prices_solve_for_the_seconds_of_a_row(engine, backend, controls):
    """Networks that take 2 ms a row whole, 0.5 ms with DeepCache and 1 ms for the ControlNet."""
    takes = {"unet": 2e-3, "unet.deepcache": 5e-4, "control/edge": 1e-3}

    class Slow(backend):
        def open(self, component, banks=None):
            graph = super().open(component, banks)

            def run(inputs):
                time.sleep(takes.get(component.label, 0.0) * len(inputs.get("sample", ())))
                return graph(inputs)

            return run

    with Engine(engine.bundle, Slow(engine.bundle)) as slow:
        request = Request(prompt="x", guidance=3, sampler="ddim", controls=controls)
        found = prices(slow, request)
    assert found["unet"] == 1.0
    assert found["unet.deepcache"] == pytest.approx(0.25, abs=0.15)  # the engine's own time, and the machine's load
    assert found["control/edge"] == pytest.approx(0.5, abs=0.15)
