"""Compiled steps in a bundle: what was written is read, and nothing else is."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.bundle.steps import Row, StepTable, spans, written
from stepforge.runtime.errors import BundleError, RequestError

FIRST = Row(0, 999.0, math.inf, 1.0, 2.0**-149, (0.0, -1.0), (0.25,), (0.5,))
COUNTS = {1: (1.0, (FIRST,)), 2: (1.5, (FIRST, Row(1, -3.25, 0.5, 0.1, 0.0, (1.0, 2.0), (1.0, 2.0), (3.0, 0.1))))}


def test_what_is_written_is_read():
    table = StepTable.of(COUNTS)
    again = StepTable.parse(written(COUNTS))
    assert (again, again.counts, hash(again)) == (table, COUNTS, hash(table))
    assert StepTable.of({1: COUNTS[1]}) != table
    assert SchedulerCard(sampler="XScheduler", table=table) != SchedulerCard(sampler="XScheduler")


def test_a_card_names_a_class_or_a_sampler():
    card = SchedulerCard(sampler="SASolverScheduler")
    assert card.is_compiled
    assert SchedulerCard.from_dict(card.to_dict()) == card
    assert "table" not in replace(card, table=StepTable.of(COUNTS)).to_dict()
    for name in ("sasolver", "../Scheduler", "Scheduler\n", "", 3, None):
        with pytest.raises(BundleError, match="sampler is"):
            SchedulerCard(sampler=name)  # type: ignore[arg-type]


def test_counts_that_were_not_compiled():
    with pytest.raises(RequestError, match="S was compiled for 1 to 2 steps, not for 9; the nearest is 2"):
        StepTable.of(COUNTS).rows("S", 9)
    assert spans([1, 2, 3, 7, 9, 10]) == "1 to 3, 7, 9 to 10"


def edit(path: list[object], value: object) -> bytes:
    data = json.loads(written(COUNTS))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b"[1]", b"[{}]",
        edit([0, "steps"], 2), edit([0, "steps"], 0), edit([0, "steps"], True), edit([0, "steps"], 1001),
        edit([0, "init_noise"], "1"), edit([0, "init_noise"], math.nan), edit([0, "rows"], []),
        edit([0, "rows"], [[0, 1, 1, 1, 1, [1, 1], [1], [1]]] * 99), edit([1, "rows", 1, 0], 2),
        edit([1, "rows", 0, 0], 1), edit([1, "rows", 1, 1], None), edit([1, "rows", 1, 2], math.inf),
        edit([1, "rows", 1, 5], [1]), edit([1, "rows", 1, 6], []), edit([1, "rows", 0, 7], [1, 2]),
        edit([1, "rows", 1, 7], [10**400]), edit([1, "rows", 1], [1, 2, 3]),
    ],
)  # fmt: skip
def test_damaged_files(data: bytes):
    with pytest.raises(BundleError, match=r"scheduler/steps.json is damaged") as error:
        StepTable.parse(data)
    assert "\n" not in str(error.value)
