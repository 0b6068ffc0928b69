"""Rewrites of a denoiser's finished graphs at its probes (`modules.Denoiser`): ControlNets, and variants that reuse.

    residual_i  inputs, [rows, C, h, w] or [1, C, 1, 1], that are added to the skip connections and, the last one, to what the
                middle block makes, as diffusers adds a ControlNet's. A row without a ControlNet brings zeros.
    deepcache   the value that enters the last `branch + 1` layers of the up path is an output `deep` of the whole network,
                and an input of the variant, which therefore runs those layers and what their skip connections need only.
                Ma et al., arXiv:2312.00858, section 3.3; `branch` is its cache_branch_id.
    tgate       the outputs of all cross-attentions, `text_i`, are outputs of the whole network and inputs of the variant,
                which does not read the prompt. Zhang et al., arXiv:2404.02747, section 4.

A variant is the network with an inner value turned into an input, less what nobody reads any more: it has the same weights
file, residual inputs and LoRA banks. So it must be cut after all other rewrites.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from stepforge.export.graph.passes import forget_shapes
from stepforge.runtime.bundle import Component, Tensor
from stepforge.runtime.errors import CheckpointError

DEEP = "deep"
RESIDUAL = "residual_"
UP_LAYER = re.compile(r"up_blocks\.\d+\.resnets\.\d+\.conv1")
REUSE = re.compile(r"tgate|deepcache(?:\((\d{1,2})\))?")


@dataclass(frozen=True, slots=True)
class Variants:
    """The reuse variants to export."""

    deepcache: int | None = None  # branch: layers of the up path that a skipping step runs, less one
    tgate: bool = False

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Variants:
        """From "tgate", "deepcache" and "deepcache(BRANCH)". Raises CheckpointError."""
        found = cls()
        for text in texts:
            match = REUSE.fullmatch(text.strip())
            if match is None:
                raise CheckpointError(f"reuse {text!r:.80} is unknown; choose tgate, deepcache or deepcache(BRANCH)")
            change: dict[str, Any] = {"tgate": True} if match[0] == "tgate" else {"deepcache": int(match[1] or 0)}
            found = replace(found, **change)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return ("deepcache",) * (self.deepcache is not None) + ("tgate",) * self.tgate


def check_branch(reuse: Variants, unet: Any) -> None:
    """Raises CheckpointError for a branch that the up path of a UNet does not have: each of its layers takes a skip in."""
    _check_branch(reuse, sum(len(block.resnets) for block in unet.up_blocks))


def _check_branch(reuse: Variants, skips: int) -> None:
    if reuse.deepcache is not None and reuse.deepcache >= skips - 1:
        raise CheckpointError(f"deepcache's branch is {reuse.deepcache}; this network has 0 to {skips - 2}")


def resolve_probes(graphs: Sequence[Path], component: Component, *, control: bool, reuse: Variants) -> Component:
    """Rewrite the graph files of a traced denoiser in place: probes become what `control` and `reuse` ask, or go."""
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    for path in graphs:
        model = ir.load(path)
        skips = _named(model, "skip_")
        joints = [_joint(skip) for skip in skips]
        _check_branch(reuse, len(skips))
        inputs = _add_residuals(model, skips, joints) if control else ()
        kept = _named(model, "text_") if reuse.tgate else []
        if reuse.deepcache is not None:
            kept.append(_deep(skips[reuse.deepcache], joints[reuse.deepcache], component, reuse.deepcache))
        kept = [_as_float32(model, value) for value in kept]
        outputs = tuple(Tensor(value.name or "", "float32", _axes(value)) for value in kept)
        model.graph.outputs[1:] = kept
        forget_shapes(model)
        ir.save(model, path)
    return replace(component, inputs=(*component.inputs, *inputs), outputs=(*component.outputs, *outputs))


def _named(model: ir.Model, prefix: str) -> list[ir.Value]:
    return [value for value in model.graph.outputs if (value.name or "").startswith(prefix)]


def _joint(skip: ir.Value) -> ir.Node:
    """Concatenation that takes a skip connection into the up path."""
    found = [use.node for use in skip.uses() if use.node.op_type == "Concat" and use.idx == 1]
    if len(found) != 1:
        raise CheckpointError(f"the network's {skip.name} has {len(found)} uses in the up path; 1 is expected")
    return found[0]


def _deep(skip: ir.Value, joint: ir.Node, component: Component, branch: int) -> ir.Value:
    """Value that enters a layer of the up path beside the skip connection; layers are counted from the end."""
    deep = joint.inputs[0]
    assert deep is not None
    entering = [module.shape[1] for module in component.modules if UP_LAYER.fullmatch(module.path)]
    channels = entering[-1 - branch] - int(_axes(skip)[1])
    deep.name, deep.type = DEEP, skip.type
    deep.shape = ir.Shape(["rows", channels, f"{DEEP}_2", f"{DEEP}_3"])
    return deep


def _as_float32(model: ir.Model, value: ir.Value) -> ir.Value:
    if value.dtype == ir.DataType.FLOAT:
        return value
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
    producer = value.producer()
    assert producer is not None
    model.graph.insert_after(producer, node)
    result = node.outputs[0]
    result.name, value.name = value.name, f"{value.name}_{value.dtype}"
    result.shape, result.type = value.shape, ir.TensorType(ir.DataType.FLOAT)
    return result


def _axes(value: ir.Value) -> tuple[int | str, ...]:
    assert value.shape is not None
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def _add_residuals(model: ir.Model, skips: Sequence[ir.Value], joints: Sequence[ir.Node]) -> tuple[Tensor, ...]:
    tensors = []
    (mid,) = _named(model, "mid")
    for index, (skip, joint) in enumerate(zip(skips, joints, strict=True)):
        total, tensor = _plus_input(model, skip, f"{RESIDUAL}{index}", joint)
        joint.replace_input_with(1, total)
        tensors.append(tensor)
    readers = list(mid.uses())
    total, tensor = _plus_input(model, mid, f"{RESIDUAL}{len(skips)}", None)
    for use in readers:
        use.node.replace_input_with(use.idx, total)
    return (*tensors, tensor)


def _plus_input(model: ir.Model, value: ir.Value, name: str, before: ir.Node | None) -> tuple[ir.Value, Tensor]:
    """value + a new float32 input, added before a node, or right after the value."""
    given = ir.val(name, ir.DataType.FLOAT, [f"{name}_rows", _axes(value)[1], f"{name}_height", f"{name}_width"])
    model.graph.inputs.append(given)
    nodes, term = [], given
    if value.dtype != ir.DataType.FLOAT:
        assert value.dtype is not None
        nodes.append(ir.node("Cast", [given], {"to": value.dtype.value}))
        term = nodes[0].outputs[0]
        term.name = f"{name}_cast"
    nodes.append(ir.node("Add", [value, term]))
    total = nodes[-1].outputs[0]
    total.name = f"{name}_added"
    if before is not None:
        model.graph.insert_before(before, nodes)
    else:
        producer = value.producer()
        assert producer is not None
        model.graph.insert_after(producer, nodes)
    return total, Tensor(name, "float32", _axes(given))


def cut_variants(folder: Path, component: Component, names: Iterable[str]) -> dict[str, Component]:
    """Write variants beside the graphs of a finished denoiser in a bundle's folder; name of the variant -> component."""
    texts = tuple(tensor.name for tensor in component.outputs if tensor.name.startswith("text_"))
    cuts = {"deepcache": ((DEEP,), (DEEP, *texts)), "tgate": (texts, texts)}
    return {name: variant(folder, component, name, *cuts[name]) for name in names}


