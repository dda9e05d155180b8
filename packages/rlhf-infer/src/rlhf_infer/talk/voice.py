"""The voice of a model: its answers as they are written, or the best of several."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_core.config import ModelConfig
from rlhf_core.models.load import load_model_config
from rlhf_core.vocabulary import check_vocabulary
from rlhf_data.continuation import continuation_text
from rlhf_data.encode import EncodeOptions, Encoder, Prompt
from rlhf_data.errors import InputError
from rlhf_data.rows import Chat, Pair, RowError
from rlhf_data.tokenizer import load_tokenizer
from rlhf_infer.config import SamplingConfig
from rlhf_infer.engines.engine import Request, context_of, stop_ids
from rlhf_infer.engines.transformers import TransformersEngine, how, load
from rlhf_infer.generate import check_writes
from rlhf_infer.rewards.scorer import Answer, ScorerOptions, check_scorer, is_function, make_scorer, tokenizer_of
from rlhf_infer.talk.dialogue import Detokeniser, Ending, Exchange, messages_of
from rlhf_infer.talk.terminal import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_infer.chat import ChatConfig


class ModelVoice:
    """A model that answers, and a reward model or function that chooses among its answers. See `Voice`.

    Args:
        config: which, and how.

    Raises:
        InputError: something that was given cannot be used; found before any weight is loaded.
    """

    def __init__(self, config: ChatConfig) -> None:
        model = ModelConfig(pretrain=config.pretrain, trust_remote_code=config.trust_remote_code)
        model_config = load_model_config(model)
        check_writes(config.pretrain, model_config)
        self.tokenizer = load_tokenizer(
            config.pretrain,
            use_fast=not config.disable_fast_tokenizer,
            chat_template=config.tokenizer_chat_template,
            trust_remote_code=config.trust_remote_code,
        )
        check_vocabulary("--pretrain", config.pretrain, model_config, len(self.tokenizer))
        self.write_out = ConversationWriter(
            self.tokenizer, config.input_template, uses_chat_template(config, self.tokenizer)
        )
        self.config, self.best_of_n, self.greedy = config, config.best_of_n, config.greedy_sampling
        self.max_new_tokens = config.max_new_tokens
        self.limit = min(config.max_len, context_of(model_config) or config.max_len)
        self.limit_name = "--max_len" if self.limit == config.max_len else "the model's context"
        ends = stop_ids(config.pretrain, model_config, self.tokenizer)
        scorer = scorer_of(config, self.limit)
        loaded = load(config.pretrain, bf16=config.bf16, trust_remote_code=config.trust_remote_code)
        self.engine = TransformersEngine(loaded, ends, micro_batch_size=min(config.best_of_n, 16))
        self.judge = Judge(scorer, slow=config.disable_fast_tokenizer) if scorer else None

    def stream(self, asked: Prompt, room: int, seed: int) -> Iterator[tuple[str, Ending | None]]:
        """See `Voice.stream`."""
        from rlhf_core.generate import Draft, Writer

        model, draft = self.engine.model, Draft(tuple(asked.ids), seed, room)
        writer = Writer(model, how(self._sampling(room)), self.engine.stop_ids, size=1, device=model.device)
        writer.add(draft)
        text = Detokeniser(self.tokenizer, asked.ids)
        while writer.busy:
            writer.step()
            if draft.finish_reason != "stop":
                yield text.add(draft.written[-1]), None
        yield text.rest(), draft.finish_reason

    def best(self, asked: Prompt, room: int, seed: int) -> Choice:
        """See `Voice.best`."""
        assert self.judge is not None
        ((_, completions),) = self.engine.generate([Request(asked.ids, seed)], self._sampling(room))
        answers: list[tuple[str, Ending]] = []
        for completion in completions:
            ids = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
            answers.append((continuation_text(self.tokenizer, asked.ids, ids), completion.finish_reason))
        rewards = self.judge.rewards(asked, answers)
        known = {n: reward for n, reward in enumerate(rewards) if reward is not None}
        best = max(known, key=known.__getitem__, default=0)
        return Choice(*answers[best], list(known.values()))

    def _sampling(self, room: int) -> SamplingConfig:
        config = self.config
        drawn = {} if config.greedy_sampling else {"temperature": config.temperature, "top_p": config.top_p}
        return SamplingConfig(
            max_new_tokens=room,
            best_of_n=config.best_of_n,
            greedy_sampling=config.greedy_sampling,
            repetition_penalty=config.repetition_penalty,
            **drawn,
        )


def uses_chat_template(config: ChatConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """What `--apply_chat_template` says, else whether there is a chat template and no `--input_template` was given."""
    if config.apply_chat_template is not None:
        return config.apply_chat_template
    return bool(tokenizer.chat_template) and "input_template" not in config.model_fields_set


def scorer_of(config: ChatConfig, limit: int) -> ScorerOptions | None:
    """What chooses among answers, if anything does, checked; conversations have at most `limit` tokens.

    Raises:
        InputError: there is no such reward model or function, or its parts do not belong together.
    """
    if config.reward_pretrain is None:
        return None
    options = ScorerOptions(
        pretrain=config.reward_pretrain,
        option="--reward_pretrain",
        value_head_prefix=config.value_head_prefix,
        bf16=config.bf16 and not is_function(config.reward_pretrain),
        trust_remote_code=config.trust_remote_code and not is_function(config.reward_pretrain),
        max_len=limit,
        missing=("labels", "rows"),
    )
    if is_function(options.pretrain):
        check_scorer(options)
        return options
    from rlhf_infer.rewards.model import check_reward_model

    architecture = check_reward_model(options)
    tokenizer = tokenizer_of(options, slow=config.disable_fast_tokenizer)
    check_vocabulary(options.option, options.pretrain, architecture, len(tokenizer))
    return replace(options, max_len=min(limit, context_of(architecture) or limit))


class ConversationWriter:
    """Writes conversations out for a model: through the chat template, or plainly.

    Plainly, an exchange is the training sample of its row: the prompt through `--input_template`, the answer, EOS. The next
    one follows, and BOS comes first, once.

    Args:
        tokenizer: of the model.
        input_template: see `ChatConfig`.
        apply_chat_template: whether to write out with the tokenizer's chat template.

    Raises:
        InputError: the tokenizer has no chat template, or no EOS token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, input_template: str | None, apply_chat_template: bool
    ) -> None:
        whole = sys.maxsize  # nothing is cut here
        self.encoder = Encoder(tokenizer, EncodeOptions(whole, input_template, apply_chat_template))
        self.eos = str(tokenizer.eos_token)

    def __call__(self, system: str, exchanges: Sequence[Exchange], prompt: str) -> Prompt:
        """What the model is asked with.

        Raises:
            InputError: the template refuses it.
        """
        if self.encoder.chat is not None:
            return self._prompts([Chat(messages_of(system, exchanges, prompt))])[0]
        pairs = [Pair(exchange.prompt, exchange.answer) for exchange in exchanges] + [Pair(prompt, "")]
        pairs[0] = replace(pairs[0], system=system)
        asked, bos = self._prompts(pairs), self.encoder.prefix
        text, ids = "", list(bos)
        for pair, written, sample in zip(pairs[:-1], asked[:-1], self.encoder.encode(pairs[:-1]), strict=True):
            # an answer without any token makes no sample
            own = [*written.ids, self.encoder.eos_id] if isinstance(sample, RowError) else sample[0].input_ids.tolist()
            text += written.text + pair.response + self.eos
            ids += own[len(bos) :]
        return Prompt(text + asked[-1].text, ids + asked[-1].ids[len(bos) :], "text")

    def _prompts(self, conversations: Sequence[Chat | Pair]) -> list[Prompt]:
        written = []
        for prompt in self.encoder.prompts(conversations):
            if isinstance(prompt, RowError):
                raise InputError(str(prompt))
            written.append(prompt)
        return written


