"""A rewritten model on Ray Serve, every generation's steps on one replica: `python -m examples.ray.app MODEL --library LIB`.

The same protocol as `examples/http`. Affinity makes it fast, not right: a step that arrives where nothing is cached is
computed densely, and the replica goes on from there.
"""

import argparse
import asyncio
import os

from examples.denoiser import Denoiser
from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.responses import JSONResponse, PlainTextResponse, Response

# Strict: a busy replica's steps wait for it instead of going where nothing is cached.
affinity = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    request_router_kwargs={"num_fallback_replicas": 0},
)


@serve.deployment(max_ongoing_requests=16, request_router_config=affinity)
class Replica:
    """One session. `model` and `library` are paths on the replica's machine."""

    def __init__(self, model, library):
        self.denoiser = Denoiser(model, library)

    async def __call__(self, request):
        if request.url.path.endswith("/stats"):
            return JSONResponse(self.denoiser.stats() | {"pid": os.getpid()})
        try:
            whose = int(request.headers.get("x-session-id", 0))
        except ValueError:
            whose = 0
        if whose == 0:
            return PlainTextResponse("expected the header x-session-id with a number that is not 0", 400)
        flag = {name: request.query_params.get(name, "0") == "1" for name in ("start", "end")}
        body = await request.body()
        try:
            answer = await asyncio.to_thread(self.denoiser.step_bytes, whose, body, **flag)
        except Exception as error:
            return PlainTextResponse(str(error), 400)
        # Says where the step ran.
        return Response(answer, media_type="application/octet-stream", headers={"x-replica-pid": str(os.getpid())})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the rewritten model")
    parser.add_argument("--library", required=True, help="libditfastattn.so")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    app = Replica.options(num_replicas=arguments.replicas).bind(arguments.model, arguments.library)
    serve.run(app, blocking=True)


if __name__ == "__main__":
    main()
