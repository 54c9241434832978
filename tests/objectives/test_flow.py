"""The FLM objective: its times and its loss, whole or in pieces."""

from __future__ import annotations

import pytest
import torch

from flowlm.clock import DecodingErrorClock, UniformClock
from flowlm.objectives import FlowObjective
from flowlm.path import corrupt
from test_denoiser import L, V, make

B = 8


def test_times_are_stratified_in_the_sampling_clock() -> None:
    clock = DecodingErrorClock(V)
    draws = FlowObjective(clock).draw(64, torch.Generator().manual_seed(0))
    assert draws["t"].dtype == torch.float32
    cells = (clock.tau(draws["t"].double()) * 64).sort().values
    # Half a cell: drawn τ lies in [i, i+1)/64, up to float32 rounding of t.
    assert ((cells - torch.arange(64) - 0.5).abs() < 0.501).all()


@pytest.mark.parametrize("vocab_size", [V, 20], ids=["low-rank", "dense"])
def test_loss_is_the_cross_entropy_of_the_tokens(vocab_size: int) -> None:
    net = make(False, vocab_size=vocab_size)
    objective = FlowObjective(UniformClock())
    objective.prepare(net)
    tokens = torch.randint(0, vocab_size, (B, L))
    xi, t = torch.randn(B, L, objective.noise_width), torch.linspace(0, 1, B)
    loss = objective.losses(net, tokens, xi, {"t": t})
    y = corrupt(tokens, t, net.embedding, net.noise_law()(xi))
    expected = -net(y, t).log_probs().gather(-1, tokens[..., None])[..., 0]
    assert loss.shape == (B, L)
    torch.testing.assert_close(loss, expected)


def test_micro_batches_give_the_whole_batch() -> None:
    net = make(False)
    objective = FlowObjective(net.clock)
    draws = objective.draw(B, torch.Generator().manual_seed(0))
    objective.prepare(net)
    tokens, xi = torch.randint(0, V, (B, L)), torch.randn(B, L, objective.noise_width)

    def run(rows: list[slice]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        net.zero_grad()
        objective.prepare(net)
        losses = [objective.losses(net, tokens[r], xi[r], {k: v[r] for k, v in draws.items()}) for r in rows]
        loss = torch.cat(losses)
        loss.mean().backward()
        return loss.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]

    whole, grads = run([slice(None)])
    parts, part_grads = run([slice(0, 3), slice(3, 4), slice(4, None)])
    torch.testing.assert_close(parts, whole)
    for got, want in zip(part_grads, grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
