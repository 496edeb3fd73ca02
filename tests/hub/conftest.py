"""The Hub on localhost and the processes that talk to it are those of the tests of publishing."""

from tests.publish.conftest import client, hub, parent, server

__all__ = ["client", "hub", "parent", "server"]
