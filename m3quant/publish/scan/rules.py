"""What must not be published, by the shape of the text: keys and tokens, and what reveals a machine or a person.

Keys: the rule set of detect-secrets (https://github.com/Yelp/detect-secrets) and, for issuers that it lacks, the prefixes and
lengths that they document. Its rules on entropy alone are left out: an output is full of digests and base64.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

# Distinct characters that tell a key from a placeholder such as hf_xxxx.
DISTINCT = 10
_PLACEHOLDER = re.compile(
    r"(?i)example|placeholder|your[_-]|changeme|redacted|dummy|xxxx|\*\*\*|0{8}|1234567890|abcdefgh"
)
_END = r"(?![A-Za-z0-9_-])"


@dataclass(frozen=True)
class Rule:
    """kind: what it is; pattern: its shape; hints: one of these is in every match, so that most text needs no regex.

    vocabulary: whether it holds in a list of tokens too, which holds fragments of everything. value: the group that is the
    secret, held against placeholders and entropy (bits a character).
    """

    kind: str
    pattern: re.Pattern[str]
    hints: tuple[str, ...]
    vocabulary: bool = True
    secret: bool = True
    least_entropy: float = 0.0

    def may_match(self, lowered: str) -> bool:
        """Whether a text, in lower case, has what every match has."""
        return not self.hints or any(hint in lowered for hint in self.hints)

    def matches(self, text: str, lowered: str) -> Iterator[tuple[int, str]]:
        """(place, text) of each match in `text`; lowered: the same text in lower case."""
        if not self.may_match(lowered):
            return
        for match in self.pattern.finditer(text):
            value = next((group for group in match.groups() if group), match[0])
            if not self.secret or plausible(value, self.least_entropy):
                yield match.start(), match[0]


def plausible(value: str, least_entropy: float = 0.0) -> bool:
    """Whether a value may be a key: not a placeholder, and its characters are spread as those of random text."""
    if len(set(value)) < min(DISTINCT, max(6, len(value) - 4)) or _PLACEHOLDER.search(value):
        return False
    return entropy(value) >= least_entropy


def entropy(value: str) -> float:
    """Bits a character of a text's own distribution of characters."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


def _prefixed(kind: str, *shapes: str) -> list[Rule]:
    """Rules for shapes with no letter, digit, _ or - before them.

    The text before is checked after the shape's plain beginning, so that the regex engine can search for that.
    """
    rules = []
    for shape in shapes:
        plain = _plain_beginning(shape)
        before = f"(?<![A-Za-z0-9_-]{plain})" if plain else "(?<![A-Za-z0-9_-])"
        hints = (plain.replace("\\", "").lower(),) if plain else ()
        rules.append(Rule(kind, re.compile(plain + before + shape[len(plain) :]), hints))
    return rules


def _plain_beginning(shape: str) -> str:
    """The plain characters that a shape begins with."""
    found = re.match(r"(?:[A-Za-z0-9_:/@ -]|\\[.-])*", shape)
    assert found is not None
    # A quantifier behind the run applies to its last character.
    return found[0][:-1] if shape[found.end() : found.end() + 1] in ("?", "*", "{") else found[0]


