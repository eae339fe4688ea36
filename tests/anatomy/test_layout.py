"""Names and shapes on disk against those in memory, on files as `save_pretrained` and the hub have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES, UNLISTED, save_tiny, tiny_model
from torch import Tensor

from anatomy.files import assert_bijection, assert_same_model, layout_of, load_by_layout, pick, read_folder
from secateur.anatomy.layout import FileLayout
from secateur.anatomy.resolve import resolve
from secateur.core.errors import CheckpointError

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")
PREFIXES = {
    "gpt2": "transformer.",
    "opt": "model.",
    "llama": "model.",
    "gpt_neox": "gpt_neox.",
    "mixtral": "model.",
}


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_files_of_every_family(family: str, tmp_path: Path) -> None:
    config, tensors = read_folder(save_tiny(family, tmp_path))
    assert_bijection(config, tensors, untouched=set())
    assert_same_model(load_by_layout(config, tensors), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_files_in_bfloat16(family: str, tmp_path: Path) -> None:
    config, tensors = read_folder(save_tiny(family, tmp_path, dtype=torch.bfloat16))
    assert_bijection(config, tensors, untouched=set())
    assert_same_model(load_by_layout(config, tensors), tmp_path)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("llama", {"mlp_bias": True}),
    ],
)
def test_files_of_unusual_members(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config, tensors = read_folder(save_tiny(family, tmp_path, max_shard_size="100KB", **changes))
    assert_bijection(config, tensors, untouched=set())
    assert_same_model(load_by_layout(config, tensors), tmp_path)


@pytest.mark.parametrize("model", ["tales-moe", "stories260k"])
def test_files_of_trained_models(model: str, shared: Path) -> None:
    config, tensors = read_folder(shared / "models" / model)
    assert_bijection(config, tensors, untouched=set())
    assert_same_model(load_by_layout(config, tensors), shared / "models" / model)


@pytest.mark.parametrize("family", PREFIXES)
def test_base_model_files_without_its_prefix(family: str, tmp_path: Path) -> None:
    """As on the hub: `h.0.ln_1.weight` for gpt2, `decoder.layers.0...` for opt."""
    config, tensors = read_folder(save_tiny(family, tmp_path))
    bare = {name.removeprefix(PREFIXES[family]): tensor for name, tensor in tensors.items()}
    assert len(bare) == len(tensors)
    assert bare.keys() != tensors.keys()
    write(bare, tmp_path)
    assert_bijection(config, bare, untouched=set())
    assert_same_model(load_by_layout(config, bare), tmp_path)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_are_fused_on_disk_already(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    model = tiny_model(family)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(tensors, tmp_path)
    assert_bijection(model.config, tensors, untouched=set())
    assert_same_model(load_by_layout(model.config, tensors), tmp_path)


def test_an_expert_lies_on_disk_as_its_own_rows() -> None:
    """Mixtral's w1 is the upper half of gate_up_proj, w3 the lower, w2 is down_proj."""
    model = tiny_model("mixtral")
    anatomy = resolve(model.config, model)
    block = model.get_submodule("model.layers.1")
    shapes: dict[str, tuple[int, ...]] = dict(anatomy.outer)
    for index in range(2):
        prefix = f"model.layers.{index}"
        for name, shape in anatomy.blocks[index].parameters.items():
            if "experts" not in name:
                shapes[f"{prefix}.{name}"] = shape
        for expert in range(4):
            experts = f"{prefix}.block_sparse_moe.experts.{expert}"
            shapes |= {
                f"{experts}.w1.weight": (96, 64),
                f"{experts}.w2.weight": (64, 96),
                f"{experts}.w3.weight": (96, 64),
            }
    stored = FileLayout(anatomy, shapes).disassemble(1, dict(block.named_parameters()))
    fused, down = block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(stored[f"{prefix}.w1.weight"], fused[2, :96])
    assert torch.equal(stored[f"{prefix}.w3.weight"], fused[2, 96:])
    assert torch.equal(stored[f"{prefix}.w2.weight"], down[2])


