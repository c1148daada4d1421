"""The LaTeX server as a process of its own: interface, limits, load, signals."""

import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("uvloop", reason="needs the server's environment")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "server" / "math"
TIME_LIMIT = 2.0
HOSTILE = [
    "9^{9^{9^{9}}}",
    "9^{9^{9}}",
    "(10^{9})!",
    "(3\\cdot 10^7)!-1",
    "{" * 5000 + "1" + "}" * 5000,
    "{" * 2000 + "1" + "}" * 2000,
    "\\frac{" * 800 + "1",
    "\\sqrt{" * 600 + "2" + "}" * 600,
    "x^{" * 100 + "2" + "}" * 100,
    "2_{" * 100 + "2" + "}" * 100,
    "1\0",
    "\0" * 100,
    "\\int_0^{\\infty} \\frac{\\sin(x^{7}) \\ln(x+3)}{\\tan(x^2)+e^{x^3}} dx",
    "\\prod_{n=1}^{10000000} (1+\\frac{1}{n^2})",
    "\\sum_{n=1}^{800} x^{n}",
    "(" + "+".join(f"x_{{{i}}}" for i in range(200)) + ")^{40}",
    "1" * 5000,
    "x" * 1_000_000,
    "__import__('os').system('exit 7')",
    "\\input{/etc/passwd}",
    "\u202e1\ufeff",
    "𝟙" * 3000,
]
PAIRS = [
    ("\\frac{3}{5}", "0.6", True),
    ("\\frac{3}{5}", "0.61", False),
    ("(x+1)^2", "x^2+2x+1", True),
    ("(x+1)^2", "x^2+2x+2", False),
    ("2\\sqrt{2}", "\\sqrt{8}", True),
    ("\\sin^2(t)+\\cos^2(t)", "1", True),
    ("(1,2)", "(1,3)", False),
    ("\\frac{x^2-1}{x-1}", "x+1", True),
]


class Running:
    """A server process: `post` asks it, `pids` are those of its workers."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer; `body` goes out as it is, or else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data)
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return response.status, headers, response.read()
        finally:
            connection.close()

    def verify(self, *pairs: tuple[str, str]) -> list[dict[str, Any]]:
        """The results of POST /verify."""
        body = {"pairs": [{"gold": gold, "pred": pred} for gold, pred in pairs]}
        status, _, answer = self.ask("POST", "/verify", body)
        assert status == 200, answer
        return json.loads(answer)["results"]

    def is_equal(self, gold: str, pred: str) -> bool:
        """The answer of POST /is_equal."""
        status, _, answer = self.ask("POST", "/is_equal", {"str1": gold, "str2": pred})
        assert status == 200, answer
        return json.loads(answer)["equal"]

    def metric(self, name: str) -> float:
        """The value of one line of GET /metrics."""
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " "))

    def pids(self) -> list[int]:
        """Process ids of the workers: the children of the server's only child."""
        (template,) = children(self.process.pid)
        return children(template)


def children(pid: int) -> list[int]:
    """Living child processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Return when `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def serving(*options: str, port: int = 0, **environment: str) -> Iterator[Running]:
    """A server that answers; killed at the end if it still runs."""
    port = port or free_port()
    command = [sys.executable, "-m", "server.math", "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, text=True)
    server = Running(process, port)
    try:
        wait_for(lambda: process.poll() is not None or answers(server), 60)
        assert process.poll() is None, "the server ended at its start"
        yield server
    finally:
        process.kill()
        process.wait()


def answers(server: Running) -> bool:
    """Whether GET /health is answered."""
    try:
        return server.ask("GET", "/health")[0] == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One server for all tests that leave it whole, which is checked at the end."""
    with serving("--workers", "2", "--time-limit", str(TIME_LIMIT)) as server:
        yield server
        assert server.is_equal("\\frac{3}{5}", "0.6")
        assert len(server.pids()) == 2
        assert b'code="500"' not in server.ask("GET", "/metrics")[2]


def test_the_published_interface(server):
    for gold, pred, equal in PAIRS:
        assert server.is_equal(gold, pred) is equal, (gold, pred)


def test_a_batch_keeps_its_order(server):
    rng = random.Random(0)
    pairs = [rng.choice(PAIRS) for _ in range(500)]
    results = server.verify(*((gold, pred) for gold, pred, _ in pairs))
    assert [result["equal"] for result in results] == [equal for _, _, equal in pairs]
    assert {result["status"] for result in results} == {"ok"}
    assert all(set(result) == {"equal", "how", "status"} for result in results)
    assert server.verify() == []
    long = "1" * 10_000
    assert [result["equal"] for result in server.verify((long, long), ("1", long))] == [True, False]


