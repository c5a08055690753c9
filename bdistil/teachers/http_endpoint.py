"""A model behind HTTP as a callable, and its errors."""

from __future__ import annotations

import json
import os
import socket
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from bdistil.errors import RunError, UserError

# Errors from the user's own file access, which are OSErrors like connection errors.
OF_FILES = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


class ApiUnavailableError(Exception):
    """The API did not answer; a retry may help. Functions of the user may raise it.

    Args:
        reason: text without addresses, keys or contents.
        answered_nothing: whether the API itself reported the failure, or was not reached, so that it counted no query.
        wait: seconds to wait, from its Retry-After header.
    """

    def __init__(self, reason: str, *, answered_nothing: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.answered_nothing, self.wait = reason, answered_nothing, wait


class ApiRefusedError(RunError):
    """The API refuses to answer; a retry does not help.

    Args:
        message: text without addresses, keys or contents.
        answered_nothing: whether the API itself reported the failure, so that it counted no query.
    """

    def __init__(self, message: str, *, answered_nothing: bool) -> None:
        super().__init__(message)
        self.answered_nothing = answered_nothing


def is_temporary(status: int) -> bool:
    """Whether a request may be retried after an HTTP status of a server or a proxy, see docs/mekd.md.

    >>> [status for status in (404, 429, 500, 501, 505, 529) if is_temporary(status)]
    [429, 500, 529]
    """
    return status in (408, 425, 429) or (500 <= status < 600 and status not in (501, 505))


def status_error(status: int, headers: Any = None, hint: str = "") -> ApiUnavailableError | ApiRefusedError:
    """The error for an unsuccessful HTTP status."""
    if is_temporary(status):
        wait = _seconds(headers.get("Retry-After") if hasattr(headers, "get") else None)
        return ApiUnavailableError(f"HTTP status {status}", answered_nothing=True, wait=wait)
    message = f"The API refused with HTTP status {status}.{hint} Every answer before it is kept."
    return ApiRefusedError(message, answered_nothing=True)


def as_api_error(error: Exception) -> ApiUnavailableError | ApiRefusedError | None:
    """Converts an error from the user's function to an API error; None if the function itself failed.

    An HTTP status is read from `requests`, `urllib`, `httpx` and clients built on them. An OSError, such as those of
    sockets, `requests` and `urllib`, means that no answer came.
    """
    if isinstance(error, ApiUnavailableError | ApiRefusedError):
        return error
    response = getattr(error, "response", None)
    places = ((response, "status_code"), (error, "status_code"), (error, "code"))
    codes = [code for place, name in places if isinstance(code := getattr(place, name, None), int)]
    if codes and 400 <= codes[0] < 600:
        return status_error(codes[0], getattr(error if response is None else response, "headers", None))
    if isinstance(error, OSError | HTTPException) and not isinstance(error, (ValueError, *OF_FILES)):
        return ApiUnavailableError(type(error).__name__)
    return None


class HttpEndpoint:
    """Sends a batch as JSON by POST, in the format of TensorFlow Serving's REST interface.

    `{"instances": [x, …]}` is sent, x nested lists in the shape of a sample, and `{"predictions": [answer, …]}` is
    expected. No key, address, or content of a response is ever put into a message.

    Args:
        url: http or https, without user, password or query, as it is written to config.yaml.
        key_env: name of the environment variable with the key; None for an API without one.
        key_header: header of the request that carries the key.
        key_prefix: text before the key in that header.
        timeout: seconds for the connection, and between two parts of a response.
        request_field: field of the JSON that is sent.
        response_field: field of the JSON that is expected.

    Raises:
        UserError: `url` is not an address, or contains a secret; the environment variable is not set.
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
        self.name = url  # default identity of the API
        self.key_env, self.key_header, self.key_prefix = key_env, key_header, key_prefix
        self.request_field, self.response_field = request_field, response_field
        self._headers()

    def _headers(self) -> dict[str, str]:
        """Reads the key at each request: no object keeps it, so no dump shows it."""
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
        """Answers to a batch (B, ...), as parsed from JSON, unchecked.

        Raises:
            ApiUnavailableError: a retry may help.
            ApiRefusedError: a retry does not help.
        """
        body = json.dumps({self.request_field: batch.tolist()}).encode()
        response = self._post(body)
        if isinstance(response, ApiUnavailableError):  # outside `except`, so that no chained error shows the address
            raise response
        status = response.status_code
        if status != 200:
            hint = f" Is the key in {self.key_env} right?" if status in (401, 403) and self.key_env else ""
            raise status_error(status, response.headers, hint)
        return self._read(response.content)

    def _post(self, body: bytes) -> Any:
        """The response, or the error of the connection."""
        import requests

        headers = {"Content-Type": "application/json", **self._headers()}
        try:
            # No redirects: the key is for this address. No ~/.netrc either.
            with requests.Session() as session:
                session.auth = lambda request: request
                return session.post(self.url, data=body, headers=headers, timeout=self.timeout, allow_redirects=False)
        except requests.exceptions.RequestException as error:
            return ApiUnavailableError(type(error).__name__, answered_nothing=_is_unreached(error))

    def _read(self, content: bytes) -> Any:
        try:
            return json.loads(content)[self.response_field]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            pass  # the exception contains the response
        raise ApiRefusedError(
            f"Expected the API to answer with JSON that has the field {self.response_field!r} (`response_field`), got "
            f"{len(content)} bytes without it. Every answer before it is kept.",
            answered_nothing=False,
        )


def _is_unreached(error: BaseException | None) -> bool:
    """Whether the connection was refused or its host is unknown, so that nothing was sent."""
    while error is not None and not isinstance(error, ConnectionRefusedError | socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if "@" in parts.netloc or parts.query or parts.fragment:  # the message does not repeat them
        raise UserError(
            "Expected `url` of an HttpEndpoint without user, password, query or fragment, as it is written to "
            "config.yaml and reports. Put the key into an environment variable and give its name as `key_env`."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("Expected `url` of an HttpEndpoint to be like https://host/path, got something else.")


def _seconds(text: str | None) -> float:
    """Seconds of a Retry-After header; 0 for a date or anything else."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
