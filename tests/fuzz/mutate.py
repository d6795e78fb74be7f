"""Deterministic damage to files: the same random generator gives the same damage."""

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

DEEP = "@@deep@@"  # stands for lists within lists, deeper than any parser goes
HTML = "<script>alert(1)</script>"
LINK = "[x](http://evil.example)"
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 48, 1.5, -0.5, 1e-320, 1e308, 2**31, 2**63, -(2**63), 10**40),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "x",
        "7",
        "nan",
        "\u0000",
        "\ud800",
        "../../etc/passwd",
        "a" * 3000,
    ),
    *(HTML, LINK, "a|b`c\n---\nlicense: mit", "{{ 7 * 7 }}", "llama", "float16", "lop"),
    *([], {}, [None], [[1]], [1, 2], [0] * 5000, {"x": 1}, {"0": {"intermediate_size": 8}}, DEEP),
]


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within a JSON value, but for itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in ((*prefix, key), *paths(item, (*prefix, key)))]


def at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutated(
    rng: random.Random, document: Any, heavy: Sequence[str] = (), extra: dict[str, list[Any]] | None = None
) -> Any:
    """A copy of a JSON document with one to three things changed.

    Args:
        rng: draws them.
        document: an object or a list.
        heavy: keys at the top in which most changes are made.
        extra: by key, what may be put there although the document has it not.
    """
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        if extra and rng.random() < 0.15:
            key = rng.choice(sorted(extra))
            document[key] = copy.deepcopy(rng.choice([*extra[key], *ODD[:12]]))
            continue
        every = paths(document)
        chosen = [path for path in every if path[0] in heavy]
        if every:
            path = rng.choice(chosen if chosen and rng.random() < 0.7 else every)
            rng.choice(CHANGES)(rng, at(document, path[:-1]), path[-1], document)
    return document


def text_of(document: Any) -> bytes:
    return json.dumps(document).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


def damaged(rng: random.Random, content: bytes) -> bytes:
    """A copy of some bytes with one to three things changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(DAMAGES)(rng, content)
    return content


def json_or_bytes(
    rng: random.Random, document: Any, heavy: Sequence[str] = (), extra: dict[str, list[Any]] | None = None
) -> bytes:
    """A file that holds a document: mostly it is changed, sometimes its bytes are."""
    if rng.random() < 0.9:
        return text_of(mutated(rng, document, heavy, extra))
    return damaged(rng, text_of(document))


# -- Values ------------------------------------------------------------------------------------------------------------


def _odd(rng: random.Random, owner: Any, key: Any, _: Any) -> None:
    owner[key] = copy.deepcopy(rng.choice(ODD))


def _drop(_: random.Random, owner: Any, key: Any, __: Any) -> None:
    del owner[key]


def _number(rng: random.Random, owner: Any, key: Any, _: Any) -> None:
    if type(owner[key]) in (int, float):
        change: Callable[[Any], Any] = rng.choice(
            (lambda x: x + 1, lambda x: x - 1, lambda x: -x, lambda x: 2 * x, float, str, lambda x: x * 10**20, bool)
        )
        owner[key] = change(owner[key])
    else:
        _flip(rng, owner, key, _)


def _flip(rng: random.Random, owner: Any, key: Any, _: Any) -> None:
    """Another type that looks alike."""
    value = owner[key]
    if isinstance(value, dict):
        owner[key] = rng.choice((list(value), list(value.values()), [list(item) for item in value.items()]))
    elif isinstance(value, list):
        owner[key] = rng.choice(({str(i): item for i, item in enumerate(value)}, str(value), value[:1] and value[0]))
    else:
        owner[key] = rng.choice(([value], {"x": value}, str(value), None))


def _list(rng: random.Random, owner: Any, key: Any, _: Any) -> None:
    value = owner[key]
    if not isinstance(value, list):
        _odd(rng, owner, key, _)
    elif not value:
        owner[key] = [1]
    else:
        index, other = rng.randrange(len(value)), rng.randrange(len(value))
        change = rng.randrange(8)
        if change == 0:
            del value[index]
        elif change == 1:
            value.insert(index, copy.deepcopy(value[other]))
        elif change == 2:
            value[index], value[other] = value[other], value[index]
        elif change == 3:
            value.reverse()
        elif change == 4:
            owner[key] = value * 2
        elif change == 5:
            value[index] = copy.deepcopy(rng.choice(ODD))
        elif change == 6:
            _number(rng, value, index, None)
        else:
            owner[key] = [value]


def _swap(rng: random.Random, owner: Any, key: Any, _: Any) -> None:
    other = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    owner[key], owner[other] = owner[other], owner[key]


def _copied(rng: random.Random, owner: Any, key: Any, document: Any) -> None:
    owner[key] = copy.deepcopy(at(document, rng.choice(paths(document))))


def _renamed(rng: random.Random, owner: Any, key: Any, document: Any) -> None:
    names = [path[-1] for path in paths(document) if isinstance(path[-1], str)]
    if isinstance(owner, dict):
        owner[rng.choice([*names, "x", "", f"{key} ", str(key).upper()])] = owner.pop(key)
    else:
        _odd(rng, owner, key, document)


CHANGES = (_odd, _odd, _drop, _number, _number, _flip, _list, _list, _swap, _copied, _renamed)


# -- Bytes -------------------------------------------------------------------------------------------------------------


def _truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _bits(rng: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if found:
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _byte(rng: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    if found:
        found[rng.randrange(len(found))] = rng.choice(b'\x00\xff0129-.,:"[]{} \nxe')
    return bytes(found)


def _cut_out(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice((1, 2, 8, 64)) :]


def _insert(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) + 1)
    return (
        content[:start]
        + rng.choice((b"\n", b"\x00" * 16, b"[" * 100_000, b"NaN", b"1", b'"', b"\xff", b"{}\n"))
        + content[start:]
    )


def _lines(rng: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    index, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    change = rng.randrange(4)
    if change == 0:
        lines.insert(other, lines[index])
    elif change == 1:
        del lines[index]
    elif change == 2:
        lines[index], lines[other] = lines[other], lines[index]
    else:
        lines[index] = _truncate(rng, lines[index])
    return b"\n".join(lines)


def _encoded(rng: random.Random, content: bytes) -> bytes:
    text = content.decode("utf-8", "replace")
    return rng.choice(
        (text.encode("utf-16"), b"\xef\xbb\xbf" + content, text.encode("utf-32"), content + b"\n", content * 2)
    )


def _twice(rng: random.Random, content: bytes) -> bytes:
    """A key that comes twice."""
    places = [index for index, byte in enumerate(content) if byte in b"{,"]
    if not places:
        return content
    start = rng.choice(places) + 1
    end = content.find(b",", start)
    return content[:start] + content[start:end] + b"," + content[start:] if end > start else content


DAMAGES = (_truncate, _bits, _bits, _byte, _byte, _cut_out, _insert, _lines, _lines, _encoded, _twice)
