"""The client of the LaTeX server, for Python and the command line; needs only the standard library.

python client.py '\\frac{3}{5}' 0.6          prints the verdict; exit status 0 equal, 1 not equal
python client.py --pairs pairs.jsonl         one {"gold", "pred"} a line in, one verdict a line out

Client("http://127.0.0.1:6284").verify([(r"\\frac{3}{5}", "0.6")])[0]["equal"]
"""

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEFAULT_URL = "http://127.0.0.1:6284"
PAIRS_PER_REQUEST = 256


class Client:
    """Calls the server at `url` (default MATH_SERVER_URL, else `DEFAULT_URL`): `timeout` seconds
    for one answer, and `max_wait` seconds to go on trying after connection errors and 503."""

    def __init__(self, url: str | None = None, max_wait: float = 60, timeout: float = 300) -> None:
        self.url = (url or os.environ.get("MATH_SERVER_URL") or DEFAULT_URL).rstrip("/")
        self.max_wait, self.timeout = max_wait, timeout

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """`{"equal", "how", "status"}` for each (gold, pred), in order."""
        results: list[dict[str, Any]] = []
        for start in range(0, len(pairs), PAIRS_PER_REQUEST):
            part = pairs[start : start + PAIRS_PER_REQUEST]
            body = {"pairs": [{"gold": gold, "pred": pred} for gold, pred in part]}
            results += self.call("/verify", body)["results"]
        return results

    def call(self, path: str, body: object = None) -> dict[str, Any]:
        """The JSON answer to a POST of `body`, or to a GET without one. Raises `ConnectionError`
        without an answer within `max_wait`, `ValueError` with the text of a refusal (4xx)."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        deadline, pause = time.monotonic() + self.max_wait, 0.1
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason = error.read(1000).decode(errors="replace")
                if 400 <= error.code < 500:
                    raise ValueError(f"{self.url}{path}: {error.code} {reason}") from error
                failure: Exception = error
            except (OSError, http.client.HTTPException) as error:
                failure = error
            if time.monotonic() + pause > deadline:
                text = f"no answer from {self.url} ({failure}); start it by server/math/start.sh"
                raise ConnectionError(text) from failure
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def read_pairs(path: str) -> list[tuple[str, str]]:
    """(gold, pred) of each line of a JSON-lines file; `-` is standard input."""
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    objects = (json.loads(line) for line in text.split("\n") if line.strip())
    return [(item["gold"], item["pred"]) for item in objects]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", nargs="*", metavar="GOLD PRED", help="two LaTeX answers")
    parser.add_argument("--pairs", metavar="FILE", help="JSON lines with gold and pred; - is stdin")
    parser.add_argument("--health", action="store_true", help="state of the server")
    parser.add_argument("--url", help=f"of the server [MATH_SERVER_URL or {DEFAULT_URL}]")
    parser.add_argument("--max-wait", type=float, default=5.0, help="seconds to try for [5]")
    options = parser.parse_args(arguments)
    if not (options.pairs or options.health) and len(options.answers) != 2:
        parser.error("two answers, --pairs FILE or --health is needed")
    client = Client(options.url, options.max_wait)
    try:
        if options.health:
            print(json.dumps(client.call("/health")))
            return 0
        pairs = read_pairs(options.pairs) if options.pairs else [tuple(options.answers)]
        results = client.verify(pairs)
    except (OSError, ValueError, KeyError) as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 2
    for result in results:
        print(json.dumps(result))
    return int(not all(result["equal"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
