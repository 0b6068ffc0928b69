"""What a program makes of its prompts alone, as a program of its own: it runs when the batch changes, not in every step."""

from __future__ import annotations

from stepforge.runtime.backends.torch.program import Program

PROMPTS = ("encoder_hidden_states",)
MARK = "once "  # names of what crosses over


def split_once(program: Program, names: tuple[str, ...] = PROMPTS) -> Program | None:
    """Take the nodes that depend on constants and the inputs `names` alone out of a program; None if there are none.

    What they hand on are outputs of the program that is returned and inputs of the other. Only products are worth it.
    """
    given = {name for name in names if name in program.inputs}
    early = set(given)
    chosen: list[int] = []
    for index, node in enumerate(program.nodes):
        operands = [name for name in node.inputs if name and name not in program.constants]
        if operands and all(name in early for name in operands) and not set(node.outputs) & set(program.outputs):
            early.update(node.outputs)
            chosen.append(index)
    products = [program.nodes[index] for index in chosen if program.nodes[index].op == "Linear"]
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
        before, tuple(name for name in program.inputs if name in given), crossing,
        {name: value for name, value in program.constants.items() if name in needed}, program.floats, program.shapes,
    )  # fmt: skip
    program.nodes = [node for node in program.nodes if node not in products]
    program.inputs = (*program.inputs, *crossing)
    program.sweep()
    return once
