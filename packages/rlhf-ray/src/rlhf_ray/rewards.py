"""All that judges responses: reward models, Python functions and reward servers, asked at the same time and added up."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from rlhf_data.encode import EncodeOptions, Encoder, Prompt, Sample, special_prefix
from rlhf_data.errors import InputError, RunError
from rlhf_data.rows import Pair, RowError
from rlhf_infer.rewards.function import find_function, in_words, is_finite, place_of
from rlhf_infer.rewards.remote import Asked, RemoteOptions, RemoteScorer, check_server, is_server
from rlhf_infer.rewards.scorer import Answer, Judgement, ScorerOptions, check_scorer, is_function, tokenizer_of
from rlhf_ray.cluster.group import Pending, WorkerGroup
from rlhf_ray.config import PPOConfig, names
from rlhf_ray.prompts import Prompts
from rlhf_ray.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRETRAIN = "--reward_pretrain"
"""The option that names models and functions."""

ANY_LENGTH = 2**31 - 1
"""Tokens of a sample for a model that takes any number."""


@dataclass(frozen=True)
class Source:
    """Something that gives rewards."""

    name: str
    """Short, and different from those of the others: for logs."""

    where: str
    """As it was given: a folder, a Hub id, a function, a URL."""

    kind: Literal["model", "function", "server"]

    weight: float = 1.0
    """What its rewards are multiplied by before they are added up."""


def sources_of(config: PPOConfig) -> list[Source]:
    """All sources of a run's rewards: models and functions, then servers, in the order in which they were given."""
    own, urls = names(config.rewards.reward_pretrain), names(config.rewards.remote_rm_url)
    given = config.rewards.reward_weights
    weights = [1.0] * len(own + urls) if given is None else [float(weight) for weight in given.split(",")]
    kinds = [*("function" if is_function(where) else "model" for where in own), *("server" for _ in urls)]
    short = different([short_name(where, kind) for where, kind in zip(own + urls, kinds, strict=True)])
    return [Source(*row) for row in zip(short, own + urls, kinds, weights, strict=True)]  # type: ignore[arg-type]


def needs_models(config: PPOConfig) -> list[str]:
    """The sources that are reward models: folders and Hub ids."""
    return [source.where for source in sources_of(config) if source.kind == "model"]


def needs_workers(config: PPOConfig) -> list[Source]:
    """The sources that run in processes of their own: all but servers, which the driver asks itself."""
    return [source for source in sources_of(config) if source.kind != "server"]


def scorer_options(config: PPOConfig, where: str) -> ScorerOptions:
    """How one reward model, or function, is loaded. What is only about models is not said of functions."""
    size = config.rollout.micro_rollout_batch_size
    if is_function(where):
        return ScorerOptions(pretrain=where, option=PRETRAIN, micro_batch_size=size)
    return ScorerOptions(
        pretrain=where,
        option=PRETRAIN,
        value_head_prefix=config.rewards.value_head_prefix,
        normalize_reward=config.rewards.normalize_reward,
        bf16=config.model.bf16,
        flash_attn=config.model.flash_attn,
        micro_batch_size=size,
        trust_remote_code=config.model.trust_remote_code,
        offload=config.cluster.ref_reward_offload,
    )


def remote_options(config: PPOConfig, where: str) -> RemoteOptions:
    """How one server is asked."""
    rewards = config.rewards
    return RemoteOptions(
        url=where, timeout=rewards.remote_rm_timeout, retries=rewards.remote_rm_retries, seed=config.batch.seed
    )


def check_rewards(config: PPOConfig) -> None:
    """Find what is wrong with the sources of rewards, without loading any weight and without asking any server.

    Raises:
        InputError: there is no such model or function, it is no reward model, cannot be called, has no statistics to
            normalise with, or takes shorter samples than there may be; a URL is none; or nothing fits an option.
    """
    sources = sources_of(config)
    for source in sources:
        if source.kind == "server":
            check_server(remote_options(config, source.where))
        elif source.kind == "function":
            check_scorer(scorer_options(config, source.where))
        else:
            check_model(config, source)
        if not math.isfinite(source.weight):
            raise InputError(f"--reward_weights: the weight of {source.where} is {source.weight}, no finite number")
    if config.rewards.normalize_reward and not needs_models(config):
        said = ", ".join(source.where for source in sources)
        raise InputError(
            f"--normalize_reward takes mean and deviation from a reward model, and {said} is none: leave it out"
        )
    if config.rewards.reward_fn is not None:
        combining(config.rewards.reward_fn)


