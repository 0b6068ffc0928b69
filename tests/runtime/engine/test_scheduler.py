"""Who runs next: order, packing and room, on stand-ins without arrays."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from stepforge import Cancelled, QueueFull, RequestError
from stepforge.runtime.bundle import UNET, ComponentId
from stepforge.runtime.engine.scheduler import Scheduler
from stepforge.runtime.engine.trajectory import Kind, Waypoint

REFINER = ComponentId("denoiser", "refiner")


@dataclass(eq=False)
class Job:
    images: int = 1
    side: int = 64
    started: int = 0
    submitted: float = 0.0
    is_network: bool = False
    is_over: bool = False
    priority: int = 0
    request: SimpleNamespace = field(init=False)
    legs: list = field(init=False)

    def __post_init__(self):
        self.request = SimpleNamespace(images=self.images)
        self.legs = [SimpleNamespace(pixels=self.side**2, is_network=self.is_network)]
        self.rank = self.submitted - 30 * self.priority


@dataclass(eq=False)
class Image:
    job: Job
    network: ComponentId = UNET
    need: int = 2
    is_done: bool = False

    @property
    def kind(self):
        return Kind(self.network, False, (4, self.job.side // 8, self.job.side // 8), 77)

    @property
    def pixels(self):
        return self.job.side**2

    def rows(self):
        return [self] * self.need


def started(scheduler, *images):
    for image in images:
        scheduler.submit(image.job, wait=False)
        assert scheduler.admissible() is image.job
        scheduler.start(image)
        scheduler.took(image.job)


def make(**options):
    return Scheduler(**{"max_rows": 8, "max_pixels": 8 << 20, "queue_limit": 10, **options})


def test_a_batch_is_the_oldest_image_and_all_of_its_kind_that_fit():
    scheduler = make()
    images = [
        Image(Job()),
        Image(Job(side=128)),
        Image(Job(), need=1),
        Image(Job(), REFINER),
        *(Image(Job()) for _ in range(4)),
    ]
    started(scheduler, *images)
    batch = scheduler.pack()
    assert batch.trajectories == (images[0], images[2], images[4], images[5])
    assert batch.spans == (slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 7))
    images[0].job.is_over = True
    assert scheduler.pack().trajectories == (images[1],)
    for image in images:
        image.is_done = True
    assert scheduler.retire() == images[1:]
    assert scheduler.pack() is None


def test_images_of_a_request_start_one_by_one_and_hold_their_place_in_the_queue():
    scheduler = make(max_rows=2)
    many, next_one = Job(images=3), Job()
    for job in (many, next_one):
        scheduler.submit(job, wait=False)
    first, second = Image(many), Image(many)
    for image in (first, second):
        scheduler.start(image)
        scheduler.took(many)
    assert scheduler.admissible() is None  # rows are taken
    first.is_done = True
    scheduler.retire()
    assert scheduler.admissible() is many
    scheduler.start(Image(many))
    scheduler.took(many)
    second.is_done = True
    scheduler.retire()
    assert scheduler.admissible() is next_one


def test_images_between_two_legs_come_before_waiting_requests_and_keep_to_rows_and_pixels():
    scheduler = make(max_rows=3, max_pixels=5 * 64**2)
    younger = [Image(Job(submitted=2.0)), Image(Job(submitted=3.0))]
    started(scheduler, *younger)
    scheduler.submit(Job(submitted=4.0), wait=False)
    job = Job(submitted=1.0)
    large, other = (Waypoint(Job(side=side), 0, 0, None) for side in (128, 64))
    for waypoint in (large, other):
        scheduler.resume(waypoint)
    assert scheduler.admissible() is None  # the larger one waits for pixels, and what is behind it waits with it
    younger[1].is_done = True
    scheduler.retire()
    assert scheduler.admissible() is large
    scheduler.start(Image(job, REFINER))
    scheduler.took(large)
    assert scheduler.pack().trajectories[0].job is job  # the oldest request goes on first
    assert scheduler.admissible() is other
    other.job.is_over = True
    assert isinstance(scheduler.admissible(), Job)
    scheduler.resume(large)
    told = []
    scheduler.close()
    scheduler.abandon(told.append)
    assert large.job in told
    with pytest.raises(Cancelled, match="closed"):
        scheduler.resume(other)


def test_given_images_of_networks_are_read_as_others_end():
    scheduler = make(max_rows=2)
    for _ in range(4):
        scheduler.submit(Job(is_network=True), wait=False)
    image = Waypoint(Job(), 0, 0, None)
    for _ in range(2):
        scheduler.took(scheduler.admissible())
        scheduler.lend(image)
    assert scheduler.admissible() is None
    threading.Timer(0.05, scheduler.returned, [image]).start()
    assert scheduler.has_work()  # waits until one is back
    assert scheduler.admissible() is not None


@pytest.mark.parametrize(("limit", "rows"), [(None, 4), (1, 2), (2, 1)])
def test_memory_that_ran_out_halves_the_pixels_of_that_network_only(limit, rows):
    scheduler = make(max_rows=4)
    images = [Image(Job(), need=1) for _ in range(4)]
    started(scheduler, *images)
    for _ in range(limit or 0):
        scheduler.learn_out_of_memory(scheduler.pack())
    assert len(scheduler.pack().rows) == rows
    for image in images:
        image.network = REFINER
    assert len(scheduler.pack().rows) == 4


def test_waiting_for_room_ends_with_room_or_with_the_engine():
    scheduler = make(queue_limit=1)
    first = Job()
    scheduler.submit(first, wait=False)
    with pytest.raises(QueueFull):
        scheduler.submit(Job(), wait=False)
    ended = []

    def wait():
        try:
            scheduler.submit(Job(), wait=True)
            ended.append("in")
        except RequestError as error:
            ended.append(str(error))

    for free, expected in ((lambda: scheduler.drop(first), "in"), (scheduler.close, "the engine was closed")):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.05)
        assert thread.is_alive()
        free()
        thread.join(5)
        assert ended.pop() == expected
    assert not scheduler.has_work()
    settled = []
    scheduler.abandon(settled.append)
    assert len(settled) == 1
