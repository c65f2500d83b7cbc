import importlib.metadata
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import types
import venv
from pathlib import Path

import pytest

import nnunetv2_misfm
from nnunetv2_misfm import _startup, installation
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.installation import (
    EXPORT,
    HOOK,
    HOOK_NAME,
    Finding,
    check,
    disable,
    discovery_folder,
    enable,
    require_supported_nnunet,
)

PACKAGE = Path(nnunetv2_misfm.__file__).parent
OURS = str(PACKAGE / "trainers" / "discovery")
INHERITED = {name: value for name, value in os.environ.items() if name not in ("nnUNet_extTrainer", "PYTHONPATH")}
EDITABLE = "_editable_impl_nnunetv2_misfm.pth"  # as hatchling 1.33 names it
PRINT_SEARCH_PATH = "import os; print(os.environ.get('nnUNet_extTrainer'))"
PRINT_ENABLE = "from nnunetv2_misfm.installation import enable; print(enable())"


class Environment:
    """A bare virtual environment, without pip, that can import the package as an editable install lets it."""

    def __init__(self, folder: Path, *, user_base: Path | None = None, editable: bool = True) -> None:
        venv.create(folder, symlinks=True, system_site_packages=user_base is not None)
        self.python = folder / "bin" / "python"
        (self.site_folder,) = (folder / "lib").glob("python3*/site-packages")
        self.variables = {"PYTHONUSERBASE": str(user_base)} if user_base else {}
        if editable:
            (self.site_folder / EDITABLE).write_text(f"{PACKAGE.parent}\n")

    def run(self, code: str, **variables: str) -> str:
        """What the code prints in a fresh interpreter, which must say nothing on stderr."""
        done = subprocess.run(
            [self.python, "-c", code],
            env={**INHERITED, **self.variables, **variables},
            cwd=self.site_folder.parent,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()


def joined(*entries: str) -> str:
    return os.pathsep.join(entries)


# The variable


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, OURS),
        ("", OURS),
        (" ", OURS),
        ("/mine", joined("/mine", OURS)),
        (joined("/z", "/a"), joined("/z", "/a", OURS)),
        (OURS, OURS),
        (OURS + os.sep, OURS + os.sep),
        (joined(OURS, "/mine"), joined(OURS, "/mine")),
        (joined("/mine", OURS, "/other"), joined("/mine", OURS, "/other")),
        (joined("/mine", ""), joined("/mine", "", OURS)),
    ],
)
def test_our_folder_is_appended_once_behind_the_users_own(monkeypatch, before, after):
    if before is None:
        monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    else:
        monkeypatch.setenv("nnUNet_extTrainer", before)
    for _ in range(2):
        _startup.append_discovery_folder()
        assert os.environ["nnUNet_extTrainer"] == after


def test_our_folder_reached_through_a_link_is_not_listed_again(monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(OURS)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "link"))
    _startup.append_discovery_folder()
    assert os.environ["nnUNet_extTrainer"] == str(tmp_path / "link")


def test_the_discovery_folder_is_no_package_and_holds_one_module():
    assert discovery_folder() == Path(OURS)
    assert [path.name for path in discovery_folder().glob("*.py")] == ["nnunetv2_misfm_trainers.py"]


# The hook


@pytest.fixture(scope="module")
def enabled(tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("enabled") / "venv")
    hook = environment.site_folder / HOOK_NAME
    for _ in range(2):
        assert environment.run(PRINT_ENABLE) == str(hook)
    assert [path.name for path in environment.site_folder.glob(f"*{HOOK_NAME}*")] == [HOOK_NAME]
    return environment


def test_an_enabled_interpreter_has_our_folder_without_a_variable(enabled):
    assert enabled.run(PRINT_SEARCH_PATH) == OURS


def test_an_enabled_interpreter_appends_to_the_users_variable(enabled):
    assert enabled.run(PRINT_SEARCH_PATH, nnUNet_extTrainer="/mine") == joined("/mine", OURS)


def test_neither_the_hook_nor_this_module_imports_torch_or_numpy(enabled):
    names = "sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'nnunetv2'})"
    ours = "sorted(name for name in sys.modules if name.startswith('nnunetv2_misfm'))"
    code = f"import sys; print({names}, {ours}); import nnunetv2_misfm.installation; print({names})"
    assert enabled.run(code) == "[] ['nnunetv2_misfm', 'nnunetv2_misfm._startup']\n[]"


