"""What is wrong with a configuration, in one line, out of the nested report that the parser gives."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_KEY = re.compile(r'^Parser key "([^"]*)":$')
_CLASS = re.compile(r"^(?:- )?Problem with given class_path '([^']*)':$")
_GIVEN = re.compile(r"^Given value: (.*)$")
_SUBTYPES = re.compile(r"^Subtypes: \[(.*)\]$")
_WRONG_TYPE = re.compile(r"^(Expected a (<class|path|dot import path)|Not of type|Unable to load|Got value)")
# The parser tries every type that a value may have; these say no more than that one of them was not meant.
_NOISE = re.compile(
    r"^(Does not validate against|Given value type|Errors:$|Not a valid subclass of|Subclass types expect|"
    r"a class path \(str\)|a dict |Import path .* does not correspond to a subclass)"
)


@dataclass
class _Node:
    """A line of the report, with the lines that are indented below it."""

    text: str
    depth: int
    children: list[_Node] = field(default_factory=list)


def explain(message: str) -> list[str]:
    """Each mistake once: where it is, what is wrong, and what may have been meant.

    Args:
        message: The parser's message; one that has another form comes back as it is.
    """
    found = list(dict.fromkeys(_leaves(_tree(message), [], {})))
    return found or [message.strip()]


def _tree(message: str) -> _Node:
    root = _Node("", -1)
    path = [root]
    for line in message.splitlines():
        text = line.strip()
        if not text:
            continue
        node = _Node(text.removeprefix("- "), len(line) - len(line.lstrip()) + (2 if text.startswith("- ") else 0))
        while path[-1].depth >= node.depth:
            path.pop()
        path[-1].children.append(node)
        path.append(node)
    return root


def _leaves(node: _Node, place: Sequence[str], facts: dict[str, str]) -> Iterator[str]:
    """Mistakes below a node.

    Args:
        node: Where to look.
        place: Keys and classes around it.
        facts: The value given, and the types possible, for the innermost key.
    """
    facts = facts | _facts(node)
    found = list(_below(node, place, facts))
    if not found and "'class_path': " in facts.get("given", "") and "Namespace" not in facts["given"]:
        # A class with more beside its path: no type fits, and none says why.
        found = [_line(place, f'{facts["given"]} is not understood; arguments of a class belong below "init_args"')]
    yield from found


def _below(node: _Node, place: Sequence[str], facts: dict[str, str]) -> Iterator[str]:
    for child in node.children:
        if key := _KEY.match(child.text):
            yield from _leaves(child, [*place, key[1]], {})
        elif known := _CLASS.match(child.text):
            yield from _below(child, [*place, known[1]], facts)
        elif _NOISE.match(child.text):
            yield from _below(child, place, facts)
        elif _WRONG_TYPE.match(child.text):
            if "NoneType" not in child.text and (told := _wrong_type(facts)):
                yield _line(place, told)
        elif not (_GIVEN.match(child.text) or _SUBTYPES.match(child.text)):
            yield _line(place, child.text + _hint(child.text, place))


def _facts(node: _Node) -> dict[str, str]:
    facts = {}
    for child in node.children:
        if given := _GIVEN.match(child.text):
            facts["given"] = given[1]
        elif types := _SUBTYPES.match(child.text):
            facts["types"] = _plain_types(types[1])
    return facts


def _plain_types(text: str) -> str:
    names = [re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", part.strip()) for part in text.split(",")]
    return " or ".join(name.replace("NoneType", "null") for name in names)


def _wrong_type(facts: dict[str, str]) -> str | None:
    """None for values that are mappings or lists: one of the types was meant, and its own mistake is told."""
    given = facts.get("given", "")
    if given.startswith(("{", "[", "Namespace")) or not facts.get("types"):
        return None
    return f"{given!r} is not possible. Expected: {facts['types']}"


def _line(place: Sequence[str], text: str) -> str:
    return f"{' > '.join(place)}: {text}" if place else text


def _hint(text: str, place: Sequence[str]) -> str:
    """What may have been meant."""
    if match := re.match(r"Option '([^']*)' is not accepted", text):
        if match[1] == "class_path":
            return '; write the arguments of a class below "init_args", beside its "class_path"'
        return _choices(match[1], arguments_of(place[-1]) if place else [])
    if match := re.match(r"Group '([^']*)' does not accept option '([^']*)'", text):
        return _choices(match[2], _group_fields(place[-1] if place else "", match[1]))
    if match := re.match(r"module '([^']*)' has no attribute '([^']*)'", text):
        return _choices(match[2], _public(match[1]), listed=False)
    if match := re.match(r"No module named '([^']*)'", text):
        return _no_module(match[1])
    if match := re.match(r"Subcommand '([^']*)' does not accept option '([^']*)'", text):
        return _choices(match[2], _options(match[1]), listed=False)
    if text.startswith("the following arguments are required"):
        return '; write them below "init_args"'
    return ""


def _choices(given: str, possible: Sequence[str], *, listed: bool = True) -> str:
    close = difflib.get_close_matches(given, possible, n=3, cutoff=0.6)
    meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return meant + (f" Possible: {', '.join(possible)}" if listed and possible else "")


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def arguments_of(path: str) -> list[str]:
    """Names of the arguments of a class; none where it cannot be imported."""
    kind = _class(path)
    return [] if kind is None else [name for name in inspect.signature(kind).parameters if name != "kwargs"]


def _group_fields(path: str, group: str) -> list[str]:
    kind = _class(path)
    if kind is None:
        return []
    owner = kind if is_dataclass(kind) else kind.__init__
    try:
        group_type = typing.get_type_hints(owner).get(group)
    except NameError:
        return []
    return [entry.name for entry in fields(group_type)] if is_dataclass(group_type) else []


def _public(module: str) -> list[str]:
    try:
        return [name for name in dir(import_module(module)) if not name.startswith("_")]
    except ImportError:
        return []


def _no_module(name: str) -> str:
    # While a file is parsed, the current directory is that of the file: the path for imports has where we started.
    places = [Path(place) for place in sys.path if place and "-packages" not in place and Path(place).is_dir()]
    own = {path.stem for place in places for path in place.iterdir() if path.suffix == ".py" or path.is_dir()}
    close = _choices(name, ["lightning_obc", "lightning", "torch", "torchvision", *sorted(own)], listed=False)
    return close or "; files of your own are looked for in the directory in which the program starts"


def _options(subcommand: str) -> list[str]:
    from lightning_obc.cli.trainer import OBCTrainer

    own = inspect.signature(getattr(OBCTrainer, subcommand)).parameters
    trainer = inspect.signature(OBCTrainer.__init__).parameters
    return [*own, "model", "data", "optimizer", "lr_scheduler", "seed_everything", *(f"trainer.{n}" for n in trainer)]
