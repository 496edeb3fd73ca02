"""Processes that work for another one (`m3quant.running.workers`), as the system lists them."""

from pathlib import Path

from m3quant.running import workers

MODULE = workers.__spec__.name.encode()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def left_over(folder: Path) -> list[int]:
    """Their numbers, of a client that has its files in `folder`: there are none when what they worked for has ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            theirs = f"HF_HOME={folder}/".encode() in (process / "environ").read_bytes()
        except OSError:
            continue
        if MODULE in words and theirs:
            found.append(int(process.name))
    return found
