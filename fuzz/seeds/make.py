"""Makes seeds/model anew: small random models, one for each spelling of attention, scale, mask, norm and projection that the generator has.

    python fuzz/seeds/make.py

Of 2 to 8 KB each, a tenth of the fixtures: the fuzzer executes ten times as many, and more of its mutations hit the graph rather than
weights. Needs numpy and the onnx package.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "python"))
import random_dit  # noqa: E402

LARGEST = 9000


def choices(spec):
    """What a seed adds: each choice, and each beside its layout."""
    found = {name: spec[name] for name in spec if name not in ("seed", "steps", "tokens", "heads", "head_dim", "batch", "window", "factor")}
    found |= {"kv_heads": spec["kv_heads"] != spec["heads"], "text": spec["text"] > 0}
    pairs = {(name, str(value)) for name, value in found.items()}
    return pairs, {(*pair, spec["layout"]) for pair in pairs}


def main():
    models = []
    for seed in range(600):
        spec = random_dit.draw(seed)
        models.append((random_dit.Model(spec).graph().SerializeToString(), seed, spec))
    for stale in (HERE / "model").glob("random-*.onnx"):
        stale.unlink()
    alone, beside = set(), set()
    for model, seed, spec in sorted(models, key=lambda m: (len(m[0]), m[1])):
        single, double = choices(spec)
        if len(model) < LARGEST and (single - alone or len(double - beside) >= 6):
            alone |= single
            beside |= double
            (HERE / "model" / f"random-{seed}.onnx").write_bytes(model)


if __name__ == "__main__":
    main()
