"""`rlhf serve`: a reward model, or a Python function, over HTTP."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_data.errors import InputError, RunError
from rlhf_infer.rewards.scorer import ScorerOptions, check_scorer, is_function, make_scorer, tokenizer_of
from rlhf_infer.serve.config import AddressConfig, LimitsConfig, ServeConfig

if TYPE_CHECKING:
    from rlhf_infer.serve.judge import Judge

OPTION = "--reward_pretrain"

TOKEN = "RLHF_SERVE_TOKEN"
"""Environment variable of the bearer token."""

LONGEST = 2048
"""Longest sample in tokens without `--max_len`, where the model's context is not shorter."""

STOP_SECONDS = 10
"""How long running requests, and then the batch that is being scored, are waited for at the end."""

CONNECTIONS = 1024
"""Most connections that may wait to be accepted."""


def serve(config: ServeConfig) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Raises:
        InputError: an option cannot be used, the port is taken, or what serves is not installed.
        RunError: the scorer was computing at the end and did not finish.
    """
    check_installed()
    token = read_token(config.address)
    for warning in warnings(config.address, token):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    check_options(config)
    with bound(config.address) as port:
        judge = make_judge(config)
        try:
            answer(config, judge, token, port)
        finally:
            judge.scorer.close()


def check_installed() -> None:
    """Make sure that what serves is there.

    Raises:
        InputError: naming the extra.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"`rlhf serve` needs {error.name}, which is not installed: pip install 'rlhf-infer[serve]'"
        ) from error


def check_options(config: ServeConfig) -> None:
    """Refuse options about tokens for a Python function, which reads texts.

    Raises:
        InputError: naming them.
    """
    name = config.model.reward_pretrain
    unused = {"disable_fast_tokenizer", "max_len", "truncate"} & (config.model.given() | config.limits.given()).keys()
    if is_function(name) and unused:
        listed = ", ".join(f"--{option}" for option in sorted(unused))
        raise InputError(f"{listed}: {OPTION} {name} is a Python function, which reads texts, not tokens: leave it out")


def read_token(address: AddressConfig) -> str | None:
    """The bearer token, if there is to be one.

    Raises:
        InputError: it cannot be read, or cannot be sent in a header.
    """
    if address.token_file is None:
        place, token = TOKEN, os.environ.get(TOKEN)
        if token is None:
            return None
    else:
        place = f"--token_file {address.token_file}"
        try:
            token = Path(address.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{place} cannot be read: {error}") from error
    if not token or not all("!" <= character <= "~" for character in token):
        raise InputError(f"{place} must hold one line of ASCII characters without blanks: the token")
    return token


def warnings(address: AddressConfig, token: str | None) -> Iterator[str]:
    """What is not as safe as it could be."""
    if token is None and not is_loopback(address.host):
        yield (
            f"--host {address.host} lets other machines reach this server, and without a token whoever does may use it: "
            f"give --token_file, or set {TOKEN}"
        )
    if address.token_file is not None and (mode := Path(address.token_file).stat().st_mode) & 0o077:
        yield (
            f"--token_file {address.token_file} is open to other users (mode {stat.S_IMODE(mode):o}): "
            f"chmod 600 {address.token_file}"
        )


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def scorer_options(config: ServeConfig) -> ScorerOptions:
    """What decides the scorer."""
    model = config.model
    return ScorerOptions(
        pretrain=model.reward_pretrain, option=OPTION, value_head_prefix=model.value_head_prefix,
        normalize_reward=model.normalize_reward, bf16=model.bf16, flash_attn=model.flash_attn,
        micro_batch_size=config.limits.batch_size, trust_remote_code=model.trust_remote_code,
        max_len=config.limits.max_len, missing=("rows",),
    )  # fmt: skip


def make_judge(config: ServeConfig) -> Judge:
    """The scorer, and how samples are encoded for it; everything is checked before weights are loaded.

    Raises:
        InputError: there is no such model or function, an option does not fit it, or it cannot be loaded.
    """
    from rlhf_infer.serve.judge import Judge

    options = scorer_options(config)
    if is_function(options.pretrain):
        check_scorer(options)
        return Judge(make_scorer(options))

    from rlhf_core.vocabulary import check_vocabulary
    from rlhf_data.encode import Encoder
    from rlhf_infer.rewards.model import check_reward_model
    from rlhf_infer.serve.judge import encode_options

    architecture = check_reward_model(options)
    max_len = longest_sample(config.limits, options.pretrain, architecture)
    tokenizer = tokenizer_of(options, slow=config.model.disable_fast_tokenizer)
    check_vocabulary(OPTION, options.pretrain, architecture, len(tokenizer))
    encoder = Encoder(tokenizer, encode_options(max_len, config.limits.truncate))
    return Judge(make_scorer(replace(options, max_len=max_len)), encoder, max_len)


def longest_sample(limits: LimitsConfig, name: str, architecture: Any) -> int:
    """Longest sample that is scored, in tokens.

    Raises:
        InputError: `--max_len` is longer than the model's context.
    """
    from rlhf_core.plan import check_context

    if limits.max_len is None:
        context = getattr(architecture.get_text_config(), "max_position_embeddings", None)
        return min(LONGEST, context or LONGEST)
    check_context(OPTION, name, architecture, limits.max_len)
    return limits.max_len


@contextmanager
def bound(address: AddressConfig) -> Iterator[socket.socket]:
    """A socket that has the port, and does not listen yet: clients are refused while the model is loaded.

    Raises:
        InputError: there is no such address here, or the port is taken.
    """
    where = f"--host {address.host} --port {address.port}"
    try:
        family, *_, name = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"{where}: there is no such address ({error.strerror})") from error
    with socket.socket(family, socket.SOCK_STREAM) as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            port.bind(name)
        except OSError as error:
            raise InputError(f"{where} cannot be listened on ({error.strerror}): {way_out(error)}") from error
        yield port


def way_out(error: OSError) -> str:
    """What to do about a port that cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return "another program does; give another --port, or 0 for a free one"
    if error.errno == errno.EACCES:
        return "ports below 1024 are for the system; give a higher --port"
    return "give an address of this machine, 127.0.0.1 for itself only or 0.0.0.0 for all"


def answer(config: ServeConfig, judge: Judge, token: str | None, port: socket.socket) -> None:
    """Listen and answer until told to stop.

    Raises:
        InputError: another program took the port meanwhile.
        RunError: the scorer was computing at the end and did not finish.
    """
    from rlhf_infer.serve.routes import make_app
    from rlhf_infer.serve.server import Server

    name = display_name(config.model.reward_pretrain)
    app, batcher = make_app(judge, config.limits, name=name, token=token, log=say)
    try:
        port.listen(CONNECTIONS)
    except OSError as error:
        raise InputError(f"--port {config.address.port} cannot be listened on: {way_out(error)}") from error
    server = Server(app, seconds=STOP_SECONDS, started=lambda: say(f"listening on {url(port)}"), stopping=batcher.close)
    server.run(sockets=[port])
    if batcher.busy:
        raise RunError(f"the scorer did not finish its batch within {STOP_SECONDS} s and was given up")


def say(line: str) -> None:
    print(line, flush=True)


def url(port: socket.socket) -> str:
    """The address that a socket listens on, for people and programs."""
    host, number, *_ = port.getsockname()
    return f"http://[{host}]:{number}" if ":" in host else f"http://{host}:{number}"


def display_name(pretrain: str) -> str:
    """What the model is called in answers: without the folders it lies in, which are nobody's business."""
    return Path(pretrain).name if is_function(pretrain) or Path(pretrain).expanduser().is_dir() else pretrain
