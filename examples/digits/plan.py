"""Writes plan.json: what each of the 6 layers does at each of the 50 steps. Needs nothing but Python.

A hand-made plan, simple enough to read; README.md says what it costs in quality.
"""

import json
import pathlib

LAYERS, STEPS = 6, 50


def actions(step):
    # The first steps decide what is drawn: nothing is saved there.
    if step < 4:
        return ["full"] * LAYERS
    # Every sixth step is computed and its residuals are kept. Between two of them every layer
    # alternates between the window with that residual and the output of the step before.
    phase = (step - 4) % 6
    row = ["full" if phase == 0 else ("ast" if (phase + layer) % 2 else "wa-rs") for layer in range(LAYERS)]
    # The class matters little to attention while the image is mostly noise, much later on (measured).
    if step < 12:
        row = [{"full": "asc", "wa-rs": "wa-rs+asc", "ast": "ast"}[action] for action in row]
    return row


def main():
    plan = {
        "format": "ditfastattn-plan",
        "version": 1,
        "name": "digits",
        "window": 0.125,
        "cfg": "cond-first",
        # DPM-Solver++ with diffusers' default spacing: round(linspace(0, 999, 51)) from the end, without the 0
        "timesteps": [round(i * 999 / STEPS) for i in range(STEPS, 0, -1)],
        "model": {"layers": LAYERS, "heads": 4, "head_dim": 32},
    }
    head = "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in plan.items())
    rows = ",\n".join("    " + json.dumps(actions(step)) for step in range(STEPS))
    pathlib.Path(__file__).with_name("plan.json").write_text(f'{head},\n  "steps": [\n{rows}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
