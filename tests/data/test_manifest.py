import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwc.base.errors import InputError
from dwc.data.manifest import Scan, _split_by_subject, as_csv, has_split_column, labelled, namesakes, read_manifest
from dwc.data.scan import is_missing


@pytest.fixture
def manifest(tmp_path):
    """manifest(text, *files): write a manifest and empty files next to it."""

    def manifest(text: str, *files: str) -> Path:
        for name in files or ("a.nii.gz", "b.nii.gz", "c.nii.gz", "l.nii.gz"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "manifest.csv").write_text(text)
        return tmp_path / "manifest.csv"

    return manifest


def test_all_columns_are_read_and_paths_are_relative_to_the_manifest(manifest, monkeypatch):
    path = manifest("image,label,subject,site,split\na.nii.gz, l.nii.gz ,one,H,train\nb.nii.gz,,two,N,test\n\n")
    monkeypatch.chdir("/")
    folder = path.parent
    assert read_manifest(path) == [
        Scan(folder / "a.nii.gz", folder / "l.nii.gz", "one", "H", "train"),
        Scan(folder / "b.nii.gz", None, "two", "N", "test"),
    ]


def test_absolute_paths_and_missing_columns_are_allowed(manifest, tmp_path):
    manifest("", "data/sub-07/anat/x.nii.gz", "plain.nii.gz")
    path = manifest(f"image\n{tmp_path}/data/sub-07/anat/x.nii.gz\nplain.nii.gz\n", "plain.nii.gz")
    scans = read_manifest(path)
    assert [scan.subject for scan in scans] == ["sub-07", "plain"]
    assert {scan.site for scan in scans} == {tmp_path.name}
    assert [scan.label for scan in scans] == [None, None]


@given(
    subjects=st.lists(st.sampled_from("abcdefghijklmnopqrst"), min_size=1, max_size=40),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_the_split_keeps_subjects_whole_and_leaves_no_part_empty(subjects, fraction, seed):
    scans = [Scan(Path(str(i)), None, s, "H", "train") for i, s in enumerate(subjects)]
    split = _split_by_subject(scans, seed, fraction)
    parts = {part: {scan.subject for scan in split if scan.split == part} for part in ("train", "test")}
    assert not parts["train"] & parts["test"]
    assert [scan.image for scan in split] == [scan.image for scan in scans]
    assert parts["train"]
    assert bool(parts["test"]) == (len(set(subjects)) > 1)
    assert split == _split_by_subject(scans[::-1], seed, fraction)[::-1]


def _scans(n: int) -> list[Scan]:
    return [Scan(Path(str(i)), None, f"s{i}", "H", "train") for i in range(n)]


def _tested(scans: list[Scan], seed: int, fraction: float) -> set[str]:
    return {scan.subject for scan in _split_by_subject(scans, seed, fraction) if scan.split == "test"}


def test_a_tenth_of_the_subjects_is_for_testing_on_average_and_the_seed_chooses_which():
    tests = [frozenset(_tested(_scans(1000), seed, 0.1)) for seed in range(5)]
    assert len(set(tests)) == 5
    assert all(60 < len(part) < 140 for part in tests)  # 100 +- 4 sd
    assert not _tested(_scans(1000), 0, 0.0)


@given(fewer=st.integers(2, 60), more=st.integers(0, 60), seed=st.integers(0, 50))
def test_subjects_added_later_move_nobody_from_training_to_testing(fewer, more, seed):
    before, after = _tested(_scans(fewer), seed, 0.1), _tested(_scans(fewer + more), seed, 0.1)
    trained = {f"s{i}" for i in range(fewer)} - before
    if trained == {"s0"} or trained == {"s1"}:  # both are below a tenth: one of them had to stand in
        return
    assert not trained & after
    assert len(before - after) <= 1  # who stood in while nobody was below a tenth


def test_a_subject_keeps_its_place_in_every_later_version():
    assert _tested(_scans(30), 0, 0.1) == {"s15", "s23"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("image,label\n", "no rows"),
        ("image,label,age,sex\na.nii.gz,l.nii.gz,3,f\n", "unknown columns 'age', 'sex'"),
        ("image,label,label\na.nii.gz,l.nii.gz,l.nii.gz\n", "each once"),
        ("label\nl.nii.gz\n", "columns label"),
        ("image,label\na.nii.gz,l.nii.gz\nzzz.nii.gz,l.nii.gz\n", "line 3: image .*zzz.nii.gz does not exist"),
        ("image,label\na.nii.gz,zzz.nii.gz\n", "line 2: label .*zzz.nii.gz does not exist"),
        ("image,label\n,l.nii.gz\n", "line 2: the image is empty"),
        ("image,label\na.nii.gz,l.nii.gz\n./a.nii.gz,l.nii.gz\n", "line 3: image ./a.nii.gz is already on line 2"),
        ("image,split\na.nii.gz,validation\n", "split is 'validation'"),
        ("image,subject,split\na.nii.gz,x,train\nb.nii.gz,x,test\n", "subject x is in both train and test"),
        ("image,label\na.nii.gz\n", "line 2: 1 cells, not 2"),
        ('image,label\n"a.nii.gz,l.nii.gz\n', "not a CSV in UTF-8"),
    ],
)
def test_a_bad_manifest_is_refused_in_one_line_that_names_it(manifest, text, message):
    path = manifest(text)
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "volume.nii.gz").write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match="not a CSV in UTF-8"):
        read_manifest(tmp_path / "volume.nii.gz")
    with pytest.raises(InputError, match="test fraction 1"):
        read_manifest(tmp_path, test_fraction=1.0)


