"""From ONNX graphs to pure JAX functions.

lower       the interpreter that runs a graph once, while JAX traces it
registry    which function computes which op, and the facts about its shapes
ops         the functions, by family
op_helpers  what these functions share
static      values that are known while a graph is compiled
prepare     before the first trace: inline, drop dead nodes, check, split weights from constants
tensors     initializers as arrays
operands    what the right operand of a product is made of
experts     products with the weights of the experts that each token has chosen
join        several products of one input become one
states      the part of a head before its product with the vocabulary
rounding    inputs that are rounded to bfloat16 before a product
fuse        what stands beside the products goes into the calls of the kernels
linear      x @ W in several variants, and the choice among them
weights     a matmul weight as the runtime holds it
"""

from __future__ import annotations

from mesh.lowering import ops, registry
from mesh.lowering.lower import Lowered, lower
from mesh.lowering.registry import register

__all__ = ["Lowered", "lower", "register", "supported"]


def supported(op_type: str, domain: str = "", opset: int = 24) -> bool:
    """Whether an op has a lowering in that opset of its domain.

    Standard ops defined as functions need none (`lower` expands them), and attributes are checked by `lower`.
    """
    ops.load()
    return registry.find(op_type, domain, opset) is not None
