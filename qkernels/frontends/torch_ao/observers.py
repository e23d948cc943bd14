"""torch.ao's observers, fake-quantize modules and qconfigs, each of which stands for a `TensorRecipe`."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qkernels.core.observers import make_observer
from qkernels.core.qspec import MAX_BITS, QParams, QSpec
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidArgument, Unsupported

EPS = torch.finfo(torch.float32).eps
DTYPES = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.uint8: torch.uint8, torch.int8: torch.int8}
DTYPES |= dict.fromkeys((torch.int16, torch.uint16, torch.int32, torch.qint32), torch.int32)  # simulated only
QSCHEMES = {
    torch.per_tensor_affine: (False, False),
    torch.per_tensor_symmetric: (True, False),
    torch.per_channel_affine: (False, True),
    torch.per_channel_symmetric: (True, True),
}


def histogram_codes(spec: QSpec) -> dict[str, int]:
    """torch.ao's histogram search expects 256 codes also where there are fewer."""
    return {} if spec.qmax - spec.qmin == 255 else {"codes": 256}


class Partial:
    """A class with some arguments, as `with_args` makes it."""

    def __init__(self, target: Callable[..., Any], options: dict[str, Any]):
        self.target, self.options = target, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.target(*args, **{**self.options, **kwargs})

    def with_args(self, **options: Any) -> "Partial":
        return Partial(self.target, {**self.options, **options})

    def __repr__(self) -> str:
        return f"{self.target.__name__}({', '.join(f'{k}={v}' for k, v in self.options.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partial) and (self.target, self.options) == (other.target, other.options)

    def __hash__(self) -> int:
        return hash((self.target, tuple(sorted(self.options))))


class _Factory:
    @classmethod
    def with_args(cls, **options: Any) -> Partial:
        """The class with these arguments."""
        return Partial(cls, options)


class ObserverBase(nn.Module, _Factory):
    """An observer of the core under the name and with the arguments of torch.ao's."""

    kind: ClassVar[str]
    traced_as_leaf = True

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: None = None,
        eps: float = EPS,
        is_dynamic: bool = False,
        ch_axis: int = 0,
        **options: Any,
    ):
        super().__init__()
        where = type(self).__name__
        if dtype not in DTYPES:
            raise Unsupported(f"{where}: dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}")
        if qscheme not in QSCHEMES:
            raise Unsupported(f"{where}: qscheme must be one of {[str(s) for s in QSCHEMES]}, got {qscheme}")
        if is_dynamic:
            raise Unsupported(f"{where}: is_dynamic=True has no integer layers; calibrate static grids")
        if (quant_min is None) != (quant_max is None):
            raise InvalidArgument(f"{where}: quant_min and quant_max belong together, got {quant_min}, {quant_max}")
        held, whole = DTYPES[dtype], torch.iinfo(dtype)
        ends = (whole.min, whole.max) if quant_min is None else (quant_min, quant_max)
        if not -(2**MAX_BITS) <= ends[0] <= ends[1] <= 2**MAX_BITS:
            raise Unsupported(f"{where}: {dtype}: say quant_min and quant_max, within 2**{MAX_BITS}; got {ends}")
        if reduce_range:
            ends = (ends[0] // 2, ends[1] // 2)
        symmetric, per_channel = QSCHEMES[qscheme]
        spec = QSpec(held, *ends, symmetric, per_channel, ch_axis, eps)
        if self.kind == "histogram":
            options |= histogram_codes(spec)
        self.recipe = TensorRecipe(spec, self.kind, tuple(options.items()))
        self.dtype, self.qscheme, self.ch_axis = dtype, qscheme, ch_axis
        self.quant_min, self.quant_max = ends
        self.observer: nn.Module | None = None if per_channel else self._make(None)

    def _make(self, channels: int | None) -> nn.Module:
        return make_observer(self.recipe.observer, self.recipe.spec, channels, **dict(self.recipe.options))

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is None:
            if x.numel() == 0:
                return x  # it may lack channels too
            self.observer = self._make(x.shape[self.ch_axis]).to(x.device)
        self.observer.observe(x)
        return x

    def qparams(self) -> QParams:
        """The grid for what was seen so far."""
        return (self.observer or self._make(1)).qparams()

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        grid = self.qparams()
        return grid.scale, grid.zero_point

    @property
    def min_val(self) -> Tensor:
        return torch.empty(0) if self.observer is None else self.observer.low

    @property
    def max_val(self) -> Tensor:
        return torch.empty(0) if self.observer is None else self.observer.high

    def reset_min_max_vals(self) -> None:
        if self.observer is not None:
            self.observer.reset()

    def extra_repr(self) -> str:
        return f"{self.dtype}, {self.qscheme}, quant_min={self.quant_min}, quant_max={self.quant_max}"


class MinMaxObserver(ObserverBase):
    kind = "minmax"


class HistogramObserver(ObserverBase):
    kind = "histogram"

    def __init__(self, bins: int = 2048, *args: Any, upsample_rate: int = 16, **kwargs: Any):
        if upsample_rate != 16:
            raise Unsupported(f"HistogramObserver: upsample_rate must be 16, got {upsample_rate}")
        super().__init__(*args, **({} if bins == 2048 else {"bins": bins}), **kwargs)


class MovingAverageMinMaxObserver(ObserverBase):
    kind = "moving_average"

    def __init__(self, averaging_constant: float = 0.01, *args: Any, **kwargs: Any):
        super().__init__(*args, **({} if averaging_constant == 0.01 else {"momentum": averaging_constant}), **kwargs)


class PerChannelMinMaxObserver(ObserverBase):
    kind = "minmax"

    def __init__(
        self,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        *args: Any,
        **kwargs: Any,
    ):
        super().__init__(dtype, qscheme, *args, ch_axis=ch_axis, **kwargs)


class MovingAveragePerChannelMinMaxObserver(ObserverBase):
    kind = "moving_average"

    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        *args: Any,
        **kwargs: Any,
    ):
        options = {} if averaging_constant == 0.01 else {"momentum": averaging_constant}
        super().__init__(dtype, qscheme, *args, ch_axis=ch_axis, **options, **kwargs)