ISSUED: list[Rule] = [
    *_prefixed("Hugging Face token", r"hf_[A-Za-z0-9]{30,}", r"hf_(?:oauth|jwt)_[A-Za-z0-9_.-]{30,}", r"api_org_[A-Za-z0-9]{30,}", r"oauth_app_secret_[A-Za-z0-9-]{30,}"),
    *_prefixed("API key", r"sk-ant-[a-z]+[0-9]+-[A-Za-z0-9_-]{40,}", r"sk-(?:[a-z0-9]+-)*(?=[A-Za-z0-9_]*[0-9])(?=[A-Za-z0-9_]*[A-Za-z])[A-Za-z0-9_]{20,}"),
    *_prefixed("API key", r"gsk_[A-Za-z0-9]{40,}", r"xai-[A-Za-z0-9]{40,}", r"pplx-[A-Za-z0-9]{40,}", r"r8_[A-Za-z0-9]{30,}", r"fw_[A-Za-z0-9]{20,}", r"nvapi-[A-Za-z0-9_-]{40,}", r"pcsk_[A-Za-z0-9_]{40,}", r"tgp_v1_[A-Za-z0-9_-]{30,}", r"co_[A-Za-z0-9]{38,}", r"jina_[A-Za-z0-9]{40,}", r"lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}", r"KGAT_[0-9a-f]{32}", r"ms-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}" + _END),
    *_prefixed("W&B key", r"wandb_v1_[A-Za-z0-9_]{40,}", r"local-[0-9a-f]{40}" + _END),
    *_prefixed("AWS access key", r"AKIA[A-Z0-9]{16}(?![A-Za-z0-9])", r"ASIA[A-Z0-9]{16}(?![A-Za-z0-9])") ,
    *_prefixed("GitHub token", r"gh[pousr]_[A-Za-z0-9]{36}", r"github_pat_[A-Za-z0-9_]{40,}"),
    *_prefixed("GitLab token", r"gl(?:pat|dt|ft|soat|rt|cbt|imt|ptt|agent|oas|ffct)-[A-Za-z0-9_.-]{20,}", r"GR1348941[A-Za-z0-9_-]{20}"),
    *_prefixed("Slack token", r"xox[abeoprs]-[A-Za-z0-9-]{20,}", r"xapp-[0-9]-[A-Z0-9]+-[0-9]+-[a-z0-9]{20,}", r"xoxe\.xox[bp]-[A-Za-z0-9-]{20,}"),
    *_prefixed("Google API key", r"AIza[A-Za-z0-9_-]{35}" + _END),
    *_prefixed("Google credential", r"GOCSPX-[A-Za-z0-9_-]{20,}", r"ya29\.[A-Za-z0-9_-]{30,}", r"1//0[A-Za-z0-9_-]{40,}", r"GOOG1[A-Z0-9]{20,60}" + _END),
    *_prefixed("Stripe key", r"[spr]k_(?:live|test)_[A-Za-z0-9]{16,}", r"whsec_[A-Za-z0-9+/]{24,}"),
    *_prefixed("npm token", r"npm_[A-Za-z0-9]{36}"),
    *_prefixed("PyPI token", r"pypi-[A-Za-z0-9_-]{50,}"),
    *_prefixed("SendGrid key", r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{32,64}"),
    *_prefixed("Vault token", r"hv[sbr]\.[A-Za-z0-9_-]{24,}", r"s\.[A-Za-z0-9]{24}" + _END),
    *_prefixed("cloud token", r"do[opr]_v1_[0-9a-f]{64}", r"dapi[0-9a-f]{32}", r"HRKU-[A-Za-z0-9_-]{36,}", r"fo1_[A-Za-z0-9_-]{40,}", r"FlyV1 fm[12][a-z]?_[A-Za-z0-9+/=_,-]{40,}", r"sbp_[0-9a-f]{40}", r"pscale_(?:tkn|pw|oauth)_[A-Za-z0-9_.-]{32,}", r"vercel_[A-Za-z0-9]{24,}", r"dckr_(?:pat|oat)_[A-Za-z0-9_-]{27,}", r"rubygems_[0-9a-f]{48}", r"cio[A-Za-z0-9]{32}" + _END, r"tskey-[a-z]+-[A-Za-z0-9-]{20,}", r"LTAI[A-Za-z0-9]{16,24}" + _END, r"AKID[A-Za-z0-9]{32}" + _END, r"rpa_[A-Z0-9]{40,}", r"rnd_[A-Za-z0-9]{28,}"),
    *_prefixed("service token", r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}", r"glsa_[A-Za-z0-9]{32}_[0-9a-f]{8}", r"glc_[A-Za-z0-9+/=]{40,}", r"NRAK-[A-Z0-9]{27}", r"sntry[su]_[A-Za-z0-9+/=_-]{40,}", r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}", r"dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9._-]{40,}", r"sl\.[A-Za-z0-9_-]{60,}", r"pat[A-Za-z0-9]{14}\.[0-9a-f]{64}", r"lin_(?:api|oauth)_[A-Za-z0-9]{32,}", r"ntn_[A-Za-z0-9]{40,}", r"secret_[A-Za-z0-9]{43}" + _END, r"figd_[A-Za-z0-9_-]{36,}", r"ATATT3[A-Za-z0-9_=-]{60,}", r"ATCTT3[A-Za-z0-9_=-]{60,}", r"ATBB[A-Za-z0-9]{28,}", r"key-[0-9a-f]{32}" + _END, r"sq0(?:atp|csp|idp)-[A-Za-z0-9_-]{22,43}", r"EAA[A-Za-z0-9]{80,}", r"AAAAAAAAAAAAAAAAAAAAA[A-Za-z0-9%]{40,}", r"xkeysib-[0-9a-f]{64}-[A-Za-z0-9]{16}", r"re_[A-Za-z0-9]{8}_[A-Za-z0-9]{20,}", r"phc_[A-Za-z0-9]{40,}", r"phx_[A-Za-z0-9]{40,}", r"CFPAT-[A-Za-z0-9_-]{40,}", r"[0-9]{8,10}:AA[A-Za-z0-9_-]{33}" + _END),
    Rule("API key", re.compile(r"\"username\"\s*:\s*\"[^\"]{1,64}\"\s*,\s*\"key\"\s*:\s*\"([0-9a-f]{32})\""), ("\"username\"",), vocabulary=False),
    Rule("service token", re.compile(r"https?://([0-9a-f]{32})(?::[0-9a-f]{32})?@[A-Za-z0-9.-]+/[0-9]+"), ("://",), vocabulary=False),
    Rule("private key", re.compile(r"(?<![A-Za-z0-9_-])S[UAONCX][A-Z2-7]{56}" + _END), ("s",), vocabulary=False),
    Rule("Terraform token", re.compile(r"(?<![A-Za-z0-9])[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,}"), (".atlasv1.",)),
    Rule("Azure secret", re.compile(r"(?<![A-Za-z0-9_~.-])[A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.-]{31,34}"), ("q~",)),
    Rule("Azure secret", re.compile(r"(?i)(?:Account|SharedAccess|Primary|Secondary)Key\s*=\s*([A-Za-z0-9+/]{40,}={0,2})"), ("key",)),
    Rule("Azure secret", re.compile(r"(?i)[?&]sig=([A-Za-z0-9%+/]{30,}(?:%3D|=)?)"), ("sig=",)),
    Rule("AWS secret key", re.compile(r"(?i)aws_?secret_?access_?key[\"'\s]*[:=][\"'\s]*([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+])"), ("aws",)),
    Rule("private key", re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:\\[rn]|\s)*+(?:[A-Za-z-]++: [^\r\n\\]{0,100}+(?:\\[rn]|[\r\n])(?:\\[rn]|\s)*+)*+([A-Za-z0-9+/=]{16,})"), ("private key",)),
    Rule("private key", re.compile(r"(?s)PuTTY-User-Key-File-[0-9]: .{0,600}?Private-Lines: [0-9]+\s+([A-Za-z0-9+/=]{16,})"), ("putty-user-key-file",)),
    Rule("private key", re.compile(r"AGE-SECRET-KEY-1[0-9A-Z]{58}"), ("age-secret-key-1",)),
    Rule("private key", re.compile(r"-----BEGIN OpenVPN Static key V1-----\s+([0-9a-f\s]{64,})"), ("openvpn static key",)),
    Rule("private key", re.compile(r"---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\s++(?:[A-Za-z-]++: [^\n]{0,100}+\n\s*+)*+([A-Za-z0-9+/=]{16,})"), ("ssh2 encrypted private key",)),
    Rule("JSON web token", re.compile(r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"), ("eyj",)),
    Rule("password in a URL", re.compile(r"[a-z][a-z0-9+.-]{1,12}://[^/\s:@\"'<>]{0,64}:([^/\s:@\"'<>{}$]{3,128})@[A-Za-z0-9.-]+"), ("://",), vocabulary=False, secret=False),
    Rule("webhook address", re.compile(r"https://hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/[A-Za-z0-9_/]{20,}"), ("hooks.slack",)),
    Rule("webhook address", re.compile(r"https://(?:ptb\.|canary\.)?discord(?:app)?\.com/api/webhooks/[0-9]{15,20}/[A-Za-z0-9_-]{50,}"), ("/api/webhooks/",)),
    Rule("webhook address", re.compile(r"https://[a-z0-9-]+\.webhook\.office\.com/webhookb2/[A-Za-z0-9@/-]{40,}"), ("webhook.office.com",)),
    Rule("netrc password", re.compile(r"(?i)\bmachine\s+\S{1,100}\s+login\s+\S{1,100}\s+password\s+([^\s\"']{6,200})"), ("machine",), vocabulary=False),
    Rule("password hash", re.compile(r"(?<![\w$])\$(?:1|5|6|y|2[aby]|apr1|argon2id?)\$[A-Za-z0-9./$=,+]{20,}"), ("$1$", "$5$", "$6$", "$y$", "$2", "$apr1$", "$argon2"), vocabulary=False),
    Rule("npm token", re.compile(r"_(?:authToken|auth|password)\s*=\s*[\"']?([A-Za-z0-9+/=_-]{16,})"), ("_auth", "_password"), vocabulary=False, least_entropy=3.0),
    Rule("authorization header", re.compile(r"(?i)\bauthorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token|apikey)\s+([A-Za-z0-9+/=_.~-]{16,})"), ("authorization",), vocabulary=False, least_entropy=3.0),
    Rule("authorization header", re.compile(r"(?i)\b(?:bearer)\s+([A-Za-z0-9+/=_.~-]{24,})"), ("bearer",), vocabulary=False, least_entropy=3.5),
    Rule("docker login", re.compile(r"\"auth\"\s*:\s*\"([A-Za-z0-9+/]{16,}={0,2})\""), ("\"auth\"",), vocabulary=False, least_entropy=3.0),
    Rule("password on a command line", re.compile(r"(?:\s-u\s+|\s--user[= ])[\"']?[\w.@-]{1,64}:([^\s\"'$<{]{6,128})"), ("-u", "--user"), vocabulary=False, least_entropy=2.5),
    Rule("password on a command line", re.compile(r"(?i)\s--?(?:password|passwd|token|api-?key|secret)[= ][\"']?([A-Za-z0-9+/=_.~!@#%^&*-]{8,200})(?![\w(\[.])"), ("--", " -"), vocabulary=False, least_entropy=3.0),
]  # fmt: skip
# `name = value` whose name says that it is secret. `token` alone names tokens of text, so that its value must be long.
_ASSIGNED = r"[\"']?\]?\s*(?::=|=>|[:=])\s*[\"']?([A-Za-z0-9+/=_.~!@#%%^&*-]{%d,200})(?![\w(\[.])"
ASSIGNED: list[Rule] = [
    Rule("assigned secret", re.compile(r"(?i)(?:passw(?:or)?d|passphrase|\bpwd|secret|api_?-?key|access_?-?key|account_?-?key|auth_?-?key|encryption_?-?key|signing_?-?key|credentials?)" + _ASSIGNED % 8),
         ("passw", "passphrase", "pwd", "secret", "credential", "api_key", "apikey", "api-key", "api_-key", "access", "account", "auth", "encryption", "signing"), vocabulary=False, least_entropy=2.75),
    Rule("assigned secret", re.compile(r"(?i)(?:[a-z]_?token|\btoken)" + _ASSIGNED % 20), ("token",), vocabulary=False, least_entropy=3.5),
]  # fmt: skip
_WORD = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])")
# Classes of detect-secrets that are not used, and why.
LEFT_OUT = {
    "Base64 High Entropy String": "tokenizers and digests are random text",
    "Hex High Entropy String": "an output is full of sha256 sums",
    "Public IP (ipv4)": "versions of four parts are taken for addresses; hosts.py looks at what stands around one",
    "Private Key": "its words alone are no key: the rule here wants key material after them",
    "Basic Auth Credentials": "the rule on passwords in URLs here leaves out ${VARIABLES}",
    "Secret Keyword": "takes any value, such as a variable's name; the rules on assignments here look at the value",
    "JSON Web Token": "its regex takes quadratic time on runs of eyJ; the rule here asks for all three parts",
    "Artifactory Credentials": "ten capitals and letters between quotes are found in every vocabulary; AKC and AP keys are assigned",
}


