"""Which sound is a kind of which: AudioSet's ontology, with the relations that PSLA's label enhancement reads from it.

`python -m psla_sb.labels.ontology ontology.json` prints the tree, with the number of clips of every class if an annotation is
given too.
"""

import graphlib
import json

from psla_sb.errors import InputError


class Ontology:
    """A hierarchy of classes in which a class may have several parents.

    An entry whose restrictions are exactly `["abstract"]` gives no children and is nobody's parent, so that nothing above it
    is reached from below it: it only groups classes, as "Music genre" does between "Music" and the genres. Entries with
    other restrictions are ordinary ones. A mid that is not in the ontology has no children and no parents.

    Arguments
    ---------
    entries : list of dict
        Entries with `id`, `name`, `child_ids` and, optionally, `restrictions`, as in AudioSet's `ontology.json`.

    Raises
    ------
    InputError
        If an entry lacks a field or is there twice, a child does not exist, or a class is its own ancestor.

    Example
    -------
    >>> ontology = Ontology([
    ...     {"id": "/m/animal", "name": "Animal", "child_ids": ["/m/pet"]},
    ...     {"id": "/m/pet", "name": "Pet", "child_ids": ["/m/dog"]},
    ...     {"id": "/m/dog", "name": "Dog", "child_ids": []},
    ... ])
    >>> ontology.children("/m/animal"), ontology.parents("/m/dog"), sorted(ontology.ancestors("/m/dog"))
    (['/m/pet'], ['/m/pet'], ['/m/animal', '/m/pet'])
    """

    def __init__(self, entries):
        self.names, self.abstract, self._child_ids = {}, set(), {}
        for i, entry in enumerate(entries):
            try:
                mid, name, children = entry["id"], entry["name"], entry["child_ids"]
                restrictions = entry.get("restrictions", [])
            except (TypeError, KeyError, AttributeError):
                raise InputError(f"entry {i}: expected an object with id, name and child_ids") from None
            if not (isinstance(mid, str) and isinstance(name, str) and isinstance(children, list)):
                raise InputError(f"entry {i}: id and name must be strings, child_ids a list")
            if mid in self.names:
                raise InputError(f"entry {i}: the id {mid!r} ({name}) is there twice")
            self.names[mid], self._child_ids[mid] = name, children
            if restrictions == ["abstract"]:
                self.abstract.add(mid)

        self._parents = {mid: [] for mid in self.names}
        for mid, children in self._child_ids.items():
            for child in children:
                if not isinstance(child, str) or child not in self.names:
                    raise InputError(f"{mid!r} ({self.names[mid]}) has the child {child!r}, which is not in the ontology")
                if mid not in self.abstract and mid not in self._parents[child]:
                    self._parents[child].append(mid)
        try:
            graphlib.TopologicalSorter(self._child_ids).prepare()
        except graphlib.CycleError as error:
            raise InputError(f"a class is its own ancestor: {' - '.join(error.args[1])}") from None

    @classmethod
    def from_json(cls, path):
        """Read AudioSet's `ontology.json`.

        Arguments
        ---------
        path : path-like

        Returns
        -------
        Ontology

        Raises
        ------
        InputError
            Naming the file, if it is unreadable, not JSON or not an ontology.

        Example
        -------
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "ontology.json"
        >>> _ = path.write_text('[{"id": "/m/09x0r", "name": "Speech", "child_ids": []}]')
        >>> Ontology.from_json(path).names
        {'/m/09x0r': 'Speech'}
        """
        try:
            with open(path, encoding="utf-8-sig") as file:
                entries = json.load(file)
        except OSError as error:
            raise InputError(f"{path}: cannot read this ontology ({error.strerror})") from None
        except (ValueError, RecursionError) as error:  # json.JSONDecodeError and UnicodeDecodeError are both ValueErrors
            raise InputError(f"{path}: not a JSON file ({error})") from None
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{path}: expected a JSON list of ontology entries, as in AudioSet's ontology.json")
        try:
            return cls(entries)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def children(self, mid):
        """Direct children.

        Arguments
        ---------
        mid : str

        Returns
        -------
        list of str
            Empty for an abstract or an unknown mid.

        Example
        -------
        >>> genres = {"id": "g", "name": "Music genre", "child_ids": ["r"], "restrictions": ["abstract"]}
        >>> Ontology([genres, {"id": "r", "name": "Rock music", "child_ids": []}]).children("g")
        []
        """
        return [] if mid in self.abstract else list(dict.fromkeys(self._child_ids.get(mid, ())))

    def parents(self, mid):
        """Direct parents.

        Arguments
        ---------
        mid : str

        Returns
        -------
        list of str
            Without abstract ones; empty for an unknown mid.

        Example
        -------
        >>> entries = [{"id": i, "name": i, "child_ids": ["c"]} for i in "ab"]
        >>> Ontology([*entries, {"id": "c", "name": "c", "child_ids": []}]).parents("c")
        ['a', 'b']
        """
        return list(self._parents.get(mid, ()))

    def ancestors(self, mid):
        """Parents, their parents, and so on through every parent.

        Arguments
        ---------
        mid : str

        Returns
        -------
        set of str
            Without abstract ones and what is reached only through them; empty for an unknown mid.

        Example
        -------
        >>> entries = [{"id": i, "name": i, "child_ids": list(c)} for i, c in [("a", "b"), ("b", "c"), ("c", "")]]
        >>> sorted(Ontology(entries).ancestors("c"))
        ['a', 'b']
        """
        found, waiting = set(), self.parents(mid)
        while waiting:
            parent = waiting.pop()
            if parent not in found:
                found.add(parent)
                waiting += self._parents[parent]
        return found

    def tree(self, counts=None):
        """The whole hierarchy as text, one entry a line, indented by depth.

        All the file's relations are drawn, also those of abstract entries, which are marked. An entry with several parents
        is there once under each.

        Arguments
        ---------
        counts : dict of str to int, optional
            Number of clips by mid, printed where given.

        Returns
        -------
        str

        Example
        -------
        >>> entries = [{"id": "/m/animal", "name": "Animal", "child_ids": ["/m/dog"]},
        ...            {"id": "/m/dog", "name": "Dog", "child_ids": []}]
        >>> print(Ontology(entries).tree({"/m/dog": 12}))
        Animal  /m/animal
            Dog  /m/dog  12
        """
        below = {child for children in self._child_ids.values() for child in children}
        waiting = [(0, mid) for mid in reversed(self.names) if mid not in below]
        lines = []
        while waiting:
            depth, mid = waiting.pop()
            fields = [self.names[mid], mid]
            if mid in self.abstract:
                fields.append("(abstract)")
            if counts and mid in counts:
                fields.append(str(counts[mid]))
            lines.append("    " * depth + "  ".join(fields))
            waiting += [(depth + 1, child) for child in reversed(self._child_ids[mid])]
        return "\n".join(lines)
