"""Mixtures of experts: routers and gates, dispatch, exchange over devices, experts, and the layer that joins them."""
