"""`rlhf serve` as a program: the rewards are the model's own, nothing is lost among many clients, and it ends cleanly."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CLIENTS, REQUESTS = 64, 3
LONGEST = 96


class Server(NamedTuple):
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str
    said: list[str]
    """Its standard output so far."""

    def ask(self, body: Any, path: str = "/get_reward", **headers: str) -> tuple[int, Any]:
        """Status code and answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}{path}", data=data, headers={"Content-Type": "application/json"} | headers
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, json.load(refused)


@contextmanager
def served(folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """Start `rlhf serve` on a free port, and wait until it listens."""
    command = [sys.executable, "-m", "rlhf_cli", "serve", "--port", "0", *options]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"} | environment
    with (folder / "errors").open("w") as errors, subprocess.Popen(
        command, cwd=folder, env=surroundings, text=True, stdout=subprocess.PIPE, stderr=errors
    ) as process:  # fmt: skip
        said: list[str] = []
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            for line in process.stdout or ():
                said.append(line)
                lines.put(line)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            try:
                first = lines.get(timeout=120)
            except queue.Empty:
                pytest.fail(f"the server does not listen; it said:\n{(folder / 'errors').read_text()[-3000:]}")
            (url,) = re.findall(r"listening on (http://127\.0\.0\.1:\d+)$", first.strip())
            yield Server(process, url, said)
        finally:
            process.kill()
            reader.join()


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random reward model with its tokenizer."""
    from rlhf_core.libraries import settle

    settle()
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from rlhf_core.tiny import make_tokenizer

    folder = tmp_path_factory.mktemp("reward")
    tokenizer = make_tokenizer(["red blue green cat dog bird"], folder, vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LONGEST, bos_token_id=0, eos_token_id=1, pad_token_id=None, num_labels=1,
        problem_type="regression", initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("server"), "--reward_pretrain", str(reward_model)) as running:
        yield running


@pytest.fixture(scope="module")
def rewards_of(reward_model: Path) -> Any:
    """Rewards of lists of token ids by transformers' own layers, those of equal lengths together."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()

    def score(samples: list[list[int]]) -> list[float]:
        rewards = [0.0] * len(samples)
        for length in {len(ids) for ids in samples}:
            places = [i for i, ids in enumerate(samples) if len(ids) == length]
            with torch.no_grad():
                # one label per sample, read at the last token: nothing is padded
                hidden = model.base_model(torch.tensor([samples[i] for i in places])).last_hidden_state
                found = model.score(hidden[:, -1])[:, 0].tolist()
            for i, reward in zip(places, found, strict=True):
                rewards[i] = reward
        return rewards

    return score


@pytest.fixture(scope="module")
def ids_of(reward_model: Path) -> Any:
    """The ids of a piece of text, without BOS and EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_rewards_over_http_are_those_of_the_model(server, rewards_of, ids_of):
    texts = ["red", "blue cat dog", "<s>green bird</s>", "a longer text of which the tokenizer knows little: äöü"]
    code, answer = server.ask({"query": texts})
    assert code == 200
    bare = [text.removeprefix("<s>").removesuffix("</s>") for text in texts]
    assert answer["rewards"] == pytest.approx(rewards_of([[0, *ids_of(text), 1] for text in bare]), abs=1e-5)
    assert len({round(found, 3) for found in answer["rewards"]}) == len(texts)
    _, apart = server.ask({"prompts": ["red c", "red c"], "responses": ["at", "at"]}, "/v1/rewards")
    assert apart["rewards"] == pytest.approx(rewards_of([[0, *ids_of("red c"), *ids_of("at"), 1]] * 2), abs=1e-5)
    assert apart["rewards"] != pytest.approx(rewards_of([[0, *ids_of("red cat"), 1]] * 2), abs=1e-5)


def test_many_clients_at_the_same_time_all_get_the_rewards_of_their_own_texts(server, rewards_of, ids_of):
    def texts(client: int, number: int) -> list[str]:
        return [f"client {client} asks {number} {'dog ' * (client % 5)}{k}" for k in range(1 + (client + number) % 3)]

    at_once = threading.Barrier(CLIENTS)

    def ask(client: int) -> list[tuple[int, Any]]:
        at_once.wait(60)
        return [server.ask({"query": texts(client, number)}) for number in range(REQUESTS)]

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(ask, range(CLIENTS)))
    assert {code for replies in answers for code, _ in replies} == {200}
    found = [score for replies in answers for _, answer in replies for score in answer["rewards"]]
    asked = [text for client in range(CLIENTS) for number in range(REQUESTS) for text in texts(client, number)]
    assert len({round(score, 4) for score in found}) > 0.9 * len(asked), "a mix-up would not be seen"
    assert found == pytest.approx(rewards_of([[0, *ids_of(text), 1] for text in asked]), abs=1e-5)
    lines = [line for line in server.said if " POST /get_reward 200 " in line]
    assert len(lines) >= CLIENTS * REQUESTS


# schemathesis and hypothesis use what their own dependencies have deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("/get_reward", "positive"), ("/get_reward", "negative"), ("/v1/rewards", "positive"), ("/v1/rewards", "negative"),
        ("/health", "positive"), ("/metrics", "positive"),
    ],
)  # fmt: skip
def test_whatever_is_sent_is_answered_as_the_description_says(server, path, mode, tmp_path):
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from hypothesis.configuration import set_hypothesis_home_dir
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as conformance

    set_hypothesis_home_dir(tmp_path)  # else it writes into the folder that tests are run from
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    (operation,) = [found.ok() for found in schema.get_all_operations() if found.ok().path == path]
    cases = operation.as_strategy(schemathesis.GenerationMode(mode))
    held = [
        checks.not_a_server_error,
        conformance.status_code_conformance,
        conformance.content_type_conformance,
        conformance.response_schema_conformance,
    ]

    @settings(max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def holds(case: Any) -> None:
        case.call_and_validate(checks=held)

    holds()
    assert server.ask(None, "/health")[0] == 200


REWARDS = """
import pathlib, time

def reward(prompts, responses, labels):
    for response in responses:
        if response == "wait":
            pathlib.Path("waits").touch()
            while not pathlib.Path("go").exists():
                time.sleep(0.01)
    return [float(len(prompt) + 10 * len(response) + 100 * (label or 0))
            for prompt, response, label in zip(prompts, responses, labels)]
"""


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_function_is_served_and_a_signal_ends_the_server_after_what_it_was_computing(tmp_path, sign):
    (tmp_path / "rules.py").write_text(REWARDS)
    bearer = {"Authorization": "Bearer secret-of-this-test"}
    options = ("--reward_pretrain", "rules.py", "--batch_size", "1")
    with served(tmp_path, *options, RLHF_SERVE_TOKEN="secret-of-this-test") as server, ThreadPoolExecutor(2) as clients:
        assert server.ask({"query": ["abc"]})[0] == 401
        body = {"prompts": ["ab"], "responses": ["c"], "labels": [1]}
        assert server.ask(body, **bearer)[1]["rewards"] == [112.0]
        computing = clients.submit(server.ask, {"query": ["wait"]}, **bearer)
        until(tmp_path / "waits")
        waiting = clients.submit(server.ask, {"query": ["x"]}, **bearer)
        until_waits(server, bearer)
        server.process.send_signal(sign)
        refused = waiting.result(60)
        (tmp_path / "go").touch()
        assert computing.result(60) == (200, {"rewards": [40.0], "model": "rules.py", "version": 1, "truncated": []})
        assert refused == (503, {"detail": "the server is shutting down", "indices": []})
        assert server.process.wait(60) == 0
    assert (tmp_path / "errors").read_text() == ""
    assert "secret-of-this-test" not in "".join(server.said)


def until(path: Path) -> None:
    """Wait for a file."""
    for _ in range(6000):
        if path.exists():
            return
        threading.Event().wait(0.01)
    pytest.fail(f"{path.name} did not come")


def until_waits(server: Server, bearer: dict[str, str]) -> None:
    """Wait until a sample waits for the scorer."""
    for _ in range(1000):
        request = urllib.request.Request(f"{server.url}/metrics", headers=bearer)
        with urllib.request.urlopen(request, timeout=60) as answer:
            if b"rlhf_serve_waiting_samples 1.0" in answer.read():
                return
    pytest.fail("no sample waits")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reward_pretrain": "{tiny}"}, "--reward_pretrain {tiny} has no reward head"),
        ({"reward_pretrain": "./nowhere"}, "--reward_pretrain nowhere: there is no such folder"),
        ({"reward_pretrain": "{rm}", "max_len": 97}, "takes 96: set --max_len 96 or less"),
        ({"reward_pretrain": "{rm}", "host": "192.0.2.1"}, "--host 192.0.2.1 --port 0 cannot be listened on"),
        ({"reward_pretrain": "{rm}", "token_file": "none"}, "--token_file none cannot be read"),
        ({"reward_pretrain": "{rm}", "max_waiting": 9}, "--max_queries 1024 samples may come in one request"),
        ({"reward_pretrain": "{rm}", "normalize_reward": True}, "normalize_reward"),
        ({"reward_pretrain": "rules.py", "truncate": True}, "--truncate: --reward_pretrain rules.py is a Python function"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_before_weights_are_loaded(
    rlhf, tiny, reward_model, monkeypatch, options, said
):
    monkeypatch.setattr("rlhf_core.models.load.load_model", None)
    places = {"tiny": tiny, "rm": reward_model}
    given = {name: str(value).format(**places) for name, value in ({"port": 0} | options).items() if value is not True}
    flags = [f"--{name}" for name, value in options.items() if value is True]
    answer = rlhf(["serve", *flags, *(part for name, value in given.items() for part in (f"--{name}", value))])
    assert answer.code == 2
    assert said.format(**places) in answer.err
