"""The layers that adapters touch and the norms, at two rows (guidance): SD1.5 at 512x512, SDXL at 1024x1024."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Layer:
    """y [m, n] = x [m, k] Wᵀ. slices: layers of equal width stacked into one. taps 9: a 3x3 convolution, k = 9·C.
    gated: GEGLU follows, which halves the columns."""

    name: str
    m: int
    k: int
    n: int
    slices: int = 1
    taps: int = 1
    gated: bool = False


def attention_layers(name: str, m: int, c: int, text: int, context: int) -> list[Layer]:
    """One transformer block on m tokens of c channels, with `text` rows of prompt of width `context`."""
    return [
        Layer(f"{name} attn", m, c, c),
        Layer(f"{name} qkv packed", m, c, 3 * c, slices=3),
        Layer(f"{name} cross k/v", text, context, c),
        Layer(f"{name} GEGLU-up", m, c, 8 * c),
        Layer(f"{name} ff-down", m, 4 * c, c),
    ]


SD15 = (
    *attention_layers("SD1.5 L0", 8192, 320, 154, 768),
    *attention_layers("SD1.5 L1", 2048, 640, 154, 768),
    *attention_layers("SD1.5 L2", 512, 1280, 154, 768),
    *attention_layers("SD1.5 mid", 128, 1280, 154, 768),
    Layer("SD1.5 L0 conv", 8192, 9 * 320, 320, taps=9),
    Layer("SD1.5 L1 conv", 2048, 9 * 640, 640, taps=9),
    Layer("SD1.5 L2 conv", 512, 9 * 1280, 1280, taps=9),
    Layer("SD1.5 time", 2, 1280, 1280),
)
SDXL = (
    *attention_layers("SDXL L1", 8192, 640, 154, 2048),
    *attention_layers("SDXL L2", 2048, 1280, 154, 2048),
    Layer("SDXL L0 conv", 32768, 9 * 320, 320, taps=9),
    Layer("SDXL L1 conv", 8192, 9 * 640, 640, taps=9),
    Layer("SDXL L2 conv", 2048, 9 * 1280, 1280, taps=9),
    Layer("SDXL time", 2, 1280, 1280),
)
GATED = tuple(
    replace(layer, name=layer.name.removesuffix("-up"), gated=True)
    for layer in (*SD15, *SDXL)
    if layer.name.endswith("GEGLU-up")
)


@dataclass(frozen=True, slots=True)
class Norm:
    """Group normalisation of 32 groups with SiLU, on [rows, channels, side, side]."""

    name: str
    rows: int
    channels: int
    side: int


NORMS = (
    Norm("SD1.5 L0", 2, 320, 64),
    Norm("SD1.5 L1", 2, 640, 32),
    Norm("SD1.5 L2", 2, 1280, 16),
    Norm("SD1.5 mid", 2, 1280, 8),
    Norm("SD1.5 L0 up", 2, 960, 64),  # on a skip connection and what comes from below
    Norm("SDXL L0", 2, 320, 128),
    Norm("SDXL L1", 2, 640, 64),
    Norm("SDXL L2", 2, 1280, 32),
    Norm("SDXL L0 up", 2, 960, 128),
    Norm("VAE decoder", 1, 128, 512),
)
