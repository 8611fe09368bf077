"""A2C against slow and independent references, and against PPO where both are the same algorithm."""

import envs
import pytest
import torch
from conftest import make_args, spy
from gymnasium.spaces import Discrete
from off_policy import bugs
from runs import each, fails_with_a_bug
from test_ppo_clip import BOTH, gradients, make_agent, make_batch, parameters, per_row, reference

from algos import a2c, ppo_clip

ours = each([a2c])


def trained(module, folder, monkeypatch, **given):
    """The parameters after a short training, its minibatches in the order of the batch."""
    agents = []
    with monkeypatch.context() as patch:
        patch.setattr(envs.Tagged, "instances", [])
        patch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n, device=device))
        spy(patch, module, "evaluate", before=lambda agent, *_: agents.append(agent))
        plain = dict(num_envs=3, num_steps=16, total_timesteps=3 * 16 * 6, learning_rate=1e-2, optimizer="adam")
        plain |= dict(
            update_epochs=1, num_minibatches=1, clip_coef=1e6, gae_lambda=0.9, ent_coef=0.01, norm_reward=True
        )
        module.train(make_args(module, folder / module.__name__, **(plain | given)))
    return parameters(agents[0])


@ours
@pytest.mark.parametrize("env_id", ["test/Tagged-v0", "test/TaggedBox-v0"])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_equals_ppo_of_one_epoch_without_clipping(module, tmp_path, monkeypatch, env_id, norm_obs):
    """Any difference between the two scripts that is not the idea of PPO; a second epoch is one."""
    given = dict(env_id=env_id, norm_obs=norm_obs)
    found = trained(module, tmp_path, monkeypatch, **given)
    torch.testing.assert_close(found, trained(ppo_clip, tmp_path, monkeypatch, **given), atol=1e-5, rtol=1e-4)
    two_epochs = trained(ppo_clip, tmp_path / "two", monkeypatch, update_epochs=2, **given)
    assert (found - two_epochs).abs().max() > 1e-3


ADAM = "torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)"


@bugs(
    ("a2c", "valid = ~done  #", "valid = ~done | True  #"),
    ("a2c", "discounted = args.gamma * discounted * valid", "discounted = args.gamma * discounted"),
    ("a2c", "advantages[valid].std()", "advantages.std()"),
    ("a2c", 'batch["returns"] = advantages + values[:-1]', 'batch["returns"] = advantages + values[1:]'),
    ("a2c", ADAM, ADAM.replace("eps=1e-5", "eps=1e-3")),
    ("a2c", "max_norm=args.max_grad_norm", "max_norm=1.0"),
)
def test_differences_from_ppo_are_seen(request, name, old, new):
    test = test_equals_ppo_of_one_epoch_without_clipping
    fails_with_a_bug(request, test, name, old, new, env_id="test/Tagged-v0", norm_obs=False)


@ours
@BOTH
def test_gradient_of_the_loss(module, space):
    """A sign, a factor, an advantage that gradients flow through, or a term on the wrong rows."""
    agent, args = make_agent(space, module=module, vf_coef=0.3, ent_coef=0.02)
    batch = make_batch(agent)
    policy, values = reference(agent, batch["obs"])
    log_probs = per_row(agent, policy.log_prob(batch["actions"]))
    policy_loss = -sum(log_probs * batch["advantages"]) / 64
    value_loss = sum((values - batch["returns"]) ** 2) / 64
    entropy = sum(per_row(agent, policy.entropy())) / 64
    loss, metrics = module.a2c_loss(agent, batch, args)
    expected = gradients(agent, policy_loss + 0.3 * value_loss - 0.02 * entropy)
    torch.testing.assert_close(gradients(agent, loss), expected, atol=1e-5, rtol=1e-4)
    for name, value in dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy).items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5)
        assert not metrics[name].requires_grad


SUM = "loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy"
POLICY_LOSS = '-(policy.log_prob(batch["actions"]) * batch["advantages"]).mean()'
FROM_THE_CRITIC = '-(policy.log_prob(batch["actions"]) * (batch["advantages"] + values - values.detach())).mean()'


@bugs(
    ("a2c", SUM, SUM.replace("- args", "+ args")),
    ("a2c", SUM, SUM.replace("args.vf_coef * ", "")),
    ("a2c", SUM, SUM.replace("value_loss", "value_loss / 2")),
    ("a2c", POLICY_LOSS, POLICY_LOSS[1:]),
    ("a2c", POLICY_LOSS, POLICY_LOSS.replace(".mean()", ".sum()")),
    ("a2c", POLICY_LOSS, POLICY_LOSS.replace('batch["advantages"]', 'batch["advantages"][:, None]')),
    ("a2c", POLICY_LOSS, POLICY_LOSS.replace('batch["advantages"]', 'batch["advantages"].flip(0)')),
    ("a2c", POLICY_LOSS, FROM_THE_CRITIC),
    ("a2c", "policy.entropy().mean()", "policy.entropy()[0]"),
)
def test_gradient_sees(request, name, old, new):
    fails_with_a_bug(request, test_gradient_of_the_loss, name, old, new, space=Discrete(4))