class FixedQParamsObserver(nn.Module, _Factory):
    """A grid that no data changes."""

    traced_as_leaf = True

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int = 0,
        quant_max: int = 255,
    ):
        super().__init__()
        self.dtype, self.qscheme = dtype, qscheme
        self.quant_min, self.quant_max = quant_min, quant_max
        self.grid = QParams.per_tensor(scale, zero_point, quant_min, quant_max, DTYPES[dtype])
        self.recipe = TensorRecipe(QSpec(DTYPES[dtype], quant_min, quant_max))

    def forward(self, x: Tensor) -> Tensor:
        return x

    def qparams(self) -> QParams:
        return self.grid

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.grid.scale, self.grid.zero_point


class FakeQuantize(nn.Module, _Factory):
    """An observer and the rounding that goes with it, each of which can be switched off."""

    traced_as_leaf = True

    def __init__(
        self,
        observer: Callable[..., nn.Module] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        **observer_options: Any,
    ):
        super().__init__()
        if quant_min is not None or quant_max is not None:
            observer_options |= {"quant_min": quant_min, "quant_max": quant_max}
        self.activation_post_process = observer(**observer_options)
        self.quantizer: Quantizer | None = None
        self.register_buffer("fake_quant_enabled", torch.tensor([1], dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.tensor([1], dtype=torch.uint8))

    @property
    def recipe(self) -> TensorRecipe:
        return self.activation_post_process.recipe

    def forward(self, x: Tensor) -> Tensor:
        observes = bool(self.observer_enabled)
        if observes:
            self.activation_post_process(x.detach())
        if observes or self.quantizer is None:
            self._take(self.activation_post_process.qparams())
        return self.quantizer(x) if bool(self.fake_quant_enabled) else x

    def _take(self, grid: QParams) -> None:
        if self.quantizer is None:
            self.quantizer = Quantizer(self.recipe, "", grid.scale.numel()).to(grid.scale.device)
            self.quantizer.state = State.FAKE_QUANT
        self.quantizer.set_qparams(grid)

    def qparams(self) -> QParams:
        return self.activation_post_process.qparams() if self.quantizer is None else self.quantizer.qparams()

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.activation_post_process.calculate_qparams()

    @property
    def scale(self) -> Tensor:
        return self.qparams().scale

    @property
    def zero_point(self) -> Tensor:
        return self.qparams().zero_point

    @property
    def ch_axis(self) -> int:
        return self.activation_post_process.ch_axis

    def enable_fake_quant(self, enabled: bool = True) -> None:
        self.fake_quant_enabled[0] = int(enabled)

    def disable_fake_quant(self) -> None:
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        self.observer_enabled[0] = int(enabled)

    def disable_observer(self) -> None:
        self.enable_observer(False)

    def extra_repr(self) -> str:
        return f"fake_quant_enabled={bool(self.fake_quant_enabled)}, observer_enabled={bool(self.observer_enabled)}"


class FixedQParamsFakeQuantize(FakeQuantize):
    def __init__(self, observer: Callable[..., nn.Module], **options: Any):
        super().__init__(observer, **options)
        self.disable_observer()


FusedMovingAvgObsFakeQuantize = FakeQuantize  # one class: the rounding is one pass over memory anyway


# --- qconfigs ---------------------------------------------------------------------------------------------------------


class QConfig(namedtuple("QConfig", ["activation", "weight"])):
    """How activations and weights get their grids: two callables that make an observer or fake-quantize module."""

    __slots__ = ()

    def __new__(cls, activation: Callable[[], nn.Module], weight: Callable[[], nn.Module]) -> "QConfig":
        for name, made in (("activation", activation), ("weight", weight)):
            if isinstance(made, nn.Module):
                raise InvalidArgument(
                    f"QConfig.{name}: give the class, {type(made).__name__}.with_args(...), not an instance"
                )
        return super().__new__(cls, activation, weight)


SYMMETRIC_WEIGHT = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
CHANNEL_WEIGHT = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
NARROW = {"quant_min": -127, "quant_max": 127, "eps": 2**-12}

default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
default_weight_observer = MinMaxObserver.with_args(**SYMMETRIC_WEIGHT)
default_histogram_observer = HistogramObserver.with_args(quant_min=0, quant_max=127)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(**CHANNEL_WEIGHT)
weight_observer_range_neg_127_to_127 = MinMaxObserver.with_args(**SYMMETRIC_WEIGHT, **NARROW)
per_channel_weight_observer_range_neg_127_to_127 = PerChannelMinMaxObserver.with_args(**CHANNEL_WEIGHT, **NARROW)
default_fixed_qparams_range_0to1_observer = FixedQParamsObserver.with_args(scale=1.0 / 256.0, zero_point=0)
default_fixed_qparams_range_neg1to1_observer = FixedQParamsObserver.with_args(scale=2.0 / 256.0, zero_point=128)

default_fake_quant = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
default_weight_fake_quant = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, **SYMMETRIC_WEIGHT)
default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, **CHANNEL_WEIGHT
)
default_histogram_fake_quant = FakeQuantize.with_args(observer=HistogramObserver, quant_min=0, quant_max=255)
default_fused_act_fake_quant = default_fake_quant
default_fused_wt_fake_quant = default_weight_fake_quant
default_fused_per_channel_wt_fake_quant = default_per_channel_weight_fake_quant

