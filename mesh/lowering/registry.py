"""The op registry: which function computes which ONNX op, from which opset on.

An op is one plain function with ONNX's own name and signature: inputs are positional (absent optional ones are None), attributes are
keyword-only with ONNX's names and defaults. The registry reads the attributes from the signature, so an attribute that a function does
not take is refused before anything is traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = ["MICROSOFT", "Op", "find", "op_types", "register"]

MICROSOFT = "com.microsoft"

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Op:
    """One registered function.

    `numpy`: the function takes numpy arrays too and then returns numpy (any other function is evaluated by JAX when all its
    inputs are numpy, and the result brought back). `takes_outputs` / `takes_scope`: it wants the number of outputs its node
    names, or the interpreter's scope (control flow). The facts about shapes are those that `register` explains.
    """

    op_type: str
    domain: str
    since: int
    function: Callable[..., Any]
    numpy: bool
    attributes: frozenset[str]
    required: frozenset[str]
    max_inputs: int | None  # None: variadic
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    takes_outputs: bool = False
    takes_scope: bool = False
    static: tuple[int, ...] = ()
    static_if_known: tuple[int, ...] = ()
    type_only: tuple[int, ...] = ()
    shape_only: bool = False
    same_shape: bool = False
    broadcasts: bool = False
    to_bool: bool = False

    def problem(self, attributes: Mapping[str, Any], inputs: int) -> str | None:
        """Why a node with these attributes and that many inputs cannot be evaluated, or None."""
        unknown = sorted(set(attributes) - self.attributes)
        if unknown:
            return f"attribute {', '.join(unknown)} is not known"
        missing = sorted(self.required - set(attributes))
        if missing:
            return f"attribute {', '.join(missing)} is missing"
        if self.max_inputs is not None and inputs > self.max_inputs:
            return f"{inputs} inputs where at most {self.max_inputs} are known"
        for name, values in self.allowed.items():
            if name in attributes and attributes[name] not in values:
                return f"attribute {name} = {attributes[name]!r} (supported: {', '.join(map(repr, values))})"
        return None


_OPS: dict[tuple[str, str], dict[int, Op]] = {}

# Keyword parameters that the interpreter fills in; they are no attributes.
_INJECTED = {"n_outputs", "scope"}


def register(
    op_type: str | None = None,
    *,
    domain: str = "",
    since: int = 1,
    numpy: bool = False,
    allowed: Mapping[str, tuple[Any, ...]] | None = None,
    static: tuple[int, ...] = (),
    static_if_known: tuple[int, ...] = (),
    type_only: tuple[int, ...] = (),
    shape_only: bool = False,
    same_shape: bool = False,
    broadcasts: bool = False,
    to_bool: bool = False,
) -> Callable[[_F], _F]:
    """Register the decorated function as `op_type` (default: its own name) of `domain`, from opset `since` on.

    `allowed` restricts attributes to the values named. A keyword parameter `n_outputs` is given the number of outputs of the
    node. Other packages may register ops of their own domains; registering the same (domain, op, since) twice is an error.

    Inputs, by position:
        static           must be known when the graph is compiled, because they decide a shape or which code runs
        static_if_known  stay numpy where they are known (there is a cheaper form), and may be traced as well
        type_only        only their type is used
    Shapes and types of the result:
        shape_only       the result follows from the shape of the first input alone
        same_shape       the result has the shape of the first input
        broadcasts       the result has the shape that all inputs broadcast to
        to_bool          the result is bool; other ops that are same_shape or broadcast keep their input's type
    """

    def add(function: _F) -> _F:
        name = op_type or function.__name__
        positional, keywords, required = 0, set(), set()
        variadic = False
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                variadic = True
            elif parameter.kind is parameter.KEYWORD_ONLY:
                keywords.add(parameter.name)
                if parameter.default is parameter.empty and parameter.name not in _INJECTED:
                    required.add(parameter.name)
            else:
                positional += 1
        versions = _OPS.setdefault((domain, name), {})
        if since in versions:
            raise ValueError(f"{domain or 'ai.onnx'}.{name} is already registered for opset {since}")
        versions[since] = Op(
            op_type=name,
            domain=domain,
            since=since,
            function=function,
            numpy=numpy,
            attributes=frozenset(keywords - _INJECTED),
            required=frozenset(required),
            max_inputs=None if variadic else positional,
            allowed=dict(allowed or {}),
            takes_outputs="n_outputs" in keywords,
            takes_scope="scope" in keywords,
            static=static,
            static_if_known=static_if_known,
            type_only=type_only,
            shape_only=shape_only,
            same_shape=same_shape,
            broadcasts=broadcasts,
            to_bool=to_bool,
        )
        return function

    return add


def find(op_type: str, domain: str, opset: int) -> Op | None:
    """The newest function compatible with `opset`, or None."""
    versions = _OPS.get(("" if domain == "ai.onnx" else domain, op_type))
    if not versions:
        return None
    usable = [since for since in versions if since <= opset]
    return versions[max(usable)] if usable else None


def op_types(fact: Callable[[Op], bool], domain: str = "") -> frozenset[str]:
    """The ops of `domain` whose newest function has this fact."""
    return frozenset(name for (of, name), versions in _OPS.items() if of == domain and fact(versions[max(versions)]))
