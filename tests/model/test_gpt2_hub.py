"""GPT-2 in Hugging Face's layout: what transformers reads and writes, bad files, the export of a checkpoint."""

import json
import math
import os
from functools import partial

import pytest
import torch
from gpt2_models import build, logits_of, mean_nll, tokens_for
from refusals import refused
from torch import nn

import model.gpt2_hub as hub
from model.gpt2_hub import load_hf, save_hf

# fp32 logits of two implementations of one small network differ by the order of their sums: 4e-7 is
# what we see at logits of order 1; 1e-4 is the promise we make to users.
LOGITS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def hf_model(transformers, **options):
    """A random GPT-2 as transformers builds it, every parameter moved off its initial value."""
    fields = dict(vocab_size=97, n_positions=32, n_layer=2, n_head=4, n_embd=32, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(7)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(fields | options))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@torch.no_grad()
def largest_difference(ours, theirs, tokens):
    return (logits_of(ours, tokens) - theirs(tokens).logits).abs().max().item()


def read_tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def write_tensors(folder, tensors):
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture
def saved(tmp_path):
    """A tiny model of ours in Hugging Face's layout."""
    save_hf(build(spread=0.1), tmp_path / "saved")
    return tmp_path / "saved"


def test_transformers_reads_what_we_write(transformers, tmp_path):
    ours = build(spread=0.1)
    save_hf(ours, tmp_path / "out", eos_id=96)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert largest_difference(ours, theirs.eval(), tokens_for()) < LOGITS_TOLERANCE
    assert theirs.config.eos_token_id == 96 and theirs.dtype == torch.float32
    save_hf(ours, tmp_path / "plain")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "plain").eos_token_id is None


@pytest.mark.parametrize("name", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_activations_are_transformers(transformers, tmp_path, name):
    """There and back; logits of another one are far off."""
    theirs = hf_model(transformers, activation_function=name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs")
    assert largest_difference(ours, theirs, tokens_for()) < LOGITS_TOLERANCE
    save_hf(ours, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["activation_function"] == name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    del config["activation_function"]  # which means gelu_new, as in transformers
    (tmp_path / "back" / "config.json").write_text(json.dumps(config))
    is_tanh = largest_difference(load_hf(tmp_path / "back"), theirs, tokens_for()) < LOGITS_TOLERANCE
    assert is_tanh == (name == "gelu_pytorch_tanh")


@pytest.mark.parametrize("layout", ["prefixed", "unprefixed", "sharded"])
def test_we_read_what_transformers_writes(transformers, tmp_path, layout):
    theirs = hf_model(transformers)
    shards = dict(max_shard_size="40KB") if layout == "sharded" else {}
    (theirs.transformer if layout == "unprefixed" else theirs).save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "sharded")
    assert largest_difference(load_hf(tmp_path), theirs, tokens_for()) < LOGITS_TOLERANCE


def test_round_trip_is_exact(saved):
    before, after = build(spread=0.1).state_dict(), load_hf(saved).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].is_contiguous() for name in before)
    model = load_hf(saved, dtype=torch.bfloat16, dropout=0.1)
    assert model.dtype == torch.bfloat16 and model.config.dropout == 0.1
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():  # training what was loaded must not reach into the file
        for p in model.parameters():
            p.zero_()
    assert torch.equal(load_hf(saved).wte.weight, before["wte.weight"])


