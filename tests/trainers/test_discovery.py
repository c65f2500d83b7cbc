import importlib
import inspect
import pickle
import pkgutil
import re

import pytest
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import nnunetv2_misfm.trainers
from nnunetv2_misfm.installation import discovery_folder
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers


def trainers_of_the_package() -> dict[str, type]:
    found = {}
    for module in pkgutil.iter_modules(nnunetv2_misfm.trainers.__path__):
        members = vars(importlib.import_module(f"nnunetv2_misfm.trainers.{module.name}"))
        found.update(
            {name: m for name, m in members.items() if inspect.isclass(m) and name.startswith("nnUNetTrainer")}
        )
    del found["nnUNetTrainer"]
    return found


def test_every_trainer_is_exported_once() -> None:
    assert sorted(trainers_of_the_package()) == nnunetv2_misfm_trainers.__all__


def test_nnunets_own_search_finds_the_installed_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(discovery_folder()))
    for name, trainer in trainers_of_the_package().items():
        assert recursive_find_trainer_class_by_name(name) is trainer
        assert pickle.loads(pickle.dumps(trainer)) is trainer


def test_the_folder_holds_one_module_and_nothing_that_shadows() -> None:
    assert [module.name for module in pkgutil.iter_modules([str(discovery_folder())])] == ["nnunetv2_misfm_trainers"]


@pytest.mark.parametrize("method", ["masked_image_modelling", "models_genesis", "patch_swapping"])
def test_a_rival_is_one_file_of_under_a_hundred_lines_that_knows_no_other_method(method: str) -> None:
    source = inspect.getsource(importlib.import_module(f"nnunetv2_misfm.trainers.{method}"))
    assert len(source.splitlines()) < 100
    imported = set(re.findall(r"from nnunetv2_misfm\.trainers\.?(\w*) import", source))
    assert imported <= {"corruptions", "finetune", "pct_net", "recipe", "reconstruction"}


def test_every_trainer_has_nnunets_signatures() -> None:
    for trainer in trainers_of_the_package().values():
        constructor = list(inspect.signature(trainer).parameters)
        assert constructor == ["plans", "configuration", "fold", "dataset_json", "device"]
        assert "plans_manager" in inspect.signature(trainer.build_network_architecture).parameters
