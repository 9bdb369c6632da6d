"""``patch``: a model of transformers returns our loss from its hidden states, without the N x V logits.

The model runs its own forward. Where that calls the output embedding, the hidden states are kept for ``linear_score``,
and a probe of two rows goes on in their place. A decoder then calls its ``loss_function`` with the labels, and ours
stands there; an encoder-decoder is run without its labels and gets the loss afterwards. The probe comes out as the
model's logits. At the first call they are compared with the logits that ``linear_score`` takes the loss of: where a
model does more to its logits than is known here, that is an error and never another loss.
"""

import importlib
import inspect
import itertools
from collections.abc import Callable
from types import MethodType, ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .head import linear_score
from .losses import ProperScoreLoss

# What a config may say of the logits after the output embedding: a factor, a divisor, and a cap c in c * tanh(z / c).
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
CAP = "final_logit_softcapping"
PROBE = 50.0  # the largest logit of the probe: far enough to see a cap
WAY = "with trl use ScoreSFTTrainer, with Liger set use_liger_kernel=False, or remove() the patch"
_keys = itertools.count()


def imported(package: str, what: str) -> ModuleType:
    """The module ``package``. Raises ImportError that says what needs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: pip install {package} ({error})") from error


def patch(model: nn.Module, loss: ProperScoreLoss | str | Callable = "dpsm", **knobs) -> "Patch":
    """Makes ``model`` return our loss where it is given labels. Gives the handle that undoes it.

    ``model``: a causal LM or an encoder-decoder of transformers, also inside PEFT or DDP. ``loss``: a
    ``ProperScoreLoss``, or its ``score`` and ``knobs``. A patch of the same model by an earlier call is removed.

    With labels ``model(**batch)`` returns its usual output with ``loss`` ours and ``logits`` None, as they are never
    made. The labels are shifted as the model itself does, or given as ``shift_labels``; those equal to the loss's
    ``ignore_index`` are ignored. ``num_items_in_batch`` is the denominator of a mean; with reduction "none" the loss is
    shaped as the labels, that of the token after t at t. Router losses of mixtures of experts are added as ever.
    Without labels the model behaves as before. torch.compile leaves a patched model uncompiled; compile its backbone,
    as in ``model.model.compile()``.

    Raises ValueError for a model whose loss cannot be had from its hidden states: without an output embedding, with
    one that is adapted or quantized, with another loss than next-token prediction, and (at the first call) with an
    operation on its logits that is not known here. A call with labels is a ValueError too where another library has
    since put a forward there that takes a loss of its own, as trl's trainers and Liger do."""
    base = base_model(model)
    loss = as_loss(loss, knobs)
    unpatch(base)
    return Patch(base, loss)


def unpatch(model: nn.Module) -> None:
    """Undoes ``patch``; nothing where there is none."""
    for handle in list(vars(base_model(model)).get("_score_patches", {}).values()):
        handle.remove()


