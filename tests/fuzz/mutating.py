"""Broken variants of valid examples: of their bytes, of their tokens, and of the trees that they hold."""

from __future__ import annotations

import copy
import functools
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml

INTERESTING: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
    "",
    " ",
    "0",
    "1/0",
    "1/2",
    "nan",
    "none",
    "auto",
    ".",
    "..",
    "../../x",
    "/",
    "/etc/passwd",
    "~",
    "C:\\x",
    "a\0b",
    "\n",
    "a\nb\r\nc",
    "\x1b[31mred\x1b[0m",
    "\u2028",
    "\ud800",
    "\udc80",
    "\x85",
    "\u202e",
    "é",
    "e\u0301",
    "图",
    "\U0001f600",
    "٣",
    "x" * 256,
    "图" * 100,
    "x" * 5000,
    "[/red]",
    "[bold]",
    "{0}%s{x}",
    "a.b.c",
    "__class__",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": {"c": []}}},
    [1, "1", 1.0, True],
)
_TOKENS = tuple(
    b"{ } [ ] , : \" ' \\ \n \t \r # & * ! | > % @ ` - ? ~ = << : null true NaN Infinity -Infinity 1e999 0x1F 0o7 1_0 "
    b"2020-13-45 2001-01-01 12:30:45 .inf .nan !!python/object:os.system !!binary !!set !!int !!float !!timestamp "
    b'&a *a \\ud800 \\u0000 \\x00 \\" \xff \xc3\x28 \xef\xbb\xbf \x00 .. / ../ 1/0 99999999999999999999'.split(b" ")
)
_TOKEN = re.compile(rb"[A-Za-z0-9_.]+|\s+|.", re.DOTALL)


# ── Bytes and tokens ─────────────────────────────────────────────────────────


def bytes_of(data: bytes, rng: random.Random) -> bytes:
    """One to eight small changes anywhere."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        place = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[min(place, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place:place] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 1, 2, 9))))
        elif kind == 2:
            del out[place : place + rng.choice((1, 1, 2, 20))]
        elif kind == 3 and rng.random() < 0.2:
            del out[place:]
        elif kind == 4:
            end = place + rng.randrange(1, 30)
            out[place:place] = out[place:end] * rng.choice((1, 1, 2, 40))
        else:
            out[place : place + 1] = rng.choice(_TOKENS)
    return bytes(out)


def tokens_of(data: bytes, rng: random.Random) -> bytes:
    """One to four tokens taken out, doubled, exchanged or replaced."""
    found: list[bytes] = _TOKEN.findall(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not found:
            return rng.choice(_TOKENS)
        here, there = rng.randrange(len(found)), rng.randrange(len(found))
        kind = rng.randrange(5)
        if kind == 0:
            del found[here]
        elif kind == 1:
            found.insert(here, found[there])
        elif kind == 2:
            found[here], found[there] = found[there], found[here]
        elif kind == 3:
            found[here] = rng.choice(_TOKENS)
        else:
            found[here:here] = [rng.choice(_TOKENS) for _ in range(rng.choice((1, 2, 5)))]
    return b"".join(found)


def lines_of(data: bytes, rng: random.Random) -> bytes:
    """Lines taken out, doubled, exchanged, joined or cut."""
    found = data.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2))):
        if not found:
            return b"\n"
        here, there = rng.randrange(len(found)), rng.randrange(len(found))
        kind = rng.randrange(5)
        if kind == 0:
            del found[here]
        elif kind == 1:
            found.insert(here, found[there])
        elif kind == 2:
            found[here], found[there] = found[there], found[here]
        elif kind == 3:
            found[here] = found[here].rstrip(b"\n")
        else:
            found[here] = bytes_of(found[here], rng)
    return b"".join(found)


# ── Trees ────────────────────────────────────────────────────────────────────


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any tree of plain values, small."""
    if depth > 2 or rng.random() < 0.7:
        return copy.deepcopy(rng.choice(INTERESTING))
    if rng.random() < 0.5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(INTERESTING[18:50])): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def tree_of(tree: Any, rng: random.Random) -> Any:
    """One to four nodes of a copy replaced, removed, doubled, renamed, exchanged or wrapped."""
    holder = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        nodes = list(_nodes(holder))
        parent, key = rng.choice(nodes)
        kind = rng.randrange(9)
        if kind <= 2:
            parent[key] = value(rng)
        elif kind == 3:
            del parent[key]
            if not holder:
                holder = [None]
        elif kind == 4 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 5 and isinstance(parent, dict):
            parent[str(rng.choice(INTERESTING[18:50]))] = parent.pop(key)
        elif kind == 6:
            other, place = rng.choice(nodes)
            if place in other if isinstance(other, dict) else place < len(other):
                parent[key] = copy.deepcopy(other[place])
        elif kind == 7:
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}
        elif isinstance(parent[key], str):
            parent[key] = tokens_of(parent[key].encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
        elif isinstance(parent[key], (int, float)):
            number = parent[key]
            parent[key] = rng.choice((-number, number * 10, number + (0.5 if abs(number) < 2**53 else 1), str(number)))
    return holder[0]


def _nodes(holder: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [holder]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], (dict, list)) and node[key]:
                waiting.append(node[key])
    return found


