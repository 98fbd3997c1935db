"""Mutators: bytes and a generator of random numbers in, other bytes out. The same generator gives the same bytes."""

import json
import re
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

# Where sizes and counts overflow, wrap round or change their sign.
BOUNDARIES = (
    0, 1, 2, 3, 7, 8, 31, 32, 127, 128, 255, 256, 1000, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**20, 2**24, 2**31 - 1,
    2**31, 2**32 - 1, 2**32, 2**40, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -8, -(2**31), -(2**63),
)  # fmt: skip
FLOATS = (0.0, -0.0, -1.0, 1e-45, 1e-5, 1e5, 3.4e38, float("inf"), float("-inf"), float("nan"))
DEEP = 20_000
MAX_GROWTH = 4096  # bytes that a duplication adds at most


def flip_bit(data: bytearray, rng: Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def change_byte(data: bytearray, rng: Random) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def splice_integer(data: bytearray, rng: Random) -> None:
    """Overwrite an aligned place, more often near the beginning, with a boundary of its size."""
    size = rng.choice((1, 2, 4, 4, 8, 8))
    reach = rng.choice((64, 512, len(data)))
    at = rng.randrange(max(1, min(reach, len(data)) - size + 1)) // rng.choice((1, size)) * 1
    value = rng.choice(BOUNDARIES) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, "little")[: max(0, len(data) - at)]


def splice_float(data: bytearray, rng: Random) -> None:
    kind, size = rng.choice((("<f", 4), ("<d", 8), ("<e", 2)))
    at = rng.randrange(max(1, len(data) - size + 1)) // size * size
    value = rng.choice(FLOATS)
    if kind == "<e" and abs(value) > 65504 and value not in FLOATS[-3:]:
        value = 65504.0
    data[at : at + size] = struct.pack(kind, value)[: max(0, len(data) - at)]


def nudge(data: bytearray, rng: Random) -> None:
    """Add or subtract 1 in a little-endian integer."""
    size = rng.choice((1, 4, 8))
    at = rng.randrange(max(1, len(data) - size + 1)) // size * size
    value = int.from_bytes(data[at : at + size], "little") + rng.choice((-1, 1))
    data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")[: max(0, len(data) - at)]


def delete(data: bytearray, rng: Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 2, 4, 8, 32, rng.randrange(1, 300)))]


def duplicate(data: bytearray, rng: Random) -> None:
    at = rng.randrange(len(data))
    piece = data[at : at + rng.choice((1, 4, 8, 32, rng.randrange(1, 300)))]
    data[at:at] = (piece * rng.choice((1, 1, 2, 50)))[:MAX_GROWTH]


def move(data: bytearray, rng: Random) -> None:
    """Overwrite a range with another one."""
    size = rng.choice((4, 8, 32, rng.randrange(1, 300)))
    source, target = rng.randrange(len(data)), rng.randrange(len(data))
    piece = data[source : source + size]
    data[target : target + len(piece)] = piece


def cut(data: bytearray, rng: Random) -> None:
    del data[rng.randrange(len(data)) :]


def append(data: bytearray, rng: Random) -> None:
    data += rng.choice((b"\0", b"\n", b"\xff" * 8, bytes(64), rng.randbytes(rng.randrange(1, 40))))


EDITS = (
    flip_bit, flip_bit, change_byte, change_byte, splice_integer, splice_integer, splice_integer, splice_float, nudge,
    delete, duplicate, move, cut, append,
)  # fmt: skip
GENTLE = (flip_bit, change_byte, splice_float, nudge, move)


def binary(data: bytes, rng: Random) -> bytes:
    """Change a file of numbers in one to three places; half of the mutants keep their length."""
    changed = bytearray(data)
    edits = rng.choice((EDITS, (*GENTLE, splice_integer)))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if changed:
            rng.choice(edits)(changed, rng)
    return bytes(changed)


def gentle(data: bytes, rng: Random) -> bytes:
    """Change one byte, in a place that may be read last."""
    changed = bytearray(data)
    rng.choice((flip_bit, change_byte))(changed, rng)
    return bytes(changed)


def within(begin: int, end: int | None, mutate: Mutator = binary) -> Mutator:
    """Return a mutator of the bytes begin..end alone."""
    return lambda data, rng: data[:begin] + mutate(data[begin:end], rng) + (b"" if end is None else data[end:])


def either(*mutators: Mutator) -> Mutator:
    """Return a mutator that takes one of these each time."""
    return lambda data, rng: rng.choice(mutators)(data, rng)


# ---- JSON ----

