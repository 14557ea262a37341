"""A minimal HTTP server for a rewritten model: `python -m examples.http.server MODEL --library libditfastattn.so`.

    POST /step?start=0&end=0    header x-session-id: whose generation (an int, not 0); body and answer: .npz
    GET  /stats                 the library's counters and the process's resident memory as JSON
"""

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from examples.denoiser import Denoiser
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route


def resident():
    """Bytes of memory that the process occupies (Linux)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def application(denoiser, workers, queue):
    """At most `workers` steps run at a time, and `queue` wait; what comes beyond is answered 503."""
    pool = ThreadPoolExecutor(workers)
    waiting = 0

    async def step(request):
        nonlocal waiting
        try:
            whose = int(request.headers.get("x-session-id", 0))
        except ValueError:
            whose = 0
        if whose == 0:
            return PlainTextResponse("expected the header x-session-id with a number that is not 0", 400)
        if waiting >= workers + queue:
            return PlainTextResponse("busy", 503)
        flag = {name: request.query_params.get(name, "0") == "1" for name in ("start", "end")}
        waiting += 1
        try:
            body = await request.body()
            run = asyncio.get_running_loop().run_in_executor
            answer = await run(pool, lambda: denoiser.step_bytes(whose, body, **flag))
        except Exception as error:
            return PlainTextResponse(str(error), 400)
        finally:
            waiting -= 1
        return Response(answer, media_type="application/octet-stream")

    async def stats(_):
        return JSONResponse(denoiser.stats() | {"rss": resident()})

    return Starlette(routes=[Route("/step", step, methods=["POST"]), Route("/stats", stats)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the rewritten model")
    parser.add_argument("--library", required=True, help="libditfastattn.so")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one; which one is printed")
    parser.add_argument("--workers", type=int, default=2, help="steps that run at a time")
    parser.add_argument("--queue", type=int, default=64, help="steps that wait beyond those; more are answered 503")
    arguments = parser.parse_args()
    denoiser = Denoiser(arguments.model, arguments.library)
    app = application(denoiser, arguments.workers, arguments.queue)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, access_log=False)


if __name__ == "__main__":
    main()
