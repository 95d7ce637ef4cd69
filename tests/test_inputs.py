import os
from pathlib import Path

import pytest

from dwc.base.errors import InputError
from dwc.inputs import given_scans


@pytest.fixture
def tree(tmp_path):
    """tree(*names): empty files below tmp_path, which is returned."""

    def tree(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return tree


def found(*given, out: Path = Path("elsewhere")) -> list[tuple[str, str]]:
    """Name and results' folder of each scan."""
    scans = given_scans(given, out)
    assert not any(scan.fault for scan in scans)
    return [(scan.image.name, str(scan.folder)) for scan in scans]


def test_files_are_taken_in_the_order_given_with_or_without_extension(tree):
    folder = tree("b.nii", "a.nii.gz", "ünï côdé.mgz")
    assert found(folder / "b", folder / "a.nii.gz", folder / "ünï côdé") == [
        ("b.nii", "."),
        ("a.nii.gz", "."),
        ("ünï côdé.mgz", "."),
    ]


def test_a_folder_gives_its_volumes_at_any_depth_and_results_lie_likewise(tree):
    folder = tree("b.nii.gz", "deep/er/a.nii", "deep/c.mgz", "notes.txt", ".hidden/d.nii", ".e.nii", "deep/scan.json")
    assert found(folder) == [("b.nii.gz", "."), ("c.mgz", "deep"), ("a.nii", "deep/er")]


def test_segmentations_results_and_other_modalities_in_a_folder_are_no_scans(tree):
    folder = tree(
        "a_T1w.nii.gz", "a_dseg.nii.gz", "a_entropy.nii.gz", "a_seg.nii.gz", "b.nii.gz", "b_T2w.nii.gz", "c_FLAIR.nii",
        "d_bold.nii.gz", "e_mask.nii.gz", "my_head.nii.gz", "a_desc-conformed_T1w.nii.gz",
        "a_mutual_information.nii.gz",
    )  # fmt: skip
    assert [name for name, _ in found(folder)] == ["a_T1w.nii.gz", "b.nii.gz", "my_head.nii.gz"]


def test_the_output_folder_inside_a_folder_of_scans_is_not_searched(tree):
    folder = tree("a.nii.gz", "out/b.nii.gz")
    assert [name for name, _ in found(folder, out=folder / "out")] == ["a.nii.gz"]
    assert [name for name, _ in found(folder, out=folder)] == ["a.nii.gz", "b.nii.gz"]


def test_a_bids_data_set_gives_its_raw_t1_images_by_session_and_run(tree):
    folder = tree(
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_T2w.nii.gz", "sub-02/anat/sub-02_run-1_T1w.nii",
        "sub-02/anat/sub-02_run-2_T1w.nii",
        "sub-02/func/sub-02_task-rest_bold.nii.gz", "derivatives/x/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        "derivatives/x/sub-01/anat/sub-01_dseg.nii.gz",
    )  # fmt: skip
    assert found(folder) == [
        ("sub-01_ses-1_T1w.nii.gz", "sub-01/ses-1/anat"),
        ("sub-01_ses-2_T1w.nii.gz", "sub-01/ses-2/anat"),
        ("sub-02_run-1_T1w.nii", "sub-02/anat"),
        ("sub-02_run-2_T1w.nii", "sub-02/anat"),
    ]


def test_a_folder_of_freesurfer_subjects_gives_one_image_each(tree):
    folder = tree("bert/mri/orig.mgz", "bert/mri/aseg.mgz", "bert/mri/orig/001.mgz", "anna/mri/orig.mgz")
    assert found(folder) == [("orig.mgz", "anna/mri"), ("orig.mgz", "bert/mri")]


def test_a_pattern_gives_its_matches_and_results_lie_as_below_its_fixed_part(tree):
    folder = tree("one/T1.nii.gz", "two/T1.nii.gz", "two/T2.nii.gz", "two/notes.txt", "odd[1].nii.gz")
    assert found(folder / "*" / "T1*") == [("T1.nii.gz", "one"), ("T1.nii.gz", "two")]
    assert len(found(folder / "**" / "*")) >= 3
    tree("two/T1_dseg.nii.gz", "two/T1_T2w.nii.gz", "two/T1_entropy.nii.gz")
    assert found(folder / "*" / "T1*") == [("T1.nii.gz", "one"), ("T1.nii.gz", "two")]
    assert found(folder / "odd[1].nii.gz") == [("odd[1].nii.gz", ".")]  # a name that exists is no pattern


def test_a_list_gives_scans_and_folders_relative_to_it(tree, tmp_path):
    folder = tree("lists/one/a.nii.gz", "lists/two/a.nii.gz", "other/b.nii.gz", "lists/all/c.nii.gz")
    text = f"# scans\none/a.nii.gz\n\n two/a \r\n../other/b.nii.gz\n{folder}/other/b.nii.gz\nall\n"
    (folder / "lists" / "scans.txt").write_text(text, encoding="utf-8-sig")
    assert found(folder / "lists" / "scans.txt") == [
        ("a.nii.gz", "one"),
        ("a.nii.gz", "two"),
        ("b.nii.gz", "."),
        ("b.nii.gz", "."),
        ("c.nii.gz", "all"),
    ]


def test_a_manifest_gives_its_images(tree):
    folder = tree("s/a.nii.gz", "s/b.nii.gz")
    (folder / "m.csv").write_text("image,subject\ns/a.nii.gz,1\ns/b.nii.gz,2\ns/none.nii.gz,3\n")
    scans = given_scans([folder / "m.csv"], Path("out"))
    assert [str(scan.folder) for scan in scans] == ["s", "s", "s"]
    assert [bool(scan.fault) for scan in scans] == [False, False, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none.nii.gz", "none.nii.gz: no such file"),
        ("empty", "empty: holds no scan"),
        ("x*.nii", r"x\*.nii: matches no scan"),
        ("blank.txt", "blank.txt: the list is empty"),
        ("nested.txt", "names another list"),
        ("bytes.txt", "not UTF-8"),
        ("odd.csv", "the columns are image"),
        ("dangling.nii.gz", "does not exist"),
    ],
)
def test_what_holds_no_scan_is_one_line_alone_and_a_fault_beside_others(tree, given, message):
    folder = tree("good.nii.gz", "blank.txt")
    (folder / "empty").mkdir()
    (folder / "nested.txt").write_text("blank.txt\n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\xfa\n")
    (folder / "odd.csv").write_text("name\nx\n")
    (folder / "dangling.nii.gz").symlink_to("nowhere")
    with pytest.raises(InputError, match=message):
        given_scans([folder / given], Path("out"))
    bad, good = given_scans([folder / given, folder / "good.nii.gz"], Path("out"))
    assert message.split(":")[-1].split("\\")[0].strip() in bad.fault
    assert not good.fault


def test_two_files_of_one_name_are_a_fault_and_the_others_are_found(tree):
    folder = tree("a.nii", "a.nii.gz", "b.nii")
    bad, good = given_scans([folder], Path("out"))
    assert "the results of a.nii and a.nii.gz would have one name" in bad.fault
    assert (good.image.name, good.fault) == ("b.nii", "")


def test_several_versions_of_a_bids_image_are_a_fault_and_the_others_are_found(tree):
    folder = tree(
        "sub-1/anat/sub-1_desc-a_T1w.nii", "sub-1/anat/sub-1_desc-b_T1w.nii", "sub-2/anat/sub-2_T1w.nii"
    )  # fmt: skip
    bad, good = given_scans([folder], Path("out"))
    assert "several images of one scan" in bad.fault
    assert good.image.name == "sub-2_T1w.nii"


def test_links_are_followed_once(tree):
    folder = tree("real/a.nii.gz", "b.nii.gz")
    os.symlink(folder / "real", folder / "link")
    os.symlink(folder, folder / "real" / "loop")
    assert sorted(name for name, _ in found(folder)) == ["a.nii.gz", "b.nii.gz"]
