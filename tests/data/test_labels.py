import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dwc.base.errors import InputError
from dwc.data.labels import LabelMap

FIFTY = LabelMap.load("fifty")
COARSE = LabelMap.load("coarse")


def test_fifty_has_fifty_named_classes_with_left_and_right_merged():
    assert FIFTY.n_classes == len(FIFTY.names) == 50
    assert FIFTY.names[1] == "Cerebral-White-Matter"
    assert FIFTY.names[49] == "insula"
    np.testing.assert_array_equal(FIFTY.apply(np.array([2, 41, 1035, 2035, 251, 255, 192])), [1, 1, 49, 49, 15, 15, 15])


def test_coarse_is_fifty_followed_by_a_table_of_tissues():
    classes = FIFTY.apply(np.arange(3000))
    tissues = COARSE.apply(np.arange(3000))
    assert COARSE.n_classes == 9
    for klass in range(50):
        assert len(np.unique(tissues[classes == klass])) == 1
    names = np.array(COARSE.names)[COARSE.apply(np.array([2, 255, 1001, 4, 24, 11, 10, 60, 16, 8, 17, 54]))]
    assert names.tolist() == [
        *("White-Matter", "White-Matter", "Cortex", "CSF", "CSF", "Basal-Ganglia", "Thalamus-VentralDC"),
        *("Thalamus-VentralDC", "Brain-Stem", "Cerebellum", "Hippocampus-Amygdala", "Hippocampus-Amygdala"),
    ]


@pytest.mark.parametrize("label_map", [FIFTY, COARSE])
def test_every_unlisted_id_is_class_zero(label_map):
    listed = set(label_map.ids)
    ids = np.array([i for i in range(-5, 20_000) if i not in listed] + [2**31 - 1, -(2**31)])
    assert 31 in ids
    assert not label_map.apply(ids).any()


@given(arrays(st.sampled_from([np.uint8, np.int16, np.int32, np.int64]), (3, 4)))
def test_apply_gives_valid_classes_for_any_integers(ids):
    classes = FIFTY.apply(ids)
    expected = dict(zip(FIFTY.ids, FIFTY.classes, strict=True))
    assert classes.dtype == np.uint8
    assert classes.ravel().tolist() == [expected.get(i, 0) for i in ids.ravel().tolist()]


@pytest.mark.parametrize("label_map", [FIFTY, COARSE])
def test_ids_of_classes_map_back_to_the_classes(label_map):
    classes = np.arange(label_map.n_classes, dtype=np.uint8)
    ids = label_map.to_ids(classes)
    assert ids.dtype == np.int32
    assert ids[0] == 0
    np.testing.assert_array_equal(label_map.apply(ids), classes)


def test_classes_that_do_not_exist_have_no_ids():
    with pytest.raises(ValueError, match=r"0\.\.8"):
        COARSE.to_ids(np.array([9]))


def test_float_ids_are_refused():
    with pytest.raises(TypeError, match="float64"):
        FIFTY.apply(np.array([1.0]))


@pytest.fixture
def table(tmp_path):
    def table(*rows: str, header: str = "index\tclass\tname"):
        path = tmp_path / "mine.tsv"
        path.write_text("\n".join(["# source: me", header, *rows, ""]))
        return path

    return table


def test_a_users_table_is_a_label_map(table):
    label_map = LabelMap.load(table("0\t0\tnothing", "7\t2\tRight-two", "5\t1\tone", "", "9\t2\tagain"))
    assert (label_map.name, label_map.names) == ("mine", ("nothing", "one", "two"))
    np.testing.assert_array_equal(label_map.apply(np.array([0, 5, 7, 9, 1, 2])), [0, 1, 2, 2, 0, 0])
    np.testing.assert_array_equal(label_map.to_ids(np.array([0, 1, 2])), [0, 5, 7])


def test_the_hash_depends_on_meaning_and_not_on_the_order_of_rows(table):
    first = LabelMap.load(table("5\t1\tone", "7\t2\ttwo")).sha256
    assert LabelMap.load(table("7\t2\ttwo", "5\t1\tone", "0\t0\tUnknown")).sha256 == first
    assert LabelMap.load(table("5\t2\ttwo", "7\t1\tone")).sha256 != first
    assert FIFTY.sha256 != COARSE.sha256
    assert len(first) == 64


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("5\t1\tone", "5\t2\ttwo"), "index 5 is listed twice"),
        (("5\t1\tone", "7\t3\tthree"), "no id has class 2"),
        (("5\tone\tone",), "class 'one'"),
        (("5\t-1\tone",), "class '-1'"),
        (("5.5\t1\tone",), "index '5.5'"),
        (("5\t1",), "line 3: 2 columns, not 3"),
        (("0\t1\tone",), "index 0 is class 1"),
        (("0\t0\tnothing",), "1 classes"),
        (("99999999\t1\tone",), "larger than 1000000"),
        ((), "no rows"),
    ],
)
def test_a_bad_table_is_refused_in_one_line_that_names_it(table, rows, message):
    path = table(*rows)
    with pytest.raises(InputError, match=message) as caught:
        LabelMap.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_columns_are_refused(table):
    with pytest.raises(InputError, match="columns are"):
        LabelMap.load(table("5\t1\tone", header="id\tclass\tname"))


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such label map"):
        LabelMap.load("ninety")
    (tmp_path / "bytes.tsv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="UTF-8"):
        LabelMap.load(tmp_path / "bytes.tsv")
