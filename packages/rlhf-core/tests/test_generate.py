"""The loop that writes responses: the same tokens whatever else is in the batch, as the model alone would write them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_core.generate import Draft, Sampling, Writer, drawn, nucleus, penalised
from rlhf_core.packed import packed
from rlhf_data.errors import RunError

EOS = 3
CPU = torch.device("cpu")
GREEDY = Sampling(greedy=True)
SHAPED = Sampling(temperature=1.3, top_p=0.8, repetition_penalty=1.4)


def llama(**options: Any) -> Any:
    """A random model of 23 tokens, in double precision: rounding never decides which token is taken."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = options.pop("config", LlamaConfig)(**{
        "vocab_size": 23, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.4, **options,
    })  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def drafts(count: int = 18, room: int = 14) -> list[Draft]:
    """Responses to prompts of 1 to 17 tokens, some of them the same, with different room; always the same."""
    rng = np.random.default_rng(1)
    prompts = [tuple(rng.integers(4, 23, 1 + 5 * n % 17).tolist()) for n in range(count)]
    prompts[4] = prompts[5] = prompts[11]
    return [Draft(prompt, 100 + n, 1 + (n * 3) % room) for n, prompt in enumerate(prompts)]


def write(model: Any, drafts: list[Draft], sampling: Sampling, size: int, stop_ids: tuple[int, ...] = (EOS, 9)) -> None:
    writer = Writer(model, sampling, stop_ids, size=size, device=CPU)
    for draft in drafts:
        writer.add(draft)
    while writer.busy:
        writer.step()


