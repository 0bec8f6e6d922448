"""Routers, one file each. A new one is one file and one line here, or one `register` call of your own."""

from hybridlm import config
from hybridlm.ffns.moe.routers.adaptive import AdaptiveTopK
from hybridlm.ffns.moe.routers.comet import Comet
from hybridlm.ffns.moe.routers.dense_to_sparse import DenseToSparse
from hybridlm.ffns.moe.routers.dselect import DSelectK
from hybridlm.ffns.moe.routers.expert_choice import ExpertChoice
from hybridlm.ffns.moe.routers.gshard import GShardTop2
from hybridlm.ffns.moe.routers.hashed import HashRouter
from hybridlm.ffns.moe.routers.noisy import NoisyTopK
from hybridlm.ffns.moe.routers.pregated import PreGated
from hybridlm.ffns.moe.routers.registry import ROUTERS
from hybridlm.ffns.moe.routers.switch import Switch
from hybridlm.ffns.moe.routers.topk import TopK

register = ROUTERS.register

# Their examples are for 4 experts or more.
register(
    config.TopK,
    TopK,
    examples=(
        config.TopK(),
        config.TopK(k=3, score="sigmoid", scale=2.5, bias_balance=True, balance_loss=0.0, sequence_balance_loss=1e-4),
        config.TopK(k=2, score="sqrt_softplus", num_groups=2, top_groups=1, z_loss=0.0),
        config.TopK(k=1, score="sigmoid", renormalize=False),
    ),
)
register(config.NoisyTopK, NoisyTopK, examples=(config.NoisyTopK(k=2), config.NoisyTopK(k=1, importance_loss=0.0)))
register(config.Switch, Switch, examples=(config.Switch(), config.Switch(jitter=0.0, z_loss=0.001)))
register(config.GShardTop2, GShardTop2, examples=(config.GShardTop2(), config.GShardTop2(random_second=False)))
register(
    config.ExpertChoice,
    ExpertChoice,
    examples=(
        config.ExpertChoice(leaks_future=True),
        config.ExpertChoice(leaks_future=True, capacity_factor=1.5, gate=config.RecurrentGate(state_dim=12)),
    ),
)
register(config.HashRouter, HashRouter, examples=(config.HashRouter(), config.HashRouter(k=3)))
register(
    config.DenseToSparse,
    DenseToSparse,
    examples=(
        config.DenseToSparse(),
        config.DenseToSparse(activation="tanh", threshold=0.1, max_experts=3, anneal_steps=50, balance_loss=0.01),
    ),
)
register(config.DSelectK, DSelectK, examples=(config.DSelectK(), config.DSelectK(k=3, smooth_step=2.0)))
register(
    config.Comet,
    Comet,
    examples=(config.Comet(), config.Comet(k=3, search_steps=0), config.Comet(k=1, entropy_loss=0.0)),
)
register(config.AdaptiveTopK, AdaptiveTopK, examples=(config.AdaptiveTopK(), config.AdaptiveTopK(threshold=0.02)))
register(
    config.PreGated,
    PreGated,
    examples=(
        config.PreGated(),
        config.PreGated(router=config.TopK(k=3, score="sigmoid", bias_balance=True)),
        config.PreGated(router=config.GShardTop2(gate=config.RecurrentGate(state_dim=12))),
        config.PreGated(router=config.ExpertChoice(leaks_future=True)),
    ),
)
