"""The demo's last contact sheet: `python examples/emoji/stages_sheet.py out/emoji.bundle --out out/stages.png`.

Requests of stages.jsonl: text to image, an adapter's subject, img2img and inpainting, each without and with super-resolution,
the subject with its fine-tuned network too.
Each cell says what its picture cost alone: rows of each network, seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stepforge import Request, load
from stepforge.runtime.imaging.png import save_png
from stepforge.runtime.imaging.sheet import Sheet

HERE = Path(__file__).resolve().parent
DRAW = {"guidance": 3.0, "sampler": "dpmpp_2m", "steps": 10}  # settings of `make demo`'s other sheets
CELL = 256
HIDDEN = ("text_encoder", "vae_encoder", "vae_decoder")  # rows that every picture has


def read_requests(file: Path) -> list[Request]:
    """One request a line; pictures are looked for beside the file."""
    requests = []
    for line in file.read_text().splitlines():
        values = json.loads(line)
        if "init" in values:
            for key in {"image", "mask"} & set(values["init"]):
                values["init"][key] = file.parent / values["init"][key]
        requests.append(Request.of({**DRAW, **values}))
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=Path, default=HERE / "stages.jsonl")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out/stages.png"))
    args = parser.parse_args()
    requests = read_requests(args.requests)
    with load(args.bundle) as engine:
        if any("subject" in request.adapters for request in requests):
            engine.adapters.load("subject", HERE / "adapters" / "subject.safetensors")
        results = [engine.generate(request) for request in requests]  # one at a time: the seconds are its own
    labels = []
    for request, result in zip(requests, results, strict=True):
        rows = " + ".join(
            f"{count} {name.removesuffix('/unet')}" for name, count in result.stats.rows.items() if name not in HIDDEN
        )
        way = "" if request.init is None else "img2img, " if request.init.mask is None else "inpainting, "
        subject = request.prompt.split(" on a ")[0]
        labels.append(f"{way}{subject}: {rows} rows, {result.stats.seconds['total']:.1f} s")
    sheet = Sheet(len(results), (CELL, CELL), columns=args.columns, labels=labels)
    for index, result in enumerate(results):
        image = result.images[0]
        sheet.place(index, image.resize((CELL, CELL), 0))  # nearest: what is seen is what was drawn
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_png(sheet.picture, args.out, None, overwrite=True)
    print(args.out)


if __name__ == "__main__":
    main()
