"""Many requests at once, each image saved when it is ready: `python examples/batch.py [BUNDLE]`.

Requests of one batch may differ in everything; a failure costs no other image.
"""

import sys

import stepforge

bundle = sys.argv[1] if len(sys.argv) > 1 else "fake"
requests = [
    stepforge.Request(prompt="cat face on a blue background", steps=20, seed=1),
    stepforge.Request(prompt="red apple on a white background", steps=8, sampler="dpmpp_2m", schedule="karras", seed=2),
    stepforge.Request(prompt="sun", steps=4, sampler="euler_a", guidance="interval(5, steps=0..0.5)", seed=3),
]
with stepforge.load(bundle) as engine:
    for outcome in engine.stream(requests):
        if outcome.error is not None:
            print(f"{outcome.request.prompt}: {outcome.error}", file=sys.stderr)
        else:
            print(*outcome.result.save(f"out/batch/{outcome.index}-{{seed}}.png", overwrite=True))
