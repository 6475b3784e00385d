"""Masking of personal data in texts: e-mail addresses, public IP addresses and phone numbers."""

import ipaddress
import re
from collections import Counter
from collections.abc import Collection

# All quantifiers are bounded, so that the time is linear. No pattern matches directly after a closing bracket, a letter
# or a digit, so that masking a masked text again does not change it.
_EMAIL = re.compile(r"(?<![\w.+\]-])[\w+-][\w.+%-]{0,63}@(?:[^\W_][\w-]{0,62}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"(?<![\w.\]-])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w-]|\.\w)"
_IPV6 = r"(?<![\w:.\]])(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\w)"
_IP = re.compile(f"{_IPV4}|{_IPV6}")
_PHONE = re.compile(
    # +49 30 901820, +1 (212) 555-0123: 8 to 15 digits (E.164)
    r"(?<![\w.+/=\]-])\+[1-9](?:[ ./-]?(?:\([0-9]{1,5}\)|[0-9])){7,14}(?![\w])"
    # 212-555-0123, (212) 555-0123, 212.555.0123: North America
    r"|(?<![\w.+/=\]-])(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-. ])[0-9]{3}[-. ][0-9]{4}(?![\w-])",
)
_PATTERNS = {"email": _EMAIL, "ip": _IP, "phone": _PHONE}


def mask_personal_data(text: str, kinds: Collection[str]) -> tuple[str, Counter[str]]:
    """Replace personal data by [email], [ip] and [phone]; return the text and the number of replacements by kind."""
    found: Counter[str] = Counter()
    for kind, pattern in _PATTERNS.items():
        if kind in kinds:

            def replace(match: re.Match[str], kind: str = kind) -> str:
                if kind == "ip" and not _is_public(match[0]):
                    return match[0]
                found[kind] += 1
                return f"[{kind}]"

            text = pattern.sub(replace, text)
    return text, found


def _is_public(address: str) -> bool:
    """Return True if `address` is a public IP address, unlike 127.0.0.1, 192.168.0.1 or a time of day."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
