"""A soak: random requests with faults injected, for as long as one likes. Every image is right, the counters add up, memory stays flat.

    .venv/tests/bin/python tests/python/soak.py --minutes 60

Threads share one session and take requests at random, with ids and without. Of each it is known what it computes alone and what dense
attention computes; each answer must be the one or the other up to rounding, or what the same image gives if some steps before it were
dense. Faults: generations that are abandoned, repeat or skip a step, change their shape in the middle, feed NaN, are terminated; they
must be what they are in a session of their own, bit for bit. Other sessions come and go meanwhile. Ends with figures, and exit code 1 if anything was not as promised.
"""

import argparse
import gc
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from conftest import CORPUS, Model, library, resident, session, stats
from test_requests import Generation, request

NAME = ("dit", "ts17")
IMAGES = 6
FAULTS = ["skip", "repeat", "nan", "shape", "fail", "terminate"]
CLOSE = 1e-5


class Soak:
    def __init__(self, seconds, threads, seed, folder):
        entry = next(e for e in CORPUS if (e["architecture"], e["dialect"]) == NAME)
        self.model = Model(entry, folder)
        self.path = self.model.rewrite()
        # What is rewritten while the soak runs must not lie where sessions are made from.
        (folder / "variants").mkdir()
        self.variants = Model(entry, folder / "variants")
        self.layers = len(self.model.plan["steps"][0])
        self.images = [Generation(self.model, 900 + i) for i in range(IMAGES)]
        self.alone = [image.alone(self.path) for image in self.images]
        self.dense = [image.dense() for image in self.images]
        self.planned = session(self.path)
        self.seconds, self.threads, self.seed = seconds, threads, seed
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.count = {"answers": 0, "as alone": 0, "near alone": 0, "dense": 0, "more than planned": 0, "images": 0, "finished images": 0, "abandoned images": 0, "terminated": 0, "sessions": 0}
        self.count |= {f"with a fault ({fault})": 0 for fault in FAULTS}
        self.wrong = []

    def add(self, what):
        with self.lock:
            self.count[what] += 1

    def judge(self, image, step, out, identity):
        """An answer of a generation without a fault."""
        self.add("answers")
        expected = self.dense[image][step]
        if np.array_equal(out, self.alone[image][step]):
            self.add("as alone")
        elif np.abs(out - expected).max() <= CLOSE * np.abs(expected).max():
            self.add("dense")
        elif np.abs(out - self.alone[image][step]).max() <= CLOSE * np.abs(expected).max():
            # What was cached was computed with more rows at a time than alone: the last bits differ.
            self.add("near alone")
        elif any(np.abs(out - other).max() <= 2 * CLOSE * np.abs(expected).max() for other in self.histories(image, step)):
            self.add("more than planned")
        else:
            self.complain(f"image {image}, step {step}, {'with an id' if identity else 'anonymous'}: off by {np.abs(out - expected).max():.3g} from dense, by {np.abs(out - self.alone[image][step]).max():.3g} from alone")

    def histories(self, image, step):
        """What an anonymous generation of this image, and of no other, may compute at the step among others: any step before it dense,
        because the run was contested; windows of this step full, because the host left the run standing while another generation ended
        a step, so that it was taken for dead and gave up its residuals."""
        full = {"wa-rs": "full", "wa-rs+asc": "asc"}
        plan = self.model.plan["steps"]
        befores = sorted(itertools.product([False, True], repeat=step), key=sum)
        for before, windows in itertools.product(befores, itertools.product([False, True], repeat=self.layers)):
            rows = [["full"] * self.layers if dense else row for row, dense in zip(plan, before)]
            rows.append([full.get(action, action) if lost else action for action, lost in zip(plan[step], windows)])
            rows += plan[step + 1 :]
            with self.lock:
                own = session(self.variants.rewrite(self.model.plan | {"steps": rows}), threads=1)
                yield [self.images[image].run(own, s) for s in range(step + 1)][-1]

    def complain(self, what):
        with self.lock:
            self.wrong.append(what)

    def work(self, number):
        draw = random.Random(self.seed * 1000 + number)
        private = session(self.path, threads=1)
        serial = 0
        while not self.stop.is_set():
            serial += 1
            image = draw.randrange(IMAGES)
            self.add("images")
            fault = draw.choice(["none"] * 6 + ["abandon", *FAULTS])
            at = draw.randrange(1, self.model.steps)
            if fault in FAULTS:
                self.faulty(private, image, fault, at, number * 1_000_000 + serial, draw.random() * 0.004)
            else:
                # Ids never meet another thread's; 0 is anonymous and meets everybody's.
                identity = draw.choice([0, number * 1_000_000 + serial, -number * 1_000_000 - draw.randrange(1, 4)])
                steps = at if fault == "abandon" else self.model.steps
                for step in range(steps):
                    more = request(identity, draw.choice([(), (1,), (1, 1)]), start=step == 0, end=step == self.model.steps - 1)
                    self.judge(image, step, self.images[image].run(self.planned, step, **more), identity)
                self.add("finished images" if steps == self.model.steps else "abandoned images")

    def faulty(self, private, image, fault, at, identity, delay):
        """A generation with a fault computes what it computes alone, with the same fault."""
        got = self.generation(self.planned, image, fault, at, identity, delay)
        # Whether a run was terminated in time is a race; then it is one that failed, or one that is repeated.
        like = ["fail", "repeat"] if fault == "terminate" else [fault]
        for same in like:
            alone = self.generation(private, image, same, at, identity, None)
            if all(np.array_equal(a, b) for a, b in zip(got, alone)):
                self.add(f"with a fault ({fault})")
                return
        self.complain(f"image {image} with {fault} at step {at} is not what it is alone")

    def generation(self, where, image, fault, at, identity, delay):
        picture, outputs = self.images[image], []
        for step in range(self.model.steps):
            more = request(identity, start=step == 0, end=step == self.model.steps - 1)
            if step == at:
                if fault == "skip":
                    continue
                self.inject(where, fault, picture, step, more, delay)
            outputs.append(picture.run(where, step, **more))
        return outputs

    def inject(self, where, fault, picture, step, more, delay):
        """A run that goes wrong, or comes before its time."""
        feed = self.model.feed(where, step, **more)
        feed["dfa_end"] = np.array(False)
        latents = self.model.latents()
        feed[latents] = picture.latents[step]
        options = ort.RunOptions()
        options.log_severity_level = 4
        if fault == "nan":
            feed[latents] = np.full_like(feed[latents], np.nan)
        elif fault == "shape":
            feed = {n: v[:1] if v.ndim and len(v) == 2 else v for n, v in feed.items()}
        elif fault == "fail":
            options.terminate = True
        elif fault == "terminate":
            threading.Timer(delay, lambda: setattr(options, "terminate", True)).start()
        try:
            where.run(None, feed, options)
        except Exception as error:
            if "terminate" not in str(error).lower():
                self.complain(f"{fault}: {error}")
            self.add("terminated")

    def come_and_go(self):
        """Sessions of their own beside the shared one."""
        draw = random.Random(self.seed)
        while not self.stop.wait(1.0):
            image = draw.randrange(IMAGES)
            own = session(self.path, threads=1)
            self.add("sessions")
            for step in range(draw.randrange(1, self.model.steps)):
                self.judge(image, step, self.images[image].run(own, step, **request(1)), 1)
            del own

    def run(self):
        library().ditfastattn_reset()
        workers = [threading.Thread(target=self.work, args=(n,)) for n in range(1, self.threads + 1)]
        workers.append(threading.Thread(target=self.come_and_go))
        began = time.monotonic()
        for worker in workers:
            worker.start()
        memory = []
        while time.monotonic() - began < self.seconds and all(w.is_alive() for w in workers):
            time.sleep(min(10.0, self.seconds / 20))
            memory.append(resident())
            print(f"{time.monotonic() - began:6.0f} s  {memory[-1] >> 20} MiB  {self.count}", file=sys.stderr)
        died = [w for w in workers if not w.is_alive()]
        self.stop.set()
        for worker in workers:
            worker.join()
        return self.verdict(memory, time.monotonic() - began, len(died))

    def verdict(self, memory, seconds, died):
        during = stats()
        self.planned = None
        gc.collect()
        after = stats()
        complaints = self.wrong[:10]
        if died:
            complaints.append(f"{died} thread(s) died")
        # What a layer does is decided, and counted, when its run begins.
        layers = during["layers_full"] + during["layers_window"] + during["layers_reused"]
        planned = during["steps"] * self.layers
        if layers != planned:
            complaints.append(f"{layers} layers counted in {during['steps']} runs of {self.layers}")
        if during["steps"] < self.count["answers"]:
            complaints.append(f"{during['steps']} steps counted for {self.count['answers']} answers")
        if self.count["as alone"] < self.count["answers"] / 4 or self.count["finished images"] == 0:
            complaints.append("hardly anything was served from a cache: this soak proves little")
        for name in ("bytes", "runs_in_flight", "live_requests", "sessions"):
            if after[name] != 0:
                complaints.append(f"{name} is {after[name]} at the end")
        half = len(memory) // 2
        # The first half warms up: pools, arenas, and as many live requests as are allowed.
        growth = max(memory[half:]) - max(memory[: half or 1])
        if growth > 32 << 20:
            complaints.append(f"memory grew by {growth >> 20} MiB in the second half")
        report = {"minutes": round(seconds / 60, 1), "threads": self.threads, "seed": self.seed, **self.count, "wrong": len(self.wrong),
                  "MiB": {"first half": max(memory[: half or 1]) >> 20, "second half": max(memory[half:]) >> 20},
                  "counters": {n: v for n, v in during.items() if v}, "complaints": complaints}  # fmt: skip
        print(json.dumps(report, indent=1))
        return not complaints and not self.wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if Soak(60 * args.minutes, args.threads, args.seed, Path(folder)).run() else 1


if __name__ == "__main__":
    sys.exit(main())