def test_health_metrics_and_documents(server):
    status, _, body = server.ask("GET", "/health")
    assert (status, json.loads(body)) == (200, {"status": "ok", "workers": 2, "waiting": 0})
    before = server.metric('math_server_requests_total{code="200",path="/verify"}')
    server.verify(("1", "1"))
    assert server.metric('math_server_requests_total{code="200",path="/verify"}') == before + 1
    assert server.metric("math_server_workers") == 2
    assert server.metric('math_server_request_seconds_count{path="/verify"}') >= 1
    document = json.loads(server.ask("GET", "/openapi.json")[2])
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
            status, _, answer = server.ask(method.upper(), path, content.get("example"))
            assert status == 200
            if method == "post":  # the examples shown are what it answers
                assert set(json.loads(answer)) == set(
                    route["responses"]["200"]["content"]["application/json"]["example"]
                )
    page = server.ask("GET", "/docs")[2].decode()
    assert "/verify" in page
    assert "http" not in page.lower().replace("https", "http").split("<h1>")[0]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/is_equal", b"", 400),
        ("/is_equal", b"{", 400),
        ("/is_equal", b"[]", 400),
        ("/is_equal", b'{"str1": "1", "str2": "\xff"}', 400),
        ("/is_equal", '{"str1": "1", "str2": "1"}'.encode("utf-16"), 400),
        ("/is_equal", b"[" * 100_000, 400),
        ("/is_equal", b'{"str1": ' + b"1" * 10_000 + b"}", 400),
        ("/is_equal", {}, 422),
        ("/is_equal", {"str1": "1"}, 422),
        ("/is_equal", {"str1": "1", "str2": 1}, 422),
        ("/is_equal", {"str1": "1", "str2": None}, 422),
        ("/is_equal", b'{"str1": "\\ud800", "str2": "1"}', 422),
        ("/is_equal", b'{"str1": "' + b"1" * 3_000_000 + b'"}', 413),
        ("/verify", {}, 422),
        ("/verify", {"pairs": {}}, 422),
        ("/verify", {"pairs": ["1"]}, 422),
        ("/verify", {"pairs": [{"gold": "1"}]}, 422),
        ("/verify", {"pairs": [{"gold": "1", "pred": "1"}] * 2049}, 413),
        ("/nothing", {}, 404),
    ],
)
def test_a_bad_request_is_refused(server, path, body, status):
    start = time.monotonic()
    code, _, answer = server.ask("POST", path, body)
    assert code == status
    assert json.loads(answer)["error"]
    assert time.monotonic() - start < 5
    assert server.is_equal("1", "1")


def test_a_body_without_a_length_is_bounded(server):
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(
            b"POST /verify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        try:
            for _ in range(1000):
                connection.sendall(chunk)
        except ConnectionError:
            pass
        else:
            pytest.fail("64 MB were taken")
    assert server.is_equal("1", "1")


def test_a_caller_that_goes_away(server):
    head = b"POST /is_equal HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n"
    for body in (b"", b'{"str1": "1",', b'{"str1": "8", "str2": "\\\\int x^x dx"}'.ljust(40)):
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(head + body)
    assert server.is_equal("1", "1")


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:16]))
def test_hostile_answers_are_decided(server, text):
    for pair in ((text, "5"), ("5", text)):
        start = time.monotonic()
        (result,) = server.verify(pair)
        assert time.monotonic() - start < TIME_LIMIT + 5
        assert not result["equal"]
        assert result["status"] != "error"
        start = time.monotonic()
        honest = random.randint(2, 10**9)  # not in the cache
        assert server.is_equal(f"(y+{honest})^2", f"y^2+{2 * honest}y+{honest**2}")
        assert time.monotonic() - start < TIME_LIMIT


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), max_size=8))
def test_any_text_gets_a_verdict(server, pairs):
    results = server.verify(*pairs)
    assert len(results) == len(pairs)
    for (gold, pred), result in zip(pairs, results, strict=True):
        assert result["status"] in ("ok", "timeout", "memory", "unparsable", "undecided")
        assert result["how"] != "error", (gold, pred)


TOKENS = (
    "\\frac \\sqrt \\int \\sum \\pm \\infty \\cup \\text \\boxed \\begin{pmatrix} ^ _ { } ( ) [ ] "
)
TOKENS += "0 1 9 10^9 ! x y i e \\pi , ; = < \\% . - + \\cdot / | \\& \\\\ $"


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.lists(st.sampled_from(TOKENS.split()), max_size=12), min_size=1, max_size=8))
def test_broken_latex_gets_a_verdict(server, answers):
    texts = [" ".join(tokens) for tokens in answers]
    results = server.verify(*(("7", text) for text in texts))
    for text, result in zip(texts, results, strict=True):
        assert result["status"] in ("ok", "timeout", "memory", "unparsable", "undecided")
        assert result["how"] != "error", text


