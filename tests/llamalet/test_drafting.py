import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SMALL_MODELS, Counting, in_memory

from llamalet.drafting import MATCH, MAX_PROPOSED, Draft, Lookup, SmallModel
from llamalet.errors import NonFiniteError, UsageError
from llamalet.generate import generate_batch
from llamalet.kernels.transformer import Transformer
from llamalet.sampler import Sampler, SamplingConfig, choose_token

CONFIG = SMALL_MODELS["gqa-tied"]  # 300 tokens, context 32


@pytest.fixture(scope="module")
def models():
    """A model in each kind of weights. They share their weights but for rounding, so they often agree."""
    found = {dtype: Transformer(in_memory(CONFIG, dtype), threads=1) for dtype in ("f32", "bf16", "q8", "q4")}
    for context in (1, 7):
        found[f"context {context}"] = Transformer(in_memory(dataclasses.replace(CONFIG, max_seq_len=context), "q8"))
    return found


def text_of(model, prompt, draft=None, **options):
    config = SamplingConfig(**{"max_new_tokens": 60, "seed": 5} | options)
    events = list(generate_batch(model, [prompt], [config], stop_tokens=[2], draft=draft))
    assert events[-1] == (0, None)
    return [token for _, token in events[:-1]]


class Scripted(Draft):
    """Proposes right tokens, wrong ones, or none, as it was told."""

    def __init__(self, text, plan):
        super().__init__()
        self.text, self.plan, self.asked = text, iter(plan), []

    def propose(self, tokens, n, sampler):
        self.asked.append(n)
        n_right, n_wrong = next(self.plan, (0, 0))
        new = len(tokens)
        coming = self.text[new : new + n_right + n_wrong]
        wrong = [(token + 1) % CONFIG.vocab_size for token in coming[n_right:]]
        return [*coming[:n_right], *wrong][:n]


options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0]),
        "top_p": st.sampled_from([0.0, 0.9]),
        "top_k": st.sampled_from([0, 7]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "seed": st.integers(1, 10_000),
        "overflow": st.sampled_from(["stop", "roll"]),
        "keep": st.sampled_from([0, 4, 31]),
        "max_new_tokens": st.integers(0, 90),
    }
)
prompts = st.lists(st.integers(3, 20), min_size=1, max_size=50)
dtypes = st.sampled_from(["f32", "bf16", "q8", "q4"])


def fitting(prompt, given_options):
    """The prompt, cut if its context may not roll."""
    return prompt[:30] if given_options["overflow"] == "stop" else prompt


@given(dtypes, st.sampled_from(["f32", "q8", "q4", "context 1", "context 7"]), prompts, options)
@settings(deadline=None, max_examples=100)
def test_a_draft_does_not_change_the_text(models, dtype, small, prompt, given_options):
    model, prompt = models[dtype], fitting(prompt, given_options)
    plain = text_of(model, prompt, **given_options)
    for draft in (Lookup(), SmallModel(models[small])):
        for _ in range(2):  # a draft may serve a second text
            assert text_of(model, prompt, draft, **given_options) == plain
            assert 0 <= draft.kept <= draft.proposed


@given(dtypes, prompts, options, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=40))
@settings(deadline=None, max_examples=60)
def test_wrong_proposals_never_happened(models, dtype, prompt, given_options, plan):
    model, prompt = models[dtype], fitting(prompt, given_options)
    plain = text_of(model, prompt, **given_options)
    draft = Scripted([*prompt, *plain], plan)
    assert text_of(model, prompt, draft, **given_options) == plain
    assert all(1 <= n <= MAX_PROPOSED for n in draft.asked)


def test_the_same_model_is_always_kept(models):
    """Its draws are the sampler's, with the same random numbers. That is why a similar model's often are."""
    draft = SmallModel(models["q8"])
    text_of(models["q8"], [1, 5], draft, overflow="roll", max_new_tokens=25, ignore_eos=True)
    assert draft.kept == draft.proposed > 10


def test_lookup_proposes_what_followed_the_newest_tokens_the_last_time():
    draft, sampler = Lookup(), Sampler(300, SamplingConfig(seed=1))
    tokens = [1, 2, 3, 4, 5, 1, 2, 3]
    assert MATCH == 3 and draft.propose(tokens, 4, sampler) == [4, 5, 1, 2]
    tokens += [9, 1, 2, 3]
    assert draft.propose(tokens, 2, sampler) == [9, 1]
    assert draft.propose([*tokens, 7], 2, sampler) == []
    assert Lookup().propose([1, 7, 7, 7, 7], 5, sampler) == [7] * 5  # a loop goes on


def test_a_draft_that_is_never_right_is_asked_less_and_less(models):
    class Wrong(Scripted):
        def propose(self, tokens, n, sampler):
            self.asked.append(len(tokens))
            return [(token + 1) % CONFIG.vocab_size for token in self.text[len(tokens) : len(tokens) + n]]

    options = {"temperature": 0, "overflow": "roll", "max_new_tokens": 200, "ignore_eos": True}
    plain = text_of(models["q8"], [1, 5], **options)
    draft = Wrong([1, 5, *plain], [])
    assert text_of(models["q8"], [1, 5], draft, **options) == plain
    gaps = np.diff(draft.asked)
    assert draft.kept == 0 and max(gaps) > 20 and len(gaps) < 20


def test_a_repeated_text_takes_few_passes():
    class Cycle(Counting):
        """Counts from 11 to 19 and begins again."""

        def logits(self, tokens):
            return super().logits([10 if token == 19 else token for token in tokens])

        def extend(self, cache, tokens):
            return np.stack([self.decode(cache, token) for token in tokens])

    model = Cycle(CONFIG)
    passes = []
    model.extend = lambda cache, tokens, extend=model.extend: passes.append(len(tokens)) or extend(cache, tokens)
    draft = Lookup()
    text = text_of(model, [11], draft, temperature=0, overflow="roll", max_new_tokens=100)
    assert text == [11 + (i + 1) % 9 for i in range(100)]
    assert max(passes) == MAX_PROPOSED + 1 and draft.kept > 60


def test_what_follows_a_wrong_token_may_even_be_broken(models):
    """A NaN that only a rejected proposal leads to is never seen."""
    model = models["f32"]
    plain = text_of(model, [1, 5], temperature=0)

    class Broken:
        config, kv, choose = CONFIG, "f32", staticmethod(choose_token)
        new_cache, prefill, decode = model.new_cache, model.prefill, model.decode

        def extend(self, cache, tokens):
            logits = model.extend(cache, tokens)
            logits[1:] = np.nan
            return logits

    wrong = Scripted([1, 5, *plain], [(0, 3)] * 9)
    assert text_of(Broken(), [1, 5], wrong, temperature=0) == plain and wrong.proposed > 3
    with pytest.raises(NonFiniteError):
        text_of(Broken(), [1, 5], Scripted([1, 5, *plain], [(2, 0)]), temperature=0)


def test_a_broken_draft_is_named(models):
    class Broken:
        config, new_cache = CONFIG, models["f32"].new_cache

        def prefill(self, cache, tokens):
            return np.full(CONFIG.vocab_size, np.nan, np.float32)

    with pytest.raises(NonFiniteError, match="draft: 300 of 300 logits are NaN"):
        text_of(models["f32"], [1, 5], SmallModel(Broken()))


def test_a_draft_is_for_one_text(models):
    with pytest.raises(UsageError, match="draft: is for a single text, not for 2"):
        generate_batch(models["q8"], [[1], [1]], [SamplingConfig()] * 2, draft=Lookup())
