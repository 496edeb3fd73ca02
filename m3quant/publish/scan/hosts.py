"""Paths, hosts and people: what reveals the machine on which an output was made, or who made it."""

from __future__ import annotations

import re

from .rules import Rule

# The slash comes first, so that the regex engine can search for it; the text before it is checked from there.
_ROOT = r"/(?:(?<![\w./~$}\\-]/)|(?<=file:///)|(?<=file://localhost/))"
_PART = r"[^\s\"'`<>|:,;)\]}\\*?]"
# Below a person's or a machine's own root, with at least one name after it. Not /usr, /etc or ~, which all machines have.
_OWN = "home|Users|mnt|media|scratch|workspace|workspaces|nfs|lustre|gpfs|beegfs|fsx|efs|Volumes|cygdrive|autofs|raid[0-9]*|nvme[0-9]*|ssd[0-9]*|disk[0-9]*"
# Roots that are words of other things too: two names after it.
_SHARED = "data[0-9]*|work|shared|storage|projects?|cluster|export|net|srv|opt|vol[0-9]*|private|content|kaggle|dbfs|fast|archive|local|datasets?|models|checkpoints|ckpts?"


def _rule(kind: str, pattern: str, *hints: str) -> Rule:
    return Rule(kind, re.compile(pattern), hints, vocabulary=False, secret=False)


