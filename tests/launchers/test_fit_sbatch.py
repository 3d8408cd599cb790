"""launchers/fit.sbatch in a real SLURM: time-out, requeue, resume, arrays, clear refusals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.launchers.cluster import Cluster
from tests.tiny_codec import LATENT_CHANNELS, tiny_tokenizer

ROOT = Path(__file__).parents[2]
STEPS = 40
# The machine may be busy with other things.
PATIENCE = 1800.0
LAUNCHERS = ROOT / "launchers"
OVERLAY = """
data:
  class_path: tests.launchers.fixed_batches.FixedBatches
trainer:
  max_steps: 40
  accelerator: cpu
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
  use_distributed_sampler: false
  callbacks:
    - class_path: percov2.training.callbacks.LastCheckpoint
      init_args: {dirpath: "${vars.run}/checkpoints", every_n_train_steps: 4}
    - class_path: percov2.training.callbacks.ExportModel
      init_args: {directory: "${vars.run}/model"}
"""
OPTIONS = [
    "--config=configs/strategy/ddp.yaml",
    f"--model.hyper_encoder.latent_channels={LATENT_CHANNELS}",
    f"--model.latent_decoder.latent_channels={LATENT_CHANNELS}",
    "--model.hyper_encoder.hidden_channels=8",
    "--vars.feature_channels=8",
    "--vars.codebook_size=16",
    # Both phases of the stage.
    "--vars.tokenizer_steps=20",
    "--model.latent_decoder.hidden_channels=8",
    "--model.latent_decoder.min_channels=8",
    "--model.masked_transformer.dim=16",
    "--model.masked_transformer.num_layers=2",
    "--model.masked_transformer.num_heads=2",
]
Submit = Callable[..., str]


def _rates() -> list[str]:
    text = (LAUNCHERS / "functions.sh").read_text()
    found = re.search(r"^rates=\((.+)\)$", text, re.MULTILINE)
    assert found is not None
    return found[1].split()


def test_the_array_covers_the_rates_from_low_to_high() -> None:
    def side_and_codes(name: str) -> tuple[int, int]:
        side, codes = name.split("x")
        return int(side), int(codes)

    names = [path.stem for path in (ROOT / "configs" / "rate").glob("*.yaml")]
    assert _rates() == sorted(names, key=side_and_codes)


@pytest.mark.parametrize("script", ["fit", "evaluate"])
@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({"SLURM_JOB_ID": ""}, ["a.yaml"], "start me with sbatch"),
        ({"PERCOV2_PYTHON": "/no/python"}, ["a.yaml"], "PERCOV2_PYTHON=/no/python is no program"),
        ({"PERCOV2_DATA": ""}, ["a.yaml"], "PERCOV2_DATA is empty: set it in launchers/"),
        ({}, [], "usage: sbatch launchers/{script}.sbatch "),
        ({}, ["--config=a.yaml"], "usage: sbatch launchers/{script}.sbatch "),
        ({"SLURM_ARRAY_TASK_ID": "7"}, ["a.yaml"], "array index 7: there are the rates 0 to 6"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    variables: dict[str, str], arguments: list[str], message: str, script: str
) -> None:
    usual = {"SLURM_JOB_ID": "1", "PERCOV2_PYTHON": sys.executable, "PERCOV2_DATA": "data"}
    done = subprocess.run(
        ["bash", str(LAUNCHERS / f"{script}.sbatch"), *arguments],
        env={**os.environ, **usual, **variables},
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{script}.sbatch: {message.format(script=script)}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "option", ["--ckpt_path=old.ckpt", "--ckpt_path", "--trainer.devices=3", "--trainer.num_nodes"]
)
def test_what_the_script_decides_is_not_discarded(option: str) -> None:
    done = subprocess.run(
        ["bash", str(LAUNCHERS / "fit.sbatch"), "configs/stage2.yaml", option],
        env={
            **os.environ,
            "SLURM_JOB_ID": "1",
            "PERCOV2_PYTHON": sys.executable,
            "PERCOV2_DATA": "data",
        },
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"fit.sbatch: {option}: the script says")


_STUBS = {
    # The job ends in half an hour; SLURM says so of every task of an array if asked for its number.
    "squeue": """
        n=$(($(cat "$STUBS/asked") + 1)); echo $n >"$STUBS/asked"
        ((n > BUSY)) || { echo "Unable to contact slurm controller" >&2; exit 1; }
        end=$(date -d '+30 minutes' +%Y-%m-%dT%H:%M:%S)
        [[ $2 == --jobs=36 ]] && printf '%s\\n' "$end" "$end" N/A || echo "$end"
    """,
    "scontrol": """
        [[ $1 == show ]] && { echo node1; exit; }
        n=$(($(cat "$STUBS/asked") + 1)); echo $n >"$STUBS/asked"
        ((n > BUSY)) || { echo "Unable to contact slurm controller" >&2; exit 1; }
        echo "scontrol $*" >>"$STUBS/log"
    """,
    "srun": """
        trap 'sleep 1; echo saved >>"$STUBS/log"; exit 85' USR1
        touch "$STUBS/running"
        while true; do sleep 0.05; done
    """,
    # insist waits between its attempts.
    "sleep": """
        [[ $1 != [1-4] ]] || set -- 0.01
        exec /bin/sleep "$@"
    """,
}


@pytest.mark.parametrize("busy", [0, 3])
@pytest.mark.parametrize("array", [False, True])
def test_the_warning_lets_the_run_save_before_the_requeue(
    tmp_path: Path, array: bool, busy: int
) -> None:
    for name, content in _STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/usr/bin/env bash\n{content}")
        stub.chmod(0o755)
    (tmp_path / "asked").write_text("0")
    task = {"SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": "6"} if array else {}
    job = subprocess.Popen(
        ["bash", str(LAUNCHERS / "fit.sbatch"), "configs/stage2.yaml"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "STUBS": str(tmp_path),
            "BUSY": str(busy),
            "SLURM_JOB_ID": "36",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_CPUS_PER_TASK": "1",
            "PERCOV2_PYTHON": sys.executable,
            "PERCOV2_DATA": "data",
            **task,
        },
        cwd=ROOT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "running").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)  # the trap is set right after the start
    job.send_signal(signal.SIGUSR1)
    try:
        assert job.wait(timeout=60) == 0
    finally:  # as SLURM ends what is left of a job
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    name = "36_6" if array else "36"
    assert (tmp_path / "log").read_text().splitlines() == ["saved", f"scontrol requeue {name}"]
    assert int((tmp_path / "asked").read_text()) == busy + 2


@pytest.mark.parametrize("script", ["fit", "evaluate"])
def test_another_folder_is_refused(tmp_path: Path, script: str) -> None:
    done = subprocess.run(
        ["bash", str(LAUNCHERS / f"{script}.sbatch"), "a.yaml"],
        env={**os.environ, "SLURM_JOB_ID": "1"},
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"{script}.sbatch: run sbatch in the folder of the repository, not in {tmp_path}\n"
    )


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Submits fit.sbatch with options of sbatch and arguments; returns the job's number."""
    monkeypatch.chdir(ROOT)

    def run(
        name: str,
        *arguments: str,
        sbatch: tuple[str, ...] = (),
        script: str = "fit",
        **variables: str,
    ) -> str:
        options = ["--cpus-per-task=1", "--gpus-per-node=0", f"--output={tmp_path / name}.log"]
        defaults = {"PERCOV2_DATA": str(tmp_path), "PERCOV2_PYTHON": sys.executable}
        return slurm.run(
            *("sbatch", "--parsable", *options, *sbatch, f"launchers/{script}.sbatch", *arguments),
            **{**defaults, **variables},
        )

    return run