@pytest.mark.parametrize("subject", ["", ",subject"])
def test_images_of_one_name_in_two_folders_need_a_subject(manifest, subject):
    files = ("s0/mri/T1.nii.gz", "s1/mri/T1.nii.gz")
    rows = "".join(f"{name}{',' if subject else ''}\n" for name in files)
    path = manifest(f"image{subject}\n{rows}", *files)
    with pytest.raises(InputError, match=r"line 3: .*s1/mri/T1\.nii\.gz and .*s0/mri/T1\.nii\.gz .*subject T1"):
        read_manifest(path)
    manifest("image,subject\ns0/mri/T1.nii.gz,s0\ns1/mri/T1.nii.gz,s1\n", *files)
    assert [scan.subject for scan in read_manifest(path)] == ["s0", "s1"]


def _touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_bids_folder_gives_images_with_the_labels_that_share_their_entities(tmp_path):
    folder = _touch(
        tmp_path / "study",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_desc-aseg_dseg.nii.gz",
        "sub-01/anat/sub-01_desc-aparcaseg_dseg.nii.gz",
        "sub-01/anat/sub-01_space-MNI_res-2_desc-preproc_T1w.nii.gz",
        "sub-01/anat/sub-01_space-MNI_res-2_dseg.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_desc-preproc_T1w.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_dseg.nii.gz",
        "sub-02/ses-2/anat/sub-02_ses-2_T1w.nii.gz",
        "sub-02/func/sub-02_bold.nii.gz",
        "sub-03/anat/sub-03_space-MNI_T1w.nii.gz",
    )
    scans = read_manifest(folder)
    assert [(scan.image.name, scan.label and scan.label.name, scan.subject, scan.site) for scan in scans] == [
        ("sub-01_T1w.nii.gz", "sub-01_desc-aparcaseg_dseg.nii.gz", "sub-01", "study"),
        ("sub-02_ses-1_desc-preproc_T1w.nii.gz", "sub-02_ses-1_dseg.nii.gz", "sub-02", "study"),
        ("sub-02_ses-2_T1w.nii.gz", None, "sub-02", "study"),
        ("sub-03_space-MNI_T1w.nii.gz", None, "sub-03", "study"),
    ]
    assert scans[1].split == scans[2].split != scans[0].split


def test_a_bids_folder_with_ambiguous_labels_or_no_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="empty"):
        read_manifest(tmp_path)
    _touch(tmp_path, *(f"sub-1/anat/sub-1_{s}.nii.gz" for s in ("T1w", "dseg", "desc-aseg_dseg")))
    with pytest.raises(InputError, match="several segmentations fit"):
        read_manifest(tmp_path)


def test_scans_written_as_a_manifest_are_read_as_they_are(tmp_path):
    for name in ("a, b.nii.gz", "c.nii.gz"):
        (tmp_path / name).touch()
    scans = [
        Scan(tmp_path / "a, b.nii.gz", tmp_path / "c.nii.gz", "one", "north", "train"),
        Scan(tmp_path / "c.nii.gz", None, "two", "east", "test"),
    ]
    path = tmp_path / "elsewhere" / "scans.csv"
    path.parent.mkdir()
    path.write_bytes(as_csv(scans))
    assert read_manifest(path) == scans