class Judge:
    """Rewards of answers in a conversation.

    Args:
        options: which reward model or function.
        slow: read with the slow (Python) tokenizer.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, options: ScorerOptions, *, slow: bool) -> None:
        self.scorer = make_scorer(options)
        whole = EncodeOptions(options.max_len or sys.maxsize)
        self.encoder = Encoder(tokenizer_of(options, slow=slow), whole) if self.scorer.needs_tokens else None

    def rewards(self, asked: Prompt, answers: Sequence[tuple[str, Ending]]) -> list[float | None]:
        """The reward of each answer to a prompt; none for one that a reward model cannot read, since it has no token.

        Raises:
            InputError: the conversation is too long for the reward model.
        """
        pairs = [Pair(asked.text, text, rendered=asked.rendered, complete=end == "stop") for text, end in answers]
        given = [Answer(asked.text, text) for text, _ in answers]
        if self.encoder is None:
            return [*self.scorer.score(given)]
        samples = self.encoder.encode(pairs)
        readable = {n: sample[0] for n, sample in enumerate(samples) if not isinstance(sample, RowError)}
        if any(sample.truncated for sample in readable.values()):
            raise InputError(
                f"the conversation is longer than {self.encoder.max_len} tokens of the reward model: /clear it"
            )
        rewards = self.scorer.score([replace(given[n], sample=sample) for n, sample in readable.items()])
        found = dict(zip(readable, rewards, strict=True))
        return [found.get(n) for n in range(len(answers))]
