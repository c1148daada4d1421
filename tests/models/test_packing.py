"""Packing, shifting and the attention over packed rows."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from tests.helpers import make_samples
from verl.models.packing import loss_inputs, pack, packed_attention, per_token_of_response
from verl.protocol import OptimizerStep, Prompt, Sample

CPU = torch.device("cpu")


def sample(prompt: list[int], response: list[int]) -> Sample:
    ids = np.array(prompt, np.int64), np.array(response, np.int64)
    return Sample(Prompt(0, ids[0], "countdown", {}), 0, ids[1], "stop")


def test_packed_by_hand():
    batch = pack([sample([5, 6], [1, 2]), sample([7], [3])], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 1, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0]]
    assert batch.predictors.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [1, 2, 3]
    assert batch.model_kwargs["sequence_lengths"] == [3, 1]
    assert batch.model_kwargs["cu_seq_lens_q"].tolist() == [0, 3, 4]
    assert batch.model_kwargs["cu_seq_lens_k"].dtype == torch.int32
    assert batch.model_kwargs["max_length_q"] == batch.model_kwargs["max_length_k"] == 3
    assert batch.model_kwargs["attention_mask"] is None


def test_padded_by_hand():
    batch = pack([sample([5, 6], [1, 2]), sample([7], [3])], CPU, remove_padding=False)
    assert batch.input_ids.tolist() == [[5, 6, 1], [7, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.predictors.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [1, 2, 3]
    assert batch.model_kwargs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    # With a shorter sequence first, padding moves the second one's predictors.
    batch = pack([sample([7], [3]), sample([5, 6], [1, 2])], CPU, remove_padding=False)
    assert batch.predictors.tolist() == [0, 4, 5]


def test_shared_prompt_by_hand():
    one, other, alone = [5, 6], [7], [8, 9]
    samples = [sample(one, [1, 2]), sample(alone, [4]), sample(one, [3]), sample(other, [])]
    samples += [sample(one, []), sample(other, [1, 5, 2]), sample(one, [6, 4, 3])]
    samples[-1].loss_mask = np.array([True, False, True])
    batch = pack(samples, CPU, share=True)
    assert batch.input_ids.tolist() == [[5, 6, 1, 6, 4, 8, 9, 7, 1, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 0, 1, 2]]
    assert batch.targets.tolist() == [1, 2, 4, 3, 1, 5, 2, 6, 3]
    assert batch.predictors.tolist() == [1, 2, 6, 1, 7, 8, 9, 1, 4]
    assert batch.model_kwargs["sequence_lengths"] == [2, 1, 2, 2, 1, 2]
    assert batch.model_kwargs["key_lengths"] == [2, 3, 4, 2, 1, 3]
    keys = [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 7, 8, 9]
    assert batch.model_kwargs["key_index"].tolist() == keys
    assert batch.model_kwargs["cu_seq_lens_k"].tolist() == [0, 2, 5, 9, 11, 12, 15]
    assert batch.model_kwargs["max_length_q"] == 2 and batch.model_kwargs["max_length_k"] == 4
    for same in (samples[1:2], samples[1:4], []):  # nothing to share
        plain, shared = (pack(same, CPU, share=share) for share in (False, True))
        assert "key_index" not in shared.model_kwargs
        assert torch.equal(plain.input_ids, shared.input_ids)
    padded = pack(samples, CPU, remove_padding=False, share=True)
    assert torch.equal(padded.input_ids, pack(samples, CPU, remove_padding=False).input_ids)


@pytest.mark.parametrize("remove_padding", [True, False])
def test_a_predictor_sees_everything_before_its_target_and_nothing_else(remove_padding):
    samples = make_samples([4, 1, 0, 7, 2])
    batch = pack(samples, CPU, remove_padding)
    tokens, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    pairs = iter(zip(batch.predictors.tolist(), batch.targets.tolist(), strict=True))
    for s in samples:
        sequence = [*s.prompt.token_ids.tolist(), *s.response_ids.tolist()]
        for end in range(len(s.prompt.token_ids), len(sequence)):
            predictor, target = next(pairs)
            seen = slice(predictor - end + 1, predictor + 1)
            assert tokens[seen].tolist() == sequence[:end]
            assert positions[seen].tolist() == list(range(end))
            assert target == sequence[end]
    assert next(pairs, None) is None


@pytest.mark.parametrize("remove_padding", [True, False])
def test_response_of_length_zero(remove_padding):
    batch = pack([sample([5, 6], []), sample([7], []), sample([8], [1])], CPU, remove_padding)
    assert batch.targets.tolist() == [1]
    assert batch.input_ids.flatten()[batch.predictors].tolist() == [8]
    assert batch.predictors.dtype == batch.targets.dtype == torch.int64
    # [7] alone would leave nothing to attend to: a token that predicts nothing takes its place.
    lengths = batch.model_kwargs.get("sequence_lengths", batch.model_kwargs["attention_mask"])
    assert torch.as_tensor(lengths).view(3, -1).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("remove_padding", [True, False])
def test_no_samples_are_one_token_that_predicts_nothing(remove_padding):
    batch = pack([], CPU, remove_padding)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 1)
    assert batch.input_ids.dtype == batch.predictors.dtype == batch.targets.dtype == torch.int64
    assert len(batch.predictors) == len(batch.targets) == 0
    hidden = torch.zeros(1, 8)
    assert hidden[batch.predictors].shape == (0, 8)


def test_what_the_loss_sees_and_back():
    samples = make_samples([3, 0, 2, 1])
    step = OptimizerStep(samples, np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    log_probs = entropy = torch.zeros(6)
    x = loss_inputs(step, log_probs, entropy)
    assert x.log_probs is log_probs and x.lengths.tolist() == [3, 0, 2, 1]
    for s, part in zip(samples, per_token_of_response(x.old_log_probs, samples), strict=True):
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, s.old_log_probs)
    owner = [0, 0, 0, 2, 2, 3]
    np.testing.assert_array_equal(x.weights, step.weights[owner])
    np.testing.assert_array_equal(x.advantages, np.float32([samples[i].advantage for i in owner]))
    samples[0].ref_log_probs = None
    with pytest.raises(AssertionError, match=r"some responses .* have no ref_log_probs"):
        loss_inputs(step, log_probs, entropy)
    for s in samples:
        s.ref_log_probs = None
    assert loss_inputs(step, log_probs, entropy).ref_log_probs is None
    empty = loss_inputs(step.share([]), log_probs[:0], entropy[:0])
    assert len(empty.weights) == len(empty.lengths) == len(empty.old_log_probs) == 0


def test_masked_tokens_are_read_but_not_predicted():
    s = sample([5, 6], [1, 2, 3, 4])
    s.loss_mask = np.array([True, False, False, True])
    s.old_log_probs = np.array([-1.0, np.nan, np.nan, -4.0], np.float32)
    batch = pack([s, sample([7], [9])], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 1, 2, 3, 7]]
    assert batch.predictors.tolist() == [1, 4, 5] and batch.targets.tolist() == [1, 4, 9]
    x = loss_inputs(OptimizerStep([s], np.ones(1, np.float32)), torch.zeros(2), torch.zeros(2))
    assert x.old_log_probs.tolist() == [-1, -4] and x.weights.tolist() == [1, 1]
    assert per_token_of_response(torch.tensor([-2.0, -3.0]), [s])[0].tolist() == [-2, 0, 0, -3]


def test_results_with_a_gradient_in_a_short_type_are_split():
    values = torch.tensor([0.5, -0.25, 2.0], dtype=torch.bfloat16, requires_grad=True)
    parts = per_token_of_response(values, make_samples([1, 2]))
    assert [part.tolist() for part in parts] == [[0.5], [-0.25, 2.0]]


# ----------------------------------------------------------------------------------- attention


def plain_attention(query, key, value, lengths, scaling, window):
    """Softmax over a block-diagonal causal mask: one head, one token after the other."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    heads, share = query.shape[1], query.shape[1] // key.shape[1]
    output = []
    for head in range(heads):
        q, k, v = query[0, head], key[0, head // share], value[0, head // share]
        rows = []
        for t in range(len(owner)):
            first = int((owner < owner[t]).sum())
            if window is not None:
                first = max(first, t - window + 1)
            scores = (k[first : t + 1] @ q[t]) * scaling
            rows.append(scores.softmax(0) @ v[first : t + 1])
        output.append(torch.stack(rows))
    return torch.stack(output, dim=1)[None]  # [1, T, heads, D]


@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_packed_attention_is_block_diagonal_and_causal(key_heads, window):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 6]
    query, key, value = (
        torch.randn(1, heads, 10, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, key_heads, key_heads)
    )
    ours, weights = packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        sequence_lengths=lengths,
        scaling=0.3,
        sliding_window=window,
    )
    theirs = plain_attention(query, key, value, lengths, 0.3, window)
    assert weights is None
    assert ours.shape == (1, 10, 4, 8)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(
        torch.autograd.grad((ours * cotangent).sum(), (query, key, value)),
        torch.autograd.grad((theirs * cotangent).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_sinks_and_caps(window, softcap):
    """A sink takes its share of the softmax and gives nothing; a cap bends scores before it."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 9, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)
    )
    sinks = torch.randn(4, dtype=torch.float64, generator=generator)
    leaves = [x.requires_grad_() for x in (query, key, value, sinks)]
    options = {"sequence_lengths": [3, 6], "sliding_window": window, "softcap": softcap}
    ours, _ = packed_attention(torch.nn.Module(), *leaves[:3], None, s_aux=sinks, **options)
    parts = []
    for start, end in ((0, 3), (3, 9)):
        q, k, v = (x[0, :, start:end] for x in (query, key, value))
        scores = q @ k.repeat_interleave(2, 0).transpose(1, 2) / 8**0.5
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        e = scores.exp() * seen
        shares = e / (e.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
        parts.append((shares @ v.repeat_interleave(2, 0)).transpose(0, 1))
    theirs = torch.cat(parts)[None]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # a float32 softmax
    cotangent = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(
        torch.autograd.grad((ours * cotangent).sum(), leaves),
        torch.autograd.grad((theirs * cotangent).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 2, 6])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_attention_to_a_shared_prompt(window, sinks, softcap):
    """As to one of each response's own, for responses longer and shorter than it."""
    samples = [sample([5, 6, 7, 8], [1] * n) for n in (9, 3)] + make_samples([4, 6])
    plain, shared = (pack(samples, CPU, share=share) for share in (False, True))
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, dtype=torch.float64, generator=generator)
    size = shared.input_ids.numel()
    leaves = [random(1, heads, size, 8).requires_grad_() for heads in (4, 2, 2)]
    options = {"sliding_window": window, "softcap": softcap}
    options |= {"s_aux": random(4)} if sinks else {}
    attention = AttentionInterface()[packed_attention.__name__]
    ours, _ = attention(torch.nn.Module(), *leaves, **shared.model_kwargs | options)
    place = shared.model_kwargs["key_index"][4:]  # of the plain row's tokens in the shared one
    assert torch.equal(shared.input_ids[:, place], plain.input_ids)
    rows = [x[:, :, place] for x in leaves]
    theirs, _ = attention(torch.nn.Module(), *rows, **plain.model_kwargs | options)
    torch.testing.assert_close(ours[:, place], theirs, rtol=1e-6, atol=1e-6)
    cotangent = random(theirs.shape)
    cotangent[:, 12:16] = 0  # the prompt a second time
    for a, b in zip(
        torch.autograd.grad((ours[:, place] * cotangent).sum(), leaves),
        torch.autograd.grad((theirs * cotangent).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_windows_that_only_a_mask_tells_and_masks_of_a_models_own():
    query, key, value = torch.randn(3, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    options = {"sequence_lengths": [9]}
    arguments = torch.nn.Module(), query, key, value
    told, _ = packed_attention(*arguments, None, sliding_window=3, **options)
    masked, _ = packed_attention(*arguments, torch.tensor(3), **options)
    assert torch.equal(told, masked)
    for mask, rest in ((torch.zeros(1, 1, 9, 9), options), (None, {})):
        with pytest.raises(ValueError, match="masks of its own"):
            packed_attention(*arguments, mask, **rest)


def test_default_scale_is_that_of_the_head_size():
    query, key, value = torch.randn(3, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    ours, _ = packed_attention(torch.nn.Module(), query, key, value, None, sequence_lengths=[2, 3])
    torch.testing.assert_close(ours, plain_attention(query, key, value, [2, 3], 1 / 4, None))


def test_model_sees_the_same_in_packed_and_padded_rows(tiny_model):
    samples = make_samples([4, 1, 0, 7, 2])
    logits = []
    for remove_padding, attention in ((True, "packed_attention"), (False, "eager")):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention)
        batch = pack(samples, CPU, remove_padding)
        with torch.no_grad():
            output = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                **batch.model_kwargs,
            )
        logits.append(output.logits.flatten(0, 1)[batch.predictors])
    assert logits[0].shape[0] == 14
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
