"""A server that a process of W&B takes for its own: keeps the rows of each run, and says what it has of one.

It answers what wandb 0.2x and 0.3x ask to start, go on with, fill and end a run; files are taken and thrown away,
artifacts are refused.
"""

import gzip
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Rows of the history of runs by id. After `gone()` nobody answers; with `refuses` no row is taken."""

    def __init__(self, runs=None):
        self.runs, self.refuses = {} if runs is None else runs, False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                found = json.dumps(server.answer(self.path, body)).encode()
                self.send_response(403 if server.refuses and self.path.endswith("/file_stream") else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(found)))
                self.end_headers()
                self.wfile.write(found)

            do_PUT = do_POST  # noqa: N815

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def gone(self):
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()

    def answer(self, path, body):
        if path == "/graphql":
            asked = json.loads(body)
            if "createArtifact" in asked["query"]:
                return {"data": None, "errors": [{"message": "this server takes no artifacts"}]}
            return {"data": self.data(asked["query"], asked.get("variables") or {})}
        if path.endswith("/file_stream") and not self.refuses:
            self.take(path.split("/")[-2], json.loads(body))
        return {}

    def take(self, run, sent):
        part = (sent.get("files") or {}).get("wandb-history.jsonl")
        if part:  # a line has its number, and what is sent twice has it again
            rows = self.runs[run]
            rows[part["offset"] : part["offset"] + len(part["content"])] = map(json.loads, part["content"])

    def data(self, query, values):
        kind = re.search(r"\b(model|upsertBucket|createRunFiles|serverInfo)\(?", query)
        kind = kind and kind[1]
        if kind == "model":
            return {"model": {"id": "p", "name": "bdistil", "entity": {"id": "e", "name": "me"},
                              "bucket": self.bucket(values["name"])}}  # fmt: skip
        if kind == "upsertBucket":
            new = values["name"] not in self.runs
            self.runs.setdefault(values["name"], [])
            project = {"id": "p", "name": "bdistil", "entity": {"id": "e", "name": "me"}}
            bucket = {**self.bucket(values["name"]), "project": project, "sweepName": None}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if kind == "createRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/files/{name}"} for name in values["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"serverInfo": {"features": []}}

    def bucket(self, run):
        """What a start that goes on with a run is told of it, or nothing."""
        if run not in self.runs:
            return None
        tail = json.dumps([json.dumps(row) for row in self.runs[run][-1:]])
        return {"id": "r", "name": run, "displayName": run, "description": "", "config": "{}", "historyTail": tail,
                "historyLineCount": len(self.runs[run]), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]",
                "summaryMetrics": json.dumps(self.runs[run][-1] if self.runs[run] else {}), "tags": [], "notes": "",
                "wandbConfig": json.dumps({"t": 1})}  # fmt: skip


@contextmanager
def serving(runs=None):
    server = Server(runs)
    try:
        yield server
    finally:
        server.gone()
