"""Published recipes for summarisation, as flags of finetune_seq2seq.py: training and decoding of BART and PEGASUS.

Lengths count <s> and </s>. Where every figure is from stands beside it; "transformers" means its configurations of
the published models, whose max_length counts the decoder's start token, so that max_new_tokens is one less.
"""

from pathlib import Path

PRESETS = {
    # Training: fairseq, examples/bart/README.summarization.md: 20,000 updates, 500 of them warm-up, polynomial decay
    # to 0, Adam (0.9, 0.999) with 0.01 of decay, clip 0.1, dropouts 0.1, label smoothing 0.1; 8 GPUs x 2,048 tokens x
    # update-freq 4 = 65,536 a step, some 80 pairs of CNN/DailyMail. Decoding: fairseq, examples/bart/summarize.py,
    # CNN_KWARGS: beam 4, lenpen 2.0, max_len_b 140 before </s>, min_len 55, no trigram twice, and its search ends at
    # four finished hypotheses (SequenceGenerator.is_finished); transformers' summarization_cnn parameters are the same
    # (max_length 142, min_length 56). The limit of a target, 128, is ours.
    "bart": dict(
        steps=20000, batch=80, lr=3e-5, schedule="polynomial", lr_warmup=0.025, weight_decay=0.01, beta2=0.999,
        clip=0.1, dropout=0.1, attention_dropout=0.1, label_smoothing=0.1, max_source=1024, max_target=128,
        beams=4, length_penalty=2.0, min_new_tokens=55, max_new_tokens=141, no_repeat_ngram=3, early_stopping=True,
    ),
    # After the paper's appendix C, each figure as a second source has it: google-research/pegasus, public_params.py
    # (1,024 and 128 tokens, 210,000 steps, smoothing and dropout 0.1; its rates and batches are others, for small
    # machines), issue 5 (beam 8, alpha 0.8), issue 139 (batch 256), estimator_utils.py (warm-up over 10,000 steps, then
    # the inverse square root); transformers' table for converted checkpoints (num_beams 8, length_penalty 0.8,
    # max_length 128). The peak of 5e-5 has been found in no such source. The optimizer there was Adafactor; here every
    # preset has AdamW, this one without weight decay. Google's length penalty is ((5 + n) / 6)^alpha; here, as in
    # transformers, n^alpha.
    "pegasus": dict(
        steps=210000, batch=256, lr=5e-5, schedule="inverse-sqrt", lr_warmup=1 / 21, weight_decay=0.0, beta2=0.999,
        clip=0.0, dropout=0.1, attention_dropout=0.1, label_smoothing=0.1, max_source=1024, max_target=128,
        beams=8, length_penalty=0.8, min_new_tokens=0, max_new_tokens=127, no_repeat_ngram=0, early_stopping=False,
    ),
    # Plain values, for small models from a random start.
    "none": dict(
        steps=1000, batch=32, lr=1e-3, schedule="linear", lr_warmup=0.05, weight_decay=0.01, beta2=0.98,
        clip=1.0, dropout=0.0, attention_dropout=0.0, label_smoothing=0.0, max_source=1024, max_target=128,
        beams=4, length_penalty=1.0, min_new_tokens=0, max_new_tokens=127, no_repeat_ngram=3, early_stopping=True,
    ),
}  # fmt: skip
# Where the published recipe for XSum is another one.
XSUM = {
    # The same README: 15,000 updates, the 500 of warm-up stay, half the tokens a step (update-freq 2: 32,768, some 60
    # pairs of these shorter articles); beam 6, lenpen 1.0, max_len_b 60, min_len 10 (transformers: 62 and 11).
    "bart": dict(steps=15000, batch=60, lr_warmup=1 / 30, beams=6, length_penalty=1.0, min_new_tokens=10,
                 max_new_tokens=61),
    # 1e-4, 512 tokens, batch 256: transformers, examples/seq2seq/finetune_pegasus_xsum.sh, after appendix C; 0.6 and 64
    # tokens: its table for converted checkpoints. The 130,000 steps have been found in no second source.
    "pegasus": dict(steps=130000, lr=1e-4, lr_warmup=1 / 13, max_source=512, max_target=64, length_penalty=0.6,
                    max_new_tokens=63),
    "none": {},
}  # fmt: skip


def preset_values(preset: str, data: str, loss: str = "ce") -> dict:
    """The flags of ``preset`` for ``data`` (a set's name or folder). Label smoothing is the CE baseline's: 0 for any
    other loss. Raises ValueError for an unknown preset."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}")
    values = PRESETS[preset] | (XSUM[preset] if Path(data).name == "xsum" else {})
    return values if loss == "ce" else values | {"label_smoothing": 0.0}


def check_fit(settings, config, what: str) -> None:
    """Raises ValueError where the preset or a limit of ``settings`` (anything with the script's flags as attributes)
    cannot be used with a model of ``config`` (model.seq2seq.Seq2SeqConfig), which is called ``what``."""
    if settings.preset not in (config.kind, "none"):
        raise ValueError(
            f"{what} is a {config.kind}: --preset {settings.preset} is not its recipe; use {config.kind} or none"
        )
    for name in ("max_source", "max_target", "max_new_tokens"):
        if getattr(settings, name) > config.max_position_embeddings:
            flag = f"--{name.replace('_', '-')} {getattr(settings, name)}"
            raise ValueError(f"{flag} is more than the {config.max_position_embeddings} positions of {what}; lower it")
