"""Files that say what to prune, as plain data: YAML, or JSON. Nothing in them is code."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from graphprune.errors import ConfigError


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # it ships no types
    """Plain data, and what stands behind ``!Pruner``, which is a mapping like any other."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping, if no key is in it twice; the last one would win."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                fact = "is there twice" if isinstance(key, Hashable) else "is no key"
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} {fact}", key_node.start_mark)
            seen.add(key)
        made: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return made


def _pruner(loader: _Loader, node: yaml.Node) -> Any:
    """What stands behind ``!Pruner``."""
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "!Pruner holds no keys", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("!Pruner", _pruner)
_Loader.add_implicit_resolver(  # 1e-4 is a number everywhere but in YAML 1.1
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_config_file(path: Path | str) -> Any:
    """Returns what a file holds, as mappings, lists, strings and numbers.

    Args:
        path: A YAML file, of which JSON is a part.

    Raises:
        ConfigError: There is no such file, it is not YAML, holds nothing, or has tags that stand for code.
    """
    if not isinstance(path, Path | str):
        raise ConfigError(f"config: is a {type(path).__name__}. Name a YAML file.")
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}). Name a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text. Name a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}{_fact(error)}. Correct it there.") from error
    if data is None:
        raise ConfigError(f"{path}: holds nothing. Describe there what to prune.")
    return data


def _fact(error: Exception) -> str:
    """Where a file is no YAML, and why."""
    mark = getattr(error, "problem_mark", None)
    what = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())
    tag = re.search(r"could not determine a constructor for the tag '([^']*)'", what)
    if tag:
        what = f"nothing is known of the tag {tag[1]!r}, only of !Pruner"
    return f":{mark.line + 1}: {what}" if mark else f": {what}"
