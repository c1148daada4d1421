"""The interface in OpenAPI 3.1, and a page of it that needs nothing from the network."""

import html
import json
from typing import Any

GOLD, PRED = r"\frac{3}{5}", "0.6"
TEXT = {"type": "string"}
VERDICT = {
    "type": "object",
    "required": ["equal", "how", "status"],
    "properties": {
        "equal": {"type": "boolean", "description": "False unless shown to be equal"},
        "how": {**TEXT, "description": "The stage that decided, e.g. identical or symbolic"},
        "status": {
            "enum": ["ok", "undecided", "timeout", "memory", "unparsable", "error"],
            "description": "undecided: a part of the answer was not understood; timeout, memory: a"
            " limit was reached before a decision",
        },
    },
}
ERRORS = {
    "400": "The body isn't a JSON object in UTF-8",
    "408": "The body didn't arrive in time",
    "413": "The body or the number of pairs is over the limit",
    "422": "A field is missing, isn't a string, or holds a lone surrogate",
    "503": "The queue is full or the server shuts down: try again after Retry-After seconds",
}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _content(schema: dict[str, Any], example: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema, "example": example}}


def _post(
    summary: str, request: dict[str, Any], example: Any, answer: dict[str, Any], shown: Any
) -> dict[str, Any]:
    error = _content(_object(error=TEXT), {"error": "…"})
    responses = {"200": {"description": "Verdict", "content": _content(answer, shown)}}
    responses |= {code: {"description": text, "content": error} for code, text in ERRORS.items()}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": _content(request, example)},
            "responses": responses,
        }
    }


def _get(summary: str, media_type: str) -> dict[str, Any]:
    content = {media_type: {}}
    return {
        "get": {"summary": summary, "responses": {"200": {"description": "", "content": content}}}
    }


DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "LaTeX equivalence",
        "version": "1.0",
        "description": "Judges whether two LaTeX answers to a mathematical question are equal.",
    },
    "paths": {
        "/is_equal": _post(
            "Is str2 equal to the reference str1?",
            _object(str1=TEXT, str2=TEXT),
            {"str1": GOLD, "str2": PRED},
            _object(equal={"type": "boolean"}),
            {"equal": True},
        ),
        "/verify": _post(
            "Which of the predictions equal their references? Results come in the pairs' order.",
            _object(pairs={"type": "array", "items": _object(gold=TEXT, pred=TEXT)}),
            {"pairs": [{"gold": GOLD, "pred": PRED}]},
            _object(results={"type": "array", "items": VERDICT}),
            {"results": [{"equal": True, "how": "numeric", "status": "ok"}]},
        ),
        "/health": _get("200 where the server can answer, else 503", "application/json"),
        "/metrics": _get("Counters for Prometheus", "text/plain"),
        "/openapi.json": _get("This document", "application/json"),
    },
}

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem}}
pre{{background:#f4f4f4;padding:.6rem;overflow:auto}}td{{padding-right:1rem}}</style>
<h1>{title}</h1><p>{description} <a href="/openapi.json">openapi.json</a></p>{routes}</html>"""


def page() -> str:
    """`DOCUMENT` as HTML: each route with an example and its status codes."""
    routes = []
    for path, methods in DOCUMENT["paths"].items():
        for method, route in methods.items():
            routes.append(f"<h2>{method.upper()} {path}</h2><p>{html.escape(route['summary'])}</p>")
            if "requestBody" not in route:
                continue
            for part in (route["requestBody"], route["responses"]["200"]):
                example = part["content"]["application/json"]["example"]
                routes.append(f"<pre>{html.escape(json.dumps(example, indent=2))}</pre>")
            rows = (
                f"<tr><td>{code}<td>{html.escape(response['description'])}"
                for code, response in route["responses"].items()
            )
            routes.append(f"<table>{''.join(rows)}</table>")
    info = DOCUMENT["info"]
    return PAGE.format(title=info["title"], description=info["description"], routes="".join(routes))