# Lower-case text in every match of a detector; a detector that is not named here searches all text.
_HINTS = {
    "AWS Access Key": ("a3t", "abia", "acca", "akia", "asia", "aws"),
    "Azure Storage Account access key": ("accountkey=",),
    "Cloudant Credentials": ("cloudant", "cl_", "cl-", "clou", "clapi", "clkey", "clp", "cltoken"),
    "GitHub Token": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    "GitLab Token": ("gl", "gr1348941"),
    "IBM Cloud IAM Key": ("key", "pwd", "pass", "token"),
    "IBM COS HMAC Credentials": ("secret",),
    "Mailchimp Access Key": ("-us",),
    "NPM tokens": ("_authtoken",),
    "OpenAI Token": ("t3blbkfj",),
    "PyPI Token": ("pypi-age",),
    "SendGrid API Key": ("sg.",),
    "Slack Token": ("xox", "hooks.slack"),
    "SoftLayer Credentials": ("softlayer", "sl_", "sl-", "slapi", "slkey", "slp", "sltoken"),
    "Square OAuth Secret": ("sq0csp-",),
    "Stripe Access Key": ("k_live_",),
}


# Some detectors take time that is cubic in a run of blanks ("name", blanks, blanks for a sign, blanks, value). Same length: places stay.
_BLANKS = re.compile(r"(?<= {12}) +")


