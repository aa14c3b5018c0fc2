"""Generation: settings in range, prompts at the right place, and tokens that a seed repeats."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from tests.unit.hand_device import POSITIONS, VOCABULARY
from tidelock.device.generate import GenerationSettings
from tidelock.errors import ConfigError
from tidelock.model.rows import Rows

NEVER = frozenset[int]()


def prompts():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=generator)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    return ids, mask


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 0}, {"max_new_tokens": -1}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_settings_out_of_range_are_refused(change):
    (value,) = change.values()
    with pytest.raises(ConfigError, match=f"Generation: expected max_new_tokens of at least 1.*{value}"):
        GenerationSettings(**change)


def test_settings_at_the_edge_are_taken():
    GenerationSettings(max_new_tokens=1, temperature=0.0, top_p=1e-9)


def test_greedy_tokens_are_those_of_the_whole_model(make_model, whole):
    ids, mask = prompts()
    ours = make_model(moved=False).generate(ids, mask, GenerationSettings(max_new_tokens=12))
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=2)
    theirs = whole.generate(ids, attention_mask=mask, generation_config=settings)
    assert torch.equal(ours, theirs)


def test_the_modules_have_their_say(make_model):
    ids, mask = prompts()
    settings = GenerationSettings(max_new_tokens=12, stop_ids=NEVER)
    assert not torch.equal(
        make_model().generate(ids, mask, settings), make_model(moved=False).generate(ids, mask, settings)
    )


def test_streaming_yields_one_token_a_row(make_model):
    ids, mask = prompts()
    model, settings = make_model(), GenerationSettings(max_new_tokens=5, stop_ids=NEVER)
    tokens = list(model.stream(ids, mask, settings))
    assert [(token.shape, token.dtype) for token in tokens] == [((2,), torch.int64)] * 5
    assert torch.equal(torch.stack(tokens, 1), model.generate(ids, mask, settings)[:, 6:])


def test_prompts_padded_at_the_right_are_refused(make_model):
    ids, _ = prompts()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with pytest.raises(ConfigError, match="Generation: expected prompts padded at the left"):
        make_model().generate(ids, mask, GenerationSettings(max_new_tokens=2))


def test_more_tokens_than_the_model_has_positions_are_refused(make_model):
    ids, mask = prompts()
    model = make_model()
    model.generate(ids, mask, GenerationSettings(max_new_tokens=POSITIONS - 6, stop_ids=NEVER))
    with pytest.raises(ConfigError, match="fit the model's 64 positions, got 6 and 59"):
        model.generate(ids, mask, GenerationSettings(max_new_tokens=POSITIONS - 5))
    with pytest.raises(ConfigError, match="got 6 and 128"):
        model.generate(ids, mask)


def test_a_finished_row_repeats_its_stop_id_and_all_finished_ends(make_model):
    ids, mask = prompts()
    model = make_model()
    free = model.generate(ids, mask, GenerationSettings(max_new_tokens=12, stop_ids=NEVER))[:, 6:]
    stop = next(token for token in free[0].tolist() if token not in free[1].tolist())
    at = free[0].tolist().index(stop)
    stopped = model.generate(ids, mask, GenerationSettings(max_new_tokens=12, stop_ids=frozenset({stop})))[:, 6:]
    assert stopped[0].tolist() == free[0, : at + 1].tolist() + [stop] * (12 - at - 1)
    assert torch.equal(stopped[1], free[1])
    both = frozenset({free[0, 1].item(), free[1, 1].item(), free[0, 0].item()})
    short = model.generate(ids, mask, GenerationSettings(max_new_tokens=12, stop_ids=both))
    assert short.shape[1] - 6 <= 2


@pytest.mark.parametrize(("ids_of_model", "stops"), [(7, {7}), ([7, 9], {7, 9}), (None, set())])
def test_the_models_own_stop_ids_are_the_default(make_model, ids_of_model, stops):
    ids, mask = prompts()
    model = make_model()
    model.generation_config.eos_token_id = ids_of_model
    default = model.generate(ids, mask, GenerationSettings(max_new_tokens=20))
    named = model.generate(ids, mask, GenerationSettings(max_new_tokens=20, stop_ids=frozenset(stops)))
    assert torch.equal(default, named)


def test_the_configurations_stop_id_is_used(make_model):
    assert make_model().generation_config.eos_token_id == 2


def sampled(model, seed, **settings):
    ids, mask = prompts()
    torch.manual_seed(seed)
    return model.generate(ids, mask, GenerationSettings(max_new_tokens=20, stop_ids=NEVER, **settings))


def test_sampling_is_repeated_by_the_seed(make_model):
    model = make_model()
    first = sampled(model, 1, temperature=1.0)
    assert torch.equal(sampled(model, 1, temperature=1.0), first)
    assert not torch.equal(sampled(model, 2, temperature=1.0), first)


def test_a_tiny_top_p_or_temperature_takes_the_likeliest(make_model):
    model = make_model()
    greedy = sampled(model, 1)
    assert torch.equal(sampled(model, 1, temperature=1.0, top_p=1e-6), greedy)
    assert torch.equal(sampled(model, 1, temperature=1e-4), greedy)


def test_a_high_temperature_flattens_the_choice(make_model):
    model = make_model()
    greedy = sampled(model, 1)
    agree = [(sampled(model, 3, temperature=t) == greedy)[:, 6].float().mean() for t in (1e-4, 1000.0)]
    assert agree[0] == 1
    assert len(sampled(model, 3, temperature=1000.0)[:, 6:].unique()) > 15


def test_no_graph_is_kept(make_model):
    model = make_model()
    half = model.open_sites
    seen: list[bool] = []

    def open_sites():
        seen.append(torch.is_grad_enabled())
        return half()

    model.open_sites = open_sites
    sampled(model, 1)
    assert seen == [False]


def test_leaving_in_the_middle_frees_the_blocks(make_model, monkeypatch):
    closed: list[str] = []
    monkeypatch.setattr("tidelock.backbone.local.LocalGeneration.close", lambda self: closed.append("closed"))
    ids, mask = prompts()
    stream = make_model().stream(ids, mask, GenerationSettings(max_new_tokens=5, stop_ids=NEVER))
    next(stream)
    assert closed == []
    stream.close()
    assert len(closed) == 1


def test_rows_may_be_of_one_length(make_model):
    ids, mask = prompts()
    dense = make_model().generate(ids[:1], settings=GenerationSettings(max_new_tokens=4, stop_ids=NEVER))
    padded = make_model().generate(ids, mask, GenerationSettings(max_new_tokens=4, stop_ids=NEVER))
    assert torch.equal(dense[0], padded[0])
    assert Rows.from_mask(mask[:1]).is_dense
