"""Client of `examples/http` and `examples/ray`: the sampler runs here, each step of the model there."""

import time

import requests
from examples.denoiser import pack, unpack


class Client:
    """Talks to the server at `url`. Not for several threads at once: give each its own."""

    def __init__(self, url, timeout=600):
        self.url, self.timeout = url, timeout
        self.http = requests.Session()
        # Steps that the server turned away, and that were sent again.
        self.retries = 0
        # Headers of the last answer.
        self.headers = {}

    def step(self, request, feed, start=False, end=False, attempts=1000):
        """Outputs by name of the next step of the generation `request`, for inputs `feed` (arrays by name).

        A server that is busy, or was lost, is asked again: a step that came to no result left nothing behind. Raises
        RuntimeError with the server's words for any other refusal, or after so many `attempts`.
        """
        body = pack(feed)
        for attempt in range(attempts):
            try:
                answer = self.http.post(
                    f"{self.url}/step",
                    params={"start": int(start), "end": int(end)},
                    # Routers that keep a session on one replica read it from here.
                    headers={"x-session-id": str(request)},
                    data=body,
                    timeout=self.timeout,
                )
            except requests.ConnectionError:
                said = "the connection was lost"
            else:
                if answer.status_code == 200:
                    self.headers = answer.headers
                    return unpack(answer.content)
                said = f"{answer.status_code} {answer.text.strip()}"
                if answer.status_code not in (500, 502, 503, 504):
                    break
            self.retries += 1
            time.sleep(min(0.01 * (attempt + 1), 0.5))
        raise RuntimeError(f"step of request {request} at {self.url}: {said}")

    def stats(self):
        """The server's counters, with `rss`, its resident memory in bytes."""
        return self.http.get(f"{self.url}/stats", timeout=self.timeout).json()
