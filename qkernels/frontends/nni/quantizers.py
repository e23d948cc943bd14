"""The quantizers of NNI 3.0: each says by which rule of the core grids are found, and runs the user's loop."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qkernels.core.attach import OUTPUT, WEIGHT, as_prepared, attach, attached
from qkernels.core.convert import convert as core_convert
from qkernels.core.graph import arguments
from qkernels.core.phases import observe, settle
from qkernels.core.prepare import quantizers
from qkernels.core.qspec import QParams
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.recipe import Recipe, TensorRecipe
from qkernels.errors import InvalidArgument, InvalidState, InvalidType, Unsupported
from qkernels.frontends.common import close_matches, keep_containers
from qkernels.frontends.nni.config import Setting, parse
from qkernels.frontends.nni.evaluator import TorchEvaluator

Calibration = dict[str, dict[str, dict[str, Any]]]


class _Quantizer:
    """Attaches quantizers to `model`, in place; `compress` trains or calibrates it, `convert` gives the int8 network.

    Args:
        model: a float model.
        config_list: as in NNI, see docs/frontends.md for what is taken.
        evaluator: the user's loops.
    """

    rule: ClassVar[str] = "ste"
    rule_options: ClassVar[Mapping[str, Any]] = {}
    observer: ClassVar[str] = "moving_average"
    trained: ClassVar[bool] = True
    tensor_shape: ClassVar[tuple[int, ...]] = ()  # of the numbers of a per-tensor grid in the calibration config

    def __init__(
        self,
        model: nn.Module,
        config_list: Iterable[Mapping[str, Any]],
        evaluator: TorchEvaluator,
        existed_wrappers: None = None,
        fused_compressors: None = None,
        *,
        start_step: int = 0,
    ):
        if not isinstance(evaluator, TorchEvaluator):
            raise InvalidType(f"{type(self).__name__}: evaluator must be a TorchEvaluator, got {evaluator!r}")
        if existed_wrappers or fused_compressors:
            raise Unsupported(f"{type(self).__name__}: pruning and distillation on the same wrappers; do them before")
        self.bound_model, self.evaluator = model, evaluator
        self.config_list = config_list
        self.settings = parse(model, config_list)
        self._recipe = self.settings.recipe(model, self._recipe_of)
        self.originals = attach(model, self.settings.sites(self._recipe_of, start_step), self.trained)
        self._example: tuple[tuple, dict] | None = None

    def _recipe_of(self, setting: Setting, is_weight: bool) -> TensorRecipe:
        spec = setting.spec(is_weight)
        return TensorRecipe(spec, self.observer, rule=self.rule, rule_options=tuple(self.rule_options.items()))

    @property
    def recipe(self) -> Recipe:
        """What the config_list asks for, as `qkernels.prepare_qat` and `qkernels.prepare` take it."""
        return self._recipe

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """Remembers arguments of the model, for the graph that `convert` needs, and runs it once."""
        device = next((p.device for p in self.bound_model.parameters()), torch.device("cpu"))
        args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
        self._example = args, kwargs
        training, states = self.bound_model.training, [(q, q.state) for q in quantizers(self.bound_model)]
        for quantizer, _ in states:
            quantizer.state = State.OFF
        with torch.no_grad():
            self.bound_model.eval()(*args, **kwargs)
        self.bound_model.train(training)
        for quantizer, state in states:
            quantizer.state = state

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Calibration]:
        """Trains (or calibrates) and returns the model and its calibration config."""
        self._learn_scales()
        self.evaluator.train(self.bound_model, max_steps, max_epochs)
        for quantizer in quantizers(self.bound_model):
            if not quantizer.has_grid() and quantizer.observer.has_data():
                quantizer.choose()  # training ended before rounding began
        return self.bound_model, self.get_calibration_config()

    def _learn_scales(self) -> None:
        """Learned scales join the optimizer."""
        known = {id(p) for o in self.evaluator.optimizers for group in o.param_groups for p in group["params"]}
        new = [p for q in quantizers(self.bound_model) for p in q.parameters() if id(p) not in known]
        if new:
            self.evaluator.optimizers[0].add_param_group({"params": new, "weight_decay": 0.0})

    def get_calibration_config(self) -> Calibration:
        """Scales, zero points and ranges by module and target, in NNI's form."""
        found: Calibration = defaultdict(dict)
        for path, key, quantizer in attached(self.bound_model):
            target = _target(key)
            found[path][target] = self._entry(quantizer, self.settings.targets[path][target])
        return found

    def _entry(self, quantizer: Quantizer, setting: Setting) -> dict[str, Any]:
        grid = quantizer.qparams()
        shift = 0 if setting.signed or not quantizer.is_weight else 2 ** (setting.bits - 1)
        low, high = self._tracked(quantizer, grid)
        numbers = {"scale": grid.scale, "zero_point": grid.zero_point.float() + shift}
        shape = self.tensor_shape if grid.axis is None else (-1, *[1] * (self._rank(quantizer) - 1))
        described = {
            "quant_dtype": setting.quant_dtype,
            "quant_scheme": setting.scheme or "symmetric",
            "quant_bits": setting.bits,
        }
        ends = {"tracked_max": high, "tracked_min": low}
        as_tensor = {k: v.detach().cpu().clone().reshape(shape) for k, v in {**numbers, **ends}.items()}
        return {k: as_tensor[k] for k in numbers} | described | {k: as_tensor[k] for k in ends}

    def _tracked(self, quantizer: Quantizer, grid: QParams) -> tuple[Tensor, Tensor]:
        return quantizer.observer.low, quantizer.observer.high

    def _rank(self, quantizer: Quantizer) -> int:
        return self.bound_model.get_submodule(quantizer.source.removesuffix(".weight")).weight.dim()

    def update_calibration_config(self, calibration_config: Calibration) -> None:
        """Takes scales and zero points from a calibration config and keeps them, whatever data comes."""
        places = {(path, _target(key)): quantizer for path, key, quantizer in attached(self.bound_model)}
        for path, targets in calibration_config.items():
            for target, entry in targets.items():
                if (path, target) not in places:
                    known = [".".join(place) for place in places]
                    name = f"{path}.{target}"
                    raise InvalidArgument(
                        f"calibration_config: nothing is quantized at {name}{close_matches(name, known)}"
                    )
                quantizer, setting = places[path, target], self.settings.targets[path][target]
                if entry["quant_dtype"] != setting.quant_dtype:
                    raise InvalidArgument(
                        f"calibration_config.{path}.{target}.quant_dtype: the config_list says {setting.quant_dtype}, "
                        f"got {entry['quant_dtype']}"
                    )
                shift = 0 if setting.signed or not quantizer.is_weight else 2 ** (setting.bits - 1)
                spec = quantizer.spec
                zero_point = torch.as_tensor(entry["zero_point"]).float() - shift
                quantizer.set_qparams(
                    QParams(
                        torch.as_tensor(entry["scale"]), zero_point, quantizer.axis, spec.qmin, spec.qmax, spec.dtype
                    )
                )
                quantizer.state = State.FROZEN

    def unwrap_model(self) -> nn.Module:
        """The float model again, with its trained parameters; quantizers and what they know are gone."""
        self.originals.restore()
        return self.bound_model

    def prepared(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The network as `qkernels.prepare` gives it, for `exact`, `verify` and `compare`."""
        return as_prepared(self.bound_model, *self._arguments(args, kwargs))

    def convert(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The int8 network; arguments of the model are needed if `track_forward` was not called."""
        return keep_containers(core_convert(self.prepared(*args, **kwargs)), self.bound_model)

    def _arguments(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args or kwargs:
            return args, kwargs
        if self._example is not None:
            return self._example
        if self.evaluator.dummy_input is not None:
            return arguments(self.evaluator.dummy_input)
        raise InvalidState("convert: call track_forward(input) first, or convert(input)")

    @classmethod
    def from_compressor(cls, *args: Any, **kwargs: Any) -> None:
        raise Unsupported(f"{cls.__name__}.from_compressor: make one quantizer for the whole config_list")


def _target(key: str) -> str:
    return {WEIGHT: "weight", OUTPUT: "_output_0"}.get(key) or key.replace("input", "_input_")


class QATQuantizer(_Quantizer):
    """Straight-through training on grids that follow moving averages of the extremes. Jacob et al. 2018.

    `quant_start_step`: for so many training steps ranges are only watched.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Iterable[Mapping[str, Any]],
        evaluator: TorchEvaluator,
        quant_start_step: int = 0,
        **options: Any,
    ):
        if not isinstance(quant_start_step, int) or quant_start_step < 0:
            raise InvalidArgument(f"QATQuantizer: quant_start_step must be at least 0, got {quant_start_step!r}")
        super().__init__(model, config_list, evaluator, start_step=quant_start_step, **options)


class _Learned(_Quantizer):
    observer = "minmax"

    def _tracked(self, quantizer: Quantizer, grid: QParams) -> tuple[Tensor, Tensor]:
        return (grid.qmin - grid.zero_point) * grid.scale, (grid.qmax - grid.zero_point) * grid.scale


class LsqQuantizer(_Learned):
    """Learned step sizes, which begin at 0.01. Esser et al. 2020."""

    rule = "lsq"
    rule_options: ClassVar = {"init": 0.01}
    tensor_shape = (1,)

    def _recipe_of(self, setting: Setting, is_weight: bool) -> TensorRecipe:
        # Zero points do not move: 0 for signed and unsigned codes.
        scheme = "symmetric" if setting.signed or is_weight else "affine"
        return super()._recipe_of(Setting(setting.bits, setting.signed, scheme, setting.per_channel), is_weight)


class LsqPlusQuantizer(_Learned):
    """Learned step sizes, which begin at 0.01, and zero points, which begin where the first batch wants them.

    Bhalgat et al. 2020.
    """

    rule = "lsq_plus"
    rule_options: ClassVar = {"init": 0.01}
    tensor_shape = (1,)


class DoReFaQuantizer(_Learned):
    """Weights through tanh, activations clipped to [0, 1]. Zhou et al. 2016."""

    rule = "dorefa"


class BNNQuantizer(_Learned):
    """Signs. Courbariaux et al. 2016. Weights are kept in [-1, 1] after each step of the optimizer."""

    rule = "bnn"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for optimizer in self.evaluator.optimizers:
            optimizer.register_step_post_hook(self._clip)

    @torch.no_grad()
    def _clip(self, *_: Any) -> None:
        for path, targets in self.settings.targets.items():
            if "weight" in targets:
                self.bound_model.get_submodule(path).weight.clamp_(-1.0, 1.0)


class PtqQuantizer(_Quantizer):
    """Grids for the extremes that `evaluating_func` shows.

    `is_bias_correction` makes up for the mean error of each layer; needs `track_forward` before `compress`.
    """

    observer = "minmax"
    trained = False

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Calibration]:
        """Runs `evaluating_func` once, in float, and chooses the grids.

        As in NNI the limits have no effect: `evaluating_func` decides how much data it shows.
        """
        observe(self.bound_model)
        self.evaluator.evaluate(self.bound_model)
        settle(self.bound_model)
        return self.bound_model, self.get_calibration_config()