def distinct_pairs(count: int, seed: str) -> list[tuple[str, str]]:
    """Pairs that differ from each other and from those of other seeds; a third is equal."""
    rng = random.Random(seed)
    pairs = []
    for i in range(count):
        a, b, c = rng.randint(2, 10**6), rng.randint(2, 99), rng.randint(2, 9)
        gold = f"({a}x+{b})^2"
        pairs.append((gold, f"{a * a}x^2+{2 * a * b}x+{b * b + (c if i % 3 else 0)}"))
    return pairs


def test_verdicts_do_not_depend_on_load(server):
    pairs = distinct_pairs(100, "load")
    expected = [i % 3 == 0 for i in range(100)]
    for concurrency in (1, 32, 128):
        # The same pairs, but for what keeps the cache out of it.
        asked = [(gold, pred + f"+{concurrency}z-{concurrency}z") for gold, pred in pairs]
        with ThreadPoolExecutor(concurrency) as threads:
            verdicts = list(threads.map(lambda pair: server.is_equal(*pair), asked))
        assert verdicts == expected, concurrency


def test_honest_requests_stay_quick_among_hostile_ones(server):
    """5 % are products over millions of factors, each different, which run to the time limit."""
    pairs = distinct_pairs(120, "among")
    for i in range(0, 120, 20):
        pairs[i] = (str(i), f"\\prod_{{n=1}}^{{{10**7 + i}}} (1+\\frac{{1}}{{n^2}})")
    seconds = {}

    def ask(i: int) -> bool:
        start = time.monotonic()
        verdict = server.is_equal(*pairs[i])
        seconds[i] = time.monotonic() - start
        return verdict

    with ThreadPoolExecutor(16) as threads:
        verdicts = list(threads.map(ask, range(120)))
    assert verdicts == [i % 3 == 0 and i % 20 != 0 for i in range(120)]
    assert max(time for i, time in seconds.items() if i % 20) < 2 * TIME_LIMIT


def slow_pairs(count: int, first: int) -> list[dict[str, str]]:
    """The pairs of a request, all different, that each run to the time limit."""
    product = "\\prod_{n=1}^{%d} (1+\\frac{1}{n^2})"
    return [{"gold": product % (10**7 + i), "pred": str(i)} for i in range(first, first + count)]


def test_a_batch_of_slow_pairs_delays_nobody_and_ends_with_its_caller(server):
    """Its 300 pairs would take ten minutes of one worker, of which half are left to others."""
    body = json.dumps({"pairs": slow_pairs(300, 1000)}).encode()
    head = b"POST /verify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(head + body)
        wait_for(lambda: server.metric("math_server_queue_length") > 250, 30)
        seconds = []
        for i, pair in enumerate(distinct_pairs(20, "beside a batch")):
            start = time.monotonic()
            assert server.is_equal(*pair) is (i % 3 == 0)
            seconds.append(time.monotonic() - start)
        # Behind the batch each would wait for minutes; a busy machine may hold up a few.
        assert statistics.median(seconds) < TIME_LIMIT
        assert max(seconds) < 20
        shared = {"str1": slow_pairs(1, 1299)[0]["gold"], "str2": "1299"}
        start = time.monotonic()
        assert server.ask("POST", "/is_equal", shared)[0] == 200  # the last one of the batch
        assert time.monotonic() - start < 20
        assert server.metric("math_server_queue_length") > 200  # the others still wait
    wait_for(lambda: server.metric("math_server_queue_length") == 0, 30)
    assert server.is_equal("1", "1")


def test_equal_requests_share_one_job(server):
    before = server.metric('math_server_pairs_total{source="pool"}')
    pair = ("(z+11)^2", "z^2+22z+121")
    with ThreadPoolExecutor(32) as threads:
        assert all(threads.map(lambda _: server.is_equal(*pair), range(64)))
    assert server.metric('math_server_pairs_total{source="pool"}') - before <= 1


def test_a_killed_worker_is_replaced(server):
    before = server.pids()
    with ThreadPoolExecutor(8) as threads:
        verdicts = threads.map(lambda pair: server.is_equal(*pair), distinct_pairs(60, "killed"))
        time.sleep(0.05)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert list(verdicts) == [i % 3 == 0 for i in range(60)]
    wait_for(lambda: len(server.pids()) == 2 and not set(before) & set(server.pids()))


