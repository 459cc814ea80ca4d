"""While a model is traced: what its layers with states compute in a form that a graph can hold.

The mask of padding is left out, because a block is given no padding where it has states.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["recurrences"]


@contextmanager
def recurrences(module: Any) -> Iterator[None]:
    """Within the block, the layers of `module` compute their recurrences in a form that can be traced."""
    homes = {name: sys.modules[name] for name in {type(each).__module__ for each in module.modules()} if name in sys.modules}
    replaced = [(home, name, getattr(home, name)) for home in homes.values() for name in _IN_PLACE_OF if hasattr(home, name)]
    for home, name, _ in replaced:
        setattr(home, name, _IN_PLACE_OF[name])
    try:
        yield
    finally:
        for home, name, own in replaced:
            setattr(home, name, own)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


_IN_PLACE_OF = {"create_recurrent_attention_mask": _no_mask}
