"""Two servers that say what a test tells them to say."""

import pytest

from tests.support.odd_server import OddServer


@pytest.fixture
def odd():
    server = OddServer()
    yield server
    server.close()


@pytest.fixture
def other():
    server = OddServer()
    yield server
    server.close()
