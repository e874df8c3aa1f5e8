"""Faults of the machine and of hostile code, with small counts; a tenth of the full ones is slow; all by hand."""

import pytest

from tests.faults import hostile, machine
from tests.faults.arena import Fault, Rounds

FAULTS = [pytest.param(fault, id=name) for name, fault in {**machine.FAULTS, **hostile.FAULTS}.items()]


def strike(fault: Fault, count: int) -> None:
    for workload in fault.workloads:
        figures = fault.run(Rounds(count), workload)
        assert figures["connections"] > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_nobody_anything_and_heals(fault: Fault) -> None:
    strike(fault, fault.small)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_strikes_often_costs_nobody_anything_and_heals(fault: Fault) -> None:
    strike(fault, max(fault.small, fault.full // 10))
