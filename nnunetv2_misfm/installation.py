"""How nnU-Net comes to find our trainers: the folder it searches, an opt-in start-up hook, a check in words.

nnU-Net looks for a trainer in its own package, then in the folders of the environment variable
`nnUNet_extTrainer`. That variable must name our discovery folder and no other folder of this package: from
any other, nnU-Net imports the trainers a second time under other names, and then they cannot be pickled.
Nothing here imports torch, `check` apart, which asks nnU-Net itself.
"""

import contextlib
import importlib
import importlib.metadata
import io
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_misfm._startup import DISCOVERY_FOLDER, SEARCH_PATH_VARIABLE, is_listed
from nnunetv2_misfm.errors import MisfmError

OLDEST_PYTHON = (3, 10)  # requires-python in pyproject.toml
OLDEST_NNUNET = (2, 8)  # the first release that reads nnUNet_extTrainer
FIRST_UNSUPPORTED_NNUNET = (3, 0)  # we override methods of nnU-Net, so a new major release is refused
INSTALL_NNUNET = 'pip install "nnunetv2>=2.8,<3"'
SAMPLE_TRAINER = "nnUNetTrainerPCTNetVF"

OUR_FOLDER = "$(nnUNetv2_misfm path)"
EXPORT = f'export {SEARCH_PATH_VARIABLE}="{OUR_FOLDER}"'
EXPORT_BEHIND_OTHERS = f'export {SEARCH_PATH_VARIABLE}="${SEARCH_PATH_VARIABLE}{os.pathsep}{OUR_FOLDER}"'

HOOK_NAME = "nnunetv2_misfm_trainers.pth"  # sorts behind the .pth that an editable install of ours may have
# Python runs only those lines of a .pth file that begin with `import`, hence exec for the try statement.
HOOK = (
    "# written by `nnUNetv2_misfm enable`, removed by `nnUNetv2_misfm disable`\n"
    'import sys; exec("try:\\n from nnunetv2_misfm._startup import append_discovery_folder as append\\n'
    ' append()\\nexcept Exception:\\n pass")\n'
)


@dataclass(frozen=True)
class Finding:
    """One line of `check`: whether something is as it should be, what was found and, if not, what to do."""

    ok: bool
    what: str
    remedy: str = ""


def discovery_folder() -> Path:
    """The folder that `nnUNet_extTrainer` must name."""
    return Path(DISCOVERY_FOLDER)


def require_supported_nnunet() -> None:
    """Return if the installed nnunetv2 is one that this package works with; imports nothing of it.

    Raises:
        MisfmError: nnunetv2 is missing, older than 2.8, or 3 and newer.
    """
    needed = f"nnunetv2_misfm needs >= 2.8 and < 3: {INSTALL_NNUNET}"
    try:
        installed = importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        raise MisfmError(f"nnunetv2 is not installed but {needed}") from None
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if not numbers or not OLDEST_NNUNET <= tuple(map(int, numbers.groups())) < FIRST_UNSUPPORTED_NNUNET:
        raise MisfmError(f"nnunetv2 {installed} is installed but {needed}")


def enable() -> Path:
    """Make nnU-Net's own commands find our trainers in this environment, with no variable to set.

    Writes a start-up file into the environment's site directory or, where that cannot be written, into the user's
    site directory if Python uses one. From then on **Python runs a line of ours at every start of an interpreter of
    this environment**, also for programs that have nothing to do with nnU-Net. So it is opt-in and does one thing:
    append `discovery_folder()` to `nnUNet_extTrainer`, behind what the user has set. It is silent whatever happens
    and does nothing once this package is gone. `disable` removes the file; uninstalling the package does not.

    Outside a virtual environment Python reads the user's site directory before the environment's, so from there the
    hook can only serve a package that is installed for the user as well (pip does so where the environment cannot
    be written). From Python 3.15 on `.start` files are to replace such lines (PEP 829), which still run until 3.17:
    not tested here.

    Returns:
        The file written. Enabling twice is the same as once.

    Raises:
        MisfmError: No site directory can be written, or a fresh interpreter does not act on the file (this
            package was installed with `--target`, or only this one process can import it); then no file is
            left behind.
    """
    folders = _hook_folders()
    for folder in folders:
        try:
            hook = _write_hook(folder)
        except OSError:
            continue
        if _hook_acts():
            return hook
        hook.unlink()
        raise MisfmError(
            f"a start-up file in {folder} has no effect, because {sys.executable} cannot yet import "
            "nnunetv2_misfm when it reads that file (was the package installed elsewhere, such as with "
            f"--target?), so it was removed again; instead, use {EXPORT}, which names {DISCOVERY_FOLDER}"
        )
    raise MisfmError(
        f"the start-up file {HOOK_NAME} could not be written into {' or '.join(map(str, folders))}; "
        f"instead, use {EXPORT}, which names {DISCOVERY_FOLDER}"
    )


