"""The words that handbooks are made of. The built-in model knows these and no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FIRST_NAMES = tuple(
    """
    Anton Bella Bruno Clara Cyrus Diego Dora Elsa Farid Felix Greta Henry Hugo Irina Ivy Jade Jonas Karim Lena Lucia
    Marco Mina Nadia Nora Omar Oscar Otto Petra Pilar Quinn Rania Ravi Rosa Sofia Stefan Tara Thea Theo Uma Vera
    Viktor Walter Wanda Xenia Yara Yusuf Zoe Amir
    """.split()
)
LAST_NAMES = tuple(
    """
    Abbot Blake Brandt Costa Crane Duarte Dunn Ellis Farrow Finch Frost Grant Hale Holt Ibarra Irwin Joyce Keller Knox
    Lamb Lowe Lund Marsh Meyer Mori Moss Nash North Novak Olsen Ortiz Park Pryor Quist Reyes Rossi Sato Silva Singh
    Stone Tran Usher Vale Voss Weber Wolfe Young Zeller
    """.split()
)
VERBS = tuple(
    """
    build check clean count crop draw fetch find label load merge parse plot print rank save scan send share sort split
    store trim watch
    """.split()
)
OBJECTS = tuple(
    """
    badge camera chart contract diary email folder invoice ledger letter map order parcel photo recipe report sensor
    story survey table ticket token video voucher
    """.split()
)
ADJECTIVES = tuple(
    """
    amber ancient bright broken copper crimson dusty frozen gentle golden heavy hidden hollow lonely marble modern
    narrow purple rapid silent silver simple velvet wooden
    """.split()
)
THINGS = tuple(
    """
    anchor basket compass drum engine feather guitar hammer inkwell jacket kettle ladder lantern mirror needle orchid
    pillow quilt ribbon saddle teapot umbrella violin wagon
    """.split()
)
CITIES = tuple(
    """
    Accra Amman Athens Austin Boston Cairo Dakar Delhi Denver Doha Dublin Geneva Havana Krakow Lima Lisbon Madrid Milan
    Nairobi Oslo Perth Prague Quito Riga Seoul Sydney Tallinn Tokyo Toronto Tunis Turin Vienna
    """.split()
)
TEAMS = tuple(
    """
    Badger Bison Cobra Dingo Eagle Falcon Ferret Gecko Heron Hyena Ibis Jackal Koala Lemur Lynx Moose Newt Otter Raven
    Salmon Tiger Viper Walrus Zebra
    """.split()
)
TYPES = tuple(
    "address audio bytes code color date email image json list name number path price text url weight".split()
)
PERSON = "person"
"""The kind of value that is a subject of the first domain, so that a second fact can be asked about it."""


@dataclass(frozen=True)
class Domain:
    """A kind of subject, and what there is to know about it."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    joint: str
    """Between the two words of a subject's name."""
    attributes: Mapping[str, tuple[str, ...] | int | str]
    """What can be asked, and its values: some words, a number of digits, or `PERSON`."""


DOMAINS: Mapping[str, Domain] = {
    "people": Domain(FIRST_NAMES, LAST_NAMES, " ", {"badge": 4, "city": CITIES, "team": TEAMS, "desk": 2}),
    "tools": Domain(VERBS, OBJECTS, "_", {"input": TYPES, "output": TYPES, "port": 4, "limit": 2}),
    "stock": Domain(ADJECTIVES, THINGS, " ", {"shelf": 2, "code": 4, "depot": CITIES, "keeper": PERSON}),
}