def test_disable_removes_the_file_and_then_has_nothing_to_remove(tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.run(PRINT_ENABLE)
    print_disable = "from nnunetv2_misfm.installation import disable; print([str(path) for path in disable()])"
    assert environment.run(print_disable) == f"['{environment.site_folder / HOOK_NAME}']"
    assert environment.run(print_disable) == "[]"
    assert environment.run(PRINT_SEARCH_PATH) == "None"


@pytest.mark.parametrize("left_behind", ["nothing", "an empty folder", "a module that raises"])
def test_the_hook_is_silent_and_does_nothing_once_the_package_is_gone(tmp_path, left_behind):
    environment = Environment(tmp_path / "venv", editable=False)
    (environment.site_folder / HOOK_NAME).write_text(HOOK)
    if left_behind != "nothing":
        (environment.site_folder / "nnunetv2_misfm").mkdir()
    if left_behind == "a module that raises":
        (environment.site_folder / "nnunetv2_misfm" / "_startup.py").write_text("raise RuntimeError('damaged')\n")
    assert environment.run(PRINT_SEARCH_PATH) == "None"


def test_enabling_is_refused_where_a_fresh_interpreter_cannot_import_the_package(tmp_path):
    environment = Environment(tmp_path / "venv", editable=False)
    code = f"""
import sys
sys.path.append({str(PACKAGE.parent)!r})
from nnunetv2_misfm.errors import MisfmError
try:
    {PRINT_ENABLE}
except MisfmError as error:
    print(error)
"""
    sentence = environment.run(code)
    assert f"a start-up file in {environment.site_folder} has no effect" in sentence
    assert EXPORT in sentence and OURS in sentence and "--target" in sentence
    assert not (environment.site_folder / HOOK_NAME).exists()


NO_SITE_FOLDER = "import sysconfig; sysconfig.get_path = lambda name: '/nonexistent'; "


def test_enabling_uses_the_users_site_where_the_environment_cannot_be_written(tmp_path):
    environment = Environment(tmp_path / "venv", user_base=tmp_path / "user", editable=False)
    user_site = Path(environment.run("import site; print(site.getusersitepackages())"))
    user_site.mkdir(parents=True)
    (user_site / EDITABLE).write_text(f"{PACKAGE.parent}\n")
    assert environment.run(NO_SITE_FOLDER + PRINT_ENABLE) == str(user_site / HOOK_NAME)
    assert environment.run(PRINT_SEARCH_PATH) == OURS


def test_disable_removes_the_hook_from_both_places(tmp_path, monkeypatch):
    folders = [tmp_path / "environment", tmp_path / "user"]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folders[0]))
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(folders[1]))
    monkeypatch.setattr(site, "ENABLE_USER_SITE", True)
    for folder in folders:
        folder.mkdir()
        (folder / HOOK_NAME).write_text(HOOK)
        (folder / "other.pth").write_text("")
    assert disable() == [folder / HOOK_NAME for folder in folders]
    assert sorted(path.name for path in tmp_path.rglob("*.pth")) == ["other.pth", "other.pth"]