def check_model(config: PPOConfig, source: Source) -> None:
    """Find what is wrong with one reward model."""
    from rlhf_core.vocabulary import check_vocabulary
    from rlhf_infer.rewards.model import check_reward_model

    if is_server(source.where):
        raise InputError(f"{PRETRAIN} {source.where} is a URL: give it as --remote_rm_url")
    options = scorer_options(config, source.where)
    architecture = check_reward_model(options)
    check_vocabulary(PRETRAIN, source.where, architecture, len(tokenizer_of(options)))
    context, longest = context_of(architecture), longest_sample(config)
    if context and context < longest:
        raise InputError(
            f"{PRETRAIN} {source.where} takes {context:,} tokens, and samples may have {longest:,} (--prompt_max_len and "
            f"--generate_max_len together): give --max_len {context} or less"
        )


def longest_sample(config: PPOConfig) -> int:
    """Most tokens that a prompt and its response have together."""
    from rlhf_core.models.load import load_model_config

    return min(config.longest, context_of(load_model_config(config.model)) or config.longest)


def context_of(architecture: Any) -> int | None:
    """Longest sample of a model, in tokens, if it has one."""
    return getattr(architecture.get_text_config(), "max_position_embeddings", None)


def connect_servers(config: PPOConfig) -> dict[str, RemoteScorer]:
    """Reward servers by name, each of which has answered.

    Raises:
        InputError: a server refuses the token.
        RunError: a server cannot be reached.
    """
    return {
        source.name: RemoteScorer(remote_options(config, source.where))
        for source in sources_of(config)
        if source.kind == "server"
    }


def combining(name: str) -> Callable[[list[NDArray[np.float64]]], Any]:
    """The function of `--reward_fn`.

    Raises:
        InputError: there is none of this name, or it cannot be called with one argument.
    """
    function = find_function(name, "--reward_fn")
    try:
        inspect.signature(function).bind([])
    except TypeError as error:
        raise InputError(
            f"--reward_fn {name}: it is called with one argument, a list with the rewards of each reward model: {error}"
        ) from None
    return function


@dataclass(frozen=True, eq=False)
class Responses:
    """Some responses, in the forms in which sources want them; each form is made once, if it is wanted."""

    rollout: Rollout
    prompts: Prompts

    @cached_property
    def asked(self) -> list[Asked]:
        """As texts, with labels and rows."""
        texts = self.prompts.responses(self.rollout)
        known = {number: self._prompt(number) for number in np.unique(self.rollout.prompts).tolist()}
        asked = []
        for number, text, cut in zip(
            self.rollout.prompts.tolist(), texts, self.rollout.truncated.tolist(), strict=True
        ):
            prompt, rendered, label, row = known[number]
            asked.append(Asked(Answer(prompt, text, label, row), rendered, not cut))
        return asked

    @cached_property
    def samples(self) -> list[Sample]:
        """As the ids that the policy wrote, and EOS behind those that something else ended."""
        eos: Any = self.prompts.tokenizer.eos_token_id
        return [self._sample(number, int(eos)) for number in range(len(self.rollout))]

    def encoded(self, encoder: Encoder) -> list[Sample]:
        """As another tokenizer writes the texts."""
        eos: Any = self.prompts.tokenizer.eos_token_id
        last = self.rollout.input_ids[self.rollout.cu_seqlens[1:] - 1].tolist()
        pairs = [
            Pair(
                one.answer.prompt,
                one.answer.response,
                rendered=one.rendered,  # type: ignore[arg-type]
                complete=one.complete,
                closing=str(self.prompts.tokenizer.decode([token])) if one.complete and token != eos else "",
            )
            for one, token in zip(self.asked, last, strict=True)
        ]
        return [
            only_end(encoder, pair) if isinstance(found, RowError) else found[0]
            for pair, found in zip(pairs, encoder.encode(pairs), strict=True)
        ]

    def _prompt(self, number: int) -> tuple[str, str, Any, dict[str, Any]]:
        prompts = self.prompts
        return prompts.text(number), prompts.rendered(number), prompts.label(number), prompts.row(number)

    def _sample(self, number: int, eos: int) -> Sample:
        ids, cut = self.rollout.sample(number), bool(self.rollout.truncated[number])
        if not cut and ids[-1] != eos:
            ids = np.append(ids, np.int32(eos))
        return Sample(ids, np.arange(len(ids)) >= self.rollout.prompt_lengths[number], cut)


def only_end(encoder: Encoder, pair: Pair) -> Sample:
    """A response without any token: the prompt and EOS.

    Raises:
        RunError: the prompt has no room for it.
    """
    (prompt,) = encoder.prompts([pair])
    if not isinstance(prompt, Prompt) or len(prompt.ids) >= encoder.max_len:
        raise RunError(f"a prompt is too long for a reward model of {encoder.max_len:,} tokens: {pair.prompt[-80:]!r}")
    ids = np.array([*prompt.ids, encoder.eos_id], np.int32)
    return Sample(ids, np.arange(len(ids)) == len(ids) - 1)


