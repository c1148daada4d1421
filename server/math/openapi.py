"""The interface in OpenAPI 3.1, and a page of it that needs nothing from the network."""

import html
import json
from typing import Any

PAIR = {"gold": r"\frac{3}{5}", "pred": "0.6"}
RESULT = {"equal": True, "how": "numeric", "status": "ok"}
ROUTES = {  # path: summary, example of a request, example or media type of an answer
    "/is_equal": ("Is str2 equal to the reference str1?",
                  {"str1": PAIR["gold"], "str2": PAIR["pred"]}, {"equal": True}),
    "/verify": ("Which of the predictions equal their references? Results come in their order.",
                {"pairs": [PAIR]}, {"results": [RESULT]}),
    "/health": ("200 where the server can answer, else 503", None, "application/json"),
    "/metrics": ("Counters for Prometheus", None, "text/plain"),
    "/openapi.json": ("This document", None, "application/json"),
}  # fmt: skip
FIELDS = {
    "equal": {"type": "boolean", "description": "False unless shown to be equal"},
    "how": {"type": "string", "description": "The stage that decided, e.g. identical or symbolic"},
    "status": {
        "enum": ["ok", "undecided", "timeout", "memory", "unparsable", "error"],
        "description": "undecided: a part of the answer was not understood; timeout, memory: a"
        " limit was reached before a decision",
    },
}
ERRORS = {
    "400": "The body isn't a JSON object in UTF-8",
    "408": "The body didn't arrive in time",
    "413": "The body or the number of pairs is over the limit",
    "422": "A field is missing, isn't a string, or holds a lone surrogate",
    "503": "The queue is full or the server shuts down: try again after Retry-After seconds",
}


def _schema(example: Any) -> dict[str, Any]:
    """What has the fields of `example`, all of them required."""
    if isinstance(example, dict):
        properties = {name: FIELDS.get(name) or _schema(part) for name, part in example.items()}
        return {"type": "object", "required": list(example), "properties": properties}
    if isinstance(example, list):
        return {"type": "array", "items": _schema(example[0])}
    return {"type": "string"}


def _content(example: Any) -> dict[str, Any]:
    return {"application/json": {"schema": _schema(example), "example": example}}


def _route(summary: str, request: Any, answer: Any) -> dict[str, Any]:
    if request is None:
        responses = {"200": {"description": "", "content": {answer: {}}}}
        return {"get": {"summary": summary, "responses": responses}}
    responses = {"200": {"description": "Verdict", "content": _content(answer)}}
    for code, text in ERRORS.items():
        responses[code] = {"description": text, "content": _content({"error": "…"})}
    body = {"required": True, "content": _content(request)}
    return {"post": {"summary": summary, "requestBody": body, "responses": responses}}


INFO = {
    "title": "LaTeX equivalence", "version": "1.0",
    "description": "Judges whether two LaTeX answers to a mathematical question are equal.",
}  # fmt: skip
PATHS = {path: _route(*route) for path, route in ROUTES.items()}
DOCUMENT: dict[str, Any] = {"openapi": "3.1.0", "info": INFO, "paths": PATHS}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem}}
pre{{background:#f4f4f4;padding:.6rem;overflow:auto}}td{{padding-right:1rem}}</style>
<h1>{title}</h1><p>{description} <a href="/openapi.json">openapi.json</a></p>{routes}</html>"""


def page() -> str:
    """The routes as HTML, each with its examples, and the status codes of errors."""
    parts = []
    for path, (summary, request, answer) in ROUTES.items():
        parts.append(f"<h2>{'POST' if request else 'GET'} {path}</h2><p>{html.escape(summary)}</p>")
        for example in (request, answer) if request else ():
            parts.append(f"<pre>{html.escape(json.dumps(example, indent=2))}</pre>")
    rows = (f"<tr><td>{code}<td>{html.escape(text)}" for code, text in ERRORS.items())
    parts += ["<h2>Errors</h2><table>", *rows, "</table>"]
    return PAGE.format(**INFO, routes="".join(parts))