def test_memory_stays_bounded(server):
    def resident() -> int:
        text = Path(f"/proc/{server.process.pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    start = resident()
    for i in range(20):
        server.verify(*((f"{i}", f"{i}{j}" + "a" * 5000) for j in range(300)))
        server.verify(*((f"{i}", f"\\frac{{{i}}}{{{j + 2}}}") for j in range(100)))
    assert resident() - start < 50 << 20


def test_overload_is_a_503():
    options = ("--workers", "1", "--queue-limit", "4", "--max-pairs", "4", "--time-limit", "0.5")
    with serving(*options) as server, ThreadPoolExecutor(24) as threads:
        pairs = [(f"\\int_0^{{{i}}} \\sin(x^x)^{{x}} dx", str(i)) for i in range(24)]
        body = [{"str1": gold, "str2": pred} for gold, pred in pairs]
        asked = list(threads.map(lambda item: server.ask("POST", "/is_equal", item), body))
        refused = [headers for status, headers, _ in asked if status == 503]
        assert refused
        assert {status for status, _, _ in asked} <= {200, 503}
        assert all(int(headers["retry-after"]) >= 1 for headers in refused)
        assert server.is_equal("\\frac{3}{5}", "0.6")


def test_sigterm_ends_every_process_and_frees_the_port():
    with serving("--workers", "2") as server:
        pids = [*children(server.process.pid), *server.pids()]
        assert len(pids) == 3
        results: list[Any] = []

        def ask(i: int) -> None:
            try:
                results.append(server.ask("POST", "/is_equal", {"str1": f"{i}", "str2": "9^{9^9}"}))
            except OSError as error:
                results.append(error)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        start = time.monotonic()
        server.process.terminate()
        assert server.process.wait(10) == 0
        assert time.monotonic() - start < 10
        assert not any(map(is_alive, pids))
        socket.create_server(("127.0.0.1", server.port)).close()
        for thread in threads:
            thread.join()
        # Each caller got a verdict or was told to try again.
        assert all(result[0] in (200, 503) for result in results), results
        with serving(port=server.port) as again:
            assert again.is_equal("1", "1")


def test_a_killed_server_leaves_no_process():
    with serving() as server:
        pids = [*children(server.process.pid), *server.pids()]
        server.process.kill()
        wait_for(lambda: not any(map(is_alive, pids)))


def test_a_port_in_use_is_an_error_at_once():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, "-m", "server.math", "--port", str(port)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert result.returncode > 0
    assert "Address already in use" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "workers must be positive"),
        (["--queue-limit", "5"], "queue_limit must be at least max_pairs"),
        (["--port", "x"], "invalid int value"),
    ],
)
def test_impossible_settings(options, message):
    command = [sys.executable, "-m", "server.math", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize("folder", [Path("/"), FOLDER.parent], ids=["root", "beside math"])
def test_start_script_and_environment(folder):
    port = free_port()
    environment = {
        **os.environ,
        "MATH_SERVER_PYTHON": sys.executable,
        "MATH_SERVER_PORT": str(port),
        "MATH_SERVER_WORKERS": "1",
    }
    command = ["bash", str(FOLDER / "start.sh"), "--max-chars", "3"]
    process = subprocess.Popen(command, env=environment, cwd=folder)
    server = Running(process, port)
    try:
        wait_for(lambda: answers(server), 60)
        assert len(server.pids()) == 1
        assert server.verify(("1234", "12345"))[0]["status"] == "unparsable"
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()


def run_client(server: Running, *arguments: str, text: str = "") -> tuple[int, list[Any]]:
    """Exit status and printed JSON of the command-line client."""
    command = [sys.executable, str(FOLDER / "client.py"), *arguments]
    environment = {**os.environ, "MATH_SERVER_URL": f"http://127.0.0.1:{server.port}/"}
    result = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=30, env=environment
    )
    return result.returncode, [json.loads(line) for line in result.stdout.splitlines()]


def test_the_command_line_client(server):
    status, (result,) = run_client(server, "\\frac{3}{5}", "0.6")
    assert (status, result["equal"]) == (0, True)
    assert run_client(server, "1", "2")[0] == 1
    assert run_client(server, "--health")[1][0]["workers"] == 2
    lines = "\n".join(json.dumps({"gold": "1", "pred": str(i % 2)}) for i in range(600))
    status, results = run_client(server, "--pairs", "-", text=lines)
    assert [result["equal"] for result in results] == [False, True] * 300
    nobody = Running(server.process, free_port())
    assert run_client(nobody, "--max-wait", "0.3", "1", "1") == (2, [])
