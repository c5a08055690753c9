"""A model behind HTTP, as a callable; and what can go wrong on the way to it."""

from __future__ import annotations

import json
import os
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from bdistil.errors import RunError, UserError

# The server, or somebody on the way to it, says: not now.
NOT_NOW = {408, 425, 429, 500, 502, 503, 504}


class ApiUnavailableError(Exception):
    """The API gave no answer this time; asking again may help.

    Args:
        reason: without addresses, keys or contents.
        answered_nothing: the API itself said so, so that nothing was counted on its side.
        wait: seconds that it asked to wait.
    """

    def __init__(self, reason: str, *, answered_nothing: bool, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.answered_nothing, self.wait = reason, answered_nothing, wait


class ApiRefusedError(RunError):
    """The API refuses to answer; asking again does not help.

    Args:
        message: without addresses, keys or contents.
        answered_nothing: the API itself said so, so that nothing was counted on its side.
    """

    def __init__(self, message: str, *, answered_nothing: bool) -> None:
        super().__init__(message)
        self.answered_nothing = answered_nothing


class HttpEndpoint:
    """POSTs a batch as JSON and gives what comes back, in the form of TensorFlow Serving's REST interface.

    `{"instances": [x, …]}` is sent, x nested lists in the shape of a sample, and `{"predictions": [answer, …]}` is
    expected. No key, address, or content of a response is ever put into a message.

    Args:
        url: http or https, without user, password or query: it stands in config.yaml, which is no place for secrets.
        key_env: NAME of the environment variable that holds the key; None where the API asks for none.
        key_header: of the request, that carries the key.
        key_prefix: before the key in that header.
        timeout: seconds until a connection, and between two parts of an answer.
        request_field: of the JSON that is sent.
        response_field: of the JSON that is expected.

    Raises:
        UserError: the address is none, or carries a secret; the environment variable is not set.
    """

    def __init__(
        self,
        url: str,
        key_env: str | None = None,
        key_header: str = "Authorization",
        key_prefix: str = "Bearer ",
        timeout: float = 30.0,
        request_field: str = "instances",
        response_field: str = "predictions",
    ) -> None:
        _check_url(url)
        if timeout <= 0:
            raise UserError(f"Expected `timeout` of an HttpEndpoint to be > 0 seconds, got {timeout}.")
        self.url, self.timeout = url, timeout
        self.key_env, self.key_header, self.key_prefix = key_env, key_header, key_prefix
        self.request_field, self.response_field = request_field, response_field
        self._headers()

    @property
    def name(self) -> str:
        """What identifies the API by default."""
        return self.url

    def _headers(self) -> dict[str, str]:
        """Read when they are needed: the key is kept in no object, so no dump of one shows it."""
        if self.key_env is None:
            return {}
        key = os.environ.get(self.key_env, "")
        if not key or not key.isprintable() or not key.isascii():
            raise UserError(
                f"Expected the environment variable {self.key_env} (`key_env`) to hold the key of the API, one line of "
                "ASCII, but it is not set or not such a line."
            )
        return {self.key_header: self.key_prefix + key}

    def __call__(self, batch: np.ndarray) -> Any:
        """Answers of a batch (B, ...): as parsed from JSON, unchecked.

        Raises:
            ApiUnavailableError: asking again may help.
            ApiRefusedError: it does not.
        """
        body = json.dumps({self.request_field: batch.tolist()}).encode()
        status, wait, content, failure = self._post(body)
        if failure:  # raised here: the client's own exception names the address, and would hang on to this one
            raise ApiUnavailableError(failure, answered_nothing=False)
        if status in NOT_NOW:
            raise ApiUnavailableError(f"HTTP status {status}", answered_nothing=True, wait=wait)
        if status != 200:
            hint = f" Is the key in {self.key_env} right?" if status in (401, 403) and self.key_env else ""
            message = f"The API refused with HTTP status {status}.{hint} Every answer before it is kept."
            raise ApiRefusedError(message, answered_nothing=True)
        return self._read(content)

    def _post(self, body: bytes) -> tuple[int, float, bytes, str]:
        """(status, seconds to wait, content, what failed on the way)."""
        import requests

        headers = {"Content-Type": "application/json", **self._headers()}
        try:
            # No redirects: the key is for this address. No ~/.netrc either.
            with requests.Session() as session:
                session.auth = _as_it_is
                answer = session.post(self.url, data=body, headers=headers, timeout=self.timeout, allow_redirects=False)
                return answer.status_code, _seconds(answer.headers.get("Retry-After")), answer.content, ""
        except requests.exceptions.RequestException as error:
            return 0, 0.0, b"", type(error).__name__

    def _read(self, content: bytes) -> Any:
        try:
            return json.loads(content)[self.response_field]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            pass  # the exception holds what came
        raise ApiRefusedError(
            f"Expected the API to answer with JSON that has the field {self.response_field!r} (`response_field`), got "
            f"{len(content)} bytes that have not. Every answer before it is kept.",
            answered_nothing=False,
        )


def _as_it_is(request: Any) -> Any:
    return request


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        whole, secret = parts.scheme in ("http", "https") and bool(parts.hostname), "@" in parts.netloc
        secret = secret or bool(parts.query or parts.fragment)
    except ValueError:
        whole, secret = False, False
    if secret:  # not repeated here
        raise UserError(
            "Expected `url` of an HttpEndpoint without user, password, query or fragment, as it is written to "
            "config.yaml and reports. Put the key into an environment variable and give its name as `key_env`."
        )
    if not whole:
        raise UserError("Expected `url` of an HttpEndpoint to be like https://host/path, got something else.")


def _seconds(text: str | None) -> float:
    """Of a Retry-After header; a date, or nothing that is understood, is 0."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0


class Pace:
    """Holds samples back to a rate, in one process.

    Args:
        rate: samples a second; None is as fast as it goes.
    """

    def __init__(self, rate: float | None) -> None:
        self.rate, self._free = rate, 0.0

    def wait(self, samples: int) -> None:
        """Waits until so many more samples may go out."""
        if self.rate is not None:
            now = time.monotonic()
            time.sleep(max(0.0, self._free - now))
            self._free = max(now, self._free) + samples / self.rate
