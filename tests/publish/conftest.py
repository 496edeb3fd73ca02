from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.publish.client import READ_TOKEN, TOKEN, Client, running_client
from tests.support.publish.hub_server import running_hub
from tests.support.publish.hub_state import Hub


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.users = {TOKEN: ("someone", "write"), READ_TOKEN: ("reader", "read")}
        yield hub


@pytest.fixture(scope="module")
def parent(server: Hub, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Client]:
    modules = getattr(request.module, "IMPORTED_ONCE", ())
    with running_client(server.url, tmp_path_factory.mktemp("client"), *modules) as client:
        yield client
        assert not [text for text in client.seen if TOKEN in text or READ_TOKEN in text], "a token was printed"


@pytest.fixture
def hub(server: Hub) -> Iterator[Hub]:
    """The server, with what a test left behind put away."""
    yield server
    server.repos.clear()
    server.faults.clear()
    server.log.clear()
    server.sent.clear()
    server.before = server.after = lambda line: None
    server.corrupts = lambda path, entry: entry
    server.down.bytes_per_second = server.up.bytes_per_second = None
    server.discards = False


@pytest.fixture
def client(parent: Client, hub: Hub) -> Client:
    return parent


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder as small as it can be: large files in one and in several parts, small ones, a folder, a hidden one."""
    root = tmp_path / "out"
    contents = {
        "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
        "model-00002-of-00002.safetensors": bytes(range(255, -1, -1)) * 10,
        "tokenizer.json": b"t" * 1500,
        "config.json": b'{"model_type": "minimax_m2"}',
        "README.md": b"---\nlicense: other\n---\n# a card\n",
        "chat_template.jinja": b"{{ messages }}",
        "empty.txt": b"",
        "m3quant-report/index.html": b"<p>report</p>",
        ".eval_results/wikitext.yaml": b"- value: 1\n",
    }
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root