def _ended(job: dict[str, str]) -> bool:
    return job["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


def _requeued(job: dict[str, str]) -> bool:
    assert not _ended(job), job
    return job["Restarts"] == "1"


@pytest.fixture
def train(submit: Submit, tmp_path: Path) -> Submit:
    """Submits the training of a tiny stage 1 with two processes, as task 3 of an array."""
    tiny_tokenizer().autoencoder.save_pretrained(tmp_path / "autoencoder" / "autoencoder")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(OVERLAY)

    def run(name: str, *, pause: float) -> str:
        options = [f"--vars.run={tmp_path / name}", f"--data.init_args.pause={pause}"]
        number = submit(
            name,
            *("configs/tiny/stage1.yaml", f"--config={overlay}", *OPTIONS, *options),
            f"--vars.autoencoder={tmp_path / 'autoencoder'}",
            sbatch=("--ntasks-per-node=2", "--array=3"),
        )
        return f"{number}_3"

    return run


def _wait_for(slurm: Cluster, number: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert not _ended(slurm.job(number)), slurm.job(number)
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _shorten(slurm: Cluster, number: str) -> None:
    """Let a running job end in one to two minutes; SLURM's limits count minutes."""
    days_hours, minutes, _ = slurm.job(number)["RunTime"].rsplit(":", 2)
    assert days_hours == "00"
    slurm.run("scontrol", "update", f"JobId={number}", f"TimeLimit={int(minutes) + 2}")


def _checkpoint(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return state


@pytest.mark.slow
def test_a_job_at_its_time_limit_is_requeued_and_ends_like_an_undisturbed_one(
    slurm: Cluster, train: Submit, tmp_path: Path
) -> None:
    undisturbed = train("undisturbed", pause=0.0)
    stopped = train("stopped", pause=1.0)
    checkpoints = tmp_path / "stopped" / "checkpoints"
    _wait_for(slurm, stopped, lambda: any(checkpoints.glob("*.ckpt")))
    _shorten(slurm, stopped)
    slurm.wait(stopped, _requeued, seconds=PATIENCE)
    assert not (tmp_path / "stopped" / "model").exists()
    slurm.run("scontrol", "update", f"JobId={stopped}", "TimeLimit=60")
    for job in (undisturbed, stopped):
        slurm.wait(job, _ended, seconds=PATIENCE)
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in ("undisturbed", "stopped")}
    for job in (undisturbed, stopped):
        assert slurm.job(job)["JobState"] == "COMPLETED", logs
    assert slurm.job(undisturbed)["Restarts"] == "0"

    step = re.search(r"Stopped by a signal after step (\d+), saved (\S+)", logs["stopped"])
    assert step is not None, logs["stopped"]
    assert 4 <= int(step[1]) < STEPS
    assert f"requeueing job {stopped}" in logs["stopped"]
    assert f"Restored all states from the checkpoint at {step[2]}" in logs["stopped"]
    assert logs["stopped"].count(f"batches from step {step[1]}") == 2
    assert "MEMBER: 2/2" in logs["stopped"]
    assert "auto-requeueing" not in logs["stopped"]  # which is Lightning's own

    first, second = (_checkpoint(tmp_path / name) for name in ("undisturbed", "stopped"))
    assert first["global_step"] == second["global_step"] == STEPS
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)
    for part in ("hyper_encoder", "quantizer", "latent_decoder", "masked_transformer"):
        file = Path("model") / part / "diffusion_pytorch_model.safetensors"
        exported = [load_file(tmp_path / name / file) for name in ("undisturbed", "stopped")]
        torch.testing.assert_close(*exported, rtol=0, atol=0)


@pytest.mark.slow
def test_a_job_that_does_not_heed_the_signal_is_requeued_all_the_same(
    slurm: Cluster, train: Submit, tmp_path: Path
) -> None:
    hanging = train("hanging", pause=1000.0)
    log = tmp_path / "hanging.log"
    # The handlers are in place before the data loader starts.
    _wait_for(slurm, hanging, lambda: log.exists() and log.read_text().count("from step 0") == 2)
    _shorten(slurm, hanging)
    slurm.wait(hanging, _requeued, seconds=PATIENCE)
    slurm.run("scancel", hanging)
    before, requeueing, _ = log.read_text().partition(f"requeueing job {hanging}")
    assert requeueing
    assert "srun: error" not in before  # the tasks ended neither by themselves nor of the signal


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Stands for Python, to see what the script makes of the ways in which training can end.

    It writes its arguments to the log. The first one after ``-m percov2.fit --config`` is the code
    with which it exits at first; ``signal`` waits for SIGUSR1. Started again, it exits with 0.
    Task 0 of an array takes its time.
    """
    file = tmp_path / "program"
    file.write_text(
        """#!/bin/bash
echo "arguments: $*"
[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || exit 0
[[ ${SLURM_ARRAY_TASK_ID:-} != 0 ]] || exec sleep 20
[[ $4 == signal ]] || exit "$4"
trap 'echo signalled; exit 85' USR1
echo waiting
while true; do sleep 0.1; done
"""
    )
    file.chmod(0o755)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 3])
def test_an_evaluation_shares_its_work_among_the_tasks(
    slurm: Cluster, submit: Submit, tmp_path: Path, code: int
) -> None:
    program, log = tmp_path / "program", tmp_path / "evaluation.log"
    told = "rank $RANK, here $LOCAL_RANK, of $WORLD_SIZE, at $MASTER_ADDR:$MASTER_PORT"
    program.write_text(f'#!/bin/bash\necho "{told}: $*"\nexit {code}\n')
    program.chmod(0o755)
    number = submit(
        "evaluation",
        *("results", "--data=kodak"),
        sbatch=("--ntasks-per-node=2", "--array=3"),
        script="evaluate",
        PERCOV2_PYTHON=str(program),
    )
    slurm.wait(f"{number}_3", _ended, seconds=PATIENCE)
    assert slurm.job(f"{number}_3")["JobState"] == ("FAILED" if code else "COMPLETED")
    lines = sorted(line for line in log.read_text().splitlines() if line.startswith("rank "))
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.startswith(f"rank {rank}, here {rank}, of 2, at ")
        assert line.endswith(
            ": -m percov2 evaluate --output results/32x256 "
            "--model runs/sd3/32x256/stage2/model --data=kodak"
        )
    reason = {0: "", 1: "some pictures failed", 3: "percov2 evaluate failed with exit code 3"}
    assert reason[code] in log.read_text()


@pytest.mark.slow
def test_an_evaluation_that_is_stopped_is_requeued(
    slurm: Cluster, submit: Submit, tmp_path: Path
) -> None:
    program, log = tmp_path / "program", tmp_path / "stopped.log"
    program.write_text(
        "#!/bin/bash\n[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || exit 0\necho waiting\nsleep 1000\n"
    )
    program.chmod(0o755)
    number = submit(
        "stopped",
        "results",
        sbatch=("--ntasks-per-node=1",),
        script="evaluate",
        PERCOV2_PYTHON=str(program),
    )
    _wait_for(slurm, number, lambda: log.exists() and "waiting" in log.read_text())
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    slurm.wait(number, _ended, seconds=PATIENCE)
    job = slurm.job(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert log.read_text().count(f"evaluate.sbatch: requeueing job {number}") == 1


@pytest.mark.slow
def test_of_an_array_only_the_stopped_task_is_requeued(
    slurm: Cluster, submit: Submit, program: Path, tmp_path: Path
) -> None:
    number = submit(
        "array-%a", "85", sbatch=("--ntasks-per-node=1", "--array=0,5"), PERCOV2_PYTHON=str(program)
    )
    for task in (0, 5):
        slurm.wait(f"{number}_{task}", _ended, seconds=PATIENCE)
    jobs = [slurm.job(f"{number}_{task}") for task in (0, 5)]
    assert [job["JobState"] for job in jobs] == ["COMPLETED", "COMPLETED"]
    assert [job["Restarts"] for job in jobs] == ["0", "1"]
    logs = [(tmp_path / f"array-{task}.log").read_text() for task in (0, 5)]
    for log, rate in zip(logs, (_rates()[0], _rates()[5]), strict=True):
        assert (
            f"arguments: -m percov2.fit --config 85 --config configs/rate/{rate}.yaml "
            "--config configs/slurm.yaml --trainer.num_nodes=1 --trainer.devices=1 "
            "--ckpt_path=auto\n"
        ) in log


@pytest.mark.slow
@pytest.mark.parametrize("code", [85, 138, 143])
def test_restarts_have_a_limit(
    slurm: Cluster, submit: Submit, program: Path, tmp_path: Path, code: int
) -> None:
    number = submit(
        "limit",
        str(code),
        sbatch=("--ntasks-per-node=1",),
        PERCOV2_PYTHON=str(program),
        PERCOV2_MAX_RESTARTS="0",
    )
    slurm.wait(number, _ended, seconds=PATIENCE)
    assert slurm.job(number)["JobState"] == "FAILED"
    assert "stopped, not requeued after 0 restarts" in (tmp_path / "limit.log").read_text()


@pytest.mark.slow
def test_an_error_is_no_reason_to_requeue(
    slurm: Cluster, submit: Submit, program: Path, tmp_path: Path
) -> None:
    number = submit("error", "1", sbatch=("--ntasks-per-node=2",), PERCOV2_PYTHON=str(program))
    slurm.wait(number, _ended, seconds=PATIENCE)
    assert slurm.job(number)["JobState"] == "FAILED"
    assert "percov2.fit failed with exit code 1: see above" in (tmp_path / "error.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["preempted", "told by hand"])
def test_a_warned_job_is_requeued(
    slurm: Cluster, submit: Submit, program: Path, tmp_path: Path, how: str
) -> None:
    log = tmp_path / "warned.log"
    number = submit(
        "warned", "signal", sbatch=("--ntasks-per-node=2",), PERCOV2_PYTHON=str(program)
    )
    _wait_for(slurm, number, lambda: log.exists() and log.read_text().count("waiting") == 2)
    if how == "preempted":
        slurm.run(
            *("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null"),
            *("--wait", "--wrap=true"),
        )
    else:
        slurm.run("scancel", "--batch", "--signal=USR1", number)
    slurm.wait(number, _ended, seconds=PATIENCE)
    job = slurm.job(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    text = log.read_text()
    assert text.count("signalled\n") == 2
    assert text.count("requeueing job") == 1
