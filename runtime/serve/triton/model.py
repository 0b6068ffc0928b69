"""The model class that Triton's Python backend loads: an engine behind Triton's tensors.

Requests are answered when they end, from other threads, so that all that a server has on their way share the engine's batches;
Triton's own batching would wait for whole batches. A decoupled model tells of its steps besides.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepforge.runtime.checks import shown, whole
from stepforge.runtime.engine import Engine
from stepforge.runtime.errors import Cancelled, DeadlineExceeded, EngineClosed, QueueFull, RequestError, StepforgeError
from stepforge.runtime.files import printable, strict_json
from stepforge.runtime.imaging.encode import encode
from stepforge.runtime.imaging.metadata import describe_image
from stepforge.runtime.load import load
from stepforge.runtime.request import Progress, Request, Result, canonical
from stepforge.runtime.serve.manifest import PICTURES

log = logging.getLogger(__name__)

ENCODERS = 2  # threads that make answers
LOOK = 0.25  # seconds between looks at what clients have cancelled
TEXTS, NUMBERS = (
    ("prompt", "negative", "guidance"),
    ("seed", "steps", "width", "height"),
)  # fields with an input of their own


@dataclass(frozen=True, slots=True)
class Threads:
    """Of one model. sender: one thread, so that a client's responses keep their order, the last at the end."""

    encoders: ThreadPoolExecutor
    sender: ThreadPoolExecutor


class TritonPythonModel:
    """One instance of a model: a process with one engine."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine. args: Triton's, all texts; "model_config" has the parameters that `repository.py` wrote."""
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        if args.get("model_instance_kind") == "GPU":
            os.environ["CUDA_VISIBLE_DEVICES"] = _device(args["model_instance_device_id"])
        bundle = given["bundle"]
        self._engine: Engine = load(
            bundle if bundle == "fake" else Path(args["model_repository"]) / bundle,
            backend=given["backend"],
            precision=given["precision"],
            threads=int(given["threads"]) or None,
            max_rows=int(given["max_rows"]),
            queue_limit=int(given["queue_limit"]),
        )
        for name, file in json.loads(given["adapters"]).items():
            self._engine.adapters.load(name, Path(args["model_repository"]) / file)
        self._is_decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        self._threads = Threads(
            ThreadPoolExecutor(ENCODERS, "stepforge-encode"), ThreadPoolExecutor(1, "stepforge-send")
        )
        self._calls: set[_Call] = set()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="stepforge-cancel", daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        """Start requests; each is answered through its sender. What one says wrong is its own answer."""
        for request in requests:
            call = _Call(request, self._threads, self._calls.discard)
            self._calls.add(call)
            call.start(self._engine, request, tells_steps=self._is_decoupled)

    def finalize(self) -> None:
        self._ended.set()
        self._engine.close()
        self._threads.encoders.shutdown()
        self._threads.sender.shutdown()

    def _watch(self) -> None:
        """Cancel at the next step what no client waits for."""
        while not self._ended.wait(LOOK):
            # on the sender's thread: asked beside a last response, Triton 24.10 crashes
            with suppress(RuntimeError):  # finalize was faster
                self._threads.sender.submit(self._cancel).result()

    def _cancel(self) -> None:
        for call in tuple(self._calls):
            call.cancel_if_told()


