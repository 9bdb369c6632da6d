"""Random models of transformers with a few thousand parameters, and ragged batches for them."""

import torch

V = 97
DECODER = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
DECODER |= dict(num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SEQ2SEQ = dict(vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, dropout=0.0)
SEQ2SEQ |= dict(decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32)
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | dict(head_dim=8, tie_word_embeddings=True)),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0)
        | dict(attn_pdrop=0.0, bos_token_id=1, eos_token_id=2),
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", DECODER | dict(num_key_value_heads=2)),  # its head has a bias
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", SEQ2SEQ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
        | dict(decoder_start_token_id=0),
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | dict(num_local_experts=4, output_router_logits=True)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", DECODER | dict(head_dim=8, final_logit_softcapping=2.0)),
    "cohere": ("CohereForCausalLM", "CohereConfig", DECODER | dict(logit_scale=0.25)),
    "granite": ("GraniteForCausalLM", "GraniteConfig", DECODER | dict(logits_scaling=4.0)),
}


def tiny(name, seed=0, **config):
    """A model in training mode, without dropout, whose logits spread by a few nats."""
    import transformers

    model, config_class, given = MODELS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, model)(getattr(transformers, config_class)(**given | config))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
        for linear in [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None]:
            linear.bias.normal_()
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model.train()


def samples(n, length=12, seed=1):
    """``n`` samples of ``length`` tokens: a prompt without loss, targets, padding; all three differ in length."""
    g, out = torch.Generator().manual_seed(seed), []
    for i in range(n):
        ids, end = torch.randint(3, V, (length,), generator=g), length - i % 4
        labels, mask = ids.clone(), torch.ones(length, dtype=torch.long)
        labels[: i % 5], labels[end:], mask[end:], ids[end:] = -100, -100, 0, 0
        out.append(dict(input_ids=ids, labels=labels, attention_mask=mask))
    return out


def batch(n=3, **more):
    rows = samples(n, **more)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
