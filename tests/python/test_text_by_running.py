"""`dfa-rewrite verify` finds text tokens by running the model, so that it also fails where plan and graph are wrong about them."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import HOST, tool

pytest.importorskip("onnx", reason="builds its models with the onnx package")
from graphs import TEXT, TOKENS, C, Graph, denoiser  # noqa: E402
from planned import PLAN, write  # noqa: E402

pytestmark = pytest.mark.skipif(HOST < (1, 24), reason="models are run by the command with the newest hosts only")
RUNTIME = Path(onnxruntime.__file__).parent / "capi"
ALL = TEXT + TOKENS


def verified(folder, model, plan=PLAN, *flags):
    """The exit code, what is told of the text, and what went wrong."""
    path, plan_path = write(folder, model, plan)
    said = tool("verify", path, "--plan", plan_path, "--onnxruntime", RUNTIME, "--threads", 1, "--json", *flags, check=False)
    assert said.stdout, said.stderr
    told = json.loads(said.stdout)
    return said.returncode, told["text"], told["failures"]


def said(tokens, side="start"):
    return PLAN | {"text": {"tokens": tokens, "side": side}}


def joint(side="start", block=lambda g, i, h: g.attend(h)):
    return denoiser(block, text=TEXT, side=side)[1]


@pytest.mark.parametrize("side", ["start", "end"])
def test_text_that_the_graph_shows_is_found_by_running(tmp_path, side):
    code, text, failures = verified(tmp_path, joint(side))
    where = [0, TEXT - 1] if side == "start" else [TOKENS, ALL - 1]
    assert (code, failures) == (0, [])
    assert [(t["layer"], t["tokens"], t["found"], t["used"], t["verdict"]) for t in text] == [(i, ALL, [where], [where], "same") for i in range(2)]


def test_the_plans_text_may_be_right(tmp_path):
    assert verified(tmp_path, joint(), said(TEXT))[::2] == (0, [])


@pytest.mark.parametrize("wrong", [(TEXT, "end"), (TEXT - 1, "start"), (TEXT + 1, "start"), (0, "start")], ids=str)
def test_a_plan_with_other_text_than_the_model_has_fails(tmp_path, wrong):
    code, text, failures = verified(tmp_path, joint(), said(*wrong))
    assert code == 1 and len(failures) == 2 and {t["verdict"] for t in text} == {"differs"}
    first = failures[0]
    assert "layer 0 (node_Softmax_" in first and f"of its {ALL} tokens 0-7 do not depend on the latents" in first
    assert '"text": {"tokens": 8, "side": "start"}' in first and "--skip 0" in first
    used = {"end": f"{ALL - wrong[0]}-{ALL - 1}", "start": f"0-{wrong[0] - 1}"}[wrong[1]]
    assert f"windows take {used if wrong[0] else 'none'} for text" in first


def test_the_table_says_it_too(tmp_path):
    path, plan_path = write(tmp_path, joint(), PLAN)
    common = ["verify", path, "--onnxruntime", RUNTIME, "--threads", 1, "--plan"]
    assert "text tokens: as running shows them in 2 of 2 layers" in tool(*common, plan_path).stdout
    write(tmp_path, joint(), said(TEXT, "end"))
    wrong = tool(*common, plan_path, check=False).stdout
    assert "in 0 of 2 layers" in wrong and "layer 0, 1: of its 40 tokens 0-7" in wrong


def test_wrong_text_is_no_failure_where_the_plan_has_no_window(tmp_path):
    steps = [["full", "full"], ["ast", "wa-rs"], ["full", "asc"]]
    plan = {k: v for k, v in said(TEXT, "end").items() if k != "timesteps"} | {"steps": steps}
    code, text, failures = verified(tmp_path, joint(), plan)
    assert code == 1 and [t["windowed"] for t in text] == [False, True]
    assert len(failures) == 1 and failures[0].startswith("layer 1 ")


def test_a_layer_that_is_left_out_mixes_tokens_as_well(tmp_path):
    plan = PLAN | {"steps": [row[:1] for row in PLAN["steps"]]}
    code, text, _ = verified(tmp_path, joint(), plan, "--skip", 0)
    assert code == 0 and [(t["found"], t["verdict"]) for t in text] == [([[0, TEXT - 1]], "same")]


def test_image_tokens_alone_are_right_without_text(tmp_path):
    code, text, _ = verified(tmp_path, denoiser(lambda g, i, h: g.attend(h))[1])
    assert code == 0 and {(t["verdict"], len(t["found"])) for t in text} == {("same", 0)}


def test_a_modulation_from_all_latents_shows_nothing_and_fails_nothing(tmp_path):
    def block(g: Graph, i, h):
        pooled = g("ReduceMean", "x", axes=[1], keepdims=1)
        return g.attend(g("Add", h, g.linear(pooled, 8)))

    code, text, failures = verified(tmp_path, joint(block=block), said(TEXT, "end"))
    assert (code, failures) == (0, [])
    assert {t["verdict"] for t in text} == {"unknown"} and "modulation" in text[0]["why"]


def test_values_of_more_tokens_than_queries_show_nothing_and_fail_nothing(tmp_path):
    """Learnt keys and values in front of the sequence's own: values cannot stand in for the result."""

    def block(g: Graph, i, h):
        n = g.norm(h)
        q, k, v = (g.linear(n) for _ in range(3))
        rows = g("Slice", g("Shape", h), [0], [1])
        learnt = g("Expand", np.ones((1, 4, C)), g("Concat", rows, [4, C], axis=0))
        k, v = (g.heads(g("Concat", learnt, z, axis=1), tokens=-1) for z in (k, v))
        return g("Add", h, g.merged(g.attention(g.heads(q), k, v)))

    # Windows are refused there.
    plan = {k: v for k, v in PLAN.items() if k != "timesteps"} | {"steps": [["full", "full"], ["ast", "asc"]]}
    code, text, failures = verified(tmp_path, denoiser(block)[1], plan)
    assert (code, failures) == (0, [])
    assert {t["verdict"] for t in text} == {"unknown"} and all("with each token alone" in t["why"] for t in text)
