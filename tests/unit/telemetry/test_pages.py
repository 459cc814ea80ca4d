"""The generated tables of docs/ are as the code says them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.telemetry.pages import TABLES, updated

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("page", TABLES)
def test_a_page_is_as_the_code_says(page: str) -> None:
    text = (DOCS / page).read_text()
    assert updated(page, text) == text, "run `python -m mesh.telemetry.pages docs`"


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="spans"):
        updated("tracing.md", "# Traces\n")