PATH = "machine path"
HOST = "host or address"
PERSON = "e-mail address"
STORAGE = "storage address"
RULES: list[Rule] = [
    _rule(PATH, rf"{_ROOT}(?:{_OWN})/[A-Za-z0-9._-]+(?:/{_PART}*)?", "/"),
    _rule(PATH, rf"{_ROOT}(?:root|tmp|var/tmp|dev/shm|run/user|var/folders|private/var|private/tmp)/[A-Za-z0-9._-]+{_PART}*", "/root", "/tmp", "/dev/shm", "/run/", "/var/folders", "/private"),
    _rule(PATH, rf"{_ROOT}(?:{_SHARED})/[A-Za-z0-9._-]{{2,}}/[A-Za-z0-9._-]{{2,}}{_PART}*", "/"),
    _rule(PATH, rf"{_ROOT}var/(?:lib|log|spool|www|data|run|opt)/[A-Za-z0-9._-]+/[A-Za-z0-9._-]+{_PART}*", "/var/"),
    _rule(PATH, r"(?<![\w~./-])~[a-z][a-z0-9_-]{1,31}/[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", "~"),
    _rule(PATH, r"(?i)(?<![A-Za-z])[A-Z]:\\{1,2}(?:Users|Documents and Settings|Program Files(?: \(x86\))?|ProgramData)\\{1,2}[A-Za-z0-9._ -]+", ":\\"),
    _rule(PATH, r"(?<![A-Za-z0-9])[A-Za-z]:\\(?![nrtbfuvx0\\])[A-Za-z0-9._-]{2,}\\[A-Za-z0-9._-]{2,}", ":\\"),
    _rule(PATH, r"(?<![A-Za-z0-9])[A-Za-z]:\\\\[A-Za-z0-9._-]{2,}\\\\[A-Za-z0-9._-]{2,}", ":\\\\"),
    _rule(PATH, r"(?<![A-Za-z0-9])[A-Za-z]:/(?:Users|[A-Za-z0-9._-]{2,}/[A-Za-z0-9._-]{2,})[A-Za-z0-9._/-]*", ":/"),
    _rule(PATH, r"(?<![\\\w])\\{2,4}(?:wsl\$|wsl\.localhost|[A-Za-z][\w-]*[\d.-][\w.-]*)\\{1,2}[\w$.-]+", "\\\\"),
    _rule(PATH, r"(?<![\\\w])\\{2,4}[A-Za-z][\w-]{2,}\\{1,2}[\w$.-]{2,}\\{1,2}[\w.-]{2,}\.[a-z0-9]{1,12}", "\\\\"),
    _rule(STORAGE, r"(?<![A-Za-z0-9])(?:s3[an]?|gs|gcs|abfss?|wasbs?|adl|hdfs|viewfs|oss|cosn?|obs|r2|nfs|smb|cifs|sftp|scp|webhdfs|dbfs|alluxio|juicefs)://?[A-Za-z0-9][^\s\"'<>`)\]},]{2,}", "://", "dbfs:/"),
    _rule(HOST, r"(?i)(?<![\w.\\-])(?:[a-z0-9-]+\.)*[a-z0-9-]*(?:[0-9]|[a-z0-9]-[a-z0-9])[a-z0-9-]*(?:\.[a-z0-9-]+)*\.(?:internal|local|lan|corp|intranet|intra|localdomain|priv|home\.arpa|svc)(?![\w-]|\.[a-z_])", ".internal", ".local", ".lan", ".corp", ".intra", ".priv", ".home.arpa", ".svc"),
    _rule(HOST, r"(?i)(?:(?<=://)|(?<=@))(?:[a-z0-9-]+\.)+(?:internal|local|lan|corp|intranet|intra|localdomain|priv|home|svc)(?![\w-]|\.[a-z_])", ".internal", ".local", ".lan", ".corp", ".intra", ".priv", ".home", ".svc"),
    _rule(HOST, r"(?i)(?<![\w.-])[a-z0-9-]+\.[a-z0-9-]+\.(?:lan|corp|intranet|localdomain)(?![\w.-])", ".lan", ".corp", ".intranet", ".localdomain"),
    _rule(HOST, r"(?<![\w.])(?:10(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d))|192\.168|172\.(?:1[6-9]|2\d|3[01])|169\.254|100\.(?:6[4-9]|[7-9]\d|1[01]\d|12[0-7]))(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){2}(?![\w.]*\d)", "10.", "192.168.", "172.", "169.254.", "100."),
    _rule(HOST, r"(?:(?<=://)|(?<=@))(?!127\.|0\.0\.0\.0|192\.0\.2\.|198\.51\.100\.|203\.0\.113\.)\d{1,3}(?:\.\d{1,3}){3}(?![\d.])", "://", "@"),
    _rule(HOST, r"(?<![\w.])(?!127\.|0\.0\.0\.0|192\.0\.2\.|198\.51\.100\.|203\.0\.113\.)\d{1,3}(?:\.\d{1,3}){3}:\d{2,5}(?!\d)", "."),
    _rule(HOST, r"(?i)(?<![\w:])(?:fe80:|f[cd][0-9a-f]{2}:)(?:[0-9a-f]{0,4}:){1,6}[0-9a-f]{1,4}(?![\w:])", "fe80:", "fc", "fd"),
    _rule(HOST, r"(?i)(?<![\w:-])(?!00:00:00:00:00:00|ff:ff:ff:ff:ff:ff)[0-9a-f]{2}(?::[0-9a-f]{2}){5}(?![\w:-])", ":"),
    _rule(HOST, r"\b(?:ssh|scp|rsync|sftp|mosh)\s(?:[^\n@]{0,80}\s)?(?!git@)[A-Za-z_][\w.-]{0,31}@[A-Za-z0-9][\w.-]*", "@"),
    _rule(HOST, r"(?<![\w.@/-])(?!git@)[a-z_][\w.-]{0,31}@[A-Za-z0-9][\w.-]*:(?:~|/)(?![/\w]*@)", "@"),
    _rule(PERSON, r"(?i)(?<![\w.@/:+-])(?!(?:git|noreply|no-reply|user|username|you|name|someone|email|foo|bar|test)@)[a-z0-9][\w.+-]{0,63}@(?!(?:[a-z0-9-]+\.)*(?:example|test|invalid|localhost)\b)(?:[a-z0-9-]+\.)+(?:com|org|net|edu|io|ai|dev|gov|cn|de|fr|uk|jp|kr|in|ru|eu|ch|nl|se|it|es|ca|au|us|co|me|info|tech)(?![\w-]|\.[a-z])", "@"),
]  # fmt: skip
KINDS = frozenset(rule.kind for rule in RULES)
