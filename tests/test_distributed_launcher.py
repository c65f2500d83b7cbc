"""Real `torchrun` on the CPU: one agent with two processes, and two agents that stand for two machines."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from commands import parallel
from conftest import Workspace
from launcher import FINETUNE, PRETRAIN, Launcher, free_port
from torch import distributed as dist

from nnunetv2_misfm.distributed import load_pretrained, main, require_no_checkpoints
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.interruption import EXIT_CODE
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.weights.checkpoint import tensors_sha256

pytestmark = pytest.mark.slow

# What torchrun itself exits with, whatever its processes' codes
TORCHRUN_FAILED = 1
# What it tells its processes
STARTED = {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
AT_ONE_STORE = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "1"}


undecorated_main = inspect.unwrap(main)  # torchrun's decorator would enable Python's fault handler


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """All launches, in two chains at once."""
    here = Launcher(tmp_path_factory.mktemp("launcher"))
    here.write_dataset()
    here.launch("plain", PRETRAIN, "quick")

    def ended_and_resumed() -> None:
        here.launch("ended", PRETRAIN, "quick", variables=[{"MISFM_TEST_DISTURB": "signal_agent 0 1 1"}])
        here.launch("resumed", PRETRAIN, "quick", "--c", results="ended")
        weights = here.fold("plain") / "checkpoint_final.pth"
        here.launch("finetuned", FINETUNE, "short", "-pretrained_weights", weights)

    def killed_and_others() -> None:
        killer = {"MISFM_TEST_DISTURB": "die 1 1 2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        here.launch_on_two_machines(
            "killed", PRETRAIN, "quick", torchrun=("--max-restarts", "1"), variables=[killer] * 2
        )
        one_rank = {"MISFM_TEST_DISTURB": "signal_me 1 0 1", "nnUNet_n_proc_DA": "2"}
        here.launch("signalled", PRETRAIN, "whole", variables=[one_rank])
        apart = {"nnUNet_results": str(here.root / "elsewhere")}
        here.launch_on_two_machines("apart", PRETRAIN, "quick", "--c", variables=[{}, apart], results="plain")

    parallel(ended_and_resumed, killed_and_others)
    return here


def test_one_agent_trains_on_all_its_processes(launcher: Launcher) -> None:
    assert launcher.finished["plain"].codes == [0]
    first, second = launcher.accounts("plain")
    assert first["logged"] == second["logged"] and first["weights"] == second["weights"]
    assert len(first["logged"]["train_losses"]) == 2
    assert not set(first["losses"]) & set(second["losses"])
    means = [sum(first["losses"][start : start + 3] + second["losses"][start : start + 3]) / 6 for start in (0, 3)]
    assert first["logged"]["train_losses"] == pytest.approx(means)


def test_only_the_first_rank_writes_checkpoints(launcher: Launcher) -> None:
    first, second = launcher.accounts("plain")
    latest, best, final = (f"checkpoint_{name}.pth" for name in ("latest", "best", "final"))
    assert [name for name in first["written"] if name != best] == [latest] * 6 + [final]
    assert second["written"] == []
    checkpoint = torch.load(launcher.fold("plain") / final, weights_only=True)
    assert len(checkpoint["misfm_state"]["ranks"]) == 2
    assert tensors_sha256(checkpoint["network_weights"]) == first["weights"]


def test_batch_is_split_as_nnunet_splits_it(launcher: Launcher) -> None:
    assert [(a["batch_size"], a["lr"], a["device"]) for a in launcher.accounts("plain")] == [(1, 1e-3, "cpu")] * 2


def test_batch_per_gpu_is_kept_and_the_learning_rate_follows(launcher: Launcher) -> None:
    expected = (2, pytest.approx(1e-3 * math.sqrt(2)))
    assert [(a["batch_size"], a["lr"]) for a in launcher.accounts("signalled")] == [expected] * 2


def test_two_machines_restart_after_a_kill_and_end_as_one_did(launcher: Launcher) -> None:
    assert launcher.finished["killed"].codes == [0, 0]
    plain, before, after = launcher.accounts("plain"), launcher.accounts("killed"), launcher.accounts("killed", 1)
    for rank in (0, 1):
        assert (before[rank]["begins_with"], after[rank]["begins_with"]) == ([0, 0], [1, 2])
        assert before[rank]["losses"][:5] == plain[rank]["losses"][:5]
        assert after[rank]["losses"] == plain[rank]["losses"][5:]
        assert after[rank]["logged"] == plain[rank]["logged"]
        assert after[rank]["weights"] == plain[rank]["weights"]


def test_sigterm_to_torchrun_leaves_a_checkpoint_from_which_c_goes_on_exactly(launcher: Launcher) -> None:
    ended = launcher.finished["ended"]
    assert ended.codes == [TORCHRUN_FAILED]
    assert f"Ended by SIGTERM in epoch 1 after 2 of 3 steps; go on with --c. Exit code {EXIT_CODE}." in ended.output
    assert launcher.finished["resumed"].codes == [0]
    for plain, resumed in zip(launcher.accounts("plain"), launcher.accounts("ended", 1), strict=True):
        assert resumed["begins_with"] == [1, 2]
        assert resumed["losses"] == plain["losses"][5:]
        assert (resumed["logged"], resumed["weights"]) == (plain["logged"], plain["weights"])


def test_sigusr1_to_one_rank_ends_all_with_the_documented_code(launcher: Launcher) -> None:
    signalled = launcher.finished["signalled"]
    assert signalled.codes == [TORCHRUN_FAILED]
    assert signalled.output.count(f"exitcode  : {EXIT_CODE} (pid") == 2
    checkpoint = torch.load(
        launcher.fold("signalled", configuration="whole") / "checkpoint_latest.pth", weights_only=True
    )
    assert [len(rank["losses"]) for rank in checkpoint["misfm_state"]["ranks"]] == [2, 2]


def test_data_workers_serve_every_rank(launcher: Launcher) -> None:
    assert [account["workers"] for account in launcher.accounts("signalled")] == [2, 2]


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="no /proc to find processes in")
def test_no_process_outlives_torchrun(launcher: Launcher) -> None:
    assert {name: finished.left_behind for name, finished in launcher.finished.items()} == dict.fromkeys(
        launcher.finished, []
    )


def test_pretrained_weights_reach_all_ranks_and_are_accounted_for_once(launcher: Launcher) -> None:
    assert launcher.finished["finetuned"].codes == [0], launcher.finished["finetuned"].output[-4000:]
    file = launcher.fold("plain") / "checkpoint_final.pth"
    weights = torch.load(file, weights_only=True)["network_weights"]
    body = tensors_sha256({name: tensor for name, tensor in weights.items() if ".seg_layers." not in name})
    first, second = launcher.accounts("finetuned")
    assert (first["body"], second["body"]) == (body, body)
    assert first["weights"] == second["weights"]
    report = json.loads((launcher.fold("finetuned", FINETUNE, "short") / "pretrained_weights.json").read_text())
    assert (report["route"], report["share"], report["file"]) == ("-pretrained_weights", 1, str(file))


def test_machines_that_do_not_share_their_results_are_refused(launcher: Launcher) -> None:
    apart = launcher.finished["apart"]
    assert apart.codes == [TORCHRUN_FAILED] * 2
    assert "expected all ranks to find the same checkpoints, got " in apart.output
    assert "none on rank" in apart.output and "checkpoint_final.pth of 2" in apart.output
    assert "let nnUNet_results be one folder that all machines share" in apart.output


def test_error_of_the_user_is_one_sentence_in_the_terminal_and_in_torchruns_report(launcher: Launcher) -> None:
    output = launcher.finished["apart"].output.split("expected all ranks to find the same checkpoints")
    terminal, report = output[0], output[1]
    assert terminal.splitlines()[-1].startswith("nnunetv2_misfm.distributed, rank ")
    assert "Traceback" not in terminal
    assert "nnunetv2_misfm.distributed FAILED" in report and "exitcode  : 2 (pid" in report
    assert report.endswith("MisfmError: ") and report.count("nnunetv2_misfm/distributed.py") == 1


def test_trainer_that_is_not_ours_is_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    alone = {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(free_port()), "nnUNet_extTrainer": ""}
    for name, value in (STARTED | alone).items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(SystemExit) as end:
            undecorated_main(["555", "quick", "0", "-tr", "nnUNetTrainer", "-device", "cpu"])
    finally:
        dist.destroy_process_group()
    assert end.value.code == 2
    sentence = "expected a trainer of nnunetv2_misfm, got nnUNetTrainer, which would take its rank for the number of a"
    assert f"nnunetv2_misfm.distributed, rank 0: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "options", "sentence"),
    [
        ({}, ["-device", "cpu"], "expected the variables that torchrun sets, got no RANK, LOCAL_RANK, WORLD_SIZE,"),
        (STARTED, ["--c", "-pretrained_weights", "x.pth"], "expected --c alone, got it with --val or -pretrained_w"),
        (STARTED, ["--c", "--val"], "expected --c alone, got it with --val or -pretrained_weights; leave one of them"),
        (STARTED | AT_ONE_STORE, ["-device", "cpu"], "expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environme"),
        (STARTED, [], "expected a GPU for every process, got 1 for local rank 1: lower --nproc-per-node, or use -de"),
    ],
)
def test_wrong_start_is_told_before_anything_is_waited_for(
    variables: dict[str, str],
    options: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for name in STARTED | AT_ONE_STORE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with pytest.raises(SystemExit) as end:
        undecorated_main(["555", "quick", "0", "-tr", PRETRAIN, *options])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_new_training_that_may_be_restarted_refuses_checkpoints_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    require_no_checkpoints(tmp_path)
    (tmp_path / "checkpoint_final.pth").touch()
    with pytest.raises(MisfmError, match="got checkpoint_final.pth: go on from there with --c, or move them away"):
        require_no_checkpoints(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    require_no_checkpoints(tmp_path)


def test_pretrained_weights_that_do_not_fit_as_they_are_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    file = str(tmp_path / "weights.pth")
    source, target, other = (workspace.trainer(nnUNetTrainerPCTNet, {"seed": seed}) for seed in (1, 2, 2))
    source.initialize()
    weights = source.network.state_dict()
    torch.save({"network_weights": weights}, file)
    load_pretrained(target, file)
    differ = [name for name, tensor in target.network.state_dict().items() if not torch.equal(tensor, weights[name])]
    assert differ and all(".seg_layers." in name for name in differ)
    stem = next(name for name, tensor in weights.items() if tensor.ndim == 5)
    torch.save({"network_weights": weights | {stem: weights[stem].repeat(1, 2, 1, 1, 1)}}, file)
    with pytest.raises(MisfmError, match=f"1 tensors of .* do not .the first is {stem}: .* nnUNetv2_misfm convert"):
        load_pretrained(other, file)