def test_enabling_names_every_place_that_it_could_not_write_and_the_alternative(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nonexistent/environment")
    monkeypatch.setattr(site, "getusersitepackages", lambda: "/nonexistent/user")
    monkeypatch.setattr(site, "ENABLE_USER_SITE", True)
    with pytest.raises(MisfmError, match="could not be written into /nonexistent/environment or /nonexistent/user"):
        enable()
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    with pytest.raises(MisfmError) as refusal:
        enable()
    assert "/nonexistent/environment; instead" in str(refusal.value)
    assert EXPORT == 'export nnUNet_extTrainer="$(nnUNetv2_misfm path)"' and EXPORT in str(refusal.value)


# The version of nnU-Net


@pytest.fixture
def pretend(monkeypatch):
    """Sets the version that a distribution seems to have; None where it seems not to be installed."""
    versions = {"nnunetv2": "2.8.1", "torch": "2.1.2"}

    def version(name: str) -> str:
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


@pytest.mark.parametrize("version", ["2.8", "2.8.0", "2.8.1", "2.8.1.post1", "2.10.3", "2.99"])
def test_nnunet_from_2_8_up_to_3_is_accepted(pretend, version):
    pretend["nnunetv2"] = version
    require_supported_nnunet()


@pytest.mark.parametrize("version", ["1.7.1", "2.7.0", "2.7.99", "3.0.0", "3.1", "10.0", "unknown"])
def test_another_nnunet_is_refused_in_one_sentence(pretend, version):
    pretend["nnunetv2"] = version
    with pytest.raises(MisfmError) as refusal:
        require_supported_nnunet()
    expected = (
        f'nnunetv2 {version} is installed but nnunetv2_misfm needs >= 2.8 and < 3: pip install "nnunetv2>=2.8,<3"'
    )
    assert str(refusal.value) == expected


def test_a_missing_nnunet_is_refused_in_one_sentence(pretend):
    pretend["nnunetv2"] = None
    with pytest.raises(MisfmError, match="^nnunetv2 is not installed but nnunetv2_misfm needs >= 2.8 and < 3: pip"):
        require_supported_nnunet()


# The check


@pytest.fixture
def healthy(monkeypatch, tmp_path, pretend):
    """An environment without a fault, whose nnU-Net finds a stand-in for our trainer."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", OURS)
    monkeypatch.setenv("PATH", str(add_command(tmp_path / "own")))
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *_: str(tmp_path / "own"))
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path / "own")])
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    trainer = type("nnUNetTrainerPCTNetVF", (), {"__module__": "nnunetv2_misfm.stand_in"})
    module = types.SimpleNamespace(nnUNetTrainerPCTNetVF=trainer)
    monkeypatch.setitem(sys.modules, "nnunetv2_misfm.stand_in", module)
    finder = types.SimpleNamespace(recursive_find_trainer_class_by_name=lambda name: getattr(module, name))
    monkeypatch.setitem(sys.modules, "nnunetv2.utilities.find_objects", finder)
    return tmp_path, finder


def add_command(folder: Path) -> Path:
    folder.mkdir()
    (folder / "nnUNetv2_train").touch(mode=0o755)
    return folder


def faults() -> dict[str, str]:
    found = check()
    assert all(finding.what and bool(finding.remedy) != finding.ok for finding in found)
    return {finding.what: finding.remedy for finding in found if not finding.ok}


def test_a_healthy_environment_has_no_fault(healthy):
    assert faults() == {}
    what = "\n".join(finding.what for finding in check())
    for expected in (
        sys.version.split()[0],
        "torch 2.1.2",
        "nnunetv2 2.8.1",
        OURS,
        "nnU-Net finds nnUNetTrainerPCTNetVF",
    ):
        assert expected in what


def test_what_is_missing_or_too_old_is_named_with_its_remedy(healthy, pretend):
    pretend.update({"torch": None, "nnunetv2": "2.7.0"})
    sentences = faults()
    assert len(sentences) == 2 and "https://pytorch.org" in sentences["torch is not installed."]
    (too_old,) = (what for what in sentences if what.startswith("nnunetv2 2.7.0 is installed but"))
    assert sentences[too_old] == 'Run pip install "nnunetv2>=2.8,<3"'


@pytest.mark.parametrize("name", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_each_data_folder_must_be_set_exist_and_be_writable(healthy, monkeypatch, name):
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(name))
    assert list(faults()) == [f"{name} is {os.environ[name]}, which this user may not write to."]
    monkeypatch.setenv(name, "/nonexistent")
    assert faults() == {f"{name} is /nonexistent, which is no folder.": f"Make it or mend {name}."}
    monkeypatch.delenv(name)
    assert faults() == {f"{name} is not set.": f"Run export {name}=/path/to/{name}"}


def test_an_unset_search_path_names_both_ways_to_set_it(healthy, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer")
    assert faults() == {"nnUNet_extTrainer is not set.": f"Run {EXPORT} or, for good, nnUNetv2_misfm enable"}


def test_a_search_path_without_our_folder_keeps_the_users_own(healthy, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(healthy[0]))
    ((what, remedy),) = faults().items()
    assert what == f"nnUNet_extTrainer is {healthy[0]} and does not name our folder."
    assert f'export nnUNet_extTrainer="$nnUNet_extTrainer{os.pathsep}$(nnUNetv2_misfm path)"' in remedy


@pytest.mark.parametrize("entry", [PACKAGE, PACKAGE / "trainers", PACKAGE.parent, "own"])
def test_an_entry_that_makes_nnunet_import_modules_twice_is_a_fault(healthy, monkeypatch, entry):
    entry = healthy[0] / entry  # an absolute entry stays as it is; "own" is the environment's site folder
    monkeypatch.setenv("nnUNet_extTrainer", joined(str(entry), OURS))
    reason = "from where nnU-Net imports installed packages a second time under other names."
    assert faults() == {f"nnUNet_extTrainer names {entry}, {reason}": f"Remove {entry} from it."}


def test_stale_and_foreign_entries_are_faults_and_the_users_own_are_not(healthy, monkeypatch):
    stale, mine, copy = healthy[0] / "gone", healthy[0], healthy[0] / "nnunetv2_misfm" / "trainers" / "discovery"
    copy.mkdir(parents=True)
    monkeypatch.setenv("nnUNet_extTrainer", joined(*map(str, (stale, mine, copy)), "", OURS))
    first, second = faults()
    assert first == f"nnUNet_extTrainer names {stale}, which does not exist."
    assert second.startswith(f"nnUNet_extTrainer names {copy}, which belongs to another copy of nnunetv2_misfm")


def test_a_search_that_fails_or_finds_something_else_is_a_fault(healthy, capsys):
    _, finder = healthy

    def search(name):
        print("chatter")
        raise ImportError("of a folder before ours. And advice")

    finder.recursive_find_trainer_class_by_name = search
    (what,) = faults()
    assert what == "nnU-Net does not find nnUNetTrainerPCTNetVF: ImportError: of a folder before ours"
    assert capsys.readouterr().out == ""
    for module, expected in [
        ("my_trainers", "nnU-Net finds another nnUNetTrainerPCTNetVF, of my_trainers."),
        ("nnunetv2_misfm.stand_in", "nnU-Net finds a second copy of nnUNetTrainerPCTNetVF; it cannot be pickled."),
    ]:
        other = type("nnUNetTrainerPCTNetVF", (), {"__module__": module})
        finder.recursive_find_trainer_class_by_name = lambda name, other=other: other
        ((what, remedy),) = faults().items()
        assert what == expected and OURS in remedy


def test_nnunets_own_search_finds_our_class_and_its_chatter_is_silenced(monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_extTrainer", OURS)
    assert Finding(True, "nnU-Net finds nnUNetTrainerPCTNetVF") in check()
    assert capsys.readouterr().out == ""


def test_a_command_of_another_environment_that_comes_first_is_a_fault(healthy, monkeypatch):
    own, other = healthy[0] / "own", add_command(healthy[0] / "other")
    monkeypatch.setenv("PATH", joined(str(other), str(own)))
    (what,) = faults()
    assert what == f"nnUNetv2_train is {other / 'nnUNetv2_train'}, of another environment than {sys.executable}."
    monkeypatch.setenv("PATH", joined(str(own), str(other)))
    assert faults() == {}
    assert any(f"{other / 'nnUNetv2_train'} of other environments" in finding.what for finding in check())
    monkeypatch.setenv("PATH", "/nonexistent")
    assert list(faults()) == ["nnUNetv2_train is not on PATH."]


def test_the_hook_is_reported_and_is_a_fault_only_where_it_did_not_act(healthy, monkeypatch):
    assert "the start-up hook is not enabled" in "\n".join(finding.what for finding in check())
    hook = healthy[0] / "own" / HOOK_NAME
    shutil.copy(__file__, hook)
    assert Finding(True, f"the start-up hook is enabled: {hook}") in check()
    monkeypatch.delenv("nnUNet_extTrainer")
    assert f"the start-up hook {hook} is there but did not act." in faults()


def test_a_hook_that_cannot_be_removed_is_named(healthy):
    hook = healthy[0] / "own" / HOOK_NAME
    hook.touch()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MisfmError, match=f"{hook} could not be removed"):
        patch.setattr(installation.Path, "unlink", raise_permission_error)
        disable()


def raise_permission_error(path, missing_ok=False):
    raise PermissionError(13, "Permission denied", str(path))
