"""Requests as values, and what the door lets in: arbitrary values for every field give a request or one line."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stepforge import Control, Request, RequestError
from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.imaging.preprocess import hint_of
from stepforge.runtime.plan.compile import compile_plan
from stepforge.runtime.plan.guiders import Guider
from stepforge.runtime.plan.reuse import Reuse
from stepforge.runtime.request.request import ALIASES, MAX_CONTROLS, MAX_PROMPT, MAX_STEPS

ARRAY = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
CONTROL = {"name": "edge", "image": "a.png"}
FULL: dict[str, Any] = {  # every field, as callers write them
    "prompt": "a cat",
    "negative": "a dog",
    "width": np.int64(64),
    "height": 128,
    "steps": 7,
    "sampler": "euler",
    "schedule": "karras",
    "spacing": "leading",
    "timesteps": np.array([900, 500, 1]),
    "sigmas": [3.0, 1, 0],
    "eta": 0,
    "guidance": "unet=interval(7.5, sigma=0.28..5.42); refiner=[2, 1]",
    "guider": "apg(eta=0) + rescale",
    "controls": [
        {**CONTROL, "preprocessor": "silhouette+crop", "scale": [1, 0.5], "sigma": [1, 2], "end": 0.5},
        CONTROL,
    ],
    "reuse": "tgate(0.5)+deepcache(3)",
    "preset": "fast",
    "seed": 2**63,
    "images": 3,
    "prompt_syntax": "plain",
    "adapters": {"a": 1, "b": np.float32(0.5)},
    "adapter_schedule": (1, 0.5),
    "init": {"image": ARRAY, "mask": ARRAY, "strength": 0.5, "overlay": True},
    "experts": "base@0..0.8, refiner@0.8..1",
    "micro": {"original_size": [64, 96], "crop": [0, 8]},
    "upscale": ["x2", {"name": "x4", "steps": 3, "guidance": "linear(2)"}],
}


def test_requests_are_immutable_hashable_and_compared_by_what_they_say():
    request, same = Request(**FULL), Request(**copy.deepcopy(FULL))
    assert [field.name for field in fields(Request)] == list(FULL)
    assert (request, hash(request)) == (same, hash(same))
    for field in fields(Request):
        with pytest.raises(FrozenInstanceError):
            setattr(request, field.name, None)
        hash(getattr(request, field.name))
    for name, value in {"prompt": "x", "guidance": 3, "adapters": {"b": 0.5, "a": 1}, "controls": CONTROL}.items():
        assert replace(request, **{name: value}) != request  # the order of adapters decides roundings
    assert request.adapters == {"a": 1.0, "b": 0.5}
    with pytest.raises(TypeError):
        request.adapters["a"] = 2.0  # type: ignore[index]
    assert {type(value) for value in (request.width, request.seed, request.timesteps[0])} == {int}
    assert request.guider == Guider.parse("apg(eta=0, norm=15)+rescale(0.7)")


def test_requests_survive_pickle_copies_json_and_replace():
    request = Request(**{**FULL, "controls": [{**CONTROL, "image": ARRAY}]})
    for again in (pickle.loads(pickle.dumps(request)), copy.copy(request), copy.deepcopy(request), replace(request)):
        assert (again, hash(again)) == (request, hash(request))
        assert again.adapters == {"a": 1.0, "b": 0.5}
    stated = json.loads(json.dumps(request.to_dict()))
    for control in stated["controls"]:
        control["image"] = ARRAY
    stated["init"] |= {"image": ARRAY, "mask": ARRAY}
    assert Request.of(stated) == request
    assert stated["guider"] == "apg(momentum=-0.5, norm=15, eta=0)+rescale(0.7)"
    assert stated["reuse"] == "deepcache(3)+tgate(0.5)"
    assert Request(prompt="").to_dict()["reuse"] == str(Reuse()) == ""


@pytest.mark.parametrize("source", [ARRAY, ARRAY / 255, Image.fromarray(ARRAY), Image.fromarray(ARRAY).convert("RGBA")])
def test_images_are_kept_as_copies_and_compared_by_pixels(source):
    control = Control(name="a", image=source)
    assert (control, hash(control)) == (Control(name="a", image=ARRAY), hash(Control(name="a", image=ARRAY)))
    before = hint_of(control.image, "none", 64, 64)
    if isinstance(source, Image.Image):
        source.putpixel((0, 0), (0, 0, 0))
        source.paste(0, (0, 0, 6, 8))
    else:
        source = source.copy()
    np.testing.assert_array_equal(before, hint_of(ARRAY, "none", 64, 64))
    np.testing.assert_array_equal(before, hint_of(control.image, "none", 64, 64))
    assert control != Control(name="a", image=ARRAY[::-1])
    assert len(repr(Request(prompt="", controls=[control]))) < 2000
    assert Control(name="a", image="x.png") == Control(name="a", image=Path("x.png"))


def test_one_door_takes_prompts_mappings_and_the_names_of_diffusers():
    wanted = Request(prompt="a cat", negative="dog", steps=30, guidance=3)
    theirs = {"negative_prompt": "dog", "num_inference_steps": 30, "guidance_scale": 3}
    assert list(ALIASES) == ["negative_prompt", "num_inference_steps", "guidance_scale"]
    assert Request.of("a cat", **theirs) == Request.of({"prompt": "a cat", **theirs}) == Request.of(wanted) == wanted
    for asked, options, message in (
        ("a", {"steps": 3, "num_inference_steps": 3}, "steps and num_inference_steps are the same; give one"),
        ({"prompt": "a", "steps": 3}, {"num_inference_steps": 3}, "steps is given twice"),
        ("a", {"prompt": "b"}, "prompt is given twice"),
        ({"steps": 3}, {}, "a request needs a prompt"),
        ("a", {"step": 3}, "a request has no 'step'; it has prompt, width, .*steps \\(also num_inference_steps\\)"),
        ({"prompt": "a", 3: 4}, {}, "a request has no 3"),
        (wanted, {"steps": 3}, "steps was given beside a Request"),
        (7, {}, "a prompt or a mapping, not int"),
    ):
        with pytest.raises(RequestError, match=message) as error:
            Request.of(asked, **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt", "x" * (MAX_PROMPT + 1), "at most 20000 are allowed"),
        ("prompt", "\ud800", "surrogate"),
        ("sigmas", range(MAX_STEPS + 1, -1, -1), "1002 elements; give 1 to 1001"),
        ("timesteps", range(10**15), "give 1 to 1000"),
        ("timesteps", iter([3, 2]), "give a list"),
        ("timesteps", [10**400], "finite numbers"),
        ("guidance", range(10**15), "give a number such as 7.5"),
        ("guidance", "7.5," * 10_000, "40000 characters, more than 20000"),
        ("guider", "apg+" * 10_000, "40000 characters, more than 20000"),
        ("reuse", "(" * 30_000, "30000 characters, more than 20000"),
        ("controls", [CONTROL] * (MAX_CONTROLS + 1), "controls has 9 elements; give 1 to 8"),
        ("controls", [{**CONTROL, "magic": 1}], "a control has no 'magic'; give name and image, and any of"),
        ("controls", [{**CONTROL, "preprocessor": "canny(" * 9000}], "54000 characters"),
        ("controls", [{**CONTROL, "image": np.zeros((4, 4), object)}], "array of object"),
        ("controls", [{**CONTROL, "image": Image.new("F", (4, 4))}], "mode F"),
        ("controls", [{**CONTROL, "scale": [1.0, "x"]}], "give a number up to ±10, or one for each step"),
        ("adapters", {str(i): 1.0 for i in range(65)}, "at most 64"),
        ("sampler", np.array(["ddim", "euler"]), "choose one of ddim"),
        ("seed", 10**6000, "from 0 to 18446744073709551615"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_limits(name: str, value: object, message: str):
    with pytest.raises(RequestError, match=message) as error:
        Request(**{"prompt": "x", name: value})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]
circle: list[Any] = []
circle.append(circle)
numbers = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.complex_numbers(), st.just(10**400), st.decimals(), st.fractions()
)
leaves = st.one_of(
    numbers,
    st.none(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.sampled_from([*FULL.values(), CONTROL, object(), int, ARRAY, np.float32(3), np.datetime64("NaT")]),
    st.sampled_from(
        [Decimal("NaN"), Fraction(1, 3), np.array(3), np.array([[1.0]]), np.array(["x"]), range(3), Path("x"), ...]
    ),
)
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(
            st.one_of(st.sampled_from([f.name for f in fields(Control)]), st.text(max_size=3)), inner, max_size=4
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*(f.name for f in fields(Request)), *(f"control {f.name}" for f in fields(Control))]), anything)
def test_any_value_of_any_field_makes_a_request_or_one_line(name: str, value: object):
    owner, _, field = name.rpartition(" ")
    given = {"controls": [{**CONTROL, field: value}]} if owner else {field: value}
    message = ""
    try:
        request = Request.of({"prompt": "x", **given})
        assert pickle.loads(pickle.dumps(request)) == request
        assert hash(Request.of({**request.to_dict(), "controls": request.controls})) == hash(request)
    except RequestError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    assert len(message) < 1000


@pytest.mark.parametrize("value", [deep, circle, Unprintable()], ids=["deep", "circle", "unprintable"])
def test_echoes_never_fail(value: object):
    for field in fields(Request):
        with pytest.raises(RequestError):
            Request(**{"prompt": "x", field.name: value})
    for field in fields(Control):
        with pytest.raises(RequestError):
            Control(**{**CONTROL, field.name: value})


def test_requests_that_decide_the_same_steps_share_one_plan():
    card = fake_bundle().scheduler
    asked = {"steps": 9, "guidance": "linear(7.5)", "guider": "rescale", "controls": [{**CONTROL, "end": 0.5}]}
    plan = compile_plan(Request(prompt="a", **asked), card)
    again = Request(prompt="b", seed=4, images=2, width=64, adapters={"a": 1}, **{**asked, "guidance": "linear( 7.5 )"})
    assert compile_plan(again, SchedulerCard.from_dict(card.to_dict())) is plan
    assert plan.guider == Guider.parse("rescale(0.7)")
    others = {
        "steps": 8, "sampler": "euler", "schedule": "karras", "spacing": "trailing", "guidance": 3, "guider": "apg",
        "eta": 0.5, "adapter_schedule": 0.5, "controls": (), "reuse": "tgate(0.5)", "timesteps": (900, 1), "sigmas": (3, 0),
    }  # fmt: skip
    rest = {"prompt", "negative", "width", "height", "preset", "seed", "images", "prompt_syntax", "adapters"}
    rest |= {
        "init",
        "experts",
        "micro",
        "upscale",
    }  # plans of the first two: test_truncate, test_switch; the others decide none
    assert others.keys() | rest == {field.name for field in fields(Request)}
    for name, value in others.items():
        base = {**asked, "sampler": {"schedule": "euler", "timesteps": "euler", "sigmas": "euler"}.get(name, "ddim")}
        first, second = (compile_plan(Request(prompt="", **one), card) for one in (base, {**base, name: value}))
        assert first != second, name
        assert first == compile_plan(Request(prompt="", **base), card)
    own = (plan.steps[:3], 2.0)
    assert compile_plan(Request(prompt="a", **asked), card, own).init_noise == 2.0
