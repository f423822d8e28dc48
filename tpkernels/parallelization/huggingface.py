"""Hugging Face models: loss on sharded logits, a config of local head counts, save_pretrained."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..group import Group
from ..nn.column_linear import ColumnParallelLinear
from ..ops.cross_entropy import vocab_parallel_cross_entropy
from ..sharding.module import shard_dtensor

# transformers' losses that can be computed from sharded logits, and whether they shift labels.
_SHIFTS_LABELS = {"ForCausalLMLoss": True, "ForMaskedLMLoss": False}


def adapt(model: Any, group: Group, loss_parallel: bool) -> None:
    """Set what a sharded Hugging Face model needs on the model itself.

    Args:
        model: sharded already; other models stay as they are.
        group: the tensor-parallel group.
        loss_parallel: compute the loss from sharded logits.
    """
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_save
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not loss_parallel or not isinstance(head, ColumnParallelLinear) or not head.gather_output:
        return
    head.tag = "head_backward"
    stock_loss = getattr(model, "loss_function", None)
    shifts_labels = _SHIFTS_LABELS.get(getattr(stock_loss, "__name__", ""))
    if shifts_labels is None or not _calls_loss_function(model):
        return
    model.loss_function = _ParallelLoss(head, stock_loss, shifts_labels)
    parameters = list(inspect.signature(model.forward).parameters)
    position = parameters.index("labels") if "labels" in parameters else None
    assert group.mesh is not None  # made now: torch.compile could not in a forward
    _LabelledCall(head, position).attach(model)


def _refuse_save(*args, **kwargs):
    raise RuntimeError(
        "this model is sharded over ranks, and save_pretrained would save one rank's shards: "
        "save tpk.unsharded_state_dict(model), or pass it to the unsharded model's "
        "save_pretrained(state_dict=...)"
    )


def _calls_loss_function(model: nn.Module) -> bool:
    """Return True if forward calls self.loss_function; other heads need full logits."""
    return "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names


class _ParallelLoss:
    """transformers' ForCausalLMLoss or ForMaskedLMLoss over sharded logits [..., V_r]."""

    def __init__(self, head: ColumnParallelLinear, stock, shifts_labels: bool):
        self.head, self.stock, self.shifts_labels = head, stock, shifts_labels

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch=None,
        ignore_index: int = -100,
        **options,
    ) -> Tensor:
        if self.head.gather_output:  # called outside of model(labels=...), on full logits
            return self.stock(
                logits,
                labels,
                vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                **options,
            )
        target = options.get("shift_labels") if self.shifts_labels else labels
        if target is None:
            target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        # The logits keep their shape: a rank without any of the vocabulary could not tell its rows
        # from reshape(-1, 0).
        loss = vocab_parallel_cross_entropy(
            logits,
            target.reshape(logits.shape[:-1]).to(logits.device),
            group=self.head.group,
            num_classes=self.head.out_features,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is None:
            return loss
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


class _LabelledCall:
    """Hooks that keep the logits sharded while the model is called with labels.

    The caller gets them as a DTensor.
    """

    def __init__(self, head: ColumnParallelLinear, position: int | None):
        self.head, self.position = head, position  # of labels among the arguments

    def attach(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, always_call=True)

    def before(self, model, args, kwargs) -> None:
        labels = kwargs.get("labels")
        if labels is None and self.position is not None and len(args) > self.position:
            labels = args[self.position]
        self.head.gather_output = labels is None

    def after(self, model, args, output):
        is_sharded, self.head.gather_output = not self.head.gather_output, True
        if not is_sharded or output is None:
            return output
        if isinstance(output, tuple):  # return_dict=False: (loss, logits, ...)
            return output[0], self._as_dtensor(output[1]), *output[2:]
        output.logits = self._as_dtensor(output.logits)
        return output

    def _as_dtensor(self, logits: Tensor) -> DTensor:
        return shard_dtensor(logits, self.head.group, -1, self.head.out_features)


class _LocalConfig:
    """A config as one attention module sees it: its rank's head counts.

    Everything else is read from and set on the full config.
    """

    def __init__(self, config, **local):
        vars(self).update(_config=config, _local=local)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._local[name] if name in self._local else getattr(self._config, name)

    def __setattr__(self, name, value):
        setattr(self._config, name, value)

    def __deepcopy__(self, memo):
        return _LocalConfig(copy.deepcopy(self._config, memo), **self._local)


def set_local_config(module: Any, **local: int) -> None:
    """Give a module whose forward reads its head counts from `self.config` its rank's counts."""
    names = inspect.unwrap(type(module).forward).__code__.co_names
    if "config" in names and any(name in names for name in local):
        module.config = _LocalConfig(module.config, **local)
