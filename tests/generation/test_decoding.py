"""What a model writes does not depend on how it was saved, nor on how much of the text it has read at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from written_models import VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer, write_model, write_run

from megatron_omega.checkpoint.manifest import FILE_NAME
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import CheckpointError, ConfigError, DataError
from megatron_omega.export.loading import TextModel, load_omega, load_text_model
from megatron_omega.generation import decoding
from megatron_omega.generation.cache import Held
from megatron_omega.generation.decoding import Continuation, encode, generate, stream_text
from megatron_omega.generation.engine import Engine, Row
from megatron_omega.generation.fill_mask import fill_mask, masked_ids
from megatron_omega.generation.sampling import Sampling, choose, probabilities
from megatron_omega.model.omega import Omega, vocabulary_logits
from megatron_omega.parallel.parameters import declared_parameters

POSITIONS = ("rotary", "sinusoidal", "learned")
DECODER_ONLY = {"encoder_layers": 0}
T5_LIKE = {"encoder_branches": ["full"], "decoder_branches": ["causal"], "mlm_head": False}
QUICK = settings(max_examples=50)
LENGTH = 75  # more than the window, the first room of the cache, and no multiple of the row width


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole_pass(model: Omega, encoder_ids: Sequence[int], decoder_ids: Sequence[int]) -> torch.Tensor:
    """Logits [t, vocab_size] of the forward pass that training uses."""
    streams = [decoder_ids] if model.context.model.is_decoder_only else [encoder_ids, decoder_ids]
    tensors = [torch.tensor([list(ids)]) for ids in streams]
    inputs = tuple(part for ids in tensors for part in (ids, torch.ones_like(ids)))
    return vocabulary_logits(model, model.hidden(inputs)[0])[0]


def start(model: Omega, encoder_ids: Sequence[int]) -> Continuation:
    return Continuation(model, None if model.context.model.is_decoder_only else encode(model, encoder_ids))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("shape", [{}, DECODER_ONLY, T5_LIKE], ids=["omega", "decoder-only", "t5-like"])
def test_cached_decoding_is_the_whole_forward_pass(shape: dict, positions: str) -> None:
    model = tiny_model(tiny_config(model={**shape, "positions": positions}))
    encoder_ids, decoder_ids = random_ids(37, 1), random_ids(LENGTH, 2)
    expected = whole_pass(model, encoder_ids, decoder_ids)
    continuation = start(model, encoder_ids)
    found = torch.stack([continuation.read([number]) for number in decoder_ids])
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=4), block=st.integers(1, 80))
def test_how_a_text_is_cut_when_it_is_read_does_not_matter(cuts: list[int], block: int) -> None:
    model = tiny_model(tiny_config())
    encoder_ids, decoder_ids = random_ids(37, 1), random_ids(LENGTH, 2)
    bounds = [0, *sorted(set(cuts)), LENGTH]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "BLOCK_TOKENS", block)
        continuation = start(model, encoder_ids)
        for first, last in pairwise(bounds):
            found = continuation.read(decoder_ids[first:last])
    torch.testing.assert_close(found, whole_pass(model, encoder_ids, decoder_ids)[-1], rtol=0, atol=1e-5)


LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40).map(torch.tensor)
SAMPLINGS = st.builds(Sampling, st.floats(0.05, 3), st.integers(0, 45), st.floats(0.01, 1))


@QUICK
@given(LOGITS, SAMPLINGS)
def test_sampling_keeps_the_most_probable_and_their_proportions(logits: torch.Tensor, sampling: Sampling) -> None:
    found = probabilities(logits, sampling)
    plain = (logits / sampling.temperature).softmax(dim=0)
    kept = found > 0
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    assert plain[kept].max() >= plain.max() - 1e-6  # logits that differ by less than rounding are equals
    if sampling.top_k:
        assert kept.sum() <= sampling.top_k
    if not kept.all():
        assert plain[kept].min() >= plain[~kept].max() - 1e-6
    torch.testing.assert_close(found[kept], plain[kept] / plain[kept].sum(), rtol=1e-4, atol=1e-7)


@QUICK
@given(LOGITS, st.floats(0.05, 0.99))
def test_top_p_keeps_the_smallest_set_that_is_enough(logits: torch.Tensor, top_p: float) -> None:
    plain = logits.double().softmax(dim=0)
    kept = probabilities(logits.double(), Sampling(1, 0, top_p)) > 0
    assert plain[kept].sum() >= top_p - 1e-9
    assert plain[kept].sum() - plain[kept].min() < top_p + 1e-9


@QUICK
@given(LOGITS, st.integers(1, 40))
def test_top_k_keeps_exactly_k(logits: torch.Tensor, top_k: int) -> None:
    assert (probabilities(logits, Sampling(1, top_k, 1)) > 0).sum() == min(top_k, len(logits))


@QUICK
@given(LOGITS, st.integers(0, 2**31))
def test_only_kept_tokens_are_drawn_and_a_seed_repeats_itself(logits: torch.Tensor, seed: int) -> None:
    sampling = Sampling(1, 3, 0.9)
    drawn = [choose(logits, sampling, torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert probabilities(logits, sampling)[drawn[0]] > 0
    assert choose(logits, Sampling(0), torch.Generator()) == logits.argmax()


def test_draws_follow_the_distribution() -> None:
    logits, generator = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([choose(logits, Sampling(1, 0, 1), generator) for _ in range(4000)]))
    torch.testing.assert_close(counts / 4000, logits.softmax(dim=0), rtol=0, atol=0.03)


def test_rules_that_make_no_sense_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(-1, -1, 2)
    assert len(caught.value.findings) == 3


def text_model(config: RunConfig | None = None) -> TextModel:
    config = config or tiny_config()
    return TextModel(tiny_model(config), config, tiny_tokenizer(), Path("somewhere"))


def scripted(ids: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Put a decoder in place that favours `ids` one after the other; return what it is given to read."""
    found: list[list[int]] = []
    told: list[list[int]] = []

    def read(_: Engine, new: Sequence[int], held: Held, memory: object) -> None:
        held.length += len(new)
        told.append(list(new))

    def grow(_: Engine, rows: Sequence[Row]) -> torch.Tensor:
        found.append([*(number for new in told for number in new), rows[0].id])
        told.clear()
        rows[0].held.length += 1
        logits = torch.zeros(1, VOCAB_SIZE)
        logits[0, ids[len(found) - 1]] = 9
        return logits

    monkeypatch.setattr(Engine, "read", read)
    monkeypatch.setattr(Engine, "grow", grow)
    return found


