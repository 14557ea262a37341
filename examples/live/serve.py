"""A page that draws digits step by step, dense and under a plan, side by side.

    pip install ditfastattn[cpu]
    python examples/live/serve.py            # then open http://127.0.0.1:8123

Local only: it binds to 127.0.0.1 and has no authentication. --port 0 takes any free port.
"""

import argparse
import json
import signal
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from drawing import DIGITS, Studio

HERE = Path(__file__).resolve().parent
FILES = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/page.css": ("page.css", "text/css")}


class Handler(BaseHTTPRequestHandler):
    """Three files, `/plans` (JSON), and `/draw?plan=NAME&seed=N`: an event per step as server-sent events."""

    studio: Studio

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path in FILES:
            name, kind = FILES[url.path]
            self._answer((HERE / name).read_bytes(), kind)
        elif url.path == "/plans":
            self._answer(json.dumps(self.studio.plans).encode(), "application/json")
        elif url.path == "/draw":
            self._draw(parse_qs(url.query))
        else:
            self.send_error(HTTPStatus.NOT_FOUND, f"no {url.path} here: expected /, /plans or /draw")

    def _answer(self, body, kind):
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _draw(self, query):
        plan, seed = query.get("plan", [""])[0], query.get("seed", ["0"])[0]
        if plan not in self.studio.plans:
            self.send_error(HTTPStatus.BAD_REQUEST, f"no plan {plan!r}: expected one of {', '.join(self.studio.plans)}")
            return
        if not seed.isascii() or not seed.isdigit():
            self.send_error(HTTPStatus.BAD_REQUEST, f"seed is {seed!r}: expected a whole number from 0")
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        try:
            for event in self.studio.draw(plan, int(seed)):
                self._event("step", event)
            self._event("done", {})
        except (BrokenPipeError, ConnectionResetError):
            pass  # The window was closed: the generation is abandoned, and its caches are the next to make room.
        except Exception as error:
            self._event("failed", {"message": str(error)})
            raise

    def _event(self, name, data):
        self.wfile.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; default: it chooses")
    parser.add_argument("--plan", type=Path, action="append", help="a plan for the digits model; may be repeated; default: those of examples/digits")
    args = parser.parse_args()
    plans = args.plan or [*sorted((DIGITS / "plans").glob("*.json")), DIGITS / "plan.json"]
    missing = [str(path) for path in plans if not path.is_file()]
    if missing:
        parser.error(f"no plan at {', '.join(missing)}")
    Handler.studio = Studio(plans, args.threads)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except OSError as error:
        parser.error(f"port {args.port} cannot be used ({error.strerror}); --port 0 takes any free one")
    # Not daemons: a thread that is inside ONNX Runtime when the process ends brings it down with an error.
    server.daemon_threads = False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        Handler.studio.closed.set()
        server.server_close()


if __name__ == "__main__":
    main()