def variant(folder: Path, component: Component, name: str, given: Sequence[str], drop: Sequence[str]) -> Component:
    """A component whose outputs in `given` are inputs, and those in `drop` are gone, with all that only they need.

    Its graph files are written beside the component's own, and read the same weights file.
    """
    graphs: dict[str, str] = {}
    present: set[str] = set()
    for backend, graph in {"": component.graph, **component.derived}.items():
        path = Path(graph)
        model = ir.load(folder / path)
        _cut(model, given, drop)
        graphs[backend] = path.with_name(path.name.replace("model", name, 1)).as_posix()
        ir.save(model, folder / graphs[backend])
        present = {value.name or "" for value in model.graph.inputs}
    outputs = {tensor.name: tensor for tensor in component.outputs}
    inputs = (*component.inputs, *(outputs[name] for name in given))
    return Component(
        graph=graphs.pop(""),
        derived=graphs,
        inputs=tuple(tensor for tensor in inputs if tensor.name in present),
        outputs=tuple(tensor for tensor in component.outputs if tensor.name not in drop),
    )


def _cut(model: ir.Model, given: Sequence[str], drop: Sequence[str]) -> None:
    values: Mapping[str, ir.Value] = {value.name or "": value for value in model.graph.outputs}
    kept = [value for name, value in values.items() if name not in drop]
    model.graph.outputs.clear()  # not `del`: it would leave the values marked as outputs
    model.graph.outputs.extend(kept)
    for name in given:
        old, cast = values[name], values[name].producer()
        new = ir.val(name, ir.DataType.FLOAT, old.shape)
        old.name = f"{name}_computed"
        model.graph.inputs.append(new)
        if cast is not None and cast.op_type == "Cast":  # fp16 network
            old = cast.inputs[0]
            assert old is not None
            back = ir.node("Cast", [new], {"to": ir.DataType.FLOAT16.value})
            back.outputs[0].name = f"{name}_given"
            model.graph.insert_before(model.graph[0], back)
            new = back.outputs[0]
        ir.convenience.replace_all_uses_with(old, new)
    RemoveUnusedNodesPass()(model)
    unused = [value for value in model.graph.inputs if not value.uses()]
    for value in unused:
        model.graph.inputs.remove(value)
