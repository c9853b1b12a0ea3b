"""Errors of requests in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from cyb_jax.errors import InputError


class ApiError(Exception):
  """A request that is refused.

  Args:
    message: one line that names the field, its value, and what is accepted.
    status: the HTTP status.
    param: the field of the request, if there is one.
    code: OpenAI's code of the error, if there is one.
    kind: OpenAI's type of the error.
  """

  def __init__(
    self,
    message: str,
    *,
    status: int = 400,
    param: str | None = None,
    code: str | None = None,
    kind: str = "invalid_request_error",
  ):
    super().__init__(message)
    self.status = status
    self._described = {"message": message, "type": kind, "param": param, "code": code}

  @property
  def body(self) -> dict[str, Any]:
    """The JSON object of the answer."""
    return {"error": self._described}

  def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer."""
    return JSONResponse(self.body, self.status, headers)


def of_input(error: InputError) -> ApiError:
  """The error for bad input; its field is the word before the colon of the message."""
  field, colon, _ = str(error).partition(":")
  return ApiError(str(error), param=field if colon and field.isidentifier() else None)


def server_error(message: str, status: int = 500) -> ApiError:
  """An error that the request has not caused."""
  return ApiError(message, status=status, kind="server_error")
