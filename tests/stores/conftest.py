"""Object stores on localhost, and processes that read from them through the real s3fs and gcsfs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest

from tests.support.publish.client import Client, running_client
from tests.support.stores.gs_server import running_gs
from tests.support.stores.objects import Objects
from tests.support.stores.s3_server import running_s3

RUNNING = {"s3": running_s3, "gs": running_gs}


@pytest.fixture(scope="module", params=list(RUNNING))
def server(request: pytest.FixtureRequest) -> Iterator[Objects]:
    with RUNNING[request.param]() as store, mock.patch.dict(os.environ, store.environment):
        yield store


@pytest.fixture(scope="module")
def client(
    server: Objects, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Client]:
    modules = getattr(request.module, "IMPORTED_ONCE", ())
    with running_client("http://127.0.0.1:9", tmp_path_factory.mktemp("client"), *modules) as found:
        yield found


@pytest.fixture
def store(server: Objects) -> Iterator[Objects]:
    yield server
    server.faults.clear()
    server.sent.clear()
    server.before = lambda line: None
