"""Load over HTTP: many generations at once against examples/http, with cancels, lost connections, restarts and retries.

Every image that was finished must equal the solo run bit for bit, the library's counters must add up to what the clients did,
and the server's memory must stay where it was. Run by `scripts/load-test`, and shortly by `test_load.py`.
"""

import argparse
import datetime
import itertools
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import requests
from conftest import LAYERS, LIBRARY, ROOT, STEPS, Alone, generate
from examples.client import Client
from examples.denoiser import pack

# Distinct images; what the clients draw are these, again and again.
SEEDS = 16
# What a client does with an image before it draws it to the end, and how often in a hundred.
MISHAPS = {"cancelled": 15, "disconnected": 10, "restarted": 10}


class Server:
    """`examples/http` in a process of its own."""

    def __init__(self, model, log, queue, idle_seconds):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "examples.http.server", model, "--library", LIBRARY, "--port", port, "--queue", queue]
        environment = os.environ | {"DITFASTATTN_IDLE_SECONDS": str(idle_seconds)}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        for _ in range(3000):
            if self.process.poll() is not None:
                break
            try:
                Client(self.url).stats()
                return
            except requests.ConnectionError:
                time.sleep(0.1)
        raise RuntimeError(f"the server did not come up:\n{log.read_text()[-2000:]}")

    def stop(self):
        self.process.terminate()
        self.process.wait()


class Cancelled(Exception):
    """The client gave this attempt up."""


class Load:
    """What all clients share: the images still to be drawn, and what happened."""

    def __init__(self, url, images, minutes):
        self.url = url
        self.ids = itertools.count(1)
        self.numbers = itertools.count()
        self.images = images
        self.deadline = time.monotonic() + 60 * minutes if minutes else None
        self.lock = threading.Lock()
        self.done = Counter()
        self.seconds = []
        self.memory = []
        self.wrong = []

    def next_image(self):
        """The number of the next image, or None when it is enough."""
        number = next(self.numbers)
        if self.deadline is None:
            return number if number < self.images else None
        return number if time.monotonic() < self.deadline else None

    def count(self, **events):
        with self.lock:
            self.done.update(events)

    def client(self, expected):
        """Draws images until it is enough."""
        client = Client(self.url)
        while (number := self.next_image()) is not None:
            image = self.draw(client, number)
            self.count(images=1)
            if not np.array_equal(image, expected[number % SEEDS]):
                with self.lock:
                    self.wrong.append(number)
            if number % 16 == 0:
                with self.lock:
                    self.memory.append(client.stats()["rss"])
        self.count(retries=client.retries)

    def draw(self, client, number):
        """One image, after the mishaps that its number brings with it."""
        dice = random.Random(number)
        mishaps = [what for what, share in MISHAPS.items() if dice.randrange(100) < share]
        request = next(self.ids)
        for what in mishaps:
            try:
                generate(number % SEEDS, self.stepper(client, request, dice, until=dice.randrange(1, STEPS), what=what))
            except Cancelled:
                self.count(**{what: 1})
            # A new attempt is a new request, unless it says that it starts over.
            if what != "restarted":
                request = next(self.ids)
        return generate(number % SEEDS, self.stepper(client, request, dice))

    def stepper(self, client, request, dice, until=STEPS, what=None):
        def step(number, feed):
            # Others get between two steps.
            time.sleep(dice.random() * 0.01)
            if number == until:
                if what == "disconnected":
                    self.disconnect(request, feed)
                raise Cancelled
            begun = time.monotonic()
            out = client.step(request, feed, start=number == 0, end=number == STEPS - 1)["out"]
            with self.lock:
                self.seconds.append(time.monotonic() - begun)
                self.done.update(steps=1, starts=number == 0)
            return out

        return step

    def disconnect(self, request, feed):
        """Sends a step and goes away without waiting for its answer."""
        body = pack(feed)
        host, port = self.url.removeprefix("http://").split(":")
        head = f"POST /step HTTP/1.1\r\nHost: {host}\r\nx-session-id: {request}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)