def test_a_text_ends_at_its_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    special = tiny_tokenizer().special
    one, two = tiny_tokenizer().text_ids[-2:]
    read = scripted([one, two, special.eos, one], monkeypatch)
    assert list(generate(text_model(), "x", Sampling(0), max_new_tokens=9, seed=0)) == [one, two, special.eos]
    assert read == [tiny_tokenizer().encode("x")[-1:], [one], [two]]


@pytest.mark.parametrize("overlap", [1, 2, 99])
def test_the_decoder_reads_the_end_of_the_prompt_again(overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read = scripted([tiny_tokenizer().special.eos], monkeypatch)
    model = text_model(tiny_config(model={"decoder_overlap": overlap}))
    list(generate(model, "The dog jumps", Sampling(0), max_new_tokens=1, seed=0))
    assert read == [tiny_tokenizer().encode("The dog jumps")[-overlap:]]


@pytest.mark.parametrize(("prompt", "start"), [("The dog", "begin"), ("", "prefix")])
def test_the_decoder_starts_as_it_was_trained(prompt: str, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = scripted([tiny_tokenizer().special.eos], monkeypatch)
    model = text_model(tiny_config(model={"decoder_start": start}))
    list(generate(model, prompt, Sampling(0), max_new_tokens=1, seed=0))
    assert read == [[tiny_tokenizer().special.bos]]


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1, 0, 1)])
def test_control_symbols_are_never_written(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    special = tiny_tokenizer().special
    unwanted = [special.pad, special.bos, special.mask, *special.modes, special.sentinels[0], 1]
    scripted(unwanted, monkeypatch)
    found = list(generate(text_model(), "x", sampling, max_new_tokens=len(unwanted), seed=0))
    assert set(found) <= {*tiny_tokenizer().text_ids, special.eos}


@pytest.mark.parametrize("shape", [{}, DECODER_ONLY])
def test_the_seed_decides_the_text(shape: dict) -> None:
    model = text_model(tiny_config(model=shape))
    texts = [list(generate(model, "The quick", Sampling(1, 0, 1), max_new_tokens=20, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_decoder_only_model_reads_the_prompt_in_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    read = scripted([tokenizer.text_ids[0]], monkeypatch)
    list(generate(text_model(tiny_config(model=DECODER_ONLY)), "The dog", Sampling(0), max_new_tokens=1, seed=0))
    assert read == [[tokenizer.special.bos, *tokenizer.encode("The dog")]]


def test_learned_positions_bound_the_text() -> None:
    data = {"encoder_seq_length": 8, "decoder_seq_length": 8}
    model = text_model(tiny_config(model={"positions": "learned"}, data=data))
    tokenizer = tiny_tokenizer()
    ids = list(generate(model, "", Sampling(1, 0, 1), max_new_tokens=50, seed=0))
    assert len(ids) == 8 or ids[-1] == tokenizer.special.eos
    with pytest.raises(DataError, match="learned positions end at 8"):
        list(generate(model, "The quick brown fox jumps over the lazy dog", Sampling(), max_new_tokens=1, seed=0))


@settings(max_examples=50)
@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30))
def test_streamed_parts_make_the_whole_text(ids: list[int]) -> None:
    assert "".join(stream_text(tiny_tokenizer(), ids)) == tiny_tokenizer().decode(ids)


@QUICK
@given(st.text(max_size=20))
def test_no_character_is_streamed_in_halves(text: str) -> None:
    tokenizer = tiny_tokenizer()
    parts = list(stream_text(tokenizer, tokenizer.encode(text)))
    assert "".join(parts) == tokenizer.decode(tokenizer.encode(text))
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_masks_are_filled_by_the_head_that_was_trained() -> None:
    model, tokenizer = text_model(), tiny_tokenizer()
    ids = [tokenizer.special.modes.mask, *masked_ids(tokenizer, "The <mask> jumps over[MASK].")]
    encoder, decoder = torch.tensor([ids]), torch.tensor([[tokenizer.special.bos]])
    outputs = model.model.hidden((encoder, torch.ones_like(encoder), decoder, torch.ones_like(decoder)))
    expected = vocabulary_logits(model.model, outputs[1], outputs[2])[0].softmax(dim=-1)
    filled = fill_mask(model, "The <mask> jumps over[MASK].", top_k=7)
    places = [place for place, number in enumerate(ids) if number == tokenizer.special.mask]
    assert len(filled.masks) == len(places) == 2
    for place, candidates in zip(places, filled.masks, strict=True):
        assert len(candidates) == 7
        assert [c.probability for c in candidates] == sorted((c.probability for c in candidates), reverse=True)
        for candidate in candidates:
            assert candidate.token_id in tokenizer.text_ids
            assert candidate.probability == pytest.approx(expected[place, candidate.token_id].item(), rel=1e-4)
    first, second = (candidates[0].piece for candidates in filled.masks)
    assert filled.text == f"The{first} jumps over{second}."


def test_a_space_before_a_mask_belongs_to_the_mask() -> None:
    tokenizer = tiny_tokenizer()
    mask = tokenizer.special.mask
    assert masked_ids(tokenizer, "The <mask> dog") == [*tokenizer.encode("The"), mask, *tokenizer.encode(" dog")]
    assert masked_ids(tokenizer, "[MASK]<mask>") == [mask, mask]


def test_masks_need_a_head_and_a_mask() -> None:
    with pytest.raises(ConfigError, match="no MLM head"):
        fill_mask(text_model(tiny_config(model=DECODER_ONLY)), "The <mask>")
    with pytest.raises(ConfigError, match="mlm_head: false"):
        fill_mask(text_model(tiny_config(model=T5_LIKE)), "The <mask>")
    with pytest.raises(DataError, match="has no mask"):
        fill_mask(text_model(), "The dog")


@pytest.mark.parametrize("tensor", [1, 2, 3])
@pytest.mark.parametrize("shape", [{}, DECODER_ONLY, {"positions": "learned"}])
def test_every_layout_loads_into_the_same_model(shape: dict, tensor: int, tmp_path: Path) -> None:
    config = tiny_config(model=shape)
    model = tiny_model(config)
    path = write_model(model, config, tmp_path, tensor=tensor)
    loaded, found = load_omega(path)
    assert found == config
    expected = {info.name: parameter for info, parameter in declared_parameters(model)}
    parameters = {info.name: parameter for info, parameter in declared_parameters(loaded)}
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in parameters.items())
    assert loaded.heads.weight is loaded.table.weight
    assert not loaded.training and not any(parameter.requires_grad for parameter in parameters.values())


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    newest = write_model(tiny_model(config, seed=5), config, tmp_path / "checkpoints", step=2)
    for place in (tmp_path, tmp_path / "checkpoints", newest):
        assert load_text_model(place).path == newest
    weights = next(newest.glob("weights-*"))
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert load_text_model(tmp_path).path.name == "step-00000001"
    with pytest.raises(CheckpointError, match="changed bytes"):
        load_omega(newest)


def test_a_checkpoint_that_lacks_a_parameter_is_refused(tmp_path: Path) -> None:
    small = tiny_config(model={"mlm_head": False})
    path = write_model(tiny_model(small), tiny_config(), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no parameter head\.mlm"):
        load_omega(path)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_omega(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_omega(tmp_path)
    write_run(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        load_text_model(tmp_path, tokenizer=tmp_path / "none.model")
    manifest = next(tmp_path.rglob(FILE_NAME))
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.raises(CheckpointError):
        load_omega(tmp_path)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    model = tiny_tokenizer().processor.serialized_model_proto()
    (tmp_path / "other.model").write_bytes(model + b"\x12\x00")  # an empty trainer_spec: the same pieces
    with pytest.raises(DataError, match="trained with"):
        load_text_model(tmp_path, tokenizer=tmp_path / "other.model")