def alone(model: Any, draft: Draft, sampling: Sampling, stop_ids: tuple[int, ...] = (EOS, 9)) -> Draft:
    """Write a response one whole model call per token, shaped by transformers' own processors."""
    own = Draft(draft.prompt, draft.seed, draft.room)
    shape = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    shape += (
        [] if sampling.greedy else [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
    )
    random = np.random.default_rng(draft.seed)
    while not own.finish_reason:
        ids = torch.tensor([[*own.prompt, *own.written]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, -1].float()
        shaped = shape(ids, logits.clone())  # type: ignore[arg-type]
        cumulative = shaped.double().softmax(-1).cumsum(-1)[0]
        token = int(shaped.argmax()) if sampling.greedy else int((cumulative <= random.random()).sum())
        own.written.append(token)
        own.logps.append(float(logits.log_softmax(-1)[0, token]))
        own.finish_reason = "stop" if token in stop_ids else "length" if len(own.written) == own.room else None
    return own


def same(one: list[Draft], other: list[Draft]) -> None:
    assert [draft.written for draft in one] == [draft.written for draft in other]
    assert [draft.finish_reason for draft in one] == [draft.finish_reason for draft in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.logps == pytest.approx(theirs.logps, abs=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), SHAPED, Sampling(greedy=True, repetition_penalty=1.4)])
@pytest.mark.parametrize("stop_ids", [(EOS, 9), ()])
def test_responses_are_those_of_the_model_alone_whatever_the_batching(model, sampling, stop_ids):
    expected = [alone(model, draft, sampling, stop_ids) for draft in drafts()]
    for size in (1, 5, 64):
        found = drafts()
        write(model, found, sampling, size, stop_ids)
        same(found, expected)
    ends = {draft.finish_reason for draft in expected}
    assert ends == ({"stop", "length"} if stop_ids else {"length"})


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_log_probs_at_the_temperature_are_those_of_all_tokens_and_change_no_token(model, top_p):
    plain, tempered = drafts(), drafts()
    write(model, plain, Sampling(temperature=0.6, top_p=top_p), 5)
    write(model, tempered, Sampling(temperature=0.6, top_p=top_p, logps_at_temperature=True), 5)
    for one, other in zip(plain, tempered, strict=True):
        assert one.written == other.written
        ids = torch.tensor([[*other.prompt, *other.written]])
        with torch.no_grad():
            logps = (model(ids).logits[0].float() / 0.6).log_softmax(-1)
        places = torch.arange(len(other.prompt), ids.shape[1])
        assert other.logps == pytest.approx(logps[places - 1, ids[0, places]].tolist(), abs=1e-5)


def test_greedy_responses_have_the_log_probs_of_the_model(model):
    one, other = drafts(), drafts()
    write(model, one, GREEDY, 5)
    write(model, other, Sampling(greedy=True, temperature=0.6, logps_at_temperature=True), 5)
    same(one, other)


def test_responses_do_not_depend_on_the_order_of_requests_or_on_their_room(model):
    found = drafts()
    write(model, found[::-1], Sampling(), 4)
    longer = [Draft(draft.prompt, draft.seed, 20) for draft in found]
    write(model, longer, Sampling(), 5)
    for draft, more in zip(found, longer, strict=True):
        assert more.written[: draft.room] == draft.written


def test_other_seeds_write_other_responses(model):
    found = [Draft((5, 6, 7), seed, 8) for seed in range(30)] + [Draft((5, 6, 7), [4, seed], 8) for seed in range(30)]
    write(model, found, Sampling(temperature=2.0), 16)
    assert len({tuple(draft.written) for draft in found}) > 50


@pytest.mark.parametrize("kind", ["sliding window", "learned places", "full and sliding layers"])
def test_other_kinds_of_attention_are_batched_the_same(kind):
    """Rows longer than the window join a batch of shorter ones and leave it."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, MistralConfig

    if kind == "sliding window":
        other = llama(config=MistralConfig, sliding_window=6)
    elif kind == "full and sliding layers":
        layers = ["sliding_attention", "full_attention"]
        other = llama(config=Gemma3TextConfig, sliding_window=6, layer_types=layers, query_pre_attn_scalar=16)
    else:
        small = GPT2Config(vocab_size=23, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            other = AutoModelForCausalLM.from_config(small).double().eval()
    found = drafts()
    write(other, found, Sampling(), 6)
    same(found, [alone(other, draft, Sampling()) for draft in drafts()])
    assert max(map(len, found)) > 12


def calls(model: Any, found: list[Draft], size: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of every model call."""
    shapes = []
    call = Writer._call
    monkeypatch.setattr(
        Writer, "_call", lambda self, new, lengths, cache: shapes.append((len(new), max(map(len, new)))) or call(self, new, lengths, cache)
    )  # fmt: skip
    write(model, found, GREEDY, size, ())
    monkeypatch.undo()
    return shapes


def test_a_model_with_a_running_state_writes_one_response_at_a_time(monkeypatch):
    """Padding would get into the state, so there is none."""
    from transformers import Lfm2Config

    other = llama(config=Lfm2Config, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    found = drafts(12)
    assert {rows for rows, _ in calls(other, found, 4, monkeypatch)} == {1}
    same(found, [alone(other, draft, GREEDY, ()) for draft in drafts(12)])


def test_waiting_responses_take_the_places_of_those_that_have_ended(model, monkeypatch):
    found = [Draft((5, 6), n, 30 if n == 0 else 3) for n in range(41)]
    shapes = calls(model, found, 4, monkeypatch)
    # 30 tokens one after the other, and 40 times 3 tokens in three places: never much more calls than the longer of both
    assert len(shapes) <= 30 + 2 * 14 and sum(rows for rows, _ in shapes) <= 150
    assert max(rows for rows, _ in shapes) <= 4


def test_prompts_of_similar_length_start_together_and_equal_ones_are_computed_once(model, monkeypatch):
    lengths = [2, 15, 3, 16, 2, 15, 3, 16]
    found = [Draft(tuple(range(4, 4 + length)), n, 2) for n, length in enumerate(lengths)]
    first, _, second, _ = calls(model, found, 4, monkeypatch)
    assert first == (2, 3) and second == (2, 16)


def test_columns_that_nothing_attends_to_leave_the_cache(model):
    writer = Writer(model, GREEDY, (), size=2, device=CPU)
    writer.add(Draft(tuple(range(4, 22)), 0, 2))
    writer.add(Draft((5, 6), 1, 9))
    writer.step()
    assert writer.cache.get_seq_length() == 18
    writer.step()
    assert len(writer.growing) == 1 and writer.cache.get_seq_length() == 3


def test_every_token_is_told_as_it_is_written(model):
    writer = Writer(model, Sampling(), (EOS, 9), size=4, device=CPU)
    found, told = drafts(), []
    for draft in found:
        writer.add(draft)
    while writer.busy:
        told += [(draft.seed, draft.written[-1]) for draft in writer.step()]
    for draft in found:
        assert [token for seed, token in told if seed == draft.seed] == draft.written


def test_a_padded_head_is_left_out(model):
    found = drafts()
    writer = Writer(model, Sampling(temperature=3.0), (), size=8, device=CPU, vocabulary=7)
    for draft in found:
        writer.add(draft)
    while writer.busy:
        writer.step()
    assert {token for draft in found for token in draft.written} == set(range(7))


@pytest.mark.parametrize(("prompt", "room"), [((), 3), ((1, 2), 0)])
def test_what_cannot_be_answered_is_refused(prompt, room):
    with pytest.raises(ValueError, match="cannot be answered"):
        Draft(prompt, 0, room)


@pytest.mark.parametrize("sampling", [GREEDY, SHAPED, Sampling()])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_model_whose_logits_are_not_numbers_is_told_apart_from_a_bad_draw(sampling, broken):
    model = llama()
    model.lm_head.weight.data[7] = broken
    with pytest.raises(RunError, match=r"logits are not numbers .* weights are damaged"):
        write(model, drafts(), sampling, 4)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits = 3 * torch.randn(50, 101, generator=torch.Generator().manual_seed(0))
    ours = nucleus(logits, top_p)
    assert torch.equal(ours, TopPLogitsWarper(top_p)(torch.zeros(50, 1, dtype=torch.int64), logits.clone()))  # type: ignore[arg-type]
    kept = logits.softmax(-1).masked_fill(ours.isinf(), 0)
    assert (kept.sum(-1) >= top_p - 1e-5).all()
    assert (
        kept.sum(-1) - kept.masked_fill(kept == 0, 2).amin(-1) <= top_p + 1e-6
    ).all()  # none of them could be spared


def test_the_penalty_is_that_of_transformers():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 1, 4], [0, 2, 3], [8, 8, 8], [5, 6, 7]])
    seen = torch.zeros(4, 9, dtype=torch.bool).scatter(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())  # type: ignore[arg-type]
    assert torch.equal(penalised(logits, seen, 1.7), theirs)


