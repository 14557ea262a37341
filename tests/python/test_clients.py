"""Clients without a request id that differ in one input, whichever it is: each gets its own plan's numbers, or dense ones."""

import json

import numpy as np
import onnxruntime as ort
import pytest
from conftest import distance, session, stats, tool

onnx = pytest.importorskip("onnx", reason="models are built here; the newest host's environment can")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

TOKENS, HEADS, DIM, LATENT = 32, 2, 16, 8
WIDTH = HEADS * DIM
TIMES = [999.0, 799.0, 599.0, 399.0, 199.0, 99.0]
LAZY = [["full"] * 2] + [["ast"] * 2, ["wa-rs"] * 2, ["ast"] * 2, ["wa-rs"] * 2, ["ast"] * 2]


class Net:
    """Two layers of attention over the latents, and over text in front of them if there is some; what `extra` returns is added to the latents' tokens."""

    def __init__(self, seed=4):
        self.nodes, self.constants, self.inputs = [], [], []
        self.rng = np.random.default_rng(seed)

    def op(self, kind, *inputs, name=None, **attributes):
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"node_{name}", **attributes))
        return name

    def const(self, value, name=None):
        name = name or f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, rows, columns):
        return self.const((self.rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32))

    def fed(self, name, *shape, default=None):
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        if default is not None:
            self.const(np.asarray(default, np.float32), name)
        return name

    def linear(self, x, rows, columns):
        return self.op("MatMul", x, self.weight(rows, columns))

    def time(self, name):
        frequencies = self.const(np.exp(-np.arange(8) / 3.0).astype(np.float32)[None])
        angles = self.op("Mul", self.op("Unsqueeze", name, self.const([1])), frequencies)
        both = self.op("Concat", self.op("Sin", angles), self.op("Cos", angles), axis=1)
        return self.op("Unsqueeze", self.linear(both, 16, WIDTH), self.const([1]))

    def build(self, path, extra=None, text=False):
        x = self.linear(self.fed("latents", "batch", TOKENS, LATENT), LATENT, WIDTH)
        x = self.op("Add", x, self.time(self.fed("timestep", "batch")))
        if extra:
            x = self.op("Add", x, extra(self))
        if text:
            x = self.op("Concat", self.linear(self.fed("text", "batch", "length", 12), 12, WIDTH), x, axis=1)
        shape = self.const([0, -1, HEADS, DIM])
        for _ in range(2):
            y = self.op("LayerNormalization", x, self.const(np.ones(WIDTH, np.float32)), axis=-1)
            q, k, v = (self.op("Transpose", self.op("Reshape", self.linear(y, WIDTH, WIDTH), shape), perm=[0, 2, 1, 3]) for _ in range(3))
            scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
            scores = self.op("Mul", scores, self.const(np.float32(DIM**-0.5)))
            o = self.op("Transpose", self.op("MatMul", self.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
            x = self.op("Add", x, self.linear(self.op("Reshape", o, self.const([0, 0, WIDTH])), WIDTH, WIDTH))
        if text:
            length = self.op("Slice", self.op("Shape", "text"), self.const([1]), self.const([2]), self.const([0]))
            x = self.op("Slice", x, length, self.const([2**40]), self.const([1]))
        self.op("MatMul", x, self.weight(WIDTH, LATENT), name="noise")
        out = helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["batch", TOKENS, LATENT])
        graph = helper.make_graph(self.nodes, "net", self.inputs, [out], self.constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path


def rewrite(model, *flags, check=True, **plan):
    path = model.with_suffix(".plan.json")
    plan = {"timesteps": TIMES, "steps": LAZY} | plan
    plan = {k: v for k, v in plan.items() if v is not None}
    path.write_text(json.dumps({"format": "ditfastattn-plan", "version": 1} | plan))
    said = tool(model, "--plan", path, "-o", model.with_suffix(".dfa.onnx"), "--force", *flags, check=check)
    return model.with_suffix(".dfa.onnx") if check else said


def start(seed=1, rows=1):
    return np.random.default_rng(seed).standard_normal((rows, TOKENS, LATENT)).astype(np.float32)


def feed(latents, time, **more):
    return {"latents": latents, "timestep": np.full(len(latents), time, np.float32), **more}


def moved(first, step, output):
    part = 0.03 * (step + 1)
    return (first * (1 - part) + part * output / np.abs(output).max()).astype(np.float32)


def compare(model, people, planned=None, steps=4):
    """People of one seed take turns in one session; how many answers were planned, of those who have one."""
    path, first = planned or rewrite(model), start()
    shared, dense = session(path), session(model, custom_ops=False)
    own, latents = [session(path) for _ in people], [first] * len(people)
    as_planned = 0
    for step in range(steps):
        for who, inputs in enumerate(people):
            fed = feed(latents[who], TIMES[step], **inputs)
            got = shared.run(None, fed)[0]
            mine, full = own[who].run(None, fed)[0], dense.run(None, fed)[0]
            apart = distance(got, mine), distance(got, full)
            assert min(apart) < 1e-4, f"step {step} of {who}: {apart[0]:.2f} from its own plan, {apart[1]:.2f} from dense"
            as_planned += apart[0] < 1e-4 < apart[1]
            latents[who] = moved(first, step, got)
    return as_planned


def lora(net):
    a, b = net.fed("lora_a", LATENT, 2, default=np.zeros((LATENT, 2))), net.fed("lora_b", 2, WIDTH, default=np.zeros((2, WIDTH)))
    return net.op("MatMul", net.op("MatMul", "latents", a), b)


def test_inputs_with_a_default_tell_clients_apart(tmp_path):
    model = Net().build(tmp_path / "lora.onnx", lora)
    rng = np.random.default_rng(0)
    weights = [{"lora_a": rng.standard_normal((LATENT, 2)).astype(np.float32), "lora_b": rng.standard_normal((2, WIDTH)).astype(np.float32)} for _ in range(2)]
    # The one that began last is served, the others wait.
    assert compare(model, weights) > 0
    # Against the default, and against a single bit of it.
    assert compare(model, [weights[0], {}]) > 0
    bit = {"lora_a": weights[0]["lora_a"].copy(), "lora_b": weights[0]["lora_b"]}
    bit["lora_a"].view(np.uint32)[3, 1] ^= 1
    compare(model, [weights[0], bit])
    about = json.loads(tool("inspect", model, "--json").stdout)
    assert about["inputs"]["optional"] == ["lora_a", "lora_b"] and about["inputs"]["conditioning"] == []


def test_a_scale_with_a_default_tells_clients_apart(tmp_path):
    def scaled(net):
        return net.op("Mul", net.linear("latents", LATENT, WIDTH), net.fed("scale", default=1.0))

    model = Net().build(tmp_path / "scale.onnx", scaled)
    scale = [np.array(x, np.float32) for x in (1.0, 3.0)]
    assert compare(model, [{"scale": scale[0]}, {"scale": scale[1]}]) > 0
    assert compare(model, [{}, {"scale": scale[1]}]) > 0


def test_every_byte_of_a_large_input_tells_clients_apart(tmp_path):
    size = 3 << 20

    def control(net):
        # The sum of ever so many numbers, of which each counts.
        total = net.op("ReduceSum", net.fed("control", "many"), keepdims=1)
        return net.op("Mul", net.linear("latents", LATENT, WIDTH), total)

    model = Net().build(tmp_path / "control.onnx", control)
    path = rewrite(model)
    nothing = np.zeros(size, np.float32)
    for at in (1, size // 2 + 12345, size - 2):
        other = nothing.copy()
        other[at] = 3.0
        compare(model, [{"control": nothing}, {"control": other}], path, steps=3)
    # Empty ones are inputs too.
    compare(model, [{"control": nothing[:0]}, {"control": np.full(1, 2.0, np.float32)}], path, steps=3)


def test_a_timestep_within_the_tolerance_tells_clients_apart(tmp_path):
    model = Net().build(tmp_path / "plain.onnx")
    path, first = rewrite(model), start()
    shared, dense = session(path), session(model, custom_ops=False)
    own, latents = [session(path) for _ in range(2)], [first, first]
    for step in range(4):
        for who, shift in enumerate((0.0, 1.5)):
            fed = feed(latents[who], TIMES[step] + shift * (step == 0))
            got = shared.run(None, fed)[0]
            apart = distance(got, own[who].run(None, fed)[0]), distance(got, dense.run(None, fed)[0])
            assert min(apart) < 1e-5, f"step {step} of {who}: {apart}"
            latents[who] = moved(first, step, got)


def test_an_input_that_is_no_tensor_leaves_anonymous_runs_dense(tmp_path):
    def references(net):
        kind = helper.make_tensor_sequence_value_info("references", TensorProto.FLOAT, None)
        net.inputs.append(kind)
        many = net.op("Cast", net.op("SequenceLength", "references"), to=TensorProto.FLOAT)
        return net.op("Mul", net.linear("latents", LATENT, WIDTH), net.op("Reshape", many, net.const([1])))

    model = Net().build(tmp_path / "sequence.onnx", references)
    assert "`references` is no tensor" in tool("inspect", model).stdout
    fed = [{"references": [np.zeros((1,), np.float32)] * many} for many in (1, 2)]
    assert compare(model, fed) == 0
    planned, dense = session(rewrite(model)), session(model, custom_ops=False)
    apart = 0.0
    for step in range(4):
        one = feed(start(), TIMES[step], **fed[0])
        apart = max(apart, distance(planned.run(None, one | {"dfa_request_id": np.array(3)})[0], dense.run(None, one)[0]))
    assert apart > 1e-4, "with an id the plan is carried out"


def test_adapters_tell_clients_apart(tmp_path):
    if not hasattr(ort, "LoraAdapter"):
        pytest.skip("this onnxruntime has no adapters")
    model = Net().build(tmp_path / "adapters.onnx", lora)
    path, first, rng = rewrite(model), start(), np.random.default_rng(5)
    adapters, weights = [], []
    for who in range(2):
        w = {"lora_a": rng.standard_normal((LATENT, 2)).astype(np.float32), "lora_b": rng.standard_normal((2, WIDTH)).astype(np.float32)}
        file = ort.AdapterFormat()
        file.set_adapter_version(1)
        file.set_model_version(1)
        file.set_parameters({k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in w.items()})
        file.export_adapter(str(tmp_path / f"{who}.adapter"))
        adapter = ort.LoraAdapter()
        adapter.Load(str(tmp_path / f"{who}.adapter"))
        adapters.append(adapter)
        weights.append(w)
    shared, dense, own = session(path), session(model, custom_ops=False), [session(path) for _ in range(2)]
    latents = [first, first]
    for step in range(4):
        for who in range(2):
            options = ort.RunOptions()
            options.add_active_adapter(adapters[who])
            fed = feed(latents[who], TIMES[step])
            got = shared.run(None, fed, options)[0]
            apart = distance(got, own[who].run(None, fed | weights[who])[0]), distance(got, dense.run(None, fed | weights[who])[0])
            assert min(apart) < 1e-4, f"step {step} of {who}: {apart}"
            latents[who] = moved(first, step, got)


# ---- what moves with the steps ---------------------------------------------------------------------------------------------------


def test_a_second_time_is_known_from_the_first_generation_on(tmp_path):
    model = Net().build(tmp_path / "next.onnx", lambda net: net.time(net.fed("next", "batch")))
    path = rewrite(model)
    for shift in (1, -1):
        planned, named, first, before = session(path), session(path), start(2), stats()
        latents = first
        for step, time in enumerate(TIMES):
            near = step + shift
            other = TIMES[near] if 0 <= near < len(TIMES) else [1000.0, 0.0][shift > 0]
            fed = feed(latents, time, next=np.full(1, other, np.float32))
            got = planned.run(None, fed)[0]
            assert np.array_equal(got, named.run(None, fed | {"dfa_request_id": np.array(1)})[0]), f"step {step}"
            latents = moved(first, step, got)
        assert stats()["contested"] == before["contested"]


# ---- two runs per step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False], ids=["id", "anonymous"])
@pytest.mark.parametrize("action", ["asc", "wa-rs+asc"])
def test_prompts_of_two_lengths_share_nothing_and_are_no_error(tmp_path, action, named):
    model = Net().build(tmp_path / "text.onnx", text=True)
    path = rewrite(model, cfg="separate", steps=[["full"] * 2] + [[action] * 2] * 5)
    rng = np.random.default_rng(3)
    for lengths in ((11, 11), (11, 5)):
        prompts = [rng.standard_normal((1, n, 12)).astype(np.float32) for n in lengths]
        planned, dense, before = session(path), session(model, custom_ops=False), stats()
        first = latents = start()
        for step, time in enumerate(TIMES):
            outputs = []
            for prompt in prompts:
                fed = feed(latents, time, text=prompt)
                request = {"dfa_request_id": np.array(7)} if named else {}
                got = planned.run(None, fed | request)[0]
                outputs.append((got, dense.run(None, fed)[0]))
            if action == "asc":
                # The second run takes the first one's output where it can, and else computes all.
                exact = distance(*outputs[1]) < 1e-5
                assert exact == (step == 0 or lengths[0] != lengths[1]), f"step {step}, prompts of {lengths}"
            latents = moved(first, step, outputs[0][0])
        after = stats()
        own = after["recomputes"] - before["recomputes"]
        assert own == (0 if lengths[0] == lengths[1] else 2 * 5)


# ---- other schedules ---------------------------------------------------------------------------------------------------------------


def test_a_plan_serves_another_number_of_steps_if_it_may(tmp_path):
    model = Net().build(tmp_path / "any.onnx")
    dense = session(model, custom_ops=False)
    for steps in (3, 11, 17):
        times = np.linspace(TIMES[0], TIMES[-1], steps)
        for flags, served in (([], False), (["--schedule", "any"], True)):
            planned = session(rewrite(model, *flags))
            for request in ({}, {"dfa_request_id": np.array(5)}):
                before, first = stats(), start(8)
                latents, apart = first, []
                for step, time in enumerate(times):
                    fed = feed(latents, time)
                    got = planned.run(None, fed | request)[0]
                    apart.append(distance(got, dense.run(None, fed)[0]))
                    latents = moved(first, step * 6 // steps, got)
                after = stats()
                new = {name: after[name] - before[name] for name in before if name != "version"}
                assert apart[0] < 1e-5
                if served:
                    assert new["off_schedule"] > 0 and new["unplanned"] == new["contested"] == new["discontinuities"] == 0
                    assert steps < 6 or new["layers_reused"] + new["layers_window"] >= steps, new
                    assert new["generations"] == 1
                else:
                    assert new["off_schedule"] == 0 and new["unplanned"] > 0


def test_the_plan_s_own_schedule_is_the_same_under_any(tmp_path):
    model = Net().build(tmp_path / "own.onnx")
    both = [session(rewrite(model)), None]
    both[1] = session(rewrite(model, "--schedule", "any"))
    first = latents = start(3)
    for step, time in enumerate(TIMES):
        a, b = (s.run(None, feed(latents, time))[0] for s in both)
        assert np.array_equal(a, b), f"step {step}"
        latents = moved(first, step, a)


def test_any_schedule_needs_a_list_that_goes_one_way_and_hidden_state(tmp_path):
    model = Net().build(tmp_path / "refused.onnx")
    said = rewrite(model, "--schedule", "any", check=False, timesteps=None)
    assert said.returncode == 1 and "no `timesteps`" in said.stderr
    said = rewrite(model, "--schedule", "any", check=False, timesteps=[999, 799, 899, 399, 199, 99])
    assert said.returncode == 1 and "do not go one way: 799 comes before 899" in said.stderr
    said = rewrite(model, "--schedule", "any", "--state", "io", check=False)
    assert said.returncode == 2 and "needs --state hidden" in said.stderr


def test_only_models_that_need_a_newer_library_ask_for_one(tmp_path):
    model = Net().build(tmp_path / "contract.onnx")

    def contract(*flags):
        nodes = onnx.load(rewrite(model, *flags)).graph.node
        step = next(n for n in nodes if n.op_type == "DiTFastAttnStep")
        return next(a.i for a in step.attribute if a.name == "contract")

    assert (contract(), contract("--schedule", "planned"), contract("--schedule", "any")) == (1, 1, 3)


def test_resetting_the_counters_leaves_requests_alone(tmp_path):
    import ctypes

    from conftest import TARGET

    model = Net().build(tmp_path / "reset.onnx")
    path = rewrite(model)
    planned, alone, first = session(path), session(path), start(6)
    latents = first
    for step, time in enumerate(TIMES):
        fed = feed(latents, time)
        got = planned.run(None, fed | {"dfa_request_id": np.array(4)})[0]
        ctypes.CDLL(str(TARGET / "libditfastattn.so")).ditfastattn_reset()
        assert stats()["steps"] == 0 and stats()["live_requests"] >= 1
        assert np.array_equal(got, alone.run(None, fed | {"dfa_request_id": np.array(9)})[0]), f"step {step}"
        latents = moved(first, step, got)