class _Call:
    """One request of a client, to its last response."""

    def __init__(self, request: Any, threads: Threads, on_end: Callable[[_Call], object]) -> None:
        # Triton's objects lie in memory that goes with `finalize`, while the engine may keep its last job: none are kept on
        self._sender: Any = request.get_response_sender()
        self._threads, self._on_end = threads, on_end
        self._wanted = frozenset(request.requested_output_names())
        self._future: Future[Result] | None = None

    def start(self, engine: Engine, request: Any, *, tells_steps: bool) -> None:
        try:
            asked = request_of(request)
            on_step = self._steps(_number(request, "progress_every")) if tells_steps else None
            wait = request.timeout() / 1e6  # microseconds; 0: none was asked for
            future = self._future = engine.submit(asked, on_step=on_step, deadline=wait or None)
        except Exception as error:
            self._end(lambda error=error: _refused(error))  # type: ignore[misc]
        else:
            future.add_done_callback(lambda done: self._threads.encoders.submit(self._finish, done))

    def cancel_if_told(self) -> None:
        future, sender = self._future, self._sender
        if future is not None and sender is not None and sender.is_cancelled():
            future.cancel()

    def _steps(self, every: int | None) -> Callable[[Progress], None] | None:
        """What tells a client of every so many steps, with a preview if it asks for one."""
        if every is None:
            return None
        whole("progress_every", every, 1, 1000)

        def on_step(progress: Progress) -> None:
            if progress.step % every or progress.step >= progress.steps:
                return
            said = np.array([progress.image, progress.step, progress.steps], np.int32)
            if "preview" in self._wanted:
                progress.preview().add_done_callback(lambda done: self._tell(said, done))
            else:
                self._tell(said)

        return on_step

    def _tell(self, said: Any, preview: Future[Any] | None = None) -> None:
        tensors = {"progress": said}
        if preview is not None:
            if preview.cancelled() or preview.exception() is not None:
                return
            tensors["preview"] = np.asarray(preview.result(), np.uint8)
        self._threads.sender.submit(self._send, lambda: _response([_tensor(*pair) for pair in tensors.items()]), 0)

    def _finish(self, done: Future[Result]) -> None:
        """On an encoder's thread."""
        try:
            outputs = self._answer(done)
        except BaseException as error:
            self._end(lambda error=error: _refused(error))  # type: ignore[misc]
        else:
            self._end(lambda: _response([_tensor(name, values) for name, values in outputs.items()]))

    def _end(self, answer: Callable[[], Any]) -> None:
        """Send the last response: without it a client waits for ever."""
        self._threads.sender.submit(self._send, answer, _backend().TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _send(self, answer: Callable[[], Any], flags: int) -> None:
        """On the sender's thread."""
        try:
            if self._sender is not None:
                self._sender.send(_built(answer) if flags else answer(), flags=flags)
        except Exception:  # errors of Triton's, whose types are its own: the client has gone
            log.exception("a response was not sent")
        finally:
            if flags:
                self._sender = None
                self._on_end(self)

    def _answer(self, done: Future[Result]) -> dict[str, Any]:
        result = done.result()
        abouts = [describe_image(result, index) for index in range(len(result.images))]
        made: dict[str, Callable[[], Any]] = {
            "images": lambda: np.stack([np.asarray(image, np.uint8) for image in result.images]),
            "seeds": lambda: np.array(result.seeds, np.uint64),
            "about": lambda: np.array([json.dumps(about).encode() for about in abouts], np.object_),
            "files": lambda: np.array(
                [encode(image, "png", metadata=about) for image, about in zip(result.images, abouts, strict=True)],
                np.object_,
            ),
        }
        return {name: make() for name, make in made.items() if name in self._wanted}


def request_of(request: Any) -> Request:
    """A request of Triton's inputs. Raises RequestError.

    "request" has further fields as JSON; a picture in it is its number among the files of "pictures", so that no client
    names a file of the server.
    """
    fields: dict[str, Any] = {}
    for name in TEXTS:
        if (text := _text(request, name)) is not None:
            fields[name] = text
    for name in NUMBERS:
        if (number := _number(request, name)) is not None:
            fields[name] = number
    if (more := _text(request, "request")) is not None:
        try:
            said = strict_json(more.encode())
        except ValueError as error:
            raise RequestError(f"the input request: {error}") from None
        if not isinstance(said, dict):
            raise RequestError("the input request is no JSON object")
        said = canonical(said)
        if twice := said.keys() & fields.keys():
            raise RequestError(f"{min(twice)} is given twice")
        fields |= said
    pictures = _values(request, "pictures")
    return Request.of(with_numbers(fields, [] if pictures is None else [bytes(file) for file in pictures]))


def with_numbers(fields: Mapping[str, Any], files: list[bytes]) -> dict[str, Any]:
    """Fields whose pictures, numbers so far, are files. Raises RequestError for all else."""

    def file(given: Any) -> Any:
        if given is None:
            return None
        if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < len(files):
            raise RequestError(
                f"a picture is {shown(given)}; give its number in the input pictures, which has {len(files)}"
            )
        return files[given]

    def resolved(value: Any, names: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [resolved(one, names) for one in value]
        if isinstance(value, dict):
            return {key: file(one) if key in names else one for key, one in value.items()}
        return value

    return {name: resolved(value, PICTURES.get(name, ())) for name, value in fields.items()}


def _values(request: Any, name: str) -> Any:
    tensor = _backend().get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1)


def _one(request: Any, name: str) -> Any:
    values = _values(request, name)
    if values is not None and len(values) != 1:
        raise RequestError(f"the input {name} has {len(values)} elements; give one")
    return None if values is None else values[0]


def _text(request: Any, name: str) -> str | None:
    value = _one(request, name)
    try:
        return None if value is None else bytes(value).decode()
    except UnicodeDecodeError:
        raise RequestError(f"the input {name} is not UTF-8 text") from None


def _number(request: Any, name: str) -> int | None:
    value = _one(request, name)
    return None if value is None else int(value)


def _tensor(name: str, values: Any) -> Any:
    return _backend().Tensor(name, values)


def _response(tensors: list[Any]) -> Any:
    return _backend().InferenceResponse(output_tensors=tensors)


def _built(answer: Callable[[], Any]) -> Any:
    """A last response, or the error that kept it from being made: without one its client waits for ever."""
    try:
        return answer()
    except Exception as error:  # Triton's own, for tensors that it cannot hold; `_refused` logs it
        return _refused(error)


def _refused(error: BaseException) -> Any:
    """An error as Triton's: what the client can mend is INVALID_ARG, over HTTP a 400."""
    kinds = _backend().TritonError
    if isinstance(error, QueueFull | EngineClosed):
        code = kinds.UNAVAILABLE
    elif isinstance(error, Cancelled | DeadlineExceeded):
        code = kinds.CANCELLED
    elif isinstance(error, RequestError):
        code = kinds.INVALID_ARG
    else:
        code = kinds.INTERNAL
        if not isinstance(error, StepforgeError):
            log.error("a request failed", exc_info=error)
    text = str(error) if isinstance(error, StepforgeError) else type(error).__name__  # no paths of the server
    return _backend().InferenceResponse(error=kinds(printable(text, 500), code))


def _device(number: str) -> str:
    """A device of Triton's among those that the server's environment lets it see."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[int(number)] if visible else number


def _backend() -> Any:
    """Triton's own module, which exists only inside its Python backend."""
    import triton_python_backend_utils

    return triton_python_backend_utils
