"""YAML as settings are written in it: plain values alone, and no key twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError

LONGEST = 1 << 20  # characters; with many aliases a short text would be a large value all the same
MOST_ALIASES = 20
BOOLEAN = "tag:yaml.org,2002:bool"
FLOAT = "tag:yaml.org,2002:float"


def load_yaml(text: str) -> Any:
    """The value of a YAML text, of plain types alone.

    ``true`` and ``false`` alone are booleans, as in YAML 1.2: ``alarm: off`` and ``save_strategy: no`` are words. So is
    ``1e-4`` a number there, which YAML 1.1 takes for a word.

    Raises:
        ValueError: it is no YAML, has a key twice, which would drop a value without a word, or is too large.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        aliases = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.aliases += self.check_event(yaml.AliasEvent)
            if self.aliases > MOST_ALIASES:
                raise ValueError(f"more than {MOST_ALIASES} aliases")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                    continue
                key = self.construct_object(key_node)
                if key in seen:
                    raise ValueError(f"the key {key!r} stands twice (line {key_node.start_mark.line + 1})")
                seen.add(key)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [known for known in resolvers if known[0] != BOOLEAN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    Loader.add_implicit_resolver(FLOAT, re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    try:
        return yaml.load(text, Loader)  # nosec B506 # a SafeLoader, with more refused
    except ValueError:
        raise
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, TypeError, AttributeError, LookupError) as error:  # !!timestamp x is an AttributeError
        raise ValueError(str(error) or type(error).__name__) from error


def read_yaml(path: Path, what: str = "") -> Any:
    """The value of a YAML file; ``what`` stands before its path in messages.

    Raises:
        UserError: it cannot be read, or is no YAML.
    """
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no UTF-8
        raise UserError(f"{what}{path}: not valid YAML: {error}") from error
    except OSError as error:
        raise UserError(f"{what}{path}: cannot read: {error.strerror or error}") from error
