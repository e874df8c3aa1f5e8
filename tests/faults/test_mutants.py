"""Every planted bug is found."""

import shutil
from pathlib import Path

import pytest

from tests.faults.mutants import MUTANTS, Mutant, kills


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_planted_bug_is_found(mutant: Mutant, tmp_path: Path) -> None:
    assert kills(mutant, tmp_path), f"no test noticed {mutant.name}"
    shutil.rmtree(tmp_path)
