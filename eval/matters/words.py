"""Vocabulary of the synthetic matters, and the split that keeps names and values out of training.

Every open-class string is a combination of parts: a surname of a stem and an ending, a company of a
surname and a trade, a person of a given name and a surname. A combination is *held out* when a stable
hash of its text says so, so training and evaluation can never meet on a name or a value.
"""

from __future__ import annotations

import random
import zlib

STEMS = (
    "Ash Bar Bel Black Brad Burn Cald Cart Chal Clay Corn Crom Dal Dan Dur East Elm Fair Farn Glen "
    "Gran Hal Hart Hol Kel Lang Mar Nor Oak Pem Red Stan"
).split()
ENDINGS = "bourne bridge brook bury cliff combe croft field ford gate ham hurst land ley stead wick".split()
SURNAMES = tuple(stem + ending for stem in STEMS for ending in ENDINGS)

TRADES = (
    "Aviation Bakery Bank Brewery Builders Carpets Cement Chemicals Cinema Coal Coffee Copper Cotton Dairy "
    "Design Drilling Energy Estates Farms Films Fisheries Foods Foundry Freight Furniture Games Gas Glass "
    "Hotels Insurance Iron Joinery Labs Leasing Lighting Logistics Marine Media Metals Milling Mining Motors "
    "Optics Paper Pharma Plastics Ports Power Printing Quarries Radio Rail Robotics Rubber Salt Shipping "
    "Software Steel Sugar Telecom Textiles Timber Tours Water"
).split()

GIVEN_NAMES = (
    "Ada Agnes Alan Alice Amir Anna Arthur Asha Basil Beatrix Bela Boris Bruno Carla Cecil Celia Chen Clara "
    "Cyril Dahlia David Diana Dmitri Dora Edgar Edith Eli Elsa Emil Enid Eric Esther Ethan Eva Farid Felix "
    "Fiona Flora Frank Freya Gemma George Gita Grace Gustav Hana Harold Hazel Hector Helen Henry Hilda Hugo "
    "Ida Igor Imran Ines Ingrid Irene Isaac Ivan Ivy Jack James Jane Jasper Joan Jonas Judith Julia Karim "
    "Karl Kate Kenji Kira Lars Laura Leila Leo Lina Louis Lucy Luther Mabel Magnus Maria Martin Maya Miles "
    "Mina Miriam Mona Nadia Neil Nina Nora Olaf Olga Oscar Otto Pablo Paula Pearl Percy Petra Philip Priya "
    "Quentin Rachel Ralph Ravi Rhoda Rita Robin Rosa Rufus Ruth Samir Sara Silas Sofia Stella Sven Tara Teresa "
    "Theo Tilda Tomas"
).split()

MONTHS = (
    "January February March April May June July August September October November December"
).split()

HELD_OUT_SHARE = 5
"""One combination in five is held out of training."""


def held_out(text: str) -> bool:
    """True when this name or value is kept for evaluation (a stable hash, the same on every machine)."""
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def _draw(make, rng: random.Random, split: str) -> str:
    """Draw until the combination lies on the wanted side of the split ("train", "held_out" or "any")."""
    while True:
        text = make(rng)
        if split == "any" or held_out(text) == (split == "held_out"):
            return text


def _sum(rng: random.Random) -> str:
    return f"${rng.randrange(100, 1000)},{rng.randrange(1000):03d}"  # 900,000 values


def _date(rng: random.Random) -> str:
    return f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1900, 2100)}"  # 67,200 values


def _person(rng: random.Random) -> str:
    return f"{rng.choice(GIVEN_NAMES)} {rng.choice(SURNAMES)}"  # 65,536 values


def _reference(rng: random.Random) -> str:
    return f"{rng.randrange(100, 1000)}/{rng.randrange(100, 1000)}"  # 810,000 values


def _company(rng: random.Random) -> str:
    return f"{rng.choice(SURNAMES)} {rng.choice(TRADES)}"  # 32,768 names


VALUES = {"sum": _sum, "date": _date, "person": _person, "reference": _reference}
"""How a value of each kind is drawn; each has at least 65,536 values of two or more tokens."""

VALUE_COUNTS = {
    "sum": 900 * 1000,
    "date": 28 * len(MONTHS) * 200,
    "person": len(GIVEN_NAMES) * len(SURNAMES),
    "reference": 900 * 900,
}
"""How many values of each kind there are, both sides of the split together."""


def draw_value(kind: str, rng: random.Random, split: str = "any") -> str:
    """Draw the text of one value of `kind` (a key of `VALUES`)."""
    return _draw(VALUES[kind], rng, split)


def draw_company(rng: random.Random, split: str = "any") -> str:
    """Draw the name of one party."""
    return _draw(_company, rng, split)
