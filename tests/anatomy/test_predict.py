"""What is predicted from config.json alone is what the model built from it shows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_models import FAMILIES, UNLISTED, tiny_config
from transformers import AutoConfig, PretrainedConfig

from anatomy.test_families import CASES, family_file
from secateur.anatomy.config import ConfigFile, NotStatedError, longest_input, values_of
from secateur.anatomy.predict import predict
from secateur.anatomy.resolve import resolve
from secateur.core.errors import AnatomyError

CHANGES: list[dict[str, Any]] = [
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"attention_bias": True, "mlp_bias": True, "qkv_bias": False, "enable_bias": False},
]


def written(config: PretrainedConfig) -> dict[str, Any]:
    """The content of config.json."""
    content: dict[str, Any] = json.loads(config.to_json_string())
    return content


def read(content: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**content)


@pytest.mark.parametrize(
    ("family", "changes"), [*CASES, *((family, changes) for family in FAMILIES for changes in CHANGES)]
)
def test_the_same_anatomy_as_of_the_model(family: str, changes: dict[str, Any]) -> None:
    config = tiny_config(family, **changes)
    file = ConfigFile(written(config))
    assert predict(file) == resolve(config)
    assert longest_input(file.value) == longest_input(values_of(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_configuration_class(family: str) -> None:
    """Without a key that the family file gives a default for, both sides fill in the same."""
    content = written(tiny_config(family))
    for key in family_file(family).defaults:
        left = {name: value for name, value in content.items() if name != key}
        assert predict(ConfigFile(left)) == resolve(read(left)), key


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_known_under_all_their_names(family: str) -> None:
    names = {}
    for alias, name in type(tiny_config(family)).attribute_map.items():
        names |= {alias: name, name: alias}
    content = written(tiny_config(family))
    declared = family_file(family)
    used = {"max_position_embeddings", *declared.defaults}
    for expressions in (*declared.spaces.values(), *declared.sizes.values()):
        used.update([expressions] if isinstance(expressions, str) else expressions)
    for key in used & names.keys():
        renamed = {names[key] if name == key else name: value for name, value in content.items()}
        assert predict(ConfigFile(renamed)) == resolve(read(renamed)), key


@pytest.mark.parametrize("family", FAMILIES)
def test_any_key_left_out_is_filled_in_alike_or_asked_for(family: str) -> None:
    content = written(tiny_config(family))
    for key in content.keys() - {"model_type"}:
        left = {name: value for name, value in content.items() if name != key}
        try:
            predicted, expected = predict(ConfigFile(left)), resolve(read(left))
        except (NotStatedError, AnatomyError):  # of predict; of resolve where transformers cannot build it
            continue
        assert predicted == expected, key


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"num_attention_heads": 6}, "assumes hidden_size % num_attention_heads == 0"),
        ("llama", {"num_hidden_layers": None}, "how many blocks"),
        ("llama", {"head_dim": "8"}, "head_dim is '8'"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
        ("llama", {"text_config": {"hidden_size": 64}}, "text_config"),
        ("llama", {"per_layer_config": {"0": {"hidden_size": 32}}}, "per_layer_config"),
        ("mistral", {"layer_types": None}, "layer_types"),
        ("mistral", {"num_key_value_heads": None}, "num_key_value_heads is null"),
        ("gpt2", {"add_cross_attention": True}, "assumes not add_cross_attention"),
        ("gpt2", {"hidden_size": 128}, "several values of n_embd"),
        ("gemma3_text", {"model_type": "gemma3"}, "no family file for 'gemma3'"),
    ],
)
def test_what_only_transformers_can_tell(family: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(NotStatedError, match=says):
        predict(ConfigFile({**written(tiny_config(family)), **changes}))


@pytest.mark.parametrize("family", UNLISTED)
def test_nothing_is_predicted_without_a_family_file(family: str) -> None:
    with pytest.raises(NotStatedError, match=f"no family file for '{family}'"):
        ConfigFile(written(tiny_config(family)))


@pytest.mark.parametrize("content", [{}, {"model_type": None}, {"model_type": ["llama"]}])
def test_no_model_type(content: dict[str, Any]) -> None:
    with pytest.raises(NotStatedError):
        ConfigFile(content)


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [1]])
def test_no_architecture(architectures: object) -> None:
    content = {**written(tiny_config("llama")), "architectures": architectures}
    with pytest.raises(NotStatedError, match="architecture"):
        _ = ConfigFile(content).architecture
