"""What a program makes of its prompts and adapters alone, as a program of its own, which runs when they change."""

from __future__ import annotations

from collections.abc import Iterable

from stepforge.runtime.backends.torch.program import Program

PRODUCTS = ("Linear", "Shift")
STEADY = ("encoder_hidden_states", "adapter_columns", "adapter_strength")  # inputs that change with the batch


def split_once(program: Program, buffers: Iterable[str] = ()) -> Program | None:
    """Take the products that depend on constants, the inputs `STEADY` and `buffers` alone out of a program; None if there are
    none.

    buffers: inputs whose memory changes only where `adapter_columns` does: the operands of wide layers. What the products
    hand on are outputs of the program that is returned and inputs of the other. Only products are worth it: the A of all
    layers with the strengths of all rows in them, which depend on as little, would be hundreds of megabytes.
    """
    given = {name for name in (*STEADY, *buffers) if name in program.inputs}
    early = set(given)
    chosen: list[int] = []
    for index, node in enumerate(program.nodes):
        operands = [name for name in node.inputs if name and name not in program.constants]
        if operands and all(name in early for name in operands) and not set(node.outputs) & set(program.outputs):
            early.update(node.outputs)
            chosen.append(index)
    products = [program.nodes[index] for index in chosen if program.nodes[index].op in PRODUCTS]
    if not products:
        return None
    crossing = tuple(node.outputs[0] for node in products)
    needed = set(crossing)
    before = []
    for index in reversed(chosen):
        if needed.intersection(program.nodes[index].outputs):
            before.append(program.nodes[index])
            needed.update(program.nodes[index].inputs)
    before.reverse()
    once = Program(
        before, tuple(name for name in program.inputs if name in given & needed), crossing,
        {name: value for name, value in program.constants.items() if name in needed}, program.floats, program.shapes,
    )  # fmt: skip
    program.nodes = [node for node in program.nodes if node not in products]
    program.inputs = (*program.inputs, *crossing)
    program.sweep()
    return once
