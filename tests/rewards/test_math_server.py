"""The math reward with a real LaTeX server."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, LatexServer, free_address, server_python
from verl.config.rewards import MathServerConfig
from verl.rewards import RewardServerError, compute_score, math
from verl.rewards.math import MathClient, server_url

pytestmark = pytest.mark.skipif(
    not server_python(), reason="needs the LaTeX server's environment: bash setup.sh --server-only"
)
TIMES_OUT = r"\prod_{n=1}^{10000000} (1+\frac{1}{n^2})"


@pytest.fixture(scope="module")
def server() -> Iterator[LatexServer]:
    server = LatexServer("--time-limit", "1")
    yield server
    server.kill()


@pytest.fixture
def own_server(request: pytest.FixtureRequest) -> Iterator[LatexServer]:
    """One that the test may harm; with the arguments of its parametrization."""
    server = LatexServer(*getattr(request, "param", ()))
    yield server
    server.kill()


def ask(config: MathServerConfig, work: Any, log_file: Path | None = None) -> Any:
    """Runs the coroutine `work(client)` on an event loop of its own."""

    async def main() -> Any:
        client = MathClient(config)
        try:
            if log_file:
                await client.connect(log_file)
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(main())


def config(server: LatexServer, **keys: Any) -> MathServerConfig:
    return MathServerConfig(**({"url": server.url, "max_wait_s": 60.0} | keys))


MATRIX = r"\begin{{{0}matrix}} -7 & 6 \\ 11 & -9 \end{{{0}matrix}}"


@pytest.mark.parametrize(
    ("source", "response", "truth", "extra_info", "score"),
    [
        ("open_reasoner_zero", r"so \boxed{\frac{3}{5}}", "0.6", {}, 1),
        ("open_reasoner_zero", r"so \boxed{\frac{3}{5}}", "0.61", {}, 0),
        ("math500", r"\boxed{(x+1)^2}", "x^2+2x+1", None, 1),
        ("aime2024", r"\boxed{1} \boxed{073} \boxed{73} \boxed{73}", "73", {"find_maj": True}, 1),
        ("amc", "142", "142.0", {}, 1),
        ("minerva", r"\boxed{}", "5", {}, 0),
        ("gpqa", r"\boxed{\text{(B)}}", "B", {}, 1),
        ("amc", "The whole response is too long to be an answer, even 5", "5", {}, 0),
        # what verl's own test of this source calls right
        ("numina_aops_forum", MATRIX.format("b"), MATRIX.format("p"), None, 1),
        ("numina_cn_k12", r"\frac{\sqrt{505}}{7}", r"\frac{\sqrt{505}}{7}", None, 1),
        ("numina_olympiads", "x^2 + y^2 + 4x - 6y + 13", "(x + 2)^2 + (y - 3)^2 ", None, 1),
        ("math500", r"\boxed{5}\0 \ud800 \boxed{" + "\ud800}", "5", {}, 0),
    ],
)
def test_scores(server, monkeypatch, source, response, truth, extra_info, score):
    monkeypatch.setenv("MATH_SERVER_URL", server.url + "/")
    result = compute_score(source, response, truth, extra_info)
    assert (result["score"], result["acc"], result["undecided"]) == (score, score, 0)


@pytest.mark.parametrize(("rule", "score"), [("standard", 0), ("published", 1)])
def test_the_rule_of_answers_is_that_of_the_key(server, rule, score):
    arguments = "math500", r"\boxed{5} <answer>6</answer>", "5", None
    found = ask(config(server, answer_rule=rule), lambda client: client.compute_score(*arguments))
    assert found["score"] == score


def test_compute_score_may_be_called_from_an_event_loop(server, monkeypatch):
    monkeypatch.setenv("MATH_SERVER_URL", server.url)

    async def main() -> float:
        return compute_score("amc", r"\boxed{1/2}", "0.5")["score"]

    assert asyncio.run(main()) == 1


def test_the_key_wins_over_the_environment_and_this_over_the_default(monkeypatch):
    monkeypatch.delenv("MATH_SERVER_URL", raising=False)
    assert server_url(MathServerConfig()) == "http://127.0.0.1:6284"
    monkeypatch.setenv("MATH_SERVER_URL", "http://other:1/")
    assert server_url(MathServerConfig()) == "http://other:1"
    assert server_url(MathServerConfig(url="http://key:2")) == "http://key:2"


async def verdicts(client: MathClient, pairs: list[tuple[str, str]]) -> list[bool]:
    answers = await asyncio.gather(*(client.verify(*pair) for pair in pairs))
    return [answer["equal"] for answer in answers]


def test_pairs_travel_together_and_verdicts_come_in_order(server):
    pairs = [(str(i), rf"\frac{{{2 * i + i % 3}}}{{2}}") for i in range(1000)]
    requests = 'math_server_requests_total{code="200",path="/verify"}'
    before = server.metric(requests)
    found = ask(config(server, batch_size=50), lambda client: verdicts(client, pairs))
    assert found == [i % 3 == 0 for i in range(1000)]
    assert server.metric(requests) - before == 20


@pytest.mark.parametrize(("longest", "too_long"), [(30, 0), (10, 1)])
def test_the_longest_answer_is_that_of_the_key(server, longest, too_long):
    keys = config(server, max_answer_length=longest)
    arguments = "math500", rf"\boxed{{{'2' * 25}}}", "1", None
    assert ask(keys, lambda client: client.compute_score(*arguments))["too_long"] == too_long


class Busy(BaseHTTPRequestHandler):
    """Counts the requests that are under way, and finds all pairs equal, after a while."""

    lock, now, most = threading.Lock(), 0, 0

    def do_POST(self) -> None:
        with Busy.lock:
            Busy.now += 1
            Busy.most = max(Busy.most, Busy.now)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(0.1)
        with Busy.lock:
            Busy.now -= 1
        body = json.dumps({"results": [{"equal": True, "status": "ok"}] * len(asked["pairs"])})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("limit", [1, 3])
def test_requests_under_way_are_as_many_as_the_key_says(limit):
    Busy.most = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as busy:
        threading.Thread(target=busy.serve_forever).start()
        url = f"http://127.0.0.1:{busy.server_port}"
        keys = MathServerConfig(url=url, batch_size=1, max_connections=limit)
        found = ask(keys, lambda client: verdicts(client, [("1", f"{i}") for i in range(9)]))
        busy.shutdown()
    assert found == [True] * 9 and Busy.most == limit


def test_what_the_server_gives_up_on_is_wrong_and_counted(server):
    async def work(client: MathClient) -> list[dict[str, Any]]:
        return [
            await client.compute_score("amc", rf"\boxed{{{answer}}}", gold)
            for gold, answer in ((TIMES_OUT, "5"), ("3", "4"), ("3", "3"))
        ]

    found = ask(config(server, max_answer_length=100), work)
    assert [(r["score"], r["undecided"]) for r in found] == [(0, 1), (0, 0), (1, 0)]


def test_pairs_that_take_too_long_end_when_they_are_sent_again(server, monkeypatch):
    monkeypatch.setattr(math, "ANSWER_WITHIN_S", 4.0)
    pairs = [(TIMES_OUT + f"+{i}", f"{i}") for i in range(8)]  # 8 s and more on a free slot

    async def work(client: MathClient) -> list[dict[str, Any]]:
        return await asyncio.gather(*(client.verify(*pair) for pair in pairs))

    answers = ask(config(server, max_answer_length=100), work)
    assert [answer["status"] for answer in answers] == ["timeout"] * 8


def test_no_character_of_an_answer_stops_a_run(server):
    answers = ["①②", "፩", "🄉", "5①", "²", "\u0663", "½①", "∞①", "x_①", "\\sqrt[①]{2}", "\0"]
    found = ask(config(server), lambda client: verdicts(client, [("5", a) for a in answers]))
    assert found == [False] * len(answers)


@pytest.mark.parametrize("url", ["127.0.0.1:6284", "http://127.0.0.1:abc", "ftp://x", "http://"])
def test_a_url_that_is_none(url):
    with pytest.raises(ValueError, match=r"math_server\.url.*give a URL such as http://127"):
        MathClient(MathServerConfig(url=url))


@pytest.mark.parametrize(
    "own_server",
    [("--queue-limit", "4", "--max-pairs", "4", "--workers", "1")],
    indirect=True,
)
def test_a_busy_server_is_asked_again(own_server):
    pairs = [(rf"\sqrt{{{i}}} + x", rf"x + \sqrt{{{4 * i}}}/2") for i in range(2, 62)]
    pairs += [(gold, pred + "+1") for gold, pred in pairs]
    keys = config(own_server, batch_size=4)
    found = ask(keys, lambda client: verdicts(client, pairs))
    assert found == [True] * 60 + [False] * 60
    assert own_server.metric('math_server_requests_total{code="503",path="/verify"}') > 0


def test_a_refused_request_fails_at_once(server):
    keys = config(server, url=server.url + "/nowhere")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"/nowhere/verify answers 404.*is this a LaTeX server"):
        ask(keys, lambda client: client.verify("1", "1.0"))
    assert time.monotonic() - start < 20


def test_a_server_that_went_away_is_waited_for(own_server, caplog):
    def come_back() -> None:
        time.sleep(3)
        own_server.start()

    async def work(client: MathClient) -> list[bool]:
        assert await verdicts(client, [("0.5", "1/2")]) == [True]
        own_server.kill()
        thread = threading.Thread(target=come_back)
        thread.start()
        found = await verdicts(client, [(str(i), f"{i}.0") for i in range(500)])
        thread.join()
        return found

    assert ask(config(own_server), work) == [True] * 500
    messages = [record.message for record in caplog.records]
    assert any("waiting for the LaTeX server" in message for message in messages)
    assert sum("answers again" in message for message in messages) == 1


def test_a_server_that_stays_away_is_an_error_and_never_a_score(own_server):
    async def work(client: MathClient) -> None:
        own_server.kill()
        await client.compute_score("amc", r"\boxed{1/2}", "0.5")

    start = time.monotonic()
    with pytest.raises(RewardServerError, match=r"for \d+ s \(ConnectError.*start\.sh.*max_wait_s"):
        ask(config(own_server, max_wait_s=2.0), work)
    assert 2 <= time.monotonic() - start < 30


async def nothing(client: MathClient) -> None:
    pass


def test_at_start_a_missing_server_is_an_error_that_says_how_to_start_one(tmp_path):
    url = free_address().replace("tcp", "http")
    start = time.monotonic()
    with pytest.raises(RewardServerError, match=rf"{url} \(ConnectError.*start\.sh.*autostart"):
        ask(MathServerConfig(url=url), nothing, tmp_path / "log")
    assert time.monotonic() - start < 20
    assert not (tmp_path / "log").exists()


def test_at_start_a_server_that_never_answers_is_not_waited_for(tmp_path, monkeypatch):
    assert math.FIRST_ANSWER_WITHIN_S + 5 <= 15
    monkeypatch.setattr(math, "FIRST_ANSWER_WITHIN_S", 1.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RewardServerError, match=rf"{url} .*ReadTimeout.*MATH_SERVER_URL"):
            ask(MathServerConfig(url=url), nothing, tmp_path / "log")


def test_at_start_another_server_is_recognized(server, tmp_path):
    with pytest.raises(ValueError, match="is this a LaTeX server"):
        ask(config(server, url=server.url + "/other"), nothing, tmp_path / "log")


def autostart(**keys: Any) -> MathServerConfig:
    return MathServerConfig(url=free_address().replace("tcp", "http"), autostart=True, **keys)


def server_processes(url: str) -> list[int]:
    """Process ids of servers at this port."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if url.rpartition(":")[2].encode() in command and b"server.math" in command:
            found.append(int(folder.name))
    return found


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def with_environment(monkeypatch) -> None:
    monkeypatch.setenv("MATH_SERVER_PYTHON", str(server_python()))


