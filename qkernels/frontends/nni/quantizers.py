"""The quantizers of NNI 3.0: each says by which rule of the core grids are found, and runs the user's loop."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qkernels.core.attach import PARAMETERS, Site
from qkernels.core.attached import Attached, Holder, freeze, recipe_of
from qkernels.core.grids import Grid, Grids
from qkernels.core.quantizer import Quantizer
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidArgument, InvalidType, Unsupported, close_matches
from qkernels.frontends.nni import calibration
from qkernels.frontends.nni.config import Setting, parse
from qkernels.frontends.nni.evaluator import TorchEvaluator

Calibration = dict[str, dict[str, dict[str, Any]]]


class _Quantizer(Holder):
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
        self.evaluator, self.config_list = evaluator, config_list
        self.settings = parse(model, config_list)
        sites = self._sites(start_step)
        #: What the config_list asks for, as `qkernels.prepare_qat` and `qkernels.prepare` take it.
        self.recipe = recipe_of(model, sites)
        self.attached = Attached(model, sites, self.trained, evaluator.dummy_input)
        self.last: Calibration | None = None

    def _sites(self, start_step: int) -> dict[str, Site]:
        return self.settings.sites(self._recipe_of, start_step)

    def _recipe_of(self, target: str, setting: Setting) -> TensorRecipe:
        spec = setting.spec(target in PARAMETERS)
        return TensorRecipe(spec, self.observer, rule=self.rule, rule_options=tuple(self.rule_options.items()))

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model once, in the mode that it is in, and remembers the arguments for `convert`.

        What passes is the first thing that ranges follow.
        """
        device = next((p.device for p in self.bound_model.parameters()), torch.device("cpu"))
        args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
        self.attached.track(args, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()})

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Calibration]:
        """Trains (or calibrates) and returns the model and its calibration config."""
        if max_steps is None and max_epochs is None:
            raise InvalidArgument("compress: max_steps or max_epochs must be a number, both are None")
        self.attached.learn(self.evaluator.optimizers, self.settings.layer)
        self.evaluator.train(self.bound_model, max_steps, max_epochs)
        self.attached.settle()
        return self.bound_model, self.get_calibration_config()

    def get_calibration_config(self) -> Calibration:
        """Scales, zero points and ranges by module and target, in NNI's form; after `unwrap_model` the last ones.

        Where no tensor has passed yet, scale and zero point are None and there is no range.
        """
        if self.last is not None:
            return self.last
        grids: Grids = {}
        for path, key, quantizer in self._places():
            grids.setdefault(path, {})
            if quantizer.has_grid():
                grids[path][key] = Grid.of(quantizer)
        found = calibration.write(grids, self.bound_model)
        for path, key, quantizer in self._places():
            name = calibration.target(key)
            setting = self.settings.targets[path][name]
            if not quantizer.has_grid():
                found[path][name] = calibration.without_grid(setting.bits, setting.signed, setting.scheme)
                continue
            entry = found[path][name]
            entry["quant_scheme"] = setting.scheme
            self._describe(entry, quantizer)
            if setting.rank:
                ones = (1,) * setting.rank
                entry |= {key: value.reshape(ones) for key, value in entry.items() if isinstance(value, Tensor)}
        return found

    def _places(self) -> list[tuple[str, str, Quantizer]]:
        return [(self.settings.layer(path), key, quantizer) for path, key, quantizer in self.attached]

    def _describe(self, entry: dict[str, Any], quantizer: Quantizer) -> None:
        """What the original says otherwise than that the tracked range is that of the grid."""
        ends = {"tracked_max": quantizer.observer.high, "tracked_min": quantizer.observer.low}
        entry |= {name: end.detach().cpu().clone().reshape(entry["scale"].shape) for name, end in ends.items()}

    def update_calibration_config(self, calibration_config: Calibration) -> None:
        """Takes scales and zero points from a calibration config and keeps them, whatever data comes."""
        places = {(path, key): quantizer for path, key, quantizer in self._places()}
        for path, table in calibration.read(calibration_config).items():
            for key, grid in table.items():
                if (path, key) not in places:
                    known = [f"{path}.{calibration.target(key)}" for path, key in places]
                    name = f"{path}.{calibration.target(key)}"
                    close = close_matches(name, known)
                    raise InvalidArgument(f"calibration_config: nothing is quantized at {name}{close}")
                freeze(places[path, key], grid)

    def unwrap_model(self) -> nn.Module:
        """The float model again, with its trained parameters; quantizers are gone, `get_calibration_config` stays."""
        if self._attached.originals is not None:
            self.last = self.get_calibration_config()
        self._attached.restore()
        return self.bound_model

    @classmethod
    def from_compressor(cls, *args: Any, **kwargs: Any) -> None:
        raise Unsupported(f"{cls.__name__}.from_compressor: make one quantizer for the whole config_list")