default_qconfig = QConfig(default_observer, default_weight_observer)
default_per_channel_qconfig = QConfig(default_observer, default_per_channel_weight_observer)
default_qat_qconfig = QConfig(default_fake_quant, default_weight_fake_quant)
default_qat_qconfig_v2 = default_qat_qconfig
_SIGNED = HistogramObserver.with_args(dtype=torch.qint8, eps=2**-12)
default_symmetric_qnnpack_qconfig = QConfig(_SIGNED, weight_observer_range_neg_127_to_127)
default_per_channel_symmetric_qnnpack_qconfig = QConfig(_SIGNED, per_channel_weight_observer_range_neg_127_to_127)

REDUCES_RANGE = {"x86": True, "fbgemm": True, "onednn": False, "qnnpack": False}


def _check_backend(function: str, backend: str) -> None:
    if backend not in REDUCES_RANGE:
        raise InvalidArgument(f"{function}: backend must be one of {list(REDUCES_RANGE)}, got {backend!r}")


def get_default_qconfig(backend: str = "x86", version: int = 0) -> QConfig:
    """Histogram activations, and one weight grid a channel ("qnnpack": one a tensor)."""
    _check_backend("get_default_qconfig", backend)
    weight = default_weight_observer if backend == "qnnpack" else default_per_channel_weight_observer
    return QConfig(HistogramObserver.with_args(reduce_range=REDUCES_RANGE[backend]), weight)


def get_default_qat_qconfig(backend: str = "x86", version: int = 1) -> QConfig:
    """Moving averages for activations and weights, one weight grid a channel ("qnnpack": one a tensor)."""
    _check_backend("get_default_qat_qconfig", backend)
    weight = default_weight_fake_quant if backend == "qnnpack" else default_per_channel_weight_fake_quant
    return QConfig(default_fake_quant.with_args(reduce_range=REDUCES_RANGE[backend]), weight)
