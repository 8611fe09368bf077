"""--compile: faster and otherwise the same, in every script; and two ways to write it that go wrong without a word."""

import json
import math

import envs
import pytest
import torch
from conftest import make_args, spy
from runs import each_module, is_continuous, line, planted, script, start

WITHOUT = "finds no compiler"


def learn(module, folder, compiled, **given):
    """What the log and the checkpoint of a short run hold, the step size falling with each gradient step."""
    envs.Tagged.instances = []
    kind = "Box" if is_continuous(module) else ""
    plain = dict(env_id=f"test/Tagged{kind}-v0", num_envs=3, total_timesteps=240, hidden_size=4, learning_rate=5e-3)
    plain |= dict(num_steps=16, update_epochs=1, num_minibatches=2, learning_starts=30, batch_size=16, log_every=30)
    plain |= dict(buffer_size=1000, train_frequency=10, target_network_frequency=20, tau=0.1)
    plain |= dict(anneal_lr=True, anneal_clip=True, clip_coef=0.05, ent_coef=0.01, norm_obs=True)

    def fall(optimizer, _):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "descend", before=fall)
        module.train(make_args(module, folder, **plain | dict(compile=compiled) | given))
    lines = [json.loads(text) for text in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    saved = torch.load(folder / "run" / "checkpoint.pt")
    return lines, {name: saved[name] for name in ("agent", "target") if name in saved}


def check_compiled(module, folder, capsys, **given):
    """The compiled run is the eager run, compiled once for each kind of gradient, and without a gap."""
    kinds = []
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    module.can_compile.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "gradients_of", before=lambda loss, *_: kinds.append(loss))
        eager_lines, eager = learn(module, folder / "eager", False, **given)
        assert not counters["stats"]
        kinds.clear()
        compiled_lines, compiled = learn(module, folder / "compiled", True, **given)
    for part, tensors in eager.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(compiled[part][name], tensor, atol=1e-5, rtol=1e-5)
    losses = 0
    for one, two in zip(eager_lines, compiled_lines, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"wall_time", "SPS"}:
            assert two[name] == (one[name] and pytest.approx(one[name], rel=1e-3, abs=1e-5)), name
            losses += "loss" in name and one[name] != 0
    assert losses > 3
    assert WITHOUT not in capsys.readouterr().out
    assert counters["stats"]["unique_graphs"] == 1 + len(kinds)  # one to find out whether there is a compiler
    assert not counters["graph_break"]


@each_module
def test_compiled_training_equals_eager_training(module, tmp_path, capsys):
    """Copies of the parameters that learn in their place; a step size, a clip range or a target of the first call."""
    check_compiled(module, tmp_path, capsys)


def plant(name, folder, *changes):
    """The script with all of these changes."""
    module = script(name)
    for number, (old, new) in enumerate(changes):
        module = planted(module, old, new, folder / str(number))
    return module


def test_a_clip_range_taken_for_a_constant_is_seen(tmp_path, capsys):
    """Of a Python float the compiler (torch 2.13) makes a constant, and its cache of graphs mixes the constants up."""
    tensor = "torch.tensor(args.clip_coef * (remaining if args.anneal_clip else 1), device=device)"
    module = plant("ppo_clip", tmp_path, (tensor, "args.clip_coef * (remaining if args.anneal_clip else 1)"))
    with pytest.raises(AssertionError) as error:
        check_compiled(module, tmp_path, capsys)
    print(str(error.value)[:300])


BACKWARD = """
        optimizer.zero_grad()
        value.backward()
        gradients = [value.detach()]"""


def test_gradients_that_never_come_are_seen(tmp_path, capsys):
    """The textbook's zero_grad() and backward() compiled: nothing fails, and no weight ever moves (torch 2.13)."""
    module = plant(
        "dqn",
        tmp_path,
        ("parameters = list(parameters)", "parameters = list(parameters)\n    optimizer = torch.optim.SGD(parameters)"),
        ("gradients = torch.autograd.grad(value, parameters)", BACKWARD),
        ("return dict(zip(parameters, gradients)), metrics", "return {p: p.grad for p in parameters}, metrics"),
        ("parameter.grad = gradient", "pass"),
    )
    with pytest.raises(AssertionError) as error:
        check_compiled(module, tmp_path, capsys, max_grad_norm=math.inf)
    print(str(error.value)[:300])
