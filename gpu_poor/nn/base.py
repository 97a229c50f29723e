"""What every quantized module is: weights in a format, their scales, how to get there and back.

A quantized module keeps the parameter names of the float module it replaces. For each weight
``w`` that stands for ``[..., N, K]`` it stores, as its format says (gpu_poor/formats.py),

    w         int8, or a 16-bit float  Parameter that needs no gradient
    w_scale   a float, or None         buffer

which keep their dtypes under .half() and .to(dtype); a linear may have an ``input_scale`` as well.

A weight tied to another module's is the same Parameter object in both. Its scale lives in one
module of the group, the owner, which alone lists it in its state_dict; the others read it there.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gpu_poor import formats, ops
from gpu_poor.formats import Format, Storage
from gpu_poor.strategies import MSE, Inputs, Rounding

#: Every kind of quantized module by its name; filled by :func:`register`, saved in configs.
KINDS: dict[str, type["QuantizedModule"]] = {}

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def register(cls: type["QuantizedModule"]) -> type["QuantizedModule"]:
    """Class decorator: make a quantized module known to ``quantize`` and to saved configs."""
    KINDS[cls.kind] = cls
    return cls


def kind_of(module: nn.Module) -> type["QuantizedModule"] | None:
    """The quantized class for a float module, or None if no kind takes it."""
    return next((kind for kind in KINDS.values() if kind.accepts(module)), None)


def take_hooks(module: nn.Module, source: nn.Module) -> None:
    """Carry over the training flag and the forward and backward hooks of ``source``."""
    module.training = source.training
    for name in _HOOKS:
        if getattr(source, name, None):
            setattr(module, name, getattr(source, name))


def is_plain(module: nn.Module) -> bool:
    """Whether a module's forward is its class's own: not patched, no parametrization."""
    return "forward" not in module.__dict__ and not hasattr(module, "parametrizations")


class Stored(NamedTuple):
    """A quantized weight: the tensors that a format stores for ``shape``, ``[..., N, K]``.

    ``input_scale``: of a linear whose inputs are multiplied by it, and whose columns have been
    divided by it before they were rounded; see :class:`gpu_poor.nn.QuantizedLinear`.
    """

    weight: Tensor
    scale: Tensor | None
    form: Format
    shape: tuple[int, ...]
    input_scale: Tensor | None = None

    def put(self, i: int, matrix: "Stored") -> None:
        """Copy the matrix of one expert to its place."""
        self.weight[i] = matrix.weight
        if self.scale is not None:
            self.scale[i] = matrix.scale

    def is_finite(self) -> bool:
        """Whether the rows it was made from were finite, and within what the format reaches."""
        return bool(torch.isfinite(self.weight if self.scale is None else self.scale).all())


def quantize_rows(
    rows: Tensor,
    form: Format,
    scratch: Tensor | None = None,
    rounding: Rounding = MSE,
    inputs: Inputs | None = None,
    factors: Tensor | None = None,
) -> Stored:
    """Float rows ``[..., N, K]`` with any strides in a format.

    Args:
        scratch: bytes to make a matrix with other strides contiguous in, at least its size.
        rounding: how the numbers are chosen.
        inputs: what calibration has seen of the layer's inputs, if it has.
        factors: float32 ``[K]``, what the columns are multiplied by first.
    """
    shape = tuple(rows.shape)
    if rows.dim() != 2:
        stored = empty(form, shape, rows.device)
        for i, matrix in enumerate(rows):  # one expert at a time, to copy no more than one
            stored.put(i, quantize_rows(matrix, form, scratch, rounding, inputs, factors))
        return stored
    borrowed = None
    if factors is not None:
        rows = (rows * factors).contiguous()  # in float32, as exact as what divides the inputs
    elif not rows.is_contiguous():
        # All at once: torch transposes a whole matrix four times faster than blocks of one.
        if scratch is None or scratch.device != rows.device:
            rows = rows.contiguous()
        else:
            borrowed = scratch[: rows.nbytes].view(rows.dtype).view(rows.shape).copy_(rows)
            rows = borrowed
    weight, scale = rounding.quantize(rows, form, inputs)
    return Stored(weight.clone() if weight is borrowed else weight, scale, form, shape)


def empty(form: Format, shape: tuple[int, ...], device, dtype: torch.dtype | None = None) -> Stored:
    """A weight without data; ``dtype``: another one for its weight until the data come."""
    (sizes, stored_dtype), scales = form.storage(*shape)
    weight = torch.empty(sizes, dtype=dtype or stored_dtype, device=device)
    scale = scales and torch.empty(scales[0], dtype=scales[1], device=device)
    return Stored(weight, scale, form, tuple(shape))


class QuantizedModule(nn.Module):
    """Base of the quantized modules; see the head of this file for what is stored."""

    #: Name in receipts and saved configs.
    kind: ClassVar[str]
    #: The parameters that are quantized.
    weight_names: tuple[str, ...] = ("weight",)

    def __init__(self, activation: str = "a16", dtype: torch.dtype = torch.float32):
        super().__init__()
        self.activation = activation
        #: What the float weight was, and is again after dequantize; follows ``.to(dtype)``.
        self.dtype = dtype
        #: Whether the float weights were frozen, and are again after dequantize.
        self.frozen = False
        #: ``{weight name: what it is stored as}`` and ``{weight name: [..., N, K]}``.
        self.formats: dict[str, Format] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        #: ``{buffer name: owner}`` of shared scales; in a dict, so that no owner is a submodule.
        self._scale_owners: dict[str, QuantizedModule] = {}

    # -- from a float module and back ------------------------------------------------------

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether this class computes what ``module`` computes."""
        raise NotImplementedError

    @classmethod
    def weights_of(cls, module: nn.Module) -> tuple[str, ...]:
        """The names of the parameters of a float module that get quantized."""
        return cls.weight_names

    @classmethod
    def to_rows(cls, source: nn.Module, name: str, tensor: Tensor) -> Tensor:
        """A view of the float weight ``name`` as ``[..., N, K]``: K is what a scale is shared by.

        ``source`` is the float module, or the quantized one made from it.
        """
        return tensor

    @classmethod
    def from_float(
        cls, module: nn.Module, weights: dict[str, Stored], activation: str
    ) -> "QuantizedModule":
        """The quantized module from the float one and its weights by name."""
        raise NotImplementedError

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A float module that computes the same with the dequantized weights."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype = torch.float32, name: str = "weight") -> Tensor:
        """The float weight ``[..., N, K]`` that the module multiplies its inputs by."""
        stored = getattr(self, name), getattr(self, f"{name}_scale")
        return self.formats[name].dequantize(*stored, self.shapes[name], dtype)

    # -- state -----------------------------------------------------------------------------

    @property
    def activation(self) -> str:
        """How the activations are carried: "a8", "a16" or "a32" (gpu_poor.ops.ACTIVATIONS)."""
        return self._activation

    @activation.setter
    def activation(self, value: str) -> None:
        if value not in ops.ACTIVATIONS:
            modes = ", ".join(ops.ACTIVATIONS)
            raise ValueError(f"activation must be one of {modes}, got {value!r}")
        self._activation = value
        self._activation_bits = ops.ACTIVATIONS[value]

    def set_weight(self, name: str, stored: Stored) -> None:
        """Store one weight. Keeps a Parameter as is."""
        weight = stored.weight
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter(name, weight)
        self.register_buffer(f"{name}_scale", stored.scale)
        self.formats[name], self.shapes[name] = stored.form, stored.shape

    def storage(self) -> dict[str, Storage]:
        """``{tensor name: shape and dtype}`` of what the module stores in place of weights."""
        found = {}
        for name in self.weight_names:
            found |= formats.tensors(self.formats[name], name, self.shapes[name])
        return found

    @property
    def format(self) -> Format:
        """What the weights are stored as: a module has one format for all of them."""
        return self.formats[self.weight_names[0]]

    def share_scale(self, name: str, source: "QuantizedModule | Tensor") -> None:
        """Use the scale of the module this weight is tied to; the state_dict lists it there.

        Args:
            source: that module, whatever its scale will be, or a tensor to use until it is moved.
        """
        key = f"{name}_scale"
        if isinstance(source, Tensor) and key in self._scale_owners and self.scale(key) is source:
            return
        self._scale_owners.pop(key, None)
        if isinstance(source, Tensor):
            self.register_buffer(key, source, persistent=False)
        else:
            self.register_buffer(key, None, persistent=False)
            self._scale_owners[key] = source

    def own_scale(self, name: str, scale: Tensor | None) -> None:
        """Undo :meth:`share_scale`: an own scale, listed in the state_dict."""
        self._scale_owners.pop(f"{name}_scale", None)
        self.register_buffer(f"{name}_scale", scale)

    def scale(self, key: str) -> Tensor | None:
        """The scale in the buffer ``key``, of this module or of the one it is tied to."""
        return self._scale_owners.get(key, self)._buffers[key]

    def __getattr__(self, name: str):
        owner = self.__dict__.get("_scale_owners", {}).get(name)
        return super().__getattr__(name) if owner is None else getattr(owner, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedModule":
        """Move the module, but leave weights and scales the dtypes that they are stored in.

        The scale stays the same tensor object, as a Parameter would. One that is shared moves
        with each of its modules, so that it is where they are even if one is moved alone.

        Raises:
            TypeError: fn makes float64.
        """
        # What fn does to a tensor of this dtype tells the dtype from now on.
        device = self._parameters[self.weight_names[0]].device
        dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        if dtype not in ops.FLOATS:
            raise TypeError(
                f"{type(self).__name__} cannot be made {dtype}: see gpu_poor.dequantize"
            )
        self.dtype = dtype
        kept = [getattr(self, key) for key in self.storage()]
        before = {key: self.scale(key) for key in (f"{name}_scale" for name in self.weight_names)}

        def keep_stored(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.dtype != tensor.dtype and any(tensor is stored for stored in kept):
                return tensor.to(new.device)  # .type() casts integers too
            return new

        super()._apply(keep_stored, recurse)
        for key, old in before.items():
            if old is None:
                continue
            owner = self._scale_owners.get(key, self)
            new = fn(old) if owner is not self else self._buffers[key]
            if new.dtype != old.dtype:
                new = old.to(new.device)
            if new is not old and "meta" not in (new.device.type, old.device.type):
                old.data = new
                new = old
            owner._buffers[key] = new
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "QuantizedModule":
        """For what can have a gradient: the bias."""
        weights = [self._parameters[name] for name in self.weight_names]
        for parameter in self.parameters():
            if not any(parameter is weight for weight in weights):
                parameter.requires_grad_(requires_grad)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Refuse values that ``copy_`` would squeeze into a stored dtype, then load as usual."""
        error_msgs = args[-1] if args else kwargs["error_msgs"]
        for key, (_, dtype) in self.storage().items():
            value = state_dict.get(prefix + key)
            if value is not None and value.dtype != dtype:
                error_msgs.append(
                    f"{prefix}{key} must be {dtype} but the state_dict has {value.dtype}: "
                    "it was not saved from a model quantized by gpu_poor"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
