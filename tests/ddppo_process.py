"""A process of test_ddppo.py: trains the script argv[1] on Tagged environments in float64 and saves what it saw.

The environments of all processes are numbered through, and actions follow from observations, so that the data are the
same however many processes there are; with the setting `random` they are sampled from the policy.
"""

import atexit
import importlib.util
import json
import os
import sys
from pathlib import Path

import envs
import torch

path, settings = sys.argv[1], json.loads(sys.argv[2])
spec = importlib.util.spec_from_file_location("ddppo_under_test", path)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
rank = int(os.environ.get("RANK", 0))
sample = settings.pop("random", False)
copied = settings.pop("copy", "")
folder = Path(settings["run_dir"])
if copied:
    settings["resume"] = settings["run_dir"] = copied
envs.Tagged.instances = [None] * (rank * settings["num_envs"])
seen = dict(rows=[], log=[])


@atexit.register
def what_is_left():
    """The threads that there are after the script's own farewell, which is registered later and called before."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    (folder.parent / f"{rank}.threads").write_text(" ".join(names))


class Agent(module.Agent):
    """In float64; knows which action each observation asks for."""

    def __init__(self, *inputs):
        super().__init__(*inputs)
        if rank == 1:  # only what the first process sends makes them equal
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.add_(1)
        self.double()
        seen["object"] = self

    def act(self, obs, greedy=False):
        return super().act(obs) if sample else obs.sum(-1).astype(int) % 3


def average(gradients, metrics, num_rows, max_norm, original=module.average):
    seen["rows"].append(num_rows)
    return original(gradients, metrics, num_rows, max_norm)


class Envs:
    """The environments, whose first seed is remembered beside the next random number and the state at the start."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def reset(self, seed):
        run = seen["shared"]
        loaded = {f"{name}/{key}": value for name in run.parts for key, value in run.parts[name].state_dict().items()}
        loaded = {name: value.clone() for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        moments = run.parts["optimizer"].state_dict()["state"]
        loaded |= {f"moments/{i}": state["exp_avg"].clone() for i, state in moments.items()}
        random_state = torch.get_rng_state()
        seen.update(seed=seed, draw=torch.rand(()).item(), start=run.step, loaded=loaded)
        torch.set_rng_state(random_state)
        return self.inner.reset(seed=seed)


class SharedRun(module.SharedRun):
    def __init__(self, args, **parts):
        self.parts = parts
        seen["shared"] = self
        super().__init__(args, **parts)


module.Agent = Agent
module.average = average
module.to_tensor = lambda array, device: torch.from_numpy(array)
make_envs = module.make_envs
module.make_envs = lambda *inputs, **options: Envs(make_envs(*inputs, **options))
module.evaluate = lambda *_: dict(eval_returns=[0.0], eval_cut=0)
module.SharedRun = SharedRun
plain = dict(env_id="test/Tagged-v0", learning_rate=0.01, num_minibatches=1, update_epochs=2, ent_coef=0.01, gamma=0.9)
plain |= dict(norm_obs=True, norm_reward=True, compile=False, timeout=20, max_grad_norm=0.2)
module.train(module.Args(**plain | settings))
if rank == 0:
    seen["log"] = [json.loads(row) for row in Path(settings["run_dir"], "metrics.jsonl").read_text().splitlines()]
seen["agent"] = seen.pop("object").state_dict()
del seen["shared"]
torch.save(seen, folder.parent / f"{rank}.pt")
