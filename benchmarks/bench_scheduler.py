"""What compiling a model's own sampler costs at export, and its table in a bundle.

    python benchmarks/bench_scheduler.py [CLASS ...]

One line a scheduler: seconds to compile all step counts, of them the examination before any weight is read; bytes of
scheduler/steps.json; milliseconds to read and check it; longest windows over latents and predictions.
"""

from __future__ import annotations

import argparse
import time

from stepforge.export.models.scheduler import EXAMINED, scheduler_card
from stepforge.runtime.bundle.steps import StepTable, written

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "DDPMScheduler": {"variance_type": "fixed_large", "clip_sample": False},
    "DPMSolverMultistepScheduler": {"solver_type": "heun"},
    "DPMSolverSinglestepScheduler": {},
    "EDMEulerScheduler": {"sigma_data": 1.0, "sigma_max": 120.0, "prediction_type": "v_prediction"},
    "KDPM2AncestralDiscreteScheduler": {},
    "PNDMScheduler": {},
    "SASolverScheduler": {},
    "UniPCMultistepScheduler": {"solver_order": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", metavar="CLASS", help=f"some of {', '.join(SCHEDULERS)}; default: all")
    for name in parser.parse_args().classes or SCHEDULERS:
        config = {"_class_name": name, **BETAS, **SCHEDULERS.get(name, {})}
        start = time.process_time()
        scheduler_card(config, EXAMINED)
        examined = time.process_time() - start
        card = scheduler_card(config)
        compiled = time.process_time() - start - examined
        assert card.table is not None
        data = written(card.table.counts)
        start = time.process_time()
        table = StepTable.parse(data)
        read = time.process_time() - start
        rows = [row for _, rows in table.counts.values() for row in rows]
        windows = max(len(row.keep) for row in rows), max(len(row.gain) for row in rows)
        print(
            f"{name:32} {compiled:5.1f} s, examined {examined:.2f} s; {len(data) / 1e6:.2f} MB, read {read * 1e3:.0f} ms;"
            f" {len(table.counts)} counts, windows {windows}",
            flush=True,
        )


if __name__ == "__main__":
    main()
