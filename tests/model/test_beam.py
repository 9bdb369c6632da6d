"""Decoding with a cache: the tokens of transformers.generate over a grid of options, and what a step may cost."""

import dataclasses
import itertools

import pytest
import torch

from model.beam import Decoding, repeats
from model.generate import generate, sample
from model.gpt2 import GPT2, GPT2Config
from model.gpt2_hub import load_hf
from model.seq2seq import Seq2Seq, bart_config
from model.seq2seq_hub import load_seq2seq

# Scores are sums of log-probabilities of order 1 over at most 20 tokens, in fp32, of two implementations.
SCORE_TOLERANCE = 1e-5
V, EOS = 37, 2
KINDS = ["bart", "pegasus", "gpt2"]
BOOST = dict(bart=3.0, pegasus=2.5, gpt2=3.0)  # towards EOS, so that outputs of random weights end here and there


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pairs(transformers, tmp_path_factory):
    """Each kind as (theirs, ours): random weights wide enough that beams differ and some of them end."""
    result = {}
    shape = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    shape |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40, vocab_size=V)
    shape |= dict(pad_token_id=1, eos_token_id=EOS, bos_token_id=0, decoder_start_token_id=3)
    for kind in KINDS:
        torch.manual_seed(5)
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=V, n_positions=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS
            )
            theirs = transformers.GPT2LMHeadModel(config)
        elif kind == "bart":
            theirs = transformers.BartForConditionalGeneration(transformers.BartConfig(**shape))
        else:
            theirs = transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**shape))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    # Strong layers over small embeddings and biases: what comes next then hangs on the context,
                    # where a tied head would repeat its input and a strong bias one token.
                    weak = parameter.ndim == 1 or "shared" in name or "wte" in name
                    parameter.add_((0.3 if weak else 1.0) * torch.randn_like(parameter))
            if kind != "gpt2":
                theirs.final_logits_bias.normal_().mul_(0.5)
                theirs.final_logits_bias[0, EOS] += BOOST[kind]
            else:
                theirs.transformer.ln_f.bias.add_(BOOST[kind] * theirs.transformer.wte.weight[EOS])
        folder = tmp_path_factory.mktemp(kind)
        theirs.save_pretrained(folder)
        theirs.generation_config = transformers.GenerationConfig()
        result[kind] = theirs.eval(), (load_hf if kind == "gpt2" else load_seq2seq)(folder)
    return result


def prompts(kind, B=4, T=9, seed=0):
    tokens = torch.randint(4, V, (B, T), generator=torch.Generator().manual_seed(seed))
    if kind == "gpt2":
        return tokens, None
    return tokens, torch.arange(T) < torch.tensor([T, T - 4, T - 1, 3])[:B, None]


