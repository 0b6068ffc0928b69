"""Exported graphs compute what diffusers computes, on every engine, at any size, from one copy of the weights."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from stepforge.export.build import release
from stepforge.export.graph import modules, trace
from stepforge.export.models.load import load
from stepforge.export.parity.measures import relative_error
from stepforge.export.parts import text_trace
from stepforge.runtime.backends.openvino import core
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, VAE_DECODER, ComponentId, read

# SD 2 in the long lane: its layers are the others', linear projections SDXL's, one text encoder SD 1's
FAMILIES = ("tiny_sd1", pytest.param("tiny_sd2v", marks=pytest.mark.long), "tiny_sdxl")
# Relative to the largest value of the reference. float32 with another order of summation: 1.5e-6 measured for ONNX
# Runtime, 4e-6 for OpenVINO on a 3-level UNet; a wrong layer, scale or axis is above 1e-2.
FP32 = 2e-5
# fp16 has 11 bits, 4.9e-4; errors of some tens of layers add up like noise. 2e-3 measured.
FP16 = 1e-2


@cache
def onnxruntime_session(graph: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


@cache
def openvino_compiled(graph: Path) -> Any:
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return core().compile_model(graph, "CPU", config)


def openvino_request(graph: Path, outputs: list[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    compiled = openvino_compiled(graph)

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        results = compiled(inputs)
        return {name: np.array(results[name]) for name in outputs}

    return run


def runners(folder: Path, component: ComponentId) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    entry = read(folder, check=False).components[component]
    graphs = {"onnxruntime": entry.graph, **{f"{k} derived": graph for k, graph in entry.derived.items()}}
    return {
        **{name: onnxruntime_session(folder / graph) for name, graph in graphs.items()},
        "openvino": openvino_request(folder / entry.graph, [tensor.name for tensor in entry.outputs]),
    }


def check(
    folder: Path, component: ComponentId, inputs: dict[str, Any], expected: dict[str, Any], limit: float = FP32
) -> None:
    for name, run in runners(folder, component).items():
        found = run(inputs)
        for output, value in expected.items():
            reference = value.detach().float().numpy()
            assert found[output].shape == reference.shape, (name, output)
            error = np.abs(found[output] - reference).max() / np.abs(reference).max()
            assert error <= limit, f"{component} {output} on {name}: error {error:.1e}"


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def unet_inputs(unet: Any, rows: int, height: int, width: int, tokens: int) -> dict[str, np.ndarray]:
    inputs = {
        "sample": noise(rows, 4, height, width),
        "timestep": np.array([999.0, 0.0, 433.25], np.float32)[:rows],
        "encoder_hidden_states": noise(rows, tokens, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["text_embeds"] = noise(rows, 40)
        inputs["time_ids"] = np.array([[64, 48, 0, 0, 1024, 768]] * rows, np.float32)
    return inputs


def unet_reference(unet: Any, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    with torch.no_grad():
        return {"prediction": unet(**given, added_cond_kwargs=added or None).sample}


@pytest.mark.parametrize("family", FAMILIES)
def test_denoiser(family: str, request: pytest.FixtureRequest) -> None:
    from diffusers import UNet2DConditionModel

    folder = request.getfixturevalue(f"{family}_bundle")
    unet = UNet2DConditionModel.from_pretrained(request.getfixturevalue(family) / "unet").eval()
    # 9, 15 and 5 are no multiples of 2: diffusers upsamples to the sizes of the skip connections
    for rows, height, width, tokens in ((1, 32, 32, 77), (2, 6, 10, 77), (3, 15, 6, 154), (1, 9, 5, 77)):
        inputs = unet_inputs(unet, rows, height, width, tokens)
        check(folder, UNET, inputs, unet_reference(unet, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders(family: str, request: pytest.FixtureRequest) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder, model = request.getfixturevalue(f"{family}_bundle"), request.getfixturevalue(family)
    for rows in (1, 2, 3):
        ids = np.random.default_rng(rows).integers(0, 500, (rows, 77))
        ids[:, 20 + rows :] = 518  # the end token, then padding with it
        tokens = torch.from_numpy(ids)
        with torch.no_grad():
            first = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
            if family != "tiny_sdxl":
                check(folder, TEXT_ENCODERS[0], {"input_ids": ids}, {"hidden_states": first(tokens).last_hidden_state})
                continue
            hidden = first(tokens, output_hidden_states=True).hidden_states[-2]
            check(folder, TEXT_ENCODERS[0], {"input_ids": ids}, {"hidden_states": hidden})
            second = CLIPTextModelWithProjection.from_pretrained(model / "text_encoder_2").eval()
            output = second(tokens, output_hidden_states=True)
            expected = {"hidden_states": output.hidden_states[-2], "pooled": output.text_embeds}
            check(folder, TEXT_ENCODERS[1], {"input_ids": ids}, expected)


def test_a_text_encoder_that_names_its_end_token(tmp_path: Path) -> None:
    """Configs of SDXL's second encoder say 2, which stands for the highest id, or the token itself: then pads may follow it."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from stepforge.runtime.backends.torch.program import read as read_program
    from stepforge.runtime.backends.torch.run import Runner

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=520, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=1,
        projection_dim=40, bos_token_id=518, eos_token_id=517, pad_token_id=519,
    )  # fmt: skip
    network = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    graph = tmp_path / trace.save(modules.text_encoder(network, 77, penultimate=True), tmp_path).graph
    ids = np.random.default_rng(0).integers(0, 500, (3, 77))
    for row in range(3):
        ids[row, 10 + row], ids[row, 11 + row :] = 517, 519
    expected = network(torch.from_numpy(ids)).text_embeds.numpy()
    ours = Runner(read_program(graph))({"input_ids": torch.from_numpy(ids)})["pooled"].numpy()
    for found in (ours, onnxruntime_session(graph)({"input_ids": ids})["pooled"]):
        assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_vae_decoder(family: str, request: pytest.FixtureRequest) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(request.getfixturevalue(family) / "vae").eval()
    for rows, height, width in ((1, 32, 32), (2, 5, 9), (3, 16, 7)):
        latents = noise(rows, 4, height, width)
        with torch.no_grad():
            pixels = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
        check(request.getfixturevalue(f"{family}_bundle"), VAE_DECODER, {"latents": latents}, {"pixels": pixels})


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_fused(family: str, request: pytest.FixtureRequest) -> None:
    """No engine is left with the scores of an attention in memory."""
    folder = request.getfixturevalue(f"{family}_bundle")
    entry = read(folder, check=False).components[UNET]
    attentions = Counter(node.op_type for node in ir.load(folder / entry.graph).graph)["Softmax"]
    assert attentions > 0
    derived = Counter(node.op_type for node in ir.load(folder / entry.derived["onnxruntime"]).graph)
    assert derived["MultiHeadAttention"] == attentions
    assert derived["Softmax"] == 0
    operators = openvino_compiled(folder / entry.graph).get_runtime_model().get_ops()
    layers = Counter(operator.get_rt_info()["layerType"].astype(str) for operator in operators)
    # the processor plug-in compiles an attention into one "Subgraph", or keeps one ScaledDotProductAttention
    assert layers["Softmax"] == layers["MatMul"] == 0
    assert layers["Subgraph"] + layers["ScaledDotProductAttention"] >= attentions


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_on_disk_once(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{family}_bundle")
    source = load(request.getfixturevalue(family))
    vae = source.vae(torch.float32)
    parameters = {
        UNET: size(source.unet(torch.float32)),
        VAE_DECODER: size(vae.decoder) + size(vae.post_quant_conv),
    }
    if family != "tiny_sdxl":  # SDXL does not use the last layer of its first text encoder
        parameters[TEXT_ENCODERS[0]] = size(source.text_encoders[0](torch.float32))
    for component, expected in parameters.items():
        for graph in (folder / component.folder).glob("*.onnx"):
            tensors = [value.const_value for value in ir.load(graph).graph.initializers.values()]
            held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
            inline = [t.nbytes for t in tensors if t is not None and not isinstance(t, ir.ExternalTensor)]
            # beside the parameters: norms' scales in another shape, and the text encoder's mask of 77 x 77
            assert held == pytest.approx(expected, rel=0.02, abs=32 * 1024)
            assert max(inline) <= trace.INLINE, f"{graph.name} holds weights of its own"
        assert (folder / component.folder / trace.DATA).stat().st_size <= expected + 32 * 1024


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_files_name_nothing_of_this_machine(family: str, request: pytest.FixtureRequest) -> None:
    folder, model = request.getfixturevalue(f"{family}_bundle"), request.getfixturevalue(family)
    secrets = [str(Path.home()), str(Path(torch.__file__).parent), str(model.parent), ".py", "stack_trace", "/tmp/"]
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".data":
            data = path.read_bytes()
            assert [secret for secret in secrets if secret.encode() in data] == [], path.name


def test_weights_keep_their_names(tiny_sd1_bundle: Path) -> None:
    names = ir.load(tiny_sd1_bundle / "denoiser/unet/model.onnx").graph.initializers
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight" in names
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight" in names


def test_signature(tiny_sdxl_bundle: Path) -> None:
    bundle = read(tiny_sdxl_bundle)
    for name, component in bundle.components.items():
        session = onnxruntime.InferenceSession(bundle.file(component.graph), providers=["CPUExecutionProvider"])
        for tensors, found in ((component.inputs, session.get_inputs()), (component.outputs, session.get_outputs())):
            assert [tensor.name for tensor in tensors] == [value.name for value in found], name
            assert [list(tensor.shape) for tensor in tensors] == [value.shape for value in found], name
            kinds = {"float32": "tensor(float)", "int64": "tensor(int64)"}
            assert [kinds[tensor.dtype] for tensor in tensors] == [value.type for value in found], name


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_traces")
def test_export_is_deterministic(tiny_sd1: Path, tiny_sd1_bundle: Path, tmp_path: Path) -> None:
    text = load(tiny_sd1).text_encoders[0](torch.float32)
    trace.save(modules.text_encoder(text, 77, penultimate=False), tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (tiny_sd1_bundle / "text_encoder" / file.name).read_bytes(), file.name


def test_reading_a_bundle_needs_no_torch(tiny_sd1_bundle: Path) -> None:
    code = "import sys; from stepforge.runtime.bundle import read; read(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code, str(tiny_sd1_bundle)], check=True)


@pytest.mark.slow
def test_fp16(tiny_sd1: Path, tiny_sd1_bundle: Path, tiny_fp16: Callable[[str], Path]) -> None:
    """Half the bytes, float32 at the border, and the error of half precision."""
    from diffusers import UNet2DConditionModel

    bundle = read(tiny_fp16("sd1"))
    for component in (UNET, TEXT_ENCODERS[0], VAE_DECODER):
        data = f"{component.folder}/{trace.DATA}"
        assert bundle.files[data][0] <= 0.51 * (tiny_sd1_bundle / data).stat().st_size
    unet = UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet").eval()
    inputs = unet_inputs(unet, 2, 6, 10, 77)
    check(bundle.path, UNET, inputs, unet_reference(unet, inputs), FP16)


def test_no_weights_stay_behind(tiny_sd1: Path, tmp_path: Path, fresh_traces: None) -> None:
    """A network's file is no longer mapped when its export has ended: what is left adds to the peak of the next one's."""
    weights = str(tiny_sd1 / "text_encoder" / "model.safetensors")
    network = load(tiny_sd1).text_encoders[0](torch.float32)
    assert weights in Path("/proc/self/maps").read_text()
    trace.save(text_trace("sd1", 77)(network), tmp_path)
    del network
    release()
    assert weights not in Path("/proc/self/maps").read_text()
