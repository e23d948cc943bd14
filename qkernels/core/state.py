"""Converted models on disk: one safetensors file, no pickle, every bit covered by a checksum.

The tensors are canonical (int8 weights, grids, bias, tables), so a file written on one machine runs on any other. The
structure is JSON in the safetensors metadata:

    qkernels   format version
    content    {"model": see `qkernels.core.structure`, "tensor_sha256": name -> digest of the tensor's bytes}
    sha256     digest of the whole file, taken with this field set to zeros

Any safetensors reader can list the tensors.
"""

import hashlib
import json
import os
import struct
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from qkernels.core.expect import expect_module
from qkernels.core.files import file_path, write_atomically
from qkernels.core.quantizer import Quantizer
from qkernels.core.structure import build, describe
from qkernels.errors import CheckpointError, InvalidArgument, Unsupported

FORMAT_VERSION = "1"
_ZERO_DIGEST = "0" * 64
_DIGEST_FIELD = b'"sha256":"'


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes a converted model to `path`, atomically: the file there is the old one or the new one, never a part.

    A model that could not be traced as a whole is written too, without its Python code: `load(path, skeleton=model)`
    then needs an instance of the original class.

    Args:
        model: what `convert` returned; float modules of torch.nn in it, or a model of them alone, are written as they
            are.
        path: the file.

    Raises:
        InvalidType, InvalidArgument: this is no module, or one that is prepared but not converted.
        Unsupported: the graph holds a function or a module that cannot be described in JSON, or a part is a plan; the
            message names it.
    """
    expect_module("save", model)
    path = file_path("save", path)
    for name, module in model.named_modules():
        if getattr(module, "saves_itself", False):
            raise Unsupported(f"save: {name or 'the model'} is a plan, whose file plan.save(path) writes")
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise InvalidArgument("save: the model is prepared, not converted: call qkernels.convert(prepared) first")
    tensors = {name: t.detach().contiguous().cpu().clone() for name, t in model.state_dict().items()}
    content = {
        "model": describe(model),
        "tensor_sha256": {name: _digest(t) for name, t in tensors.items()},
    }
    metadata = {"qkernels": FORMAT_VERSION, "content": json.dumps(content, allow_nan=False), "sha256": _ZERO_DIGEST}
    blob = bytearray(safetensors.torch.save(tensors, metadata))
    at = _digest_position(blob)
    blob[at : at + 64] = hashlib.sha256(blob).hexdigest().encode()
    write_atomically(path, blob)


def load(path: str | os.PathLike, skeleton: nn.Module | None = None) -> nn.Module:
    """Reads a model that `save` wrote.

    Args:
        path: the file.
        skeleton: needed only for a model that could not be traced as a whole, and not looked at otherwise: an instance
            of the float model, whose Python code is used (it is copied, not changed).

    Raises:
        InvalidType: the path is none, or the skeleton no module.
        CheckpointError: the file is truncated, damaged in any bit, not a qkernels file, or of another format version.
        InvalidArgument: a skeleton is needed, or does not fit.
    """
    path = file_path("load", path)
    if skeleton is not None:
        expect_module("load", skeleton, "skeleton")
    blob = bytearray(path.read_bytes())
    content = _checked_content(blob, path)
    tensors = safetensors.torch.load(bytes(blob))
    try:
        model = build(content["model"], tensors, skeleton)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"load: {path}: malformed model description ({error!r})") from error
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise CheckpointError(f"load: {path}: tensors {missing + unexpected} do not match the model description")
    return model.eval()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()


def _header_end(blob: bytearray) -> int | None:
    """The end of the safetensors header, or None if its length is impossible."""
    if len(blob) < 8:
        return None
    (length,) = struct.unpack_from("<Q", blob)
    return 8 + length if length <= len(blob) - 8 else None


def _digest_position(blob: bytearray) -> int:
    """Where the hexadecimal file digest stands, or -1."""
    end = _header_end(blob)
    at = -1 if end is None else blob.find(_DIGEST_FIELD, 8, end)
    return -1 if at < 0 or at + len(_DIGEST_FIELD) + 64 > len(blob) else at + len(_DIGEST_FIELD)


def _checked_content(blob: bytearray, path: Any) -> dict[str, Any]:
    """The description in the header, after the digest of the whole file has been found right."""
    at = _digest_position(blob)
    if at < 0:
        raise CheckpointError(f"load: {path} is not a qkernels model, or is truncated ({len(blob)} bytes)")
    stated = bytes(blob[at : at + 64])
    blob[at : at + 64] = _ZERO_DIGEST.encode()
    if hashlib.sha256(blob).hexdigest().encode() != stated:
        raise CheckpointError(f"load: {path} is damaged: {_what_is_damaged(blob)}. Restore it from a good copy")
    metadata = json.loads(blob[8 : _header_end(blob)])["__metadata__"]
    if metadata.get("qkernels") != FORMAT_VERSION:
        raise CheckpointError(
            f"load: {path} has format version {metadata.get('qkernels')!r}; this qkernels reads {FORMAT_VERSION!r}"
        )
    return json.loads(metadata["content"])


def _what_is_damaged(blob: bytearray) -> str:
    """The first tensor whose bytes are wrong, if the header can still be read."""
    end = _header_end(blob)
    try:
        header = json.loads(bytes(blob[8:end]))
        digests = json.loads(header["__metadata__"]["content"])["tensor_sha256"]
        for name, digest in digests.items():
            start, stop = header[name]["data_offsets"]
            if hashlib.sha256(blob[end + start : end + stop]).hexdigest() != digest:
                return f"tensor {name!r} fails its checksum"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "the header fails its checksum"
    return "the file fails its checksum"
