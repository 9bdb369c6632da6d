"""Our losses in Hugging Face's models and trainers, without the N x V logits.

    from kernels.hf import ScoreSFTTrainer, ScoreTrainer, patch

    patch(model, "brier")  # a causal LM or an encoder-decoder, also inside PEFT: model(..., labels=...).loss is ours
    ScoreTrainer(model, args, score=ProperScoreLoss("dpsm"), train_dataset=data)  # a transformers.Trainer
    ScoreSFTTrainer(model, args, score=ProperScoreLoss("dpsm"), train_dataset=data)  # a trl.SFTTrainer

transformers and trl are imported where they are used. Written for transformers 5.23 and trl 1.16.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from .calibration import Calibration
from .hf_patch import Patch, as_loss, base_model, imported, patch, unpatch
from .losses import ProperScoreLoss, knobs_of
from .prior import UnigramSmoothing

__all__ = ["Patch", "patch", "unpatch"]  # and the two trainers, see __getattr__

# What is logged of the tokens trained on since the last log, and of an evaluation: its name here and in Calibration.
FIGURES = {"entropy": "entropy", "accuracy": "accuracy", "ece": "ece10", "brier": "brier", "nll": "nll"}


class _Scores:
    """A ``transformers.Trainer`` whose loss is ``score``: a ``ProperScoreLoss``, or the name or function of one.

    The model is patched (``patch``) and stays so after the training. DPSM's alpha follows its ramp by optimizer step
    over the whole run: it is a function of global_step, so that a resumed run has the same. The loss of a step is the
    mean over its tokens, whatever the accumulation and the number of ranks.

    Logged beside the loss, from the numbers that it is made of: entropy, accuracy, ece (10 bins), brier and nll of the
    tokens in the loss since the last log, on all ranks, and alpha. ``evaluate()`` gives and logs the same of its set,
    eval_ece and so on. No logits are made: predictions are None.

    ``unigram`` in [0, 1): the share of CE against how often each token is a label of ``train_dataset``, which is
    collated once for it (`kernels.prior_gap`), where ``score`` is "ce" or "dpsm". With ``unigram_gain`` above 0 it is
    the most: the share begins at 0 and rises after each evaluation by the gain times (mean confidence - accuracy). It
    is a function of the log, so that a resumed run has the same, and logged as unigram. eval_loss is without it.

    Raises ValueError for what needs logits (compute_metrics, label smoothing), for a second loss (compute_loss_func),
    for DataParallel, for a unigram that does not fit, and for a model that ``patch`` refuses."""

    figures = FIGURES

    def __init__(
        self,
        *args,
        score: ProperScoreLoss | str | Callable = "dpsm",
        unigram: float = 0.0,
        unigram_gain: float = 0.0,
        **kwargs,
    ):
        self.score = as_loss(score, {})
        if self.score.reduction != "mean":
            raise ValueError(f"the trainer divides by the number of tokens; got reduction={self.score.reduction!r}")
        self._asked, self._unigram, self._read = (unigram, unigram_gain), None, 0
        self._alpha = self.score.alpha.clone()  # where it follows no ramp
        super().__init__(*args, **kwargs)
        self._check_arguments()
        if unigram or unigram_gain:
            self._check_unigram(unigram, unigram_gain)
        handle = self._patched()
        self.model_accepts_loss_kwargs = True  # num_items_in_batch
        self._loss_shifts_labels = not handle.seq2seq  # what num_items_in_batch counts
        self._window = Calibration(self.args.device)  # of the tokens trained on since the last log
        self._evaluated: Calibration | None = None  # of those of the evaluation that is running

    def _check_arguments(self) -> None:
        name = type(self).__name__
        for given in ("compute_metrics", "preprocess_logits_for_metrics"):
            if getattr(self, given, None) is not None:
                raise ValueError(
                    f"{given} reads logits, which {name} never makes; evaluate() logs {', '.join(FIGURES)}"
                )
        if self.compute_loss_func is not None:
            raise ValueError(f"compute_loss_func and score are two losses; give {name} a score alone")
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor needs logits; use score=ProperScoreLoss('smoothing', eps=...)")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{name} takes one GPU a process; start it with torchrun, or show it one by CUDA_VISIBLE_DEVICES"
            )

    def _check_unigram(self, unigram: float, gain: float) -> None:
        if not (0 < unigram < 1 and gain >= 0):
            raise ValueError(f"unigram={unigram}, unigram_gain={gain}: expected a share in (0, 1) and a gain from 0 on")
        given = self.score.given
        if given not in ("ce", "dpsm") or self.score.knobs.get("path", "mix") != "mix" or self.score.tail:
            raise ValueError(f"unigram smooths the score 'ce' or 'dpsm' by its mix, without a tail; got {given!r}")
        if self.score.class_weights is not None or self._patched().caps:
            raise ValueError("unigram does not go with class_weights, nor with a softcap of the logits")
        if not hasattr(self.train_dataset, "__len__"):
            raise ValueError("unigram counts the labels of train_dataset, which must have a length")
        if gain and isinstance(self.eval_dataset, dict):
            raise ValueError("unigram_gain follows one evaluation; give one eval_dataset")
        if gain and self.args.eval_strategy == "no":
            raise ValueError("unigram_gain follows the evaluations; set eval_strategy in the arguments")

    def _label_counts(self) -> torch.Tensor:
        """How often each token is a target of ``train_dataset``: int64 [V], on all ranks the same."""
        counts = torch.zeros(len(self._patched().model.get_output_embeddings().weight), dtype=torch.int64)
        counts = counts.to(self.args.device)
        even, self.accelerator.even_batches = self.accelerator.even_batches, False  # each sample once
        try:
            with torch.random.fork_rng(devices=[]):  # what is drawn afterwards is what is drawn without it
                for inputs in self.get_eval_dataloader(self.train_dataset):
                    labels = inputs["labels"][..., 1:] if self._loss_shifts_labels else inputs["labels"]
                    counts += torch.bincount(labels[labels != self.score.ignore_index], minlength=len(counts))
        finally:
            self.accelerator.even_batches = even
        return self.accelerator.reduce(counts, "sum")

    def train(self, *args, **kwargs):
        if self._asked[0]:
            self._unigram, self._read = UnigramSmoothing(*self._asked, self._label_counts, self.args.device), 0
        return super().train(*args, **kwargs)

    def _follow(self) -> float:
        """The share after all evaluations of the log; those that were not read yet move it."""
        for row in self.state.log_history[self._read :]:
            if "eval_confidence" in row:
                self._unigram.follow({name: row[f"eval_{name}"] for name in ("confidence", "accuracy")})
        self._read = len(self.state.log_history)
        return self._unigram.share

    def _patched(self) -> Patch:
        """The patch of the model, which model_init may have made anew."""
        found = vars(base_model(self.model)).get("_score_patches", {}).values()
        return next((h for h in found if h.loss is self.score and not h.removed), None) or patch(self.model, self.score)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if inputs.get("labels") is None:
            raise ValueError(
                "the batch has no labels; take DataCollatorForLanguageModeling(tokenizer, mlm=False) or "
                "DataCollatorForSeq2Seq, or put labels into the data set"
            )
        handle = self._patched()
        if self.state.max_steps > 0 and (self.score.follows or not isinstance(self.score.given, str)):
            self.score.set_step(self.state.global_step, self.state.max_steps)
        if self._unigram is not None:
            handle.unigram, share = self._unigram, self._follow()
            alpha = self.score.alpha if self.score.follows else self._alpha
            self.score.alpha.copy_((1 - share) * alpha)
        how = dict(return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss, outputs = self._plain_trainer.compute_loss(self, model, inputs, **how)
        window = self._window if self._evaluated is None else self._evaluated
        window.update(self._counted(handle.moments, len(inputs["labels"])))
        return (loss, outputs) if return_outputs else loss

    def _counted(self, moments, samples: int):
        """``moments`` on the windows' device (a model split over devices ends on another), without the samples that the
        last batch of an evaluation repeats to be as long on every rank."""
        found = {k: v.to(self.args.device) for k, v in vars(moments).items() if isinstance(v, torch.Tensor)}
        state = self.accelerator.gradient_state
        if self._evaluated is not None and self.args.world_size > 1 and state.end_of_dataloader and state.remainder > 0:
            own = state.remainder - self.args.process_index * samples
            sample = torch.arange(samples, device=self.args.device)[:, None]
            found["valid"] = (found["valid"].view(samples, -1) & (sample < own)).flatten()
        return replace(moments, **found)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Losses alone, as there are no logits."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._evaluated = Calibration(self.args.device)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            output.metrics.update(self._figures_of(self._evaluated, f"{metric_key_prefix}_"))
        finally:
            self._evaluated = None
        return output

    def _figures_of(self, window: Calibration, prefix: str = "") -> dict[str, float]:
        """``figures`` of the tokens in ``window`` on all ranks; none where there is no token."""
        window.all_reduce()
        if not int(window.count.sum()):
            return {}
        numbers = window.compute()
        more = {"confidence": "confidence"} if prefix and self._asked[1] else {}
        return {prefix + name: numbers[key] for name, key in (self.figures | more).items()}

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:  # of training, on every rank
            logs |= self._figures_of(self._window)
            self._window.reset()
            if isinstance(self.score.given, str) and "alpha" in knobs_of(self.score.given):
                logs["alpha"] = self.score.alpha.item()
            if self._unigram is not None:
                logs |= self._unigram.shown
        super().log(logs, *args, **kwargs)


class _SFT(_Scores):
    """A ``trl.SFTTrainer`` whose loss is ``score``, with data, masks and arguments as there. Its own loss and figures,
    which it takes from another forward, are not computed; what is logged is that of ``ScoreTrainer``, num_tokens as trl
    counts them, and the accuracy as mean_token_accuracy too. Raises ValueError as ``ScoreTrainer`` does, and for a
    loss_type or a router loss beside the score."""

    figures = FIGURES | {"mean_token_accuracy": "accuracy"}

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.args.loss_type != "nll":
            raise ValueError(f"loss_type={self.args.loss_type!r} and score are two losses; leave loss_type out")
        if self.aux_loss_enabled:
            raise ValueError("the router's auxiliary loss is not added here; set router_aux_loss_coef=0.0 in SFTConfig")
        self._seen = torch.zeros((), dtype=torch.int64, device=self.args.device)  # tokens of this rank

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["use_cache"] = False
        if self.model.training:
            mask = inputs.get("attention_mask")
            self._seen += inputs["input_ids"].numel() if mask is None else mask.sum()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs, *args, **kwargs):
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["num_tokens"] = [self.accelerator.reduce(self._seen.clone(), "sum").item() // self._tp_size]
        super().log(logs, *args, **kwargs)


_TRAINERS = {"ScoreTrainer": (_Scores, "transformers", "Trainer"), "ScoreSFTTrainer": (_SFT, "trl", "SFTTrainer")}


def __getattr__(name: str):
    """ScoreTrainer and ScoreSFTTrainer, made when they are first asked for."""
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    adds, package, base = _TRAINERS[name]
    bases = adds, getattr(imported(package, name), base)
    fields = dict(__module__=__name__, __doc__=adds.__doc__, _plain_trainer=imported("transformers", name).Trainer)
    globals()[name] = type(name, bases, fields)
    return globals()[name]
