"""A checkpoint's configuration: what is saved comes back, and what is wrong is named by its field."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from nezha_vllm.config import CONFIG_CLASSES, NezhaLlamaConfig, register_configs

FIELDS = {
    "codebook_sizes": [4, 5, 6],
    "code_token_offsets": [10, 14, 19],
    "placeholder_token_ids": [25, 26, 27],
    "beam_width": 7,
    "max_beam_width": 9,
    "validity": "final",
    "num_item_tokens": 2,
    "short_histories": True,
    "catalogue": "films",
}
SHAPES = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("backbone", CONFIG_CLASSES)
def test_a_configuration_survives_its_file(tmp_path, backbone):
    register_configs()
    config_class = CONFIG_CLASSES[backbone]
    config_class(**FIELDS, **SHAPES).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.check()
    assert type(config) is config_class
    assert config.model_type == f"nezha_{backbone}"
    assert {name: getattr(config, name) for name in FIELDS | SHAPES} == FIELDS | SHAPES
    assert config.num_levels == 3
    assert config.codec.codebook_sizes == (4, 5, 6)


def test_a_checkpoint_that_does_not_say_so_has_the_papers_softmax_and_all_codes_in_histories():
    assert NezhaLlamaConfig().softmax == "codes"
    assert NezhaLlamaConfig().short_histories is False


def test_registering_twice_is_harmless():
    register_configs()
    register_configs()


def test_configurations_do_not_share_their_lists():
    NezhaLlamaConfig().codebook_sizes.append(1)
    assert NezhaLlamaConfig().codebook_sizes == [256, 256, 256]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_sizes": [4, 5]}, "code_token_offsets has 3 entries but codebook_sizes has 2"),
        ({"codebook_sizes": []}, "codebook_sizes: a semantic ID has 1 to"),
        ({"codebook_sizes": [4, 0, 6]}, "codebook_sizes: every codebook size must be at least 1"),
        ({"codebook_sizes": [4, 2.5, 6]}, "codebook_sizes: .* integers"),
        ({"codebook_sizes": [2**21] * 3}, "codebook_sizes: .* 64-bit"),
        ({"codebook_sizes": [2] * 9}, "codebook_sizes has 9 levels, at most 8"),
        ({"code_token_offsets": [10, 14]}, "code_token_offsets has 2 entries"),
        ({"code_token_offsets": [-1, 14, 19]}, "code_token_offsets holds a negative"),
        ({"code_token_offsets": [10, 13, 19]}, "code_token_offsets .* token id 13 twice"),
        ({"code_token_offsets": [10, 14, 20]}, "placeholder_token_ids use token id 25 twice"),
        ({"placeholder_token_ids": [25, 26]}, "placeholder_token_ids has 2 entries"),
        ({"placeholder_token_ids": [25, -1, 27]}, "placeholder_token_ids holds a negative"),
        ({"placeholder_token_ids": [25, 26, 26]}, "placeholder_token_ids use token id 26 twice"),
        ({"vocab_size": 29}, "vocab_size is 29, num_item_tokens 2, .* token id 27"),
        ({"short_histories": "no"}, "short_histories is 'no', must be true or false"),
        ({"short_histories": 1}, "short_histories is 1, must be true or false"),
        ({"validity": "never"}, "validity is 'never', must be one of"),
        ({"softmax": "items"}, "softmax is 'items', must be one of"),
        ({"softmax": "catalogue"}, "validity is 'final', a search over all codes"),
        ({"beam_width": 0}, "1 ≤ beam_width ≤ max_beam_width ≤ 4096, got 0 and 9"),
        ({"beam_width": 10}, "beam_width ≤ max_beam_width ≤ 4096, got 10 and 9"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    NezhaLlamaConfig(**FIELDS, **SHAPES).check()
    with pytest.raises(ValueError, match=rf"^config.json: .*{message}"):
        NezhaLlamaConfig(**(FIELDS | SHAPES | change)).check()
