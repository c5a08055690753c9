"""A local network behind HTTP on loopback, for recipes and demonstrations of teachers behind an API."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from bdistil.data.loaders import indexed_loaders
from bdistil.storage.weights import load_weights, save_weights
from bdistil.teachers.http_endpoint import HttpEndpoint
from bdistil.teachers.training import TeacherSpec, TeacherTraining
from bdistil.teachers.wrappers import run_teacher
from bdistil.utils.paths import user_path
from bdistil.utils.seeding import reseed


class ModelServer(ThreadingHTTPServer):
    """Serves a function on 127.0.0.1 in a thread, in the format of `HttpEndpoint`.

    Args:
        answer: maps a batch, float32 (B, ...) in NumPy, to B answers in nested lists.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[np.ndarray], Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self.server_port}/predict"

    def stop(self) -> None:
        """Stops serving and frees the port."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ModelServer

    def log_message(self, *args: Any) -> None:
        """Logs nothing."""

    def do_POST(self) -> None:
        """Answers one batch."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            batch = np.asarray(json.loads(body)["instances"], dtype=np.float32)
            status, content = 200, {"predictions": self.server.answer(batch)}
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            status, content = 400, {"error": type(error).__name__}
        reply = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)


class LocalApi:
    """A network behind a real HTTP server on loopback, trained at the first request if it has no weights.

    Pass it to `ApiTeacher` instead of an `HttpEndpoint`; the caller has access to the answers only.

    Args:
        network: maps x to logits (B, L).
        checkpoint: file of the weights; if it is missing, the network is trained and saved there. Recorded answers
            are keyed by its path: use another file for other weights.
        data: training and validation data.
        answers: kind of answers, as for `ApiTeacher`.
        epochs: number of training epochs.
        lr: learning rate of the training.
        seed: seed of the training.
    """

    def __init__(
        self,
        network: nn.Module,
        checkpoint: str,
        data: pl.LightningDataModule,
        answers: Literal["logits", "probabilities", "labels"] = "probabilities",
        epochs: int = 15,
        lr: float = 3e-3,
        seed: int = 0,
    ) -> None:
        self.network, self.data, self.answers = network, data, answers
        self.checkpoint = user_path(checkpoint, "checkpoint")
        self.epochs, self.lr, self.seed = epochs, lr, seed
        self._ask: HttpEndpoint | None = None

    @property
    def name(self) -> str:
        """Identifies its answers among those of other networks; the same in every start, even before training."""
        training = f"seed {self.seed}, {self.epochs} epochs, lr {self.lr:g}"
        return f"local {type(self.network).__name__} in {self.checkpoint}, {training}"

    def __call__(self, batch: np.ndarray) -> Any:
        """Answers to a batch (B, ...), over HTTP."""
        if self._ask is None:
            self._load()
            server = ModelServer(self._answer)
            weakref.finalize(self, server.stop)
            self._ask = HttpEndpoint(server.url)
        return self._ask(batch)

    def _load(self) -> None:
        if not self.checkpoint.is_file():
            rank_zero_info(f"Training the network behind the API (max_epochs={self.epochs}) …")
            reseed(self.seed, "network behind the API")
            trainer = pl.Trainer(
                max_epochs=self.epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            with indexed_loaders(self.data, self.seed):  # TeacherTraining reads (x, y, index)
                trainer.fit(TeacherTraining(TeacherSpec(self.network, epochs=self.epochs, lr=self.lr)), self.data)
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            save_weights(self.network, self.checkpoint)
        load_weights(self.network, self.checkpoint, "checkpoint of LocalApi")
        self.network.requires_grad_(False).cpu().eval()

    @torch.no_grad()
    def _answer(self, batch: np.ndarray) -> Any:
        logits = run_teacher(self.network, torch.from_numpy(batch)).float()
        if self.answers == "labels":
            return logits.argmax(-1).tolist()
        return (logits.softmax(-1) if self.answers == "probabilities" else logits).tolist()
