"""What every client of a service does alike: it connects, and reads an answer in its form."""

from __future__ import annotations

import functools
import ssl
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0
CONNECT_S = 5.0

Form = TypeVar("Form", bound=BaseModel)


@functools.cache
def trusted() -> ssl.SSLContext:
    """The authorities that every client of this process trusts; reading them takes 50 ms."""
    return httpx.create_ssl_context()


def connect(url: str, *, api_key: str, transport: httpx.BaseTransport | None) -> httpx.Client:
    """A client without a limit of its own to what is under way at once.

    Args:
        api_key: that the service asks for; "" sends none.
        transport: in place of the network, in tests.
    """
    return httpx.Client(
        base_url=url,
        headers={"authorization": f"Bearer {api_key}"} if api_key else {},
        limits=httpx.Limits(max_connections=None),
        verify=trusted(),
        transport=transport,
    )


def read_form(form: type[Form], answer: httpx.Response, url: str, *, service: str) -> Form:
    """An answer in the form that it should have.

    Args:
        service: what should be there, such as "scoring service".

    Raises:
        RuntimeError: if it has another.
    """
    try:
        return form.model_validate_json(answer.content)
    except ValidationError as error:
        raise RuntimeError(
            f"{url}: status {answer.status_code} with something that is no {form.__name__}; is it "
            f"a {service} of this release?"
        ) from error
