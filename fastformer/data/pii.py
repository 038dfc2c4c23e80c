"""Personal data behind placeholders: e-mail addresses, telephone numbers, IBANs, payment cards, IP addresses.

A pattern proposes, a check digit or a numbering plan decides: IBANs by ISO 7064 and the country's length, cards by
Luhn's algorithm (python-stdnum), telephone numbers by the countries' plans (phonenumbers, Google's libphonenumber), IP
addresses by the standard library. A number in a text that only looks like one of these therefore stays. Names and
addresses of people are no patterns; they are not found.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..extras import require
from .cleaning_steps import Edit

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.%+-]*@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}(?![\w-])"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?!\w)")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IP = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)|(?=[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:)[0-9A-Fa-f:]{3,39}(?![\w:]))"
)
_PHONE = re.compile(r"\d(?:[\s().\-/]*\d){6}")


def _emails(text: str, region: str | None) -> str:
    return _EMAIL.sub("<EMAIL>", text) if "@" in text else text


def _ibans(text: str, region: str | None) -> str:
    return _IBAN.sub(_where(require("stdnum.iban", "masking IBANs", "data").is_valid, "<IBAN>"), text)


def _cards(text: str, region: str | None) -> str:
    luhn = require("stdnum.luhn", "masking payment cards", "data")
    # No issuer has numbers that begin with 0, and a run of zeros would pass Luhn's check.
    valid = lambda number: number[0] != "0" and luhn.is_valid(re.sub("[ -]", "", number))  # noqa: E731
    return _CARD.sub(_where(valid, "<CARD>"), text)


def _ip_addresses(text: str, region: str | None) -> str:
    return _IP.sub(_where(_is_ip_address, "<IP>"), text)


def _phones(text: str, region: str | None) -> str:
    if not _PHONE.search(text):
        return text
    phonenumbers = require("phonenumbers", "masking telephone numbers", "data")
    pieces, end = [], 0
    for match in phonenumbers.PhoneNumberMatcher(text, region, max_tries=sys.maxsize):
        pieces += [text[end : match.start], "<PHONE>"]
        end = match.end
    return "".join([*pieces, text[end:]])


# In the order in which they are looked for: an IBAN's digits are not to be taken for a card's, nor a card's for a
# telephone number.
KINDS: dict[str, Callable[[str, str | None], str]] = {
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ip": _ip_addresses,
    "phone": _phones,
}


@dataclass
class MaskPII(Edit):
    """Writes <EMAIL>, <IBAN>, <CARD>, <IP> and <PHONE> in place of personal data.

    Args:
        kinds: which to look for.
        region: the country (ISO 3166, such as "US") whose telephone numbers are also found without +1 before them.
    """

    kinds: Sequence[str] = tuple(KINDS)
    region: str | None = None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds: got {kind!r}, expected some of {', '.join(KINDS)}")
        if self.region is not None and not re.fullmatch("[A-Z]{2}", self.region):
            raise ValueError(f"region: got {self.region!r}, expected a country's two capitals such as 'US'")

    def edit(self, text: str) -> str:
        for kind, mask in KINDS.items():
            if kind in self.kinds:
                text = mask(text, self.region)
        return text


def _where(valid: Callable[[str], bool], placeholder: str) -> Callable[[re.Match[str]], str]:
    return lambda match: placeholder if valid(match[0]) else match[0]


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
