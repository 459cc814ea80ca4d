"""The list of passes that bring any exported decoder to the one form that the analysis reads, in order, each with its reason.

A pass takes a Draft, rewrites it in place and returns whether it changed anything. To add one, write it in a file of its own in
this package and give it a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from mesh.importer.graph.decoder import Draft
from mesh.importer.passes.batch import free_batch
from mesh.importer.passes.branches import inline_one_branch, take_cache_branch
from mesh.importer.passes.casts import name_types
from mesh.importer.passes.contrib import rewrite_contrib
from mesh.importer.passes.einsum import rewrite_einsum
from mesh.importer.passes.experts import make_experts_static, mask_chosen_rows
from mesh.importer.passes.identities import drop_identities, drop_single_input_nodes
from mesh.importer.passes.inputs import name_inputs
from mesh.importer.passes.opset import convert_opset
from mesh.importer.passes.sequences import rewrite_sequences
from mesh.importer.passes.shifts import drop_shifts
from mesh.importer.passes.sinks import append_sinks

__all__ = ["PIPELINE", "Pass", "Repeat", "run_passes"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass, and why it stands where it stands."""

    run: Callable[[Draft], bool]
    why: str


@dataclass(frozen=True, slots=True)
class Repeat:
    """Passes that are run in turn until the last of them changes nothing."""

    passes: tuple[Pass, ...]
    why: str


def library(its_pass: ir.passes.PassBase) -> Callable[[Draft], bool]:
    """A pass of onnx_ir, which knows the model alone."""
    return lambda draft: its_pass(draft.model).modified


PIPELINE: tuple[Pass | Repeat, ...] = (
    Pass(library(common.InlinePass()), "every later pass looks at nodes, not at functions made of nodes"),
    Pass(take_cache_branch, "before the inputs are named: a merged decoder has all its nodes in two branches"),
    Pass(
        library(common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)),
        "a constant is then one thing, whether it was written as a node or as an initializer",
    ),
    Pass(library(common.RemoveInitializersFromInputsPass()), "before the inputs are named: old exports list their weights as inputs"),
    Pass(name_inputs, "every later pass asks what a value depends on, which begins with what each input is"),
    Pass(convert_opset, "before anything is rewritten, so that later passes know one form of each operator"),
    Repeat(
        (
            Pass(rewrite_contrib, "conditions and shapes can be evaluated for standard operators only"),
            Pass(rewrite_einsum, "after the contrib operators, which may hold one"),
            Pass(inline_one_branch, "last: what was inside a branch goes through the passes before it in the next turn"),
        ),
        "a branch may hold contrib operators, and branches of its own",
    ),
    Pass(rewrite_sequences, "after the branches, which may hold some: no later pass knows what a sequence is"),
    Pass(drop_identities, "after the branches: inside one, an Identity would rename a value of the outer graph"),
    Pass(drop_single_input_nodes, "with the identities, which they are in all but name"),
    Pass(name_types, "before anything asks what the scores depend on: not on the value that a CastLike has its type of"),
    Pass(append_sinks, "after the identities, which could stand between the parts of its pattern"),
    Pass(drop_shifts, "after the identities, which could stand between; what comes before a softmax is then its scores"),
    Pass(free_batch, "before the experts, whose indices are made for any number of rows"),
    Repeat((Pass(make_experts_static, "one choice at a time"),), "a choice among chosen rows can be read once the outer one is static"),
    Pass(mask_chosen_rows, "last: it follows the rows of all experts to where they are added"),
)


def run_passes(draft: Draft, passes: Sequence[Pass | Repeat]) -> None:
    """Run `passes` on `draft` in order. UnsupportedModel where one meets what it cannot rewrite."""
    for step in passes:
        if isinstance(step, Pass):
            step.run(draft)
            continue
        while [each.run(draft) for each in step.passes][-1]:
            pass