def test_tokens_are_drawn_where_the_cumulative_probability_passes_the_number():
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    numbers = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53], dtype=torch.float64)
    assert drawn(probabilities.expand(6, 6), numbers).tolist() == [1, 1, 3, 3, 4, 4]
    assert drawn(7 * probabilities.expand(6, 6), numbers).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_among_many_tokens_those_are_drawn_whose_share_of_the_numbers_it_is(vocabulary):
    rng = np.random.default_rng(vocabulary)
    probabilities = np.where(rng.random((400, vocabulary)) < 0.5, rng.random((400, vocabulary)) ** 8, 0.0)
    probabilities[:, rng.integers(vocabulary)] += 1e-3
    numbers = rng.random(400)
    shares = probabilities.cumsum(1) / probabilities.sum(1, keepdims=True)
    expected = (shares <= numbers[:, None]).sum(1)
    assert drawn(torch.from_numpy(probabilities), torch.from_numpy(numbers)).tolist() == expected.tolist()
    assert len(set(expected.tolist())) > min(vocabulary // 4, 50)


def test_tokens_are_drawn_as_often_as_the_model_says():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    numbers = torch.from_numpy(np.random.default_rng(0).random(40_000))
    counts = drawn(probabilities.expand(40_000, 4), numbers).bincount(minlength=4) / 40_000
    assert counts.tolist() == pytest.approx(probabilities.tolist(), abs=0.01)


def test_packed_layers_give_the_same_and_are_plain_again_afterwards(monkeypatch):
    monkeypatch.setattr("rlhf_core.packed.LEAST", 1)
    model = llama().float()
    ids = torch.arange(4, 20).reshape(4, 4)
    weights, forwards = (
        dict(model.named_parameters()),
        [m.forward for m in model.modules() if type(m) is torch.nn.Linear],
    )
    with torch.no_grad():
        expected = model(ids).logits
        with packed(model, 4):
            own = [m for m in model.modules() if "forward" in m.__dict__]
            found = model(ids).logits
    assert len(own) == len(forwards) == 15
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [m.forward for m in model.modules() if isinstance(m, torch.nn.Linear)] == forwards
    assert all(weight is weights[name] for name, weight in model.named_parameters())
    model(ids).logits.sum().backward()  # gradients flow again
    assert all(weight.grad is not None for weight in weights.values())


def test_layers_that_cannot_be_packed_are_left_alone(monkeypatch):
    class Own(torch.nn.Linear):
        pass

    wrapped = torch.nn.Linear(3, 3)
    wrapped.forward = lambda x: x  # type: ignore[method-assign]
    split = torch.nn.Linear(3, 3)
    split.weight.ds_id = 0  # type: ignore[attr-defined]
    model = torch.nn.ModuleList(
        [Own(3, 3), torch.nn.Linear(3, 3).double(), torch.nn.Linear(3, 3).bfloat16(), split, wrapped]
    )
    with packed(model, 1):
        assert [layer for layer in model if "forward" in layer.__dict__] == [wrapped]
    assert "forward" in wrapped.__dict__


@pytest.mark.parametrize("split", [False, True])
def test_a_rank_that_is_done_goes_on_calling_a_split_model_until_all_are_done(monkeypatch, split):
    from rlhf_core import generate
    from rlhf_core.models.policy import Policy

    policy, calls, rounds = Policy(llama(), ragged=True), [], iter([1] * 20 + [0])
    policy.base.set_attn_implementation("rlhf_ragged")
    policy.base.register_forward_hook(lambda module, given, out: calls.append(len(out.logits)))
    monkeypatch.setattr(generate, "policy_is_split", lambda policy: split)
    others = SimpleNamespace(device=CPU, sum=lambda busy: [busy[0] + next(rounds)])
    found = [Draft((5, 6, 7), 1, 6), Draft((8,), 2, 4)]
    generate.write_with_policy(policy, found, Sampling(), others, stop_ids=(), size=2, vocabulary=23)  # type: ignore[arg-type]
    assert calls == ([2] * 4 + [1] * 16 if split else [2] * 4 + [1] * 2)
    same(found, [alone(llama(), draft, Sampling(), ()) for draft in found])
    assert policy.base.config._attn_implementation == "rlhf_ragged"
