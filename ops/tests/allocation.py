"""Runs the tiny transformer of tiny.py while chosen allocations fail. Needs failing_malloc.c preloaded.

Owns what may come of a failed allocation: an exception that speaks of memory, or numbers that are the plan's with some layers in full.
"""

import copy
import ctypes
import gc
import itertools
import threading

import numpy as np
import onnxruntime as ort

import tiny as T

SHIM = ctypes.CDLL(None)
SHIM.failing_malloc_arm.argtypes = [ctypes.c_size_t] * 3 + [ctypes.c_long] * 2 + [ctypes.c_int]
SHIM.failing_malloc_disarm.restype = ctypes.c_long
ALWAYS = 1 << 40
LARGE = 16 << 10

# Every action, and each cached tensor read at the next step or the one after.
STEPS = [["full"] * 3, ["ast", "wa-rs", "asc"], ["wa-rs", "ast", "ast"], ["wa-rs+asc", "wa-rs", "wa-rs"]]


def library():
    """Where the library's code is."""
    T.stats()  # loads it
    name = T.LIB.rsplit("/", 1)[-1]
    ranges = [line.split()[0].split("-") for line in open("/proc/self/maps") if name in line]
    return int(ranges[0][0], 16), int(ranges[-1][1], 16)


class Failing:
    """Within the block the requests nth, nth + 1, … (`count` of them) of at least `least` bytes fail.

    `who` asks for them: the `library`, `below` it anybody whom it has called, or `anybody` in the process.
    """

    def __init__(self, who, nth, count=1, least=0):
        callers = (0, 0) if who == "anybody" else library()
        self.arguments = (*callers, least, nth, count, who == "below")

    def __enter__(self):
        SHIM.failing_malloc_arm(*self.arguments)
        return self

    def __exit__(self, *_):
        failed = ctypes.c_long()
        self.seen = SHIM.failing_malloc_disarm(ctypes.byref(failed))
        self.failed = failed.value


class Lossy(T.Reference):
    """Layers may have lost what the plan counts on: they are computed in full. Of `fates` there is one for each layer."""

    AS_PLANNED, LOST, LOST_BUT_R = range(3)

    @classmethod
    def possible(cls, action):
        """What may become of a layer. Where it wanted its output only, R stays if it is there."""
        return range({"full": 1, "ast": 3}.get(action, 2))

    def layer(self, layer, action, x):
        fate = self.fates[layer]
        if fate == self.AS_PLANNED:
            return super().layer(layer, action, x)
        kept = self.residual.get(layer)
        y = super().layer(layer, "full", x)
        if fate == self.LOST_BUT_R and kept is not None:
            self.residual[layer] = kept
        return y


