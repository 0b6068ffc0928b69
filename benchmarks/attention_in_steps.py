"""How much each step depends on the text: `python benchmarks/attention_in_steps.py MODEL|BUNDLE --plot FILE.png`.

    switch     the prompt is A's up to step k and B's from there on. Distance (runtime/tune/'s) of the picture to those of A
               and of B alone, k = 0..n, and, with --recognise on the demo model, the share taken for either emoji
    guidance   |cond − uncond| / |uncond| and the cosine of cond and uncond, which adaptive guidance looks at
    mass       where cross-attention looks, conditional rows, mean over layers, heads and pixels: the start token, the prompt's
               words, the end token with the padding after it. Needs the model in torch: a MODEL, or --model beside a BUNDLE
    seconds    of a step of one image, by kind

All steps are those of A's trajectory under the full plan. A MODEL is exported to a temporary bundle first.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine
from PIL import Image

from stepforge import Request, load, open_bundle
from stepforge.runtime.backends import open_backend
from stepforge.runtime.bundle import MANIFEST, UNET, VAE_DECODER
from stepforge.runtime.engine.adapters import Adapters
from stepforge.runtime.engine.conditions.text import Condition, Conditioner
from stepforge.runtime.engine.denoise import Denoisers
from stepforge.runtime.engine.starts import from_noise
from stepforge.runtime.engine.state import Job, Leg
from stepforge.runtime.engine.trajectory import Batch, Trajectory
from stepforge.runtime.imaging.png import to_pil, to_uint8
from stepforge.runtime.plan.compile import compile_plan
from stepforge.runtime.plan.guiders import alignment
from stepforge.runtime.tune.distance import distance

ROOT = Path(__file__).resolve().parents[1]
ROWS = 8  # in one network call
KINDS = {"guided": "", "guided, deepcache": "deepcache(5)", "guided, tgate": "tgate(0.2)", "unguided": ""}
TOKENS = ("start", "words", "end and padding")


class Tables:
    """Runs the tables of several images on a bundle's networks, step by step, open to changes in between."""

    def __init__(self, path: Path, precision: str, threads: int | None) -> None:
        self.bundle = open_bundle(path)
        backend = open_backend("auto", self.bundle, precision=precision, threads=threads)
        adapters = Adapters(self.bundle, backend)
        self.backend = f"{backend.name} {backend.precision}"
        self.conditioner = Conditioner(self.bundle, backend, adapters)
        self._denoisers = Denoisers(self.bundle, backend, adapters)
        self._decoder = backend.open(VAE_DECODER)

    def start(self, request: Request) -> Trajectory:
        """The first image of a request, before its first step."""
        plan = compile_plan(request, self.bundle.scheduler)
        leg = Leg(plan, self.bundle.card.size(request.width, request.height))
        leg.cond, leg.uncond = self.conditioner(request.prompt, request.negative, request.prompt_syntax)
        start = from_noise(leg, self.bundle.card.latent_shape(leg.size), request.seed)
        return Trajectory(Job(request, [leg], None), 0, leg, start)

    def step(self, images: Sequence[Trajectory]) -> list[tuple[np.ndarray, np.ndarray]]:
        """One step of every image, all guided; the conditional and unconditional prediction of each."""
        found = []
        for first in range(0, len(images), ROWS // 2):
            chunk = images[first : first + ROWS // 2]
            predictions = self._denoisers(Batch.of(chunk)).reshape(len(chunk), 2, -1)
            for image, (cond, uncond) in zip(chunk, predictions, strict=True):
                image.leg.guider(image.guide, image.step, image.weight, image.x, cond, uncond, image.p)
                image.advance()
                found.append((cond.copy(), uncond.copy()))
        return found

    def picture(self, image: Trajectory) -> Image.Image:
        return to_pil(to_uint8(self._decoder({"latents": image.x.reshape(1, *image.shape).copy()})["pixels"]))[0]

    def kinds(self, prompt: str) -> np.ndarray:
        """For each token of the prompt's context its index in TOKENS; by the first tokenizer."""
        encoder = self.bundle.card.text_encoders[0]
        kinds = []
        for ids in np.asarray(self.conditioner.tokenize(prompt, "a1111")[0].ids):
            end = int(np.argmax(ids[1:] == encoder.eos_id)) + 1
            kinds += [0, *[1] * (end - 1), *[2] * (len(ids) - end)]
        return np.array(kinds)


def fork(image: Trajectory, condition: Condition | None) -> Trajectory:
    """A copy that goes its own way, with another prompt."""
    twin, leg = copy.copy(image), copy.copy(image.leg)
    leg.cond = condition
    twin.leg, twin.state = leg, image.state.copy()
    twin.begin, twin.guide = copy.deepcopy(image.begin), copy.deepcopy(image.guide)
    return twin


def trace(tables: Tables, asked: Request, other: Request, look: Any) -> dict[str, list[Any]]:
    """One pair of prompts: pictures by the step of the switch, and the measures of each step."""
    a, b = tables.start(asked), tables.start(other)
    steps = len(a.leg.plan.steps)
    switched: list[Trajectory] = []
    found: dict[str, list[Any]] = {"ratio": [], "cosine": [], "mass": []}
    for k in range(steps):
        if k:
            switched.append(fork(a, b.leg.cond))
        if look is not None:
            found["mass"].append(look(a))
        cond, uncond = tables.step([a, b, *switched])[0]
        found["ratio"].append(float(np.linalg.norm(cond - uncond) / np.linalg.norm(uncond)))
        found["cosine"].append(alignment(cond, uncond))
    found["pictures"] = [tables.picture(image) for image in (b, *switched, a)]
    return found


def watcher(tables: Tables, model: Path) -> Any:
    """Cross-attention's mass on each kind of token, for an image's conditional row: the eager model looks at its input."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32, local_files_only=True).eval()
    seen: list[torch.Tensor] = []

    class Record:
        """Plain attention, as diffusers' AttnProcessor computes it for these models, which notes where it looks."""

        def __call__(self, attn: Any, states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
            text = states if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = (
                attn.head_to_batch_dim(layer(x))
                for layer, x in ((attn.to_q, states), (attn.to_k, text), (attn.to_v, text))
            )
            weights = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)
            if encoder_hidden_states is not None:
                seen.append(weights.mean((0, 1)))
            return attn.to_out[0](attn.batch_to_head_dim(weights @ value))

    unet.set_attn_processor(Record())

    def look(image: Trajectory) -> list[float]:
        condition, step, size = image.leg.cond, image.step, image.leg.size
        assert condition is not None
        added = {}
        if condition.pooled is not None:
            times = [[size.height, size.width, 0, 0, size.height, size.width]]
            added = {"text_embeds": torch.tensor(condition.pooled)[None], "time_ids": torch.tensor(times).float()}
        seen.clear()
        x = torch.tensor(image.x.reshape(1, *image.shape) * np.float32(step.scale_in))
        with torch.no_grad():
            unet(x, step.t, torch.tensor(condition.context)[None], added_cond_kwargs=added)
        mass, kinds = torch.stack(seen).mean(0).numpy(), tables.kinds(image.job.request.prompt)
        return [float(mass[kinds == kind].sum()) for kind in range(len(TOKENS))]

    return look


def seconds(path: Path, request: dict[str, Any], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of one step of one image by kind: median, lowest and highest of the runs, which take turns."""
    found: dict[str, list[float]] = {}
    with load(path, precision=args.precision, threads=args.threads) as engine:
        for run in range(args.runs + 1):
            whole = 0.0
            for kind, reuse in KINDS.items():
                variant = reuse.partition("(")[0]
                if variant and variant not in engine.bundle.variants(UNET):
                    continue
                w = 1.0 if kind == "unguided" else args.guidance
                result = engine.generate(Request(**{**request, "steps": 5, "guidance": w}, reuse=reuse))
                reused = sum(bool(step.reuse) for step in result.plan.steps)
                count = len(result.plan.steps)
                spent = result.stats.seconds["denoise"]
                spent = (spent - (count - reused) * whole) / reused if reused else spent / count
                whole = spent if kind == "guided" else whole
                if run:  # the first one warms up
                    found.setdefault(kind, []).append(spent)
    return {kind: [round(f(s), 5) for f in (statistics.median, min, max)] for kind, s in found.items()}


def recognised(pictures: Sequence[Image.Image], asked: str, other: str) -> list[int]:
    """For each demo picture: 1 it is taken for the emoji of `asked`, -1 of `other`, 0 for a third one."""
    from emoji_quality import nearest_emoji
    from emoji_quality import pictures as known

    index = {picture.caption: picture.emoji for picture in known()}
    nearest = nearest_emoji(np.stack([np.asarray(picture) for picture in pictures]), top=1)[:, 0]
    return [1 if found == index[asked] else -1 if found == index[other] else 0 for found in nearest.tolist()]


def measure(path: Path, model: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    tables = Tables(path, args.precision, args.threads)
    look = None if model is None else watcher(tables, model)
    if look is None:
        print("cross-attention mass needs the model in torch: give --model DIR beside a bundle")
    lines = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = lines[:: max(1, len(lines) // args.pairs)][: args.pairs]
    common = {"steps": args.steps, "sampler": args.sampler, "guidance": args.guidance}
    traces, to_a, to_b, taken = [], [], [], []
    for i, prompt in enumerate(lines):
        other = lines[(i + max(1, len(lines) // 2)) % len(lines)]
        for seed in range(args.seeds):
            one = {**common, "seed": seed}
            found = trace(tables, Request(prompt=prompt, **one), Request(prompt=other, **one), look)
            traces.append(found)
            pictures = found["pictures"]
            to_a.append([distance(picture, pictures[-1]) for picture in pictures])
            to_b.append([distance(picture, pictures[0]) for picture in pictures])
            if args.recognise:
                taken.append(recognised(pictures, prompt, other))
        print(f"  {prompt} -> {other}", flush=True)

    def mean(rows: Any) -> list[Any]:
        return np.round(np.mean(rows, axis=0), 4).tolist()

    plan = compile_plan(Request(prompt="", **common), tables.bundle.scheduler)
    shares = np.mean([[(tables.kinds(line) == kind).mean() for kind in range(len(TOKENS))] for line in lines], axis=0)
    report: dict[str, Any] = {
        "bundle": tables.bundle.digest,
        **common,
        "pairs": len(lines),
        "seeds": args.seeds,
        "backend": tables.backend,
        "sigma": [round(step.sigma, 4) for step in plan.steps],
        "switch": {"distance to A": mean(to_a), "distance to B": mean(to_b)},
        "guidance": {"ratio": mean([t["ratio"] for t in traces]), "cosine": mean([t["cosine"] for t in traces])},
    }
    if args.recognise:
        report["switch"] |= {
            "taken for A": mean(np.array(taken) == 1),
            "taken for B": mean(np.array(taken) == -1),
        }
    if look is not None:
        mass = np.mean([t["mass"] for t in traces], axis=0)
        report["mass"] = {name: np.round(mass[:, kind], 4).tolist() for kind, name in enumerate(TOKENS)}
        report["share of the tokens"] = dict(zip(TOKENS, np.round(shares, 4).tolist(), strict=True))
    report["seconds"] = seconds(path, {**common, "prompt": lines[0]}, args)
    return report


def plot(report: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(report["sigma"])
    figure, axes = plt.subplots(1, 2 + ("mass" in report), figsize=(4.2 * (2 + ("mass" in report)), 3.4))
    switch = report["switch"]
    axes[0].plot(range(count + 1), switch["distance to A"], label="distance to A")
    axes[0].plot(range(count + 1), switch["distance to B"], label="distance to B")
    axes[0].set(title="prompt A, from step k on prompt B", xlabel="k", ylabel="distance of the picture")
    axes[0].legend(loc="center left", fontsize=8)
    if "taken for A" in switch:
        share = axes[0].twinx()
        share.plot(range(count + 1), switch["taken for A"], "C0:", label="taken for A")
        share.plot(range(count + 1), switch["taken for B"], "C1:", label="taken for B")
        share.set(ylabel="share of the pictures (dotted)", ylim=(-0.05, 1.05))
    guidance = report["guidance"]
    axes[1].plot(range(count), guidance["ratio"], "C2", label="|cond − uncond| / |uncond|")
    axes[1].plot(range(count), 1 - np.array(guidance["cosine"]), "C3", label="1 − cosine")
    axes[1].set(title="what the text changes in the prediction", xlabel="step", yscale="log")
    axes[1].legend(fontsize=8)
    if "mass" in report:
        axes[2].stackplot(range(count), *report["mass"].values(), labels=list(report["mass"]), alpha=0.8)
        axes[2].set(title="where cross-attention looks", xlabel="step", ylabel="share of the attention", ylim=(0, 1))
        axes[2].legend(fontsize=8, loc="upper right")
    for axis in axes:
        axis.set_xticks(range(0, count + 1, max(1, count // 5)))
        axis.set_xlim(0, count - (axis is not axes[0]))
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="MODEL|BUNDLE")
    parser.add_argument("--model", type=Path, help="the diffusers folder that a BUNDLE was exported from")
    parser.add_argument("--prompts", type=Path, default=ROOT / "examples/emoji/prompts.txt")
    parser.add_argument("--pairs", type=int, default=8, help="prompts of the file that are used")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--recognise", action="store_true", help="the demo model only; needs its font")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of the timing")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--plot", type=Path, help="draw them here as PNG; needs matplotlib")
    args = parser.parse_args()
    if args.guidance in (0.0, 1.0):
        parser.error("--guidance 0 and 1 run one row only; there is nothing to compare")
    with tempfile.TemporaryDirectory() as temporary:
        if (args.source / MANIFEST).exists():
            report = measure(args.source, args.model, args)
        else:
            from stepforge.export.build import export_bundle

            bundle = Path(temporary) / "model"
            export_bundle(args.source, bundle)
            report = measure(bundle, args.source, args)
    report["machine"] = machine() + (f"; {args.threads} used" if args.threads else "")
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
