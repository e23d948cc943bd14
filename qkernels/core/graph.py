"""From a module to a plain graph: tracing, checked on an example, and clean-up before quantization."""

import copy
import inspect
import operator
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qkernels.core.buffers import buffers_kept, buffers_watched
from qkernels.core.in_place import drop_in_place, is_write
from qkernels.core.operations import BATCH_NORMS, CONVS, DROPOUTS, Value, is_dtype, operation
from qkernels.core.plain import has_hooks
from qkernels.core.tracing import Tracer
from qkernels.core.weighted_calls import call_module, free_name, modules_from_calls
from qkernels.errors import InvalidArgument, InvalidType


class Untraceable(Exception):
    """The module has no faithful static graph; the message says why."""


# --- tracing ---------------------------------------------------------------------------------------------------------


def arguments(example_inputs: Any) -> tuple[tuple, dict]:
    """`example_inputs` as (args, kwargs): a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if example_inputs is None:
        raise InvalidType(
            "inputs must be a tensor, a tuple or list of arguments or a dict of keyword arguments, got None"
        )
    example_inputs = _detached(example_inputs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def batch_arguments(model: nn.Module, batch: Any) -> tuple[tuple, dict]:
    """A batch as `arguments` gives it, which the forward of `model` takes."""
    args, kwargs = arguments(batch)
    hint = "if the batches of a loader hold labels too, pass the inputs alone: `(images for images, _ in loader)`"
    _signature(model, args, kwargs, f"a batch of {len(args) + len(kwargs)} arguments does", hint)
    return args, kwargs


def _detached(value: Any) -> Any:
    """The same, its tensors without history, so that they can be copied."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) is dict:
        return {k: _detached(v) for k, v in value.items()}
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value


class _Tracer(Tracer):
    """Does not enter modules that say `traced_as_leaf`; `hooked` are the paths of those with hooks that it entered.

    `refused` says what it could not follow: forward may catch the error, and go on along one of its branches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hooked: list[str] = []
        self.refused: str | None = None

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refused = f"its forward branches on {obj.node.name}"
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Any:
        self.refused = f"its forward iterates over {obj.node.name}"
        return super().iter(obj)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return getattr(m, "traced_as_leaf", False) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if not self.is_elsewhere and has_hooks(m):
            path = self.path_of_module(m)
            if not self.is_leaf_module(m, path):
                self.hooked.append(path)
        return super().call_module(m, forward, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        """Also of kinds of dict: fx would make a dict of them."""
        if not isinstance(a, dict) or type(a) is dict:
            return super().create_arg(a)
        items = super().create_arg(dict(a))
        args, kwargs = ((), items) if is_dataclass(a) else ((items,), {})
        return self.create_node("call_function", type(a), args, kwargs)


def trace(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """The graph of `model` in eval mode, checked on the example.

    Node names depend only on the model and the kinds of arguments: tracing the same float model again gives the same
    names, which is how reports find the float counterpart of a converted layer (`meta["sources"]` of the latter).
    Every node gets `meta["value"]` (a `Value`), `meta["path"]` and `meta["types"]`.

    Raises:
        Untraceable: the forward cannot be captured, or the captured graph gives other outputs on the example.
    """
    kwargs = dict(kwargs or {})
    bound = bind(model, args, kwargs)
    with buffers_kept(model):
        traced = _captured(model, bound, bind(model, args, kwargs, defaults=False))
        with torch.no_grad():
            with buffers_watched(model) as written:
                expected = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            if written:
                raise Untraceable(f"its forward writes to {', '.join(written)}")
            got = traced(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    if not close(expected, got, 1e-5) or not _same_containers(expected, got):
        raise Untraceable("the captured graph gives other outputs on the example inputs than the module")
    return traced


def _captured(model: nn.Module, bound: Mapping[str, Any], given: Mapping[str, Any]) -> fx.GraphModule:
    """The graph of a call with the arguments `bound`, of which the caller gave `given`."""
    constants = {name: value for name, value in bound.items() if not _holds_tensor(value)}
    tracer = _Tracer()
    try:
        graph = tracer.trace(model, concrete_args=constants)
        if tracer.refused is not None:
            raise Untraceable(f"{tracer.refused}, and goes on where that fails")
        if type(graph._codegen) is not fx.graph.CodeGen:
            fixed = next(name for name, value in constants.items() if isinstance(value, (tuple, list, dict)))
            raise Untraceable(f"its argument {fixed!r} is a {type(constants[fixed]).__name__} that holds no tensor")
        _tidy_constants(graph, list(bound), given, constants)
        _drop_variadic(graph)
        traced = fx.GraphModule(model, graph, type(model).__name__)
        _locate(traced)
        inputs = graph.find_nodes(op="placeholder")
        record_values(traced, [bound[node.target] for node in inputs])
    except Untraceable:
        raise
    except Exception as error:  # forward is foreign code: whatever stops it under tracing means "no static graph"
        raise Untraceable(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        ) from error
    traced.meta["hooked"] = [*([""] if has_hooks(model) else []), *tracer.hooked]
    return traced


def _signature(
    model: nn.Module, args: tuple, kwargs: dict, what: str, hint: str = ""
) -> tuple[inspect.Signature, inspect.BoundArguments]:
    """The parameters of forward, and what they are in this call."""
    signature = inspect.signature(model.forward)
    try:
        return signature, signature.bind(*args, **kwargs)
    except TypeError as error:
        text = f"{what} not fit forward{signature} of {type(model).__name__}: {error}"
        raise InvalidArgument(f"{text}; {hint}" if hint else text) from error


def bind(model: nn.Module, args: tuple, kwargs: dict, defaults: bool = True) -> dict[str, Any]:
    """The parameters of forward with their values in this call; with `defaults` also those left out."""
    signature, bound = _signature(model, args, kwargs, "example_inputs do")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(signature.parameters[name].kind in variadic for name in bound.arguments):
        raise Untraceable(f"forward{signature} takes a variable number of arguments")
    if defaults:
        bound.apply_defaults()
    return {name: v for name, v in bound.arguments.items() if signature.parameters[name].kind not in variadic}


def _tidy_constants(graph: fx.Graph, names: list[str], given: Collection[str], constants: Collection[str]) -> None:
    """An argument that is no tensor is fixed in the graph. One left out by the example cannot be given any more; one
    given must stay the same, and an assertion in the graph says so. `names` are all arguments, in order.
    """
    for name, node in zip(names, graph.find_nodes(op="placeholder"), strict=False):
        if name not in constants:
            continue
        node.target = name  # fx adds a number, which may make it the name of another one
        if name not in given:
            for user in _readers(node):
                graph.erase_node(user)
            graph.erase_node(node)
            continue
        for check in list(node.users):
            if getattr(check.target, "__name__", "") == "_assert_is_none":
                with graph.inserting_before(check):
                    is_none = graph.call_function(operator.is_, (node, None))
                is_none.meta = dict(check.meta)
                check.target, check.args = torch._assert, (is_none, check.args[1])


def _drop_variadic(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="placeholder"):
        if node.target.startswith("*"):
            if node.users:
                raise Untraceable("its forward reads a variable number of arguments")
            graph.erase_node(node)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Everything computed from the node, last first. For a fixed argument that is only the check of its value."""
    found: list[fx.Node] = []
    for user in node.users:
        found += [*_readers(user), user]
    return found


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(v) for v in value.values())
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, Tensor)


