"""What `prefork check` makes of where a hanging import was."""

import pytest

from prefork import check, handler

USER = '  File "/srv/mine.py", line 3 in <module>'
IMPORTLIB = '  File "<frozen importlib._bootstrap>", line 241 in _call_with_frames_removed'
OURS = [f'  File "{handler.__file__}", line 150 in _find', f'  File "{check.__file__}", line 180 in _import_and_exit']
HEADER = "Current thread 0x00007f0000000000 (most recent call first):"


def test_the_frames_of_user_code_are_shown() -> None:
    said = "\n".join([HEADER, '  File "/srv/lib.py", line 9 in wait', USER, IMPORTLIB, *OURS])
    assert check._where(said) == f'; it was here (most recent call first)\n  File "/srv/lib.py", line 9 in wait\n{USER}'


def test_no_frames_of_ours_are_shown_for_an_import_that_has_not_begun() -> None:
    assert check._where("\n".join([HEADER, *OURS[1:]])) == ""
    assert check._where("\n".join([HEADER, *OURS])) == ""
    assert check._where("") == ""


@pytest.mark.parametrize(
    ("said", "begun", "since"),
    [
        ("", "the import", ""),
        ("Traceback", "the import", "Traceback"),
        ("on_boot = a:b\0", "on_boot = a:b", ""),
        ("on_boot = a:b\0imported\0one\n", "imported", "one\n"),
        ("imported\0", "the import", "imported\0"),
        ("on_boot = a:b\0on_boot = a:b\0", "on_boot = a:b", "on_boot = a:b\0"),
    ],
)
def test_the_step_that_was_begun_last_is_known(said: str, begun: str, since: str) -> None:
    assert check._last_begun(said, ["on_boot = a:b", "imported"]) == (begun, since)
