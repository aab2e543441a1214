"""Both towers in torch: the reference against which every exported graph is verified.

Shape letters, here and everywhere: B rows in a batch, L tokens in a chunk, S block size, T context
capacity, D hidden size, V vocabulary, H SSM heads, P SSM head dimension, N SSM state size, G SSM
groups, C convolution channels (HP + 2GN), K convolution width, E routed experts, F expert width, KV
key/value heads, hd attention head dimension.
"""

from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower, Step
from twotower.model.loading import load_context_tower, load_denoiser_tower, published_name
from twotower.model.state import ContextState, empty_state

__all__ = [
    "ContextState",
    "ContextTower",
    "DenoiserTower",
    "Step",
    "empty_state",
    "load_context_tower",
    "load_denoiser_tower",
    "published_name",
]