class Bench:
    """A session, and one generation with what it should be, step by step."""

    def __init__(self, threads=1, anonymous=False, layers=3, **sizes):
        steps = [row * (layers // 3) for row in STEPS]
        self.tiny = T.Tiny({**T.random_plan(1, steps=4), "steps": steps}, **sizes)
        for weights in self.tiny.weights:
            # Many layers add up to about what three do.
            weights["o"] *= np.float32(3 / layers)
        self.model = self.tiny.model().SerializeToString()
        self.threads = threads
        self.feeds = {} if anonymous else {"dfa_request_id": np.array(3, np.int64)}
        self.session = self.make()
        self.inputs = self.client().inputs
        self.steps = range(len(STEPS))
        self.right = [self.run(step) for step in self.steps]
        # The definition's states before each step.
        client, self.states = self.client(), []
        reference = Lossy(self.tiny)
        reference.fates = [Lossy.AS_PLANNED] * layers
        for step, right in zip(self.steps, self.right):
            self.states.append(copy.deepcopy(reference))
            assert near(self.define(reference, client, step), right), step

    def make(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 4
        # Every tensor is a request.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.register_custom_ops_library(T.LIB)
        return ort.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])

    def client(self):
        return self.tiny.client(0.1, **self.feeds)

    def define(self, reference, client, step):
        return reference.run(step, client.latents(step), client.timestep(step), client.prompt)

    def run(self, step):
        return self.session.run(None, self.inputs(step, dfa_start=np.array(step == 0)))[0]

    def is_right(self):
        """A whole generation, without faults. One without an id may be taken for the one that failed, and be dense."""
        outputs = [self.run(step) for step in self.steps]
        if self.feeds:
            assert all(np.array_equal(*pair) for pair in zip(outputs, self.right))
        self.check(outputs)

    def check(self, outputs):
        """The plan's numbers to the bit; after a loss, the plan's with some layers in full."""
        states = None
        for step, got in enumerate(outputs):
            if states is None:
                if np.array_equal(got, self.right[step]):
                    continue
                states = [self.states[step]]
            client, after = self.client(), []
            for state, fates in itertools.product(states, itertools.product(*map(Lossy.possible, STEPS[step]))):
                reference = copy.copy(state)
                reference.residual, reference.output = dict(state.residual), dict(state.output)
                reference.fates = fates
                if near(self.define(reference, client, step), got):
                    after.append(reference)
            assert after, f"step {step} is neither the plan's nor more of it"
            states = after

    def trial(self, failing):
        """One generation with failing memory. Whether it ended in an exception; whatever was returned was right."""
        # Numpy's and Python's own part of it is not what is tried.
        feeds = [self.inputs(step, dfa_start=np.array(step == 0)) for step in self.steps]
        outputs, raised = [], False
        with failing:
            try:
                for step in self.steps:
                    outputs.append(self.session.run(None, feeds[step])[0])
            except Exception as error:
                raised = error
        assert not raised or speaks_of_memory(raised), raised
        self.check(outputs)
        return bool(raised)

    def close(self):
        del self.session
        gc.collect()
        s = T.stats()
        left = ["sessions", "live_requests", "runs_in_flight", "bytes"]
        assert all(s[name] == 0 for name in left), s
        # Short lists of the whole process may stay there, as long as it does.
        assert s["reserve_bytes"] <= 4096, s


def near(a, b):
    return np.abs(a - b).max() < 2e-4


def speaks_of_memory(error):
    """What the library, the host or Python says."""
    return isinstance(error, MemoryError) or "memory" in str(error) or "alloc" in str(error)


def on_a_new_thread(work):
    """Threads begin without scratch memory."""
    result = []

    def body():
        try:
            result.append(work())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def sweep(trial, failing, every=1):
    """Trials with the first request failing, then the first after that, until none is left. How many raised."""
    raised = total = 0
    for nth in itertools.count(1, every):
        fault = failing(nth)
        raised += trial(fault)
        if not fault.failed:
            break
        total += 1
    print(f"{fault.seen} requests, {total} trials, {raised} ended in an exception")
    return total, raised


def generations(who, anonymous=False, count=1, every=1):
    """Requests for any memory during a generation."""
    bench = Bench(anonymous=anonymous, core=(1,))

    def trial(fault):
        raised = bench.trial(fault)
        # An operator that fails ends its run. One that cannot read its ticket does not know which: that run is taken for dead later.
        assert who == "below" or T.stats()["runs_in_flight"] == 0
        bench.is_right()
        return raised

    result = sweep(trial, lambda nth: Failing(who, nth, count), every)
    bench.close()
    return result


def large(threads=1, count=1):
    """Requests for 16 KiB or more, whoever makes them: scratch, cached tensors, the host's tensors."""
    bench = Bench(threads=threads, core=(1,), tokens=96, head_dim=32)

    def trial(fault):
        raised = on_a_new_thread(lambda: bench.trial(fault))
        bench.is_right()
        return raised

    result = sweep(trial, lambda nth: Failing("anybody", nth, count, LARGE))
    bench.close()
    return result


def many_layers():
    """The library's requests that grow with the number of layers."""
    bench = Bench(layers=300, tokens=2, heads=1)

    def trial(fault):
        raised = bench.trial(fault)
        bench.is_right()
        return raised

    result = sweep(trial, lambda nth: Failing("library", nth, least=LARGE))
    bench.close()
    return result


def sessions(count=1, every=1):
    """The library's requests while a session is made, while it ends, and while it is asked for its counters.

    Not the host's below it: options and attributes are handed over in functions of ONNX Runtime (1.32.0) that end the process
    by std::terminate when they get no memory.
    """
    bench = Bench(core=(1,))

    def trial(fault):
        raised = session = None
        with fault:
            try:
                session = bench.make()
            except Exception as error:
                raised = error
        assert raised is None or speaks_of_memory(raised), raised
        if session:
            feeds = bench.inputs(0)
            assert np.array_equal(session.run(None, feeds)[0], bench.right[0])
            with Failing("library", 1, ALWAYS):
                del session
        return bool(raised)

    result = sweep(trial, lambda nth: Failing("library", nth, count), every)
    with Failing("library", 1, ALWAYS):
        assert T.stats()["sessions"] == 1
    bench.is_right()
    bench.close()
    return result


def long_plans():
    """A plan too long for the reserve is refused when there is no memory for its text, or to read it."""
    tiny = T.Tiny({**T.random_plan(1), "steps": STEPS[:1] * 4000, "timesteps": list(range(4000, 0, -1))})
    bench = Bench()
    bench.model = tiny.model().SerializeToString()
    bench.make()
    for nth, what in (1, "for an attribute of"), (2, "for the attribute `plan`"):
        fault = Failing("library", nth, ALWAYS, LARGE)
        try:
            with fault:
                bench.make()
        except Exception as error:
            assert f"no memory {what}" in str(error), error
        assert fault.failed > 0, nth
    bench.close()
