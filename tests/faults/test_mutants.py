"""Every planted bug is found."""

import shutil
from pathlib import Path

import pytest

import prefork
from tests.faults.mutants import MUTANTS, Mutant, copy, kills, run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_a_bug_the_same_tests_notice_nothing(tmp_path: Path) -> None:
    copy(tmp_path)
    checks = dict.fromkeys(check for mutant in MUTANTS for check in mutant.check)
    if noticed := run(checks, tmp_path):
        pytest.fail(noticed, pytrace=False)
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_planted_bug_is_found(mutant: Mutant, tmp_path: Path) -> None:
    assert kills(mutant, tmp_path), f"no test noticed {mutant.name}"
    shutil.rmtree(tmp_path)


def test_every_planted_bug_has_its_place() -> None:
    package = Path(prefork.__file__).parent
    wrong = {mutant.name for mutant in MUTANTS if (package / mutant.file).read_text().count(mutant.old) != 1}
    assert wrong == set(), "what they replace stands there once, so that it is clear what is tested"
