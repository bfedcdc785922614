"""What a target's parser or builder would refuse in a graph, found without either.

1. The file as it is   opset, functions, plugins: `lint_parser.file_rules`
2. The file prepared   `prepare.insert_operators`, types and shapes inferred; with a profile, K of every TopK
3. Nodes               operators, constants, extents, loops, tensors: `lint_parser.node_rules`
4. Precision           overflow, widths, attention that is not fused: `lint_precision.precision_rules`

The rules are `limits`, which is what is written about TensorRT. A clean file may still be refused, by a builder that
knows more; only a build on the target proves it.
"""

from __future__ import annotations

from pathlib import Path

from infoprune_export.engine.tensorrt.findings import LintFinding, table_of
from infoprune_export.engine.tensorrt.limits import limits_of
from infoprune_export.engine.tensorrt.lint_graph import view_of
from infoprune_export.engine.tensorrt.lint_parser import file_rules, node_rules
from infoprune_export.engine.tensorrt.lint_precision import precision_rules
from infoprune_export.engine.tensorrt.prepare import read_graph
from infoprune_export.engine.tensorrt.profiles import Profile
from infoprune_export.recipe.targets import TensorRtTarget

__all__ = ["LintFinding", "lint", "table_of"]


def lint(model: Path, target: TensorRtTarget, profile: Profile | None = None) -> list[LintFinding]:
    """Findings about an exported or a prepared file, an exported one as `prepare` would write it for the target.

    Without a profile, K of a TopK that is no constant is not checked.

    Raises:
        InfopruneError: the file cannot be read, the profile is for other inputs, or the target's TensorRT is older than
            all whose limits are known.
    """
    limits = limits_of(target.tensorrt)
    findings = list(file_rules(read_graph(model), limits, target.opset))
    if any(finding.rule.startswith("function") for finding in findings):
        return findings  # they cannot be inlined, or not as the parser would read them
    view = view_of(model, target.token_select, profile)
    return [*findings, *node_rules(view, limits), *precision_rules(view)]