def theirs_generate(transformers, model, kind, tokens, mask, options: Decoding):
    """transformers' sequences and scores for our options, the prompt cut off."""
    settings = dict(
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        num_beams=options.num_beams,
        num_return_sequences=options.num_return,
        length_penalty=options.length_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram,
        early_stopping=options.early_stopping,
        forced_bos_token_id=options.forced_bos_id,
        forced_eos_token_id=options.forced_eos_id,
        eos_token_id=list(options.eos_ids) or None,
        pad_token_id=options.fill,
        do_sample=options.temperature > 0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    if options.temperature > 0:
        settings |= dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    if kind != "gpt2":
        settings |= dict(decoder_start_token_id=3)
    mask = torch.ones_like(tokens) if mask is None else mask.long()
    out = model.generate(tokens, attention_mask=mask, generation_config=transformers.GenerationConfig(**settings))
    sequences = out.sequences[:, 1 if kind != "gpt2" else tokens.shape[1] :]
    return sequences, getattr(out, "sequences_scores", None)


def assert_same(transformers, pairs, kind, options, tokens, mask, **arguments):
    theirs, ours = pairs[kind]
    state = torch.get_rng_state()
    expected, scores = theirs_generate(transformers, theirs, kind, tokens, mask, options)
    torch.set_rng_state(state)
    got = generate(ours, tokens, options, mask, **arguments)
    B, R, T = got.tokens.shape
    assert (B, R, T) == (len(tokens), options.num_return, options.max_new_tokens)
    for i, row in enumerate(expected):
        if got.scores[i // R, i % R] == -torch.inf:
            assert got.lengths[i // R, i % R] == 0 and not got.ended[i // R, i % R]
            continue
        n = got.lengths[i // R, i % R].item()
        mine = got.tokens[i // R, i % R]
        assert mine[:n].tolist() == row[:n].tolist(), (options, i)
        assert set(row[n:].tolist()) <= {options.fill} and set(mine[n:].tolist()) <= {options.fill}
        assert got.ended[i // R, i % R].item() == (mine[n - 1].item() in options.eos_ids)
        assert n == T or got.ended[i // R, i % R]
    if scores is not None:
        # transformers fills up missing hypotheses with scores of -1e9 and less.
        scores = scores.masked_fill(scores < -5e8, -torch.inf)
        torch.testing.assert_close(got.scores.flatten(), scores, rtol=SCORE_TOLERANCE, atol=SCORE_TOLERANCE)
    return got


# ---------------------------------------------------------------- parity with transformers

GRID = [
    dict(num_beams=beams, length_penalty=penalty, early_stopping=early, min_new_tokens=least, no_repeat_ngram=ngram)
    for beams, penalty, early, (least, ngram) in itertools.product(
        (1, 2, 4), (-1.0, 0.6, 2.0), (True, False, "never"), ((0, 0), (0, 2), (4, 0))
    )
    if beams > 1 or (penalty == 2.0 and early is False)  # neither means anything to one beam
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_gives_the_tokens_of_transformers(transformers, pairs, kind):
    tokens, mask = prompts(kind)
    lengths, outcomes = set(), {}
    for choice in GRID:
        options = Decoding(max_new_tokens=12, eos_id=EOS, pad_id=1, num_return=choice["num_beams"], **choice)
        got = assert_same(transformers, pairs, kind, options, tokens, mask)
        lengths |= set(got.lengths.flatten().tolist())
        outcomes[tuple(choice.values())] = got.tokens.tolist()
    assert len(lengths) > 6
    # The options had something to decide: each value of each makes a difference somewhere in the grid.
    for i, name in enumerate(choice):
        for one, other in itertools.combinations({key[i] for key in outcomes}, 2):
            swapped = [(key, (*key[:i], other, *key[i + 1 :])) for key in outcomes if key[i] == one]
            pairs_of = [(outcomes[a], outcomes[b]) for a, b in swapped if b in outcomes]
            assert any(a != b for a, b in pairs_of), (name, one, other)


MORE = [
    dict(num_beams=4, forced_eos_id=EOS, forced_bos_id=0, length_penalty=2.0, early_stopping=True, no_repeat_ngram=3),
    dict(num_beams=8, length_penalty=0.8, forced_eos_id=EOS, num_return=8),
    dict(num_beams=3, num_return=3, early_stopping="never", length_penalty=0.6),
    dict(num_beams=4, max_new_tokens=1, num_return=2),
    dict(num_beams=4, max_new_tokens=1, forced_eos_id=EOS),
    dict(num_beams=4, max_new_tokens=1, forced_eos_id=EOS, num_return=4, length_penalty=-1.0),  # only one exists
    dict(num_beams=2, min_new_tokens=12, num_return=2),
    dict(num_beams=4, no_repeat_ngram=1, early_stopping=True),
    dict(num_beams=4, no_repeat_ngram=20),
    dict(num_beams=4, eos_id=(EOS, 7, 11), num_return=4, min_new_tokens=2),
    dict(num_beams=4, eos_id=tuple(range(2, 20)), num_return=4, length_penalty=3.0),
    dict(num_beams=4, eos_id=None, num_return=2),
    dict(forced_eos_id=EOS, forced_bos_id=0),
    dict(eos_id=(EOS, 7, 11), no_repeat_ngram=3),
    dict(eos_id=None, pad_id=None),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", MORE, ids=str)
def test_forced_tokens_ends_and_limits(transformers, pairs, kind, choice):
    options = Decoding(**(dict(max_new_tokens=12, eos_id=EOS, pad_id=1) | choice))
    # transformers forces a first token on prompts of one token only.
    tokens, mask = prompts(kind, T=1 if kind == "gpt2" and options.forced_bos_id is not None else 9)
    assert_same(transformers, pairs, kind, options, tokens, mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.8)])
def test_draws_are_those_of_transformers(transformers, pairs, kind, temperature, top_k, top_p):
    tokens, mask = prompts(kind)
    options = Decoding(
        max_new_tokens=12, eos_id=EOS, pad_id=1, temperature=temperature, top_k=top_k, top_p=top_p, no_repeat_ngram=3
    )
    torch.manual_seed(8)  # both draw from torch's global generator, a row of V a step
    got = assert_same(transformers, pairs, kind, options, tokens, mask, check_every=1)
    assert not torch.equal(got.tokens, generate(pairs[kind][1], tokens, options, mask).tokens)


def test_a_long_prompt_and_a_long_output(transformers, pairs):
    """Past the positions that are reordered at once, up to the model's last position."""
    tokens, _ = prompts("gpt2", T=25)
    options = Decoding(max_new_tokens=16, num_beams=4, eos_id=None, num_return=4)
    got = assert_same(transformers, pairs, "gpt2", options, tokens, None)
    assert got.lengths.eq(16).all() and not got.ended.any()
    with pytest.raises(ValueError, match="cache of 16 x 41"):
        generate(pairs["gpt2"][1], tokens, dataclasses.replace(options, max_new_tokens=17))


def test_reordering_in_parts(transformers, pairs, monkeypatch):
    import model.generate

    monkeypatch.setattr(model.generate, "REORDERED", 4)
    for kind in KINDS:
        tokens, mask = prompts(kind)
        options = Decoding(max_new_tokens=12, num_beams=4, num_return=4, eos_id=EOS, pad_id=1, length_penalty=2.0)
        assert_same(transformers, pairs, kind, options, tokens, mask)


def test_qwen3_is_decoded_by_the_same_code(transformers, tmp_path):
    qwen3 = pytest.importorskip("model.decoder_hub")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    theirs.generation_config = transformers.GenerationConfig()
    models = {"gpt2": (theirs, qwen3.load_decoder(tmp_path))}  # decoded like a GPT-2
    tokens, _ = prompts("gpt2")
    for choice in (dict(num_beams=4, num_return=4, length_penalty=0.5), dict(), dict(num_beams=2, no_repeat_ngram=2)):
        options = Decoding(max_new_tokens=12, eos_id=EOS, pad_id=1, **choice)
        assert_same(transformers, models, "gpt2", options, tokens, None)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 4])
def test_rows_depend_neither_on_each_other_nor_on_when_the_host_looks(pairs, kind, beams):
    model, (tokens, mask) = pairs[kind][1], prompts(kind)
    options = Decoding(max_new_tokens=20, num_beams=beams, num_return=beams, eos_id=EOS, pad_id=1, early_stopping=True)
    together = generate(model, tokens, options, mask, check_every=100)
    assert together.steps == 20
    often = generate(model, tokens, options, mask, check_every=1)
    assert torch.equal(often.tokens, together.tokens) and torch.equal(often.scores, together.scores)
    for i in range(len(tokens)):
        alone = generate(model, tokens[i : i + 1], options, None if mask is None else mask[i : i + 1], check_every=1)
        assert torch.equal(alone.tokens[0], together.tokens[i])


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
def test_padding_of_the_source_changes_nothing(pairs, kind):
    model, (tokens, mask) = pairs[kind][1], prompts(kind)
    options = Decoding(max_new_tokens=12, num_beams=4, eos_id=EOS, pad_id=1)
    padded = generate(model, tokens, options, mask)
    for i in range(len(tokens)):
        alone = generate(model, tokens[i : i + 1, : mask[i].sum()], options)
        assert torch.equal(alone.tokens[0], padded.tokens[i])


def test_the_search_stops_when_all_is_done(pairs):
    model, (tokens, mask) = pairs["bart"][1], prompts("bart")
    options = Decoding(max_new_tokens=30, eos_id=tuple(range(V - 1)), pad_id=1)
    got = generate(model, tokens, options, mask, check_every=4)
    assert got.steps == 4 and got.lengths.max() <= 4
    assert got.new_tokens == got.lengths.sum() and got.seconds > 0
    assert got.tokens_per_second == got.new_tokens / got.seconds


def test_a_beam_score_is_the_models_log_probability(pairs):
    model, (tokens, mask) = pairs["bart"][1], prompts("bart")
    for beams in (1, 3):
        options = Decoding(max_new_tokens=12, num_beams=beams, eos_id=EOS, pad_id=1, length_penalty=0.7)
        got = generate(model, tokens, options, mask)
        labels = got.tokens[:, 0]
        with torch.no_grad():
            hidden = model(tokens, mask, model.shift_right(labels))
            log_p = (hidden @ model.head_weight.T + model.head_bias).log_softmax(-1)
        counted = torch.arange(12) < got.lengths
        total = (log_p.gather(2, labels[:, :, None])[:, :, 0] * counted).sum(1)
        assert (total / got.lengths[:, 0] ** 0.7 - got.scores[:, 0]).abs().max() < 1e-4


def test_greedy_and_draws_agree_with_the_sampler_without_a_cache(pairs):
    model, (tokens, _) = pairs["gpt2"][1], prompts("gpt2")
    got = generate(model, tokens, Decoding(max_new_tokens=20))
    assert torch.equal(got.tokens[:, 0], sample(model, tokens, 20, temperature=0)[:, 9:])
    options = Decoding(max_new_tokens=20, temperature=0.8, top_k=9, top_p=0.9)
    got = generate(model, tokens, options, generator=torch.Generator().manual_seed(3))
    expected = sample(model, tokens, 20, 0.8, 9, 0.9, torch.Generator().manual_seed(3))
    assert torch.equal(got.tokens[:, 0], expected[:, 9:])


def test_dropout_is_off_and_the_mode_comes_back():
    torch.manual_seed(0)
    config = bart_config(1, 16, 2, vocab_size=V, max_position_embeddings=16, init_std=0.5, dropout=0.5)
    model = Seq2Seq(config).train()
    tokens, mask = prompts("bart")
    a, b = (generate(model, tokens, Decoding(max_new_tokens=8, num_beams=2), mask) for _ in range(2))
    assert torch.equal(a.tokens, b.tokens) and model.training
    model.eval()
    generate(model, tokens, Decoding(max_new_tokens=2), mask)
    assert not model.training


def test_repeated_ngrams_against_a_dictionary():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, (16, 12), generator=g)
    for n, length in itertools.product((1, 2, 3, 12), range(1, 13)):
        got = repeats(tokens, torch.tensor([length]), n, 5)
        for row, banned in zip(tokens.tolist(), got, strict=True):
            seen = row[:length]
            after = [seen[i + n - 1] for i in range(length - n + 1) if seen[i : i + n - 1] == seen[length - n + 1 :]]
            assert set(after) == set(banned.nonzero()[:, 0].tolist()), (n, length)


# ---------------------------------------------------------------- the step, as torch.compile and a GPU see it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", [dict(), dict(temperature=0.8, top_k=5, top_p=0.9), dict(num_beams=3)], ids=str)
def test_a_step_compiles_to_one_graph_once(pairs, kind, choice):
    model, (tokens, mask) = pairs[kind][1], prompts(kind)
    options = Decoding(
        max_new_tokens=12, min_new_tokens=3, no_repeat_ngram=2, forced_eos_id=EOS, eos_id=EOS, pad_id=1, **choice
    )
    torch.manual_seed(0)
    plain = generate(model, tokens, options, mask)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for _ in range(2):  # a second batch of the same shapes compiles nothing either
        torch.manual_seed(0)
        compiled = generate(model, tokens, options, mask, compile=dict(backend=backend))
        assert len(graphs) == 1
        assert torch.equal(plain.tokens, compiled.tokens) and torch.equal(plain.scores, compiled.scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 4])
def test_the_host_waits_only_at_its_checks(pairs, kind, beams):
    """Counts the reads of a device value by the host: the check of the ids before, one every check_every
    steps, and the count at the end."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
                torch.ops.aten.equal.default,
            )
            return function(*args, **kwargs or {})

    model, (tokens, mask) = pairs[kind][1], prompts(kind)
    counts = []
    for steps in (8, 16):
        with Reads() as reads:
            generate(model, tokens, Decoding(max_new_tokens=steps, num_beams=beams), mask, check_every=8)
        counts.append(reads.count)
    assert counts[1] - counts[0] <= 2  # one more check, of two values


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "choice, says",
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=4, min_new_tokens=5), "max_new_tokens=4 is below min_new_tokens=5"),
        (dict(min_new_tokens=-1), "min_new_tokens=-1"),
        (dict(num_beams=0), "num_beams=0"),
        (dict(num_beams=1.5), "num_beams=1.5"),
        (dict(num_beams=2, num_return=3), "num_return=3: expected at most num_beams=2"),
        (dict(no_repeat_ngram=-1), "no_repeat_ngram=-1"),
        (dict(length_penalty=float("nan")), "length_penalty=nan"),
        (dict(early_stopping="always"), "early_stopping='always'"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=1.0, num_beams=2), "sampling has no beams"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(eos_id=-2), "eos_id=-2"),
        (dict(pad_id=1.0), "pad_id=1.0"),
    ],
)
def test_options_that_cannot_be(choice, says):
    with pytest.raises(ValueError, match=says) as error:
        Decoding(**(dict(max_new_tokens=8) | choice))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, change, says",
    [
        ("bart", dict(prompt=torch.zeros(2, 0, dtype=torch.long)), "at least one token"),
        ("bart", dict(prompt=torch.tensor([[V]])), f"expected 0 to {V - 1}"),
        ("bart", dict(mask=torch.ones(4, 8)), "mask of shape .4, 8."),
        ("bart", dict(mask=torch.zeros(4, 9)), "a token in every row"),
        ("gpt2", dict(mask=torch.ones(4, 9)), "decoder-only"),
        ("gpt2", dict(options=Decoding(8, eos_id=V)), f"eos_id={V}"),
        ("gpt2", dict(options=Decoding(8, forced_bos_id=99)), "forced_bos_id=99"),
        ("gpt2", dict(options=Decoding(8, eos_id=tuple(range(V)))), "whole vocabulary"),
        ("gpt2", dict(options=Decoding(33)), "cache of 4 x 41"),
        ("bart", dict(options=Decoding(41)), "cache for 41 tokens"),
        ("bart", dict(check_every=0), "check_every=0"),
    ],
)
def test_arguments_that_do_not_fit(pairs, kind, change, says):
    with pytest.raises(ValueError, match=says) as error:
        generate(pairs[kind][1], **(dict(prompt=prompts(kind)[0], options=Decoding(8)) | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_diverged_model_says_so(beams):
    model = GPT2(GPT2Config(vocab_size=V, block_size=40, n_layer=1, n_head=2, n_embd=16)).train()
    with torch.no_grad():
        model.ln_f.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite") as error:
        generate(model, torch.zeros(1, 1, dtype=torch.long), Decoding(4, num_beams=beams))
    assert "\n" not in str(error.value) and model.training


def test_a_cache_and_its_positions_belong_together(pairs):
    model = pairs["gpt2"][1]
    with pytest.raises(ValueError, match="both or neither"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=model.new_cache(1, 4))
    with pytest.raises(ValueError, match="block_size=40"):
        model.new_cache(1, 41)
