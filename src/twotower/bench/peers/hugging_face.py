"""The context tower as `nemotron_h` of transformers: the peer most people would run it with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import transformers

from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, Bundle
from twotower.config.model import LayerKind, ModelConfig
from twotower.errors import BundleError, ConfigError
from twotower.spec import CONTEXT, CONTEXT_HEAD
from twotower.weights.mapped import read_weight

_FORMS = ("grouped_mm", "eager", "batched_mm")
_KINDS = {
    LayerKind.MAMBA: "mamba",
    LayerKind.MOE: "moe",
    LayerKind.ATTENTION: "attention",
    LayerKind.MLP: "mlp",
}


class TransformersPeer:
    """`NemotronHForCausalLM` on a bundle's weights, in float32.

    Where they are stored in float32 its tensors are the bundle's mapped file. Of the library's ways
    to compute experts the one fastest here is taken.

    Raises:
        BundleError: the bundle is quantized.
        ConfigError: this version of transformers has other weights than this code knows.
    """

    name = "transformers"

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        if bundle.quantization is not None:
            raise BundleError(
                f"transformers cannot run bundle '{bundle.path}'",
                found=f"it is quantized, recipe {bundle.quantization['recipe']['name']}",
                do="name the bundle it was made from: "
                "`twotower bench BUNDLE --beside FLOAT_BUNDLE --peers transformers`",
            )
        self.version = str(transformers.__version__)
        self.threads = threads
        self._config = bundle.config
        torch.set_num_threads(threads)
        with torch.device("meta"):
            model: Any = transformers.NemotronHForCausalLM(_config_of(bundle.config))
        self._model = model.eval()
        wanted = {name: value.shape for name, value in self._model.state_dict().items()}
        state = {
            name: value.reshape(wanted[name]) for name, value in _state(bundle) if name in wanted
        }
        if missing := sorted(wanted.keys() - state.keys()):
            raise ConfigError(
                f"transformers {self.version} has other weights of this model than twotower knows",
                found=f"nothing for {', '.join(missing[:3])}",
                do="install transformers 5, whose experts are stacked",
            )
        self._model.load_state_dict(state, assign=True)
        self.form = self._fastest_form()

    def _fastest_form(self) -> str:
        """The form of the experts that generates fastest, set; all compute the same."""
        if LayerKind.MOE not in self._config.layers:
            return "no experts"
        prompt, seconds = [list(range(1, 9))], {}
        for form in _FORMS:
            self._model.set_experts_implementation(form)
            self.generate(prompt, 2)
            began = time.perf_counter()
            self.generate(prompt, 8)
            seconds[form] = time.perf_counter() - began
        form = min(seconds, key=seconds.__getitem__)
        self._model.set_experts_implementation(form)
        return f"experts {form}"

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Greedy continuations without an end of sequence; see `Peer.generate`."""
        tokens = torch.tensor([list(prompt) for prompt in prompts])
        options: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": self._config.pad_token_id,
            "suppress_tokens": [self._config.mask_token_id],  # which our sampler never chooses
            "use_cache": True,
        }
        with torch.inference_mode():
            out = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                **options,
            )
        return [list(map(int, row[tokens.shape[1] :])) for row in out]


def _config_of(config: ModelConfig) -> Any:
    same = (
        "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim mamba_num_heads "
        "mamba_head_dim ssm_state_size n_groups conv_kernel n_routed_experts num_experts_per_tok "
        "n_shared_experts moe_intermediate_size moe_shared_expert_intermediate_size "
        "intermediate_size routed_scaling_factor norm_topk_prob n_group topk_group "
        "layer_norm_epsilon pad_token_id"
    )
    options: dict[str, Any] = {name: getattr(config, name) for name in same.split()}
    # Which the library takes from the layers, and does not declare.
    options["num_hidden_layers"] = len(config.layers)
    return transformers.NemotronHConfig(
        **options,
        layers_block_type=[_KINDS[kind] for kind in config.layers],
        use_conv_bias=True,
        mlp_hidden_act="relu2",
        # transformers clamps dt from below here, where the published code does not
        time_step_min=1e-9,
        time_step_limit=(0.0, float("inf")),
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )


def _state(bundle: Bundle) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights under transformers' names, with what the export had rearranged put back."""
    for graph in (CONTEXT, CONTEXT_HEAD):
        data = np.memmap(
            bundle.path / (GRAPH_FILES[graph] + DATA_SUFFIX),
            dtype=np.uint8,
            mode="c",
        )
        for name, ref in bundle.weights(graph).items():
            value = torch.from_numpy(np.asarray(read_weight(data, ref), np.float32))
            key = name.replace("context_tower.", "model.", 1)
            key = key.replace("context_lm_head.", "lm_head.", 1)
            if key.endswith(".A_log.negated_exp"):
                yield key.removesuffix(".negated_exp"), torch.log(-value)
            elif key.endswith(".conv1d.weight.transposed"):
                yield key.removesuffix(".transposed"), value.T.contiguous()
            elif key.endswith(".qkv_proj.weight"):
                heads, groups = bundle.config.num_attention_heads, bundle.config.num_key_value_heads
                rows = [count * bundle.config.head_dim for count in (heads, groups, groups)]
                ends = pairwise(accumulate(rows, initial=0))
                for part, (first, end) in zip("qkv", ends, strict=True):
                    yield key.replace(".qkv_proj.", f".{part}_proj."), value[first:end]
            elif ".experts." in key:
                yield key.removesuffix(".weight"), value
            else:
                yield key, value
