"""The trained model's plans: what `examples/digits/evidence.py` found is what the command line says of it."""

import pytest
from conftest import ROOT, inspect, tool

DIGITS = ROOT / "examples" / "digits"
PLANS = [DIGITS / "plans" / f"d{k}.json" for k in range(1, 7)]


def saved(plan):
    return inspect(DIGITS / "digits-dit.onnx", "--plan", plan)["plan"]["saved"]


def test_a_larger_threshold_saves_more():
    for count in ("attention_flops", "module_flops"):
        shares = [saved(plan)[count] for plan in PLANS]
        assert all(a < b for a, b in zip(shares, shares[1:])), shares


def test_the_table_says_what_the_plans_save():
    lines = (DIGITS / "evidence.md").read_text().split("## 20 steps")[0].splitlines()
    for k, plan in enumerate(PLANS, 1):
        (row,) = [line for line in lines if line.startswith(f"| D{k} | ") and "dB" in line]
        shares = [float(cell.rstrip("% ")) for cell in row.split("|")[2:4]]
        assert shares == pytest.approx([100 * (1 - saved(plan)[c]) for c in ("attention_flops", "module_flops")], abs=0.05)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.stem)
def test_the_plans_fit_the_model(plan, tmp_path):
    tool(DIGITS / "digits-dit.onnx", "--plan", plan, "-o", tmp_path / "digits.onnx")
