"""What `prefork check` makes of where a hanging import was."""

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