@pytest.mark.parametrize("separator", [",", ";", "\t", ", ", " ; "])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_manifests_as_spreadsheets_write_them_are_read(manifest, separator, encoding):
    rows = (("image", "label", "subject"), ("a.nii.gz", "l.nii.gz", "one"), ("b.nii.gz", "", "two, too"), ("", "", ""))
    quoted = [[f'"{cell}"' if "," in cell else cell for cell in row] for row in rows]
    path = manifest("")
    path.write_bytes("\r\n".join(separator.join(row) for row in quoted).encode(encoding))
    scans = read_manifest(path)
    assert [(scan.image.name, scan.subject) for scan in scans] == [("a.nii.gz", "one"), ("b.nii.gz", "two, too")]
    assert scans[0].label == path.parent / "l.nii.gz"
    assert scans[1].label is None


def test_trailing_separators_are_no_columns_and_other_separators_are_named(manifest):
    path = manifest("Image,Label,,\na.nii.gz,l.nii.gz,,\nb.nii.gz,l.nii.gz,,,\n")
    assert len(read_manifest(path)) == 2
    path = manifest("image,label,,\na.nii.gz,l.nii.gz,x,\n")
    with pytest.raises(InputError, match="line 2: 4 cells, not 2"):
        read_manifest(path)
    with pytest.raises(InputError, match="separated by commas, semicolons or tabs"):
        read_manifest(manifest("image|label\na.nii.gz|l.nii.gz\n"))


@pytest.mark.parametrize("cell", ["n/a", "N/A", "", "NA", "nan", "NaN", "unknown", "Unknown"])
def test_a_subject_that_is_not_available_is_no_subject(manifest, cell):
    path = manifest(f"image,subject,site\na.nii.gz,{cell},{cell}\nb.nii.gz,{cell},{cell}\n")
    scans = read_manifest(path)
    assert [scan.subject for scan in scans] == ["a", "b"]
    assert {scan.site for scan in scans} == {path.parent.name}
    assert {scan.split for scan in scans} == {"train", "test"}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("01", "1"),
        ("sub-01", "01"),
        ("sub-01", "1"),
        ("P07", "p7"),
        ("Sub_3", "3"),
        ("1", "1.0"),
        ("sub-01", "sub 01"),
        ("sub-01", "subject01"),
        ("P-01", "p_01"),
        ("Jos\u00e9", "Jose\u0301"),
        ("a", "a\u200b"),
        ("sub-01", "sub\u201101"),
        ("A 7", "a7"),
    ],
)
def test_one_subject_under_two_spellings_is_not_both_trained_and_tested_on(manifest, one, two):
    path = manifest(f"image,subject,split\na.nii.gz,{one},train\nb.nii.gz,{two},test\n")
    with pytest.raises(
        InputError, match=f"subjects .*{re.escape(one)}.* look like one, and are in both train and test"
    ):
        read_manifest(path)
    manifest(f"image,subject,split\na.nii.gz,{one},train\nb.nii.gz,{two},train\n")
    assert namesakes(read_manifest(path)) == [sorted([one, two])]


@pytest.mark.parametrize(
    ("one", "two"),
    [("01", "10"), ("sub-1", "sub-2"), ("a1", "b1"), ("100", "1"), ("1-23", "12-3"), ("1.5", "15"), ("10", "1.0")],
)
def test_different_subjects_are_not_taken_for_one(manifest, one, two):
    scans = read_manifest(manifest(f"image,subject,split\na.nii.gz,{one},train\nb.nii.gz,{two},test\n"))
    assert namesakes(scans) == []


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1))
def test_no_cell_of_a_written_manifest_runs_in_a_spreadsheet_and_each_is_read_back(tmp_path_factory, subject):
    subject = subject.strip()
    if is_missing(subject):
        return
    folder = tmp_path_factory.mktemp("m")
    (folder / "a.nii").touch()
    scan = Scan(folder / "a.nii", None, subject, "=HYPERLINK(1)", "train")
    (folder / "m.csv").write_bytes(as_csv([scan]))
    rows = list(csv.reader(io.StringIO((folder / "m.csv").read_text(encoding="utf-8"), newline="")))
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)
    assert read_manifest(folder / "m.csv") == [scan]