MARK = "\ue000"  # stands for text that json.dumps would not write
RAW = (
    "[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "9" * 5000, "-" + "9" * 400, "1e999", "NaN", "Infinity",
    "-Infinity", "1E+2", "0x10", "'a'", '"\\ud800"', '"\\u0000"', "[]" + "," * 3, "tru", "", "/*c*/1", '"a" "b"',
)  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16.0, 0.5, -0.5, 1e-320, 1e308, -1e308, *BOUNDARIES, 10**25, 10**400, "",
    "0", "x", "\0", "\u2581", "\ufeff", "a" * 5000, "../x", "/etc/passwd", ".", "llama", "default", "llama3", "None",
    [], {}, [[]], [None], [1, "2"], [0] * 500, {"a": 1}, {"type": "x"}, {"": {}}, [[[[[[1]]]]]], [-1], [2**63],
    ["a", "b"],
)  # fmt: skip


def json_value(data: bytes, rng: Random) -> bytes:
    """Change a JSON document in one to three places, as a document."""
    document, raw = json.loads(data), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = _edit(document, rng, raw)
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5, separators=(",", ":"))
    for literal in raw:
        text = text.replace(f'"{MARK}"', literal, 1).replace(f'"{MARK}\\ue000"', literal, 1)
    return text.replace('"\\ue000"', raw[0] if raw else "null").encode("utf-8", "surrogatepass")


def _edit(document: Any, rng: Random, raw: list[str]) -> Any:
    """Return the document with one change; places near its root come more often."""
    holder, place = None, document
    at: Any = None
    while isinstance(place, dict | list) and place and (holder is None or rng.random() < 0.7):
        keys = list(place) if isinstance(place, dict) else range(len(place))
        holder, at = place, rng.choice(keys)
        place = holder[at]
    if holder is None:
        return rng.choice(JUNK)
    kind = rng.randrange(10)
    if kind < 4:
        holder[at] = rng.choice(JUNK)
    elif kind == 4:
        raw.append(rng.choice(RAW))
        holder[at] = MARK
    elif kind == 5:
        del holder[at]
    elif kind == 6 and isinstance(place, int | float) and not isinstance(place, bool):
        holder[at] = rng.choice((place + 1, place - 1, -place, place * 2, f"{place}", [place], 0.5))
    elif kind == 6:
        holder[at] = rng.choice(([place], {"a": place}, str(place), [place] * 300))
    elif kind == 7 and isinstance(holder, dict):
        holder[rng.choice((at + "x", at[:-1], at.upper(), "", "\u00e9", "a" * 3000))] = holder.pop(at)
    elif kind == 7:
        holder.insert(at, place)
    elif kind == 8:  # the value of another place
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[at], holder[other] = holder[other], holder[at]
    elif isinstance(holder, dict):
        holder[rng.choice(("a", "type", "id", "content", "special", "factor", "x" * 300))] = rng.choice(JUNK)
    else:
        holder[at:at] = holder[at : at + 1] * rng.choice((2, 300))
    return document


def json_twice(data: bytes, rng: Random) -> bytes:
    """Give a JSON object a key twice."""
    keys = re.findall(rb'"\w+":', data)
    key = rng.choice(keys)
    value = json.dumps(rng.choice(JUNK)).encode()
    return data.replace(key, key + value + b"," + key, 1)


def bom(data: bytes, rng: Random) -> bytes:
    return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" ", b"\n\n", b"\xef\xbb\xbf\xef\xbb\xbf")) + data


json_text = either(*[json_value] * 6, json_twice, binary, binary, bom)


# ---- text ----


def text_of(fragments: Sequence[str]) -> Mutator:
    """Return a mutator of texts that inserts, replaces, removes and repeats pieces, some of these fragments."""

    def mutate(data: bytes, rng: Random) -> bytes:
        text = data.decode()
        for _ in range(rng.choice((1, 1, 1, 2))):
            between = [match.end() for match in re.finditer(r"%}|}}|\n", text)]  # where a whole statement fits
            spots = [match.start() for match in re.finditer(r"\b|\W", text)] or [0]
            a, b = sorted((rng.choice(spots), rng.choice(spots)))
            kind = rng.randrange(6)
            if kind < 2:
                a = rng.choice(between) if between and kind else a
                text = text[:a] + rng.choice(fragments) + text[a:]
            elif kind == 2:
                text = text[:a] + rng.choice(fragments) + text[b if b - a < 40 else a + 1 :]
            elif kind == 3:
                text = text[:a] + text[b if b - a < 40 else a + 1 :]
            elif kind == 4:
                text = text[:b] + text[a:b][:300] + text[b:]
            else:
                text = text[:a] + text[b : b + 40] + text[a:]
        changed = text.encode("utf-8", "surrogatepass")
        return binary(changed, rng) if changed and rng.random() < 0.15 else changed

    return mutate