class QATQuantizer(_Quantizer):
    """Straight-through training on grids that follow moving averages of the extremes. Jacob et al. 2018.

    `quant_start_step`: for so many steps of the (first) optimizer ranges are only watched.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Iterable[Mapping[str, Any]],
        evaluator: TorchEvaluator,
        quant_start_step: int = 0,
        **options: Any,
    ):
        if not isinstance(quant_start_step, int):
            raise InvalidArgument(f"QATQuantizer: quant_start_step must be a whole number, got {quant_start_step!r}")
        super().__init__(model, config_list, evaluator, start_step=max(quant_start_step, 0), **options)


class _Learned(_Quantizer):
    observer = "minmax"

    learned: ClassVar[tuple[str, ...]] = ()  # numbers that are tensors of one element

    def _describe(self, entry: dict[str, Any], quantizer: Quantizer) -> None:
        if quantizer.axis is None:
            entry |= {name: entry[name].reshape(1) for name in self.learned}


class LsqQuantizer(_Learned):
    """Learned step sizes, which begin at 0.01. Esser et al. 2020."""

    rule = "lsq"
    rule_options: ClassVar = {"init": 0.01, "plain": True}
    learned = ("scale", "tracked_max", "tracked_min")

    def _recipe_of(self, target: str, setting: Setting) -> TensorRecipe:
        # Zero points do not move: 0 for signed and unsigned codes.
        scheme = "symmetric" if setting.signed or target in PARAMETERS else "affine"
        return super()._recipe_of(target, replace(setting, scheme=scheme))


class LsqPlusQuantizer(_Learned):
    """Learned step sizes, which begin at 0.01, and zero points, which begin where the first batch wants them.

    Bhalgat et al. 2020.
    """

    rule = "lsq_plus"
    rule_options: ClassVar = {"init": 0.01, "plain": True}
    learned = ("scale", "zero_point", "tracked_max", "tracked_min")


class DoReFaQuantizer(_Learned):
    """Weights through tanh, outputs clipped to [0, 1]; inputs follow moving averages. Zhou et al. 2016.

    Where an output is not rounded, its gradient is: to as many bits as the weight has.
    """

    rule = "dorefa"
    rounds_gradients: ClassVar[bool] = True

    def _sites(self, start_step: int) -> dict[str, Site]:
        sites = super()._sites(start_step)
        for path, targets in self.settings.targets.items():
            if self.rounds_gradients and "weight" in targets and "_output_0" not in targets:
                if targets["weight"].bits > 16:
                    raise Unsupported(f"DoReFaQuantizer: {path}: gradients have at most 16 bits, those of the weight")
                sites[path] = replace(sites[path], gradient_bits=targets["weight"].bits)
        return sites

    def _recipe_of(self, target: str, setting: Setting) -> TensorRecipe:
        if target.startswith("_input_"):
            return TensorRecipe(setting.spec(False), "moving_average")
        return super()._recipe_of(target, setting)

    def _describe(self, entry: dict[str, Any], quantizer: Quantizer) -> None:
        """NNI describes weights on [0, 1], before they are spread to [-1, 1]."""
        if quantizer.is_weight:
            lowest = torch.full_like(entry["scale"], Grid.of(quantizer).lowest)
            ends = {"tracked_max": torch.tensor(1.0), "tracked_min": torch.tensor(0.0)}
            entry |= {"scale": entry["scale"] / 2, "zero_point": lowest, **ends}


class BNNQuantizer(_Learned):
    """Signs. Courbariaux et al. 2016. Weights are kept in [-1, 1] after each step of the optimizer."""

    rule = "bnn"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for optimizer in self.evaluator.optimizers:
            self.attached.after_step(optimizer, self.attached.limit_parameters)


class PtqQuantizer(_Quantizer):
    """Grids for the extremes of all that passes until `compress` has run `evaluating_func`."""

    observer = "minmax"
    trained = False

    def __init__(self, *args: Any, is_bias_correction: bool = False, **kwargs: Any):
        if is_bias_correction:
            raise Unsupported('PtqQuantizer: is_bias_correction: take qkernels.prepare(..., corrections="bias")')
        super().__init__(*args, **kwargs)

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Calibration]:
        """Runs `evaluating_func` once, in float, and chooses the grids.

        As in NNI the limits have no effect: `evaluating_func` decides how much data it shows.
        """
        attached = self.attached
        self.evaluator.evaluate(self.bound_model)
        attached.settle()
        return self.bound_model, self.get_calibration_config()