@pytest.mark.parametrize("text", ["a\x1b[31m.nii", "a\x07.nii", "a\u2028.nii"])
def test_control_characters_in_names_are_refused_and_not_printed(tmp_path, text):
    (tmp_path / text).touch()
    (tmp_path / "m.csv").write_text(f'image\n"{text}"\n', encoding="utf-8")
    (tmp_path / "s.csv").write_text(f'image,site\n{tmp_path / "m.csv"},"{text}"\n', encoding="utf-8")
    for name in ("m.csv", "s.csv"):
        with pytest.raises(InputError) as caught:
            read_manifest(tmp_path / name)
        assert str(caught.value).isprintable()


def test_too_long_names_and_dangling_links_in_a_manifest_are_refused_with_their_line(manifest):
    path = manifest(f"image\n{'x' * 5000}.nii\n")
    with pytest.raises(InputError, match=r"line 2: image .*too long"):
        read_manifest(path)
    (path.parent / "annex.nii").symlink_to(".git/annex/objects/x")
    with pytest.raises(InputError, match=r"line 2: image .*datalad get"):
        read_manifest(manifest("image\nannex.nii\n"))


def test_all_volumes_of_a_bids_folder_are_found_once(tmp_path):
    folder = _touch(
        tmp_path / "study",
        "sub-01/anat/sub-01_T1w.nii",
        "sub-02/anat/sub-02_desc-preproc_T1w.nii.gz",
        "sub-02/anat/sub-02_desc-brain_T1w.nii.gz",
        "sub-02/anat/._sub-02_T1w.nii.gz",
        "sub-02/anat/sub-02_part-phase_T1w.nii.gz",
        "sub-03/ses-1/anat/sub-03_ses-1_T1w.nii.gz",
        "sub-04/anat/sub-04_T1w.NII.GZ",
    )
    (folder / "sub-03/ses-2").symlink_to("ses-1")
    (folder / "sub-05").symlink_to("sub-01")
    assert [str(scan.image.relative_to(folder)) for scan in read_manifest(folder)] == [
        "sub-01/anat/sub-01_T1w.nii",
        "sub-02/anat/sub-02_desc-preproc_T1w.nii.gz",
        "sub-03/ses-1/anat/sub-03_ses-1_T1w.nii.gz",
        "sub-04/anat/sub-04_T1w.NII.GZ",
    ]


def test_versions_of_one_scan_of_which_none_is_first_choice_are_refused(tmp_path):
    _touch(tmp_path, *(f"sub-1/anat/sub-1_desc-{d}_T1w.nii.gz" for d in ("brain", "denoised")))
    with pytest.raises(InputError, match=r"several images of one scan .*desc-brain.*keep one"):
        read_manifest(tmp_path)
    _touch(tmp_path / "two", "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T1w.nii")
    with pytest.raises(InputError, match="several images of one scan"):
        read_manifest(tmp_path / "two")


def test_labels_are_found_in_the_derivatives_of_a_raw_data_set_with_the_image_that_they_lie_on(tmp_path):
    folder = _touch(
        tmp_path / "study",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz",
        "sub-03/anat/sub-03_T1w.nii.gz",
        "derivatives/freesurfer/sub-01/anat/sub-01_desc-aparcaseg_dseg.nii.gz",
        "derivatives/fmriprep/sub-02/ses-a/anat/sub-02_ses-a_desc-preproc_T1w.nii.gz",
        "derivatives/fmriprep/sub-02/ses-a/anat/sub-02_ses-a_desc-aparcaseg_dseg.nii.gz",
        "derivatives/fmriprep/sub-02/ses-a/anat/sub-02_ses-a_dseg.nii.gz",
        "derivatives/fmriprep/sub-02/ses-a/anat/sub-02_ses-a_space-MNI_dseg.nii.gz",
    )
    scans = read_manifest(folder)
    assert [(scan.image.name, scan.label and scan.label.name) for scan in scans] == [
        ("sub-01_T1w.nii.gz", "sub-01_desc-aparcaseg_dseg.nii.gz"),
        ("sub-02_ses-a_desc-preproc_T1w.nii.gz", "sub-02_ses-a_desc-aparcaseg_dseg.nii.gz"),
        ("sub-03_T1w.nii.gz", None),
    ]
    assert {scan.site for scan in scans} == {"study"}


