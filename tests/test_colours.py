import re
from pathlib import Path

import numpy as np
import pytest

from dwc.colours import class_colours, label_table, viewer_tables
from dwc.data.labels import LabelMap

FIFTY = LabelMap.load("fifty")


def lines(label_map: LabelMap, name: str) -> list[str]:
    text = viewer_tables(label_map)[name].decode()
    return [line for line in text.splitlines() if not line.startswith("#")]


def one_sided(tmp_path: Path) -> LabelMap:
    rows = ["index\tclass\tname", "17\t1\tLeft-Hippocampus", "53\t2\tRight-Hippocampus", "16\t3\tBrain Stem"]
    (tmp_path / "mine.tsv").write_text("\n".join(rows))
    return LabelMap.load(tmp_path / "mine.tsv")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("labels_freesurfer.txt", r"(?P<id>\d+) +(?P<name>\S+) +(?P<r>\d+) +(?P<g>\d+) +(?P<b>\d+) +0"),
        ("labels_slicer.ctbl", r"(?P<id>\d+) (?P<name>\S+) (?P<r>\d+) (?P<g>\d+) (?P<b>\d+) (0|255)"),
        ("labels_itksnap.txt", r'(?P<id>\d+) +(?P<r>\d+) +(?P<g>\d+) +(?P<b>\d+) +[01] +[01] +[01] +"(?P<name>.+)"'),
    ],
)
def test_viewers_can_parse_every_line_and_find_every_label_in_its_own_colour(name, pattern):
    rows = [re.fullmatch(pattern, line) for line in lines(FIFTY, name)]
    assert all(rows)
    ids = [int(row["id"]) for row in rows]
    assert ids == sorted(ids)
    assert set(ids) == set(FIFTY.to_ids(np.arange(50)).tolist())
    colours = {(row["r"], row["g"], row["b"]) for row in rows}
    assert len(colours) == 50
    assert all(0 <= int(part) <= 255 for colour in colours for part in colour)
    assert {row["name"] for row in rows[1:]} == set(FIFTY.names[1:])


def test_slicer_knows_its_table_by_the_first_line():
    assert viewer_tables(FIFTY)["labels_slicer.ctbl"].startswith(b"# Color table file")


@pytest.mark.parametrize("label_map", [FIFTY, LabelMap.load("coarse")], ids=lambda label_map: label_map.name)
def test_no_merged_class_is_called_left_or_right(label_map):
    for content in (*viewer_tables(label_map).values(), label_table(label_map)):
        assert not re.search(r"left-|right-|-lh-|-rh-|\blh\b|\brh\b", content.decode(), re.IGNORECASE)


def test_the_segmentations_table_says_side_colour_and_freesurfers_ids():
    rows = [line.split("\t") for line in label_table(FIFTY).decode().splitlines()]
    assert rows[0] == ["index", "name", "color", "side", "freesurfer_ids"]
    by_name = {row[1]: row for row in rows[1:]}
    assert by_name["Thalamus-Proper"][3:] == ["both", "10,49"]
    assert by_name["Brain-Stem"][3:] == ["n/a", "16"]
    assert by_name["insula"][0] == "1035"
    assert by_name["insula"][4] == "1035,2035"
    assert all(re.fullmatch("#[0-9a-f]{6}", row[2]) for row in rows[1:])


def test_classes_on_one_side_keep_it_in_their_names_and_spaces_do_not_split_columns(tmp_path):
    label_map = one_sided(tmp_path)
    assert label_map.titles == ("Unknown", "Left-Hippocampus", "Right-Hippocampus", "Brain Stem")
    assert lines(label_map, "labels_freesurfer.txt")[1].split()[:2] == ["16", "Brain_Stem"]
    assert lines(label_map, "labels_itksnap.txt")[1].endswith('"Brain Stem"')
    assert {row.split("\t")[3] for row in label_table(label_map).decode().splitlines()[1:]} == {"left", "right", "n/a"}


def test_no_colour_is_near_that_of_white_matter():
    for n_classes in (9, 50, 256):
        colours = class_colours(n_classes)
        assert len(np.unique(colours.round(3), axis=0)) == n_classes
        apart = np.linalg.norm(np.delete(colours, 1, axis=0) - colours[1], axis=1)
        assert apart.min() > 0.3


def test_the_background_has_no_side_even_where_structures_belong_to_it(tmp_path):
    rows = ["index\tclass\tname", "4\t0\tBackground", "43\t0\tBackground", "2\t1\tWhite", "41\t1\tWhite"]
    (tmp_path / "mine.tsv").write_text("\n".join(rows))
    label_map = LabelMap.load(tmp_path / "mine.tsv")
    assert label_map.sides == ("n/a", "both")
    assert label_map.titles == ("Background", "White")
