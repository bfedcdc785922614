"""``python -m infoprune_export.doctor``: the doctor when the command itself cannot start."""

import sys

from infoprune_export.doctor import examine, render, worst

if __name__ == "__main__":
    result = examine()
    render(result)
    sys.exit(1 if worst(result) == "problem" else 0)