def deep(rng: random.Random) -> bytes:
    """Nesting that no reader's stack holds, or nearly none."""
    depth = rng.choice((50, 500, 3000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")))
    return opening * depth + rng.choice((b"1", b"", b"[]")) + (closing * depth if rng.random() < 0.8 else b"")


# ── Files ────────────────────────────────────────────────────────────────────


def as_json(tree: Any, rng: random.Random) -> bytes:
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, None, 1)))
    return text.encode("utf-8", "surrogatepass")


def json_file(examples: Sequence[bytes], rng: random.Random) -> bytes:
    data = rng.choice(examples)
    kind = rng.random()
    if kind < 0.6:
        return as_json(tree_of(_parsed(data), rng), rng)
    if kind < 0.62:
        return as_json(value(rng), rng)
    if kind < 0.625:
        return deep(rng)
    return (tokens_of if kind < 0.85 else bytes_of)(data, rng)


def json_lines_file(examples: Sequence[bytes], rng: random.Random) -> bytes:
    data = rng.choice(examples)
    if rng.random() < 0.5:
        return rng.choice((tokens_of, lines_of, bytes_of))(data, rng)
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = json_file([lines[place]], rng)
    return b"\n".join(lines) + b"\n"


def yaml_file(examples: Sequence[bytes], rng: random.Random) -> bytes:
    data = rng.choice(examples)
    kind = rng.random()
    if kind < 0.45:
        return as_json(tree_of(_parsed_yaml(data), rng), rng)
    if kind < 0.5:
        tree = tree_of(_parsed_yaml(data), rng)
        return yaml.dump(tree, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind < 0.53:
        return data + b"\n" + yaml_feature(rng)
    if kind < 0.535:
        return deep(rng)[:1000]
    return rng.choice((tokens_of, bytes_of, lines_of))(data, rng)


def yaml_feature(rng: random.Random) -> bytes:
    """What YAML has and JSON has not: anchors, aliases to itself or to each other, merges, tags, odd scalars."""
    name = bytes(rng.choice(b"abcdefgh") for _ in range(2))
    count = rng.choice((2, 5, 9, 12))
    laughs = [b"%s0: &x0 [a, a, a, a, a, a, a, a, a]" % name]
    laughs += [b"%s%d: &x%d [%s]" % (name, n, n, b", ".join([b"*x%d" % (n - 1)] * 9)) for n in range(1, count)]
    return rng.choice(
        (
            b"%s: &x [*x]\n" % name,
            b"%s: &x {a: *x}\n" % name,
            b"\n".join(laughs) + b"\n",
            b"%s: &x {a: 1}\nvariants: {v: {<<: *x}}\n" % name,
            b"variants: {v: &x {tokens.keep_ratio: 0.5}, w: *x}\n",
            b"%s: !!python/object/apply:os.system ['true']\n" % name,
            b"%s: !!binary aGVsbG8=\n" % name,
            b"%s: !!set {a, b}\n" % name,
            b"%s: !!omap [a: 1]\n" % name,
            b"%s: 2001-12-14t21:59:43.10-05:00\n" % name,
            b"%s: 190:20:30.15\n" % name,
            b"%s: |\n  text\n  more\n" % name,
            b"? [a, b]\n: c\n",
            b"? {a: b}\n: c\n",
            b"1: 2\n",
            b"null: 2\n",
            b"---\nother: document\n",
            b"%%YAML 9.9\n---\n%s: 1\n" % name,
            b"name: %s\nname: again\n" % name,
            b'%s: "\\ud800"\n' % name,
            b'"\\ud800": 1\n',
        )
    )


def text_file(examples: Sequence[bytes], rng: random.Random) -> bytes:
    return rng.choice((tokens_of, bytes_of, lines_of))(rng.choice(examples), rng)


@functools.cache
def _parsed(data: bytes) -> Any:
    return json.loads(data)


@functools.cache
def _parsed_yaml(data: bytes) -> Any:
    return yaml.safe_load(data)


MUTATORS: dict[str, Callable[[Sequence[bytes], random.Random], bytes]] = {
    "json": json_file,
    "json lines": json_lines_file,
    "yaml": yaml_file,
    "text": text_file,
    "bytes": lambda examples, rng: bytes_of(rng.choice(examples), rng),
}