def _without_tensors(value: Any) -> Any:
    """What two values have in common that one graph takes, as something to compare."""
    if isinstance(value, Mapping):
        return {k: _without_tensors(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_without_tensors(v) for v in value]
    if isinstance(value, Tensor):
        return Tensor
    return value if isinstance(value, (int, float, str, type(None))) else type(value)


def _locate(traced: fx.GraphModule) -> None:
    """Gives every node the path and types of the module it stands for or lies in."""
    for node in traced.graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        scope = [(path, kind) for path, kind in stack if path]
        path, types = (scope[-1][0] if scope else ""), [kind for _, kind in reversed(scope)]
        if node.op == "call_module":
            path, types = node.target, [type(traced.get_submodule(node.target)), *types]
        elif node.op == "placeholder":
            path = node.target
        else:
            path = f"{path}.{node.name}" if path else node.name
        node.meta["origin"] = node.name
        node.meta["path"] = path
        node.meta["types"] = tuple(dict.fromkeys(types))


class _Recorder(fx.Interpreter):
    extra_traceback = False  # it would go into the reasons

    def run_node(self, node: fx.Node) -> Any:
        before = {source: _versions(self.env[source]) for source in node.all_input_nodes}
        result = super().run_node(node)
        node.meta["value"] = Value.of(result)
        changed = next((s for s, versions in before.items() if _versions(self.env[s]) != versions), None)
        if changed is not None and not is_write(node):
            raise Untraceable(f"{node.name} writes in place to {changed.name}, which its name does not say")
        return result


def _versions(value: Any) -> list[int]:
    """Numbers that change when a tensor in the value is written to; tensors of inference mode have none."""
    return [t._version for t in tree_leaves(value) if isinstance(t, Tensor) and not t.is_inference()]


def record_values(traced: fx.GraphModule, arguments: list) -> None:
    """Runs the example and notes what every node gave.

    Raises:
        Untraceable: something writes in place that is not known to.
    """
    with torch.inference_mode(False), torch.no_grad():
        _Recorder(traced).run(*copy.deepcopy(arguments))


def close(expected: Any, got: Any, tolerance: float) -> bool:
    """Whether two outputs have the same structure and nearly the same numbers, relative to the largest."""
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor) or expected.shape != got.shape or expected.dtype != got.dtype:
            return False
        if not expected.is_floating_point() or expected.numel() == 0:
            return torch.equal(expected, got)
        finite = expected[torch.isfinite(expected)]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        return torch.allclose(expected, got, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
    if isinstance(expected, Mapping):
        return isinstance(got, Mapping) and expected.keys() == got.keys() and all(
            close(expected[k], got[k], tolerance) for k in expected
        )  # fmt: skip
    if isinstance(expected, (tuple, list)):
        return isinstance(got, (tuple, list)) and len(got) == len(expected) and all(
            close(e, g, tolerance) for e, g in zip(expected, got, strict=True)
        )  # fmt: skip
    if isinstance(expected, float) and expected != expected:
        return isinstance(got, float) and got != got
    return expected == got if isinstance(expected, (int, float, str, bool, type(None))) else True


def _same_containers(expected: Any, got: Any) -> bool:
    """Whether two outputs of the same structure are built of the same kinds of dicts and dataclasses."""
    if isinstance(expected, Mapping):
        return type(expected) is type(got) and all(_same_containers(expected[k], got[k]) for k in expected)
    if is_dataclass(expected):
        mine, other = ([getattr(v, field.name, None) for field in fields(expected)] for v in (expected, got))
        return type(expected) is type(got) and close(mine, other, 1e-5) and _same_containers(mine, other)
    if isinstance(expected, (tuple, list)):
        return all(map(_same_containers, expected, got))
    return True


def modules_of(graph_module: fx.GraphModule) -> dict[str, nn.Module]:
    return dict(graph_module.named_modules(remove_duplicate=False))


# --- clean-up --------------------------------------------------------------------------------------------------------


def simplify(traced: fx.GraphModule, keep_dropout: bool = False) -> None:
    """Makes the graph plain: nothing in place, no dropout or identity, weights inside modules, one call a module.

    With `keep_dropout`, for training, dropouts stay, as modules.

    Raises:
        Untraceable: what the module does cannot be said by such a graph.
    """
    positional_inputs(traced)
    _plain_max_pools(traced)
    _reshapes_for_views(traced)
    if reason := drop_in_place(traced):
        raise Untraceable(reason)
    _drop_identities(traced, keep_dropout)
    modules_from_calls(traced, modules_of(traced))
    _one_call_a_module(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def refuse_hooks(traced: fx.GraphModule) -> None:
    """Raises Untraceable if modules that the graph takes apart have forward hooks, which it would not run."""
    if hooked := traced.meta["hooked"]:
        paths = ", ".join(repr(path) if path else "the module itself" for path in dict.fromkeys(hooked))
        raise Untraceable(f"a graph would not run the forward hooks of {paths}")


def positional_inputs(traced: fx.GraphModule) -> None:
    """`layer(input=x)` becomes `layer(x)`."""
    for node in traced.graph.nodes:
        if node.op == "call_module" and not node.args and node.kwargs.keys() == {"input"}:
            node.args, node.kwargs = (node.kwargs["input"],), {}


def _plain_max_pools(traced: fx.GraphModule) -> None:
    """F.max_pool*, which choose by return_indices and cannot be pickled, become the torch functions they end in."""
    plain = {F.max_pool1d: torch.max_pool1d, F.max_pool2d: torch.max_pool2d, F.max_pool3d: torch.max_pool3d}
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target in plain and not node.kwargs.get("return_indices", False):
            node.target = plain[node.target]
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "return_indices" and v is not None}


def _reshapes_for_views(traced: fx.GraphModule) -> None:
    """`x.view(sizes)` becomes `x.reshape(sizes)`: integer layers store images channels-last, where floats may not."""
    for node in traced.graph.nodes:
        is_view = node.op == "call_method" and node.target in ("view", "view_as") and not node.kwargs
        if is_view and not any(map(is_dtype, node.args)):
            node.target = node.target.replace("view", "reshape")


def _drop_identities(traced: fx.GraphModule, keep_dropout: bool) -> None:
    modules = modules_of(traced)
    left_out: list[str] = []
    for node in list(traced.graph.nodes):
        op = operation(node, modules)
        if node.op == "call_module" and has_hooks(modules[node.target]):
            continue
        if keep_dropout and op is not None and op.kind == "dropout" and _as_dropout_module(traced, node, op):
            continue
        skippable = node.op == "call_function" and getattr(node.target, "__name__", "") == "stochastic_depth"
        if op is not None and op.kind in ("identity", "dropout") and op.options.get("training", False) is not True:
            if "training" not in op.options and node.target in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
                continue  # these drop by default, also in eval mode
            source = op.inputs[0]
        elif skippable and node.kwargs.get("training", node.args[3] if len(node.args) > 3 else True) is False:
            source = node.args[0]
            left_out.append(node.meta["path"])
        elif keep_dropout and node.target is F.rrelu:
            _as_random_relu_module(traced, node)
            continue
        else:
            if op is None and node.op == "call_function" and node.kwargs.get("training") is False:
                left_out.append(node.meta["path"])
            continue
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    if keep_dropout and left_out:
        warnings.warn(
            f"prepare_qat: {', '.join(left_out[:3])} was captured with training=False and does in training what it "
            "does in eval mode; torch.nn.Dropout and its kind stay random",
            stacklevel=2,
        )


def _as_random_relu_module(traced: fx.GraphModule, node: fx.Node) -> None:
    """F.rrelu that was off in eval mode is random again in training."""
    given = inspect.signature(F.rrelu).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    x, lower, upper, training, _ = given.args
    if training is False:
        call_module(traced, node, nn.RReLU(lower, upper), (x,))


def _as_dropout_module(traced: fx.GraphModule, node: fx.Node, op: Any) -> bool:
    """Whether this is a dropout that training needs; a call that was off in eval mode becomes a module."""
    if node.op == "call_module":
        return op.module.p > 0
    if op.options.get("training") is not False:
        return False
    call_module(traced, node, DROPOUTS[node.target](op.options.get("p", 0.5)), op.inputs)
    return True


def _one_call_a_module(traced: fx.GraphModule) -> None:
    """A weighted module called several times becomes one module a call, all with the same Parameters."""
    modules = modules_of(traced)
    calls: dict[int, int] = {}
    for node in traced.graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) not in (*CONVS, *BATCH_NORMS, nn.Linear):
            continue
        module = modules[node.target]
        count = calls[id(module)] = calls.get(id(module), 0) + 1
        if count > 1:
            parent, _, leaf = node.target.rpartition(".")
            owner = traced.get_submodule(parent)
            leaf = free_name(owner, f"{leaf}_call{count}")
            owner.add_module(leaf, share(module))
            node.target = f"{parent}.{leaf}" if parent else leaf