def test_participants_tell_sites_and_the_split(tmp_path):
    names = [f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz" for n in (1, 2, 3)]
    folder = _touch(tmp_path / "study", *names)
    table = folder / "participants.tsv"
    table.write_text("participant_id\tage\tsite\nsub-01\t3\tN\n02\t4\tn/a\n")
    assert [scan.site for scan in read_manifest(folder)] == ["N", "study", "study"]
    assert not has_split_column(folder)
    table.write_text("participant_id\tsplit\nsub-01\ttest\nsub-02\ttrain\nsub-03\ttrain\n")
    assert has_split_column(folder)
    assert [scan.split for scan in read_manifest(folder)] == ["test", "train", "train"]
    table.write_text("participant_id\tsplit\nsub-01\ttest\n")
    with pytest.raises(InputError, match=r"participants\.tsv: split of sub-02 is ''; write train or test"):
        read_manifest(folder)
    table.write_text("subject,site\n")
    with pytest.raises(InputError, match="no column participant_id"):
        read_manifest(folder)


def test_a_first_line_of_excel_names_the_separator(manifest):
    scans = read_manifest(manifest("sep=;\nimage;label\na.nii.gz;l.nii.gz\n"))
    assert [scan.label.name for scan in scans] == ["l.nii.gz"]
    with pytest.raises(InputError, match="line 3: image"):
        read_manifest(manifest('"sep=,"\r\nimage,label\r\nz.nii.gz,l.nii.gz\r\n'))


def test_a_header_and_rows_of_different_separators_are_refused_naming_both(manifest):
    with pytest.raises(InputError, match="line 2: separated by semicolons, its header by commas"):
        read_manifest(manifest("image,label\na.nii.gz;l.nii.gz\n"))


def test_empty_cells_that_a_spreadsheet_has_cut_are_empty(manifest):
    path = manifest("image,label,subject,site\na.nii.gz,l.nii.gz,1\nb.nii.gz,l.nii.gz\n")
    assert [(scan.subject, scan.site) for scan in read_manifest(path)] == [
        ("1", path.parent.name),
        ("b", path.parent.name),
    ]


def test_a_plain_folder_of_volumes_is_a_list_of_scans(tmp_path):
    folder = _touch(tmp_path / "lab", "a_T1w.nii.gz", "a_dseg.nii.gz", "b.nii", "c.MGZ", "._b.nii", "notes.txt")
    scans = read_manifest(folder)
    assert [(scan.image.name, scan.label and scan.label.name) for scan in scans] == [
        ("a_T1w.nii.gz", "a_dseg.nii.gz"),
        ("b.nii", None),
        ("c.MGZ", None),
    ]


def test_scans_without_label_are_left_out_of_a_folder_and_refused_in_a_manifest(tmp_path, manifest, capsys):
    folder = _touch(tmp_path / "lab", "a_T1w.nii.gz", "a_dseg.nii.gz", "b.nii")
    assert [scan.image.name for scan in labelled(read_manifest(folder), folder, "x")] == ["a_T1w.nii.gz"]
    assert "1 of 2 scans have no label and are left out" in capsys.readouterr().err
    path = manifest("image,label\na.nii.gz,l.nii.gz\nb.nii.gz,\n")
    with pytest.raises(InputError, match=r"b\.nii\.gz has no label; x"):
        labelled(read_manifest(path), path, "x")


def test_in_a_plain_folder_segmentations_are_labels_and_twins_are_refused(tmp_path):
    folder = _touch(tmp_path / "lab", "a.nii.gz", "a_seg.nii.gz", "b_T1w.mgz", "b_aparc+aseg.mgz", "c.nii", "d_seg.nii")
    assert [(scan.image.name, scan.label and scan.label.name) for scan in read_manifest(folder)] == [
        ("a.nii.gz", "a_seg.nii.gz"),
        ("b_T1w.mgz", "b_aparc+aseg.mgz"),
        ("c.nii", None),
        ("d_seg.nii", None),
    ]
    _touch(folder, "a_dseg.nii.gz")
    with pytest.raises(InputError, match=r"several segmentations fit .*a_dseg.*a_seg"):
        read_manifest(folder)
    _touch(folder, "c.nii.gz")
    with pytest.raises(InputError, match=r"several files of one name \(c\.nii, c\.nii\.gz\)"):
        read_manifest(folder)


def test_participants_are_found_in_any_spelling_and_compared_by_site_and_split_alone(tmp_path):
    folder = _touch(tmp_path / "study", "sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz")
    table = folder / "participants.tsv"
    table.write_text("Participant_ID\tAge\tSite\tSplit\n1\t20\tN\ttest\n1\t22\tN\ttest\n sub-2\t3\tM\ttrain\n")
    assert [(scan.site, scan.split) for scan in read_manifest(folder)] == [("N", "test"), ("M", "train")]
    assert has_split_column(folder)
    table.write_text("participant_id\tsite\nsub-01\tN\n1\tM\n")
    with pytest.raises(InputError, match="1 is listed twice"):
        read_manifest(folder)


RAW = "sub-01/anat/sub-01_T1w.nii.gz"
PIPELINE = "derivatives/p/sub-01/anat/sub-01"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((RAW, f"{PIPELINE}_space-orig_dseg.nii.gz"), (RAW, f"{PIPELINE}_space-orig_dseg.nii.gz")),
        ((RAW, f"{PIPELINE}_space-T1w_seg-x_dseg.nii.gz"), (RAW, f"{PIPELINE}_space-T1w_seg-x_dseg.nii.gz")),
        ((RAW, f"{PIPELINE}_atlas-DK_res-1_dseg.nii.gz"), (RAW, f"{PIPELINE}_atlas-DK_res-1_dseg.nii.gz")),
        (
            (RAW, "derivatives/v2/fmriprep/sub-01/anat/sub-01_dseg.nii.gz"),
            (RAW, "derivatives/v2/fmriprep/sub-01/anat/sub-01_dseg.nii.gz"),
        ),
        (
            (
                "sub-01/ses-1/anat/sub-01_ses-1_run-1_T1w.nii.gz",
                "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
                f"{PIPELINE}_desc-preproc_T1w.nii.gz",
                f"{PIPELINE}_desc-aparcaseg_dseg.nii.gz",
            ),
            (f"{PIPELINE}_desc-preproc_T1w.nii.gz", f"{PIPELINE}_desc-aparcaseg_dseg.nii.gz"),
        ),
        (
            (RAW, "derivatives/freesurfer/sub-01/mri/aparc+aseg.mgz", "derivatives/freesurfer/sub-01/mri/orig.mgz"),
            ("derivatives/freesurfer/sub-01/mri/orig.mgz", "derivatives/freesurfer/sub-01/mri/aparc+aseg.mgz"),
        ),
        (
            (RAW, f"{PIPELINE}_desc-brain_T1w.nii.gz", f"{PIPELINE}_dseg.nii.gz"),
            (RAW, f"{PIPELINE}_dseg.nii.gz"),
        ),
    ],
)
def test_labels_fit_by_the_entities_that_tell_scans_apart(tmp_path, names, expected):
    (scan,) = read_manifest(_touch(tmp_path, *names))
    assert (str(scan.image.relative_to(tmp_path)), str(scan.label.relative_to(tmp_path))) == expected


def test_a_segmentation_that_fits_no_image_is_named(tmp_path, capsys):
    folder = _touch(
        tmp_path, RAW, f"{PIPELINE}_run-7_dseg.nii.gz", *(f"sub-2/anat/sub-2_{s}.nii" for s in ("T1w", "dseg"))
    )
    scans = read_manifest(folder)
    assert "sub-01_run-7_dseg.nii.gz fits no image" in scans[0].remark
    labelled(scans, folder, "x")
    assert "sub-01_run-7_dseg.nii.gz fits no image" in capsys.readouterr().err


def test_a_linked_scan_counts_once(tmp_path):
    folder = _touch(tmp_path / "study", "sub-1/ses-2/anat/sub-1_ses-2_T1w.nii.gz")
    link = folder / "sub-1/ses-1/anat/sub-1_ses-1_T1w.nii.gz"
    link.parent.mkdir(parents=True)
    link.symlink_to(folder / "sub-1/ses-2/anat/sub-1_ses-2_T1w.nii.gz")
    assert [scan.image.name for scan in read_manifest(folder)] == ["sub-1_ses-2_T1w.nii.gz"]