class PendingRewards:
    """Rewards of some responses that are on their way.

    Args:
        rewards: who was asked.
        count: responses.
        asked: what gives each source's judgement.
        calls: those of worker groups among them, for whoever waits for several things.
        servers: what reward servers among them are to answer, likewise.
    """

    def __init__(
        self,
        rewards: Rewards,
        count: int,
        asked: Sequence[Callable[[], Judgement]],
        calls: Sequence[Pending[Any]],
        servers: Sequence[Future[Any]],
    ) -> None:
        self.rewards, self.count, self.asked = rewards, count, asked
        self.calls, self.servers = calls, servers

    def result(self) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """Wait for all sources.

        Returns:
            Reward of each response, `[N]` finite; and what it is made of: the reward that each source gave, by its name, and
            numbers that functions said of responses beside it, as `name.metric`, NaN where one said none.

        Raises:
            RunError: a source failed, did not answer, or gave something else than one finite number for each.
        """
        return self.rewards.combine([judgement() for judgement in self.asked], self.count)


class Rewards:
    """All sources of a run's rewards, ready.

    Args:
        groups: workers of each source that has some (`needs_workers`), by the source's name.
        config: the run's options.
        tokenizer: of the policy.
        servers: what `connect_servers` returned; made here if it was not.

    Raises:
        InputError: see `check_rewards`.
        RunError: a server cannot be reached.
    """

    def __init__(
        self,
        groups: Sequence[tuple[str, WorkerGroup]],
        config: PPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        servers: Mapping[str, RemoteScorer] | None = None,
    ) -> None:
        self.sources, self.groups = sources_of(config), dict(groups)
        self.servers = connect_servers(config) if servers is None else servers
        self.encoders = {
            source.name: own_encoder(config, source, tokenizer) for source in self.sources if source.kind == "model"
        }
        name = config.rewards.reward_fn
        self.function = None if name is None else (name, combining(name))

    def describe(self) -> list[str]:
        """A line on each source, for people."""
        lines = [self._describe(source) for source in self.sources]
        return lines if self.function is None else [*lines, f"made one by the Python function {self.function[0]}"]

    def start(self, rollout: Rollout, prompts: Prompts) -> PendingRewards:
        """Have every source judge some responses, and do not wait.

        Args:
            rollout: the responses.
            prompts: what they answer, by `rollout.prompts`.
        """
        responses = Responses(rollout, prompts)
        asked, calls, futures = [], [], []
        for source in self.sources:
            if source.kind == "server":
                answer = self.servers[source.name].start(responses.asked)
                futures += answer.futures
                asked.append(lambda answer=answer: Judgement(answer.result()))
                continue
            call = self._ask_workers(source, responses)
            calls.append(call)
            asked.append(lambda call=call: merged(call.result()))
        return PendingRewards(self, len(rollout), asked, calls, futures)

    def close(self) -> None:
        """Ask servers nothing more."""
        for server in self.servers.values():
            server.close()

    def combine(
        self, judgements: Sequence[Judgement], count: int
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """One reward of every response, and its parts, see `PendingRewards.result`."""
        each = [checked(f"{source.kind} {source.where}", judged.rewards, count)
                for source, judged in zip(self.sources, judgements, strict=True)]  # fmt: skip
        parts: dict[str, NDArray[np.float32]] = {}
        for source, judged, rewards in zip(self.sources, judgements, each, strict=True):
            parts[source.name] = rewards.astype(np.float32)
            parts |= {f"{source.name}.{name}": values for name, values in self._metrics_of(judged).items()}
        if self.function is not None:
            total = combined(*self.function, each, count)
        else:
            weighted = [source.weight * rewards for source, rewards in zip(self.sources, each, strict=True)]
            total = checked("--reward_weights: the sum of all rewards", np.sum(weighted, axis=0).tolist(), count)
        return total.astype(np.float32), parts

    def _ask_workers(self, source: Source, responses: Responses) -> Pending[list[Judgement]]:
        """Ask a model, all of whose ranks hear the same, or a function, whose ranks hear a share each."""
        group = self.groups[source.name]
        if source.kind == "function":
            return group.start_each("judge", [(share,) for share in shares(responses.asked, len(group))])
        encoder = self.encoders[source.name]
        samples = responses.samples if encoder is None else responses.encoded(encoder)
        call = group.start("judge", [Answer("", "", sample=sample) for sample in samples])
        return Pending(group, "judge", call.references, lambda ranks: ranks[:1])

    def _metrics_of(self, judged: Judgement) -> dict[str, NDArray[np.float32]]:
        """What a function said beside its rewards, as far as it is numbers; NaN where it is none."""
        return {
            name: np.array([value if is_finite(value) else math.nan for value in values], np.float32)
            for name, values in sorted(judged.metrics.items())
            if any(is_finite(value) for value in values)
        }

    def _describe(self, source: Source) -> str:
        weight = "" if self.function is not None or source.weight == 1 else f", times {source.weight:g}"
        if source.kind == "server":
            return f"{source.name}: the server {self.servers[source.name].describe}{weight}"
        if source.kind == "function":
            return f"{source.name}: the Python function {source.where}{weight}"
        reads = "the policy's token ids" if self.encoders[source.name] is None else "texts with its own tokenizer"
        return f"{source.name}: the model {source.where}, which reads {reads}{weight}"


def own_encoder(config: PPOConfig, source: Source, tokenizer: PreTrainedTokenizerBase) -> Encoder | None:
    """How a reward model reads texts; None if it reads the policy's ids, because these mean the same to it."""
    options = scorer_options(config, source.where)
    own = tokenizer_of(options)
    if same_ids(own, tokenizer):
        return None
    from rlhf_infer.rewards.model import check_reward_model

    return Encoder(own, EncodeOptions(context_of(check_reward_model(options)) or ANY_LENGTH))


def same_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether token ids mean the same to two tokenizers, and a sample begins and ends alike."""
    return (
        one.eos_token_id == other.eos_token_id
        and special_prefix(one) == special_prefix(other)
        and one.get_vocab() == other.get_vocab()
    )


def shares(asked: Sequence[Asked], ranks: int) -> list[list[Answer]]:
    """Answers divided among ranks, in order, about as many for each."""
    bounds = np.linspace(0, len(asked), ranks + 1).round().astype(int).tolist()
    return [[one.answer for one in asked[start:stop]] for start, stop in pairwise(bounds)]


def merged(judgements: Sequence[Judgement]) -> Judgement:
    """What several ranks said of a share each, as one."""
    said = [judgement for judgement in judgements if judgement.rewards]
    kept = set.intersection(*(set(judgement.metrics) for judgement in said)) if said else set()
    return Judgement(
        [reward for judgement in said for reward in judgement.rewards],
        {name: [value for judgement in said for value in judgement.metrics[name]] for name in sorted(kept)},
    )


def combined(
    name: str, function: Callable[[list[NDArray[np.float64]]], Any], rewards: list[NDArray[np.float64]], count: int
) -> NDArray[np.float64]:
    """What `--reward_fn` makes of the rewards of all sources.

    Raises:
        RunError: it fails, or returns something else than one finite number for each response.
    """
    try:
        returned = function(rewards)
    except Exception as error:
        raise RunError(f"--reward_fn {name} failed {place_of(error, function)}: {in_words(error)}") from error
    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__len__"):
        raise RunError(f"--reward_fn {name} must return a list of numbers, got {returned!r:.80}")
    return checked(
        f"--reward_fn {name}", [value.item() if hasattr(value, "item") else value for value in returned], count
    )


def checked(who: str, rewards: Sequence[float], count: int) -> NDArray[np.float64]:
    """Rewards, if there is one finite number for each response that float32 can hold.

    Raises:
        RunError: there is not.
    """
    if len(rewards) != count:
        raise RunError(f"{who}: {len(rewards)} rewards for {count} responses")
    largest = float(np.finfo(np.float32).max)
    for place, reward in enumerate(rewards):
        if not is_finite(reward) or abs(reward) > largest:
            raise RunError(f"{who}: the reward of response {place} of {count} is {reward!r:.80}, no finite number")
    return np.array(rewards, np.float64)


def short_name(where: str, kind: str) -> str:
    """What a source is called in logs: the name of a folder, of a function or its file, or of a host."""
    if kind == "server":
        return urlsplit(where).netloc.rpartition("@")[2] or where
    if kind == "model":
        return Path(where).expanduser().name or where
    module, _, function = where.rpartition(":") if not where.endswith(".py") else (where, "", "reward")
    stem = Path(module).stem if module.endswith(".py") else module.rpartition(".")[2]
    return stem if function == "reward" else function


def different(short: Sequence[str]) -> list[str]:
    """Names, numbered where several are the same."""
    total, seen, found = Counter(short), Counter[str](), []
    for name in short:
        seen[name] += 1
        found.append(name if total[name] == 1 else f"{name}-{seen[name]}")
    return found
