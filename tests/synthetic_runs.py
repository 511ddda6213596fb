"""Run directories and suites with known numbers, as an agent and a sweep would leave them."""

import json
from pathlib import Path

WALKER, REACHER, REACH = "dm_control/walker-walk-v0", "dm_control/reacher-easy-v0", "Meta-World/reach-v3"
BUDGET, EVERY = 2000, 1000


def write_suite(path: Path, *env_ids: str, name: str = "tiny", **task_keys) -> str:
    """A suite file; returns its name for `--suite`."""
    own = "".join(f"{key} = {value}\n" for key, value in ({"total_env_steps": BUDGET} | task_keys).items())
    text = f"name = {json.dumps(name)}\n[settings]\neval_every = {EVERY}\n"
    path.write_text(text + "".join(f"[[tasks]]\nenv_id = {json.dumps(env_id)}\n{own}" for env_id in env_ids))
    return str(path)


def write_run(
    root: Path,
    env_id: str,
    agent: str,
    seed: int,
    evaluations: dict[int, list[float]],
    success=None,
    others: dict[str, dict[int, list[float]]] | None = None,
    distraction: str | None = None,
    hardware: tuple[str, str] = ("cpu", "A Processor"),
    **status,
) -> Path:
    """A run; `evaluations` maps env steps to the episodes' returns, `success` to whether the episodes succeeded.

    `others`: evaluations in other settings than that of the training, `distraction`. Without both, it is a run of the
    time before there were settings.
    """
    run = root / env_id.replace("/", "_") / agent / f"seed-{seed}"
    run.mkdir(parents=True)
    args = {"env_id": env_id, "seed": seed, "total_env_steps": BUDGET, "eval_every": EVERY, "batch_size": 64}
    args |= {} if distraction is None else {"distraction": distraction}
    config = {
        "agent": agent,
        "env_id": env_id,
        "seed": seed,
        "guidance": "simulator" if "semore" in agent else "none",
        "args": args,
        "commit": "0123456789abcdef",
        "versions": {"python": "3.11.9", "torch": "2.11.0"},
        "hardware": {"device": hardware[0], "processor": hardware[1], "cores": 2},
    }
    (run / "config.json").write_text(json.dumps(config))
    last = max(evaluations, default=0)
    status = {"state": "finished", "error": None, "env_step": last, "wall_seconds": 100.0 + seed} | status
    (run / "status.json").write_text(json.dumps(status))
    rows = ["env_step,agent_step,episode,eval_episode,episode_return,episode_length,success_any,success_last"]
    for step, returns in evaluations.items():
        for index, value in enumerate(returns):
            done = "" if success is None else success[step][index]
            rows.append(f"{step},{step // 4},7,{index},{value!r},1000,{done},{done}")
    if others or distraction:
        names = ["setting", *[distraction or "clean"] * (len(rows) - 1)]
        rows = [f"{row},{name}" for row, name in zip(rows, names, strict=True)]
    for name, own in (others or {}).items():
        rows += [
            f"{step},{step // 4},7,{index},{value!r},1000,,,{name}"
            for step, returns in own.items()
            for index, value in enumerate(returns)
        ]
    (run / "eval.csv").write_text("\n".join(rows) + "\n")
    return run


def write_sweep(root: Path, agents=("drq_sac", "semore_sac"), tasks=(WALKER, REACHER), seeds=(1, 2, 3)) -> Path:
    """Complete runs whose final return is 100 (number of the task + 1) + 200 (number of the agent) + 10 seed."""
    for i, env_id in enumerate(tasks):
        for j, agent in enumerate(agents):
            for seed in seeds:
                final = 100.0 * (i + 1) + 200 * j + 10 * seed
                write_run(
                    root, env_id, agent, seed, {0: [10.0, 12.0], 1000: [final / 2] * 2, 2000: [final - 5, final + 5]}
                )
    return root


def write_clock(run: Path, seconds: dict[int, float]) -> None:
    """metrics.csv of a run that has been worked on for so many seconds when it had taken so many env steps."""
    rows = ["env_step,agent_step,metric,value"]
    for step, moment in seconds.items():
        rows += [f"{step},{step // 4},critic_loss,nan", f"{step},{step // 4},speed/wall_seconds,{moment:.6g}"]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")


def write_timed_sweep(root: Path) -> Path:
    """That of `write_sweep`: a run of drq_sac takes 100 seconds plus the seed, the other agent's 40; it is ahead of
    drq_sac's end at half of its budget."""
    write_sweep(root)
    for run in root.glob("*/*/seed-*"):
        whole = {"drq_sac": 100.0, "semore_sac": 40.0}[run.parent.name] + int(run.name[-1])
        write_clock(run, {500: whole / 4, 1000: whole / 2, 2000: whole})
    return root


def write_distracted_sweep(root: Path) -> Path:
    """That of `write_sweep`, evaluated at the end in "mild" and "hard" too, where a half and a tenth are left of one
    agent's return, and three quarters and a half of the other's."""
    left = {"drq_sac": {"mild": 0.5, "hard": 0.1}, "semore_sac": {"mild": 0.75, "hard": 0.5}}
    for i, env_id in enumerate((WALKER, REACHER)):
        for j, (agent, shares) in enumerate(left.items()):
            for seed in (1, 2, 3):
                final = 100.0 * (i + 1) + 200 * j + 10 * seed
                others = {name: {2000: [share * final - 1, share * final + 1]} for name, share in shares.items()}
                write_run(root, env_id, agent, seed, {1000: [final / 2], 2000: [final]}, others=others)
    return root
