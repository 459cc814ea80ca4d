"""Threads that wait for files of a model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from mesh.errors import Cancelled, CorruptModel
from mesh.model.arrivals import Arrivals


def test_a_thread_waits_until_all_its_files_are_there() -> None:
    arrivals = Arrivals()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(arrivals.wait, ["a", "b"])
        arrivals.arrived("b")
        assert not waiting.done()
        arrivals.arrived("a")
        waiting.result(10)


def test_an_error_reaches_those_whose_files_are_not_there() -> None:
    arrivals = Arrivals()
    arrivals.arrived("a")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(arrivals.wait, ["a", "b"])
        arrivals.fail(CorruptModel("damaged"))
        arrivals.stop()
        with pytest.raises(CorruptModel, match="damaged"):
            waiting.result(10)
    arrivals.wait(["a"])


def test_after_the_end_nobody_waits() -> None:
    arrivals = Arrivals()
    arrivals.stop()
    with pytest.raises(Cancelled):
        arrivals.wait(["a"])
