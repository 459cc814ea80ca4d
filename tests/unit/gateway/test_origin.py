"""Which requests of web pages are answered where no token is required."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from mesh.gateway.origin import foreign_page


def answered(method: str, allowed: tuple[str, ...] = (), **headers: str) -> bool:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return foreign_page(method, Headers({"host": "127.0.0.1:8080", **named}), allowed) is None


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "http://127.0.0.1:8081", "https://127.0.0.1", "null", "", "http://127.0.0.1:8080.evil.example",
     "http://127.0.0.1:8080@evil.example", "file://", "http://[", "http://127.0.0.1:x", "127.0.0.1:8080", "http://localhost:8080"],
)  # fmt: skip
def test_a_page_of_another_origin_changes_nothing(origin: str) -> None:
    for method in ("POST", "DELETE", "PUT", "PATCH"):
        assert not answered(method, origin=origin)
        assert answered(method, (origin,), origin=origin) and answered(method, ("*",), origin=origin)
    for method in ("GET", "HEAD", "OPTIONS"):
        assert answered(method, origin=origin)


def test_no_page_and_a_page_of_the_listener_are_answered() -> None:
    assert answered("POST")
    for scheme in ("http", "https"):
        assert answered("POST", origin=f"{scheme}://127.0.0.1:8080", sec_fetch_site="same-origin")
    for host, origin in (
        ("mesh", "http://mesh"),
        ("mesh:80", "http://mesh"),
        ("[::1]:8080", "http://[::1]:8080"),
        ("Mesh", "http://mesh:80"),
    ):
        assert answered("POST", host=host, origin=origin)


def test_without_an_origin_the_browser_says_which_site_it_was() -> None:
    for site, served in (("none", True), ("same-origin", True), ("same-site", False), ("cross-site", False), ("new", False)):
        assert answered("POST", sec_fetch_site=site) is served
        assert answered("GET", sec_fetch_site=site)