def test_what_no_module_loads_is_untouched(tmp_path: Path) -> None:
    config, tensors = read_folder(save_tiny("deepseek_v3", tmp_path))
    prediction = {
        f"model.layers.3.{name}": torch.ones(64) for name in ("enorm.weight", "shared_head.norm.weight")
    }
    extra = {**prediction, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert_bijection(config, {**tensors, **extra}, untouched=set(extra))


def test_causal_masks_of_old_gpt2_files_are_untouched(tmp_path: Path) -> None:
    config, tensors = read_folder(save_tiny("gpt2", tmp_path))
    masks = {f"transformer.h.{index}.attn.bias": torch.ones(1, 1, 256, 256) for index in range(2)}
    assert_bijection(config, {**tensors, **masks}, untouched=set(masks))


class TestTiedHead:
    """The head may be in the files or not, whatever the config says about tying."""

    ALIAS, SOURCE = "lm_head.weight", "model.embed_tokens.weight"

    def read(self, folder: Path) -> tuple[Any, dict[str, Tensor]]:
        config, tensors = read_folder(save_tiny("qwen3", folder, tie_word_embeddings=True))
        assert self.ALIAS not in tensors
        return config, tensors

    def test_absent(self, tmp_path: Path) -> None:
        config, tensors = self.read(tmp_path)
        model = load_by_layout(config, tensors)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_present_and_equal(self, tmp_path: Path) -> None:
        config, tensors = self.read(tmp_path)
        both = {**tensors, self.ALIAS: tensors[self.SOURCE].clone()}
        model = load_by_layout(config, both)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert_bijection(config, both, untouched=set())

    def test_present_alone(self, tmp_path: Path) -> None:
        config, tensors = self.read(tmp_path)
        renamed = {self.ALIAS if name == self.SOURCE else name: tensor for name, tensor in tensors.items()}
        write(renamed, tmp_path)
        assert_bijection(config, renamed, untouched=set())
        assert_same_model(load_by_layout(config, renamed), tmp_path)

    def test_present_and_different(self, tmp_path: Path) -> None:
        config, tensors = self.read(tmp_path)
        both = {**tensors, self.ALIAS: tensors[self.SOURCE] + 1}
        write(both, tmp_path)
        assert_same_model(load_by_layout(config, both), tmp_path)

    def test_missing_without_tying(self, tmp_path: Path) -> None:
        config, tensors = self.read(tmp_path)
        config.tie_word_embeddings = False
        with pytest.raises(CheckpointError, match=r"no tensor lm_head\.weight"):
            layout_of(config, tensors)


class TestRefusals:
    def test_missing_tensor(self, tmp_path: Path) -> None:
        config, tensors = read_folder(save_tiny("qwen3_moe", tmp_path))
        missing = "model.layers.1.mlp.experts.2.up_proj.weight"
        del tensors[missing]
        with pytest.raises(CheckpointError, match=f"no tensor {missing}; expected one for .*gate_up_proj"):
            layout_of(config, tensors)

    def test_other_shape(self, tmp_path: Path) -> None:
        config, tensors = read_folder(save_tiny("llama", tmp_path))
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(95, 64)
        with pytest.raises(
            CheckpointError, match=r"up_proj\.weight has shape \(95, 64\) on disk; expected \(96, 64\)"
        ):
            layout_of(config, tensors)

    def test_parts_of_one_parameter_in_two_dtypes(self, tmp_path: Path) -> None:
        config, tensors = read_folder(save_tiny("qwen3_moe", tmp_path))
        name = "model.layers.0.mlp.experts.1.up_proj.weight"
        tensors[name] = tensors[name].half()
        layout = layout_of(config, tensors)
        with pytest.raises(CheckpointError, match="one dtype"):
            layout.assemble(0, pick(tensors, layout.block_names(0)))


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
