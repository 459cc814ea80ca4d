"""GET /docs: the OpenAPI description as a page, without scripts and without files of other hosts."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from html import escape
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["docs", "page_of"]

docs = APIRouter()

_STYLE: Final = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1.5rem;"
    "background:light-dark(#fff,#161618);color:light-dark(#1c1b18,#ecebe6)}"
    "a{color:light-dark(#1f3bb3,#a9b8ff)}h2{margin:2.5rem 0 .25rem;font-size:1.1rem}"
    "code{font-family:ui-monospace,monospace;overflow-wrap:anywhere}table{border-collapse:collapse;width:100%;margin:.5rem 0}"
    "th,td{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-top:1px solid light-dark(#ccc,#444)}"
    ".method{display:inline-block;min-width:4.5rem}.scroll{overflow-x:auto}"
)
_POLICY: Final = f"default-src 'none'; style-src 'sha256-{b64encode(sha256(_STYLE.encode()).digest()).decode()}'; frame-ancestors 'none'"


@docs.get("/docs", include_in_schema=False)
async def page(request: Request) -> Response:
    """The routes, their fields and their answers."""
    body = page_of(request.app.openapi())
    return Response(body, media_type="text/html", headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"})


def page_of(document: dict[str, Any]) -> str:
    """The page of an OpenAPI document."""
    info, schemas = document["info"], document["components"]["schemas"]
    parts = [
        _operation(method, path, operation, schemas)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    title = escape(f"{info['title']} {info['version']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}: HTTP</title><style>{_STYLE}</style></head><body><main><h1>{title}</h1><p>{escape(info['description'])} "
        f'The same as <a href="/openapi.json">OpenAPI</a>; <a href="/">the dashboard</a>.</p>{"".join(parts)}</main></body></html>'
    )


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    answers = ", ".join(f"{status} {answer.get('description', '')}".strip() for status, answer in operation["responses"].items())
    rows = [(p["name"], _type(p.get("schema", {})), bool(p.get("required")), "") for p in operation.get("parameters", [])]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body is not None:
        found = schemas.get(str(body.get("$ref", "")).rpartition("/")[2], body)
        needed = found.get("required", [])
        rows += [(name, _type(field), name in needed, _default(field)) for name, field in found.get("properties", {}).items()]
    text, table = escape(operation.get("description") or operation.get("summary", "")), _table(rows, f"Fields of {method.upper()} {path}")
    return (
        f'<h2><code><span class="method">{escape(method.upper())}</span> {escape(path)}</code></h2><p>{text}</p>{table}'
        f"<p>Answers: {escape(answers)}</p>"
    )


def _table(rows: list[tuple[str, str, bool, str]], label: str) -> str:
    if not rows:
        return ""
    lines = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th><td>{escape(kind)}</td><td>{"required" if needed else ""}</td>'
        f"<td>{escape(text)}</td></tr>"
        for name, kind, needed, text in rows
    )
    head = '<tr><th scope="col">field</th><th scope="col">type</th><th scope="col">needed</th><th scope="col">what it is</th></tr>'
    table = f"<table><thead>{head}</thead><tbody>{lines}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(one) for one in field["anyOf"]))
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "enum" in field or "const" in field:
        return " or ".join(map(repr, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "any"))


def _default(field: dict[str, Any]) -> str:
    text = str(field.get("description", ""))
    default = field.get("default")
    return text if default in (None, [], {}) else f"{text} (default {default})".strip()
