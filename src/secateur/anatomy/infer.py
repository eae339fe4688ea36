"""An anatomy for a decoder without a family file: looked up in the model, verified by running it, or refused.

Single weights can be pruned knowing nothing but where the matrices are and which of them read the same
tensor. Both can be seen: the matrices are the `nn.Linear` and `Conv1D` modules of the repeated block, and a
forward on the meta device shows the inputs. Whatever could make this reading wrong is refused, saying why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.anatomy.look import blocks_of, look_at
from secateur.anatomy.model import Anatomy, Axis, Block, Matrix, Segment, Shape, Site
from secateur.anatomy.outline import Outline
from secateur.anatomy.refusal import no_family
from secateur.anatomy.template import Template
from secateur.anatomy.trace import Trace, trace
from secateur.core.errors import AnatomyError

__all__ = ["infer"]

LEAST_COVERAGE = 0.5
"""Share of a block's parameters that must lie in matrices, or most of the model is something else."""


def infer(config: PretrainedConfig, model: PreTrainedModel) -> Anatomy:
    """The anatomy of a decoder that no family file describes.

    Args:
        config: of the model.
        model: of this config, on any device; its values are not looked at.

    Raises:
        AnatomyError: encoders, blocks that cannot be told, share parameters or run more than once, experts in
            3-D parameters, matrices outside the blocks, or a model that does not run on the meta device.
    """
    path = _blocks_path(config, model)
    seen, blocks = look_at(model, path), blocks_of(model, path)
    _check_causal(config, blocks)
    _check_outer(config, model, seen, path)
    ran = trace(config, path)
    return Anatomy(
        family="inferred",
        model_type=config.model_type,
        blocks_path=path,
        base_prefix=seen.base_prefix,
        blocks=tuple(_blocks(config, blocks, seen, ran, path)),
        outer=seen.outer,
        embedding=seen.embedding,
        norm=ran.last_norm,
        head=seen.head,
        tied=seen.tied,
        spaces={"layers": len(blocks)},
        keys={"layers": config.attribute_map.get("num_hidden_layers", "num_hidden_layers")},
        inferred=True,
    )


def _blocks_path(config: PretrainedConfig, model: PreTrainedModel) -> str:
    """The one outermost list of `num_hidden_layers` modules of one class."""
    count = getattr(config, "num_hidden_layers", None)
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and len(module) == count:
            found += [path] if len(set(map(type, module))) == 1 else []
    if len(found) != 1:
        places = f"it has several: {', '.join(found)}" if found else "it has none"
        raise no_family(config, places, f"one list of {count} blocks of one class")
    return found[0]


def _check_causal(config: PretrainedConfig, blocks: list[nn.Module]) -> None:
    """Encoders can be loaded as causal language models too, and run without a word."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    written = config.architectures or []
    modules = (module for block in blocks for module in block.modules())
    both_ways = next((module for module in modules if getattr(module, "is_causal", None) is False), None)
    if written and known not in written:
        why = f"its files are of a {written[0]}"
    elif not written and getattr(config, "is_decoder", None) is False:
        why = "its config says is_decoder: false"
    elif both_ways is not None:
        why = f"its {type(both_ways).__name__} looks both ways"
    else:
        return
    raise AnatomyError(
        f"{config.model_type!r} is not known to be a decoder: {why}",
        f"a {known} whose tokens see only what came before",
        "only causal language models can be pruned",
    )


def _check_outer(config: PretrainedConfig, model: PreTrainedModel, seen: Outline, path: str) -> None:
    for name, module in model.named_modules():
        if _is_matrix(module) and name != seen.head and not name.startswith(path + "."):
            raise no_family(config, f"{name} is a matrix outside its blocks", "none but the head")


def _blocks(
    config: PretrainedConfig, blocks: list[nn.Module], seen: Outline, ran: Trace, path: str
) -> Iterator[Block]:
    made: dict[object, Template] = {}
    for index, (module, shapes) in enumerate(zip(blocks, seen.shapes, strict=True)):
        sites = _sites(config, module, f"{path}.{index}", ran)
        alike = (frozenset(shapes.items()), frozenset(sites.items()))
        if alike not in made:
            _check_parameters(config, module, shapes, sites)
            made[alike] = _template(module, shapes, sites)
        yield made[alike].block(path, index)


def _template(block: nn.Module, shapes: dict[str, Shape], sites: Mapping[str, str]) -> Template:
    return Template(
        matrices=tuple(_matrix(block, name, shapes, site) for name, site in sites.items()),
        sites={site: Site(site, site, "input") for site in dict.fromkeys(sites.values())},
        axes={name: tuple(map(_plain, shape)) for name, shape in shapes.items()},
        shapes=shapes,
    )


def _sites(config: PretrainedConfig, block: nn.Module, prefix: str, ran: Trace) -> dict[str, str]:
    """Matrix -> the first matrix of the block that read the same tensor."""
    first: dict[object, str] = {}
    sites: dict[str, str] = {}
    for name, module in block.named_modules():
        if not _is_matrix(module):
            continue
        inputs = ran.inputs.get(f"{prefix}.{name}", [])
        if len(inputs) != 1:
            raise no_family(config, f"{prefix}.{name} ran {len(inputs)} times in one forward", "once")
        sites[name] = first.setdefault(inputs[0], name)
    return sites


def _check_parameters(
    config: PretrainedConfig, block: nn.Module, shapes: Mapping[str, Shape], matrices: Mapping[str, str]
) -> None:
    """Refuse experts in one parameter, and blocks that consist of something else than matrices."""
    covered = total = 0
    for name, shape in shapes.items():
        path = name.rpartition(".")[0]
        size = torch.Size(shape).numel()
        total += size
        covered += size if path in matrices else 0
        if len(shape) > 2 and not isinstance(block.get_submodule(path), nn.modules.conv._ConvNd):
            raise no_family(
                config, f"{name} of shape {shape} may hold experts", "matrices in nn.Linear modules"
            )
    if covered < LEAST_COVERAGE * total:
        raise no_family(
            config,
            f"only {covered:,} of {total:,} parameters of a block are in nn.Linear modules",
            "most of them",
        )


def _matrix(block: nn.Module, name: str, shapes: Mapping[str, Shape], site: str) -> Matrix:
    transposed = isinstance(block.get_submodule(name), Conv1D)
    rows, columns = map(_plain, shapes[f"{name}.weight"])
    if transposed:
        rows, columns = columns, rows
    return Matrix(name, f"{name}.weight", None, transposed, rows, columns, site)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _plain(size: int) -> Axis:
    """An axis about which nothing is known but its size."""
    return Axis((Segment(None, size, 1),))
