"""The list of mutants fits the sources; `make faults` runs them."""

from __future__ import annotations

import pytest
from faults.mutants import MUTANTS, PACKAGE, TESTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_that_a_mutant_changes_is_there_once(mutant: Mutant) -> None:
    assert (PACKAGE / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert all((TESTS / test.split("::")[0]).exists() for test in mutant.tests.split() if not test.startswith("-"))
