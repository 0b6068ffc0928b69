"""Requests in every order of submission, cancellation, deadlines, priorities, gates and ends, against a model of the queue.

The engine is real, on the fake backend; its denoiser makes one call for each permit of the test, so that every step of the
machine knows what the engine can have done. Clocks are left out: deadlines are of 0 s or of an hour.
"""

from __future__ import annotations

import threading
from concurrent.futures import wait
from operator import itemgetter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stepforge import Cancelled, DeadlineExceeded, Engine, EngineClosed, QueueFull, Request
from stepforge.runtime.backends.fake import Fake, fake_bundle

BUNDLE = fake_bundle(64)
LIMIT, ROWS = 4, 2


class Metered(Fake):
    """The fake backend whose denoiser waits for a permit at each call."""

    def __init__(self):
        super().__init__(BUNDLE)
        self.permits, self.entered = threading.Semaphore(0), threading.Semaphore(0)

    def open(self, component, banks=None):
        graph = super().open(component, banks)
        if component.role != "denoiser":
            return graph

        def run(inputs):
            self.entered.release()
            assert self.permits.acquire(timeout=20)
            return graph(inputs)

        return run


class Requests(RuleBasedStateMachine):
    """The model: what waits, in the order of its ranks; what runs; what must have become of each request."""

    def __init__(self):
        super().__init__()
        self.backend = Metered()
        self.engine = Engine(BUNDLE, self.backend, max_rows=ROWS, queue_limit=LIMIT)
        self.futures, self.priorities, self.started, self.expected = [], [], [], {}
        self.first = self.engine.submit("first", steps=1, guidance=1.0, images=ROWS)  # holds every row until the end
        assert self.backend.entered.acquire(timeout=20)

    @property
    def waiting(self):
        return [index for index in range(len(self.futures)) if index not in self.expected]

    def _submit(self, priority, deadline):
        def started(progress, index=len(self.futures)):
            if index not in self.started:
                self.started.append(index)

        return self.engine.submit(
            Request(prompt="x", steps=1, guidance=1.0, images=ROWS),
            priority=priority,
            deadline=deadline,
            on_step=started,
        )

    @rule(priority=st.integers(-10, 10), deadline=st.sampled_from([None, 3600.0]))
    def submit(self, priority, deadline):
        if len(self.waiting) == LIMIT:
            try:
                self._submit(priority, deadline)
            except QueueFull:
                return
            raise AssertionError("a full queue took a request")
        self.futures.append(self._submit(priority, deadline))
        self.priorities.append(priority)

    @precondition(lambda self: len(self.waiting) < LIMIT)
    @rule()
    def submit_late(self):
        self.futures.append(self._submit(0, 0.0))
        self.priorities.append(0)
        self.expected[len(self.futures) - 1] = DeadlineExceeded

    @precondition(lambda self: self.futures)
    @rule(data=st.data())
    def cancel(self, data):
        index = data.draw(st.integers(0, len(self.futures) - 1))
        future = self.futures[index]
        if index not in self.expected:
            assert future.cancel()
            self.expected[index] = Cancelled
        else:
            wait([future], 10)
            assert future.cancel() is (self.expected[index] is Cancelled)

    @invariant()
    def the_queue_is_what_the_model_says(self):
        for index, error in self.expected.items():
            assert isinstance(self._error(index), error)
        assert not any(self.futures[index].done() for index in self.waiting)
        stats = self.engine.stats()
        assert stats.waiting == len(self.waiting) <= LIMIT
        assert stats.running == ROWS
        assert stats.requests["cancelled"] == list(self.expected.values()).count(Cancelled)

    def _error(self, index):
        """Waits for a deadline's thread, which is not the test's."""
        try:
            return self.futures[index].exception(10)
        except Cancelled as error:
            return error

    def teardown(self):
        """Drained or aborted, in turn: the order of those that ran is that of the model, and nobody is left without an end."""
        waiting = self.waiting
        drains = len(self.futures) % 2 == 0
        ended = []
        closing = threading.Thread(target=lambda: ended.append(self.engine.close(drain=drains)))
        closing.start()
        while not self.engine.is_closed:
            pass
        try:
            self._submit(0, None)
            raise AssertionError("a closed engine took a request")
        except EngineClosed:
            pass
        self.backend.permits.release(10_000)
        closing.join(20)
        assert not closing.is_alive()
        assert ended == [drains or not waiting]
        assert len(self.first.result(0).images) == ROWS
        for index in waiting:
            error = self._error(index)
            assert error is None if drains else isinstance(error, Cancelled), error
        ranks = [(-30 * self.priorities[index], index) for index in waiting]
        if drains:
            assert self.started == [index for _, index in sorted(ranks, key=itemgetter(0))]
        assert not self.engine._intake.deadlines._pending


TestRequests = Requests.TestCase
TestRequests.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