def share(module: nn.Module) -> nn.Module:
    """A second module object with the same Parameters and buffers."""
    twin = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[table] = dict(module.__dict__[table])
    return twin


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` where `path` is."""
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


class NetworkGraph(fx.GraphModule):
    """A graph module with a report in `meta`, and with the plain attributes of the module that it replaces."""

    @property
    def report(self) -> Any:
        """What became integer, what stayed float, and why."""
        return self.meta["report"]

    def adopt(self, attributes: Mapping[str, Any]) -> None:
        """Takes over numbers and strings of the float module, for code around this one that reads them."""
        self.meta["attributes"] = dict(attributes)
        for name, value in attributes.items():
            if not hasattr(self, name):
                setattr(self, name, value)

    def __deepcopy__(self, memo: dict) -> "NetworkGraph":
        copied = super().__deepcopy__(memo)
        copied.adopt(copied.meta.get("attributes", {}))
        return copied

    def __reduce__(self) -> tuple:
        """Pickles the graph itself: fx would trace again, and lose what `meta` knows."""
        state = {name: value for name, value in self.__dict__.items() if name != "_graph"}
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        for copied, node in zip(graph.nodes, self.graph.nodes, strict=True):
            copied.meta = node.meta
        return _rebuilt, (type(self).__mro__[1], type(self).__name__, state, graph)


def _rebuilt(cls: type[NetworkGraph], name: str, state: dict, graph: fx.Graph) -> NetworkGraph:
    root = nn.Module()
    root.__dict__.update(state)
    network = cls(root, graph, name)
    network.meta = state["meta"]
    network.adopt(network.meta.get("attributes", {}))
    return network


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    plain = (int, float, str, bool, tuple, type(None))
    return {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k != "training" and type(v) in plain}


def first_calls(model: nn.Module, args: tuple, kwargs: dict) -> dict[int, tuple[tuple, dict]]:
    """The arguments of the first call of every submodule, by the id of the module."""
    return {module: calls[0] for module, calls in distinct_calls(model, args, kwargs).items()}


def distinct_calls(model: nn.Module, args: tuple, kwargs: dict) -> dict[int, list[tuple[tuple, dict]]]:
    """The arguments of every submodule, by the id of the module: of its first call, and of those that one graph does
    not take as well, for they give other parameters or other values that are no tensors.
    """
    calls: dict[int, list[tuple[tuple, dict]]] = {}
    known: dict[int, list[Any]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        _, bound = _signature(module, args, kwargs, "its arguments do")
        given = _without_tensors(dict(bound.arguments))
        if given not in known.setdefault(id(module), []):
            known[id(module)].append(given)
            calls.setdefault(id(module), []).append((copy.deepcopy(args), copy.deepcopy(kwargs)))

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules() if m is not model]
    try:
        with buffers_kept(model):
            model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    return calls
