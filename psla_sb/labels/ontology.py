"""Which sound is a kind of which: AudioSet's ontology, with the relations that PSLA's label enhancement reads from it."""

import graphlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from psla_sb.errors import InputError

ADDRESS = "https://github.com/audioset/ontology"


class Ontology:
    """Holds a hierarchy of classes in which a class may have several parents; entries are those of AudioSet's `ontology.json`.

    An entry whose restrictions are exactly `["abstract"]` gives no children and is nobody's parent, so that nothing above it
    is reached from below it: it only groups classes, as "Music genre" does between "Music" and the genres. A mid that is not in
    the ontology has no children and no parents.
    """

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        self.names: dict[str, str] = {}
        self.abstract: set[str] = set()
        self._child_ids: dict[str, list[str]] = {}
        for i, entry in enumerate(entries):
            try:
                mid, name, children, limits = entry["id"], entry["name"], entry["child_ids"], entry.get("restrictions")
            except (TypeError, KeyError, AttributeError):
                raise InputError(f"entry {i}: expected an object with id, name and child_ids") from None
            if not (isinstance(mid, str) and isinstance(name, str) and isinstance(children, list)):
                raise InputError(f"entry {i}: id and name must be strings, child_ids a list")
            if mid in self.names:
                raise InputError(f"entry {i}: the id {mid!r} ({name}) is there twice")
            self.names[mid], self._child_ids[mid] = name, children
            if limits == ["abstract"]:
                self.abstract.add(mid)

        self._parents: dict[str, list[str]] = {mid: [] for mid in self.names}
        for mid, children in self._child_ids.items():
            for child in children:
                if not isinstance(child, str) or child not in self.names:
                    raise InputError(f"{mid!r} ({self.names[mid]}) has the child {child!r}, which is not in the ontology")
                if mid not in self._parents[child]:
                    self._parents[child].append(mid)
        try:
            # with a cycle, `tree` might not end
            graphlib.TopologicalSorter(self._child_ids).prepare()
        except graphlib.CycleError as error:
            raise InputError(f"a class is its own ancestor: {' - '.join(error.args[1])}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> "Ontology":
        """Reads AudioSet's `ontology.json`.

        Raises
        ------
        InputError
            Naming the file, if it is unreadable, not JSON, or not an ontology: an entry lacks a field or is there twice, a child
            does not exist, or a class is its own ancestor.

        Example
        -------
        >>> path = getfixture("tmp_path") / "ontology.json"
        >>> _ = path.write_text('[{"id": "/m/09x0r", "name": "Speech", "child_ids": []}]')
        >>> Ontology.from_json(path).names
        {'/m/09x0r': 'Speech'}
        """
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise InputError(f"{path}: cannot read this ontology ({error.strerror}); AudioSet's is at {ADDRESS}") from None
        except (ValueError, RecursionError) as error:  # json.JSONDecodeError and UnicodeDecodeError are both ValueErrors
            raise InputError(f"{path}: not a JSON file ({error})") from None
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{path}: expected a JSON list of ontology entries, as in AudioSet's ontology.json")
        try:
            return cls(entries)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def children(self, mid: str) -> list[str]:
        """Lists the direct children; none of an abstract mid."""
        return [] if mid in self.abstract else list(dict.fromkeys(self._child_ids.get(mid, ())))

    def parents(self, mid: str, abstract: bool = False) -> list[str]:
        """Lists the direct parents, without abstract ones unless these are asked for too."""
        return [parent for parent in self._parents.get(mid, ()) if abstract or parent not in self.abstract]

    def ancestors(self, mid: str) -> set[str]:
        """Collects parents, their parents, and so on, without abstract ones and what is reached only through them."""
        found: set[str] = set()
        waiting = self.parents(mid)
        while waiting:
            parent = waiting.pop()
            if parent not in found:
                found.add(parent)
                waiting += self.parents(parent)
        return found

    def tree(self, counts: Mapping[str, int] | None = None) -> str:
        """Draws all the file's relations as text, one entry a line, indented by depth, with numbers of clips where given.

        An entry with several parents is there once under each.
        """
        below = {child for children in self._child_ids.values() for child in children}
        waiting = [(0, mid) for mid in reversed(self.names) if mid not in below]
        lines = []
        while waiting:
            depth, mid = waiting.pop()
            mark = ["(abstract)"] if mid in self.abstract else []
            count = [str(counts[mid])] if counts and mid in counts else []
            lines.append("    " * depth + "  ".join([self.names[mid], mid, *mark, *count]))
            waiting += [(depth + 1, child) for child in reversed(self._child_ids[mid])]
        return "\n".join(lines)
