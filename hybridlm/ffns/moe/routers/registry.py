"""Which module computes which router's config. `hybridlm.ffns.moe.routers` fills it."""

from hybridlm import config
from hybridlm.registry import Registry

ROUTERS: Registry[config.Router] = Registry("router")
