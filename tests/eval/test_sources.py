"""The code that a run ran, as the report reads it from the run folder."""

from eval.report.sources import other_files, read_sources


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def test_a_run_that_went_on_under_other_code_is_not_the_run_that_did_not(tmp_path):
    """What counts is the last code of each file; comments, formatting and docstrings are no difference."""
    for name in ("same", "other"):
        write(tmp_path / name / "source", script='"""Doc."""\nx = 1\n', model="y = 2\n")
    write(tmp_path / "same" / "source-10", script="# a comment\nx  =  1\n")
    assert other_files(*(read_sources(tmp_path / name) for name in ("same", "other"))) == []
    write(tmp_path / "other" / "source-9", script="x = 3\n")
    assert other_files(*(read_sources(tmp_path / name) for name in ("same", "other"))) == ["script.py"]
    write(tmp_path / "other" / "source-10", script="x = 1\n")  # after 9, although not by name
    assert other_files(*(read_sources(tmp_path / name) for name in ("same", "other"))) == []


def test_a_folder_without_sources_tells_nothing_apart(tmp_path):
    assert read_sources(tmp_path) == {}