def test_masks_are_ignored_and_half_precision_becomes_fp32(saved):
    tensors = {name.removeprefix("transformer."): t.bfloat16() for name, t in read_tensors(saved).items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    write_tensors(saved, tensors | masks | {"lm_head.weight": tensors["wte.weight"].clone()})
    model = load_hf(saved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.wte.weight, tensors["wte.weight"].float())


def test_every_wrong_tensor_is_named(saved):
    tensors = read_tensors(saved)
    del tensors["transformer.h.1.ln_2.bias"], tensors["transformer.wpe.weight"]
    tensors |= {"transformer.h.2.ln_1.bias": torch.zeros(32), "extra": torch.zeros(1)}
    tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(128, 32)  # [out, in]: not Conv1D's layout
    write_tensors(saved, tensors)
    with pytest.raises(ValueError) as error:
        load_hf(saved)
    message = str(error.value)
    assert "missing wpe.weight, h.1.ln_2.bias" in message and "\n" not in message
    assert "h.2.ln_1.bias" in message and "extra" in message
    assert "h.0.mlp.c_fc.weight is (128, 32) instead of (32, 128)" in message


def test_an_untied_head_is_refused(saved):
    tensors = read_tensors(saved)
    write_tensors(saved, tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from wte.weight"):
        load_hf(saved)


@pytest.mark.parametrize(
    "field, value",
    [
        ("activation_function", "tanh"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("n_inner", 100),
        ("model_type", "llama"),
        ("n_head", 5),
    ],
)
def test_options_we_do_not_have_are_refused(saved, field, value):
    edit_config(saved, **{field: value})
    with pytest.raises(ValueError, match=field):
        load_hf(saved)


def test_damaged_or_missing_files(saved):
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-100], content[:20], b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged") as error:
            load_hf(saved)
        assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        load_hf(saved)
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={"wte.weight": "model-1.safetensors"})))
    with pytest.raises(ValueError, match="lacks model-1.safetensors"):
        load_hf(saved)
    index.write_text(json.dumps(dict(weight_map={"wte.weight": "../elsewhere.safetensors"})))
    with pytest.raises(ValueError, match="weight_map"):
        load_hf(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json, line 1: not JSON"):
        load_hf(saved)
    (saved / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model_type=None"):
        load_hf(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        load_hf(saved)


def test_a_hub_out_of_reach_names_the_way_out(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known\nMax retries exceeded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for name in ("gpt2", "someone/some-model", str(tmp_path / "absent"), "./absent"):
        with pytest.raises(ValueError, match="pass a local folder") as error:
            load_hf(name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_model_on_the_hub_is_loaded_from_its_local_copy(monkeypatch, saved):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(saved))
    assert torch.equal(load_hf("someone/some-model").wte.weight, build(spread=0.1).wte.weight)


def test_a_failed_save_leaves_nothing_behind(monkeypatch, tmp_path):
    import safetensors.torch

    def full(tensors, path, **_):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    save_hf(build(), tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for name in ("new", "old"):
        with pytest.raises(OSError):
            save_hf(build(seed=1), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


def test_saving_over_a_folder_replaces_the_model_and_keeps_the_rest(saved):
    (saved / "notes.txt").write_text("mine")
    save_hf(build(seed=9), saved, {"vocab.json": b"{}"})
    assert torch.equal(load_hf(saved).wte.weight, build(seed=9).wte.weight)
    assert (saved / "notes.txt").read_text() == "mine" and (saved / "vocab.json").read_bytes() == b"{}"
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("name", ["../tokenizer.json", "a/b.json", "", "..", "config.json", "model.safetensors"])
def test_tokenizer_files_stay_in_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="tokenizer file"):
        save_hf(build(), tmp_path / "out", {name: b"{}"})
    assert not list(tmp_path.iterdir())


def test_save_refuses_bad_arguments(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_hf(build(), tmp_path / "file")
    with pytest.raises(ValueError, match="eos_id=97"):
        save_hf(build(), tmp_path / "out", eos_id=97)
    with pytest.raises(ValueError, match="holds str"):
        save_hf(build(), tmp_path / "out", {"vocab.json": "{}"})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def write_checkpoint(path, **changes):
    model = build(spread=0.1)
    fields = dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32, dropout=0.0)
    torch.save(dict(model=model.state_dict(), model_config=fields, step=3) | changes, path)
    return model


def test_a_checkpoint_is_exported_with_its_tokenizer(transformers, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(96)} | {"<|endoftext|>": 96}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # Without the second file transformers takes a GPT-2 to have GPT-2's own kind of tokenizer.
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(kind).encode()}
    ours = write_checkpoint(tmp_path / "last.pt", tokenizer=dict(files=files, eos_id=96))
    assert hub.main([str(tmp_path / "last.pt"), str(tmp_path / "out")]) == 0
    assert "wrote" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.eos_token_id == 96
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w1 w4", return_tensors="pt").input_ids
    assert ids.tolist() == [[3, 1, 4]]
    assert largest_difference(ours, theirs, ids) < LOGITS_TOLERANCE


@pytest.mark.parametrize(
    "what", ["absent", "garbage", "tensor", "no model", "no field", "field", "key", "shape", "code"]
)
def test_a_bad_checkpoint_is_one_line_and_nothing_written(tmp_path, capsys, what):
    path, state = tmp_path / "last.pt", build().state_dict()
    config = dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32)
    changes = {
        "no field": dict(model_config={"vocab_size": 97}),
        "field": dict(model_config=config | dict(n_head=5)),
        "key": dict(model={k: v for k, v in state.items() if k != "ln_f.bias"}),
        "shape": dict(model=state | {"wte.weight": torch.zeros(98, 32)}),
        "code": dict(model=nn.Linear(1, 1)),
        "state": dict(model={"wte.weight": 3}),
        "tokenizer": dict(tokenizer=[1]),
        "eos": dict(tokenizer=dict(files={}, eos_id=97)),
    }
    if what in changes:
        write_checkpoint(path, **changes[what])
    elif what == "garbage":
        path.write_bytes(b"no checkpoint")
    elif what != "absent":
        torch.save(torch.zeros(1) if what == "tensor" else {"step": 1}, path)
    refused(capsys, "^.*: error: .*", lambda: hub.main([str(path), str(tmp_path / "out")]), tmp_path / "out")


def test_a_runs_folder_is_taken_and_other_files_are_told_in_words(tmp_path, capsys):
    """best.pt of a run, else last.pt; of what is no checkpoint it is said what it is, not what torch.load does."""
    run = tmp_path / "run"
    run.mkdir()
    for name, says in (("last.pt", "last.pt"), ("best.pt", "best.pt")):
        write_checkpoint(run / name)
        assert hub.main([str(run), str(tmp_path / f"of {name}")]) == 0
        assert capsys.readouterr().out.endswith(f"from {run / says}\n")
    (run / "notes.txt").write_text("no checkpoint")
    (run / "empty").mkdir()
    told = {"notes.txt": "torch.save has not written it", "gone.pt": "there is no such file"}
    for name, says in (told | {"empty": "holds neither best.pt nor last.pt"}).items():
        export = partial(hub.main, [str(run / name), str(tmp_path / "out")])
        refused(capsys, f"^(?!.*(mmap|zipfile)).*{says}", export, tmp_path / "out")


class Stranger:
    """Pickled, it creates a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_cannot_run_code(tmp_path):
    write_checkpoint(tmp_path / "last.pt", note=Stranger(str(tmp_path / "created")))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        hub.export(tmp_path / "last.pt", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_command_line(tmp_path, capsys):
    for arguments, says in ((["one"], "required: folder"), (["a", "--b"], "--b"), ([], "required: run, folder")):
        refused(capsys, says, partial(hub.main, arguments), tmp_path)


# ---------------------------------------------------------------- perplexity, against transformers


def perplexity(logits_of_window, tokens, block):
    """Over non-overlapping windows, every token but each window's first."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in tokens[: len(tokens) // block * block].view(-1, block).split(8):
            total += mean_nll(logits_of_window(window), window).item() * window.numel() * (block - 1) / block
            count += window.numel() * (block - 1) / block
    return math.exp(total / count)


def compare_perplexity(transformers, tmp_path, tokens, **options):
    theirs = hf_model(transformers, **options)
    theirs.save_pretrained(tmp_path)
    ours, block = load_hf(tmp_path), theirs.config.n_positions
    a = perplexity(lambda w: logits_of(ours, w), tokens, block)
    b = perplexity(lambda w: theirs(w).logits, tokens, block)
    assert abs(a / b - 1) < 1e-4  # a mean of NLLs that differ by LOGITS_TOLERANCE at most


def test_perplexity_of_random_tokens(transformers, tmp_path):
    compare_perplexity(transformers, tmp_path, tokens_for(batch=1, time=2048)[0])


def test_perplexity_of_wikitext(transformers, tmp_path):
    data = os.environ.get("LM_DATA")
    if not data:
        pytest.skip("needs $LM_DATA with tokenizers/gpt2 and wikitext-2")
    files = {name: os.path.join(data, "tokenizers", "gpt2", name) for name in ("vocab.json", "merges.txt")}
    text = next((p for p in wikitext_files(data) if os.path.exists(p)), None)
    if text is None or not all(map(os.path.exists, files.values())):
        pytest.skip("$LM_DATA lacks tokenizers/gpt2 or a WikiText test file")
    tokenizer = transformers.GPT2TokenizerFast(vocab=files["vocab.json"], merges=files["merges.txt"])
    ids = tokenizer(open(text, encoding="utf-8").read(10_000)).input_ids
    assert len(ids) > 2048 and tokenizer.decode(ids[:50]) in open(text, encoding="utf-8").read(1000)
    compare_perplexity(transformers, tmp_path, torch.tensor(ids[:2048]), vocab_size=50257, n_positions=256)


def wikitext_files(data):
    return [os.path.join(data, name, "test.txt") for name in ("wikitext-2", "wikitext-103")]
