"""What a Hugging Face model needs around its split layers: its loss on split logits, its config's share, its save_pretrained."""

from __future__ import annotations

import copy
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..group import Group
from ..nn.linear import ColumnParallelLinear
from ..nn.sharded import shard_dtensor
from ..ops.cross_entropy import vocab_parallel_cross_entropy


def adapt(model: nn.Module, group: Group, loss_parallel: bool) -> None:
    """Everything that is set on the model itself."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_save
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if loss_parallel and isinstance(head, ColumnParallelLinear) and head.gather_output:
        head.tag = "head_backward"
        stock = getattr(model, "loss_function", None)
        shift = {"ForCausalLMLoss": True, "ForMaskedLMLoss": False}.get(
            getattr(stock, "__name__", None)
        )
        if shift is not None and _calls_loss_function(model):
            model.loss_function = _ParallelLoss(head, stock, shift)
            parameters = list(inspect.signature(model.forward).parameters)
            assert (
                group.mesh is not None
            )  # made now: not in a forward, where torch.compile could not
            _LabelledCall(
                head, parameters.index("labels") if "labels" in parameters else None
            ).attach(model)


def _refuse_save(*args, **kwargs):
    raise RuntimeError(
        "this model is split over ranks, and save_pretrained would save one rank's shards: "
        "save tpk.unsharded_state_dict(model), or pass it to the unsplit model's save_pretrained(state_dict=...)"
    )


def _calls_loss_function(model: nn.Module) -> bool:
    """Whether forward computes its loss by self.loss_function; a head that computes it itself needs whole logits."""
    return "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names


class _ParallelLoss:
    """transformers' ForCausalLMLoss or ForMaskedLMLoss over logits [..., V_r]."""

    def __init__(self, head: ColumnParallelLinear, stock, shift: bool):
        self.head, self.stock, self.shift = head, stock, shift

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch=None,
        ignore_index: int = -100,
        **options,
    ) -> Tensor:
        if self.head.gather_output:  # called outside of model(labels=...), on whole logits
            return self.stock(
                logits,
                labels,
                vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                **options,
            )
        target = options.get("shift_labels") if self.shift else labels
        if target is None:
            target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = vocab_parallel_cross_entropy(
            logits,  # as they are: a rank without any of the vocabulary could not tell its rows from reshape(-1, 0)
            target.reshape(logits.shape[:-1]).to(logits.device),
            group=self.head.group,
            num_classes=self.head.out_features,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is None:
            return loss
        return loss / (
            num_items_in_batch.to(loss.device)
            if torch.is_tensor(num_items_in_batch)
            else num_items_in_batch
        )


class _LabelledCall:
    """Keeps the head's logits split while the model is called with labels, and hands them out as a DTensor."""

    def __init__(self, head: ColumnParallelLinear, position: int | None):
        self.head, self.position = head, position

    def attach(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, always_call=True)

    def before(self, model, args, kwargs) -> None:
        labels = kwargs.get("labels")
        if labels is None and self.position is not None and len(args) > self.position:
            labels = args[self.position]
        self.head.gather_output = labels is None

    def after(self, model, args, output):
        split, self.head.gather_output = not self.head.gather_output, True
        if not split or output is None:
            return output
        if isinstance(output, tuple):  # return_dict=False: (loss, logits, ...)
            return (output[0], self._as_dtensor(output[1]), *output[2:])
        output.logits = self._as_dtensor(output.logits)
        return output

    def _as_dtensor(self, logits: Tensor) -> DTensor:
        return shard_dtensor(logits, self.head.group, -1, self.head.out_features)


class _ShareOfConfig:
    """A config as one attention module sees it: its rank's head counts, everything else read and set through."""

    def __init__(self, config, **share):
        vars(self).update(_config=config, _share=share)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._share[name] if name in self._share else getattr(self._config, name)

    def __setattr__(self, name, value):
        setattr(self._config, name, value)

    def __deepcopy__(self, memo):
        return _ShareOfConfig(copy.deepcopy(self._config, memo), **self._share)


def set_config_share(module: nn.Module, **share: int) -> None:
    """For a module whose forward reads its head counts off `self.config`."""
    names = inspect.unwrap(type(module).forward).__code__.co_names
    if "config" in names and any(name in names for name in share):
        module.config = _ShareOfConfig(module.config, **share)
