"""The ontology's relations: PSLA's treatment of abstract entries, many parents, broken files, the printed tree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psla_sb.cli.ontology import ontology as main
from psla_sb.errors import InputError
from psla_sb.labels.ontology import Ontology


def entry(mid, children="", restrictions=()):
    return {"id": mid, "name": mid.upper(), "child_ids": list(children), "restrictions": list(restrictions)}


def write(folder, content):
    path = folder / "ontology.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_direct_relations_and_ancestors_through_every_parent():
    ontology = Ontology([entry("a", "bc"), entry("b", "d"), entry("c", "de"), entry("d", "f"), entry("e"), entry("f")])
    assert ontology.children("a") == ["b", "c"]
    assert ontology.children("f") == []
    assert ontology.parents("d") == ["b", "c"]
    assert ontology.ancestors("f") == {"a", "b", "c", "d"}
    assert ontology.ancestors("a") == set()


@pytest.mark.parametrize("restrictions", [["blacklist"], ["abstract", "blacklist"], ["blacklist", "abstract"], []])
def test_other_restrictions_stop_nothing(restrictions):
    ontology = Ontology([entry("a", "b"), entry("b", "c", restrictions), entry("c")])
    assert ontology.children("b") == ["c"]
    assert ontology.parents("c") == ["b"]
    assert ontology.ancestors("c") == {"a", "b"}


def test_exactly_abstract_stops_the_walk_but_remains_a_child():
    ontology = Ontology([entry("a", "b"), entry("b", "c", ["abstract"]), entry("c", "d"), entry("d")])
    assert ontology.children("a") == ["b"]
    assert ontology.parents("b") == ["a"]
    assert ontology.children("b") == []
    assert ontology.parents("c") == []
    assert ontology.ancestors("d") == {"c"}


def test_an_ancestor_behind_an_abstract_one_is_found_by_another_way():
    ontology = Ontology([entry("a", "bc"), entry("b", "d", ["abstract"]), entry("c", "d"), entry("d")])
    assert ontology.ancestors("d") == {"a", "c"}


def test_unknown_mids_have_no_relations():
    ontology = Ontology([entry("a")])
    assert (ontology.children("x"), ontology.parents("x"), ontology.ancestors("x")) == ([], [], set())


def test_answers_can_be_changed_without_changing_the_ontology():
    ontology = Ontology([entry("a", "bb"), entry("b")])
    for relation in (ontology.children, ontology.parents):
        for mid in "ab":
            relation(mid).append("x")
    ontology.ancestors("b").add("x")
    assert (ontology.children("a"), ontology.parents("b"), ontology.ancestors("b")) == (["b"], ["a"], {"a"})


def test_depth_is_not_limited_by_recursion():
    n = 3000
    ontology = Ontology([{"id": str(i), "name": "", "child_ids": [str(i + 1)] * (i + 1 < n)} for i in range(n)])
    assert len(ontology.ancestors(str(n - 1))) == n - 1
    assert len(ontology.tree().splitlines()) == n


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_ancestors_are_the_closure_of_parents_and_parents_mirror_children(data):
    n = data.draw(st.integers(1, 8))
    mids = [str(i) for i in range(n)]
    restrictions = st.sampled_from([[], ["abstract"], ["blacklist"]])
    ontology = Ontology(
        [
            entry(mid, data.draw(st.lists(st.sampled_from(mids[i + 1 :]), max_size=3)) if i + 1 < n else "", r)
            for i, mid in enumerate(mids)
            for r in [data.draw(restrictions)]
        ]
    )
    for a in mids:
        for b in mids:
            assert (b in ontology.children(a)) == (a in ontology.parents(b))
        assert ontology.ancestors(a) == set(ontology.parents(a)).union(*map(ontology.ancestors, ontology.parents(a)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not a JSON file"),
        ("{}", "expected a JSON list of ontology entries"),
        ("[]", "expected a JSON list of ontology entries"),
        ("[1]", "entry 0: expected an object with id, name and child_ids"),
        ([entry("a"), {"id": "b", "name": "B"}], "entry 1: expected an object with id, name and child_ids"),
        ([{"id": "a", "name": "A", "child_ids": "bc"}], "entry 0: id and name must be strings, child_ids a list"),
        ([entry("a"), entry("b"), entry("a")], r"entry 2: the id 'a' \(A\) is there twice"),
        ([entry("a", "bx"), entry("b")], r"'a' \(A\) has the child 'x', which is not in the ontology"),
        ([{"id": "a", "name": "A", "child_ids": [["b"]]}], r"has the child \['b'\]"),
        ([entry("a", "a")], "own ancestor: a - a"),
        ([entry("a", "b"), entry("b", "c"), entry("c", "a", ["abstract"])], "own ancestor: . - . - . - ."),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, content, message):
    with pytest.raises(InputError, match=r"ontology\.json: .*" + message):
        Ontology.from_json(write(tmp_path, content))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: cannot read.*No such file"):
        Ontology.from_json(tmp_path / "none.json")


def test_tree_shows_everything_and_the_counts_of_an_annotation(tmp_path, capsys):
    ontology = write(tmp_path, [entry("d"), entry("a", "bc"), entry("b", "d", ["abstract"]), entry("c", "d")])
    labels, annotation = tmp_path / "classes.csv", tmp_path / "train.csv"
    labels.write_text("index,mid,display_name\n0,d,D\n1,c,C\n")
    annotation.write_text("ID,wav,duration,labels\nx,x.wav,1.0,d;c\ny,y.wav,2.0,d\n")
    main([str(ontology), "--annotation", str(annotation), "--labels", str(labels)])
    assert capsys.readouterr().out.splitlines() == [
        "A  a",
        "    B  b  (abstract)",
        "        D  d  2",
        "    C  c  1",
        "        D  d  2",
    ]


def test_command_line_fails_without_a_traceback(tmp_path):
    command = [Path(sys.executable).with_name("psla-ontology"), str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "none.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_counting_needs_both_files(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(write(tmp_path, [entry("a")])), "--labels", "x.csv"])
    assert stop.value.code == 2
    assert "belong together" in capsys.readouterr().err
