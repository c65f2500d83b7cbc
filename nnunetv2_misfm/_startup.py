"""What the start-up hook runs at every interpreter start: it tells nnU-Net where our trainers are.

Only the standard library's `os`, so that an interpreter which never touches nnU-Net starts as fast as before.
"""

import os

SEARCH_PATH_VARIABLE = "nnUNet_extTrainer"  # nnU-Net >= 2.8, nnunetv2/paths.py
DISCOVERY_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trainers", "discovery")


def is_listed(folder: str, search_path: str) -> bool:
    """Whether `folder` is an entry of `search_path` (joined by `os.pathsep`), whatever links lead to it."""
    wanted = os.path.realpath(folder)
    return any(os.path.realpath(entry) == wanted for entry in search_path.split(os.pathsep) if entry.strip())


def append_discovery_folder() -> None:
    """Append our discovery folder to `nnUNet_extTrainer` of this process and its children.

    The user's entries stay as they are and come first; a folder already listed is not listed twice.
    """
    search_path = os.environ.get(SEARCH_PATH_VARIABLE, "")
    if not is_listed(DISCOVERY_FOLDER, search_path):
        entries = [search_path, DISCOVERY_FOLDER] if search_path.strip() else [DISCOVERY_FOLDER]
        os.environ[SEARCH_PATH_VARIABLE] = os.pathsep.join(entries)
