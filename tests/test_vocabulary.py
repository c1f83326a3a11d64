"""Class lists: the published formats, the round trip, and everything that must be refused."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.dataio.encoder import CategoricalEncoder

from psla_sb.errors import InputError
from psla_sb.labels.vocabulary import Vocabulary

MIDS = ["/m/09x0r", "/m/05zppz", "/t/dd00003"]
NAMES = ["Speech", "Male speech, man speaking", 'Say "hé"']
OFFICIAL = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd00003,"Say ""hé"""\n'


def write(folder, text):
    path = folder / "classes.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        OFFICIAL,
        "\ufeff" + OFFICIAL,
        OFFICIAL.replace("\n", "\r\n"),
        OFFICIAL.replace("\n", "\n\n").rstrip(),
        OFFICIAL.replace("0,", "0, ").replace(',"', ', "'),
        'index,label,mid\n2,"Say ""hé""",/t/dd00003\n0,Speech,/m/09x0r\n1,"Male speech, man speaking",/m/05zppz\n',
        '0,Speech,/m/09x0r\n1,"Male speech, man speaking",/m/05zppz\n2,"Say ""hé""",/t/dd00003\n',
        '0,/m/09x0r,Speech\r\n1,/m/05zppz,"Male speech, man speaking"\r\n2,/t/dd00003,"Say ""hé"""\r\n',
        'mid,note,Display_Name,index\n/m/09x0r,,Speech,0\n/m/05zppz,x,"Male speech, man speaking",1\n/t/dd00003,,"Say ""hé""",2\n',
    ],
    ids=["official", "bom", "crlf", "blank lines", "spaces", "unsorted", "fsd50k", "no header, mid first", "extra column"],
)
def test_published_layouts_give_the_same_vocabulary(tmp_path, text):
    vocabulary = Vocabulary.from_csv(write(tmp_path, text))
    assert vocabulary == Vocabulary(MIDS, NAMES)
    assert (vocabulary.mids, vocabulary.names, len(vocabulary)) == (MIDS, NAMES, 3)


def test_writing_gives_the_official_bytes(tmp_path):
    Vocabulary(MIDS, NAMES).to_csv(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == OFFICIAL.encode()


def test_own_mids_need_a_header(tmp_path):
    assert Vocabulary.from_csv(write(tmp_path, "index,mid,name\n0,dog,Dog\n")).mids == ["dog"]
    with pytest.raises(InputError, match=r"classes\.csv, row 1: cannot tell.*begin the file with index,mid,display_name"):
        Vocabulary.from_csv(write(tmp_path, "0,dog,Dog\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("index,mid,display_name\n", "a header but no classes"),
        ("index,mid\n0,/m/1\n", "row 1: no column for name"),
        ("mid,display_name\n/m/1,A\n", "row 1: no column for index"),
        ("0,/m/1\n", "row 1: cannot tell which column"),
        ("0,/m/1,/x\n", "row 1: cannot tell which column"),
        ("index,mid,display_name\n0,/m/1,A\n2,/m/2,B\n", "row 3: the index 2 follows a gap, 1 is missing"),
        ("index,mid,display_name\n1,/m/1,A\n", "row 2: the index 1 follows a gap, 0 is missing"),
        ("index,mid,display_name\n0,/m/1,A\n0,/m/2,B\n", "row 3: the index 0 is there twice"),
        ("index,mid,display_name\n0,/m/1,A\nx,/m/2,B\n", "row 3: the index is 'x'"),
        ("index,mid,display_name\n0,/m/1,A\n-1,/m/2,B\n", "row 3: the index is '-1'"),
        ("index,mid,display_name\n0,/m/1,A\n1,/m/1,B\n", "row 3: the mid '/m/1' is there twice"),
        ("index,mid,display_name\n0,/m/1,A\n1,/m/2,A\n", "row 3: the display name 'A' is there twice"),
        ("index,mid,display_name\n0,,A\n", "row 2: the mid is empty"),
        ("index,mid,display_name\n0,/m/1, \n", "row 2: the display name is empty"),
        ("index,mid,display_name\n0,/m/1;/m/2,A\n", "row 2: the mid '/m/1;/m/2' contains"),
        ('index,mid,display_name\n0,"/m/1,/m/2",A\n', "row 2: the mid '/m/1,/m/2' contains"),
        ("index,mid,display_name\n0,/m/1,A => B\n", "row 2: the display name 'A => B' contains ' => '"),
        ('index,mid,display_name\n0,/m/1,A\n1,/m/2,"B\nC"\n', "row 4: the display name .* line break"),
        ("index,mid,display_name\n0,/m/1,Male speech, man\n", "row 2: 4 columns instead of 3; quote names"),
        (b"index,mid,display_name\n0,/m/1,H\xe9\n", "not a UTF-8 CSV file"),
    ],
)
def test_bad_files_are_refused_with_file_and_row(tmp_path, text, message):
    with pytest.raises(InputError, match=r"classes\.csv.*" + message):
        Vocabulary.from_csv(write(tmp_path, text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: cannot read.*No such file"):
        Vocabulary.from_csv(tmp_path / "none.csv")


def test_constructor_checks_like_the_reader():
    with pytest.raises(ValueError, match="2 mids but 1 display names"):
        Vocabulary(["a", "b"], ["A"])
    with pytest.raises(InputError, match="at least one class"):
        Vocabulary([], [])
    with pytest.raises(InputError, match="class 1: the mid 'a' is there twice"):
        Vocabulary(["a", "a"], ["A", "B"])
    with pytest.raises(InputError, match="class 0: the display name ' A' has spaces"):
        Vocabulary(["a"], [" A"])


def test_lookup_and_hints():
    vocabulary = Vocabulary(MIDS, NAMES)
    assert [vocabulary.index(mid) for mid in MIDS] == [0, 1, 2]
    assert MIDS[1] in vocabulary
    assert "Speech" not in vocabulary
    for wrong in ("/m/09xOr", "speech"):
        with pytest.raises(InputError, match=r"did you mean '/m/09x0r' \(Speech\)\?"):
            vocabulary.index(wrong)
    with pytest.raises(InputError, match=r"no class .zzz. among the 3 of the vocabulary$"):
        vocabulary.index("zzz")


def test_equality_is_about_mids_names_and_order():
    vocabulary = Vocabulary(MIDS, NAMES)
    assert vocabulary != Vocabulary(MIDS[::-1], NAMES[::-1])
    assert vocabulary != Vocabulary(MIDS, ["Talk", *NAMES[1:]])
    assert vocabulary != MIDS


text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).map(str.strip).filter(bool)
names = text.filter(lambda name: " => " not in name)
mids = text.filter(lambda mid: not set(mid) & set(';,"'))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(mids, names), min_size=1, max_size=8, unique_by=(lambda c: c[0], lambda c: c[1])))
def test_what_the_constructor_takes_survives_the_files(classes):
    vocabulary = Vocabulary(*zip(*classes, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "classes.csv")
        vocabulary.to_csv(path)
        assert Vocabulary.from_csv(path) == vocabulary
        encoder = CategoricalEncoder()
        encoder.update_from_iterable(vocabulary.names)
        encoder.save(path)
        loaded = CategoricalEncoder()
        assert loaded.load_if_possible(path)
        assert loaded.decode_ndim(range(len(vocabulary))) == vocabulary.names
