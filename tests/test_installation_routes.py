"""Real installations into throw-away environments that borrow the packages of the running one: no network."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("nnUNet_extTrainer", "PYTHONPATH", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV")
}
PIP_INSTALL = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
PRINT_SEARCH_PATH = "import os; print(os.environ.get('nnUNet_extTrainer'))"

# Run as a file, because worker processes that are not forked import it again. It answers in JSON.
PROBE = """
import contextlib, importlib, inspect, io, json, multiprocessing, os, pickle, sys

OURS = "nnUNetTrainerPCTNetVF"


def find(name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with contextlib.redirect_stdout(io.StringIO()):
        return recursive_find_trainer_class_by_name(name)


def is_what_is_found_and_imported(trainer):
    return trainer is find(OURS) is find(OURS) is getattr(importlib.import_module(trainer.__module__), OURS)


def ask_workers(trainer):
    pools = {name: multiprocessing.get_context(name).Pool(1) for name in ("spawn", "forkserver")}
    pending = {name: pool.apply_async(is_what_is_found_and_imported, (trainer,)) for name, pool in pools.items()}
    return {name: answer.get(timeout=300) for name, answer in pending.items()}


def ask_check():
    from nnunetv2_misfm.installation import check

    return [finding.what for finding in check() if finding.ok]


def is_found_without_the_variable():
    del os.environ["nnUNet_extTrainer"]
    try:
        return bool(find(OURS))
    except RuntimeError:
        return False


if __name__ == "__main__":
    folder, users_trainer = sys.argv[1:]
    trainer = find(OURS)
    answer = {
        "file": inspect.getfile(trainer),
        "check": ask_check(),
        "same": is_what_is_found_and_imported(trainer),
        "pickles": pickle.loads(pickle.dumps(trainer)) is trainer,
        "workers": ask_workers(trainer),
        "users": find(users_trainer).__name__,
    }
    os.environ["nnUNet_extTrainer"] = folder
    answer["same with our folder alone"] = is_what_is_found_and_imported(trainer)
    answer["found without the variable"] = is_found_without_the_variable()
    print(json.dumps(answer))
"""

USERS_TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerOfTheUser(nnUNetTrainer):
    pass
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What the command prints on stdout; it must succeed."""
    done = subprocess.run(command, cwd=cwd, env={**ENVIRONMENT, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


class Environment:
    """A virtual environment whose only own package is ours, installed along one of the routes."""

    def __init__(self, route: str, folder: Path, borrowed: Path, wheel: Path) -> None:
        venv.create(folder / "venv", symlinks=True)
        self.route, self.folder = route, folder
        self.scripts = folder / "venv" / "bin"
        self.python = self.scripts / "python"
        (self.site_folder,) = (folder / "venv" / "lib").glob("python3*/site-packages")
        (self.site_folder / "borrowed.pth").write_text(f"{borrowed}\n")
        self.package = self.site_folder / "nnunetv2_misfm"
        if route == "uv pip install":
            self.uv("install", "--no-deps", "--no-build-isolation", str(wheel))
        elif route == "pip install":
            run(self.python, *PIP_INSTALL, wheel, cwd=folder)
        else:
            run(self.python, *PIP_INSTALL, "--editable", REPOSITORY, cwd=folder)
            self.package = REPOSITORY / "nnunetv2_misfm"

    def uv(self, action: str, *arguments: str) -> None:
        options = ["--quiet", "--offline", "--no-cache", "--python", str(self.python)]
        run(sys.executable, "-m", "uv", "pip", action, *options, *arguments, cwd=self.folder)

    def uninstall(self) -> None:
        if self.route == "uv pip install":
            self.uv("uninstall", "nnunetv2-misfm")
        else:
            run(self.python, "-m", "pip", "uninstall", "--quiet", "--yes", "nnunetv2-misfm", cwd=self.folder)

    def misfm(self, action: str) -> str:
        return run(self.scripts / "nnUNetv2_misfm", action, cwd=self.folder)

    def search_path(self, **variables: str) -> str:
        return run(self.python, "-c", PRINT_SEARCH_PATH, cwd=self.folder, **variables)

    def probe(self, *arguments: str, **variables: str) -> dict:
        (self.folder / "probe.py").write_text(PROBE)
        lines = run(self.python, "probe.py", *arguments, cwd=self.folder, **variables).splitlines()
        return json.loads(lines[-1])


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory) -> Path:
    """A folder of links to the packages of the running environment, ours apart."""
    folder = tmp_path_factory.mktemp("borrowed")
    for source in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(source).iterdir():
            if "nnunetv2_misfm" not in entry.name and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY, cwd=folder)
    (built,) = folder.glob("nnunetv2_misfm-*.whl")
    return built


@pytest.fixture(scope="module", params=["pip install", "pip install --editable", "uv pip install"])
def installed(request, tmp_path_factory, borrowed, wheel) -> Environment:
    return Environment(request.param, tmp_path_factory.mktemp("installed"), borrowed, wheel)


def test_the_hook_appends_our_folder_behind_the_users_own_until_disabled(installed):
    ours, hook = installed.misfm("path"), installed.site_folder / "nnunetv2_misfm_trainers.pth"
    assert ours == str(installed.package / "trainers" / "discovery")
    assert str(hook) in installed.misfm("enable")
    assert installed.search_path() == ours
    assert installed.search_path(nnUNet_extTrainer="/mine") == f"/mine{os.pathsep}{ours}"
    assert installed.search_path(nnUNet_extTrainer=ours) == ours
    assert str(hook) in installed.misfm("disable")
    assert installed.search_path() == "None"


def test_nnunet_finds_the_users_trainer_and_ours_as_one_class_that_every_kind_of_worker_can_unpickle(installed):
    users = installed.folder / "trainers of the user"
    users.mkdir()
    (users / "trainer_of_the_user.py").write_text(USERS_TRAINER)
    installed.misfm("enable")
    answer = installed.probe(installed.misfm("path"), "nnUNetTrainerOfTheUser", nnUNet_extTrainer=str(users))
    assert Path(answer.pop("file")).is_relative_to(installed.package / "trainers")
    hook = installed.site_folder / "nnunetv2_misfm_trainers.pth"
    fine = answer.pop("check")
    assert {"nnU-Net finds nnUNetTrainerPCTNetVF", f"the start-up hook is enabled: {hook}"} <= set(fine)
    assert answer == {
        "same": True,
        "pickles": True,
        "workers": {"spawn": True, "forkserver": True},
        "users": "nnUNetTrainerOfTheUser",
        "same with our folder alone": True,
        "found without the variable": False,
    }


def test_a_hook_left_behind_by_an_uninstalled_package_is_silent(installed, tmp_path, borrowed, wheel):
    environment = Environment(installed.route, tmp_path, borrowed, wheel)
    environment.misfm("enable")
    environment.uninstall()
    assert (environment.site_folder / "nnunetv2_misfm_trainers.pth").is_file()
    start = [environment.python, "-c", PRINT_SEARCH_PATH]
    done = subprocess.run(start, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
