"""The measurement of several processes: command lines, the time to a solved task, and the text by hand."""

import importlib
from pathlib import Path

import pytest

from benchmark import scaling
from benchmark.run import Refusal
from benchmark.scaling import Setting


def test_each_script_gets_its_processes():
    words = scaling.words_of(Setting("a3c", "weak", 2, 8, 1000), 5, Path("d"))
    assert words[words.index("--num-workers") + 1] == "2"
    assert words[words.index("--num-envs") + 1] == "8"
    assert words[words.index("--seed") + 1] == "5"
    assert words[words.index("--total-timesteps") + 1] == "1000"
    words = scaling.words_of(Setting("ddppo", "", 1, 4, 1000), 5, Path("d"))
    assert words[words.index("--nproc-per-node") + 1] == "1"
    assert "--nproc-per-node" not in scaling.words_of(Setting("ppo_clip", "", 1, 4, 1000), 5, Path("d"))


@pytest.mark.parametrize("setting", scaling.SETTINGS, ids=lambda setting: setting.key)
def test_the_scripts_take_these_words(setting):
    words = scaling.words_of(setting, 5, Path("d"))
    first = words.index(str(scaling.ALGOS / f"{setting.script}.py")) + 1
    args = importlib.import_module(f"algos.{setting.script}").parse_args(words[first:])
    assert (args.num_envs, args.total_timesteps, args.seed) == (setting.num_envs, setting.steps, 5)
    counts = [getattr(args, name) for name in ("num_workers", "num_samplers") if hasattr(args, name)]
    assert counts in ([], [setting.processes])


def test_time_to_a_solved_task():
    """The first line at which the mean over at least the last 100 episodes is the score, by hand."""

    def lines(*triples):
        return [dict(wall_time=t, episodes=n, episodic_return=mean) for t, n, mean in triples]

    assert scaling.seconds_to(475, lines((1, 99, 500.0), (2, 1, 500.0), (3, 9, 1.0))) == 2
    assert scaling.seconds_to(475, lines((1, 100, 440.0), (2, 50, 500.0), (3, 50, 500.0))) == 3
    assert scaling.seconds_to(475, lines((1, 100, 0.0), (2, 0, None), (3, 100, 475.0))) == 3
    assert scaling.seconds_to(475, lines((1, 50, 500.0))) is None
    assert scaling.seconds_to(475, []) is None


def test_the_text_by_hand():
    settings = {setting.key: [dict(seed=1, sps=512.0, solved=7.0)] for setting in scaling.SETTINGS}
    settings["a3c 2 x 8"] = [dict(seed=1, sps=100.0, solved=7.0), dict(seed=2, sps=300.0, solved=None)]
    del settings["impala 2 x 8"]
    found = dict(cpu="Abacus", cores=2, settings=settings, all_reduce={"10000": 0.0625, "1000000": 0.5})
    text = scaling.summary(found)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(scaling.SETTINGS) - 1
    assert ["ddppo", "weak", "2", "4", "512", "7.0"] in rows
    assert ["a3c", "weak", "2", "8", "200", "1 of 2 runs"] in rows
    assert "takes 62500 microseconds, that of a million 500000" in text
    assert scaling.expected(found, 1) == 512  # an iteration of a second
    assert scaling.expected(found, 4) == pytest.approx(4 * 512 / (1 + 25 * 0.0625 * 2))
    assert "496 with 4, 1,130 with 16" in text


def test_runs_of_another_text_do_not_count(tmp_path, monkeypatch):
    """What is kept of a seed counts until the script changes; then nothing of its old text stays."""
    asked = []
    monkeypatch.setattr(scaling, "ALGOS", tmp_path)
    monkeypatch.setattr(scaling, "SETTINGS", [Setting("a", "", 1, 4, 10), Setting("b", "", 1, 4, 10)])
    monkeypatch.setattr(scaling, "all_reduce_seconds", lambda size: 0.5)
    monkeypatch.setattr(
        scaling, "run_once", lambda setting, seed: asked.append((setting.script, seed)) or dict(seed=seed)
    )
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(name)
    scaling.measure(tmp_path / "kept" / "scaling.json", [1, 2])
    assert asked == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    scaling.measure(tmp_path / "kept" / "scaling.json", [1, 2])
    assert len(asked) == 4
    (tmp_path / "a.py").write_text("changed")
    found = scaling.measure(tmp_path / "kept" / "scaling.json", [1])
    assert asked[4:] == [("a", 1)]
    assert [len(found["settings"][key]) for key in ("a 1 x 4", "b 1 x 4")] == [1, 2]
    monkeypatch.setattr(scaling, "machine", lambda: dict(cpu="another"))
    with pytest.raises(Refusal, match="is of another machine or other versions: delete it"):
        scaling.measure(tmp_path / "kept" / "scaling.json", [1])


def test_what_was_interrupted_is_not_shown(tmp_path):
    """Settings without the sums, which are measured last, are no section yet."""
    (tmp_path / "scaling.json").write_text('{"settings": {}, "cpu": "x", "cores": 2}')
    assert scaling.section(tmp_path) == ""


def test_two_processes_add_up():
    assert 1e-6 < scaling.all_reduce_seconds(100) < 1
