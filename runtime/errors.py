"""Every error that stepforge raises on purpose.

StepforgeError            one line that says what was wrong and what is allowed
├── RequestError          a request that cannot be run: unknown sampler, bad size, ...
│   └── EngineClosed      the engine takes no requests any more
├── BundleError           a bundle that is damaged, incomplete or of another format
├── BackendError          a backend that is unknown, not installed or cannot load the graph
├── CheckpointError       a model that the exporter refuses
├── AdapterError          a LoRA file that is refused, or does not fit the model
├── QueueFull             more requests wait than the engine was told to hold
├── Cancelled             a request that was cancelled; the text says by whom
├── DeadlineExceeded      a request that was not finished by its deadline
└── GenerationError       a request that failed while it ran (NaN latents, ...)
"""

from concurrent.futures import CancelledError


class StepforgeError(Exception):
    """Base of all errors raised on purpose. Its text is one line, fit to show to a user."""


class RequestError(StepforgeError, ValueError):
    """A request that cannot be run."""


class EngineClosed(RequestError):
    """The engine was closed, or is being drained, and takes no requests any more."""


class BundleError(StepforgeError):
    """A bundle that is damaged, incomplete, or of another format version."""


class BackendError(StepforgeError):
    """A backend that is unknown, not installed, or cannot load the graph."""


class CheckpointError(StepforgeError):
    """A model that the exporter refuses to read."""


class AdapterError(StepforgeError):
    """A LoRA file that is refused: not safetensors, damaged, made for another model, or of an unknown kind."""


class QueueFull(StepforgeError):
    """The engine holds as many waiting requests as its `queue_limit` allows; try again later, or wait for room."""


class Cancelled(StepforgeError, CancelledError):
    """A request was cancelled: by its caller, or because the engine was closed; the text says which."""


class DeadlineExceeded(StepforgeError, TimeoutError):
    """A request was not finished by its deadline, and stops at its next step."""


class GenerationError(StepforgeError):
    """A request that failed while it ran; its batch mates are unaffected."""
