"""What is installed, what runs here, and the command that mends what does not: ``infoprune-export doctor``.

1. Packages   every distribution the toolkit uses: version, supported range, whether it imports
2. Devices    the NVIDIA driver, and what torch can do with it
3. Backends   the engines that can be opened here
4. Targets    the machines that engines can be built for here
5. Conflicts  installed things that exclude each other
6. Report     the same findings for a person; `dataclasses.asdict` gives them to a program

A finding of status ``problem`` means a run will fail: the command exits with 1, in all other cases with 0. Only the
standard library is needed, so ``python -m infoprune_export.doctor`` still speaks when the command itself cannot start.
"""

from infoprune_export.doctor.checks import CHECKS, examine
from infoprune_export.doctor.findings import Finding, Group, Status, worst
from infoprune_export.doctor.packages import PACKAGES, Package
from infoprune_export.doctor.probes import Driver, find_driver
from infoprune_export.doctor.report import commands, render

__all__ = [
    "CHECKS",
    "PACKAGES",
    "Driver",
    "Finding",
    "Group",
    "Package",
    "Status",
    "commands",
    "examine",
    "find_driver",
    "render",
    "worst",
]