@cache
def library() -> tuple[tuple[str, tuple[re.Pattern[str], ...]], ...]:
    """(kind, patterns) of the detectors of detect-secrets that are used."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    found: dict[str, Any] = get_mapping_from_secret_type_to_class()
    return tuple(
        (kind, tuple(detector().denylist))
        for kind, detector in sorted(found.items())
        if issubclass(detector, RegexBasedDetector) and kind not in LEFT_OUT
    )


def library_matches(text: str, lowered: str) -> Iterator[tuple[str, int, str]]:
    """(kind, place, text) of what detect-secrets finds in a text of few lines; lowered: the same in lower case."""
    text = _BLANKS.sub(lambda run: "\0" * len(run[0]), text)
    for kind, patterns in library():
        if (hints := _HINTS.get(kind)) and not any(hint in lowered for hint in hints):
            continue
        for pattern in patterns:
            for match in pattern.finditer(text):
                value = next((group for group in match.groups() if group), match[0])
                if plausible(value if len(value) >= DISTINCT else match[0], 3.0):
                    yield kind, match.start(), match[0]


def assigned(text: str, lowered: str) -> Iterator[tuple[int, str]]:
    for rule in ASSIGNED:
        for at, found in rule.matches(text, lowered):
            value = rule.pattern.match(text, at)
            if value and _WORD.match(value[1]) and not _IDENTIFIER.fullmatch(value[1]):
                yield at, found


# Possessive: parts that could be divided in many ways would be tried in all of them.
# os.environ["X"], self.api_key2, gpt-4o-mini, 2024-01-01, v1.2.3: names of code, models and versions, not secrets.
_IDENTIFIER = re.compile(
    r"(?:[a-z_]++[0-9]{0,2}+[._-]?+)++|[A-Z_]+[0-9]{0,2}[A-Z_]*|[0-9._:/-]+|[vV]?[0-9]+(?:\.[0-9]+)+[a-z0-9.+-]{0,12}"
)
