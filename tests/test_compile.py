"""--compile: faster and otherwise the same, in every script; and ways to write it that go wrong without a word."""

import functools
import json
import math

import envs
import pytest
import torch
from conftest import make_args, spy
from runs import each, each_module, is_discrete, learns_step_by_step, line, name_of, planted, script, start

WITHOUT = "finds no compiler"
COUNTERS = torch._dynamo.utils.counters
WRITTEN_IN_CPP = ("ppo_clip", "trpo", "sac", "dqn")


def learn(module, folder, **given):
    """What the log and the checkpoint of a short run hold, the step size falling with each gradient step."""
    envs.Tagged.instances = []
    kind = "" if is_discrete(module) else "Box"
    plain = dict(env_id=f"test/Tagged{kind}-v0", num_envs=3, total_timesteps=240, hidden_size=8, learning_rate=2e-2)
    plain |= dict(num_steps=16, update_epochs=2, num_minibatches=2, learning_starts=30, batch_size=16, log_every=30)
    plain |= dict(buffer_size=1000, train_frequency=10, target_network_frequency=20, tau=0.1)
    plain |= dict(anneal_lr=True, anneal_clip=True, clip_coef=0.1, ent_coef=0.01, norm_obs=True)
    plain |= dict(cg_iterations=3)  # more of them make errors of rounding large
    if learns_step_by_step(module):
        plain |= dict(num_envs=24)  # one row, or as many as an observation has numbers, has a graph of its own

    def fall(optimizer, _):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module, "descend", before=fall)
        module.train(make_args(module, folder, **plain | given))
    rows = [json.loads(text) for text in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    saved = torch.load(folder / "run" / "checkpoint.pt")
    return rows, {name: saved[name] for name in ("agent", "target") if name in saved}


def forget(module):
    """As in a new process: nothing is compiled yet, and whether there is a compiler is not known."""
    torch._dynamo.reset()
    COUNTERS.clear()
    module.can_compile.cache_clear()


def check_equality(module, folder, **given):
    """The compiled run does what the eager run does, and there is something to do; returns the log."""
    eager_rows, eager = learn(module, folder / "eager", **given)
    assert not COUNTERS["stats"]
    compiled_rows, compiled = learn(module, folder / "compiled", compile=True, **given)
    for part, tensors in eager.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(compiled[part][name], tensor, atol=1e-5, rtol=1e-4)
    losses = 0
    for one, two in zip(eager_rows, compiled_rows, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"wall_time", "SPS"}:
            assert two[name] == (one[name] and pytest.approx(one[name], rel=1e-3, abs=1e-5)), name
            losses += "loss" in name and one[name] != 0
    assert losses > 3
    return eager_rows


@each_module
def test_compiled_training_equals_eager_training(module, monkeypatch, tmp_path, capsys):
    """Copies that learn in place of the parameters; the step size, clip range or target of the first call.

    A function of its own for each new step size would be as right, but slow, and a gap in it slower than none. What the
    compiler sees of a script is the same for all its backends: the one that writes C++ is for a few scripts.
    """
    if name_of(module) not in WRITTEN_IN_CPP:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    kinds = []
    spy(monkeypatch, module, "gradients_of", before=lambda loss, *_: kinds.append(loss.__name__))
    forget(module)
    rows = check_equality(module, tmp_path)
    assert COUNTERS["stats"]["unique_graphs"] == 1 + len(set(kinds))  # one to find out whether there is a compiler
    assert not COUNTERS["graph_break"]
    assert WITHOUT not in capsys.readouterr().out
    assert all(row.get("clip_fraction", 1) > 0 for row in rows)  # it does matter which clip range came in


@each([script("ppo_clip"), script("td3")])
def test_batches_of_one_row(module, monkeypatch, tmp_path):
    """A number of rows for which the compiler makes a function of its own."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    forget(module)
    given = dict(num_envs=1, num_steps=4, num_minibatches=4, total_timesteps=48)
    check_equality(module, tmp_path, **given, batch_size=1, learning_starts=20, train_frequency=2)


# Forms that go wrong


def plant(name, folder, *changes):
    """The script with all of these changes."""
    module = script(name)
    for number, (old, new) in enumerate(changes):
        module = planted(module, old, new, folder / str(number))
    forget(module)
    return module


def test_a_clip_range_taken_for_a_constant_is_seen(tmp_path):
    """Python floats are constants to the compiler (torch 2.13), and its cache on disk takes one for another."""
    number = "args.clip_coef * (remaining if args.anneal_clip else 1)"
    module = plant("ppo_clip", tmp_path, (f"torch.tensor({number}, device=device)", number))
    with pytest.raises(AssertionError, match="not close"):
        check_equality(module, tmp_path, total_timesteps=144)


def test_gradients_that_never_come_are_seen(monkeypatch, tmp_path):
    """The textbook's zero_grad() and backward() compiled: nothing fails, and no weight ever moves (torch 2.13)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    module = plant(
        "dqn",
        tmp_path,
        ("parameters = list(parameters)", "parameters = list(parameters)\n    optimizer = torch.optim.SGD(parameters)"),
        (
            "gradients = torch.autograd.grad(value, parameters)",
            "optimizer.zero_grad()\n        value.backward()\n        gradients = [value.detach()]",
        ),
        ("return dict(zip(parameters, gradients)), metrics", "return {p: p.grad for p in parameters}, metrics"),
        ("for parameter, gradient in gradients.items():", "for parameter, gradient in ():"),
    )
    with pytest.raises(AssertionError, match="not close"):
        check_equality(module, tmp_path, max_grad_norm=math.inf)


# Without a compiler


def no_compiler(function, **_):
    """What torch.compile returns where there is no C++ compiler: a function that fails when it is called."""

    def fail(*_):
        raise torch._inductor.exc.InvalidCxxCompiler

    return fail


def check_without(module, folder, capsys):
    """The run says so once and does what the eager run does."""
    forget(module)
    capsys.readouterr()
    check_equality(module, folder)
    assert capsys.readouterr().out.count(WITHOUT) == 1


@each_module
def test_without_a_compiler_training_goes_on(module, monkeypatch, tmp_path, capsys):
    """A long run that fails, that is slow without a word, or that says so for each function that it has."""
    monkeypatch.setattr(torch, "compile", no_compiler)
    check_without(module, tmp_path, capsys)


def test_a_sentence_for_each_function_is_seen(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", no_compiler)
    module = plant("sac", tmp_path, ("@functools.cache\ndef can_compile", "@functools.lru_cache(0)\ndef can_compile"))
    with pytest.raises(AssertionError):
        check_without(module, tmp_path, capsys)


def test_on_a_machine_without_a_compiler(tmp_path):
    """An error of the compiler that is another one than the scripts expect."""
    module = script("sac")
    none = dict(PATH="", CXX=None, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))  # an old cache would need no compiler
    done = start(module, tmp_path, *line(module, "--compile", run_dir="run", total_timesteps=64), environ=none).wait()
    assert done.rc == 0, done.err
    assert done.out.count(WITHOUT) == 1
    assert (tmp_path / "run" / "result.json").exists()
