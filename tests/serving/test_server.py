from __future__ import annotations

import pytest

from serving.server import listen


def test_an_address_that_is_taken_is_an_error():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: "):
            listen("127.0.0.1", port)
