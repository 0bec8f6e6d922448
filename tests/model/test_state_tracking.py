"""What a transition can follow, learned at length 40 and tested beyond (Grazzi et al., 2024, arXiv:2411.12537)."""

import jax
import numpy as np
import optax
import pytest

from hybridlm import config
from hybridlm.model import build

LEARNED, TESTED = 40, (40, 128, 256)


def parity(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """64 rows of bits, and the parity of those read so far at every one."""
    bits = rng.integers(0, 2, (64, length)).astype(np.int32)
    return bits, bits.cumsum(axis=1) % 2


def accuracy_of_parity(mixer: config.Mixer, steps: int, rng: np.random.Generator) -> list[float]:
    """On the last eight tokens at each of TESTED, 0 being chance, after so many steps of training."""
    block = config.Block(mixer=mixer, ffn=config.SwiGLU(hidden=64))
    model = config.Model(vocab_size=2, width=32, num_layers=1, pattern=(block,), tied_embedding=False)
    init, bind = build(model, config.Kernels())
    params = jax.jit(init)(jax.random.key(0))
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)

    def logits_of(params, bits):
        return bind(params)(bits)[0]

    @jax.jit
    def step(params, opt_state, bits, labels):
        def loss(params):
            logits = logits_of(params, bits)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        params, opt_state = step(params, opt_state, *parity(rng, LEARNED))
    accuracies = []
    for length in TESTED:
        bits, labels = parity(rng, length)
        right = np.asarray(jax.jit(logits_of)(params, bits)).argmax(-1) == labels
        accuracies.append(2 * float(right[:, -8:].mean()) - 1)
    return accuracies


@pytest.mark.slow
def test_delta_net_learns_parity_with_negative_eigenvalues_alone(rng: np.random.Generator) -> None:
    def delta_net(allow_neg_eigval: bool) -> config.DeltaNet:
        return config.DeltaNet(num_heads=2, head_dim=16, conv_width=None, allow_neg_eigval=allow_neg_eigval)

    with_negative = accuracy_of_parity(delta_net(True), 400, rng)
    without = accuracy_of_parity(delta_net(False), 1000, rng)
    print(f"at {TESTED}: beta in (0, 2) {with_negative}, beta in (0, 1) {without}")
    assert with_negative == [1.0, 1.0, 1.0]
    assert max(without[1:]) < 0.2
