"""Samples of every kind of secret, path, host and address that the scan must find, and of text that only looks like one.

Keys are made when a test runs, from parts, so that no scanner of this repository takes them for real.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import random
import string
import tarfile
import zipfile
import zlib
from collections.abc import Callable

_RANDOM = random.Random(11)
ALNUM = string.ascii_letters + string.digits
LOWER = string.ascii_lowercase + string.digits
HEX = "0123456789abcdef"


def text(count: int, alphabet: str = ALNUM) -> str:
    """Random characters, with a digit and a letter among them."""
    while True:
        found = "".join(_RANDOM.choice(alphabet) for _ in range(count))
        if any(c.isdigit() for c in found) and any(c.isalpha() for c in found):
            return found


def _secrets() -> dict[str, str]:
    b64 = base64.b64encode(_RANDOM.randbytes(64)).decode()
    begin, end = "-----" + "BEGIN ", "-----" + "END "
    return {
        "hugging face": "hf" + "_" + text(34),
        "hugging face oauth": "hf" + "_oauth_" + text(20) + "." + text(60),
        "kaggle file": '{"username":"me","k' + 'ey":"' + text(32, HEX) + '"}',
        "google hmac": "GOO" + "G1E" + text(57, string.ascii_uppercase + string.digits),
        "modelscope": "ms" + "-" + "-".join(text(n, HEX) for n in (8, 4, 4, 4, 12)),
        "sentry address": "https://" + text(32, HEX) + "@o1.ingest.sentry.example/4",
        "nats": "SU" + "A" + text(55, string.ascii_uppercase + "234567"),
        "openai": "sk" + "-proj-" + text(48),
        "anthropic": "sk" + "-ant-api03-" + text(80) + "-" + text(12),
        "groq": "gsk" + "_" + text(52),
        "xai": "xai" + "-" + text(80),
        "replicate": "r8" + "_" + text(37),
        "nvidia": "nvapi" + "-" + text(64),
        "langsmith": "lsv2" + "_pt_" + text(32, HEX) + "_" + text(10, HEX),
        "wandb, assigned": "WANDB_" + "API_KEY=" + text(40, HEX),
        "wandb, yaml": "wandb_" + "api_key: " + text(40, HEX),
        "wandb, new": "wandb" + "_v1_" + text(60),
        "aws key id": "AK" + "IA" + text(16, string.ascii_uppercase + "234567"),
        "aws secret": "aws_secret_" + "access_key = " + text(40),
        "aws session": "aws_session_" + "token=" + text(120),
        "github": "gh" + "p_" + text(36),
        "github, fine-grained": "github" + "_pat_" + text(22) + "_" + text(59),
        "gitlab": "gl" + "pat-" + text(20),
        "gitlab runner": "GR13" + "48941" + text(20),
        "slack": "xox" + "b-" + text(12, string.digits + "1a") + "-" + text(24),
        "slack webhook": "https://hooks." + "slack.com/services/T" + text(9) + "/B" + text(9) + "/" + text(24),
        "discord webhook": "https://discord.com/" + "api/webhooks/" + "1" + "23456789" * 2 + "/" + text(68),
        "telegram": "51234" + "56789:AA" + text(33),
        "google api": "AI" + "za" + text(35),
        "google oauth": "GOC" + "SPX-" + text(28),
        "google access token": "ya" + "29." + text(80),
        "google service account": '"private_key": "' + begin + "PRIVATE KEY-----\\n" + b64 + '\\n"',
        "stripe": "sk" + "_live_" + text(24),
        "stripe, restricted": "rk" + "_test_" + text(24),
        "stripe webhook": "wh" + "sec_" + text(32),
        "npm": "npm" + "_" + text(36),
        "npmrc": "//registry.example/:_auth" + "Token=" + text(36),
        "pypi": "py" + "pi-AgEIcHlwaS5vcmc" + text(80),
        "sendgrid": "S" + "G." + text(22) + "." + text(43),
        "mailgun": "key" + "-" + text(32, HEX),
        "mailchimp": text(32, HEX) + "-" + "us12",
        "twilio": "S" + "K" + text(32, HEX),
        "square": "sq0" + "csp-" + text(43),
        "shopify": "shp" + "at_" + text(32, HEX),
        "azure storage": "Default;Account" + "Key=" + base64.b64encode(_RANDOM.randbytes(64)).decode(),
        "azure sas": "https://x.blob.example/c?sv=2022&s" + "ig=" + text(43) + "%3D",
        "azure ad": text(3) + "8" + "Q~" + text(34),
        "vault": "hv" + "s." + text(90),
        "vault, old": "s" + "." + text(24),
        "digitalocean": "dop" + "_v1_" + text(64, HEX),
        "databricks": "da" + "pi" + text(32, HEX),
        "heroku": "HR" + "KU-" + text(60),
        "docker hub": "dckr" + "_pat_" + text(27),
        "docker config": '{"auths": {"r.example": {"au' + 'th": "' + base64.b64encode(f"me:{text(14)}".encode()).decode() + '"}}}',
        "rubygems": "ruby" + "gems_" + text(48, HEX),
        "terraform": text(14) + ".atlas" + "v1." + text(67),
        "grafana": "gl" + "sa_" + text(32) + "_" + text(8, HEX),
        "new relic": "NR" + "AK-" + text(27, string.ascii_uppercase + string.digits),
        "sentry": "sn" + "trys_" + text(100),
        "postman": "PM" + "AK-" + text(24, HEX) + "-" + text(34, HEX),
        "doppler": "d" + "p.pt." + text(43),
        "linear": "lin" + "_api_" + text(40),
        "notion": "nt" + "n_" + text(46),
        "atlassian": "ATA" + "TT3" + text(180),
        "tailscale": "ts" + "key-auth-" + text(12) + "-" + text(30),
        "alibaba": "LT" + "AI" + text(20),
        "runpod": "rp" + "a_" + text(44, string.ascii_uppercase + string.digits),
        "kaggle": '{"username": "me", "k' + 'ey_secret": "' + text(32, HEX) + '"}',
        "ssh key": begin + "OPENSSH PRIVATE KEY-----\n" + b64 + "\n" + end + "OPENSSH PRIVATE KEY-----",
        "rsa key": begin + "RSA PRIVATE KEY-----\n" + b64 + "\n",
        "encrypted rsa key": begin + "RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,AB12\n\n" + b64 + "\n",
        "pgp key, two headers": begin + "PGP PRIVATE KEY BLOCK-----\r\nVersion: GnuPG v2\r\nComment: a b: c\r\n\r\n" + b64 + "\n",
        "ssh2 key": "---- BEGIN SSH2 ENC" + "RYPTED PRIVATE KEY ----\nSubject: me\nComment: \"2048-bit rsa\"\n" + b64 + "\n",
        "pgp key": begin + "PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2\n\n" + b64 + "\n",
        "age key": "AGE-SECRET" + "-KEY-1" + text(58, string.ascii_uppercase + "0234567"),
        "putty key": "PuTTY-User-Key" + "-File-3: ssh-ed25519\nEncryption: none\nPrivate-Lines: 1\n" + b64,
        "json web token": "eyJ" + text(20) + ".eyJ" + text(30) + "." + text(30),
        "netrc": "machine api.example.com login me passw" + "ord " + text(20),
        "password in a url": "https://someone:" + text(12) + "@host.example/path",
        "redis url": "redis://:" + text(16) + "@cache.example:6379/0",
        "password, assigned": "db_pass" + "word = '" + text(14) + "'",
        "password, env": "export PG" + "PASSWORD=" + text(14),
        "client secret": '"client_' + 'secret": "' + text(32) + '"',
        "bearer": "Authorization: Bear" + "er " + text(40),
        "basic": "Authorization: Bas" + "ic " + base64.b64encode(f"me:{text(16)}".encode()).decode(),
        "curl": "curl -u " + "me:" + text(16) + " https://host.example",
        "option": "serve --api-" + "key " + text(24),
        "password hash": "$6" + "$" + text(16) + "$" + text(86),
        "bcrypt": "$2" + "b$12$" + text(53),
    }  # fmt: skip


SECRETS = _secrets()
PLACES = {
    "home": "/home/someone/models/m3",
    "root": "/root/m3/weights",
    "file url": "file:///home/someone/m3",
    "mount": "/mnt/disk1/m3",
    "mac": "/Users/someone/m3",
    "mac volume": "/Volumes/Work/m3",
    "mac temporary, short": "/var/folders/x1/y2/T/run",
    "mac temporary": "/private/var/folders/x1/y2/T/run",
    "temporary": "/tmp/run-1/out",
    "shared memory": "/dev/shm/weights-7",
    "runtime": "/run/user/1000/m3",
    "data": "/data/models/m3",
    "work": "/work/team/m3",
    "opt": "/opt/team/m3-models",
    "srv": "/srv/models/m3",
    "var": "/var/lib/team/m3",
    "scratch": "/scratch/someone/m3",
    "lustre": "/lustre/fsw/someone/m3",
    "nfs": "/nfs/team",
    "fsx": "/fsx/someone/m3",
    "raid": "/raid0/someone",
    "tilde": "~someone/models/m3",
    "colab": "/content/drive/MyDrive",
    "windows": "C:\\Users\\someone\\m3",
    "windows, slashes": "C:/Users/someone/m3",
    "windows, disk": "D:\\models\\m3",
    "windows, share": "\\\\nas-01\\models",
    "wsl": "\\\\wsl$\\Ubuntu",
    "wsl mount": "/mnt/c/Users/someone",
    "s3": "s3://team-bucket/m3/weights",
    "gs": "gs://team-bucket/m3",
    "hdfs": "hdfs://namenode:9000/m3",
    "internal host": "gpu-node-07.corp.internal",
    "ec2": "ip-10-1-2-3.ec2.internal",
    "local host": "http://nas.local:8080",
    "lan": "storage.office.lan",
    "kubernetes": "m3-0.vllm.svc",
    "private ipv4": "10.12.34.56",
    "private ipv4, home": "192.168.1.17",
    "private ipv4, docker": "172.17.0.3",
    "carrier ipv4": "100.64.3.9",
    "public ipv4": "http://52.34.12.9:8000",
    "ipv6": "fd12:3456:789a::1",
    "mac address": "3c:7c:3f:a1:b2:c3",
    "prompt": "someone@gpu-box:~/m3",
    "ssh": "ssh someone@bastion",
    "scp": "scp m3.tar someone@host7:/in",
    "e-mail": "first.last@company.com",
}
HARMLESS = [
    "hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx and hf_YOUR_TOKEN_HERE",
    "AKIAIOSFODNN7EXAMPLE",
    "https://user:${PASSWORD}@host.example and https://user:<password>@host",
    "-----BEGIN PRIVATE KEY----- begins such a file",
    "token = tokenizer.decode(ids[0]); secret = hashlib.sha256(data)",
    'api_key = os.environ["OPENAI_API_KEY"]',
    "--api-key $VLLM_API_KEY --served-model-name MiniMax-M3",
    'client = OpenAI(api_key="EMPTY", base_url="http://localhost:8000/v1")',
    '"eos_token": "[e~[", "bos_token": "]~!b[", "pad_token_id": 200020',
    "max_new_tokens=8192, num_experts_per_tok=8, password: string",
    "the secret of good calibration: diverse_calibration_data_with_many_domains",
    "sha256 " + "0123456789abcdef" * 4 + "  model-00001-of-00060.safetensors",
    "git sha 3f786850e387550fdab836ed7e6dc881de23001b",
    "GET /home and https://host.example/home/page, ~/x, ./home/someone/x, $HOME/home/x",
    "/usr/lib/x86_64 and /etc/hosts and /dev/null",
    "curl http://localhost:8000/v1/chat/completions and http://127.0.0.1:8000, bind 0.0.0.0:8000",
    "vLLM 0.32.0, CUDA 12.4.1, torch 2.13.0+cu124, driver 550.54.15",
    "torch.distributed.local, threading.local(), self.internal, config.local",
    "git clone git@github.com:vllm-project/vllm.git, someone@users.noreply.example.com",
    "user@example.com, @property, @torch.no_grad(), a@b",
    "Q:\nAnswer this\nA:\tfine and 12:30:45, 00:00:00:00:00:00",
    "re:.*\\.layers\\.\\d+\\.mlp\\.(gate_proj|up_proj)$ and \\\\d\\\\w and [^\\r\\n\\p{L}\\p{N}]?\\p{Lu}",
    "https://huggingface.co/org/name/tree/main?a=b@c and https://arxiv.org/abs/2501.08313",
    "{%- if message['role'] == 'tool' %}{{ '<tool_call>' + content | tojson }}{%- endif %}",
    "$$\\sum_{i=1}^{n} x_i \\\\ \\alpha\\beta$$ costs $5 and $6",
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==",
]


def _zip(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside/notes.txt", data)
    return out.getvalue()


def _tar(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("inside/notes.txt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _utf8(wrap: Callable[[str], str]) -> Callable[[str], bytes]:
    return lambda s: wrap(s).encode()


def _notebook(s: str) -> str:
    cell = {"cell_type": "code", "source": ["import os\n", s + "\n"], "outputs": [{"text": [s]}], "metadata": {}}
    return json.dumps({"cells": [cell], "nbformat": 4})


# The forms of a text in a file, each with other text around it.
FORMS: dict[str, Callable[[str], bytes]] = {
    "plain": _utf8(lambda s: f"first line\nthe thing: {s}\nlast\n"),
    "json": _utf8(lambda s: json.dumps({"a": [1, {"note": s}]})),
    "escaped, one character": _utf8(lambda s: f'{{"a": "\\u{ord(s[0]):04x}{json.dumps(s[1:])[1:]}}}'),
    "escaped": _utf8(lambda s: '{"a": "' + "".join(f"\\u{ord(c):04x}" for c in s) + '"}'),
    "escaped twice": _utf8(lambda s: json.dumps(json.dumps({"a": "".join(f"\\u{ord(c):04x}" for c in s)}))),
    "bytes": _utf8(lambda s: 'b"' + "".join(f"\\x{ord(c):02x}" for c in s) + '"'),
    "percent": _utf8(lambda s: "a=" + "".join(f"%{ord(c):02X}" for c in s) + "&b"),
    "html": _utf8(lambda s: "<p>" + "".join(f"&#x{ord(c):x};" for c in s) + "</p>"),
    "wide letters": _utf8(lambda s: " " + "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in s) + " "),
    "invisible": _utf8(lambda s: " " + "\u200b".join(s) + " "),
    "notebook": _utf8(_notebook),
    "utf-16": lambda s: f"a line\n{s}\n".encode("utf-16"),
    "utf-16-le": lambda s: f"a line\n{s}\n".encode("utf-16-le"),
    "utf-16-be": lambda s: f"a line\n{s}\n".encode("utf-16-be"),
    "utf-32-le": lambda s: f"a line\n{s}\n".encode("utf-32-le"),
    "base64": lambda s: b'{"blob": "' + base64.b64encode(f"a line\n{s}\n".encode()) + b'"}',
    "base64, url-safe": lambda s: b"x: " + base64.urlsafe_b64encode(f"~~~ a line\n{s}\n".encode()),
    "base64, lines": lambda s: b"x:\n" + base64.encodebytes(f"a line\n{s}\n".encode()),
    "hex": lambda s: b"x: " + f"a line\n{s}\n".encode().hex().encode(),
    "gzip": lambda s: gzip.compress(f"a line\n{s}\n".encode()),
    "bzip2": lambda s: bz2.compress(f"a line\n{s}\n".encode()),
    "xz": lambda s: lzma.compress(f"a line\n{s}\n".encode()),
    "zlib": lambda s: zlib.compress(f"a line\n{s}\n".encode()),
    "zip": lambda s: _zip(f"a line\n{s}\n".encode()),
    "tar.gz": lambda s: _tar(f"a line\n{s}\n".encode()),
    "zip in gzip in base64": lambda s: b"x: " + base64.b64encode(gzip.compress(_zip(f"a line\n{s}\n".encode()))),
}  # fmt: skip