def test_autostart_starts_restarts_and_stops(tmp_path, with_environment):
    keys = autostart()

    async def work(client: MathClient) -> list[bool]:
        (pid,) = server_processes(keys.url)
        os.kill(pid, signal.SIGKILL)
        found = await verdicts(client, [(str(i), f"{i}.0") for i in range(100)])
        assert server_processes(keys.url) not in ([], [pid])
        return found

    assert ask(keys, work, tmp_path / "run" / "math_server.log") == [True] * 100
    wait_until(lambda: not server_processes(keys.url), 1)
    assert "workers ready" in (tmp_path / "run" / "math_server.log").read_text()


def test_autostarts_that_collide_share_a_server_until_it_is_gone(tmp_path, with_environment):
    keys = autostart()

    async def both() -> None:
        first, second = MathClient(keys), MathClient(keys)
        connecting = asyncio.create_task(first.connect(tmp_path / "first.log"))
        await asyncio.sleep(0.3)
        await second.connect(tmp_path / "second.log")
        await connecting
        assert len(listening(keys.url)) == 1
        await first.close()
        assert (await second.verify("0.5", "1/2"))["equal"]
        await second.close()

    asyncio.run(both())
    wait_until(lambda: not server_processes(keys.url), 10)


def listening(url: str) -> list[str]:
    """Sockets of this machine that accept connections at the port of `url`."""
    port = f":{int(url.rpartition(':')[2]):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [line[1] for line in lines if line[1].endswith(port) and line[3] == "0A"]


def test_autostart_leaves_a_server_that_is_there_alone(server, tmp_path, with_environment):
    ask(config(server, autostart=True), nothing, tmp_path / "log")
    assert server.process.poll() is None
    assert not (tmp_path / "log").exists()


def test_autostart_says_why_the_server_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setenv("MATH_SERVER_PYTHON", sys.executable)  # lacks the server's packages
    with pytest.raises(RewardServerError, match=r"(?s)does not start: exit status 1.*setup\.sh"):
        ask(autostart(), nothing, tmp_path / "log")


def test_autostart_is_for_this_machine(tmp_path):
    with pytest.raises(ValueError, match=r"http://judge:6284.*by hand"):
        ask(MathServerConfig(url="http://judge:6284", autostart=True), nothing, tmp_path / "log")


def test_a_killed_trainer_takes_its_server_along(tmp_path, with_environment):
    url = free_address().replace("tcp", "http")
    code = (
        "import time\nfrom pathlib import Path\n"
        "from verl.rewards.math import ServerProcess\n"
        f"ServerProcess({url!r}, Path({str(tmp_path / 'log')!r})).start()\ntime.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: "workers ready" in read(tmp_path / "log"))
    assert server_processes(url)
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not server_processes(url), 10)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
