"""A real HTTP server on loopback that answers like a model, and misbehaves when told to."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch

OUTPUTS, FEATURES = 4, 6
WEIGHTS = np.random.default_rng(0).normal(size=(FEATURES, OUTPUTS)).astype(np.float32)
SECRET = "s3cret-body-text"


def inputs(count, seed=0):
    """Samples (count, FEATURES)."""
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))


def logits_of(batch):
    """What the model says of a batch (B, FEATURES)."""
    return np.asarray(batch, np.float32).reshape(len(batch), -1)[:, :FEATURES] @ WEIGHTS


def probabilities_of(batch):
    logits = logits_of(batch)
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


class Api(ThreadingHTTPServer):
    """Counts what it answers. `faults` are taken one a request, oldest first; None is none."""

    daemon_threads = True

    def __init__(self, answer=logits_of):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.faults, self.requests, self.samples, self.keys = answer, [], [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1/models/toy:predict"

    @property
    def answered(self):
        """Samples that were answered, each as its bytes."""
        return [np.asarray(x, np.float32).tobytes() for x in self.samples]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        api = self.server
        batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["instances"]
        api.requests.append(len(batch))
        api.keys.append(self.headers.get("Authorization"))
        fault = api.faults.pop(0) if api.faults else None
        if isinstance(fault, int):
            headers = {429: {"Retry-After": "0.01"}, 307: {"Location": self.path}}
            self._send(fault, {"error": SECRET}, headers.get(fault, {}))
            return
        if fault == "slow":
            time.sleep(0.6)
        if fault == "hang up":
            self.connection.close()
            return
        answers = api.answer(np.asarray(batch, np.float32)).tolist()
        if fault == "half":
            answers = answers[: len(answers) // 2]
        if fault == "one class less":
            answers = [row[:-1] for row in answers]
        if fault == "nan":
            answers[0][0] = float("nan")
        if fault == "words":
            answers = [SECRET] * len(answers)
        if fault == "no json":
            self._send(200, SECRET)
            return
        if fault is None:
            api.samples += batch
        self._send(200, {"predictions": answers})

    def _send(self, status, content, headers=()):
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client did not wait
            pass


@contextmanager
def serving(answer=logits_of):
    """A server in a thread of its own, for as long as the context is open."""
    api = Api(answer)
    thread = threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        api.shutdown()
        api.server_close()
        thread.join()