def as_loss(loss, knobs) -> ProperScoreLoss:
    if isinstance(loss, ProperScoreLoss):
        if knobs:
            raise ValueError(f"{', '.join(knobs)}: give them to the ProperScoreLoss, which is built already")
        return loss
    if isinstance(loss, nn.Module) or not (isinstance(loss, str) or callable(loss)):
        raise ValueError(f"expected a ProperScoreLoss, a name or a function of the Moments, got {type(loss).__name__}")
    return ProperScoreLoss(loss, **knobs)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside the wrappers of DDP, torch.compile and PEFT."""
    pretrained, inner = imported("transformers", "patch").PreTrainedModel, model
    while not isinstance(inner, pretrained):
        # Of the wrapper's own: PEFT's also answer for what is inside them.
        own = (inner._modules.get(name) for name in ("module", "_orig_mod", "base_model", "model"))
        inner = next((x for x in own if x is not None), None) if isinstance(inner, nn.Module) else None
        if inner is None:
            raise ValueError(f"expected a model of transformers, got {type(model).__name__}; use linear_score with it")
    return inner


class Patch:
    """What ``patch`` returns. ``loss``: the ProperScoreLoss. ``unigram``: None, or a `kernels.UnigramSmoothing`, whose
    part is added to the loss where gradients are made. ``remove()`` undoes the patch."""

    def __init__(self, model: nn.Module, loss: ProperScoreLoss):
        self.model, self.loss, self.name = model, loss, type(model).__name__
        self.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        self.inner = vars(model).get("forward")  # where another library has replaced it; else None: the class's
        signature = inspect.signature(type(model).forward)
        self.names = tuple(signature.parameters)[1:]
        self.calls, self.verified, self.removed, self.unigram = 0, None, False, None
        self._check_model()
        self.scale, self.softcap = self._logits_config()
        if self.softcap and loss.softcap:
            raise ValueError(f"{self.name} caps its logits at {self.softcap} itself; leave softcap out of the loss")
        self._linear(model.get_output_embeddings())

        key = next(_keys)  # the model's own dict leads to the handle, so that a deep copy has its own

        def forward(self, *args, **kwargs):
            return self._score_patches[key](self, args, kwargs)

        forward = torch.compiler.disable(forward)  # its hooks are new at each call
        forward.__signature__ = signature  # generate and the Trainer read it
        self.key, self.function = key, forward
        vars(model).setdefault("_score_patches", {})[key] = self
        model.forward = MethodType(forward, model)

        def check(self, args, kwargs, _):
            self._score_patches[key]._check_call(args, kwargs)

        self.checked, self.hook = 0, model.register_forward_hook(torch.compiler.disable(check), with_kwargs=True)

    @property
    def moments(self):
        """The detached Moments of the last call's tokens, flattened; None before it."""
        return self.loss.moments

    def remove(self) -> None:
        """The model's own forward again. Where another library has wrapped ours since, ours only hands through."""
        self.removed = True
        self.hook.remove()
        if getattr(vars(self.model).get("forward"), "__func__", None) is self.function:
            del self.model._score_patches[self.key]
            if self.inner is None:
                del self.model.forward
            else:
                self.model.forward = self.inner

    def _check_call(self, args, kwargs) -> None:
        """After each call of the model, whatever stands in the place of its forward by then."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if given.get("labels") is not None and self.calls == self.checked:
            raise ValueError(f"{self.name}'s forward was replaced after the patch, and its loss is not ours; {WAY}")
        self.checked = self.calls

    def __call__(self, model, args, kwargs):
        """The forward of the patched model."""
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        inner = self.inner or type(model).forward.__get__(model)
        if self.removed or kwargs.get("labels") is None:
            return inner(**kwargs)
        given = kwargs.pop("return_dict", None)
        items, labels = kwargs.pop("num_items_in_batch", None), kwargs["labels"]
        if self.seq2seq:
            kwargs |= dict(labels=None, use_cache=False)
            if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
                kwargs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        head = model.get_output_embeddings()
        linear, whole = self._linear(head), self.verified is not head
        outputs, hidden = self._run(lambda: inner(**kwargs, return_dict=True), head, linear, whole, items)
        if whole:
            self._verify(outputs.logits, self._probe(hidden, linear, whole), linear)
            self.verified = head
        loss = self._score(hidden, linear, labels, items) if self.seq2seq else outputs.loss
        self.calls += 1
        outputs = type(outputs)(loss=loss, **{k: v for k, v in outputs.items() if k not in ("loss", "logits")})
        return outputs if (model.config.return_dict if given is None else given) else outputs.to_tuple()

    def _run(self, forward: Callable, head: nn.Module, linear: nn.Linear, whole: bool, items):
        """(outputs of ``forward``, the hidden states that came to the head): the probe goes through the head, and a
        decoder's loss is ours."""
        seen, losses = [], []

        def at_head(module, inputs):
            seen.append(inputs[0])
            return (self._probe(inputs[0], linear, whole), *inputs[1:])

        def at_loss(logits=None, labels=None, *_, shift_labels=None, **__):
            losses.append(None)
            if shift_labels is None:
                shift_labels = F.pad(labels[..., 1:], (0, 1), value=self.loss.ignore_index)
            losses[-1] = self._score(self._hidden(seen), linear, shift_labels, items)
            return losses[-1]

        model, theirs, itself = self.model, vars(self.model).get("_loss_function"), None
        hook, model.loss_function = head.register_forward_pre_hook(at_head), at_loss
        try:
            outputs = forward()
        except Exception as error:  # of a loss of its own, with the probe's logits and all labels
            if self.seq2seq or losses or not seen:
                raise
            itself = error
        finally:
            hook.remove()
            del model._loss_function
            if theirs is not None:
                model.loss_function = theirs
        hidden = self._hidden(seen)
        if not self.seq2seq and not losses:
            what = f"{self.name} computes its loss by itself, not by its loss_function"
            raise ValueError(f"{what}: it cannot be patched; use linear_score with its hidden states") from itself
        return outputs, hidden

    def _check_model(self) -> None:
        model = self.model
        if model.get_output_embeddings() is None or "labels" not in self.names:
            raise ValueError(
                f"{self.name} has no output embedding to take a loss of; load it as AutoModelForCausalLM or "
                "AutoModelForSeq2SeqLM"
            )
        if self.seq2seq:
            if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
                raise ValueError(f"{self.name} does not make decoder inputs from labels; use linear_score with it")
            return
        causal = importlib.import_module("transformers.loss.loss_utils").ForCausalLMLoss
        if model.loss_function is not causal:
            name = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
            raise ValueError(f"{self.name}'s loss is {name}; patch stands in the place of ForCausalLMLoss alone")

    def _logits_config(self) -> tuple[float, float | None]:
        """(scale, softcap): the model's distribution is softmax(softcap * tanh(scale * z / softcap))."""
        config, scale = self.model.config.get_text_config(decoder=True), 1.0
        for name in (*FACTORS, *DIVISORS):
            value = getattr(config, name, None)
            if value is None:
                continue
            if isinstance(value, str) or not value:
                raise ValueError(f"{self.name}'s config has {name}={value!r}, expected a factor for the logits")
            scale = scale / value if name in DIVISORS else scale * value
        return scale, getattr(config, CAP, None) or None

    def _softcap(self) -> float | None:
        """The cap of the distribution, where the loss scales what the model has capped: c tanh(z / c) times a is
        (a c) tanh(a z / (a c))."""
        return self.softcap * self.loss.scale if self.softcap else self.loss.softcap

    @property
    def caps(self) -> bool:
        """Whether the model or the loss caps the logits."""
        return bool(self.softcap or self.loss.softcap)

    def _linear(self, head: nn.Module) -> nn.Linear:
        """The linear layer that ``head`` applies."""
        if hasattr(head, "modules_to_save"):  # PEFT trains a copy of the head
            active = [] if head.disable_adapters else head.active_adapters
            head = head.modules_to_save[active[0]] if active else head.original_module
        what = f"{self.name}'s output embedding is a {type(head).__module__.split('.')[0]} {type(head).__name__}"
        if hasattr(head, "base_layer") or hasattr(head, "original_module"):
            way = "leave it out of the adapter (target_modules), or train it whole by modules_to_save"
            raise ValueError(f"{what}, whose adapter the loss would not see: {way}")
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            raise ValueError(f"{what}, expected a torch Linear with a float weight; do not quantize or replace it")
        if head.weight.dim() != 2 or head.weight.is_meta:
            raise ValueError(f"{what} whose weight is not here (sharded or offloaded); keep it whole on its device")
        return head

    def _bias(self, linear: nn.Linear) -> Tensor | None:
        """[V]: the layer's bias plus final_logits_bias, as BART and PEGASUS have it."""
        final = getattr(self.model, "final_logits_bias", None)
        if final is None:
            return linear.bias
        final = final.reshape(-1).to(linear.weight.device)
        return final if linear.bias is None else linear.bias + final

    def _hidden(self, seen) -> Tensor:
        if len(seen) != 1:
            hint = "its loss cannot be taken from one set of hidden states" if seen else WAY
            raise ValueError(
                f"{self.name} called its output embedding {len(seen)} times in a forward, not once; {hint}"
            )
        return seen[0]

    @torch.no_grad()
    def _probe(self, hidden: Tensor, linear: nn.Linear, whole: bool) -> Tensor:
        """[1, 1, D] zeros, whose logits are the bias; ``whole``: [1, 2, D], and a row with logits up to PROBE. On the
        head's device, as a model split over devices may end on another."""
        zeros = torch.zeros(1, 1, hidden.shape[-1], dtype=hidden.dtype, device=linear.weight.device)
        if not whole:
            return zeros
        row = torch.linspace(-1, 1, hidden.shape[-1], dtype=linear.weight.dtype, device=zeros.device)
        top = F.linear(row, linear.weight).float().abs().amax()
        return torch.cat([zeros, (row * (PROBE / top.clamp_min(1e-3))).to(hidden.dtype).view(1, 1, -1)], 1)

    @torch.no_grad()
    def _verify(self, logits: Tensor, probe: Tensor, linear: nn.Linear) -> None:
        """Compares the model's logits of the probe with ours."""
        ours, bias = F.linear(probe, linear.weight.to(probe.dtype)), self._bias(linear)
        close = 1e-3 if ours.dtype in (torch.float32, torch.float64) else 3e-2  # two roundings to bf16 are 2^-8 each
        ours = ours.float() if bias is None else ours.float() + bias.float()
        ours = self.scale * ours
        if self.softcap:
            ours = self.softcap * torch.tanh(ours / self.softcap)
        close *= max(1.0, ours.abs().max().item())
        if logits.shape != ours.shape or not torch.allclose(logits.float(), ours, rtol=0, atol=close):
            known = ", ".join((*FACTORS, *DIVISORS, CAP))
            raise ValueError(
                f"{self.name} does something to its logits that is not known here, so that its loss would be another "
                f"(known: a bias, {known}); use logits_score with its logits"
            )

    def _score(self, hidden: Tensor, linear: nn.Linear, targets: Tensor, items) -> Tensor:
        """The loss at ``targets`` [B, T] from ``hidden`` [B, T, D], and ``loss.moments``."""
        loss, weight = self.loss, linear.weight
        if hidden.shape[:-1] != targets.shape:
            shapes = f"labels {tuple(targets.shape)} and hidden states {tuple(hidden.shape)}"
            raise ValueError(
                f"{self.name}: {shapes} do not go together; leave logits_to_keep out where there are labels"
            )
        hidden, targets = hidden.to(weight.device), targets.to(weight.device)
        if hidden.requires_grad and torch.is_grad_enabled():
            loss.check_step()
        if items is not None:
            items = torch.as_tensor(items, device=weight.device).float().reshape(())
            items = torch.where(items == 0, 1.0, items)
        how = dict(ignore_index=loss.ignore_index, reduction=loss.reduction, tail=loss.tail, impl=loss.impl)
        how |= dict(scale=self.scale * loss.scale, softcap=self._softcap(), class_weights=loss.class_weights)
        rows = hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1)
        both = dict(bias=self._bias(linear), denominator=items)
        value, loss.moments = linear_score(*rows, loss.score(weight.device), **how, **both)
        if self.unigram is not None and torch.is_grad_enabled():
            part = self.unigram.term(*rows, ignore_index=loss.ignore_index, **both)
            value = value + self.scale * loss.scale * part
        return value.view_as(targets) if loss.reduction == "none" else value
