"""Errors as an OpenAI client reads them: ``{"error": {message, type, param, code}}`` and a status."""

from __future__ import annotations

from typing import Any

from omni_ray.types.errors import RequestError


class ApiError(RequestError):
    """A request that is answered with an error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.status, str(self), self.param, self.code, self.headers)

    @property
    def body(self) -> dict[str, Any]:
        """The error body."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param, code=code)


def _again(status: int, message: str, param: str | None, code: str | None, headers: dict[str, str]) -> ApiError:
    """The same error in another process."""
    return ApiError(status, message, param=param, code=code, headers=headers)


def busy(why: str) -> ApiError:
    """The 429."""
    return ApiError(429, f"{why}; try again in a second", code="rate_limit_exceeded", headers={"retry-after": "1"})