def check(load, stats):
    """What does not hold, in words; nothing if all is well."""
    done = load.done
    abandoned = done["cancelled"] + done["disconnected"]
    reclaimed = stats["live_requests"] + stats["idle_reclaims"] + stats["evictions"]
    layers = stats["layers_full"] + stats["layers_window"] + stats["layers_reused"]
    # The first sample is the server before its allocators and pools are warm.
    settled, last = load.memory[1 : len(load.memory) // 2 + 1], load.memory[-1]
    claims = {
        f"images {load.wrong[:10]} differ from the solo run": not load.wrong,
        "the library ran other steps than the clients asked for": done["steps"]
        <= stats["steps"]
        <= done["steps"] + done["disconnected"],
        "other generations began than the clients started": stats["generations"] == done["starts"],
        "layers are not steps times layers": layers == stats["steps"] * LAYERS,
        "what was abandoned is neither live nor reclaimed": reclaimed == abandoned,
        "a step was not what the plan says": stats["misses"] + stats["recomputes"] + stats["dense_steps"] == 0,
        "requests met": stats["collisions"] + stats["contested"] + stats["aborted"] == 0,
        "runs are still in flight": stats["runs_in_flight"] == 0,
        f"resident memory went from {settled} to {last}": last <= 1.1 * max(settled) + stats["bytes"],
    }
    return [claim for claim, holds in claims.items() if not holds]


def run(folder, clients, images=None, minutes=None):
    """Runs the load; returns it, the counters at its end, and what does not hold."""
    alone = Alone(folder)
    expected = [alone.image(seed) for seed in range(SEEDS)]
    # Far fewer places than clients: some are turned away, and come again.
    queue = clients // 16
    # A long run sees what was abandoned reclaimed. A short one must not: it would depend on how fast the machine is.
    server = Server(alone.path, folder / "server.log", queue, idle_seconds=120 if minutes else 3600)
    try:
        load = Load(server.url, images, minutes)
        with ThreadPoolExecutor(clients) as pool:
            for client in [pool.submit(load.client, expected) for _ in range(clients)]:
                client.result()
        observer = Client(server.url)
        stats = observer.stats()
        while stats["runs_in_flight"]:
            stats = observer.stats()
        load.memory.append(stats["rss"])
    finally:
        server.stop()
    return load, stats, check(load, stats)


def report(load, stats, clients, seconds):
    """The figures as a Markdown table."""
    cpu = next(line.split(": ")[1].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name"))
    centiles = statistics.quantiles(load.seconds, n=100)
    done, mib = load.done, 1 << 20
    rows = {
        "date, machine": f"{datetime.date.today()}, {os.cpu_count()} cores of {cpu}",
        "versions": f"ONNX Runtime {ort.__version__}, Python {platform.python_version()}, library {stats['version']}",
        "clients at a time": clients,
        "duration": f"{seconds:.0f} s",
        "images drawn, all equal to the solo run": done["images"],
        "steps": f"{stats['steps']} ({stats['steps'] / seconds:.0f} per second)",
        "time of a step as a client sees it, retries included": f"median {centiles[49] * 1000:.0f} ms, 95 % below {centiles[94] * 1000:.0f} ms",
        "generations cancelled, disconnected within a step, restarted": f"{done['cancelled']}, {done['disconnected']}, {done['restarted']}",
        "steps turned away (503) and retried": done["retries"],
        "resident memory: first, highest, last": ", ".join(
            f"{m / mib:.0f} MiB" for m in (load.memory[0], max(load.memory), load.memory[-1])
        ),
        "cached at most, and at the end": f"{stats['peak_bytes'] / mib:.1f} MiB, {stats['bytes'] / mib:.1f} MiB",
        "requests live at the end, reclaimed idle": f"{stats['live_requests']}, {stats['idle_reclaims']}",
        "layers in full, windowed, reused": f"{stats['layers_full']}, {stats['layers_window']}, {stats['layers_reused']}",
        "misses, recomputes, collisions": f"{stats['misses']}, {stats['recomputes']}, {stats['collisions']}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def main():
    parser = argparse.ArgumentParser(description="Many concurrent generations over HTTP, each compared with its solo run.")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--images", type=int, default=640, help="how many images to draw")
    amount.add_argument("--minutes", type=float, help="draw images for so long instead")
    parser.add_argument("--clients", type=int, default=64, help="how many generations at a time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        load, stats, failures = run(Path(folder), arguments.clients, arguments.images, arguments.minutes)
        print(report(load, stats, arguments.clients, time.monotonic() - begun))
    for failure in failures:
        print(f"load-test: {failure}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