def disable() -> list[Path]:
    """Remove what `enable` wrote, from every place it writes to.

    Returns:
        The files removed; empty where the hook was not enabled.

    Raises:
        MisfmError: A file is there but this user may not remove it.
    """
    removed = []
    for hook in _hooks(_hook_folders()):
        try:
            hook.unlink()
        except OSError as error:
            sentence = f"{hook} could not be removed ({error.strerror}); delete it as its owner"
            raise MisfmError(sentence) from error
        removed.append(hook)
    return removed


def check() -> list[Finding]:
    """What stands between this environment and training with our trainers, in plain words.

    Unlike the rest of this module it imports nnU-Net (seconds), to ask nnU-Net's own search for a trainer.

    Returns:
        One finding for each thing looked at; those that are not ok have a remedy.
    """
    return [
        _check_python(),
        _check_torch(),
        *_check_nnunet(),
        *(_check_data_folder(name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")),
        *_check_search_path(),
        _check_command(),
        _check_hook(),
    ]


def _hook_folders() -> list[Path]:
    """The site directories that `enable` may write to, best first."""
    user_site = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [Path(folder) for folder in (sysconfig.get_path("purelib"), *user_site)]


def _hooks(folders: list[Path]) -> list[Path]:
    return [folder / HOOK_NAME for folder in dict.fromkeys(folders) if (folder / HOOK_NAME).is_file()]


def _write_hook(folder: Path) -> Path:
    """Write the hook in one step, so that an interpreter that starts meanwhile never reads half of it."""
    hook = folder / HOOK_NAME
    unfinished = folder / f"{HOOK_NAME}.{os.getpid()}.tmp"
    try:
        unfinished.write_text(HOOK, encoding="ascii")
        os.replace(unfinished, hook)
    finally:
        unfinished.unlink(missing_ok=True)
    return hook


def _hook_acts() -> bool:
    """Whether a fresh interpreter of this environment, given no search path, has our folder on it."""
    question = "import os, sys; sys.exit(sys.argv[2] not in os.getenv(sys.argv[1], '').split(os.pathsep))"
    command = [sys.executable, "-c", question, SEARCH_PATH_VARIABLE, DISCOVERY_FOLDER]
    environment = {name: value for name, value in os.environ.items() if name != SEARCH_PATH_VARIABLE}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def _check_python() -> Finding:
    found = f"Python {sys.version.split()[0]} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding(False, f"{found} is too old.", "Make an environment with Python 3.10 or newer.")
    return Finding(True, found)


def _check_torch() -> Finding:
    try:
        return Finding(True, f"torch {importlib.metadata.version('torch')}")
    except importlib.metadata.PackageNotFoundError:
        where = "https://pytorch.org/get-started/locally"
        return Finding(False, "torch is not installed.", f"Install the build for your hardware: {where}")


def _check_nnunet() -> list[Finding]:
    """The version of nnunetv2 and, where it is one that we support, what its own search finds."""
    try:
        require_supported_nnunet()
    except MisfmError as error:
        return [Finding(False, f"{error}", f"Run {INSTALL_NNUNET}")]
    return [Finding(True, f"nnunetv2 {importlib.metadata.version('nnunetv2')}"), _check_finder()]


def _check_finder() -> Finding:
    """Whether nnU-Net finds a trainer of ours, as the one class object that pickling and workers need."""
    mend = f"{SEARCH_PATH_VARIABLE} must name {DISCOVERY_FOLDER}; mend or remove what else it names."
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            found = recursive_find_trainer_class_by_name(SAMPLE_TRAINER)
    except Exception as error:  # of whatever kind: it may come from any module that nnU-Net meets on its way
        first_sentence = str(error).split(". ")[0]
        what = f"nnU-Net does not find {SAMPLE_TRAINER}: {type(error).__name__}: {first_sentence}"
        return Finding(False, what, mend)
    if not found.__module__.startswith("nnunetv2_misfm."):
        return Finding(False, f"nnU-Net finds another {SAMPLE_TRAINER}, of {found.__module__}.", mend)
    if getattr(importlib.import_module(found.__module__), SAMPLE_TRAINER, None) is not found:
        return Finding(False, f"nnU-Net finds a second copy of {SAMPLE_TRAINER}; it cannot be pickled.", mend)
    return Finding(True, f"nnU-Net finds {SAMPLE_TRAINER}")


def _check_data_folder(variable: str) -> Finding:
    """Whether one of nnU-Net's three variables names a folder that this user may write to."""
    value = os.environ.get(variable, "")
    if not value.strip():
        return Finding(False, f"{variable} is not set.", f"Run export {variable}=/path/to/{variable}")
    if not os.path.isdir(value):
        return Finding(False, f"{variable} is {value}, which is no folder.", f"Make it or mend {variable}.")
    if not os.access(value, os.W_OK):
        remedy = f"Change its permissions or export {variable} with a folder of your own."
        return Finding(False, f"{variable} is {value}, which this user may not write to.", remedy)
    return Finding(True, f"{variable} is {value}")


def _check_search_path() -> list[Finding]:
    """Whether `nnUNet_extTrainer` names our folder, and what else it names that does harm."""
    value = os.environ.get(SEARCH_PATH_VARIABLE, "")
    entries = [entry for entry in value.split(os.pathsep) if entry.strip()]
    if is_listed(DISCOVERY_FOLDER, value):
        ours = Finding(True, f"{SEARCH_PATH_VARIABLE} names {DISCOVERY_FOLDER}")
    elif entries:
        remedy = f"Run {EXPORT_BEHIND_OTHERS} or, for good, nnUNetv2_misfm enable"
        ours = Finding(False, f"{SEARCH_PATH_VARIABLE} is {value} and does not name our folder.", remedy)
    else:
        remedy = f"Run {EXPORT} or, for good, nnUNetv2_misfm enable"
        ours = Finding(False, f"{SEARCH_PATH_VARIABLE} is not set.", remedy)
    faults = {entry: _fault_of_entry(Path(entry).resolve()) for entry in entries}
    return [ours] + [
        Finding(False, f"{SEARCH_PATH_VARIABLE} names {entry}, {fault}.", f"Remove {entry} from it.")
        for entry, fault in faults.items()
        if fault
    ]


def _fault_of_entry(folder: Path) -> str:
    """Why a folder must not be in `nnUNet_extTrainer`; empty where there is no reason."""
    ours = discovery_folder().resolve()
    package = Path(__file__).resolve().parent
    site_folders = {Path(path).resolve() for path in (*site.getsitepackages(), site.getusersitepackages())}
    if folder == ours:
        return ""
    if not folder.exists():
        return "which does not exist"
    if folder.parts[-3:] == ours.parts[-3:]:
        return f"which belongs to another copy of nnunetv2_misfm than {package}"
    if package in (folder, *folder.parents) or folder == package.parent or folder in site_folders:
        return "from where nnU-Net imports installed packages a second time under other names"
    return ""


def _check_command() -> Finding:
    """Whether `nnUNetv2_train`, as the shell finds it, is the one of this environment."""
    hits = (shutil.which("nnUNetv2_train", path=folder) for folder in os.get_exec_path())
    commands = list(dict.fromkeys(Path(hit) for hit in hits if hit))
    own_folders = {Path(sysconfig.get_path("scripts")).resolve()}
    if site.ENABLE_USER_SITE:
        own_folders.add(Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))).resolve())
    others = [command for command in commands if command.parent.resolve() not in own_folders]
    if not commands:
        return Finding(False, "nnUNetv2_train is not on PATH.", "Activate the environment of nnunetv2.")
    if commands[0] in others:
        what = f"nnUNetv2_train is {commands[0]}, of another environment than {sys.executable}."
        remedy = "Activate the environment that you mean, or install nnunetv2_misfm in that one."
        return Finding(False, what, remedy)
    rest = f"; {', '.join(map(str, others))} of other environments comes later on PATH" if others else ""
    return Finding(True, f"nnUNetv2_train is {commands[0]}{rest}")


def _check_hook() -> Finding:
    hooks = ", ".join(map(str, _hooks([*_hook_folders(), *map(Path, site.getsitepackages())])))
    if not hooks:
        return Finding(True, "the start-up hook is not enabled (it is optional: nnUNetv2_misfm enable)")
    if not is_listed(DISCOVERY_FOLDER, os.environ.get(SEARCH_PATH_VARIABLE, "")):
        remedy = f"Run nnUNetv2_misfm enable again, or nnUNetv2_misfm disable and {EXPORT}"
        return Finding(False, f"the start-up hook {hooks} is there but did not act.", remedy)
    return Finding(True, f"the start-up hook is enabled: {hooks}")
