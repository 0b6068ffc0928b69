"""Flags of a build, read back from a library's own configuration, and what makes one plan another."""

import importlib
from dataclasses import asdict, replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from stepforge.runtime.backends.tensorrt import plans
from stepforge.runtime.backends.tensorrt.library import LIBRARIES, BuildOptions, Library
from stepforge.runtime.bundle import UNET, read
from stepforge.runtime.cli.info import plan_lines
from stepforge.runtime.errors import BackendError


class DataCentre(Library):
    """`tensorrt`'s traits over the configuration of TensorRT for RTX, which has the same flags."""

    def __init__(self):
        self.name, self.traits, self.version, self.is_lean = "tensorrt", LIBRARIES["tensorrt"], "11.4.0.106", False
        self.module = importlib.import_module("tensorrt_rtx")


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: make test-engines")
@pytest.mark.parametrize(
    ("library", "options", "wanted"),
    [
        (DataCentre, {}, set()),
        (DataCentre, {"strip_weights": True}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        (DataCentre, {"version_compatible": True}, {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}),
        (DataCentre, {"hardware_compatible": True, "level": 2, "workspace": 64 << 20}, set()),
        (lambda: Library("tensorrt-rtx"), {"targets": ("sm_86", "sm_89", "sm_120")}, {"REQUIRE_USER_ALLOCATION"}),
        (lambda: Library("tensorrt-rtx"), {"targets": ("sm_89",), "strip_weights": True},
         {"REQUIRE_USER_ALLOCATION", "STRIP_PLAN", "REFIT"}),
    ],
)  # fmt: skip
def test_flags_of_a_build(library, options, wanted):
    opened, options = library(), BuildOptions(**options)
    module = opened.module
    opened.check(options)
    builder = module.Builder(module.Logger(module.Logger.ERROR))
    network, config = opened.network(builder), builder.create_builder_config()
    assert network.get_flag(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    opened.configure(config, options)
    held = {name for name, flag in module.BuilderFlag.__members__.items() if config.get_flag(flag)}
    fresh = builder.create_builder_config()
    given = {name for name, flag in module.BuilderFlag.__members__.items() if fresh.get_flag(flag)}
    assert held - given == wanted
    assert not config.get_flag(module.BuilderFlag.TF32)
    if options.hardware_compatible:  # RTX's configuration forgets it
        told = SimpleNamespace(set_flag=bool, clear_flag=bool, set_memory_pool_limit=lambda *_: None)
        opened.configure(told, options)
        assert told.hardware_compatibility_level == module.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.level is not None:
        assert config.builder_optimization_level == options.level
        assert config.get_memory_pool_limit(module.MemoryPoolType.WORKSPACE) == options.workspace
    if options.targets:
        found = [config.get_compute_capability(at).name for at in range(config.num_compute_capabilities)]
        assert found == [target.replace("sm_", "SM") for target in options.targets]


def test_timing_caches_are_for_tensorrt_alone():
    kept = []
    config = SimpleNamespace(
        create_timing_cache=lambda data: ("cache", data), set_timing_cache=lambda *a: kept.append(a)
    )
    for name, wanted in (("tensorrt", ("cache", b"old")), ("tensorrt-rtx", None)):
        library = object.__new__(Library)
        library.traits = LIBRARIES[name]
        assert library.timing_cache(config, b"old") == wanted
    assert kept == [(("cache", b"old"), False)]


def test_whatever_makes_another_plan_makes_another_key():
    shapes = {"sample": plans.Shapes((1, 4, 8, 8), (2, 4, 8, 8), (2, 4, 16, 16))}
    same = dict(
        card_hash="a" * 64, library="tensorrt", version="11.4", targets=("sm_86", "sm_89"), gpu="H100, sm_90, driver 590",
        precision="bf16", options=asdict(BuildOptions()), profiles=(shapes,),
    )  # fmt: skip
    assert plans.key(**same) == plans.key(**{**same, "targets": ("sm_89", "sm_86")})
    wider = {"sample": replace(shapes["sample"], high=(4, 4, 16, 16))}
    others = [
        {"card_hash": "b" * 64}, {"library": "tensorrt-rtx"}, {"version": "11.4.1"}, {"targets": ("sm_86",)},
        {"gpu": "H100, sm_90, driver 591"}, {"precision": "fp16"}, {"profiles": (wider,)}, {"profiles": (shapes, shapes)},
        *({"options": asdict(replace(BuildOptions(), **{name: value}))}
          for name, value in (("strip_weights", True), ("version_compatible", True), ("hardware_compatible", True),
                              ("level", 3), ("workspace", 1 << 20), ("lora_plugin", True))),
    ]  # fmt: skip
    keys = {plans.key(**{**same, **other}) for other in others}
    assert len(keys | {plans.key(**same)}) == len(others) + 1


def test_info_lists_plans_and_says_which_are_stale(tiny_sd1_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPFORGE_PLANS", str(tmp_path))
    bundle = read(tiny_sd1_bundle)
    digest = plans.component_hash(bundle, UNET)
    machine = plans.Machine("tensorrt-rtx", "1.7.1.116", "sm_89", "RTX 4090, sm_89, driver 590")
    shapes = {"sample": plans.Shapes((1, 4, 8, 8), (2, 4, 8, 8), (2, 4, 16, 16))}
    card = plans.Card(
        plans.FORMAT, str(UNET), digest, "tensorrt-rtx", "1.7.1.116", ("sm_86", "sm_89"), "", "bf16", {}, (shapes,), {}, {}, {},
        {}, 3, plans.hashlib.sha256(b"abc").hexdigest(), 1.0, 1,
    )  # fmt: skip
    for name, changes in {"good": {}, "old": {"version": "1.6.0"}, "other": {"targets": ("sm_120",)}}.items():
        (tmp_path / digest[:16] / name).mkdir(parents=True)
        (tmp_path / digest[:16] / name / plans.CARD).write_text(plans.card_json(replace(card, **changes)), "utf-8")
        (tmp_path / digest[:16] / name / plans.PLAN).write_bytes(b"abc")
    monkeypatch.setattr("stepforge.runtime.cli.info.here", lambda: {"tensorrt-rtx": machine})
    found = plan_lines(bundle)
    assert len(found) == 3
    assert [line for line in found if "STALE" not in line] == [
        "denoiser/unet: tensorrt-rtx 1.7.1.116 bf16 for sm_86, sm_89, up to [2, 4, 16, 16], 0.0 MB"
    ]
    assert sum("STALE: built by tensorrt-rtx 1.6.0, and 1.7.1.116 is installed" in line for line in found) == 1
    assert sum("STALE: built for sm_120, and this is sm_89" in line for line in found) == 1
    chosen = plans.usable(bundle, UNET, machine, "bf16")
    assert [plan.folder.name for plan in chosen] == ["good"]
    with pytest.raises(BackendError, match="good computes in bf16"):
        plans.usable(bundle, UNET, machine, "fp16")
