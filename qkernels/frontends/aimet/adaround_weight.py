"""Adaround.apply_adaround: a float model whose weights lie on grids, each rounded as the outputs of its layer want."""

import copy
import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from qkernels.core.adaround import FIRST_BETA, LAST_BETA, rounded_weights
from qkernels.core.corrections import AdaRound
from qkernels.core.operations import CONVS
from qkernels.core.phases import run_batch
from qkernels.errors import InvalidArgument, Unsupported
from qkernels.frontends.aimet.quantizers import compute_encodings, is_quantized
from qkernels.frontends.aimet.quantsim import QuantizationSimModel


class AdaroundParameters:
    """`num_batches` of `data_loader`, and how each layer learns; without iterations 10,000, or 15,000 below 8 bits."""

    def __init__(
        self,
        data_loader: Iterable[Any],
        num_batches: int,
        default_num_iterations: int | None = None,
        default_reg_param: float = 0.01,
        default_beta_range: tuple = (FIRST_BETA, LAST_BETA),
        default_warm_start: float = 0.2,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    ):
        if tuple(default_beta_range) != (FIRST_BETA, LAST_BETA):
            raise Unsupported(f"AdaroundParameters: default_beta_range is (20, 2), got {default_beta_range!r}")
        if hasattr(data_loader, "__len__") and len(data_loader) < num_batches:
            raise InvalidArgument(f"AdaroundParameters: num_batches is {num_batches}, but there are {len(data_loader)}")
        self.data_loader, self.num_batches, self.forward_fn = data_loader, num_batches, forward_fn or run_batch
        self.num_iterations, self.regularization = default_num_iterations, default_reg_param
        self.warm_start = default_warm_start


class Adaround:
    """The verb, as a class method."""

    @classmethod
    def apply_adaround(
        cls,
        model: nn.Module,
        dummy_input: Any,
        params: AdaroundParameters,
        path: str,
        filename_prefix: str,
        default_param_bw: int = 4,
        param_bw_override_list: Iterable[tuple[nn.Module, int]] | None = None,
        ignore_quant_ops_list: Iterable[nn.Module] | None = None,
        default_quant_scheme: Any = "tf_enhanced",
        default_config_file: Any = None,
    ) -> nn.Module:
        """A copy of `model` with rounded weights; `<path>/<filename_prefix>.encodings` gets their grids, for
        `set_and_freeze_param_encodings`.
        """
        how = {"default_param_bw": default_param_bw, "config_file": default_config_file}
        sim = QuantizationSimModel(model, dummy_input, default_quant_scheme, **how)
        paths = {module: name for name, module in model.named_modules()}
        for _, module in sim.named_qmodules():
            for table in (module.input_quantizers, module.output_quantizers):
                for i in range(len(table)):
                    table[i] = None
        for module, bits in param_bw_override_list or ():
            layer = sim.model.get_submodule(_path(paths, module))
            if not is_quantized(layer) or dict(layer.param_quantizers).get("weight") is None:
                raise InvalidArgument(f"apply_adaround: param_bw_override_list: {module} has no weight with a grid")
            layer.param_quantizers["weight"].bitwidth = bits
        left_out = [sim.model.get_submodule(_path(paths, module)) for module in ignore_quant_ops_list or ()]
        left_out += [module for module in sim.qmodules() if not isinstance(module, (*CONVS, nn.Linear))]
        sim.exclude_layers_from_quantization(left_out)
        rounded, found = copy.deepcopy(model), list(sim.quantizers())
        if found:
            with compute_encodings(sim.model):
                pass  # weights get their grids at once
            steps = params.num_iterations or (15000 if min(q.bitwidth for q in found) < 8 else 10000)
            how = {"steps": steps, "regularization": params.regularization, "warm_start": params.warm_start}
            batches = islice(params.data_loader, params.num_batches)
            weights = rounded_weights(sim.prepared(), batches, params.forward_fn, lambda count: AdaRound(count, **how))
            rounded.load_state_dict(weights, strict=False)
        table = sim.module_encodings()["param_encodings"]
        content = {"param_encodings": {name: rows for name, rows in table.items() if name.endswith(".weight")}}
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / f"{filename_prefix}.encodings").write_text(json.dumps(content, indent=4, sort_keys=True))
        return rounded


def _path(paths: dict[nn.Module, str], module: nn.Module) -> str:
    if module not in paths:
        raise InvalidArgument(f"apply_adaround: the model has no such module: {module}")
    return paths[module]
