"""YAML as configurations hold it: that of PyYAML's safe loader, with bounds, and without values that surprise."""

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from epd_ray.errors import SHOWN_CHARS, ConfigError, importing, shown

MOST_VALUES, MOST_DEPTH = 10_000, 40
"""Of one document: values, those of an alias counted at each place, and containers in each other."""

_PREFIX = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
_FLOAT = re.compile(
    r"([-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_REDEFINED = ("int", "float", "timestamp")


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that reads 1e-3 as a number, as YAML 1.2 does, and 010, 1:30 and 2026-01-31 as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._levels = self._values = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._levels, self._values = self._levels + 1, self._values + 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        _bound(self._values, self._levels, mark)  # before the scanner has read all of it
        node: Node | None = super().compose_node(parent, index)
        self._levels -= 1
        return node

    def construct_document(self, node: Node) -> Any:
        _measure(node)
        return super().construct_document(node)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key {shown(key.value)} stands there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A safe YAML dumper that quotes text which `_Loader` would read as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_PREFIX) not in _REDEFINED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_PREFIX}int", _INTEGER, list("-+0123456789"))  # type: ignore[no-untyped-call]
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(f"{_PREFIX}float", _FLOAT, list("-+0123456789."))  # type: ignore[no-untyped-call]


def parse(text: str, what: object) -> Any:
    """Read one YAML document.

    Args:
        text: the document; an empty one is None.
        what: what the text is, for the message.

    Raises:
        ConfigError: the text is no YAML, names a key twice, or unfolds to more than MOST_VALUES or MOST_DEPTH.
    """
    with importing(lambda said: ConfigError([said]), what):
        try:
            return yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError([f"{what} is not YAML: {_problem(error)}"]) from error


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Write nested mappings as YAML that `parse` reads back."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _measure(root: Node) -> None:
    """Refuse aliases that unfold to much more than the text, or to a value that holds itself.

    Raises:
        yaml.YAMLError: the document is too large, too deep, or endless.
    """
    known: dict[int, tuple[int, int]] = {}  # id of a node -> its values and its depth

    def measure(node: Node) -> tuple[int, int]:
        if id(node) in known:
            return known[id(node)]
        known[id(node)] = (MOST_VALUES + 1, 1)  # what an alias in itself finds
        parts: list[Node] = []
        if isinstance(node, MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            parts = node.value
        sizes = [measure(part) for part in parts]
        size = 1 + sum(values for values, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        _bound(*size, node.start_mark)
        known[id(node)] = size
        return size

    measure(root)


def _bound(values: int, levels: int, where: yaml.Mark | None) -> None:
    if values > MOST_VALUES or levels > MOST_DEPTH:
        said = f"unfolds to more than {MOST_VALUES} values or {MOST_DEPTH} levels (give fewer aliases)"
        raise ConstructorError(None, None, said, where)


def _problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        said = f"{error.problem} (line {error.problem_mark.line + 1})"
    else:
        said = str(error)
    return " ".join(said.split())[: 2 * SHOWN_CHARS]
